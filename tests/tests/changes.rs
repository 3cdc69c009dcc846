//! What changes, end to end: backends that go, objects of a real API server.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

use std::{
    net::SocketAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Result;
use penstock_testbed::{
    Agent, ApiServer, Host, PROTOCOLS, Pod, Process, Scene, Service, Slice, Source, at_once,
    eventually, frontends, list, require_api_server, require_kernel, text,
};
use serde_json::Value;

/// One of these tests measures time, and the other begins with an API server that takes both processors.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads what a socket is answered, whose first answer this was, until a pod answers, at once.
fn moves(asking: &mut Process, first: &Value, there: &Pod, agent: &Agent) -> Result<()> {
    let changed = Instant::now();
    loop {
        let answer: Value = serde_json::from_str(&asking.line()?)?;
        if text(&answer, "server") == there.host.name {
            assert_eq!(answer["own"], first["own"], "the socket kept its port");
            assert_eq!(answer["peer"], first["peer"], "the peer is the service");
            assert_eq!(
                answer["source"], first["source"],
                "the backend sees one client"
            );
            return Ok(());
        }
        assert!(
            changed.elapsed() < at_once(),
            "{first} sticks to a backend that is no longer the service's: {answer}\n{}",
            agent.log()
        );
    }
}

/// Has a UDP service have these endpoints.
fn web(scene: &Scene, pods: &[&Pod]) -> Result<()> {
    let web = Service::new("web", 10).port("udp", 80, "UDP");
    let mut items = vec![web.json()];
    items.extend(Slice::both("web", 8080, pods));
    scene.nodes[0].manifest("web.json", &list(&items))
}

#[test]
fn udp_leaves_a_backend_that_is_removed() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let _turn = turn();
    let scene = Scene::new()?;
    let [a, b] = &scene.servers;
    let with = |pods: &[&Pod]| web(&scene, pods);
    with(&[a])?;
    let agent = scene.agent(&[])?;
    let hosts = [
        scene.client.host.clone(),
        scene.client.host.without_socket_hooks(),
        scene.nodes[0].host.clone(),
    ];
    let mut here = a;
    for host in &hosts {
        for service in frontends(10, 80) {
            for protocol in ["udp", "udp-connected"] {
                let mut asking = host.traffic(&["keep", protocol, &service.to_string()])?;
                let first: Value = serde_json::from_str(&asking.line()?)?;
                assert_eq!(text(&first, "server"), here.host.name, "{first}");
                let there = if here.host.name == a.host.name { b } else { a };
                with(&[there])?;
                moves(&mut asking, &first, there, &agent)?;
                here = there;
            }
        }
    }
    Ok(())
}

#[test]
fn udp_sockets_outlive_a_time_without_any_backend() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let _turn = turn();
    let scene = Scene::new()?;
    let [a, b] = &scene.servers;
    let with = |pods: &[&Pod]| web(&scene, pods);
    with(&[a])?;
    let agent = scene.agent(&[])?;
    for host in [&scene.client.host, &scene.nodes[0].host] {
        for service in frontends(10, 80) {
            with(&[a])?;
            eventually("it is served", || {
                host.who_answers("udp", &service.to_string())
            })?;
            let mut asking = host.traffic(&["keep", "udp-connected", &service.to_string()])?;
            let first: Value = serde_json::from_str(&asking.line()?)?;
            assert_eq!(text(&first, "server"), a.host.name, "{first}");
            let tries = || agent.log().matches("waiting: 1").count();
            let before = tries();
            with(&[])?;
            eventually(
                "the agent has looked for another backend, twice and in vain",
                || {
                    anyhow::ensure!(tries() >= before + 2, "{}", agent.log());
                    Ok(())
                },
            )?;
            with(&[b])?;
            moves(&mut asking, &first, b, &agent)?;
        }
    }
    Ok(())
}

/// Two services of which one has an address that the other may get, with their endpoints.
fn sharing(owner: &str, endpoints: [&[&Pod]; 2]) -> String {
    let mut items = Vec::new();
    for ((name, number), pods) in [("blue", 10), ("green", 11)].into_iter().zip(endpoints) {
        let ips = if name == owner { &SHARED[..] } else { &[] };
        let service = Service::new(name, number).port("udp", 80, "UDP");
        items.push(service.set("externalIPs", ips.to_vec()).json());
        items.extend(Slice::both(name, 8080, pods));
    }
    list(&items)
}

/// What it has.
const SHARED: [&str; 2] = ["198.51.100.7", "2001:db8::7"];

/// A socket that asks at one of them again and again, and its first answer.
fn asking(host: &Host, protocol: &str, ip: &str) -> Result<(Process, Value)> {
    let to = SocketAddr::new(ip.parse()?, 80).to_string();
    let mut socket = host.traffic(&["keep", protocol, &to])?;
    let first = serde_json::from_str(&socket.line()?)?;
    Ok((socket, first))
}

