//! What Prometheus, load balancers and kubelet are told, at the ports that kube-proxy has.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

use anyhow::{Context, Result, ensure};
use penstock_agent::dataplane::pins::Pins;
use penstock_common::limits;
use penstock_testbed::{
    Agent, Host, Pod, Scene, Service, Slice, Source, Testbed, eventually, frontends, list,
    patiently, require_kernel,
};
use serde_json::{Value, json};

const METRICS: &str = "http://127.0.0.1:10249/metrics";

/// Status code and body.
fn get(from: &Host, url: &str) -> Result<(u32, String)> {
    let arguments = [
        "--silent",
        "--write-out",
        "\n%{http_code}",
        "--max-time",
        "5",
        url,
    ];
    let text = from.run("curl", &arguments)?;
    let (body, code) = text.trim_end().rsplit_once('\n').context("a code")?;
    Ok((code.parse()?, body.to_owned()))
}

/// A metric's value.
fn metric(text: &str, name: &str) -> Result<f64> {
    let mut lines = text.lines();
    let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(value
        .with_context(|| format!("no {name} in {text}"))?
        .parse()?)
}

/// Every table that can be full, with what it holds at most, of flows so many.
fn tables(flows: u32) -> Vec<(String, u32)> {
    let families = [
        ("frontends", limits::FRONTENDS),
        ("addresses of services", limits::ADDRESSES),
        ("backends", limits::BACKENDS),
        ("ranges of clients", limits::SOURCE_RANGES),
        ("backends' loads", limits::LOADS),
        ("backends' counts", limits::BACKEND_COUNTS),
        ("flows", flows),
        ("clients with affinity", limits::AFFINITY),
        ("addresses of pods", limits::ENDPOINTS),
        ("ranges of nodes", limits::ROUTES),
    ];
    let both = [
        ("slots", limits::SLOTS),
        ("connected UDP sockets", limits::CONNECTED_UDP),
        ("unconnected UDP sockets' services", limits::DATAGRAMS),
        ("ends of tunnels", limits::VTEPS),
        ("network namespaces", limits::NETNS),
        ("cgroups that are left alone", limits::EXCLUDED_CGROUPS),
        ("interfaces to the outside", limits::UPLINKS),
        ("interfaces with XDP", limits::UPLINKS),
    ];
    let of = |family| families.map(|(table, capacity)| (format!("{family} {table}"), capacity));
    let both = both.map(|(table, capacity)| (table.to_owned(), capacity));
    [of("IPv4").to_vec(), of("IPv6").to_vec(), both.to_vec()].concat()
}

#[test]
fn tables_say_what_they_hold() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut testbed = Testbed::new()?;
    let nodes = [testbed.network_node()?, testbed.network_node()?];
    let node = &nodes[0];
    node.knows(&[node, &nodes[1]])?;
    let balanced = Service::new("web", 10)
        .port("tcp", 80, "TCP")
        .balanced(30_080, &["192.0.2.10", "2001:db8::10"])
        .set(
            "loadBalancerSourceRanges",
            json!(["198.51.100.0/24", "203.0.113.7/32", "2001:db8:1::/48"]),
        );
    let loaded = Service::new("loaded", 11)
        .port("tcp", 80, "TCP")
        .annotation("penstock.io/algorithm", "least-connections");
    let agent = Agent::start_network(node, &Source::Manifests, &[])?;
    let pods = [testbed.network_pod(node)?, testbed.network_pod(node)?];
    let pods: Vec<&Pod> = pods.iter().collect();
    let mut items = vec![balanced.json(), loaded.json()];
    for name in ["web", "loaded"] {
        items.extend(Slice::both(name, 8080, &pods));
    }
    node.manifest("services.json", &list(&items))?;
    // Tables are counted every ten seconds.
    let expected = [
        ("IPv4 ranges of clients", 2),
        ("IPv6 ranges of clients", 1),
        ("IPv4 addresses of pods", 2),
        ("IPv6 addresses of pods", 2),
        // Its own, and the other node's.
        ("IPv4 ranges of nodes", 2),
        ("IPv6 ranges of nodes", 2),
        ("IPv4 backends' loads", 2),
        ("IPv6 backends' loads", 2),
        // One a family.
        ("ends of tunnels", 2),
        ("interfaces with XDP", 0),
        ("cgroups that are left alone", 0),
    ];
    patiently("the tables say so", || {
        let (_, text) = get(&node.host, METRICS)?;
        for (table, used) in expected {
            let name = format!("penstock_table_entries{{table=\"{table}\"}}");
            let found = metric(&text, &name)?;
            ensure!(found == f64::from(used), "{table}: {found}");
        }
        for table in ["network namespaces", "interfaces to the outside"] {
            let name = format!("penstock_table_entries{{table=\"{table}\"}}");
            ensure!(metric(&text, &name)? >= 1.0, "{table}");
        }
        Ok(())
    })?;
    drop(agent);
    Ok(())
}

