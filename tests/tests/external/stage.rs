//! What these tests play in.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context, Result, ensure};
use penstock_agent::report::Port;
use penstock_testbed::{
    Agent, Host, Node, Pod, Process, Service, Slice, Source, Testbed, eventually, list, text,
};
use serde_json::Value;

/// Load balancers' addresses, which clients outside reach by the first node.
pub const BALANCER: [&str; 2] = ["203.0.113.1", "2001:db8:203::1"];
/// External addresses.
pub const EXTERNAL: [&str; 2] = ["198.51.100.7", "2001:db8:198::7"];

/// Who connects pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pods {
    /// The kernel, by routes between the nodes: somebody else's CNI plugin.
    Routed,
    /// Penstock.
    Wired,
}

/// Two nodes with an agent on the first, a server on each, and a client outside.
pub struct Stage {
    // Dropped from top to bottom.
    pub agents: Vec<Agent>,
    processes: Vec<Process>,
    pub client: Host,
    /// A pod of each node.
    pub servers: [Pod; 2],
    /// Pods of the first node that serve nothing.
    pub guests: [Pod; 2],
    pub nodes: [Node; 2],
    pods: Pods,
    testbed: Testbed,
}

impl Stage {
    pub fn new(pods: Pods) -> Result<Self> {
        Self::with(pods, &[])
    }

    /// The same, with more options for the first node's agent.
    pub fn with(pods: Pods, options: &[&str]) -> Result<Self> {
        let mut testbed = Testbed::new()?;
        let client = testbed.client()?;
        let mut agents = Vec::new();
        let (nodes, servers, guests) = match pods {
            Pods::Routed => {
                let nodes = [testbed.node()?, testbed.node()?];
                let servers = [testbed.pod(&nodes[0])?, testbed.pod(&nodes[1])?];
                let guests = [testbed.pod(&nodes[0])?, testbed.pod(&nodes[0])?];
                nodes[0].knows(&[&nodes[0], &nodes[1]])?;
                agents.push(Agent::start(&nodes[0], &Source::Manifests, options)?);
                (nodes, servers, guests)
            }
            Pods::Wired => {
                let nodes = [testbed.network_node()?, testbed.network_node()?];
                for node in &nodes {
                    node.knows(&[&nodes[0], &nodes[1]])?;
                    agents.push(Agent::start_network(node, &Source::Manifests, options)?);
                }
                let servers = [
                    testbed.network_pod(&nodes[0])?,
                    testbed.network_pod(&nodes[1])?,
                ];
                let guests = [
                    testbed.network_pod(&nodes[0])?,
                    testbed.network_pod(&nodes[0])?,
                ];
                (nodes, servers, guests)
            }
        };
        for ip in BALANCER.iter().chain(&EXTERNAL) {
            let ip: IpAddr = ip.parse()?;
            let via = same_family(&nodes[0].host, ip).to_string();
            client.run("ip", &["route", "add", &ip.to_string(), "via", &via])?;
        }
        let mut processes = vec![nodes[0].host.serve(8080)?];
        for server in &servers {
            processes.push(server.host.serve(8080)?);
        }
        Ok(Self {
            agents,
            processes,
            client,
            servers,
            guests,
            nodes,
            pods,
            testbed,
        })
    }

    /// One more pod of the node with that index, which serves as the others do.
    pub fn server(&mut self, node: usize) -> Result<Pod> {
        let node = &self.nodes[node];
        let pod = match self.pods {
            Pods::Routed => self.testbed.pod(node)?,
            Pods::Wired => self.testbed.network_pod(node)?,
        };
        self.processes.push(pod.host.serve(8080)?);
        Ok(pod)
    }

    /// Makes the service "web" with node ports 30080 (TCP) and 30081 (UDP), served by these pods, and
    /// waits until the first node serves it.
    pub fn web(&self, pods: &[&Pod], change: impl FnOnce(Service) -> Service) -> Result<()> {
        self.web_of(pods, change, |_, _| ())
    }

    /// The same with endpoints, by their places among the pods, that are otherwise.
    pub fn web_of(
        &self,
        pods: &[&Pod],
        change: impl FnOnce(Service) -> Service,
        endpoint: impl Fn(usize, &mut Value),
    ) -> Result<()> {
        let service = Service::new("web", 10)
            .port("tcp", 80, "TCP")
            .port("udp", 80, "UDP")
            .balanced(30_080, &BALANCER)
            .set("externalIPs", Vec::from(EXTERNAL));
        let mut items = vec![change(service).json()];
        for mut slice in Slice::both("web", 8080, pods) {
            let endpoints = slice["endpoints"].as_array_mut().context("endpoints")?;
            for (place, object) in endpoints.iter_mut().enumerate() {
                endpoint(place, object);
            }
            items.push(slice);
        }
        self.nodes[0].manifest("web.json", &list(&items))?;
        let wanted: BTreeSet<String> = ips(pods);
        eventually("the service is served as it is now", || {
            let ports = self.agents[0].show("services")?;
            let mut served = BTreeSet::new();
            for port in ports.as_array().context("a list")? {
                for backend in port["backends"].as_array().context("backends")? {
                    let address: SocketAddr = text(backend, "address").parse()?;
                    served.insert(address.ip().to_string());
                }
            }
            ensure!(served == wanted, "{ports}");
            Ok(())
        })
    }

