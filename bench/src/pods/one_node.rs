//! Pod to pod on one node: routes and nothing else, a bridge, Penstock.

use std::rc::Rc;

use anyhow::Result;
use penstock_testbed::Testbed;

use super::{MTU, PenstockNode, TRIALS, penstock, set_mtu};
use crate::{
    cni_plugin::{INTERFACE, Plugin},
    contender::{Contender, Counts, PORT, Witness, serve},
    turns::{self, Effort, Outcome},
};

/// Measures.
pub fn measure(effort: Effort) -> Result<Vec<Outcome>> {
    let mut testbed = Testbed::new()?;

    let node = testbed.node()?;
    let (client, server) = (testbed.pod(&node)?, testbed.pod(&node)?);
    for pod in [&client, &server] {
        set_mtu(&node.host, &pod.interface)?;
        set_mtu(&pod.host, INTERFACE)?;
    }
    let routed = Contender::new(
        "the kernel's routes",
        &client.host,
        (server.host.ip4, PORT).into(),
        &serve(&server.host)?,
        vec![Witness::interface(&node.host, &server.interface)],
    );

    let node = testbed.node()?;
    let (range, _) = node.pod_ranges();
    let state = testbed.folder().join("host-local");
    let plugin = Plugin::bridge("bridge", &node, &[&range], MTU, &state);
    let (client, _) = penstock::pod(&mut testbed, &node, &plugin)?;
    let (server, port) = penstock::pod(&mut testbed, &node, &plugin)?;
    let bridged = Contender::new(
        "Linux bridge",
        &client,
        (server.ip4, PORT).into(),
        &serve(&server)?,
        vec![Witness::interface(&node.host, &port)],
    );

    let node = testbed.node()?;
    let penstock = PenstockNode::start(&node, &[&node])?;
    let (client, _) = penstock.pod(&mut testbed, &node)?;
    let (server, link) = penstock.pod(&mut testbed, &node)?;
    let agent = Rc::new(penstock.agent);
    let counter = agent.clone();
    let ours = Contender::new(
        "Penstock",
        &client,
        (server.ip4, PORT).into(),
        &serve(&server)?,
        vec![
            Witness::new("delivered", Counts::Packets, move || {
                counter.count("delivered")
            }),
            // Put into the pod from the other side, they never leave by the node's end.
            Witness::unused(&node.host, &link),
        ],
    );
    turns::take(
        "Pods on one node",
        &[routed, bridged, ours],
        &TRIALS,
        effort,
    )
}
