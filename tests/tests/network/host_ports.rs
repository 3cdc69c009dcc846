//! Ports of the node that lead to pods: there once ADD has answered, and nobody's who has not been told so.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Context, Result, ensure};
use aya::maps::{HashMap, Map};
use penstock_agent::{
    attach::inspect::{self, Finding},
    dataplane::pins::Pins,
};
use penstock_common::{Be16, Frontend, FrontendKey, Proto, V4};
use penstock_testbed::{Container, PluginError, Service, eventually, list, require_kernel};
use serde_json::{Value, json};

use crate::net::Net;

/// A pod's port.
const PORT: u16 = 8080;

fn port(number: u16, ip: &str) -> Value {
    json!({ "hostPort": number, "containerPort": PORT, "protocol": "tcp", "hostIP": ip })
}

/// Whether the kernel leads somebody from there.
fn is_led(net: &Net, ip: IpAddr, number: u16) -> Result<bool> {
    let pins = Pins::at(&net.nodes[0].bpffs);
    match inspect::frontend(&pins, ip, number, Proto::TCP) {
        Ok(()) => Ok(true),
        Err(Finding::Damage(_)) => Ok(false),
        Err(Finding::Unknown(why)) => anyhow::bail!(why),
    }
}

/// Whether the kernel knows of it, whomever it leads to.
fn is_known(pins: &Pins, ip: Ipv4Addr, number: u16) -> Result<bool> {
    let map = Map::HashMap(pins.map("FRONTENDS4")?);
    let frontends: HashMap<_, FrontendKey<V4>, Frontend> = map.try_into()?;
    let key = FrontendKey::new(V4::from(ip), Be16::from_host(number), Proto::TCP);
    Ok(frontends.get(&key, 0).is_ok())
}

/// That ADD refuses, with what code and words; and that nothing of it stays.
#[track_caller]
fn refused(net: &mut Net, port: Value, code: u64, words: &[&str]) -> Result<Container> {
    let before = net.agents[0].show("pods")?;
    let mut container = net.testbed.container_on(&net.nodes[0])?;
    container.runtime = json!({ "portMappings": [port] });
    let error = net.nodes[0].plugin()?.add(&container);
    let error = error.err().context("it was added")?;
    let error = error.downcast::<PluginError>()?;
    assert_eq!(error.code, code, "{error}");
    for word in words {
        assert!(error.message.contains(word), "{error}");
    }
    let state = net.nodes[0].cni_state_dir().join("penstock.json");
    let attachments = penstock_cni::state::read(&state)?;
    let mut keys = attachments.iter().map(|attachment| &attachment.key);
    assert!(keys.all(|key| key.container != container.id));
    let links = net.nodes[0].host.run("ip", &["link"])?;
    assert_eq!(links.matches(": pn").count(), attachments.len(), "{links}");
    eventually("the agent has forgotten it", || {
        let after = net.agents[0].show("pods")?;
        ensure!(after == before, "{after}");
        Ok(())
    })?;
    Ok(container)
}

/// Many services at this port, of which the agent has something to write for long enough to be seen.
fn crowd(port: u16) -> String {
    let service = |number: u16| {
        let [high, low] = number.to_be_bytes();
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": { "name": format!("crowd{number}"), "namespace": "default" },
            "spec": {
                "clusterIP": format!("10.97.{high}.{low}"),
                "clusterIPs": [format!("10.97.{high}.{low}")],
                "ports": [{ "port": port, "protocol": "TCP" }],
            },
        })
    };
    list(&(0..CROWD).map(service).collect::<Vec<_>>())
}

/// How many they are.
const CROWD: u16 = 3_000;

