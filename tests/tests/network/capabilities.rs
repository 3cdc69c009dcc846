//! What runtimes ask for by capabilities, in traffic: ports of the node, and limits.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, Result};
use penstock_testbed::{Container, Host, Plugin, eventually, require_kernel, text};
use serde_json::{Value, json};

use crate::net::Net;

/// A pod's port.
pub const PORT: u16 = 8080;

#[test]
fn host_ports_are_where_they_are_wanted() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut net = Net::new(&[])?;
    let outside = net.testbed.client()?;
    let node = net.nodes[0].host.clone();
    let (far, near) = (net.pods[2].host.clone(), net.pods[0].host.clone());
    let port = |port: u16, protocol: &str, ip: &str| json!({ "hostPort": port, "containerPort": PORT, "protocol": protocol, "hostIP": ip });
    let loopback = Ipv4Addr::LOCALHOST.to_string();
    let ports = [
        port(9001, "tcp", &node.ip4.to_string()),
        port(9002, "udp", ""),
        port(9003, "tcp", &loopback),
        port(9004, "tcp", "0.0.0.0"),
    ];
    let (container, pod, _) = net.container(0, json!({ "portMappings": ports }))?;
    let server = pod.serve(PORT)?;
    let within = |from: &Host, ip: IpAddr, port: u16, protocol: &str, time: &str| -> Result<bool> {
        let to = SocketAddr::new(ip, port).to_string();
        let answer = from.ask(protocol, &to, &["--timeout-ms", time])?;
        Ok(answer
            .get("server")
            .is_some_and(|_| text(&answer, "server") == pod.name))
    };
    let served = |from: &Host, ip: IpAddr, port: u16, protocol: &str| {
        within(from, ip, port, protocol, "700")
    };
    // Who asks, at which address; which of the four answer.
    let loopback: IpAddr = Ipv4Addr::LOCALHOST.into();
    let all: [(&Host, IpAddr, [bool; 4]); 7] = [
        (&outside, node.ip4, [true, true, false, true]),
        (&outside, node.ip6, [false, true, false, false]),
        (&far, node.ip4, [true, true, false, true]),
        (&near, node.ip4, [true, true, false, true]),
        (&node, node.ip4, [true, true, false, true]),
        (&node, node.ip6, [false, true, false, false]),
        (&node, loopback, [false, true, true, true]),
    ];
    for (from, ip, expected) in all {
        for (index, expected) in expected.into_iter().enumerate() {
            let (number, wanted) = (9001 + index as u16, if index == 1 { "udp" } else { "tcp" });
            let what = format!("{} asks {ip} {number}", from.name);
            // An answer may take its time.
            let time = if expected { "5000" } else { "700" };
            assert_eq!(
                within(from, ip, number, wanted, time)?,
                expected,
                "{what} {wanted}"
            );
            let other = if wanted == "udp" { "tcp" } else { "udp" };
            assert!(!served(from, ip, number, other)?, "{what} {other}");
        }
    }
    // GC ends them with their pod, which no runtime knows any more.
    let others: Vec<Container> = net
        .pods
        .iter()
        .map(|pod| Container::named(&pod.host.name))
        .collect();
    net.nodes[0]
        .plugin()?
        .gc(&others.iter().collect::<Vec<_>>())?;
    eventually("the ports are gone", || {
        anyhow::ensure!(!served(&outside, node.ip4, 9001, "tcp")?);
        anyhow::ensure!(!served(&node, node.ip4, 9004, "tcp")?);
        Ok(())
    })?;
    eventually("the agent has forgotten the pod", || {
        let pods = net.agents[0].show("pods")?.to_string();
        anyhow::ensure!(!pods.contains(&container.id), "{pods}");
        Ok(())
    })?;
    near.who_answers("tcp", &SocketAddr::new(far.ip4, PORT).to_string())?;
    drop(server);
    Ok(())
}

/// Bytes a second, and what may come at once.
const RATE: u64 = 1_000_000;
const BURST: u64 = 200_000;
/// What is sent, and how long that takes at least: less a burst, and what waits for its turn.
const BYTES: u64 = 2_000_000;
const LEAST_SECS: f64 = 1.2;

pub fn in_bits() -> Value {
    json!({
        "ingressRate": RATE * 8, "ingressBurst": BURST * 8,
        "egressRate": RATE * 8, "egressBurst": BURST * 8,
    })
}

#[test]
fn limits_hold_in_both_directions_whatever_way_packets_take() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut net = Net::new(&[])?;
    let (_, limited, _) = net.container(0, json!({ "bandwidth": in_bits() }))?;
    are_limited(&net, &limited)
}