#[test]
fn metrics_and_health_are_where_kube_proxys_are() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let node = &scene.nodes[0];
    // Somebody else has a port: that is told, and served is all the same.
    let other = node.host.serve(10_249)?;
    let agent = scene.agent(&[])?;
    let service = frontends(10, 80)[0].to_string();
    scene.client.host.who_answers("tcp", &service)?;
    let problem = "serving metrics at 127.0.0.1:10249: ";
    eventually("the port in use is a problem", || {
        let problems = agent.status()?["problems"].to_string();
        ensure!(problems.contains(problem), "{problems}");
        ensure!(agent.log().contains(problem), "it is in the log");
        Ok(())
    })?;
    drop(other);
    let text = eventually("metrics are served once the port is free", || {
        let (code, text) = get(&node.host, METRICS)?;
        ensure!(code == 200, "{code}");
        Ok(text)
    })?;
    eventually("the problem is over", || {
        ensure!(agent.status()?["problems"] == json!([]));
        Ok(())
    })?;
    assert!(text.ends_with("# EOF\n"), "{text}");
    let event = "penstock_events_total{event=\"socket_connect\"}";
    assert_eq!(metric(&text, event)?, agent.count("socket_connect")? as f64);
    let drops = "penstock_drops_total{reason=\"no_endpoints\"}";
    assert_eq!(metric(&text, drops)?, 0.0);
    assert_eq!(metric(&text, "penstock_services")?, 5.0);
    assert_eq!(metric(&text, "penstock_synced")?, 1.0);
    let pins = Pins::at(&node.bpffs);
    for (table, capacity) in tables(pins.flows()?.expect("a table")) {
        let name = format!("penstock_table_capacity{{table=\"{table}\"}}");
        assert_eq!(metric(&text, &name)?, f64::from(capacity), "{table}");
    }
    // The service "local" has endpoints on the other node only, by TCP and UDP.
    for (family, policy, expected) in [
        ("IPv4", "internal", 2.0),
        ("IPv6", "internal", 2.0),
        ("IPv4", "external", 0.0),
    ] {
        let labels = format!("ip_family=\"{family}\",traffic_policy=\"{policy}\"");
        let name = format!("kubeproxy_sync_proxy_rules_no_local_endpoints_total{{{labels}}}");
        assert_eq!(metric(&text, &name)?, expected, "{name}");
    }
    let used = metric(&text, "process_resident_memory_bytes")?;
    assert!((1e6..1e10).contains(&used), "{used}");
    for family in ["IPv4", "IPv6"] {
        let of = |name: &str| {
            let name = format!("kubeproxy_sync_proxy_rules_{name}{{ip_family=\"{family}\"}}");
            metric(&text, &name)
        };
        assert!(of("duration_seconds_count")? >= 1.0, "{text}");
        let last = of("last_timestamp_seconds")?;
        assert!(last > 1.7e9, "{text}");
        assert!(of("last_queued_timestamp_seconds")? <= last, "{text}");
    }
    assert_eq!(get(&node.host, "http://127.0.0.1:10249/none")?.0, 404);

    let url = |path: &str| format!("http://{}:10256/{path}", node.host.ip4);
    let says = |path: &str, expected: u32| -> Result<Value> {
        eventually("the check says so", || {
            let (code, body) = get(&scene.nodes[1].host, &url(path))?;
            ensure!(code == expected, "{path}: {code} {body}");
            Ok(serde_json::from_str(&body)?)
        })
    };
    assert_eq!(says("healthz", 200)?["nodeEligible"], true);
    // 0.0.0.0 is every address, as with kube-proxy.
    let v6 = format!("http://[{}]:10256/healthz", node.host.ip6);
    assert_eq!(get(&scene.nodes[1].host, &v6)?.0, 200);
    let taint = json!({ "key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule" });
    let leaving = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": node.name() },
        "spec": { "taints": [taint] },
    });
    node.manifest("node.json", &leaving.to_string())?;
    assert_eq!(says("healthz", 503)?["nodeEligible"], false);
    assert_eq!(says("livez", 200)?.get("nodeEligible"), None);
    assert_eq!(get(&scene.nodes[1].host, &url("metrics"))?.0, 404);
    let (_, text) = get(&node.host, METRICS)?;
    assert!(metric(&text, "kubeproxy_proxy_healthz_total{code=\"503\"}")? >= 1.0);
    assert!(metric(&text, "kubeproxy_proxy_livez_total{code=\"200\"}")? >= 1.0);
    Ok(())
}

