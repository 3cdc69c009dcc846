//! Many pods that come and go beside others that stay.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use penstock_testbed::{Container, Node, Random, Testbed, eventually, require_kernel};
use serde_json::json;

use crate::{net::Net, traces::traces, undisturbed::undisturbed};

/// How many pods each node gets and loses.
const PODS: usize = 500;
/// How many plugins run at once on a node.
const AT_ONCE: usize = 4;

#[test]
fn a_thousand_pods_come_and_go_and_leave_nothing() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut testbed = Testbed::new()?;
    // An address that was given back rests for a while: there have to be enough of them.
    let nodes = vec![
        testbed
            .network_node()?
            .with_pod_ranges("10.244.16.0/20", "fd00:244:1::/64"),
        testbed
            .network_node()?
            .with_pod_ranges("10.244.32.0/20", "fd00:244:2::/64"),
    ];
    let mut net = Net::on(testbed, nodes, &["--log-level", "info"], &[0, 0, 1])?;
    let mut containers = Vec::new();
    for node in &net.nodes {
        let new = (0..AT_ONCE).map(|_| net.testbed.container_on(node));
        containers.push(new.collect::<Result<Vec<Container>>>()?);
    }
    let before = all_traces(&net)?;
    let started = Instant::now();
    let [client, near, far] = [0, 1, 2].map(|index: usize| &net.pods[index].host);
    let times = undisturbed(&[(client, near), (client, far), (far, client)], || {
        let nodes = net.nodes.iter().zip(&containers);
        let times: Result<Vec<_>> = std::thread::scope(|scope| {
            let running: Vec<_> = nodes
                .map(|(node, containers)| scope.spawn(|| come_and_go(&net, node, containers)))
                .collect();
            let times = running
                .into_iter()
                .map(|node| node.join().expect("no panic"));
            times.collect()
        });
        times.map(|times| times.concat())
    })?;
    eprintln!(
        "{} pods came and went in {:.1} s; to be added took {:?} at the median, {:?} at most",
        times.len(),
        started.elapsed().as_secs_f32(),
        quantile(&times, 0.5),
        quantile(&times, 1.0)
    );
    assert_eq!(times.len(), 2 * PODS);
    eventually("nothing is left of them", || {
        let after = all_traces(&net)?;
        let difference: Vec<_> = after.symmetric_difference(&before).collect();
        ensure!(difference.is_empty(), "{difference:?}");
        Ok(())
    })?;
    for agent in &net.agents {
        eventually("the agent knows", || {
            let pods = agent.show("pods")?;
            let count = pods.as_array().map_or(0, Vec::len);
            let expected = net
                .pods
                .iter()
                .filter(|pod| pod.node == agent.node().name());
            ensure!(count == expected.count(), "{pods}");
            Ok(())
        })?;
    }
    net.nothing_was_dropped()
}

/// How many calls of the plugin are killed.
const KILLS: u32 = 300;

#[test]
fn plugins_that_are_killed_leave_nothing_in_the_kernel() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut testbed = Testbed::new()?;
    let nodes = vec![
        testbed
            .network_node()?
            .with_pod_ranges("10.244.16.0/20", "fd00:244:1::/64"),
    ];
    let mut net = Net::on(testbed, nodes, &["--log-level", "info"], &[0, 0])?;
    let seed = u64::from(std::process::id()) << 20 | 1;
    eprintln!("seed {seed}");
    let mut random = Random(seed);
    let mut containers = Vec::new();
    for number in 0..AT_ONCE as u16 {
        let mut container = net.testbed.container_on(&net.nodes[0])?;
        let port = json!({ "hostPort": 9000 + number, "containerPort": 8080, "protocol": "tcp" });
        container.runtime = json!({ "portMappings": [port] });
        containers.push(container);
    }
    let before = all_traces(&net)?;
    let frontends = net.agents[0].show("services")?;
    let plugin = net.nodes[0].plugin()?;
    // How long a call takes that is not killed.
    let mut typical = Duration::MAX;
    for container in &containers {
        let started = Instant::now();
        plugin.add(container)?;
        typical = typical.min(started.elapsed());
        plugin.del(container)?;
    }
    let [client, server] = [0, 1].map(|index: usize| &net.pods[index].host);
    let ended = undisturbed(&[(client, server)], || {
        let mut ended = 0;
        for _ in 0..KILLS {
            let container = &containers[random.below(containers.len())];
            let command = if random.chance(60) { "ADD" } else { "DEL" };
            let after = Duration::from_micros(random.below(typical.as_micros() as usize) as u64);
            ended += u32::from(plugin.interrupt(command, container, after)?);
        }
        Ok(ended)
    })?;
    eprintln!("{typical:?} a call; {ended} of {KILLS} ended before they were killed");
    ensure!(ended < KILLS * 3 / 4, "too late to kill: {ended}");
    // Half of them are ended by their runtime, the others are found by GC.
    let (deleted, forgotten) = containers.split_at(AT_ONCE / 2);
    for container in deleted {
        plugin.del(container)?;
    }
    let known: Vec<Container> = net
        .pods
        .iter()
        .map(|pod| Container::named(&pod.host.name))
        .collect();
    plugin.gc(&known.iter().collect::<Vec<_>>())?;
    eventually("nothing is left of them", || {
        let after = all_traces(&net)?;
        let difference: Vec<_> = after.symmetric_difference(&before).collect();
        ensure!(difference.is_empty(), "{difference:?}");
        let after = net.agents[0].show("services")?;
        ensure!(after == frontends, "{after}");
        Ok(())
    })?;
    // And they can be had again.
    for container in forgotten {
        plugin.add(container)?;
        plugin.del(container)?;
    }
    net.nothing_was_dropped()
}

/// Adds, tries and deletes pods on a node; how long each took to be added.
fn come_and_go(net: &Net, node: &Node, containers: &[Container]) -> Result<Vec<Duration>> {
    let count = AtomicUsize::new(0);
    let plugin = node.plugin()?;
    let stays = &net.pods[2].host;
    let one_after_the_other = |slot: &Container| -> Result<Vec<Duration>> {
        let mut times = Vec::new();
        loop {
            let number = count.fetch_add(1, Ordering::Relaxed);
            if number >= PODS {
                return Ok(times);
            }
            let container = Container {
                id: format!("{}-{number}", slot.id),
                ..slot.clone()
            };
            let started = Instant::now();
            let result = plugin.add(&container)?;
            times.push(started.elapsed());
            let pod = net.testbed.host_in(&container, &result)?;
            // It is on the network from its first moment on.
            let to = std::net::SocketAddr::new(stays.ip6, 8080).to_string();
            let server = pod.who_answers("udp", &to);
            let server = server.with_context(|| format!("pod {number} of {}", node.name()))?;
            ensure!(server == stays.name, "{server}");
            plugin.del(&container)?;
        }
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = containers
            .iter()
            .map(|slot| scope.spawn(|| one_after_the_other(slot)))
            .collect();
        let times = running
            .into_iter()
            .map(|slot| slot.join().expect("no panic"));
        let times: Result<Vec<_>> = times.collect();
        Ok(times?.concat())
    })
}

/// What there is of pods on all nodes.
fn all_traces(net: &Net) -> Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    for node in &net.nodes {
        let traces = traces(node, &node.bpffs, &node.cni_state_dir())?;
        let name = node.name();
        all.extend(traces.into_iter().map(|trace| format!("{name}: {trace}")));
    }
    Ok(all)
}

fn quantile(times: &[Duration], share: f64) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let index = (share * (sorted.len() - 1) as f64) as usize;
    sorted[index]
}
