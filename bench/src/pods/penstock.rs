//! A node whose pods have Penstock's network, made by the real agent and the real plugin.

use std::path::PathBuf;

use anyhow::{Context, Result};
use penstock_testbed::{Agent, Host, Node, Service, Source, Testbed, eventually};
use serde_json::{Value, json};

use crate::cni_plugin::Plugin;

/// The node, while its agent runs.
pub struct PenstockNode {
    /// Its agent.
    pub agent: Agent,
    /// Its plugin.
    pub plugin: Plugin,
}

/// A node's object.
fn object(node: &Node) -> Value {
    let (range, _) = node.pod_ranges();
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": node.name() },
        "spec": { "podCIDR": range, "podCIDRs": [range] },
        "status": { "addresses": [{ "type": "InternalIP", "address": node.host.ip4.to_string() }] },
    })
}

impl PenstockNode {
    /// Starts the agent of a node that knows `nodes`, and waits until pods can be made.
    pub fn start(node: &Node, nodes: &[&Node]) -> Result<Self> {
        // A cluster without any service is not one.
        let kubernetes = Service::new("kubernetes", 1).port("https", 443, "TCP");
        let nodes = nodes.iter().map(|node| object(node));
        let objects: Vec<Value> = nodes.chain([kubernetes.json()]).collect();
        let mut node = node.clone();
        "pn*".clone_into(&mut node.pod_interfaces);
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
        node.manifest("cluster.json", &list.to_string())?;
        let folder = |name: &str| -> PathBuf { node.manifests.with_file_name(name) };
        let text = |path: PathBuf| -> Result<String> {
            path.into_os_string()
                .into_string()
                .map_err(|path| anyhow::anyhow!("{} is no text", path.display()))
        };
        let conf_dir = folder("net.d");
        let extra = [
            "--network",
            "--cni-conf-dir",
            &text(conf_dir.clone())?,
            "--cni-bin-dir",
            &text(folder("bin"))?,
            "--cni-state-dir",
            &text(folder("cni"))?,
            "--log-level",
            "info",
        ];
        let agent = Agent::start(&node, &Source::Manifests, &extra)?;
        eventually("pods can be given a network", || {
            let status = agent.status()?;
            let is_ready = status.pointer("/network/ready") == Some(&Value::Bool(true));
            anyhow::ensure!(is_ready, "{status}\n{}", agent.log());
            Ok(())
        })?;
        let plugin = Plugin::penstock(&node, &conf_dir)?;
        Ok(Self { agent, plugin })
    }

    /// One more pod; also the name of its link's end on the node.
    pub fn pod(&self, testbed: &mut Testbed, node: &Node) -> Result<(Host, String)> {
        pod(testbed, node, &self.plugin)
    }
}

/// One more pod of a node, made by a plugin; also the name of its link's end on the node.
pub fn pod(testbed: &mut Testbed, node: &Node, plugin: &Plugin) -> Result<(Host, String)> {
    let mut pod = testbed.sandbox(node)?;
    let added = plugin.add(&pod)?;
    let v4 = added.ips.iter().find(|ip| ip.is_ipv4());
    pod.ip4 = *v4.context("the pod has no IPv4 address")?;
    if let Some(v6) = added.ips.iter().find(|ip| ip.is_ipv6()) {
        pod.ip6 = *v6;
    }
    Ok((pod, added.interface))
}
