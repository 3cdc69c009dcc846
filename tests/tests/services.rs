//! Services end to end: real agents, real sockets, real packets between namespaces.
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
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::Result;
use aya::maps::{Array, HashMap, Map, MapData, MapError};
use penstock_agent::dataplane::pins::Pins;
use penstock_common::{TcpPeer, limits};
use penstock_testbed::{
    Agent, PROTOCOLS, Scene, Service, Slice, Source, all_answer, binary, eventually, frontends,
    list, require_kernel, text,
};
use serde_json::json;

#[test]
fn pods_and_host_processes_reach_services_at_the_socket() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let agent = scene.agent(&[])?;
    for protocol in PROTOCOLS {
        for service in frontends(10, 80) {
            all_answer(&scene.client.host, protocol, service, &scene.names())?;
            all_answer(&scene.nodes[0].host, protocol, service, &scene.names())?;
        }
    }
    assert_eq!(
        agent.count("packet_request")?,
        0,
        "packets needed no translation"
    );
    assert!(agent.count("socket_connect")? > 0);
    Ok(())
}

#[test]
fn packets_that_no_socket_hook_saw_are_translated() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let agent = scene.agent(&[])?;
    let client = scene.client.host.without_socket_hooks();
    // Once as it is, once with every checksum really computed and verified.
    for offload in [true, false] {
        if !offload {
            scene.nodes[0].without_checksum_offload(&scene.client)?;
            scene.nodes[0].without_checksum_offload(&scene.servers[0])?;
        }
        for protocol in PROTOCOLS {
            for service in frontends(10, 80) {
                all_answer(&client, protocol, service, &scene.names())?;
            }
        }
        // Larger than the links: fragments follow their first.
        for service in frontends(10, 80) {
            for _ in 0..8 {
                let answer = client.ask("udp", &service.to_string(), &["--size", "4000"])?;
                assert_eq!(text(&answer, "reached"), "4000", "{answer}");
            }
        }
    }
    for pod in scene.servers.iter().chain([&scene.client]) {
        assert_eq!(pod.checksum_errors()?, 0, "{}", pod.host.name);
    }
    assert_eq!(agent.count("socket_connect")?, 0);
    assert!(agent.count("packet_request")? > 0);
    Ok(())
}

#[test]
fn clients_see_the_service_as_their_peer_wherever_that_is_remembered() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let agent = scene.agent(&[])?;
    let pins = Pins::at(&scene.nodes[0].bpffs);
    let mut places: Array<_, TcpPeer> = Map::Array(pins.map("TCP_PEERS")?).try_into()?;
    let taken = |places: &Array<_, TcpPeer>| -> Result<usize> {
        let cookies: Vec<u64> = places
            .iter()
            .map(|place| Ok(place?.cookie))
            .collect::<Result<_, MapError>>()?;
        Ok(cookies.iter().filter(|cookie| **cookie != 0).count())
    };
    let hosts = [&scene.client.host, &scene.nodes[0].host];
    let all_see_it = || -> Result<()> {
        for (host, service) in hosts
            .iter()
            .flat_map(|host| frontends(10, 80).map(|service| (host, service.to_string())))
        {
            let answer = host.ask("tcp", &service, &[])?;
            assert_eq!(text(&answer, "peer"), service, "{answer}");
        }
        Ok(())
    };
    all_see_it()?;
    eventually("places of sockets that are gone are free", || {
        anyhow::ensure!(taken(&places)? == 0);
        Ok(())
    })?;
    let service = frontends(10, 80)[0].to_string();
    let mut asking = scene.client.host.traffic(&["hold", &service])?;
    asking.line()?;
    assert_eq!(taken(&places)?, 1, "a connection has a place");
    drop(asking);

    let another = TcpPeer {
        cookie: u64::MAX,
        ..TcpPeer::default()
    };
    for index in 0..places.len() {
        places.set(index, another, 0)?;
    }
    all_see_it()?;
    assert_eq!(
        taken(&places)?,
        places.len() as usize,
        "nobody loses a place"
    );
    assert_eq!(agent.count("socket_peer_forgotten")?, 0);
    Ok(())
}

