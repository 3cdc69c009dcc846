//! From nodes to routes: pure, so that a cluster of any shape can be tested.
//!
//! Invariant: what one node claims is never taken from another; of two claims to overlapping ranges
//! this node's own holds, then the one of the node that comes first by name.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use ipnetwork::IpNetwork;

use crate::model::object::{Family, Node, Rejection};

/// How packets reach other nodes' pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Routing {
    /// Through VXLAN, always.
    #[default]
    Vxlan,
    /// As they are where the node is on a network of ours, through VXLAN where it is not.
    Native,
}

impl std::fmt::Display for Routing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Vxlan => "vxlan",
            Self::Native => "native",
        })
    }
}

/// How a range is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hop {
    /// Through a tunnel to this address.
    Tunnel(IpAddr),
    /// By way of this address, which is on a network of ours.
    Via(IpAddr),
}

impl std::fmt::Display for Hop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tunnel(ip) => write!(f, "tunnel to {ip}"),
            Self::Via(ip) => write!(f, "via {ip}"),
        }
    }
}

/// Another node's range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remote {
    /// The node.
    pub node: Arc<str>,
    /// Its range.
    pub range: IpNetwork,
    /// How it is reached.
    pub hop: Hop,
}

/// What a node's part of the network is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// This node's ranges, at most one a family.
    pub own: Vec<IpNetwork>,
    /// Other nodes' ranges.
    pub remote: BTreeMap<IpNetwork, Remote>,
    /// What of the nodes can't be used.
    pub rejections: Vec<Rejection>,
}

/// Plans for the node `name`, one of `nodes`. `networks` are those that this node's interfaces are
/// on.
pub fn plan(name: &str, nodes: &[Node], routing: Routing, networks: &[IpNetwork]) -> Plan {
    let mut plan = Plan::default();
    let Some(own) = nodes.iter().find(|node| *node.name == *name) else {
        return plan;
    };
    plan.own = one_a_family(own, &mut plan.rejections);
    // Disjoint ranges in order: only neighbours can overlap a further one.
    let mut taken: BTreeMap<IpNetwork, &str> =
        plan.own.iter().map(|range| (*range, name)).collect();
    let mut others: Vec<&Node> = nodes.iter().filter(|node| *node.name != *name).collect();
    others.sort_by(|a, b| a.name.cmp(&b.name));
    for node in others {
        for range in one_a_family(node, &mut plan.rejections) {
            if let Some((other, owner)) = overlapping(&taken, range) {
                plan.rejections.push(rejection(
                    node,
                    format!("its range {range} overlaps {other} of node {owner}; it gets no route"),
                ));
                continue;
            }
            let Some(hop) = hop(node, own, range, routing, networks) else {
                plan.rejections.push(rejection(
                    node,
                    format!(
                        "it has no address (InternalIP) of a family that this node has too, so \
                         {range} can't be reached"
                    ),
                ));
                continue;
            };
            taken.insert(range, &node.name);
            let remote = Remote {
                node: node.name.clone(),
                range,
                hop,
            };
            plan.remote.insert(range, remote);
        }
    }
    plan
}

fn rejection(node: &Node, reason: String) -> Rejection {
    Rejection {
        kind: "Node".to_owned(),
        object: node.name.to_string(),
        origin: "network".to_owned(),
        reason,
    }
}

/// A node's first range of each family.
fn one_a_family(node: &Node, rejections: &mut Vec<Rejection>) -> Vec<IpNetwork> {
    let mut ranges: Vec<IpNetwork> = Vec::new();
    for range in &node.pod_cidrs {
        if ranges
            .iter()
            .any(|other| other.is_ipv4() == range.is_ipv4())
        {
            rejections.push(rejection(
                node,
                format!("{range} is its second range of a family; the first one is used"),
            ));
        } else {
            ranges.push(*range);
        }
    }
    ranges
}

/// A taken range that overlaps `range`, and whose it is.
fn overlapping<'a>(
    taken: &BTreeMap<IpNetwork, &'a str>,
    range: IpNetwork,
) -> Option<(IpNetwork, &'a str)> {
    let overlaps = |(other, owner): (&IpNetwork, &&'a str)| {
        let is_same_family = other.is_ipv4() == range.is_ipv4();
        let overlap =
            is_same_family && (other.contains(range.network()) || range.contains(other.network()));
        overlap.then_some((*other, *owner))
    };
    // A range that covers `range` sorts before it, one that it covers at once after it. Of disjoint
    // ranges only the nearest on each side can overlap.
    let before = taken.range(..=range).next_back().and_then(overlaps);
    before.or_else(|| taken.range(range..).next().and_then(overlaps))
}

