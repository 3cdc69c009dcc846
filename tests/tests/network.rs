//! The pod network end to end: agents with `--network`, pods made by the real plugin.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

use std::net::SocketAddr;

use anyhow::{Context, Result};
use penstock_testbed::{
    Agent, Host, Node, PROTOCOLS, Pod, Process, Source, Testbed, require_kernel, text,
};

/// Two nodes with a network, two pods on the first and one on the second, all serving 8080.
struct Net {
    /// Dropped before what they run on.
    agents: Vec<Agent>,
    _processes: Vec<Process>,
    pods: Vec<Pod>,
    nodes: Vec<Node>,
    testbed: Testbed,
}

impl Net {
    fn new(extra: &[&str]) -> Result<Self> {
        let mut testbed = Testbed::new()?;
        let nodes = vec![testbed.network_node()?, testbed.network_node()?];
        let mut net = Self {
            agents: Vec::new(),
            _processes: Vec::new(),
            pods: Vec::new(),
            nodes,
            testbed,
        };
        let all: Vec<&Node> = net.nodes.iter().collect();
        for node in &net.nodes {
            node.knows(&all)?;
            let agent = Agent::start_network(node, &Source::Manifests, extra)?;
            net.agents.push(agent);
        }
        for number in [0, 0, 1] {
            let pod = net.testbed.network_pod(&net.nodes[number])?;
            net._processes.push(pod.host.serve(8080)?);
            net.pods.push(pod);
        }
        Ok(net)
    }
}

/// A host is answered by a pod, whatever it speaks, and the pod sees who asked.
fn reaches(host: &Host, pod: &Pod) -> Result<()> {
    for ip in [pod.host.ip4, pod.host.ip6] {
        for protocol in PROTOCOLS {
            let to = SocketAddr::new(ip, 8080).to_string();
            let answer = host.ask(protocol, &to, &[])?;
            let what = || format!("{} asks {to}, {protocol}: {answer}", host.name);
            assert_eq!(text(&answer, "server"), pod.host.name, "{}", what());
            let source: SocketAddr = text(&answer, "source").parse().with_context(what)?;
            let own = if ip.is_ipv4() { host.ip4 } else { host.ip6 };
            assert_eq!(source.ip(), own, "{}", what());
        }
    }
    Ok(())
}

#[test]
fn pods_reach_pods_with_their_own_addresses() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let net = Net::new(&[])?;
    for from in &net.pods {
        for to in &net.pods {
            reaches(&from.host, to)?;
        }
    }
    Ok(())
}