#[test]
fn udp_follows_an_address_to_its_next_service() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let _turn = turn();
    let scene = Scene::new()?;
    let [a, b] = &scene.servers;
    let owned_by = |owner| scene.nodes[0].manifest("all.json", &sharing(owner, [&[a], &[b]]));
    owned_by("blue")?;
    let agent = scene.agent(&[])?;
    let by_packets = scene.client.host.without_socket_hooks();
    for host in [&scene.client.host, &by_packets, &scene.nodes[0].host] {
        for protocol in ["udp", "udp-connected"] {
            for ip in SHARED {
                let (mut socket, first) = asking(host, protocol, ip)?;
                assert_eq!(text(&first, "server"), a.host.name, "{first}");
                owned_by("green")?;
                moves(&mut socket, &first, b, &agent)?;
                owned_by("blue")?;
                moves(&mut socket, &first, a, &agent)?;
            }
        }
    }
    Ok(())
}

#[test]
fn udp_stays_with_a_pod_that_serves_the_next_service_too() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let _turn = turn();
    let scene = Scene::new()?;
    let [a, b] = &scene.servers;
    let owned_by = |owner| scene.nodes[0].manifest("all.json", &sharing(owner, [&[a, b], &[a, b]]));
    owned_by("blue")?;
    let agent = scene.agent(&[])?;
    let by_packets = scene.client.host.without_socket_hooks();
    let mut sockets = Vec::new();
    // With one each, half of what is broken would look right.
    for _ in 0..3 {
        for ip in SHARED {
            for host in [&scene.client.host, &scene.nodes[0].host, &by_packets] {
                sockets.push(asking(host, "udp-connected", ip)?);
            }
            sockets.push(asking(&by_packets, "udp", ip)?);
        }
    }
    owned_by("green")?;
    eventually("the address is the other service's", || {
        let services = agent.show("services")?;
        let mut ports = services
            .as_array()
            .into_iter()
            .flatten()
            .map(Value::to_string);
        let is_greens = ports.any(|port| port.contains("green") && port.contains(SHARED[1]));
        anyhow::ensure!(is_greens, "{services}");
        Ok(())
    })?;
    // Longer than from one sweep to the next.
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        for (socket, first) in &mut sockets {
            let answer: Value = serde_json::from_str(&socket.line()?)?;
            assert_eq!(
                answer["server"],
                first["server"],
                "{answer}\n{}",
                agent.log()
            );
        }
    }
    Ok(())
}

#[test]
fn a_real_api_server_drives_the_kernel_and_may_restart() -> Result<()> {
    let Some(assets) = require_api_server() else {
        return Ok(());
    };
    let _turn = turn();
    let mut scene = Scene::new()?;
    let host = scene.testbed.client()?;
    let mut api = ApiServer::start(&assets, &host, scene.testbed.folder())?;
    let [a, b] = &scene.servers;
    api.apply(
        &Service::new("web", 10)
            .port("tcp", 80, "TCP")
            .port("udp", 80, "UDP")
            .json(),
    )?;
    for slice in Slice::both("web", 8080, &[a]) {
        api.apply(&slice)?;
    }
    let source = Source::Kubeconfig(api.kubeconfig());
    let agent = Agent::start(&scene.nodes[0], &source, &[])?;
    agent.wait_for_pods(2)?;
    let pod = &scene.client.host;
    for host in [pod.clone(), pod.without_socket_hooks()] {
        for service in frontends(10, 80) {
            for protocol in PROTOCOLS {
                let name = host.who_answers(protocol, &service.to_string())?;
                assert_eq!(name, a.host.name, "{protocol} {service}");
            }
        }
    }
    let moved = |to: &Pod| {
        let service = frontends(10, 80)[0].to_string();
        eventually("the other backend answers", || {
            let name = pod.who_answers("tcp", &service)?;
            anyhow::ensure!(name == to.host.name, "{name} answers\n{}", agent.log());
            Ok(())
        })
    };
    for slice in Slice::both("web", 8080, &[b]) {
        api.apply(&slice)?;
    }
    moved(b)?;
    api.restart()?;
    assert_eq!(
        pod.who_answers("tcp", &frontends(10, 80)[0].to_string())?,
        b.host.name
    );
    for slice in Slice::both("web", 8080, &[a]) {
        api.apply(&slice)?;
    }
    moved(a)?;
    api.delete("service", "web")?;
    eventually("the service is gone", || {
        let services = agent.show("services")?;
        let names = services.as_array().into_iter().flatten();
        anyhow::ensure!(
            names.clone().all(|port| port["service"] != "default/web"),
            "{services}"
        );
        Ok(())
    })?;
    Ok(())
}
