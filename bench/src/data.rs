//! Connect, ask, close: through a ClusterIP beside the pod's own address, in turns.

use anyhow::{Context, Result};
use penstock_testbed::{Agent, Host, Service, Slice, Source, Testbed};
use serde_json::{Value, json};

use crate::{cluster, figures};

/// Connections in a turn.
const CONNECTIONS: usize = 1_000;

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
    let _serving = server.host.serve(8080)?;
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
    times(&client.host, &direct)?;
    times(&client.host, through)?;
    for round in 0..rounds {
        // A B, then B A: neither always goes second.
        let order = if round % 2 == 0 {
            [true, false]
        } else {
            [false, true]
        };
        for is_direct in order {
            let to = if is_direct { direct.as_str() } else { through };
            let median = figures::percentile(&times(&client.host, to)?, 50);
            if is_direct {
                &mut direct_medians
            } else {
                &mut through_medians
            }
            .push(median);
        }
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
    let (median, least, greatest) = figures::spread(&ratios);
    println!(
        "connect, ask, close with {services} services: ClusterIP / pod address p50 = {median:.3} \
         ({least:.3} to {greatest:.3} in {rounds} rounds of {CONNECTIONS})"
    );
    Ok(json!({
        "services": services,
        "pod_address_p50_nanos": direct_medians,
        "cluster_ip_p50_nanos": through_medians,
        "ratios": ratios,
    }))
}

fn times(from: &Host, to: &str) -> Result<Vec<u64>> {
    let line = from
        .traffic(&["times", to, "--count", &CONNECTIONS.to_string()])?
        .line()?;
    serde_json::from_str(&line).with_context(|| format!("{line:?} is no list of times"))
}
