//! Other plugins after ours, as the agent has put them into the runtime's configuration, in traffic.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
};

use anyhow::{Context, Result, ensure};
use penstock_testbed::{Chain, Container, Host, Pod, Testbed, eventually, require_kernel, text};
use serde_json::{Value, json};

use crate::{
    capabilities::{PORT, are_limited, in_bits, is_limited},
    net::{Net, asked, reaches, same_family},
};

/// Two nodes whose agents put these plugins after ours, pods that went through ours alone, and somebody
/// outside.
fn net_with(plugins: &[Value]) -> Result<(Net, Host)> {
    let mut testbed = Testbed::new()?;
    let outside = testbed.client()?;
    let nodes = vec![testbed.network_node()?, testbed.network_node()?];
    let mut options = Vec::new();
    for (number, plugin) in plugins.iter().enumerate() {
        let path = testbed.folder().join(format!("chained{number}.json"));
        fs::write(&path, plugin.to_string())?;
        options.extend(["--cni-chain".to_owned(), path.display().to_string()]);
    }
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let net = Net::on(testbed, nodes, &options, &[0, 0, 1])?;
    Ok((net, outside))
}

/// A container of the first node that went through all of its plugins.
struct Chained {
    container: Container,
    chain: Chain,
    result: Value,
    host: Host,
}

impl Chained {
    fn new(net: &mut Net, runtime: Value) -> Result<Self> {
        let node = &net.nodes[0];
        let mut container = net.testbed.container_on(node)?;
        container.runtime = runtime;
        let chain = node.chain()?;
        let result = chain.add(&container)?;
        let host = net.testbed.host_in(&container, &result)?;
        Ok(Self {
            container,
            chain,
            result,
            host,
        })
    }

    /// Its host end's name.
    fn interface(&self) -> Result<&str> {
        let name = self.result.pointer("/interfaces/0/name");
        name.and_then(Value::as_str).context("no interface")
    }

    fn check(&self) -> Result<()> {
        self.chain.check(&self.container, &self.result)
    }

    fn end(self) -> Result<()> {
        self.chain.del(&self.container, &self.result)
    }
}

/// The kinds of queueing disciplines of an interface.
fn queues(host: &Host, interface: &str) -> Result<Vec<String>> {
    let shown = host.run("tc", &["qdisc", "show", "dev", interface])?;
    let kinds = shown.lines().filter_map(|line| line.split(' ').nth(1));
    Ok(kinds.map(str::to_owned).collect())
}

/// Names of a host's interfaces, of our pods' and of those that limit what they send.
fn links(host: &Host) -> Result<Vec<String>> {
    let shown = host.run("ip", &["-o", "link", "show"])?;
    let names = shown.lines().filter_map(|line| line.split(": ").nth(1));
    let names = names.filter_map(|name| name.split('@').next());
    let made = names.filter(|name| name.starts_with("pn") || name.starts_with("bwp"));
    Ok(made.map(str::to_owned).collect())
}

fn tuning(net_folder: &str) -> Value {
    json!({ "type": "tuning", "dataDir": net_folder, "sysctl": { "net.core.somaxconn": "500" } })
}

