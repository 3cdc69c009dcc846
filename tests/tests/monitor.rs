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
use penstock_testbed::{Host, Scene, eventually, frontends, require_kernel};
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
    let flows = "penstock_table_capacity{table=\"IPv4 flows\"}";
    assert_eq!(metric(&text, flows)?, 131_072.0);
    let syncs = "kubeproxy_sync_proxy_rules_duration_seconds_count";
    assert!(metric(&text, syncs)? >= 1.0, "{text}");
    let last = "kubeproxy_sync_proxy_rules_last_timestamp_seconds";
    assert!(metric(&text, last)? > 1.7e9, "{text}");
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
