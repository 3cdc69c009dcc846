//! Which endpoints serve a port on this node: kube-proxy's `CategorizeEndpoints`.
//!
//! Ready endpoints, or terminating ones that still serve where none is ready; of these, for the
//! Cluster policy, the ones that hints give to this node or zone, and for the Local policy those on
//! this node (KEP-1669, KEP-2086, KEP-2433, KEP-3015).

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use penstock_common::Algorithm;

use super::{
    object::{Endpoint, EndpointSlice, Family, Node, Protocol},
    port::PortBackend,
};

/// This node, as endpoints and hints name it.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its zone.
    pub zone: Option<&'a str>,
}

impl<'a> Place<'a> {
    /// The place of the node called `name`, with the zone of its object if there is one.
    pub fn of(name: &'a str, node: Option<&'a Node>) -> Self {
        Self {
            name,
            zone: node.and_then(|node| node.zone.as_deref()),
        }
    }
}

/// A port's endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Live backends, sorted by address and port.
    pub backends: Vec<PortBackend>,
    /// Whether anybody serves the port anywhere.
    pub has_endpoints: bool,
}

/// Live backends of a port and the scopes that each is in.
///
/// Each scope falls back to its terminating endpoints by itself.
pub fn choose<'a>(
    slices: impl Iterator<Item = &'a EndpointSlice>,
    family: Family,
    port: (&str, Protocol),
    place: Place<'_>,
) -> Choice {
    let merged = merge(slices, family, port, place.name);
    let is_terminating = |endpoint: &Endpoint| endpoint.serving && endpoint.terminating;
    let is_local = |endpoint: &Endpoint| endpoint.node.as_deref() == Some(place.name);
    let topology = Topology::of(merged.values().copied(), place);
    let is_near = |endpoint: &Endpoint| topology.includes(endpoint, place);
    let any = |wanted: &dyn Fn(&Endpoint) -> bool| merged.values().any(|endpoint| wanted(endpoint));
    let has_ready = any(&|endpoint| endpoint.ready && is_near(endpoint));
    let has_local_ready = any(&|endpoint| endpoint.ready && is_local(endpoint));
    let in_cluster = |endpoint: &Endpoint| {
        if has_ready {
            endpoint.ready && is_near(endpoint)
        } else {
            is_terminating(endpoint)
        }
    };
    let in_local = |endpoint: &Endpoint| {
        is_local(endpoint)
            && if has_local_ready {
                endpoint.ready
            } else {
                is_terminating(endpoint)
            }
    };
    let backends = merged
        .iter()
        .map(|(&(address, port), endpoint)| {
            let backend = PortBackend {
                address,
                port,
                in_cluster: in_cluster(endpoint),
                in_local: in_local(endpoint),
                weight: endpoint.weight,
            };
            (backend, endpoint.serving)
        })
        .filter(|(backend, serves)| backend.in_cluster || backend.in_local || *serves)
        .map(|(backend, _)| backend)
        .collect();
    Choice {
        backends,
        has_endpoints: any(&|endpoint| endpoint.ready || is_terminating(endpoint)),
    }
}

/// Lets weights count where the algorithm asks for them: without one, a backend rests, and where all rest
/// it is as if there were none.
pub fn weigh(choice: &mut Choice, algorithm: Algorithm) {
    let counts = algorithm.is_weighted();
    if counts {
        choice.has_endpoints &= choice.backends.iter().any(|backend| backend.weight > 0);
    }
    for backend in &mut choice.backends {
        if counts && backend.weight == 0 {
            backend.in_cluster = false;
            backend.in_local = false;
        }
        backend.weight = if counts { backend.weight.max(1) } else { 1 };
    }
}