#[test]
fn a_pod_reaches_itself_through_its_own_service() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let _agent = scene.agent(&[])?;
    let by_packets = scene.client.host.without_socket_hooks();
    for protocol in PROTOCOLS {
        for service in frontends(11, 80) {
            let service = service.to_string();
            assert_eq!(
                scene.client.host.who_answers(protocol, &service)?,
                scene.client.host.name
            );
            let answer = by_packets.ask(protocol, &service, &[])?;
            assert_eq!(text(&answer, "server"), scene.client.host.name, "{answer}");
            assert_eq!(text(&answer, "peer"), service);
            // As behind kube-proxy, the pod is asked by its node.
            let source: SocketAddr = text(&answer, "source").parse()?;
            let node = &scene.nodes[0].host;
            assert!([node.ip4, node.ip6].contains(&source.ip()), "{answer}");
        }
    }
    Ok(())
}

/// A service of its own, which asks both servers in turn whom it is not bound to, with this timeout.
fn binding(scene: &Scene, timeout_secs: u32) -> Result<()> {
    let timeout = json!({ "clientIP": { "timeoutSeconds": timeout_secs } });
    let service = Service::new("bound", 15)
        .port("tcp", 80, "TCP")
        .annotation("penstock.io/algorithm", "round-robin")
        .set("sessionAffinity", "ClientIP")
        .set("sessionAffinityConfig", timeout);
    let mut items = vec![service.json()];
    let [first, second] = &scene.servers;
    items.extend(Slice::both("bound", 8080, &[first, second]));
    scene.nodes[0].manifest("bound.json", &list(&items))
}

#[test]
fn clients_with_affinity_keep_their_backend_on_either_path() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    // However long an agent takes to start.
    binding(&scene, 86_400)?;
    let mut agent = scene.agent(&[])?;
    let sockets = &scene.client.host;
    let packets = sockets.without_socket_hooks();
    let services = frontends(15, 80).map(|service| service.to_string());
    let bound: Vec<String> = (services.iter())
        .map(|service| sockets.who_answers("tcp", service))
        .collect::<Result<_>>()?;
    let all_are_bound = || -> Result<()> {
        for (service, bound) in services.iter().zip(&bound) {
            assert_eq!(&sockets.who_answers("tcp", service)?, bound);
            assert_eq!(&packets.who_answers("tcp", service)?, bound);
        }
        Ok(())
    };
    for _ in 0..10 {
        all_are_bound()?;
    }
    agent.kill();
    let is_back = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| -> Result<()> {
            while !is_back.load(Ordering::Relaxed) {
                all_are_bound()?;
            }
            Ok(())
        });
        let restarted = agent.restart();
        is_back.store(true, Ordering::Relaxed);
        asking.join().expect("nobody panics")?;
        restarted
    })?;
    all_are_bound()?;

    // Once the timeout has passed it is the other backend's turn: who is bound takes none.
    binding(&scene, 1)?;
    eventually("the timeout is another", || {
        let ports = agent.show("services")?;
        let mut ports = ports.as_array().expect("a list").iter();
        anyhow::ensure!(ports.all(|port| port["affinity_secs"] == 1));
        Ok(())
    })?;
    std::thread::sleep(Duration::from_millis(2_100));
    for (service, bound) in services.iter().zip(&bound) {
        assert_ne!(&sockets.who_answers("tcp", service)?, bound);
    }
    Ok(())
}

