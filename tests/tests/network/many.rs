//! Many plugins at once with a real agent.

use std::{collections::HashSet, net::SocketAddr};

use anyhow::{Context, Result, ensure};
use penstock_testbed::{Container, Process, eventually, require_kernel};
use serde_json::{Value, json};

use crate::{net::Net, remains::remains};

/// How many.
const AT_ONCE: u16 = 32;
/// How often.
const ROUNDS: usize = 3;
/// The node's port of the first of them.
const FIRST: u16 = 9_000;

#[test]
fn thirty_two_at_once_have_all_that_is_theirs_and_leave_nothing() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    // So that flows end soon after their pods.
    let options = [
        "--conntrack-udp-timeout=5s",
        "--conntrack-udp-timeout-stream=5s",
    ];
    let mut net = Net::new(&options)?;
    let outside = net.testbed.client()?;
    let node = net.nodes[0].host.clone();
    let mut containers = Vec::new();
    for number in FIRST..FIRST + AT_ONCE {
        let mut container = net.testbed.container_on(&net.nodes[0])?;
        let port = json!({ "hostPort": number, "containerPort": 8080, "protocol": "udp" });
        container.runtime = json!({ "portMappings": [port] });
        containers.push(container);
    }
    let before = remains(&net.nodes, &net.agents)?;
    let plugin = net.nodes[0].plugin()?;
    for round in 0..ROUNDS {
        let results = at_once(&containers, |container| plugin.add(container))?;
        let addresses: HashSet<String> = results.iter().flat_map(addresses).collect();
        assert_eq!(addresses.len(), 2 * containers.len());
        let pods = net.agents[0].show("pods")?;
        let pods = pods.as_array().context("no list")?;
        assert_eq!(pods.len(), containers.len() + 2);
        assert!(pods.iter().all(|pod| pod["wired"] == true), "{pods:?}");
        for (container, result) in containers.iter().zip(&results) {
            plugin.check(container, result)?;
        }
        if round == 0 {
            let mut servers: Vec<Process> = Vec::new();
            for ((container, result), number) in containers.iter().zip(&results).zip(FIRST..) {
                let pod = net.testbed.host_in(container, result)?;
                servers.push(pod.serve(8080)?);
                let at = SocketAddr::new(node.ip4, number).to_string();
                assert_eq!(outside.who_answers("udp", &at)?, pod.name);
                let flows = net.agents[0].show("conntrack")?.to_string();
                assert!(flows.contains(&at), "{flows}");
            }
        }
        at_once(&containers, |container| plugin.del(container))?;
    }
    eventually("nothing is left of them", || {
        let after = remains(&net.nodes, &net.agents)?;
        let difference: Vec<_> = after.symmetric_difference(&before).collect();
        ensure!(difference.is_empty(), "{difference:?}");
        Ok(())
    })
}

/// Does something for all of them, for each on a thread of its own.
fn at_once<T: Send>(
    containers: &[Container],
    what: impl Fn(&Container) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let what = &what;
    std::thread::scope(|scope| {
        let begin = |container| scope.spawn(move || what(container));
        let running: Vec<_> = containers.iter().map(begin).collect();
        let done = running
            .into_iter()
            .map(|thread| thread.join().expect("no panic"));
        done.collect()
    })
}

fn addresses(result: &Value) -> Vec<String> {
    let ips = result["ips"].as_array().into_iter().flatten();
    ips.map(|ip| ip["address"].to_string()).collect()
}
