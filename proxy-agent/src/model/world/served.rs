//! What this node should serve, as far as nobody else has it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use penstock_common::Forwarding;

use super::{
    World,
    claims::{Claimed, claims},
};
use crate::model::{
    endpoints::{self, Choice, Place},
    object::{Family, ObjectName, Protocol, Rejection, Service, ServicePort, TrafficPolicy},
    port::{FrontendKind, Port, PortFrontend, PortKey, Scope},
};

impl World {
    /// What this node should serve for a service, or a pod's host ports; nothing for one that is gone.
    pub fn ports(&self, name: &ObjectName) -> Vec<Port> {
        if self.host_ports.has(name) {
            return self.ports_of_host(name);
        }
        let Some(service) = self.services.get(name) else {
            return Vec::new();
        };
        let mut ports = Vec::with_capacity(service.ports.len() * service.cluster_ips.len());
        for port in &service.ports {
            for ip in &service.cluster_ips {
                let family = Family::of(*ip);
                let frontends = self.frontends_of(service, port, family);
                if frontends.is_empty() {
                    continue;
                }
                let choice = self.choice(service, port, family);
                let ranges = service.source_ranges.iter().copied();
                ports.push(Port {
                    key: PortKey {
                        service: name.clone(),
                        port: port.name.clone(),
                        protocol: port.protocol,
                        family,
                    },
                    frontends,
                    source_ranges: ranges
                        .filter(|range| Family::of(range.ip()) == family)
                        .collect(),
                    affinity_secs: service.affinity_secs.unwrap_or(0),
                    algorithm: service.algorithm,
                    forwarding: match port.protocol {
                        Protocol::Tcp | Protocol::Udp => service.forwarding,
                        // The programs hand no SCTP over.
                        Protocol::Sctp => Forwarding::default(),
                    },
                    has_endpoints: choice.has_endpoints,
                    backends: choice.backends,
                });
            }
        }
        ports
    }

    /// What clients of a port may dial, sorted.
    fn frontends_of(
        &self,
        service: &Service,
        port: &ServicePort,
        family: Family,
    ) -> Vec<PortFrontend> {
        let internal = service.internal_policy.into();
        // Clients in the cluster reach every endpoint by an external address too (KEP-1669 and
        // kube-proxy's short circuit), whatever the policy for those outside.
        let outside = (Scope::Cluster, service.external_policy.into());
        let at = |ips: &[IpAddr], kind, (internal, external)| -> Vec<PortFrontend> {
            let ips = ips.iter().filter(|ip| Family::of(**ip) == family);
            let frontend = |ip: &IpAddr| PortFrontend {
                address: *ip,
                port: port.port.get(),
                kind,
                internal,
                external,
                is_balancers: kind == FrontendKind::Balancer,
            };
            ips.map(frontend).collect()
        };
        let mut frontends = at(
            &service.cluster_ips,
            FrontendKind::Cluster,
            (internal, internal),
        );
        frontends.extend(at(&service.balancer_ips, FrontendKind::Balancer, outside));
        frontends.extend(at(&service.external_ips, FrontendKind::ExternalIp, outside));
        frontends.retain(|frontend| {
            let claimed = Claimed {
                ip: Some(frontend.address),
                port: frontend.port,
                protocol: port.protocol,
            };
            self.refusal(&service.name, claimed, frontend.kind)
                .is_none()
        });
        if let Some(number) = port.node_port {
            let any = Claimed {
                ip: None,
                port: number.get(),
                protocol: port.protocol,
            };
            let ips = self.node_port_ips.iter();
            let is_free = |ip: &&IpAddr| {
                let here = Claimed {
                    ip: Some(**ip),
                    ..any
                };
                Family::of(**ip) == family && self.service_at(here).is_none()
            };
            if self
                .refusal(&service.name, any, FrontendKind::NodePort)
                .is_none()
            {
                frontends.extend(ips.filter(is_free).map(|ip| PortFrontend {
                    address: *ip,
                    port: number.get(),
                    kind: FrontendKind::NodePort,
                    internal: outside.0,
                    external: outside.1,
                    is_balancers: false,
                }));
            }
        }
        frontends.sort_unstable();
        frontends.dedup_by(|later, first| {
            let is_same = (later.address, later.port) == (first.address, first.port);
            first.is_balancers |= is_same && later.is_balancers;
            is_same
        });
        frontends
    }

    /// At which addresses load balancers may ask; `None` for all.
    pub fn health_addresses(&self) -> Option<BTreeSet<IpAddr>> {
        let are_all = self.node_ports.which.is_default() || self.node_ports.which.has_all();
        (!are_all).then(|| self.node_port_ips.clone())
    }

    /// By `healthCheckNodePort`: the service, and how many of its endpoints on this node are ready.
    /// Those that only terminate do not count (KEP-1669).
    pub fn health_checks(&self) -> BTreeMap<u16, (ObjectName, usize)> {
        let checked = self.checked.iter();
        checked
            .filter_map(|name| {
                let service = self.services.get(name)?;
                let port = service.health_check_port?;
                Some((port.get(), (name.clone(), self.ready_here(service))))
            })
            .collect()
    }

    /// The more of either family, since endpoints have an address of each. Those whose weight keeps
    /// new connections away do not count.
    fn ready_here(&self, service: &Service) -> usize {
        let is_weighted = service.algorithm.is_weighted();
        let count = |family| {
            let slices = self
                .slices_of(&service.name)
                .filter(|slice| slice.family == family);
            let here = slices
                .flat_map(|slice| &slice.endpoints)
                .filter(|endpoint| {
                    let is_here = endpoint.node.as_deref() == Some(&self.node_name);
                    endpoint.ready && is_here && (endpoint.weight > 0 || !is_weighted)
                });
            here.map(|endpoint| endpoint.address)
                .collect::<BTreeSet<_>>()
                .len()
        };
        count(Family::V4).max(count(Family::V6))
    }

