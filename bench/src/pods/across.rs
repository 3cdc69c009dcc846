//! Pod to pod from node to node: plain routes, the kernel's VXLAN as flannel sets it up, Penstock.

use std::rc::Rc;

use anyhow::{Context, Result};
use penstock_testbed::{Host, Node, Testbed};
use serde_json::Value;

use super::{MTU, PenstockNode, TRIALS, set_mtu};
use crate::{
    cni_plugin::INTERFACE,
    contender::{Contender, Counts, PORT, Witness, serve},
    turns::{self, Effort, Outcome},
};

/// flannel's device.
const DEVICE: &str = "flannel.1";
/// The nodes' link to each other.
const UPLINK: &str = "eth0";

/// Measures.
pub fn measure(effort: Effort) -> Result<Vec<Outcome>> {
    let mut testbed = Testbed::new()?;
    let contenders = [
        routed(&mut testbed)?,
        flannel(&mut testbed)?,
        penstock(&mut testbed)?,
    ];
    turns::take("Pods of two nodes", &contenders, &TRIALS, effort)
}

/// The nodes' network knows where pods are: no encapsulation.
fn routed(testbed: &mut Testbed) -> Result<Contender> {
    let ([first, _], [client, server]) = pods(testbed)?;
    Ok(Contender::new(
        "the kernel's routes, no overlay",
        &client,
        (server.ip4, PORT).into(),
        &serve(&server)?,
        vec![Witness::interface(&first.host, UPLINK)],
    ))
}

/// One VXLAN device a node without learning; for each other node a permanent neighbour, where its
/// Ethernet address is ("FDB"), and a route (flannel's backend/vxlan).
fn flannel(testbed: &mut Testbed) -> Result<Contender> {
    let ([first, second], [client, server]) = pods(testbed)?;
    tunnel(&first, &second)?;
    tunnel(&second, &first)?;
    Ok(Contender::new(
        "the kernel's VXLAN",
        &client,
        (server.ip4, PORT).into(),
        &serve(&server)?,
        vec![Witness::interface(&first.host, DEVICE)],
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
fn tunnel(node: &Node, other: &Node) -> Result<()> {
    let mac = |node: &Node| format!("02:00:00:00:03:{:02x}", node.number);
    let ((own, _), (range, _)) = (node.pod_ranges(), other.pod_ranges());
    // The first address of a range is its node's.
    let first = |range: &str| range.replace("/24", "");
    let script = format!(
        "ip link add {DEVICE} address {own_mac} mtu {MTU} type vxlan id 1 local {local} dev {UPLINK} dstport 8472 nolearning
         ip addr add {own_address}/32 dev {DEVICE}
         ip link set {DEVICE} up
         ip route del {range}
         ip neigh add {address} lladdr {mac} dev {DEVICE} nud permanent
         bridge fdb add {mac} dev {DEVICE} dst {remote} self permanent
         ip route add {range} via {address} dev {DEVICE} onlink",
        own_mac = mac(node),
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
    let nodes = [testbed.node()?, testbed.node()?];
    let [first, second] = &nodes;
    let mut started = Vec::new();
    for (node, other) in [(first, second), (second, first)] {
        // The agent makes routes of its own.
        let (v4, v6) = other.pod_ranges();
        node.host.run("ip", &["route", "del", &v4])?;
        node.host.run("ip", &["-6", "route", "del", &v6])?;
        started.push(PenstockNode::start(node, &[first, second])?);
    }
    let (server, client) = (started.pop(), started.pop());
    let (client_side, server_side) = client.zip(server).context("two agents")?;
    let (client, _) = client_side.pod(testbed, first)?;
    let (server, _) = server_side.pod(testbed, second)?;
    for side in [&client_side, &server_side] {
        let status = side.agent.status()?;
        let mtu = status
            .pointer("/network/overlay_mtu")
            .and_then(Value::as_u64);
        anyhow::ensure!(mtu == Some(u64::from(MTU)), "the overlay carries {mtu:?}");
    }
    let (sender, receiver) = (Rc::new(client_side.agent), Rc::new(server_side.agent));
    Ok(Contender::new(
        "Penstock's VXLAN",
        &client,
        (server.ip4, PORT).into(),
        &serve(&server)?,
        vec![
            Witness::new("overlay_sent", Counts::Packets, move || {
                sender.count("overlay_sent")
            }),
            Witness::new("delivered on the other node", Counts::Packets, move || {
                receiver.count("delivered")
            }),
        ],
    ))
}
