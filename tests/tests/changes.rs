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
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use anyhow::Result;
use penstock_testbed::{
    Agent, ApiServer, PROTOCOLS, Pod, Scene, Service, Slice, Source, at_once, eventually,
    frontends, list, require_api_server, require_kernel, text,
};
use serde_json::Value;

/// One of these tests measures time, and the other begins with an API server that takes both processors.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn udp_leaves_a_backend_that_is_removed() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let _turn = turn();
    let scene = Scene::new()?;
    let [a, b] = &scene.servers;
    let web = Service::new("web", 10).port("udp", 80, "UDP").json();
    let with = |pods: &[&Pod]| {
        let mut items = vec![web.clone()];
        items.extend(Slice::both("web", 8080, pods));
        scene.nodes[0].manifest("web.json", &list(&items))
    };
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
                        break;
                    }
                    assert!(
                        changed.elapsed() < at_once(),
                        "{protocol} {service} from {} sticks to a dead backend: {answer}\n{}",
                        host.name,
                        agent.log()
                    );
                }
                here = there;
            }
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