    /// How many ports of services have endpoints, and none for clients inside, or outside, since none is on this
    /// node and the policy is Local: both numbers for each family.
    pub fn without_local_endpoints(&self) -> [(Family, [usize; 2]); 2] {
        [Family::V4, Family::V6].map(|family| {
            let services = self.local.iter().filter_map(|name| self.services.get(name));
            let mut counts = [0, 0];
            for service in services {
                let policies = [service.internal_policy, service.external_policy];
                if !service
                    .cluster_ips
                    .iter()
                    .any(|ip| Family::of(*ip) == family)
                {
                    continue;
                }
                for port in &service.ports {
                    let choice = self.choice(service, port, family);
                    let is_served = choice.backends.iter().any(|backend| backend.in_local);
                    for (count, policy) in counts.iter_mut().zip(policies) {
                        let is_local = policy == TrafficPolicy::Local;
                        *count += usize::from(is_local && choice.has_endpoints && !is_served);
                    }
                }
            }
            (family, counts)
        })
    }

    /// Who serves a port here, with the weights that its algorithm heeds.
    fn choice(&self, service: &Service, port: &ServicePort, family: Family) -> Choice {
        let mut choice = endpoints::choose(
            self.slices_of(&service.name),
            family,
            (&port.name, port.protocol),
            Place::of(&self.node_name, self.node()),
        );
        endpoints::weigh(&mut choice, service.algorithm);
        choice
    }

    /// Services with a way for clients outside to backends of other nodes that is not the usual one.
    pub fn forwarded(&self) -> impl Iterator<Item = &Service> {
        let names = self.forwarded.iter();
        names.filter_map(|name| self.services.get(name))
    }

    /// Every frontend that a service wants and does not get, and whatever of one can't be used, with the
    /// reason.
    pub fn conflicts(&self) -> Vec<Rejection> {
        let mut conflicts: Vec<Rejection> = self
            .claims
            .iter()
            .flat_map(|(claimed, claims)| claims.iter().map(move |claim| (claimed, claim)))
            .filter_map(|(claimed, (_, name))| self.conflict(name, *claimed))
            .chain(self.pods_conflicts())
            .chain(
                self.odd_services
                    .iter()
                    .flat_map(|name| self.left_out(name)),
            )
            .collect();
        conflicts.sort_by(|a, b| (&a.object, &a.reason).cmp(&(&b.object, &b.reason)));
        conflicts
    }

    /// The same of one service, or pod.
    pub fn conflicts_of(&self, name: &ObjectName) -> Vec<Rejection> {
        if self.host_ports.has(name) {
            return self.pod_conflicts(name).collect();
        }
        let service = self.services.get(name);
        let wanted = service.into_iter().flat_map(claims);
        wanted
            .filter_map(|claimed| self.conflict(name, claimed))
            .chain(self.left_out(name))
            .collect()
    }

    /// What of a service can't be used.
    fn left_out(&self, name: &ObjectName) -> impl Iterator<Item = Rejection> {
        let service = self.services.get(name).into_iter();
        service.flat_map(|service| {
            service.left_out.iter().map(|reason| Rejection {
                kind: "Service".to_owned(),
                object: service.name.to_string(),
                origin: String::new(),
                reason: reason.clone(),
            })
        })
    }

    fn conflict(&self, name: &ObjectName, claimed: Claimed) -> Option<Rejection> {
        let Claimed { ip, port, protocol } = claimed;
        let service = self.services.get(name)?;
        let is_cluster = ip.is_some_and(|ip| service.cluster_ips.contains(&ip));
        let kind = match (is_cluster, ip) {
            (true, _) => FrontendKind::Cluster,
            (false, Some(_)) => FrontendKind::ExternalIp,
            (false, None) => FrontendKind::NodePort,
        };
        let reason = self.refusal(name, claimed, kind)?;
        let place = match ip {
            Some(ip) => format!("port {port} of {ip}"),
            None => format!("port {port} of this node"),
        };
        Some(Rejection {
            kind: "Service".to_owned(),
            object: name.to_string(),
            origin: String::new(),
            reason: format!("{protocol} {place} {reason}"),
        })
    }

    /// Why a service does not get a frontend that it claims.
    pub(super) fn refusal(
        &self,
        name: &ObjectName,
        claimed: Claimed,
        kind: FrontendKind,
    ) -> Option<String> {
        let is_own = claimed
            .ip
            .is_some_and(|ip| self.node_addresses.contains(&ip));
        if is_own && kind == FrontendKind::Cluster {
            return Some("is this node's own address; a service can't have it".to_owned());
        }
        let (_, owner) = self.claims.get(&claimed)?.first()?;
        (owner != name).then(|| {
            // Which is older makes no difference for a pod.
            let kind = if kind == FrontendKind::HostPort {
                "service"
            } else {
                "older service"
            };
            format!("belongs to the {kind} {owner}")
        })
    }

    /// The service that is to be dialled there, if one is.
    pub(super) fn service_at(&self, claimed: Claimed) -> Option<&ObjectName> {
        let (_, owner) = self.claims.get(&claimed)?.first()?;
        self.services.contains_key(owner).then_some(owner)
    }
}
