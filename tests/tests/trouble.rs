//! What goes wrong, end to end: refusals, errors on the way, garbage, a killed agent.
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
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use anyhow::Result;
use penstock_testbed::{
    Agent, Scene, Service, Slice, Source, all_answer, at_once, eventually, frontends, list,
    require_kernel, text,
};
use serde_json::{Value, json};

#[test]
fn what_nobody_serves_is_refused_at_once_or_dropped() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let agent = scene.agent(&[])?;
    let pod = &scene.client.host;
    let hosts = [
        pod.clone(),
        pod.without_socket_hooks(),
        scene.nodes[0].host.clone(),
    ];
    let cases = [(12, 80, "no_endpoints"), (10, 81, "undefined_port")];
    for host in &hosts {
        for (number, port, reason) in cases {
            for service in frontends(number, port) {
                for protocol in ["tcp", "udp-connected"] {
                    let before = agent.count(reason)?;
                    let started = Instant::now();
                    let answer = host.ask(protocol, &service.to_string(), &[])?;
                    assert_eq!(
                        text(&answer, "error"),
                        "connection refused",
                        "{protocol} {service} from {}",
                        host.name
                    );
                    assert!(started.elapsed() < at_once(), "{protocol} {service}");
                    assert!(agent.count(reason)? > before, "{reason} is counted");
                }
            }
        }
    }
    for service in frontends(13, 80) {
        let before = agent.count("no_local_endpoints")?;
        let answer = pod.ask("tcp", &service.to_string(), &["--timeout-ms", "300"])?;
        assert_eq!(text(&answer, "error"), "timed out", "{answer}");
        assert!(agent.count("no_local_endpoints")? > before);
    }
    Ok(())
}

#[test]
fn errors_about_translated_packets_reach_the_client() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    // Nobody listens on 9999: the backend's kernel sends "port unreachable".
    let closed = Service::new("closed", 20)
        .port("udp", 80, "UDP")
        .port("tcp", 80, "TCP");
    let mut items = vec![closed.json()];
    items.extend(Slice::both("closed", 9999, &[&scene.servers[1]]));
    scene.nodes[0].manifest("closed.json", &list(&items))?;
    let agent = scene.agent(&[])?;
    let client = scene.client.host.without_socket_hooks();
    for service in frontends(20, 80) {
        for protocol in ["tcp", "udp-connected"] {
            let answer = client.ask(protocol, &service.to_string(), &[])?;
            assert_eq!(
                text(&answer, "error"),
                "connection refused",
                "{protocol} {service}"
            );
        }
    }
    assert!(
        agent.count("icmp_error")? >= 2,
        "both families' errors were translated"
    );
    Ok(())
}

#[test]
fn the_path_mtu_is_discovered_through_a_service() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    let mtu = Service::new("mtu", 21)
        .port("udp", 80, "UDP")
        .port("tcp", 80, "TCP");
    let mut items = vec![mtu.json()];
    items.extend(Slice::both("mtu", 8080, &[&scene.servers[1]]));
    scene.nodes[0].manifest("mtu.json", &list(&items))?;
    let agent = scene.agent(&[])?;
    // The last link takes less than those before it, which the client can't know.
    let link = &scene.servers[1].interface;
    scene.nodes[1]
        .host
        .run("ip", &["link", "set", link, "mtu", "1280"])?;
    let client = scene.client.host.without_socket_hooks();
    for service in frontends(21, 80) {
        let service = service.to_string();
        let before = agent.count("icmp_error")?;
        let ask = |time| {
            let options = ["--size", "1400", "--timeout-ms", time];
            client.ask("udp-connected", &service, &options)
        };
        let first = ask("500")?;
        assert_eq!(text(&first, "server"), "", "it can't have fitted: {first}");
        assert!(
            agent.count("icmp_error")? > before,
            "{service}: no error was translated"
        );
        // The client's kernel knows now and sends fragments.
        let second = ask("5000")?;
        assert_eq!(text(&second, "reached"), "1400", "{second}");
        assert_eq!(
            client.who_answers("tcp", &service)?,
            scene.servers[1].host.name
        );
    }
    Ok(())
}

