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
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::Result;
use penstock_testbed::{
    Agent, ApiServer, Host, Node, Pod, Process, Service, Slice, Source, Testbed, eventually,
    require_api_server, require_kernel,
};
use serde_json::{Value, json};

const PROTOCOLS: [&str; 3] = ["tcp", "udp", "udp-connected"];

/// Two nodes: a client and a server on the first, a server on the second, all serving 8080.
struct World {
    testbed: Testbed,
    nodes: [Node; 2],
    client: Pod,
    servers: [Pod; 2],
    _processes: Vec<Process>,
}

fn world() -> Result<World> {
    let mut testbed = Testbed::new()?;
    let nodes = [testbed.node()?, testbed.node()?];
    let client = testbed.pod(&nodes[0])?;
    let servers = [testbed.pod(&nodes[0])?, testbed.pod(&nodes[1])?];
    let mut processes = vec![client.host.serve(8080)?];
    for server in &servers {
        processes.push(server.host.serve(8080)?);
    }
    Ok(World {
        testbed,
        nodes,
        client,
        servers,
        _processes: processes,
    })
}

impl World {
    /// Writes the services that most tests use, to the first node.
    fn manifests(&self) -> Result<()> {
        let [a, b] = &self.servers;
        let web = Service::new("web", 10)
            .port("tcp", 80, "TCP")
            .port("udp", 80, "UDP");
        let own = Service::new("own", 11)
            .port("tcp", 80, "TCP")
            .port("udp", 80, "UDP");
        let empty = Service::new("empty", 12)
            .port("tcp", 80, "TCP")
            .port("udp", 80, "UDP");
        let local = Service::new("local", 13)
            .port("tcp", 80, "TCP")
            .port("udp", 80, "UDP")
            .set("internalTrafficPolicy", "Local");
        let sticky = Service::new("sticky", 14)
            .port("tcp", 80, "TCP")
            .set("sessionAffinity", "ClientIP")
            .set(
                "sessionAffinityConfig",
                json!({ "clientIP": { "timeoutSeconds": 2 } }),
            );
        let mut items = vec![
            web.json(),
            own.json(),
            empty.json(),
            local.json(),
            sticky.json(),
        ];
        items.extend(Slice::both("web", 8080, &[a, b]));
        items.extend(Slice::both("own", 8080, &[&self.client]));
        items.extend(Slice::both("local", 8080, &[b]));
        items.extend(Slice::both("sticky", 8080, &[a, b]));
        self.nodes[0].manifest("all.json", &list(&items))
    }

    fn agent(&self, extra: &[&str]) -> Result<Agent> {
        let agent = Agent::start(&self.nodes[0], &Source::Manifests, extra)?;
        agent.wait_for_pods(2)?;
        Ok(agent)
    }

    fn names(&self) -> BTreeSet<String> {
        self.servers
            .iter()
            .map(|pod| pod.host.name.clone())
            .collect()
    }
}

fn list(items: &[Value]) -> String {
    json!({ "apiVersion": "v1", "kind": "List", "items": items }).to_string()
}

/// A service's two addresses.
fn frontends(number: u8, port: u16) -> [SocketAddr; 2] {
    let ips = [format!("10.96.0.{number}"), format!("fd00:96::{number:x}")];
    ips.map(|ip| SocketAddr::new(ip.parse::<IpAddr>().expect("an address"), port))
}

fn text<'a>(answer: &'a Value, field: &str) -> &'a str {
    answer
        .get(field)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// Asks a service until every one of `expected` has answered, checking each answer.
fn all_answer(
    from: &Host,
    protocol: &str,
    service: SocketAddr,
    expected: &BTreeSet<String>,
) -> Result<()> {
    let mut seen = BTreeSet::new();
    let own = if service.is_ipv4() {
        from.ip4
    } else {
        from.ip6
    };
    for _ in 0..60 {
        let answer = from.ask(protocol, &service.to_string(), &[])?;
        let server = text(&answer, "server").to_owned();
        anyhow::ensure!(
            expected.contains(&server),
            "{protocol} {service} from {}: {answer}",
            from.name
        );
        // The application sees the service, the backend sees the client.
        assert_eq!(text(&answer, "peer"), service.to_string(), "{answer}");
        let source: SocketAddr = text(&answer, "source").parse()?;
        assert_eq!(source.ip(), own, "{answer}");
        seen.insert(server);
        if &seen == expected {
            return Ok(());
        }
    }
    anyhow::bail!("only {seen:?} of {expected:?} answered {protocol} {service}");
}