#[test]
fn kube_proxys_configuration_file_says_what_no_flag_does() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let node = &scene.nodes[0];
    let config = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "clusterCIDR": "10.244.0.0/16",
        "healthzBindAddress": "0.0.0.0:10300",
        "metricsBindAddress": "127.0.0.1:10301",
        "conntrack": { "tcpEstablishedTimeout": "2h0m0s" },
    });
    let file = node.manifests.with_file_name("kube-proxy.conf");
    std::fs::write(&file, config.to_string())?;
    let file = file.to_str().context("a folder's name is no text")?;
    let flags = [
        "--config",
        file,
        "--metrics-bind-address",
        "127.0.0.1:10302",
    ];
    let agent = scene.agent(&flags)?;
    let url = format!("http://{}:10300/healthz", node.host.ip4);
    eventually("health is where the file says", || {
        ensure!(get(&scene.nodes[1].host, &url)?.0 == 200);
        Ok(())
    })?;
    let metrics = |port: u16| get(&node.host, &format!("http://127.0.0.1:{port}/metrics"));
    eventually("metrics are where the flag says", || {
        ensure!(metrics(10_302)?.0 == 200);
        Ok(())
    })?;
    assert!(metrics(10_301).is_err());
    assert_eq!(agent.status()?["lifetimes"]["tcp_established_secs"], 7_200);
    let log = agent.log();
    assert!(
        log.contains("what has no effect here: clusterCIDR, mode iptables"),
        "{log}"
    );
    Ok(())
}

#[test]
fn a_change_of_endpoints_is_timed_from_what_made_it() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let node = &scene.nodes[0];
    let agent = scene.agent(&[])?;
    let web = Service::new("timed", 20).port("tcp", 80, "TCP");
    // One object, as an API server tells of it, and how many changes of each kind there were.
    let write = |when: &str, pods: &[&Pod]| -> Result<[f64; 2]> {
        let slice = Slice::new("timed", true).port("tcp", 8080, "TCP");
        let slice = pods.iter().fold(slice, |slice, pod| slice.pod(pod));
        let trigger = "endpoints.kubernetes.io/last-change-trigger-time";
        let items = [web.json(), slice.annotation(trigger, when).json()];
        node.manifest("timed.json", &list(&items))?;
        eventually("it is served", || {
            let ports = agent.show("services")?;
            let mut ports = ports.as_array().context("a list")?.iter();
            let port = ports.find(|port| port["service"] == "default/timed");
            let backends = port.context("the service")?["backends"].as_array();
            ensure!(backends.context("backends")?.len() == pods.len());
            Ok(())
        })?;
        let (_, text) = get(&node.host, METRICS)?;
        let changes = ["service", "endpoint"].map(|kind| {
            let pending = format!("kubeproxy_sync_proxy_rules_{kind}_changes_pending");
            assert_eq!(metric(&text, &pending).expect("a number"), 0.0);
            let seen = format!("kubeproxy_sync_proxy_rules_{kind}_changes_total");
            metric(&text, &seen).expect("a number")
        });
        Ok(changes)
    };
    let timed = |end: &str| -> Result<f64> {
        let (_, text) = get(&node.host, METRICS)?;
        let name = "kubeproxy_network_programming_duration_seconds";
        let name = format!("{name}_{end}{{ip_family=\"IPv4\"}}");
        Ok(metric(&text, &name).unwrap_or_default())
    };
    let [a, b] = &scene.servers;
    // What was before the agent does not say how long it takes.
    let first = write("1970-01-01T00:00:01Z", &[a])?;
    assert_eq!(timed("count")?, 0.0);
    let now = node
        .host
        .run("date", &["--utc", "+%Y-%m-%dT%H:%M:%S.%NZ"])?;
    let second = write(now.trim(), &[a, b])?;
    assert_eq!(timed("count")?, 1.0);
    let took = timed("sum")?;
    assert!((0.0..5.0).contains(&took) && took > 0.0, "{took}");
    assert!(second[1] > first[1], "{first:?}, then {second:?}");
    Ok(())
}
