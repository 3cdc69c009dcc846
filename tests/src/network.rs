//! Nodes whose pods are on Penstock's own network, and pods that its plugin made.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{
    agent::{Agent, Source, binary},
    host::Host,
    plugin::{Container, Plugin, made},
    process::Place,
    scene::list,
    testbed::{Node, Pod, Testbed},
};

impl Node {
    /// As an object, with its addresses and pod ranges.
    pub fn object(&self) -> Value {
        let (v4, v6) = self.pod_ranges();
        let addresses = [self.host.ip4, self.host.ip6]
            .map(|ip| json!({ "type": "InternalIP", "address": ip.to_string() }));
        json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": { "name": self.name() },
            "spec": { "podCIDR": v4, "podCIDRs": [v4, v6] },
            "status": { "addresses": addresses },
        })
    }

    /// Tells its agent, by a manifest, which nodes there are.
    pub fn knows(&self, nodes: &[&Node]) -> Result<()> {
        let objects: Vec<Value> = nodes.iter().map(|node| node.object()).collect();
        self.manifest("nodes.json", &list(&objects))
    }
}

impl Agent {
    /// Starts the agent of a node with a network for pods, and waits until they can be given one.
    pub fn start_network(node: &Node, source: &Source, extra: &[&str]) -> Result<Self> {
        let mut agent = Self::begin_network(node, source, extra)?;
        agent.wait_until_serving()?;
        Ok(agent)
    }

    /// The same at a place of the node's.
    pub(crate) fn start_network_at(
        node: &Node,
        source: &Source,
        extra: &[&str],
        place: Place,
    ) -> Result<Self> {
        let arguments = network_arguments(node)?;
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        Self::start_at(node, source, &[&arguments, extra].concat(), place)
    }

    /// Starts it without waiting.
    pub fn begin_network(node: &Node, source: &Source, extra: &[&str]) -> Result<Self> {
        let arguments = network_arguments(node)?;
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        Self::begin(node, source, &[&arguments, extra].concat())
    }
}

/// What the agent of a node is told about its network.
fn network_arguments(node: &Node) -> Result<Vec<String>> {
    let folders = [
        ("--cni-conf-dir", node.cni_conf_dir()),
        ("--cni-bin-dir", node.cni_bin_dir()),
        ("--cni-state-dir", node.cni_state_dir()),
        ("--cni-plugin", binary("penstock-cni")?),
    ];
    let mut arguments = vec!["--network".to_owned()];
    for (option, path) in folders {
        arguments.extend([option.to_owned(), path.display().to_string()]);
    }
    Ok(arguments)
}

impl Testbed {
    /// One more node, without routes to the others' pods: that is its network's part.
    pub fn network_node(&mut self) -> Result<Node> {
        self.network_node_on(0)
    }

    /// The same on another network, where the others are reached through a router only.
    pub fn far_network_node(&mut self, others: &[&Node]) -> Result<Node> {
        const FAR: u8 = 1;
        let node = self.network_node_on(FAR)?;
        self.route_between_networks(&node.host.name, FAR)?;
        for other in others {
            self.route_between_networks(&other.host.name, 0)?;
        }
        Ok(node)
    }

    fn network_node_on(&mut self, network: u8) -> Result<Node> {
        let mut node = self.bare_node(network)?;
        node.pod_interfaces = "pn*".to_owned();
        Ok(node)
    }

    /// A container on a node that has no network yet.
    pub fn container_on(&mut self, node: &Node) -> Result<Container> {
        Ok(self.container(node)?.0)
    }

    /// One more pod on a node with a network, by its plugin.
    pub fn network_pod(&mut self, node: &Node) -> Result<Pod> {
        self.pod_by(node, &node.plugin()?)
    }

    /// One more pod on a node, by any plugin that gives it an address of each family.
    pub fn pod_by(&mut self, node: &Node, plugin: &Plugin) -> Result<Pod> {
        let (container, cgroup) = self.container(node)?;
        let result = plugin.add(&container)?;
        let (v4, v6, interface) = made(&result)?;
        Ok(Pod {
            host: self.host(&container.id, (&v4, &v6), Some(cgroup))?,
            interface,
            node: node.name(),
        })
    }

    /// A container as the plugin's result describes it, with no socket hooks.
    pub fn host_in(&self, container: &Container, result: &Value) -> Result<Host> {
        let (v4, v6, _) = made(result)?;
        let name = container.netns.file_name().context("no file's name")?;
        self.host(&name.to_string_lossy(), (&v4, &v6), None)
    }

    /// Ends a container, of which its runtime says nothing to the plugin.
    pub fn end_container(&mut self, container: &Container) -> Result<()> {
        self.remove_namespace(&container.id)
    }

    /// Ends such a pod as a runtime does: its network goes, then its namespace.
    pub fn end_network_pod(&mut self, node: &Node, pod: &Pod) -> Result<()> {
        ensure!(pod.node == node.name(), "{} is not its node", node.name());
        node.plugin()?.del(&Container::named(&pod.host.name))?;
        self.remove_namespace(&pod.host.name)
    }
}

impl Node {
    /// Whether the runtime has been told of the network.
    pub fn is_configured(&self) -> Result<bool> {
        Ok(self.configuration()?.is_some())
    }
}
