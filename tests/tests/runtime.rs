//! Pods of a real kubelet and a real container runtime, on a real API server.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

#[path = "network/traces.rs"]
mod traces;

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use penstock_testbed::{
    Agent, Cluster, Cni, Host, KubernetesNode, Node, PROTOCOLS, Pod, PodObject, Service, Slice,
    Source, all_answer, eventually, frontends, patiently, require_kubelet,
};
use traces::traces;

/// A network that pods are run with.
struct Network {
    /// What containerd is told on a node.
    cni: fn(&Node) -> Cni,
    /// Starts a node's agent.
    agent: fn(&KubernetesNode, &Source) -> Result<Agent>,
    /// How it names the node's ends of pods' links.
    pod_interfaces: &'static str,
    /// Interfaces that it keeps when no pod is left.
    keeps: &'static [&'static str],
    /// What a node says it has given to pods.
    given: fn(&KubernetesNode) -> Result<BTreeSet<String>>,
}

/// Penstock's own: the agent gives the runtime configuration and plugin.
const PENSTOCK: Network = Network {
    cni: |_| Cni::default(),
    agent: |node, source| node.network_agent(source, &[]),
    pod_interfaces: "pn*",
    keeps: &[],
    given: |node| traces(&node.node, &node.node.bpffs, &node.node.cni_state_dir()),
};

/// What comes with Debian: the node routes between a bridge of pods and its own network.
const REFERENCE: Network = Network {
    cni: Cni::reference,
    agent: |node, source| node.agent(source, &[]),
    pod_interfaces: "veth*",
    keeps: &["cni0"],
    given: |node| {
        // There is no folder before the first pod.
        let folder = node.path("/var/lib/cni/networks/reference");
        let entries = std::fs::read_dir(folder).into_iter().flatten();
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let names: Result<BTreeSet<String>> = names.collect();
        let is_address = |name: &String| name.parse::<IpAddr>().is_ok();
        Ok(names?.into_iter().filter(is_address).collect())
    },
};

#[test]
fn the_reference_network_carries_pods_and_keeps_nothing_of_them() -> Result<()> {
    let Some(assets) = require_kubelet() else {
        return Ok(());
    };
    carries_pods_and_keeps_nothing_of_them(&assets, &REFERENCE)
}

#[test]
fn penstocks_network_carries_pods_and_keeps_nothing_of_them() -> Result<()> {
    let Some(assets) = require_kubelet() else {
        return Ok(());
    };
    carries_pods_and_keeps_nothing_of_them(&assets, &PENSTOCK)
}

fn carries_pods_and_keeps_nothing_of_them(assets: &Path, network: &Network) -> Result<()> {
    let stage = Stage::new(assets, network)?;
    let [here, there] = [0, 1].map(|number| &stage.cluster.nodes[number].node);
    let pods = stage.cluster.run(&[
        PodObject::new("client", here),
        PodObject::new("near", here).host_port(8081),
        PodObject::new("far", there),
    ])?;
    stage.passed("pods are ready");
    let [client, near, far] = pods.as_slice() else {
        panic!("three pods run");
    };
    stage.agents[0].wait_for_hooks(&[client, near])?;
    stage.agents[1].wait_for_hooks(&[far])?;
    stage.everybody_reaches(&pods)?;
    stage.reach_the_host_port(&[&there.host, &far.host], near)?;
    stage.reaches_services(client, [near, far])?;
    stage.end(&["client", "near", "far"])?;

    // Plugins are called for many pods at once, and addresses are given out again.
    let names: Vec<String> = (0..8).map(|number| format!("pod{number}")).collect();
    let objects = names.iter().zip([here, there].into_iter().cycle());
    let objects: Vec<_> = objects
        .map(|(name, node)| PodObject::new(name, node))
        .collect();
    let pods = stage.cluster.run(&objects)?;
    stage.passed("many pods are ready");
    stage.everybody_reaches(&pods)?;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    stage.end(&names)
}

/// A cluster of two nodes with their agents.
struct Stage<'a> {
    network: &'a Network,
    agents: Vec<Agent>,
    cluster: Cluster,
    /// What the nodes had before there were pods.
    before: Vec<BTreeSet<String>>,
    started: Instant,
}