/// The endpoints that listen on a port, each address and port once.
///
/// While an endpoint moves between slices two of them show it. The one on this node wins, as in
/// kube-proxy; then the one that can do more, so that the result does not depend on their order.
fn merge<'a>(
    slices: impl Iterator<Item = &'a EndpointSlice>,
    family: Family,
    (name, protocol): (&str, Protocol),
    node: &str,
) -> BTreeMap<(IpAddr, u16), &'a Endpoint> {
    let rank = |endpoint: &Endpoint| {
        let is_local = endpoint.node.as_deref() == Some(node);
        (
            is_local,
            endpoint.ready,
            endpoint.serving,
            !endpoint.terminating,
            endpoint.weight,
        )
    };
    let mut merged: BTreeMap<(IpAddr, u16), &Endpoint> = BTreeMap::new();
    for slice in slices.filter(|slice| slice.family == family) {
        let ports = slice.ports.iter();
        for port in ports.filter(|port| &*port.name == name && port.protocol == protocol) {
            for endpoint in &slice.endpoints {
                merged
                    .entry((endpoint.address, port.port.get()))
                    .and_modify(|known| {
                        if rank(endpoint) > rank(known) {
                            *known = endpoint;
                        }
                    })
                    .or_insert(endpoint);
            }
        }
    }
    merged
}

/// How hints narrow a service's ready endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology {
    /// Not at all.
    None,
    /// To those for this node.
    Node,
    /// To those for this node's zone.
    Zone,
}

impl Topology {
    /// Hints count only if every ready endpoint has one and some endpoint is for this place.
    fn of<'a>(endpoints: impl Iterator<Item = &'a Endpoint>, place: Place<'_>) -> Self {
        let mut all_nodes = true;
        let mut all_zones = true;
        let mut for_node = false;
        let mut for_zone = false;
        for endpoint in endpoints.filter(|endpoint| endpoint.ready) {
            all_nodes &= !endpoint.for_nodes.is_empty();
            all_zones &= !endpoint.for_zones.is_empty();
            for_node |= has(&endpoint.for_nodes, Some(place.name));
            for_zone |= has(&endpoint.for_zones, place.zone);
        }
        if all_nodes && for_node {
            Self::Node
        } else if all_zones && for_zone {
            Self::Zone
        } else {
            Self::None
        }
    }

    fn includes(self, endpoint: &Endpoint, place: Place<'_>) -> bool {
        match self {
            Self::None => true,
            Self::Node => has(&endpoint.for_nodes, Some(place.name)),
            Self::Zone => has(&endpoint.for_zones, place.zone),
        }
    }
}

