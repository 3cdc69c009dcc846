//! Connect, ask, close: through a ClusterIP beside the pod's own address, in turns.
//!
//! The client stays on processor 0, the server on processor 1; nothing else of ours has work.

use anyhow::{Context, Result};
use penstock_testbed::{Agent, Host, Service, Slice, Source, Testbed};
use serde_json::{Value, json};

use crate::{cluster, figures};

/// Connections in a turn.
const CONNECTIONS: usize = 2_000;

/// Measures with each number of services.
pub fn measure(services: &[usize], rounds: usize) -> Result<Value> {
    let mut results = Vec::new();
    for count in services {
        results.push(one(*count, rounds)?);
    }
    Ok(results.into())
}

fn one(services: usize, rounds: usize) -> Result<Value> {
    let mut testbed = Testbed::new()?;
    let node = testbed.node()?;
    let client = testbed.pod(&node)?;
    let server = testbed.pod(&node)?;
    // Both targets share a destination, whose closed connections would use up the client's ports.
    let reuse = [
        "-q",
        "net.ipv4.tcp_tw_reuse=1",
        "net.ipv4.ip_local_port_range=1024 65535",
    ];
    client.host.run("sysctl", &reuse)?;
    let _serving = server.host.serve_on(8080, 1)?;
    // The one that is measured, and the others.
    let mut items = vec![Service::new("measured", 10).port("tcp", 80, "TCP").json()];
    items.extend(Slice::both("measured", 8080, &[&server]));
    cluster::write(&node.manifests, services - 1, 1)?;
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": items });
    node.manifest("measured.json", &list.to_string())?;
    let agent = Agent::start(&node, &Source::Manifests, &[])?;
    agent.wait_for_pods(2)?;

    let direct = format!("{}:8080", server.host.ip4);
    let through = "10.96.0.10:80";
    let before = agent.count("socket_connect")?;
    let (mut direct_medians, mut through_medians) = (Vec::new(), Vec::new());
    // To warm up.
    times(&client.host, &direct, through)?;
    for _ in 0..rounds {
        let [to_pod, to_service] = times(&client.host, &direct, through)?;
        direct_medians.push(figures::percentile(&to_pod, 50));
        through_medians.push(figures::percentile(&to_service, 50));
    }
    let translated = agent.count("socket_connect")? - before;
    let expected = ((rounds + 1) * CONNECTIONS) as u64;
    anyhow::ensure!(
        translated == expected,
        "{translated} of {expected} connections were translated"
    );
    let ratios: Vec<f64> = through_medians
        .iter()
        .zip(&direct_medians)
        .map(|(through, direct)| *through as f64 / *direct as f64)
        .collect();
    println!(
        "connect, ask, close with {services} services: p50 of ClusterIP / p50 of pod address = {}, \
         {rounds} rounds of {CONNECTIONS}",
        figures::Median::of(&ratios).shown()
    );
    Ok(json!({
        "services": services,
        "pod_address_p50_nanos": direct_medians,
        "cluster_ip_p50_nanos": through_medians,
        "ratios": ratios,
    }))
}

/// The times of both targets, which take turns.
fn times(from: &Host, direct: &str, through: &str) -> Result<[Vec<u64>; 2]> {
    let count = CONNECTIONS.to_string();
    let line = from
        .traffic(&["--cpu", "0", "times", direct, through, "--count", &count])?
        .line()?;
    serde_json::from_str(&line).with_context(|| format!("{line:?} is no list of times"))
}