#[test]
fn sockets_of_excluded_cgroups_are_left_to_the_packet_path() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let agent = scene.agent(&["--exclude-cgroup", "pod1"])?;
    let service = frontends(10, 80)[0];
    eventually("the cgroup is excluded", || {
        let before = agent.count("packet_request")?;
        scene.client.host.who_answers("tcp", &service.to_string())?;
        anyhow::ensure!(
            agent.count("packet_request")? > before,
            "still at the socket"
        );
        Ok(())
    })?;
    let before = agent.count("socket_connect")?;
    all_answer(&scene.client.host, "tcp", service, &scene.names())?;
    assert_eq!(agent.count("socket_connect")?, before);
    all_answer(&scene.servers[0].host, "tcp", service, &scene.names()).ok();
    assert!(
        agent.count("socket_connect")? > before,
        "other pods' sockets are translated"
    );
    Ok(())
}

#[test]
fn pods_with_the_opt_out_label_are_left_to_the_packet_path() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": "sandbox", "namespace": "default", "uid": "0c1f-test",
            "labels": { "penstock.io/socket-hooks": "disabled" },
        },
        "spec": { "nodeName": scene.nodes[0].name() },
        "status": {
            "podIP": scene.client.host.ip4.to_string(),
            "podIPs": [
                { "ip": scene.client.host.ip4.to_string() },
                { "ip": scene.client.host.ip6.to_string() },
            ],
        },
    });
    let mut agent = scene.agent(&[])?;
    let service = frontends(10, 80)[0].to_string();
    let goes_by_packets = |agent: &Agent| -> Result<bool> {
        let before = agent.count("packet_request")?;
        scene.client.host.who_answers("tcp", &service)?;
        Ok(agent.count("packet_request")? > before)
    };
    assert!(!goes_by_packets(&agent)?, "no label yet");
    scene.nodes[0].manifest("pod.json", &pod.to_string())?;
    eventually("the label is heeded", || {
        anyhow::ensure!(goes_by_packets(&agent)?, "still at the socket");
        Ok(())
    })?;
    for service in frontends(10, 80) {
        for protocol in PROTOCOLS {
            all_answer(&scene.client.host, protocol, service, &scene.names())?;
        }
    }
    // An agent that begins anew and can't read who opted out believes the one before.
    let manifests = &scene.nodes[0].manifests;
    std::fs::write(manifests.join("pod.json"), "{")?;
    agent.kill();
    agent.begin_again()?;
    eventually("it has read what it can", || {
        anyhow::ensure!(agent.status()?["synced"] == true);
        Ok(())
    })?;
    for _ in 0..10 {
        assert!(
            goes_by_packets(&agent)?,
            "the opt-out outlives the agent that knew of it"
        );
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    std::fs::remove_file(manifests.join("pod.json"))?;
    eventually("the label's absence is heeded", || {
        anyhow::ensure!(!goes_by_packets(&agent)?, "still by packets");
        Ok(())
    })
}

#[test]
fn a_full_table_of_cgroups_has_room_for_others_once_some_are_gone() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let mut agent = scene.agent(&[])?;
    agent.kill();
    let pins = Pins::at(&scene.nodes[0].bpffs);
    let map = Map::HashMap(pins.map("EXCLUDED_CGROUPS")?);
    let mut table: HashMap<MapData, u64, u8> = map.try_into()?;
    let ids = u64::MAX - u64::from(limits::EXCLUDED_CGROUPS)..u64::MAX;
    for id in ids {
        table.insert(id, 1, 0)?;
    }
    let agent = scene.agent(&["--exclude-cgroup", "pod1"])?;
    let service = frontends(10, 80)[0].to_string();
    eventually("the cgroup is excluded", || {
        let before = agent.count("packet_request")?;
        scene.client.host.who_answers("tcp", &service)?;
        let after = agent.count("packet_request")?;
        anyhow::ensure!(after > before, "still at the socket: {}", agent.log());
        Ok(())
    })?;
    assert_eq!(table.keys().count(), 1);
    Ok(())
}