/// How to reach a range of a node.
fn hop(
    node: &Node,
    own: &Node,
    range: IpNetwork,
    routing: Routing,
    networks: &[IpNetwork],
) -> Option<Hop> {
    if routing == Routing::Native {
        let neighbour = node.internal_ips.iter().find(|ip| {
            ip.is_ipv4() == range.is_ipv4() && networks.iter().any(|network| network.contains(**ip))
        });
        if let Some(ip) = neighbour {
            return Some(Hop::Via(*ip));
        }
    }
    let has_family = |family| own.internal_ips.iter().any(|ip| Family::of(*ip) == family);
    let reachable = node
        .internal_ips
        .iter()
        .find(|ip| has_family(Family::of(**ip)));
    reachable.map(|ip| Hop::Tunnel(*ip))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, ips: &[&str], ranges: &[&str]) -> Node {
        Node {
            name: name.into(),
            zone: None,
            internal_ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            pod_cidrs: ranges.iter().map(|range| range.parse().unwrap()).collect(),
            is_leaving: false,
            left_out: Vec::new(),
        }
    }

    fn shown(plan: &Plan) -> Vec<String> {
        let remote = plan
            .remote
            .iter()
            .map(|(range, remote)| format!("{range} {:?}", remote.hop));
        let rejections = plan
            .rejections
            .iter()
            .map(|rejection| format!("{}: {}", rejection.object, rejection.reason));
        remote.chain(rejections).collect()
    }

    #[test]
    fn nodes_are_reached_by_tunnel_or_on_a_shared_network() {
        let nodes = [
            node(
                "a",
                &["10.0.0.1", "fd00::1"],
                &["10.244.0.0/24", "fd00:a::/64"],
            ),
            node(
                "b",
                &["10.0.0.2", "fd00::2"],
                &["10.244.1.0/24", "fd00:b::/64"],
            ),
            node("c", &["10.9.0.3"], &["10.244.2.0/24", "fd00:c::/64"]),
        ];
        let tunnels = plan("a", &nodes, Routing::Vxlan, &[]);
        assert_eq!(tunnels.own, nodes[0].pod_cidrs);
        assert_eq!(
            shown(&tunnels),
            [
                "10.244.1.0/24 Tunnel(10.0.0.2)",
                "10.244.2.0/24 Tunnel(10.9.0.3)",
                "fd00:b::/64 Tunnel(10.0.0.2)",
                "fd00:c::/64 Tunnel(10.9.0.3)",
            ]
        );
        let networks = ["10.0.0.0/24".parse().unwrap(), "fd00::/64".parse().unwrap()];
        assert_eq!(
            shown(&plan("a", &nodes, Routing::Native, &networks)),
            [
                "10.244.1.0/24 Via(10.0.0.2)",
                "10.244.2.0/24 Tunnel(10.9.0.3)",
                "fd00:b::/64 Via(fd00::2)",
                "fd00:c::/64 Tunnel(10.9.0.3)",
            ]
        );
    }

    #[test]
    fn overlapping_claims_go_to_the_first() {
        let nodes = [
            node("d", &["10.0.0.4"], &["10.244.0.0/16"]),
            node("c", &["10.0.0.3"], &["10.244.1.0/24", "10.7.0.0/24"]),
            node("b", &["10.0.0.2"], &["10.244.1.128/25"]),
            node("a", &["10.0.0.1"], &["10.244.0.0/24"]),
            node("e", &["fd00::5"], &["10.3.0.0/24"]),
        ];
        assert_eq!(
            shown(&plan("a", &nodes, Routing::Vxlan, &[])),
            [
                "10.244.1.128/25 Tunnel(10.0.0.2)",
                "c: 10.7.0.0/24 is its second range of a family; the first one is used",
                "c: its range 10.244.1.0/24 overlaps 10.244.1.128/25 of node b; it gets no route",
                "d: its range 10.244.0.0/16 overlaps 10.244.0.0/24 of node a; it gets no route",
                "e: it has no address (InternalIP) of a family that this node has too, so \
                 10.3.0.0/24 can't be reached",
            ]
        );
        assert_eq!(plan("nobody", &nodes, Routing::Vxlan, &[]), Plan::default());
    }
}
