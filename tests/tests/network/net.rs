//! What the tests of the pod network play in.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use penstock_testbed::{
    Agent, Container, Host, Node, PROTOCOLS, Pod, Process, Service, Slice, Source, Testbed,
    eventually, frontends, list, text,
};
use serde_json::Value;

/// Nodes with a network for pods, and pods that serve 8080.
pub struct Net {
    // Dropped from top to bottom.
    pub agents: Vec<Agent>,
    processes: Vec<Process>,
    pub pods: Vec<Pod>,
    pub nodes: Vec<Node>,
    pub testbed: Testbed,
}

impl Net {
    /// Two nodes; two pods on the first and one on the second.
    pub fn new(options: &[&str]) -> Result<Self> {
        let mut testbed = Testbed::new()?;
        let nodes = vec![testbed.network_node()?, testbed.network_node()?];
        Self::on(testbed, nodes, options, &[0, 0, 1])
    }

    /// These nodes with agents, and pods on the nodes of these indices.
    pub fn on(
        testbed: Testbed,
        nodes: Vec<Node>,
        options: &[&str],
        pods: &[usize],
    ) -> Result<Self> {
        let mut net = Self {
            agents: Vec::new(),
            processes: Vec::new(),
            pods: Vec::new(),
            nodes,
            testbed,
        };
        net.all_know_all()?;
        for node in &net.nodes {
            let agent = Agent::start_network(node, &Source::Manifests, options)?;
            net.agents.push(agent);
        }
        for node in pods {
            net.pod(*node)?;
        }
        Ok(net)
    }

    /// Tells every agent of all nodes.
    pub fn all_know_all(&self) -> Result<()> {
        let all: Vec<&Node> = self.nodes.iter().collect();
        all.iter().try_for_each(|node| node.knows(&all))
    }

    /// One more pod, on the node of that index.
    pub fn pod(&mut self, node: usize) -> Result<Pod> {
        let pod = self.testbed.network_pod(&self.nodes[node])?;
        self.processes.push(pod.host.serve(8080)?);
        self.pods.push(pod.clone());
        Ok(pod)
    }

    /// Gives a container of a node a network, with what its runtime wants for it; also ADD's result.
    pub fn container(&mut self, node: usize, runtime: Value) -> Result<(Container, Host, Value)> {
        let node = &self.nodes[node];
        let mut container = self.testbed.container_on(node)?;
        container.runtime = runtime;
        let result = node.plugin()?.add(&container)?;
        let host = self.testbed.host_in(&container, &result)?;
        Ok((container, host, result))
    }

    /// Keeps a process as long as the rest.
    pub fn keep(&mut self, process: Process) {
        self.processes.push(process);
    }

    /// Makes a service (see [`frontends`]) with TCP and UDP port 80 on every node, and waits until
    /// it is there.
    pub fn service(&self, name: &str, number: u8, pods: &[&Pod]) -> Result<()> {
        let service = Service::new(name, number)
            .port("tcp", 80, "TCP")
            .port("udp", 80, "UDP");
        let mut items = vec![service.json()];
        items.extend(Slice::both(name, 8080, pods));
        for (node, agent) in self.nodes.iter().zip(&self.agents) {
            node.manifest(&format!("{name}.json"), &list(&items))?;
            eventually("the service is there", || {
                let services = agent.show("services")?.to_string();
                let all = frontends(number, 80);
                let mut missing = all
                    .iter()
                    .filter(|one| !services.contains(&one.to_string()));
                anyhow::ensure!(missing.next().is_none(), "{services}");
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Asserts that no agent's programs dropped or refused anything.
    pub fn nothing_was_dropped(&self) -> Result<()> {
        for agent in &self.agents {
            let counts = agent.show("drops")?;
            let counts = counts.as_array().into_iter().flatten();
            let drops: Vec<&Value> = counts
                .filter(|count| count["dropped"] == true && count["count"] != 0)
                .collect();
            assert!(drops.is_empty(), "{drops:?}");
        }
        Ok(())
    }
}

/// Asserts that no node's kernel tracks anything of pods, although it would what it sees
/// (`Host::track_everything`).
pub fn nobody_tracks(net: &Net) -> Result<()> {
    let ips = net.pods.iter().flat_map(|pod| [pod.host.ip4, pod.host.ip6]);
    let ips: Vec<String> = ips.map(expanded).collect();
    for node in &net.nodes {
        let of_pods = |entry: &String| {
            let mut fields = entry.split(['=', ' ']);
            fields.any(|field| ips.iter().any(|ip| ip == field))
        };
        let entries = node.host.tracked()?;
        let of_pods: Vec<String> = entries.into_iter().filter(of_pods).collect();
        assert!(of_pods.is_empty(), "{}: {of_pods:#?}", node.name());
    }
    Ok(())
}

/// An address as the kernel's tracking shows it.
fn expanded(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => {
            let segments = ip.segments().map(|segment| format!("{segment:04x}"));
            segments.join(":")
        }
    }
}

/// The address of a host's in the same family.
pub fn same_family(host: &Host, ip: IpAddr) -> IpAddr {
    if ip.is_ipv4() { host.ip4 } else { host.ip6 }
}

/// Asks a host's port 8080 whatever it speaks and whatever way; who it says has asked.
pub fn asked(from: &Host, to: &Host) -> Result<Vec<(IpAddr, IpAddr)>> {
    let mut sources = Vec::new();
    for ip in [to.ip4, to.ip6] {
        let at = SocketAddr::new(ip, 8080).to_string();
        let echo = from.ask("icmp", &at, &[])?;
        assert_eq!(
            text(&echo, "peer"),
            ip.to_string(),
            "{} to {at}: {echo}",
            from.name
        );
        for protocol in PROTOCOLS {
            let answer = from.ask(protocol, &at, &[])?;
            let what = || format!("{} asks {at}, {protocol}: {answer}", from.name);
            assert_eq!(text(&answer, "server"), to.name, "{}", what());
            let source: SocketAddr = text(&answer, "source").parse().with_context(what)?;
            sources.push((ip, source.ip()));
        }
    }
    Ok(sources)
}

/// The same between two who see each other's own addresses.
pub fn reaches(from: &Host, to: &Host) -> Result<()> {
    for (ip, source) in asked(from, to)? {
        assert_eq!(
            source,
            same_family(from, ip),
            "{} to {}",
            from.name,
            to.name
        );
    }
    Ok(())
}
