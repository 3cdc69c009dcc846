//! Ports of this node that lead to its pods: who gets one, and why somebody does not.
//!
//! Invariant: who gets a port follows from what there is alone. Of pods it is the one that came first, so
//! that none takes a port from another, also after a restart of the agent; services come before pods.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use penstock_common::{Algorithm, Forwarding};

use super::{
    World,
    claims::{Claimed, claim_of_pod, claimed},
};
use crate::model::{
    object::{Family, ObjectName, Protocol, Rejection},
    port::{
        FrontendKind, HostPort, PodPorts, Port, PortBackend, PortFrontend, PortKey, Refusal, Scope,
    },
};

/// A port that a pod asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wish {
    sandbox: Arc<str>,
    port: HostPort,
    /// The pod that came before and has it.
    holder: Option<ObjectName>,
}

/// All that pods of this node asked for, by pod.
#[derive(Debug, Default)]
pub(super) struct HostPorts(BTreeMap<ObjectName, Vec<Wish>>);

/// Whether two of different pods' can't both be had. The unspecified address is every one, as the
/// scheduler sees it too.
fn collide(one: &HostPort, other: &HostPort) -> bool {
    one.ip.is_none() || other.ip.is_none() || one.ip == other.ip
}

impl HostPorts {
    /// What pods get that came in this order.
    fn new(pods: Vec<PodPorts>) -> Self {
        let mut all: BTreeMap<ObjectName, Vec<Wish>> = BTreeMap::new();
        type Given = (Arc<str>, ObjectName, HostPort);
        let mut given: HashMap<(u16, Protocol), Vec<Given>> = HashMap::new();
        for PodPorts {
            pod,
            sandbox,
            ports,
        } in pods
        {
            for port in ports {
                let earlier = given.entry((port.port.get(), port.protocol)).or_default();
                let holder = earlier
                    .iter()
                    .find(|(of, _, held)| *of != sandbox && collide(held, &port));
                let holder = holder.map(|(_, holder, _)| holder.clone());
                if holder.is_none() {
                    earlier.push((sandbox.clone(), pod.clone(), port.clone()));
                }
                all.entry(pod.clone()).or_default().push(Wish {
                    sandbox: sandbox.clone(),
                    port,
                    holder,
                });
            }
        }
        Self(all)
    }

    /// Whether a pod asks for any.
    pub(super) fn has(&self, pod: &ObjectName) -> bool {
        self.0.contains_key(pod)
    }

    /// Pods that ask for any.
    pub(super) fn names(&self) -> impl Iterator<Item = &ObjectName> {
        self.0.keys()
    }

    /// Pods that ask for this one, at whatever address.
    pub(super) fn with(&self, port: u16, protocol: Protocol) -> impl Iterator<Item = &ObjectName> {
        let is_it =
            move |wish: &Wish| wish.port.port.get() == port && wish.port.protocol == protocol;
        let pods = self.0.iter();
        pods.filter(move |(_, wishes)| wishes.iter().any(is_it))
            .map(|(pod, _)| pod)
    }

    /// What a pod asks for.
    fn of(&self, pod: &ObjectName) -> &[Wish] {
        self.0.get(pod).map_or(&[], Vec::as_slice)
    }

    /// What a pod claims: all but what other pods have.
    fn claimed(&self, pod: &ObjectName) -> BTreeSet<Claimed> {
        let wishes = self.of(pod).iter();
        let free = wishes.filter(|wish| wish.holder.is_none());
        free.map(|wish| claimed(&wish.port)).collect()
    }
}

impl World {
    /// Sets the ports of this node that its pods ask for, in the order in which they came.
    pub fn set_host_ports(&mut self, pods: Vec<PodPorts>) {
        self.awaits_host_ports = false;
        let old = std::mem::replace(&mut self.host_ports, HostPorts::new(pods));
        let names: BTreeSet<ObjectName> = old
            .names()
            .chain(self.host_ports.names())
            .cloned()
            .collect();
        for name in names {
            if old.of(&name) == self.host_ports.of(&name) {
                continue;
            }
            for claimed in old.claimed(&name) {
                self.unclaim_one(claimed, claim_of_pod(&name));
            }
            for claimed in self.host_ports.claimed(&name) {
                self.claim(claimed, claim_of_pod(&name));
            }
            self.dirty.insert(name);
        }
    }