#[test]
fn the_programs_say_what_they_refuse_when_asked_to() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let agent = scene.agent(&["--log-level", "trace"])?;
    let client = scene.client.host.without_socket_hooks();
    let service = frontends(12, 80)[0].to_string();
    client.ask("tcp", &service, &[])?;
    eventually("the trace is in the log", || {
        let log = agent.log();
        anyhow::ensure!(log.contains("kernel: no_endpoints, TCP, port 80"), "{log}");
        Ok(())
    })
}

#[test]
fn garbage_is_reported_and_changes_nothing_else() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let agent = scene.agent(&[])?;
    let name = "x".repeat(1_000_000);
    let garbage = [
        ("a.yaml", "{{{ not yaml".to_owned(), "no Kubernetes object"),
        ("b.json", "[1, 2".to_owned(), "no Kubernetes object"),
        ("c.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: p}\nspec: {clusterIP: 10.96.1.1, ports: [{port: 99999}]}\n".to_owned(), "99999"),
        ("d.json", json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {"clusterIP": "10.96.1.2", "ports": [{"port": 1}]}}).to_string(), "1000000 bytes"),
        ("e.json", json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": "s", "labels": {"kubernetes.io/service-name": "web"}}, "addressType": "IPv6", "endpoints": [{"addresses": ["10.0.0.1"]}]}).to_string(), "addressType"),
        ("f.json", json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "thief", "creationTimestamp": "2030-01-01T00:00:00Z"}, "spec": {"clusterIP": "172.31.0.11", "ports": [{"port": 80}]}}).to_string(), "node's own address"),
    ];
    for (file, text, _) in &garbage {
        scene.nodes[0].manifest(file, text)?;
    }
    eventually("all garbage is reported", || {
        let problems = agent.status()?["problems"].to_string();
        for (file, _, reason) in &garbage {
            anyhow::ensure!(
                problems.contains(reason),
                "{file}: {reason} is not in {problems}"
            );
        }
        anyhow::ensure!(problems.len() < 10_000, "names are cut");
        Ok(())
    })?;
    for service in frontends(10, 80) {
        all_answer(&scene.client.host, "tcp", service, &scene.names())?;
    }
    Ok(())
}

/// How often the agent is killed: 50 times, or as often as `PENSTOCK_KILLS` says, for slow machines.
fn kills() -> u32 {
    let kills = std::env::var("PENSTOCK_KILLS");
    kills
        .ok()
        .and_then(|kills| kills.parse().ok())
        .unwrap_or(50)
}

#[test]
fn killing_the_agent_disturbs_nobody() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut scene = Scene::new()?;
    scene.manifests()?;
    let by_packets = scene
        .testbed
        .pod(&scene.nodes[0])?
        .host
        .without_socket_hooks();
    let mut agent = Agent::start(&scene.nodes[0], &Source::Manifests, &[])?;
    agent.wait_for_pods(3)?;
    let [v4, v6] = frontends(10, 80).map(|service| service.to_string());
    let load = ["load", &v4, &v6, "--for-ms", "1000", "--tasks", "2"];
    let before = agent.status()?;
    let is_over = AtomicBool::new(false);
    let hosts = [scene.client.host.clone(), by_packets];
    std::thread::scope(|scope| -> Result<()> {
        let loads: Vec<_> = hosts
            .iter()
            .map(|host| {
                scope.spawn(|| -> Result<()> {
                    // A second of a slow machine is few connections.
                    let mut servers = BTreeSet::new();
                    while !is_over.load(Ordering::Relaxed) {
                        let report: Value = serde_json::from_str(&host.traffic(&load)?.line()?)?;
                        anyhow::ensure!(report["failed"] == json!([]), "{report}");
                        let names = report["servers"].as_array().into_iter().flatten();
                        servers.extend(names.filter_map(Value::as_str).map(str::to_owned));
                    }
                    anyhow::ensure!(servers == scene.names(), "{servers:?}");
                    Ok(())
                })
            })
            .collect();
        let killed = (0..kills()).try_for_each(|_| {
            agent.kill();
            agent.restart()
        });
        is_over.store(true, Ordering::Relaxed);
        for load in loads {
            load.join().expect("a load panicked")?;
        }
        killed
    })?;
    let after = agent.status()?;
    for field in ["services", "backends_used", "slots_used"] {
        assert_eq!(before[field], after[field], "{field}");
    }
    Ok(())
}