#[test]
fn add_answers_once_host_ports_are_in_the_kernel() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut net = Net::new(&[])?;
    let node = net.nodes[0].host.clone();
    let plugin = net.nodes[0].plugin()?;
    let mut container = net.testbed.container_on(&net.nodes[0])?;
    let is_over = &AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        // The agent is busy with others, so that nothing is in the kernel just because it is quick.
        let manifests = net.nodes[0].clone();
        let busy = scope.spawn(move || -> Result<u16> {
            for round in 0.. {
                if is_over.load(Ordering::Relaxed) {
                    return Ok(round);
                }
                let port = 80 + round % 2;
                manifests.manifest("crowd.json", &crowd(port))?;
                let pins = Pins::at(&manifests.bpffs);
                eventually("it is written", || {
                    let is_there = is_known(&pins, Ipv4Addr::new(10, 97, 0, 0), port)?;
                    ensure!(is_there || is_over.load(Ordering::Relaxed));
                    Ok(())
                })?;
            }
            Ok(0)
        });
        let mut add = || -> Result<()> {
            for number in 9_000..9_020 {
                container.runtime = json!({ "portMappings": [port(number, "")] });
                plugin.add(&container)?;
                for ip in [node.ip4, node.ip6] {
                    assert!(is_led(&net, ip, number)?, "{ip} {number}");
                }
                plugin.del(&container)?;
            }
            Ok(())
        };
        let added = std::panic::catch_unwind(std::panic::AssertUnwindSafe(&mut add));
        is_over.store(true, Ordering::Relaxed);
        let rounds = busy.join().expect("no panic")?;
        added.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        ensure!(rounds > 1, "the agent had nothing else to do");
        Ok(())
    })?;
    eventually("the last one is gone", || {
        ensure!(!is_led(&net, node.ip4, 9_019)?);
        Ok(())
    })?;
    net.nothing_was_dropped()
}

#[test]
fn a_host_port_that_can_not_be_had_fails_add_and_disturbs_nobody() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut net = Net::new(&[])?;
    let node = net.nodes[0].host.clone();
    let outside = net.testbed.client()?;
    let ports = json!({ "portMappings": [port(9_001, ""), port(9_002, "127.0.0.1")] });
    let (holder, pod, _) = net.container(0, ports)?;
    let server = pod.serve(PORT)?;
    let name = format!("default/pod/{}", holder.id);
    // A pod's, at whichever of its addresses, for as long as it is there.
    let node_ip = node.ip4.to_string();
    for ip in ["", &node_ip] {
        refused(&mut net, port(9_001, ip), 11, &["TCP port 9001", &name])?;
    }
    refused(&mut net, port(9_002, ""), 11, &["TCP port 9002", &name])?;
    // A service's.
    let mut service = Service::new("web", 1).port("tcp", 80, "TCP").json();
    service["spec"]["type"] = json!("NodePort");
    service["spec"]["ports"][0]["nodePort"] = json!(30_080);
    net.nodes[0].manifest("web.json", &list(&[service]))?;
    eventually("the node port is there", || {
        ensure!(
            net.agents[0]
                .show("services")?
                .to_string()
                .contains("30080")
        );
        Ok(())
    })?;
    let words = ["TCP port 30080", "the service default/web"];
    refused(&mut net, port(30_080, ""), 104, &words)?;
    // An address that the node does not have.
    let words = ["TCP port 9003 of 192.0.2.9", "does not have that address"];
    refused(&mut net, port(9_003, "192.0.2.9"), 104, &words)?;
    // All that was nothing to the pod that has its port.
    let at = SocketAddr::new(node.ip4, 9_001).to_string();
    assert_eq!(outside.who_answers("tcp", &at)?, pod.name);
    // Its sandbox ends, and nobody has said so yet.
    drop(server);
    let waiting = refused(&mut net, port(9_001, ""), 11, &[&name])?;
    net.testbed.end_container(&holder)?;
    let plugin = net.nodes[0].plugin()?;
    eventually("the next one gets the port", || plugin.add(&waiting))?;
    assert!(is_led(&net, node.ip4, 9_001)?);
    plugin.del(&holder)?;
    assert!(is_led(&net, node.ip4, 9_001)?);
    // A service that comes later takes the port of a pod, and that is said.
    let mut service = Service::new("web", 1).port("tcp", 80, "TCP").json();
    service["spec"]["type"] = json!("NodePort");
    service["spec"]["ports"][0]["nodePort"] = json!(9_001);
    net.nodes[0].manifest("web.json", &list(&[service]))?;
    eventually("the pod's loss is a problem", || {
        let problems = net.agents[0].status()?["problems"].to_string();
        let name = format!("default/pod/{}", waiting.id);
        ensure!(
            problems.contains(&name) && problems.contains("9001"),
            "{problems}"
        );
        Ok(())
    })?;
    plugin.del(&waiting)
}
