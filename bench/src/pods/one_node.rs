//! Pod to pod on one node: routes and nothing else, a bridge, Penstock.

use std::rc::Rc;

use anyhow::Result;
use penstock_testbed::{Agent, Source, Testbed};

use super::{INTERFACE, MTU, TRIALS, set_mtu};
use crate::{
    bridge,
    contender::{Contender, Counts, PORT, Witness, serve},
    results::Keeper,
    turns::{self, Effort},
};

/// Measures.
pub fn measure(effort: &Effort, keeper: &mut Keeper) -> Result<()> {
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
    let (v4, v6) = node.pod_ranges();
    let state = testbed.folder().join("host-local");
    let plugin = bridge::plugin(&node, &[&v4, &v6], MTU, &state)?;
    let client = testbed.pod_by(&node, &plugin)?;
    let server = testbed.pod_by(&node, &plugin)?;
    let bridged = Contender::new(
        "Linux bridge",
        &client.host,
        (server.host.ip4, PORT).into(),
        &serve(&server.host)?,
        vec![Witness::interface(&node.host, &server.interface)],
    );

    let node = testbed.network_node()?;
    node.knows(&[&node])?;
    let mtu = MTU.to_string();
    let options = ["--log-level", "info", "--mtu", &mtu];
    let agent = Agent::start_network(&node, &Source::Manifests, &options)?;
    let client = testbed.network_pod(&node)?;
    let server = testbed.network_pod(&node)?;
    let ours = Contender::new(
        "Penstock",
        &client.host,
        (server.host.ip4, PORT).into(),
        &serve(&server.host)?,
        vec![
            Witness::agent(&Rc::new(agent), "delivered", Counts::Packets),
            // Put into the pod from the other side, they never leave by the node's end.
            Witness::unused(&node.host, &server.interface),
        ],
    );
    turns::take(
        "Pods on one node",
        &[routed, bridged, ours],
        &TRIALS,
        effort,
        keeper,
    )
}
