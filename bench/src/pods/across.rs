//! Pod to pod from node to node: the kernel's VXLAN as flannel sets it up, the same without checksums of its own,
//! plain routes, Penstock.

use std::rc::Rc;

use anyhow::Result;
use penstock_testbed::{Agent, Host, Node, Source, Testbed};

use super::{INTERFACE, MTU, TRIALS, set_mtu};
use crate::{
    contender::{Contender, Counts, PORT, Witness, serve},
    results::Keeper,
    turns::{self, Effort},
};

/// flannel's device.
const DEVICE: &str = "flannel.1";
/// The nodes' link to each other.
const UPLINK: &str = "eth0";

/// Whether the kernel's VXLAN computes the checksums of its own UDP headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Checksums {
    /// As by default, and with flannel.
    Computed,
    /// As Penstock's overlay, which has none: what is inside has its own (RFC 7348, 5).
    LeftOut,
}

impl Checksums {
    const fn name(self) -> &'static str {
        match self {
            Self::Computed => "the kernel's VXLAN",
            Self::LeftOut => "the kernel's VXLAN, no UDP checksums",
        }
    }

    const fn option(self) -> &'static str {
        match self {
            Self::Computed => "udpcsum",
            Self::LeftOut => "noudpcsum",
        }
    }
}

const ROUTES: &str = "the kernel's routes, no overlay";
const PENSTOCK: &str = "Penstock's VXLAN";
/// All contenders here.
pub const CONTENDERS: [&str; 4] = [
    Checksums::Computed.name(),
    Checksums::LeftOut.name(),
    ROUTES,
    PENSTOCK,
];

/// What two nodes send by an interface of each: one what the client asks, the other what the server answers.
fn both_ways([first, second]: [&Node; 2], interface: &str) -> Vec<Witness> {
    vec![
        Witness::interface(&first.host, interface, Counts::Requests).of("the client's node"),
        Witness::interface(&second.host, interface, Counts::Replies).of("the server's node"),
    ]
}

/// Measures.
pub fn measure(effort: &Effort, keeper: &mut Keeper) -> Result<()> {
    let mut testbed = Testbed::new()?;
    let contenders = [
        flannel(&mut testbed, Checksums::Computed)?,
        flannel(&mut testbed, Checksums::LeftOut)?,
        routed(&mut testbed)?,
        penstock(&mut testbed)?,
    ];
    turns::take("Pods of two nodes", &contenders, &TRIALS, effort, keeper)
}

/// The nodes' network knows where pods are: no encapsulation.
fn routed(testbed: &mut Testbed) -> Result<Contender> {
    let ([first, second], [client, server]) = pods(testbed)?;
    Ok(Contender::new(
        ROUTES,
        &client,
        (server.ip4, PORT).into(),
        &serve(&server)?,
        both_ways([&first, &second], UPLINK),
    ))
}

/// One VXLAN device a node without learning; for each other node a permanent neighbour, where its
/// Ethernet address is ("FDB"), and a route (flannel's backend/vxlan).
fn flannel(testbed: &mut Testbed, checksums: Checksums) -> Result<Contender> {
    let ([first, second], [client, server]) = pods(testbed)?;
    tunnel(&first, &second, checksums)?;
    tunnel(&second, &first, checksums)?;
    Ok(Contender::new(
        checksums.name(),
        &client,
        (server.ip4, PORT).into(),
        &serve(&server)?,
        both_ways([&first, &second], DEVICE),
    ))
}

/// Two nodes with a pod each on the kernel's routes.
fn pods(testbed: &mut Testbed) -> Result<([Node; 2], [Host; 2])> {
    let nodes = [testbed.node()?, testbed.node()?];
    let mut pod = |node: &Node| {
        let pod = testbed.pod(node)?;
        set_mtu(&node.host, &pod.interface)?;
        set_mtu(&pod.host, INTERFACE)?;
        Ok::<_, anyhow::Error>(pod.host)
    };
    let [first, second] = &nodes;
    let pods = [pod(first)?, pod(second)?];
    Ok((nodes, pods))
}

/// A node's end of flannel's network, towards one other node.
fn tunnel(node: &Node, other: &Node, checksums: Checksums) -> Result<()> {
    let mac = |node: &Node| format!("02:00:00:00:03:{:02x}", node.number);
    let ((own, _), (range, _)) = (node.pod_ranges(), other.pod_ranges());
    // The first address of a range is its node's.
    let first = |range: &str| range.replace("/24", "");
    let script = format!(
        "ip link add {DEVICE} address {own_mac} mtu {MTU} type vxlan id 1 local {local} dev {UPLINK} dstport 8472 nolearning {checksums}
         ip addr add {own_address}/32 dev {DEVICE}
         ip link set {DEVICE} up
         ip route del {range}
         ip neigh add {address} lladdr {mac} dev {DEVICE} nud permanent
         bridge fdb add {mac} dev {DEVICE} dst {remote} self permanent
         ip route add {range} via {address} dev {DEVICE} onlink",
        own_mac = mac(node),
        checksums = checksums.option(),
        local = node.host.ip4,
        own_address = first(&own),
        address = first(&range),
        mac = mac(other),
        remote = other.host.ip4,
    );
    node.host.run("sh", &["-ec", &script]).map(drop)
}

/// Penstock's overlay.
fn penstock(testbed: &mut Testbed) -> Result<Contender> {
    let nodes = [testbed.network_node()?, testbed.network_node()?];
    let [first, second] = &nodes;
    let mut agents = Vec::new();
    for node in &nodes {
        node.knows(&[first, second])?;
        let options = ["--log-level", "info"];
        let agent = Agent::start_network(node, &Source::Manifests, &options)?;
        let status = agent.status()?;
        let mtu = status.pointer("/network/overlay_mtu");
        anyhow::ensure!(mtu == Some(&MTU.into()), "the overlay carries {mtu:?}");
        agents.push(Rc::new(agent));
    }
    let (client, server) = (testbed.network_pod(first)?, testbed.network_pod(second)?);
    let [sender, receiver] = agents.as_slice() else {
        anyhow::bail!("two agents were started")
    };
    Ok(Contender::new(
        PENSTOCK,
        &client.host,
        (server.host.ip4, PORT).into(),
        &serve(&server.host)?,
        vec![
            Witness::agent(sender, "overlay_sent", Counts::Requests),
            Witness::agent(receiver, "delivered", Counts::Requests),
            Witness::agent(receiver, "overlay_sent", Counts::Replies).of("the server's node"),
            Witness::agent(sender, "delivered", Counts::Replies).of("the client's node"),
        ],
    ))
}