    /// The pod that an interface is of, if that asks for any port of this node, and those that it does
    /// not get.
    pub fn refusals(&self, sandbox: &str) -> Option<(&ObjectName, Vec<Refusal>)> {
        let (pod, wishes) = self
            .host_ports
            .0
            .iter()
            .find(|(_, wishes)| wishes.iter().any(|wish| *wish.sandbox == *sandbox))?;
        let own = wishes.iter().filter(|wish| *wish.sandbox == *sandbox);
        Some((
            pod,
            own.filter_map(|wish| self.refused(pod, wish)).collect(),
        ))
    }

    /// Why a pod does not get what it asks for.
    fn refused(&self, pod: &ObjectName, wish: &Wish) -> Option<Refusal> {
        let port = &wish.port;
        let what = match port.ip {
            Some(ip) => format!("{} port {} of {ip}", port.protocol, port.port),
            None => format!("{} port {} of this node", port.protocol, port.port),
        };
        match &wish.holder {
            Some(holder) if holder == pod => {
                return Some(Refusal::Held(format!(
                    "{what} belongs to an earlier sandbox of this pod, which is not deleted yet"
                )));
            }
            Some(holder) => {
                return Some(Refusal::Held(format!("{what} belongs to the pod {holder}")));
            }
            None => {}
        }
        let reason = if port.pod_ips.is_empty() {
            Some("can't lead to a pod that has no address of that family (hostIP)".to_owned())
        } else if let Some(ip) = port.ip
            && !self.is_own(ip)
        {
            Some("can't be had, since this node does not have that address (hostIP)".to_owned())
        } else {
            self.refusal(pod, claimed(port), FrontendKind::HostPort)
                .or_else(|| self.node_port_at(port))
        };
        reason.map(|reason| Refusal::Denied(format!("{what} {reason}")))
    }

    /// Whether an address is this node's, also one for itself alone.
    fn is_own(&self, ip: IpAddr) -> bool {
        ip.is_loopback() || self.node_addresses.contains(&ip)
    }

    /// The node port that has a host port's one address too.
    fn node_port_at(&self, port: &HostPort) -> Option<String> {
        let any = Claimed {
            ip: None,
            ..claimed(port)
        };
        port.ip.filter(|ip| self.node_port_ips.contains(ip))?;
        let service = self.service_at(any)?;
        Some(format!("belongs to the service {service}"))
    }

    /// What a pod asks for and does not get.
    pub(super) fn pod_conflicts(&self, pod: &ObjectName) -> impl Iterator<Item = Rejection> {
        let wishes = self.host_ports.of(pod).iter();
        wishes.filter_map(|wish| {
            let reason = self.refused(pod, wish)?;
            Some(Rejection {
                kind: "Pod".to_owned(),
                object: pod.to_string(),
                origin: String::new(),
                reason: reason.to_string(),
            })
        })
    }

    /// The same of all pods.
    pub(super) fn pods_conflicts(&self) -> impl Iterator<Item = Rejection> {
        let pods = self.host_ports.names();
        pods.flat_map(|pod| self.pod_conflicts(pod))
    }

    /// Ports of this node that lead to a pod.
    pub(super) fn ports_of_host(&self, pod: &ObjectName) -> Vec<Port> {
        let wishes = self.host_ports.of(pod).iter();
        let given = wishes.filter(|wish| self.refused(pod, wish).is_none());
        let mut served: Vec<Port> = Vec::new();
        for port in given.map(|wish| &wish.port) {
            for backend in &port.pod_ips {
                let frontends = self.frontends_of_host(port, Family::of(*backend));
                let key = PortKey {
                    service: pod.clone(),
                    port: port.label(),
                    protocol: port.protocol,
                    family: Family::of(*backend),
                };
                // One that says every address in two ways.
                if frontends.is_empty() || served.iter().any(|other| other.key == key) {
                    continue;
                }
                served.push(Port {
                    key,
                    frontends,
                    source_ranges: Vec::new(),
                    affinity_secs: 0,
                    algorithm: Algorithm::default(),
                    forwarding: Forwarding::default(),
                    has_endpoints: true,
                    backends: vec![PortBackend {
                        address: *backend,
                        port: port.pod_port.get(),
                        in_cluster: true,
                        in_local: false,
                        weight: 1,
                    }],
                });
            }
        }
        served
    }