#[test]
fn what_pods_asked_for_is_shown_and_so_is_one_that_ended_unheard() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut net = Net::new(&[])?;
    let port = json!({ "hostPort": 9001, "containerPort": PORT, "protocol": "udp", "hostIP": "127.0.0.1" });
    let runtime = json!({ "portMappings": [port], "bandwidth": in_bits() });
    let (container, _, _) = net.container(0, runtime)?;
    let shown = || -> Result<Value> {
        let pods = net.agents[0].show("pods")?;
        let mut pods = pods.as_array().into_iter().flatten();
        let pod = pods.find(|pod| pod["container"] == container.id.as_str());
        pod.cloned().context("it is not shown")
    };
    let pod = shown()?;
    let asked =
        json!([{ "host_ip": "127.0.0.1", "host_port": 9001, "pod_port": PORT, "protocol": "UDP" }]);
    assert_eq!(pod["host_ports"], asked);
    assert_eq!(pod["limits"]["ingress_rate"], RATE * 8);
    assert_eq!(pod["limits"]["egress_burst"], BURST * 8);
    assert_eq!(pod["wired"], true);
    let said = net.nodes[0].penstock("pods", &[])?.output;
    for words in ["127.0.0.1:9001->8080/UDP", "to 8M, from 8M", "wired"] {
        assert!(said.contains(words), "{said}");
    }
    net.testbed.end_container(&container)?;
    eventually("its end is seen", || {
        let pod = shown()?;
        anyhow::ensure!(pod["gone_secs"].is_u64() && pod["wired"] == false, "{pod}");
        Ok(())
    })?;
    let said = net.nodes[0].penstock("pods", &[])?.output;
    assert!(said.contains("interface gone for"), "{said}");
    net.nodes[0].plugin()?.del(&container)?;
    eventually("it is forgotten", || {
        anyhow::ensure!(shown().is_err());
        Ok(())
    })
}

#[test]
fn what_tuning_does_after_it_is_heeded() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut net = Net::new(&[])?;
    let (container, pod, result) = net.container(0, json!({}))?;
    let server = pod.serve(PORT)?;
    let data = net.nodes[0].cni_state_dir().with_file_name("tuning");
    let mut tuning = json!({
        "cniVersion": "1.0.0", "name": "penstock", "type": "tuning", "dataDir": data,
        "mtu": 1_300, "prevResult": result,
    });
    // Debian's is of an earlier version of the specification.
    tuning["prevResult"]["cniVersion"] = json!("1.0.0");
    let tuning = tuning.as_object().cloned().unwrap_or_default();
    let plugin = Plugin::reference(&net.nodes[0], tuning)?;
    plugin.add(&container)?;
    let link = pod.run("ip", &["-o", "link", "show", "dev", "eth0"])?;
    assert!(link.contains("mtu 1300"), "{link}");
    let [near, far] = [0, 2].map(|index: usize| &net.pods[index].host);
    for from in [near, far] {
        for ip in [pod.ip4, pod.ip6] {
            let to = SocketAddr::new(ip, PORT).to_string();
            let answer = from.ask("udp", &to, &["--size", "4000"])?;
            assert_eq!(text(&answer, "reached"), "4000", "{to}: {answer}");
            assert_eq!(from.who_answers("tcp", &to)?, pod.name);
        }
    }
    plugin.del(&container)?;
    net.nodes[0].plugin()?.del(&container)?;
    drop(server);
    Ok(())
}

/// Asserts that what somebody pours arrives no faster than it may.
pub fn is_limited(from: &Host, to: SocketAddr) -> Result<()> {
    let (arrived, seconds) = from.pour(&to.to_string(), BYTES)?;
    assert_eq!(arrived, BYTES);
    let what = format!("{} to {to}: {seconds:.2} s", from.name);
    eprintln!("{what}");
    assert!(seconds > LEAST_SECS, "{what}");
    Ok(())
}

/// Asserts that a pod of the first node sends and gets no faster than it may, to and from everybody.
pub fn are_limited(net: &Net, limited: &Host) -> Result<()> {
    let [near, far] = [0, 2].map(|index: usize| &net.pods[index].host);
    let node = &net.nodes[0].host;
    let drains = [near, far, node, limited].map(|host| host.drain(9000));
    for other in [near, far, node] {
        for (from, to) in [(other, limited), (limited, other)] {
            for ip in [to.ip4, to.ip6] {
                is_limited(from, SocketAddr::new(ip, 9000))?;
            }
        }
    }
    // It is they that wait, and nobody else.
    let (_, seconds) = near.pour(&SocketAddr::new(far.ip4, 9000).to_string(), BYTES)?;
    assert!(seconds < LEAST_SECS / 2.0, "{seconds:.2} s");
    drop(drains);
    Ok(())
}
