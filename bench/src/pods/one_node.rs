//! Pod to pod on one node: routes and nothing else, a bridge, Penstock.

use std::rc::Rc;

use anyhow::Result;
use penstock_testbed::{Agent, Node, Pod, Source, Testbed};

use super::{INTERFACE, MTU, TRIALS, set_mtu};
use crate::{
    bridge,
    contender::{Contender, Counts, PORT, Witness, serve},
    results::Keeper,
    turns::{self, Effort},
};

const ROUTES: &str = "the kernel's routes";
const BRIDGE: &str = "Linux bridge";
const PENSTOCK: &str = "Penstock";
/// All contenders here.
pub const CONTENDERS: [&str; 3] = [ROUTES, BRIDGE, PENSTOCK];

/// What is put into pods by the node's ends of their links.
fn both_ways(node: &Node, client: &Pod, server: &Pod) -> Vec<Witness> {
    vec![
        Witness::interface(&node.host, &server.interface, Counts::Requests),
        Witness::interface(&node.host, &client.interface, Counts::Replies),
    ]
}

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
        ROUTES,
        &client.host,
        (server.host.ip4, PORT).into(),
        &serve(&server.host)?,
        both_ways(&node, &client, &server),
    );

    let node = testbed.node()?;
    let (v4, v6) = node.pod_ranges();
    let state = testbed.folder().join("host-local");
    let plugin = bridge::plugin(&node, &[&v4, &v6], MTU, &state)?;
    let client = testbed.pod_by(&node, &plugin)?;
    let server = testbed.pod_by(&node, &plugin)?;
    let bridged = Contender::new(
        BRIDGE,
        &client.host,
        (server.host.ip4, PORT).into(),
        &serve(&server.host)?,
        both_ways(&node, &client, &server),
    );

    let node = testbed.network_node()?;
    node.knows(&[&node])?;
    let mtu = MTU.to_string();
    let options = ["--log-level", "info", "--mtu", &mtu];
    let agent = Agent::start_network(&node, &Source::Manifests, &options)?;
    let client = testbed.network_pod(&node)?;
    let server = testbed.network_pod(&node)?;
    let ours = Contender::new(
        PENSTOCK,
        &client.host,
        (server.host.ip4, PORT).into(),
        &serve(&server.host)?,
        vec![
            Witness::agent(&Rc::new(agent), "delivered", Counts::BothWays),
            // Put into the pod from the other side, they never leave by the node's end.
            Witness::interface(&node.host, &server.interface, Counts::Strays),
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