#[test]
fn limits_of_a_plugin_after_ours_hold_whatever_way_packets_take() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let mut bandwidth = in_bits();
    bandwidth["type"] = json!("bandwidth");
    let portmap = json!({ "type": "portmap", "capabilities": { "portMappings": true } });
    let tuning = tuning(&folder.path().display().to_string());
    let (mut net, outside) = net_with(&[bandwidth, tuning, portmap])?;
    let node = net.nodes[0].host.clone();
    // Whatever the distribution thinks of addresses that come from where they are not.
    node.run("sysctl", &["-qw", "net.ipv4.conf.all.rp_filter=1"])?;
    let before = links(&node)?;
    let ports = json!([{ "hostPort": 9_100, "containerPort": 9_000, "protocol": "tcp" }]);
    let limited = Chained::new(&mut net, json!({ "portMappings": ports }))?;
    let host = limited.host.clone();
    let somaxconn = host.run("cat", &["/proc/sys/net/core/somaxconn"])?;
    assert_eq!(somaxconn.trim(), "500");
    limited.check()?;
    let kinds = queues(&node, limited.interface()?)?;
    assert_eq!(kinds, ["tbf", "ingress"]);
    let server = host.serve(PORT)?;
    let outer = outside.serve(PORT)?;

    // All reach each other as before, in packets of every kind, and see who they are.
    let [near, other, far] = [0, 1, 2].map(|index: usize| net.pods[index].clone());
    for pod in [&near, &far] {
        reaches(&host, &pod.host)?;
        reaches(&pod.host, &host)?;
    }
    for (ip, source) in asked(&host, &outside)? {
        assert_eq!(source, same_family(&node, ip));
    }
    for ip in [outside.ip4, outside.ip6] {
        let at = |port: u16| SocketAddr::new(ip, port).to_string();
        let answer = host.ask("udp", &at(PORT), &["--size", "4000"])?;
        assert_eq!(text(&answer, "reached"), "4000", "{answer}");
        for protocol in ["tcp", "udp-connected"] {
            let answer = host.ask(protocol, &at(9), &[])?;
            assert_eq!(text(&answer, "error"), "connection refused", "{answer}");
        }
    }
    // Of services it is client, backend, and both at once.
    let itself = Pod {
        host: host.clone(),
        ..near.clone()
    };
    net.service("near", 1, &[&near])?;
    net.service("far", 2, &[&far])?;
    net.service("own", 3, &[&itself])?;
    let packets = host.without_socket_hooks();
    for (number, server) in [(1, &near.host), (2, &far.host), (3, &host)] {
        for from in [&packets, &other.host, &far.host] {
            for frontend in penstock_testbed::frontends(number, 80) {
                for protocol in penstock_testbed::PROTOCOLS {
                    let answer = from.ask(protocol, &frontend.to_string(), &[])?;
                    let what = || format!("{} asks {frontend}: {answer}", from.name);
                    assert_eq!(text(&answer, "server"), server.name, "{}", what());
                }
            }
        }
    }

    are_limited(&net, &host)?;
    // To the outside, and from there, by the port that the plugin leads to it.
    let drains = [host.drain(9_000)?, outside.drain(9_000)?];
    for ip in [outside.ip4, outside.ip6] {
        is_limited(&host, SocketAddr::new(ip, 9_000))?;
    }
    is_limited(&outside, SocketAddr::new(node.ip4, 9_100))?;
    drop((drains, server, outer));

    // An agent that takes over finds all of it.
    let source = penstock_testbed::Source::Manifests;
    net.agents.remove(0).kill();
    let file = |number: usize| net.testbed.folder().join(format!("chained{number}.json"));
    let files = [0, 1, 2].map(|number| file(number).display().to_string());
    let options: Vec<&str> = files
        .iter()
        .flat_map(|file| ["--cni-chain", file.as_str()])
        .collect();
    let agent = penstock_testbed::Agent::start_network(&net.nodes[0], &source, &options)?;
    net.agents.insert(0, agent);
    let drain = outside.drain(9_000)?;
    is_limited(&host, SocketAddr::new(outside.ip4, 9_000))?;
    drop(drain);

    limited.end()?;
    eventually("all of it is gone", || {
        let after = links(&node)?;
        ensure!(after == before, "{after:?} is not {before:?}");
        Ok(())
    })?;
    net.nothing_was_dropped()
}

#[test]
fn what_another_plugin_is_asked_for_ours_leaves_to_it() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let bandwidth = json!({ "type": "bandwidth", "capabilities": { "bandwidth": true } });
    let (mut net, outside) = net_with(&[bandwidth])?;
    let node = net.nodes[0].host.clone();
    let limited = Chained::new(&mut net, json!({ "bandwidth": in_bits() }))?;
    let free = Chained::new(&mut net, json!({}))?;
    assert_eq!(queues(&limited.host, "eth0")?, ["noqueue"]);
    assert_eq!(queues(&node, limited.interface()?)?, ["tbf", "ingress"]);
    assert_eq!(queues(&node, free.interface()?)?, ["noqueue"]);
    are_limited(&net, &limited.host)?;
    let drains = [outside.drain(9_000)?, limited.host.drain(9_001)?];
    is_limited(&limited.host, SocketAddr::new(outside.ip4, 9_000))?;
    // Who has no limit is as fast as ever, but towards who has one.
    let to = SocketAddr::new(outside.ip4, 9_000).to_string();
    let (_, seconds) = free.host.pour(&to, 2_000_000)?;
    assert!(seconds < 0.6, "{seconds:.2} s");
    is_limited(&free.host, SocketAddr::new(limited.host.ip4, 9_001))?;
    limited.check()?;

    // Without the queueing discipline what the pod sends goes past the kernel's stack again.
    let interface = limited.interface()?.to_owned();
    let setting = format!("/proc/sys/net/ipv4/conf/{interface}/accept_local");
    assert_eq!(node.run("cat", &[&setting])?.trim(), "1");
    node.run("tc", &["qdisc", "del", "dev", &interface, "ingress"])?;
    eventually("the kernel is as it was", || {
        let value = node.run("cat", &[&setting])?;
        ensure!(value.trim() == "0", "{value}");
        Ok(())
    })?;
    let (_, seconds) = limited.host.pour(&to, 2_000_000)?;
    assert!(seconds < 0.6, "{seconds:.2} s");
    let masqueraded = net.agents[0].count("masqueraded")?;
    limited.host.pour(&to, 2_000_000)?;
    assert!(net.agents[0].count("masqueraded")? > masqueraded);
    drop(drains);
    limited.end()?;
    free.end()?;
    net.nothing_was_dropped()
}