#[test]
fn a_port_that_reached_a_service_reaches_its_backend_too() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let _agent = scene.agent(&[])?;
    let client = scene.client.host.without_socket_hooks();
    for (port, service) in (40_000..).zip(frontends(10, 80)) {
        let port = port.to_string();
        let from = ["--port", &port];
        let answer = client.ask("tcp", &service.to_string(), &from)?;
        let server = scene
            .servers
            .iter()
            .find(|pod| pod.host.name == text(&answer, "server"));
        let server = &server.expect("a backend answers").host;
        let ip = if service.is_ipv4() {
            server.ip4
        } else {
            server.ip6
        };
        let direct = SocketAddr::new(ip, 8080).to_string();
        let answer = client.ask("tcp", &direct, &from)?;
        assert_eq!(text(&answer, "server"), server.name, "{direct}: {answer}");
    }
    Ok(())
}

/// What a load balancer's service is reached at, and its addresses.
const BALANCER: [&str; 2] = ["203.0.113.1", "2001:db8::1"];

/// A service whose balancer lets these clients in alone.
fn balanced(scene: &Scene, ranges: &[String]) -> Result<()> {
    let [a, b] = &scene.servers;
    let web = Service::new("web", 10)
        .port("tcp", 80, "TCP")
        .balanced(30_080, &BALANCER);
    let mut items = vec![web.set("loadBalancerSourceRanges", json!(ranges)).json()];
    items.extend(Slice::both("web", 8080, &[a, b]));
    scene.nodes[0].manifest("all.json", &list(&items))
}

#[test]
fn pods_without_hooks_are_known_at_balancers_too() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut scene = Scene::new()?;
    scene.nodes[0].pod_interfaces = "none*".to_owned();
    let client = &scene.client.host;
    balanced(
        &scene,
        &[format!("{}/32", client.ip4), format!("{}/128", client.ip6)],
    )?;
    let _agent = Agent::start(&scene.nodes[0], &Source::Manifests, &[])?;
    for ip in BALANCER {
        let to = SocketAddr::new(ip.parse()?, 80).to_string();
        eventually("a pod that may come is served at its sockets", || {
            client.who_answers("tcp", &to)
        })?;
        // A server's pod of this node is in no range.
        eventually("one that may not come is not", || {
            let refused = scene.servers[0].host.ask("tcp", &to, &[])?;
            anyhow::ensure!(text(&refused, "error") == "host unreachable", "{refused}");
            Ok(())
        })?;
        // A namespace behind no interface of the node's: what its sockets dial is its network's to bring
        // to the balancer, and this one has none.
        let traffic = binary("penstock-traffic")?;
        let traffic = traffic.to_str().expect("a path in UTF-8");
        let alone = client.run("unshare", &["--net", traffic, "ask", "tcp", &to])?;
        assert!(!alone.contains("host unreachable"), "refused: {alone}");
    }
    Ok(())
}

#[test]
fn an_address_that_a_pod_gets_late_is_its_own() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    let client = &scene.client.host;
    let late = format!("{}/128", client.ip6);
    client.run("ip", &["addr", "del", &late, "dev", "eth0"])?;
    balanced(&scene, std::slice::from_ref(&late))?;
    let agent = Agent::start(&scene.nodes[0], &Source::Manifests, &[])?;
    let addresses = || -> Result<usize> {
        let status = agent.status()?;
        let interfaces = status["interfaces"].as_array().cloned().unwrap_or_default();
        let own = interfaces
            .iter()
            .find(|interface| interface["name"] == scene.client.interface);
        Ok(own
            .and_then(|own| own["addresses"].as_array())
            .map_or(0, Vec::len))
    };
    eventually("its first address is known", || {
        anyhow::ensure!(addresses()? == 1);
        Ok(())
    })?;
    client.run("ip", &["addr", "add", &late, "dev", "eth0", "nodad"])?;
    eventually("its second one is", || {
        anyhow::ensure!(addresses()? == 2);
        Ok(())
    })
}