#[test]
fn pods_and_host_processes_reach_services_at_the_socket() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let world = world()?;
    world.manifests()?;
    let agent = world.agent(&[])?;
    for protocol in PROTOCOLS {
        for service in frontends(10, 80) {
            all_answer(&world.client.host, protocol, service, &world.names())?;
            all_answer(&world.nodes[0].host, protocol, service, &world.names())?;
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
    let world = world()?;
    world.manifests()?;
    let agent = world.agent(&[])?;
    let client = world.client.host.without_socket_hooks();
    // Once as it is, once with every checksum really computed and verified.
    for offload in [true, false] {
        if !offload {
            world.nodes[0].without_checksum_offload(&world.client)?;
            world.nodes[0].without_checksum_offload(&world.servers[0])?;
        }
        for protocol in PROTOCOLS {
            for service in frontends(10, 80) {
                all_answer(&client, protocol, service, &world.names())?;
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
    for pod in world.servers.iter().chain([&world.client]) {
        assert_eq!(pod.checksum_errors()?, 0, "{}", pod.host.name);
    }
    assert_eq!(agent.count("socket_connect")?, 0);
    assert!(agent.count("packet_request")? > 0);
    Ok(())
}

#[test]
fn a_pod_reaches_itself_through_its_own_service() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let world = world()?;
    world.manifests()?;
    let _agent = world.agent(&[])?;
    let by_packets = world.client.host.without_socket_hooks();
    for protocol in PROTOCOLS {
        for service in frontends(11, 80) {
            let service = service.to_string();
            assert_eq!(
                world.client.host.who_answers(protocol, &service)?,
                world.client.host.name
            );
            let answer = by_packets.ask(protocol, &service, &[])?;
            assert_eq!(text(&answer, "server"), world.client.host.name, "{answer}");
            assert_eq!(text(&answer, "peer"), service);
            // As behind kube-proxy, the pod is asked by its node.
            let source: SocketAddr = text(&answer, "source").parse()?;
            let node = &world.nodes[0].host;
            assert!([node.ip4, node.ip6].contains(&source.ip()), "{answer}");
        }
    }
    Ok(())
}

#[test]
fn what_nobody_serves_is_refused_at_once_or_dropped() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let world = world()?;
    world.manifests()?;
    let agent = world.agent(&[])?;
    let pod = &world.client.host;
    let hosts = [
        pod.clone(),
        pod.without_socket_hooks(),
        world.nodes[0].host.clone(),
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
                    assert!(
                        started.elapsed() < Duration::from_secs(1),
                        "{protocol} {service}"
                    );
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
    let world = world()?;
    // Nobody listens on 9999: the backend's kernel sends "port unreachable".
    let closed = Service::new("closed", 20)
        .port("udp", 80, "UDP")
        .port("tcp", 80, "TCP");
    let mut items = vec![closed.json()];
    items.extend(Slice::both("closed", 9999, &[&world.servers[1]]));
    world.nodes[0].manifest("closed.json", &list(&items))?;
    let agent = world.agent(&[])?;
    let client = world.client.host.without_socket_hooks();
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
fn clients_with_affinity_keep_their_backend_on_either_path() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let world = world()?;
    world.manifests()?;
    let mut agent = world.agent(&[])?;
    let sockets = &world.client.host;
    let packets = sockets.without_socket_hooks();
    for service in frontends(14, 80) {
        let service = service.to_string();
        let bound = sockets.who_answers("tcp", &service)?;
        for _ in 0..10 {
            assert_eq!(sockets.who_answers("tcp", &service)?, bound);
            assert_eq!(packets.who_answers("tcp", &service)?, bound);
        }
        agent.kill();
        agent.restart()?;
        assert_eq!(
            sockets.who_answers("tcp", &service)?,
            bound,
            "after a restart"
        );
        // Once the timeout has passed, either backend may answer again.
        let is_elsewhere = (0..14).any(|_| {
            std::thread::sleep(Duration::from_millis(2_100));
            sockets
                .who_answers("tcp", &service)
                .is_ok_and(|name| name != bound)
        });
        assert!(is_elsewhere, "still bound to {bound} after its timeout");
    }
    Ok(())
}

#[test]
fn udp_leaves_a_backend_that_is_removed() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let world = world()?;
    let [a, b] = &world.servers;
    let web = Service::new("web", 10).port("udp", 80, "UDP").json();
    let with = |pods: &[&Pod]| {
        let mut items = vec![web.clone()];
        items.extend(Slice::both("web", 8080, pods));
        world.nodes[0].manifest("web.json", &list(&items))
    };
    with(&[a])?;
    let agent = world.agent(&[])?;
    let hosts = [
        world.client.host.clone(),
        world.client.host.without_socket_hooks(),
        world.nodes[0].host.clone(),
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
                        changed.elapsed() < Duration::from_secs(1),
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
fn sockets_of_excluded_cgroups_are_left_to_the_packet_path() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let world = world()?;
    world.manifests()?;
    let agent = world.agent(&["--exclude-cgroup", "pod1"])?;
    let service = frontends(10, 80)[0];
    eventually("the cgroup is excluded", || {
        let before = agent.count("packet_request")?;
        world.client.host.who_answers("tcp", &service.to_string())?;
        anyhow::ensure!(
            agent.count("packet_request")? > before,
            "still at the socket"
        );
        Ok(())
    })?;
    let before = agent.count("socket_connect")?;
    all_answer(&world.client.host, "tcp", service, &world.names())?;
    assert_eq!(agent.count("socket_connect")?, before);
    all_answer(&world.servers[0].host, "tcp", service, &world.names()).ok();
    assert!(
        agent.count("socket_connect")? > before,
        "other pods' sockets are translated"
    );
    Ok(())
}

#[test]
fn killing_the_agent_disturbs_nobody() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut world = world()?;
    world.manifests()?;
    let by_packets = world
        .testbed
        .pod(&world.nodes[0])?
        .host
        .without_socket_hooks();
    let mut agent = Agent::start(&world.nodes[0], &Source::Manifests, &[])?;
    agent.wait_for_pods(3)?;
    let [v4, v6] = frontends(10, 80).map(|service| service.to_string());
    let load = ["load", &v4, &v6, "--for-ms", "1000", "--tasks", "2"];
    let before = agent.status()?;
    let is_over = AtomicBool::new(false);
    let hosts = [world.client.host.clone(), by_packets];
    std::thread::scope(|scope| -> Result<()> {
        let loads: Vec<_> = hosts
            .iter()
            .map(|host| {
                scope.spawn(|| -> Result<()> {
                    while !is_over.load(Ordering::Relaxed) {
                        let report: Value = serde_json::from_str(&host.traffic(&load)?.line()?)?;
                        anyhow::ensure!(report["failed"] == json!([]), "{report}");
                        anyhow::ensure!(report["servers"] == json!(world.names()), "{report}");
                    }
                    Ok(())
                })
            })
            .collect();
        let killed = (0..50).try_for_each(|_| {
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

#[test]
fn a_real_api_server_drives_the_kernel_and_may_restart() -> Result<()> {
    let Some(assets) = require_api_server() else {
        return Ok(());
    };
    let world = world()?;
    let mut api = ApiServer::start(&assets, world.testbed.folder())?;
    let [a, b] = &world.servers;
    api.apply(
        &Service::new("web", 10)
            .port("tcp", 80, "TCP")
            .port("udp", 80, "UDP")
            .json(),
    )?;
    for slice in Slice::both("web", 8080, &[a]) {
        api.apply(&slice)?;
    }
    // The API server listens on loopback, so the agent stays in that namespace; the socket hooks
    // go by cgroup and serve the pods' sockets all the same.
    let agent = Agent::start_here(&world.nodes[0], &Source::Kubeconfig(api.kubeconfig()))?;
    let pod = &world.client.host;
    for service in frontends(10, 80) {
        assert_eq!(pod.who_answers("tcp", &service.to_string())?, a.host.name);
        assert_eq!(pod.who_answers("udp", &service.to_string())?, a.host.name);
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

#[test]
fn garbage_is_reported_and_changes_nothing_else() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let world = world()?;
    world.manifests()?;
    let agent = world.agent(&[])?;
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
        world.nodes[0].manifest(file, text)?;
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
        all_answer(&world.client.host, "tcp", service, &world.names())?;
    }
    Ok(())
}