impl<'a> Stage<'a> {
    fn new(assets: &Path, network: &'a Network) -> Result<Self> {
        let started = Instant::now();
        let mut cluster = Cluster::start(assets, 2, network.cni)?;
        for node in &mut cluster.nodes {
            node.node.pod_interfaces = network.pod_interfaces.to_owned();
        }
        let source = Source::Kubeconfig(cluster.api.kubeconfig());
        let agents = cluster.nodes.iter();
        let agents = agents.map(|node| (network.agent)(node, &source));
        let agents = agents.collect::<Result<_>>()?;
        cluster.wait_until_ready()?;
        let stage = Self {
            network,
            agents,
            before: remains(&cluster, network)?,
            cluster,
            started,
        };
        stage.passed("nodes and agents are ready");
        Ok(stage)
    }

    /// Says how long it took.
    fn passed(&self, what: &str) {
        eprintln!("{:.1} s: {what}", self.started.elapsed().as_secs_f32());
    }

    /// Every pod, and every node, asks every pod.
    fn everybody_reaches(&self, pods: &[Pod]) -> Result<()> {
        let nodes = self.cluster.nodes.iter().map(|node| &node.node.host);
        let hosts: Vec<&Host> = pods.iter().map(|pod| &pod.host).chain(nodes).collect();
        for host in hosts {
            for pod in pods {
                for ip in [pod.host.ip4, pod.host.ip6] {
                    reaches(host, SocketAddr::new(ip, 8080), &pod.host.name)?;
                }
            }
        }
        self.passed("pods and nodes reach pods");
        Ok(())
    }

    /// Port 8081 of the first node leads to its pod.
    fn reach_the_host_port(&self, hosts: &[&Host], pod: &Pod) -> Result<()> {
        let node = &self.cluster.nodes[0].node.host;
        for host in hosts {
            for ip in [node.ip4, node.ip6] {
                reaches(host, SocketAddr::new(ip, 8081), &pod.host.name)?;
            }
        }
        self.passed("a host port leads to its pod");
        Ok(())
    }

    /// A pod of the first node reaches a service with two others, on either path.
    fn reaches_services(&self, client: &Pod, servers: [&Pod; 2]) -> Result<()> {
        let web = Service::new("web", 10)
            .port("tcp", 80, "TCP")
            .port("udp", 80, "UDP");
        self.cluster.api.apply(&web.json())?;
        for slice in Slice::both("web", 8080, &servers) {
            self.cluster.api.apply(&slice)?;
        }
        let names = servers.map(|pod| pod.host.name.clone()).into();
        for service in frontends(10, 80) {
            eventually("the service is there", || {
                client.host.who_answers("tcp", &service.to_string())
            })?;
            for host in [client.host.clone(), client.host.without_socket_hooks()] {
                for protocol in PROTOCOLS {
                    all_answer(&host, protocol, service, &names)?;
                }
            }
        }
        for counter in ["socket_connect", "packet_request"] {
            assert!(self.agents[0].count(counter)? > 0, "{counter}");
        }
        self.passed("a pod reaches a service");
        Ok(())
    }

    /// Deletes all pods and waits until the nodes are what they were before.
    fn end(&self, names: &[&str]) -> Result<()> {
        let during = remains(&self.cluster, self.network)?;
        for (before, during) in self.before.iter().zip(&during) {
            assert!(before.len() < during.len(), "no trace of pods: {during:?}");
        }
        self.cluster.delete(names)?;
        patiently("nothing is left", || {
            let after = remains(&self.cluster, self.network)?;
            ensure!(after == self.before, "{after:?} is not {:?}", self.before);
            Ok(())
        })?;
        self.passed("nothing is left");
        Ok(())
    }
}

/// A host is answered by a pod, whatever it speaks.
fn reaches(host: &Host, to: SocketAddr, pod: &str) -> Result<()> {
    for protocol in PROTOCOLS {
        let name = host.who_answers(protocol, &to.to_string());
        let name = name.with_context(|| format!("{} asks {pod}, {protocol}", host.name))?;
        assert_eq!(name, pod, "{} asks {to}, {protocol}", host.name);
    }
    Ok(())
}

/// What there is on the nodes of containers, their namespaces, interfaces and addresses.
fn remains(cluster: &Cluster, network: &Network) -> Result<Vec<BTreeSet<String>>> {
    let mut remains = Vec::new();
    for node in &cluster.nodes {
        remains.push(node.running_containers()?);
        remains.push(node.namespaces()?);
        let mut interfaces = node.interfaces()?;
        interfaces.retain(|name| !network.keeps.contains(&name.as_str()));
        remains.push(interfaces);
        remains.push((network.given)(node)?);
    }
    Ok(remains)
}