    /// Where "web" is reached from outside: by node port, load balancer and external address.
    pub fn addresses(&self, protocol: &str) -> Vec<SocketAddr> {
        let node = &self.nodes[0].host;
        let number = if protocol == "tcp" { 30_080 } else { 30_081 };
        let mut all = vec![
            SocketAddr::new(node.ip4, number),
            SocketAddr::new(node.ip6, number),
        ];
        for ip in BALANCER.iter().chain(&EXTERNAL) {
            all.push(SocketAddr::new(ip.parse().expect("an address"), 80));
        }
        all
    }
}

/// What an agent says of "web": two ports in two families.
pub fn ports_of_web(agent: &Agent) -> Result<Vec<Port>> {
    let mut ports: Vec<Port> = serde_json::from_value(agent.show("services")?)?;
    ports.retain(|port| port.service.as_deref() == Some("default/web"));
    ensure!(ports.len() == 4, "{ports:?}");
    Ok(ports)
}

fn ips(pods: &[&Pod]) -> BTreeSet<String> {
    pods.iter()
        .flat_map(|pod| [pod.host.ip4.to_string(), pod.host.ip6.to_string()])
        .collect()
}

/// The address of a host's in the same family.
pub fn same_family(host: &Host, ip: IpAddr) -> IpAddr {
    if ip.is_ipv4() { host.ip4 } else { host.ip6 }
}

/// Who answered, and whom it says it was asked by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Answer {
    pub server: String,
    pub source: IpAddr,
}

/// Asks once. The client has to see the address that it dialled.
pub fn ask(from: &Host, protocol: &str, to: SocketAddr) -> Result<Answer> {
    ask_by(from, 0, protocol, to)
}

/// The same from a port of the client's, which may be the last question's, unless it is 0.
pub fn ask_by(from: &Host, port: u16, protocol: &str, to: SocketAddr) -> Result<Answer> {
    let answer = from.ask(protocol, &to.to_string(), &["--port", &port.to_string()])?;
    ensure!(
        text(&answer, "peer") == to.to_string(),
        "{protocol} {to} from {}: {answer}",
        from.name
    );
    let source: SocketAddr = text(&answer, "source").parse().context("a source")?;
    Ok(Answer {
        server: text(&answer, "server").to_owned(),
        source: source.ip(),
    })
}

/// The source that a backend of the second node sees where this node speaks for clients.
pub fn stand_in(stage: &Stage, has_overlay: bool, to: SocketAddr) -> IpAddr {
    let node = &stage.nodes[0];
    match has_overlay {
        false => same_family(&node.host, to.ip()),
        // The node's own address in the overlay.
        true if to.is_ipv4() => "10.244.1.1".parse().expect("an address"),
        true => "fd00:244:1::1".parse().expect("an address"),
    }
}

/// Asks until as many different answers came as are expected; there is no other.
pub fn all_answers(
    from: &Host,
    protocol: &str,
    to: SocketAddr,
    expected: &BTreeSet<Answer>,
) -> Result<()> {
    let mut seen = BTreeSet::new();
    for _ in 0..60 {
        let answer = ask(from, protocol, to)?;
        ensure!(
            expected.contains(&answer),
            "{protocol} {to} from {}: {answer:?} is none of {expected:?}",
            from.name
        );
        seen.insert(answer);
        if seen == *expected {
            return Ok(());
        }
    }
    anyhow::bail!("only {seen:?} of {expected:?} answered {protocol} {to}");
}

/// The error that asking ends with, where that is silence.
pub fn failure(from: &Host, protocol: &str, to: SocketAddr) -> Result<String> {
    failure_within(from, protocol, to, "600")
}

/// The same, where there is an error to wait for.
pub fn refusal(from: &Host, protocol: &str, to: SocketAddr) -> Result<String> {
    failure_within(from, protocol, to, "5000")
}

fn failure_within(from: &Host, protocol: &str, to: SocketAddr, time: &str) -> Result<String> {
    let options = ["--timeout-ms", time];
    let answer: Value = from.ask(protocol, &to.to_string(), &options)?;
    ensure!(!text(&answer, "error").is_empty(), "{to}: {answer}");
    Ok(text(&answer, "error").to_owned())
}

/// No service's connection is one of the kernel's tracking on a node, which is at work
/// ([`Host::track_everything`]); but for those with a pod whose packets the kernel has to see.
pub fn nothing_is_tracked(node: &Host, other: &Host, by_kernel: Option<&Host>) -> Result<()> {
    const PORTS: [u16; 4] = [80, 8080, 30_080, 30_081];
    let is_ours =
        |entry: &String| (PORTS.iter()).any(|port| entry.contains(&format!(" dport={port} ")));
    let seen = by_kernel.map(|pod| [pod.ip4, pod.ip6].map(tracked_as));
    let is_unseen =
        |entry: &String| !(seen.iter().flatten()).any(|ip| entry.contains(&format!("={ip} ")));
    let entries = node.tracked()?;
    ensure!(
        !entries
            .iter()
            .any(|entry| is_ours(entry) && is_unseen(entry)),
        "{}: {entries:#?}",
        node.name
    );
    // Nobody listens there, which ends no entry of UDP's.
    let closed = SocketAddr::new(other.ip4, 8080);
    refusal(node, "udp-connected", closed)?;
    eventually("the node's own connection is tracked", || {
        let entries = node.tracked()?;
        ensure!(entries.iter().any(is_ours), "{}: {entries:#?}", node.name);
        Ok(())
    })
}

/// An address as the kernel's tracking shows it.
fn tracked_as(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => {
            let segments = ip.segments().map(|segment| format!("{segment:04x}"));
            segments.join(":")
        }
    }
}