fn has(names: &[Arc<str>], wanted: Option<&str>) -> bool {
    wanted.is_some_and(|wanted| names.iter().any(|name| &**name == wanted))
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use super::*;
    use crate::model::object::{EndpointPort, ObjectName};

    /// An endpoint in words: "ready", "unready", "serving" or "ended" (both terminating), the node that it is
    /// on ("@here"), and its hints ("node=here", "zone=z1").
    fn endpoint(number: u8, words: &str) -> Endpoint {
        let of = |what: &str| -> Box<[Arc<str>]> {
            let found = words.split(' ').filter_map(|word| word.strip_prefix(what));
            found.map(Arc::from).collect()
        };
        let is = |what: &str| words.split(' ').any(|word| word == what);
        Endpoint {
            address: [10, 0, 0, number].into(),
            ready: is("ready"),
            serving: is("ready") || is("serving"),
            terminating: is("serving") || is("ended"),
            weight: 1,
            node: of("@").first().cloned(),
            for_zones: of("zone="),
            for_nodes: of("node="),
        }
    }

    /// Which of them clients of the Cluster and of the Local policy get on the node "here" in this zone, by
    /// their places.
    fn chosen_in(zone: Option<&str>, endpoints: &[&str]) -> [Vec<usize>; 2] {
        let numbers = 0..;
        let slice = EndpointSlice {
            name: ObjectName::new("default", "web-1"),
            service: ObjectName::new("default", "web"),
            family: Family::V4,
            ports: vec![EndpointPort {
                name: "http".into(),
                protocol: Protocol::Tcp,
                port: NonZeroU16::MIN,
            }],
            endpoints: numbers
                .zip(endpoints)
                .map(|(number, words)| endpoint(number, words))
                .collect(),
            triggered: None,
        };
        let place = Place { name: "here", zone };
        let port = ("http", Protocol::Tcp);
        let choice = choose(std::iter::once(&slice), Family::V4, port, place);
        let places = |is_in: fn(&PortBackend) -> bool| {
            let backends = choice.backends.iter().filter(|backend| is_in(backend));
            let last = backends.map(|backend| match backend.address {
                IpAddr::V4(ip) => ip.octets()[3],
                IpAddr::V6(_) => unreachable!("the slice is of IPv4"),
            });
            last.map(usize::from).collect()
        };
        [
            places(|backend| backend.in_cluster),
            places(|backend| backend.in_local),
        ]
    }

    fn in_cluster(endpoints: &[&str]) -> Vec<usize> {
        let [in_cluster, _] = chosen_in(Some("z1"), endpoints);
        in_cluster
    }

    #[test]
    fn hints_narrow_ready_endpoints_if_all_of_them_have_one() {
        assert_eq!(in_cluster(&["ready node=here", "ready node=there"]), [0]);
        assert_eq!(in_cluster(&["ready zone=z1", "ready zone=z2"]), [0]);
        assert_eq!(
            in_cluster(&["ready node=there node=here", "ready zone=z2 node=here"]),
            [0, 1]
        );
        for hint in ["node=here", "zone=z1"] {
            let hinted = format!("ready {hint}");
            assert_eq!(in_cluster(&[&hinted, "ready"]), [0, 1], "{hint}");
        }
    }

    #[test]
    fn what_is_not_ready_has_no_say_in_hints() {
        for hint in ["node", "zone"] {
            let [own, other] = match hint {
                "node" => ["node=here", "node=there"],
                _ => ["zone=z1", "zone=z2"],
            };
            let [own_ready, other_ready] = [own, other].map(|hint| format!("ready {hint}"));
            for state in ["unready", "serving", "ended"] {
                // Without a hint it does not switch the others' off,
                let without = [&*own_ready, &other_ready, state];
                assert_eq!(in_cluster(&without), [0], "{hint}, {state}");
                // and with one for this place it does not switch them on, which would leave nobody.
                let hinted = format!("{state} {own}");
                let with = [&*other_ready, &hinted];
                assert_eq!(in_cluster(&with), [0], "{hint}, {state}");
            }
        }
    }

    #[test]
    fn hints_for_other_places_alone_are_none() {
        let nodes = ["ready node=there", "ready node=elsewhere"];
        assert_eq!(in_cluster(&nodes), [0, 1]);
        let zones = ["ready zone=z2", "ready zone=z3"];
        assert_eq!(in_cluster(&zones), [0, 1]);
        // A node without a zone is in none.
        let zones = ["ready zone=z1", "ready zone=z2"];
        assert_eq!(chosen_in(None, &zones)[0], [0, 1]);
    }

    #[test]
    fn where_hints_for_nodes_say_nothing_those_for_zones_do() {
        // One has none.
        let missing = ["ready node=here zone=z1", "ready zone=z1", "ready zone=z2"];
        assert_eq!(in_cluster(&missing), [0, 1]);
        // None is for this node.
        let others = [
            "ready node=there zone=z1",
            "ready node=there zone=z2",
            "ready node=elsewhere zone=z1",
        ];
        assert_eq!(in_cluster(&others), [0, 2]);
        // Where both do, the node's come first.
        let both = ["ready node=here zone=z2", "ready node=there zone=z1"];
        assert_eq!(in_cluster(&both), [0]);
    }

    #[test]
    fn hints_do_not_narrow_endpoints_that_terminate() {
        for hints in [["node=here", "node=there"], ["zone=z1", "zone=z2"]] {
            let [own, other] = hints.map(|hint| format!("serving {hint}"));
            assert_eq!(in_cluster(&[&own, &other, "unready", "ended"]), [0, 1]);
        }
    }

    #[test]
    fn hints_do_not_narrow_the_local_scope() {
        let endpoints = [
            "ready @here node=there zone=z2",
            "ready @there node=here zone=z1",
            "ready @here node=here zone=z1",
        ];
        assert_eq!(
            chosen_in(Some("z1"), &endpoints),
            [vec![1, 2], vec![0, 2]],
            "ready"
        );
        let endpoints = endpoints.map(|words| words.replace("ready", "serving"));
        let endpoints = [0, 1, 2].map(|index: usize| &*endpoints[index]);
        assert_eq!(
            chosen_in(Some("z1"), &endpoints),
            [vec![0, 1, 2], vec![0, 2]],
            "terminating"
        );
    }
}