    /// Where a host port is dialled. An address at which somebody else has the port is not among them: a
    /// load balancer whose address is this node's, say, may be what the pod stands for.
    fn frontends_of_host(&self, port: &HostPort, family: Family) -> Vec<PortFrontend> {
        let is_free = |ip: &IpAddr| {
            let here = Claimed {
                ip: Some(*ip),
                ..claimed(port)
            };
            let is_taken = port.ip.is_none() && self.claims.contains_key(&here);
            Family::of(*ip) == family && !is_taken
        };
        let ips: BTreeSet<IpAddr> = match port.ip {
            Some(ip) => BTreeSet::from([ip]),
            // Also for the node's own processes, wherever node ports are.
            None => {
                let loopback = self.node_ports.loopback_addresses();
                self.node_addresses
                    .iter()
                    .copied()
                    .chain(loopback)
                    .collect()
            }
        };
        let frontend = |address: IpAddr| PortFrontend {
            address,
            port: port.port.get(),
            kind: FrontendKind::HostPort,
            internal: Scope::Cluster,
            external: Scope::Cluster,
            is_balancers: false,
        };
        ips.into_iter().filter(is_free).map(frontend).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use super::*;
    use crate::model::object::{Event, Object, Service, ServicePort, TrafficPolicy};

    const NODE: &str = "172.18.0.2";

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn port(at: Option<&str>, number: u16) -> HostPort {
        HostPort {
            ip: at.map(ip),
            port: NonZeroU16::new(number).unwrap(),
            protocol: Protocol::Tcp,
            pod_ips: vec![ip("10.244.0.5")],
            pod_port: NonZeroU16::new(80).unwrap(),
        }
    }

    fn pod(name: &str, sandbox: &str, ports: Vec<HostPort>) -> PodPorts {
        PodPorts {
            pod: ObjectName::new("default", name),
            sandbox: sandbox.into(),
            ports,
        }
    }

    /// A service with a node port, or a load balancer's address, or neither.
    fn service(node_port: Option<u16>, balancer: Option<&str>) -> Object {
        Object::Service(Service {
            name: ObjectName::new("default", "a"),
            created_secs: i64::MAX,
            cluster_ips: vec![ip("10.96.0.1")],
            ports: vec![ServicePort {
                name: "".into(),
                protocol: Protocol::Tcp,
                port: NonZeroU16::new(80).unwrap(),
                node_port: node_port.and_then(NonZeroU16::new),
            }],
            affinity_secs: None,
            algorithm: Algorithm::default(),
            forwarding: Forwarding::default(),
            internal_policy: TrafficPolicy::Cluster,
            external_policy: TrafficPolicy::Cluster,
            external_ips: Vec::new(),
            balancer_ips: balancer.map(ip).into_iter().collect(),
            source_ranges: Vec::new(),
            health_check_port: None,
            left_out: Vec::new(),
        })
    }

    fn world(pods: Vec<PodPorts>) -> World {
        let mut world = World::new("here");
        world.set_node_addresses(vec![ip(NODE)]);
        world.set_host_ports(pods);
        world.take_dirty();
        world
    }

    fn refusals(world: &World, sandbox: &str) -> Vec<String> {
        let (_, refusals) = world.refusals(sandbox).expect("it asks for some");
        refusals.iter().map(ToString::to_string).collect()
    }

    /// Where a pod's ports are dialled.
    fn dialled(world: &World, pod: &str) -> Vec<String> {
        let ports = world.ports(&ObjectName::new("default", pod));
        let frontends = ports.iter().flat_map(|port| &port.frontends);
        frontends
            .map(|frontend| format!("{}:{}", frontend.address, frontend.port))
            .collect()
    }

    #[test]
    fn who_came_first_keeps_a_port_until_it_goes() {
        let first = pod("z", "1", vec![port(None, 8080)]);
        let second = pod("a", "2", vec![port(Some(NODE), 8080), port(None, 9090)]);
        let again = pod("z", "3", vec![port(None, 8080)]);
        let mut world = world(vec![first.clone(), second.clone(), again.clone()]);
        assert_eq!(refusals(&world, "1"), Vec::<String>::new());
        assert_eq!(
            refusals(&world, "2"),
            [format!(
                "TCP port 8080 of {NODE} belongs to the pod default/z"
            )]
        );
        assert_eq!(
            refusals(&world, "3"),
            [
                "TCP port 8080 of this node belongs to an earlier sandbox of this pod, which is not \
              deleted yet"
            ]
        );
        assert_eq!(dialled(&world, "z"), ["127.0.0.1:8080", "172.18.0.2:8080"]);
        assert_eq!(dialled(&world, "a"), ["127.0.0.1:9090", "172.18.0.2:9090"]);
        assert!(matches!(
            world.refusals("2").unwrap().1.as_slice(),
            [Refusal::Held(_)]
        ));
        let told: Vec<String> = world.conflicts().iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), 2, "{told:?}");
        // The next in line gets it, and whoever is behind that waits on.
        world.set_host_ports(vec![second, again]);
        assert_eq!(dialled(&world, "a").len(), 3);
        assert_eq!(dialled(&world, "z"), Vec::<String>::new());
        assert_eq!(
            world.take_dirty(),
            [
                ObjectName::new("default", "a"),
                ObjectName::new("default", "z")
            ]
        );
    }

    #[test]
    fn different_addresses_and_protocols_are_different_ports() {
        let udp = HostPort {
            protocol: Protocol::Udp,
            ..port(Some(NODE), 8080)
        };
        let world = world(vec![
            pod("a", "1", vec![port(Some("127.0.0.1"), 8080)]),
            pod("b", "2", vec![port(Some(NODE), 8080)]),
            pod("c", "3", vec![udp]),
        ]);
        for sandbox in ["1", "2", "3"] {
            assert_eq!(refusals(&world, sandbox), Vec::<String>::new());
        }
    }

    #[test]
    fn a_services_node_port_is_no_pods() {
        for at in [None, Some(NODE)] {
            let mut world = world(vec![pod("pod/a", "1", vec![port(at, 30_080)])]);
            assert_eq!(refusals(&world, "1"), Vec::<String>::new());
            let own = dialled(&world, "pod/a");
            let node_port = service(Some(30_080), None);
            world.apply(Event::Applied(node_port)).unwrap();
            let pod = ObjectName::new("default", "pod/a");
            assert!(world.take_dirty().contains(&pod));
            let told = refusals(&world, "1").concat();
            assert!(told.ends_with("belongs to the service default/a"), "{told}");
            assert!(matches!(
                world.refusals("1").unwrap().1.as_slice(),
                [Refusal::Denied(_)]
            ));
            world
                .apply(Event::Applied(self::service(None, None)))
                .unwrap();
            assert!(world.take_dirty().contains(&pod));
            assert_eq!(dialled(&world, "pod/a"), own);
        }
    }

    #[test]
    fn a_balancers_address_that_is_the_nodes_refuses_no_pod() {
        // What k3s' ServiceLB does.
        let mut world = world(vec![pod("pod/a", "1", vec![port(None, 80)])]);
        let balancer = service(None, Some(NODE));
        world.apply(Event::Applied(balancer)).unwrap();
        assert_eq!(refusals(&world, "1"), Vec::<String>::new());
        assert_eq!(dialled(&world, "pod/a"), ["127.0.0.1:80"]);
    }

    #[test]
    fn an_address_has_to_be_the_nodes_and_of_a_family_of_the_pods() {
        let foreign = pod("a", "1", vec![port(Some("192.0.2.1"), 80)]);
        let other_family = HostPort {
            pod_ips: Vec::new(),
            ..port(Some("::1"), 80)
        };
        let mut world = world(vec![foreign, pod("b", "2", vec![other_family])]);
        let told = refusals(&world, "1").concat();
        assert!(told.contains("does not have that address"), "{told}");
        let told = refusals(&world, "2").concat();
        assert!(told.contains("no address of that family"), "{told}");
        assert_eq!(dialled(&world, "a"), Vec::<String>::new());
        world.set_node_addresses(vec![ip(NODE), ip("192.0.2.1")]);
        assert_eq!(refusals(&world, "1"), Vec::<String>::new());
        assert!(
            world
                .take_dirty()
                .contains(&ObjectName::new("default", "a"))
        );
        assert_eq!(dialled(&world, "a"), ["192.0.2.1:80"]);
    }
}