#[test]
fn a_pod_whose_ethernet_address_changes_is_reached() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    const MAC: &str = "02:11:22:33:44:55";
    let mut tuning = tuning(&folder.path().display().to_string());
    tuning["mac"] = json!(MAC);
    tuning["promisc"] = json!(true);
    tuning["mtu"] = json!(1_300);
    let (mut net, outside) = net_with(&[tuning])?;
    let node = net.nodes[0].host.clone();
    let tuned = Chained::new(&mut net, json!({}))?;
    let host = tuned.host.clone();
    let link = host.run("ip", &["-o", "link", "show", "dev", "eth0"])?;
    for part in [MAC, "mtu 1300", "PROMISC"] {
        assert!(link.contains(part), "{link}");
    }
    let server = host.serve(PORT)?;
    let [near, far] = [0, 2].map(|index: usize| net.pods[index].host.clone());
    let is_reached = |host: &Host, froms: &[&Host]| {
        eventually("it is reached", || {
            for from in froms {
                for ip in [host.ip4, host.ip6] {
                    let to = SocketAddr::new(ip, PORT).to_string();
                    let answer = from.ask("tcp", &to, &["--timeout-ms", "300"])?;
                    ensure!(answer.get("server").is_some(), "{}: {answer}", from.name);
                }
            }
            Ok(())
        })
    };
    is_reached(&host, &[&near, &node, &far])?;
    for from in [&near, &node, &far] {
        reaches(from, &host)?;
    }
    reaches(&host, &near)?;
    eventually("all is as the result says", || tuned.check())?;

    // A pod that changes it itself, and an agent that was not there then.
    for mac in ["02:11:22:33:44:66", "02:11:22:33:44:77"] {
        let is_absent = mac.ends_with("77");
        if is_absent {
            net.agents.remove(0).kill();
        }
        host.run("ip", &["link", "set", "eth0", "address", mac])?;
        if is_absent {
            let file = net.testbed.folder().join("chained0.json");
            let options = ["--cni-chain", &file.display().to_string()];
            let source = penstock_testbed::Source::Manifests;
            let agent = penstock_testbed::Agent::start_network(&net.nodes[0], &source, &options)?;
            net.agents.insert(0, agent);
        }
        is_reached(&host, &[&near, &node, &far])?;
        let neighbours = node.run("ip", &["neigh", "show", "dev", tuned.interface()?])?;
        assert_eq!(neighbours.matches(mac).count(), 2, "{neighbours}");
    }
    drop((server, outside));
    tuned.end()
}

#[test]
fn ports_of_a_plugin_after_ours_lead_to_pods() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let portmap = json!({ "type": "portmap", "capabilities": { "portMappings": true } });
    let mut bandwidth = in_bits();
    bandwidth["type"] = json!("bandwidth");
    // Whether what the pod sends is left to the kernel or not.
    ports_lead_to_pods(std::slice::from_ref(&portmap))?;
    ports_lead_to_pods(&[bandwidth, portmap])
}

fn ports_lead_to_pods(plugins: &[Value]) -> Result<()> {
    let (mut net, outside) = net_with(plugins)?;
    let node = net.nodes[0].host.clone();
    let ports = [(9_001, "tcp"), (9_002, "udp")];
    let mappings = ports.map(
        |(port, protocol)| json!({ "hostPort": port, "containerPort": PORT, "protocol": protocol }),
    );
    let mapped = Chained::new(&mut net, json!({ "portMappings": mappings }))?;
    let server = mapped.host.serve(PORT)?;
    let [near, far] = [0, 2].map(|index: usize| net.pods[index].host.clone());
    let all = [&outside, &node, &far, &near, &mapped.host];
    let askers = all.map(|from| (from, vec![node.ip4, node.ip6]));
    let itself = (&node, vec![Ipv4Addr::LOCALHOST.into()]);
    for (from, ips) in askers.into_iter().chain([itself]) {
        for ip in ips {
            for (port, protocol) in ports {
                let to = SocketAddr::new(ip, port).to_string();
                // Once and again: what is remembered of the first changes nothing.
                for _ in 0..3 {
                    let answer = from.ask(protocol, &to, &[])?;
                    let what = format!("{} asks {to} {protocol}: {answer}", from.name);
                    assert_eq!(text(&answer, "server"), mapped.host.name, "{what}");
                    assert_eq!(text(&answer, "peer"), to, "{what}");
                }
            }
        }
    }
    // Who dials the pod itself is answered by it, and what it begins has the node's address.
    reaches(&near, &mapped.host)?;
    reaches(&far, &mapped.host)?;
    let outer = outside.serve(PORT)?;
    for (ip, source) in asked(&mapped.host, &outside)? {
        assert_eq!(source, same_family(&node, ip));
    }
    drop((server, outer));
    mapped.end()?;
    net.nothing_was_dropped()
}
