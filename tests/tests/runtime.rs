//! Pods of a real kubelet and a real container runtime, on a real API server.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use anyhow::{Result, ensure};
use penstock_testbed::{
    Cluster, Cni, Host, KubernetesNode, Node, PROTOCOLS, Pod, PodObject, Service, Slice, Source,
    all_answer, eventually, frontends, patiently, require_kubelet,
};
use serde_json::json;

/// A network that pods are run with.
struct Network {
    /// What containerd is told on a node.
    cni: fn(&Node) -> Cni,
    /// What its agent is told besides.
    agent: &'static [&'static str],
    /// How it names the node's ends of pods' links.
    pod_interfaces: &'static str,
    /// Interfaces that it keeps when no pod is left.
    keeps: &'static [&'static str],
    /// Where a node lists the addresses that are given away, and what else that folder holds.
    addresses: (&'static str, &'static [&'static str]),
}

/// What comes with Debian: the node routes between a bridge of pods and its own network.
const REFERENCE: Network = Network {
    cni: |node| {
        let (v4, v6) = node.pod_ranges();
        Cni {
            config: json!({
                "cniVersion": "1.0.0",
                "name": "reference",
                "plugins": [
                    {
                        "type": "bridge",
                        "bridge": "cni0",
                        "isGateway": true,
                        "hairpinMode": true,
                        "ipam": {
                            "type": "host-local",
                            "ranges": [[{ "subnet": v4 }], [{ "subnet": v6 }]],
                            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
                        },
                    },
                    { "type": "portmap", "capabilities": { "portMappings": true } },
                ],
            }),
            plugins: ["bridge", "host-local", "portmap"]
                .map(|name| PathBuf::from("/usr/lib/cni").join(name))
                .into(),
        }
    },
    agent: &[],
    pod_interfaces: "veth*",
    keeps: &["cni0"],
    addresses: (
        "/var/lib/cni/networks/reference",
        &["lock", "last_reserved_ip.0", "last_reserved_ip.1"],
    ),
};

#[test]
fn pods_on_the_reference_network_reach_each_other_and_services_and_leave_nothing() -> Result<()> {
    let Some(assets) = require_kubelet() else {
        return Ok(());
    };
    pods_reach_each_other_and_services_and_leave_nothing(&assets, &REFERENCE)
}

fn pods_reach_each_other_and_services_and_leave_nothing(
    assets: &Path,
    network: &Network,
) -> Result<()> {
    let started = std::time::Instant::now();
    let passed = |what: &str| eprintln!("{:.1} s: {what}", started.elapsed().as_secs_f32());
    let mut cluster = Cluster::start(assets, 2, network.cni)?;
    passed("the nodes are ready");
    for node in &mut cluster.nodes {
        node.node.pod_interfaces = network.pod_interfaces.to_owned();
    }
    let before = remains(&cluster, network)?;
    let source = Source::Kubeconfig(cluster.api.kubeconfig());
    let agents = cluster
        .nodes
        .iter()
        .map(|node| node.agent(&source, network.agent));
    let agents = agents.collect::<Result<Vec<_>>>()?;
    passed("the agents serve");

    let [here, there] = [&cluster.nodes[0].node, &cluster.nodes[1].node];
    let pods = cluster.run(&[
        PodObject::new("client", here),
        PodObject::new("near", here).host_port(8081),
        PodObject::new("far", there),
    ])?;
    passed("the pods are ready");
    let [client, near, far] = pods.as_slice() else {
        panic!("three pods run");
    };
    agents[0].wait_for_hooks(&[client, near])?;
    agents[1].wait_for_hooks(&[far])?;
    everybody_reaches(&cluster, &pods)?;
    for ip in [here.host.ip4, here.host.ip6] {
        let to = SocketAddr::new(ip, 8081).to_string();
        for host in [&there.host, &far.host] {
            for protocol in PROTOCOLS {
                assert_eq!(host.who_answers(protocol, &to)?, "near", "{protocol} {to}");
            }
        }
    }
    passed("pods and nodes reach pods, and a host port");

    let web = Service::new("web", 10)
        .port("tcp", 80, "TCP")
        .port("udp", 80, "UDP");
    cluster.api.apply(&web.json())?;
    for slice in Slice::both("web", 8080, &[near, far]) {
        cluster.api.apply(&slice)?;
    }
    let servers = BTreeSet::from(["near".to_owned(), "far".to_owned()]);
    let first = frontends(10, 80)[0];
    eventually("the service is there", || {
        client.host.who_answers("tcp", &first.to_string())
    })?;
    for host in [client.host.clone(), client.host.without_socket_hooks()] {
        for protocol in PROTOCOLS {
            for service in frontends(10, 80) {
                all_answer(&host, protocol, service, &servers)?;
            }
        }
    }
    for counter in ["socket_connect", "packet_request"] {
        assert!(agents[0].count(counter)? > 0, "{counter}");
    }
    passed("pods reach services");

    cluster.delete(&["client", "near", "far"])?;
    patiently("nothing is left", || {
        let after = remains(&cluster, network)?;
        ensure!(after == before, "{after:?} is left of {before:?}");
        Ok(())
    })?;
    passed("nothing is left");
    Ok(())
}

/// Every pod, and every node, asks every pod.
fn everybody_reaches(cluster: &Cluster, pods: &[Pod]) -> Result<()> {
    let nodes = cluster.nodes.iter().map(|node| &node.node.host);
    let hosts: Vec<&Host> = pods.iter().map(|pod| &pod.host).chain(nodes).collect();
    for host in hosts {
        for pod in pods {
            for ip in [pod.host.ip4, pod.host.ip6] {
                let to = SocketAddr::new(ip, 8080).to_string();
                for protocol in PROTOCOLS {
                    let name = host.who_answers(protocol, &to)?;
                    assert_eq!(name, pod.host.name, "{} asks {to}", host.name);
                }
            }
        }
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
        remains.push(addresses(node, network));
    }
    Ok(remains)
}

/// The addresses that a node has given away.
fn addresses(node: &KubernetesNode, network: &Network) -> BTreeSet<String> {
    let (folder, others) = network.addresses;
    let entries = std::fs::read_dir(node.path(folder)).into_iter().flatten();
    let names = entries.flatten().map(|entry| entry.file_name());
    let mut names: BTreeSet<String> = names
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    names.retain(|name| !others.contains(&name.as_str()));
    names
}
