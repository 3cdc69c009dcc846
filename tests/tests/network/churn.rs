//! Many pods that come and go beside others that stay.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use penstock_testbed::{Container, Node, Plugin, Random, Testbed, eventually, require_kernel};
use serde_json::json;

use crate::{net::Net, remains::remains, undisturbed::undisturbed};

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
    let before = remains(&net.nodes, &net.agents)?;
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
        let after = remains(&net.nodes, &net.agents)?;
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
const KILLS: u32 = 1_000;

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
    let mut containers = Vec::new();
    for number in 0..AT_ONCE as u16 {
        let mut container = net.testbed.container_on(&net.nodes[0])?;
        let port = json!({ "hostPort": 9000 + number, "containerPort": 8080, "protocol": "tcp" });
        container.runtime = json!({ "portMappings": [port] });
        containers.push(container);
    }
    let before = remains(&net.nodes, &net.agents)?;
    let plugin = net.nodes[0].plugin()?;
    let [client, server] = [0, 1].map(|index: usize| &net.pods[index].host);
    let started = Instant::now();
    let ended = undisturbed(&[(client, server)], || {
        std::thread::scope(|scope| {
            let killing = containers.iter().zip(1..);
            let killing: Vec<_> = killing
                .map(|(container, number)| {
                    let plugin = &plugin;
                    scope.spawn(move || kill(plugin, container, number))
                })
                .collect();
            let ended = killing
                .into_iter()
                .map(|thread| thread.join().expect("no panic"));
            ended.sum::<Result<u32>>()
        })
    })?;
    eprintln!(
        "{KILLS} calls were killed, {ended} ended before that, in {:.1} s",
        started.elapsed().as_secs_f32()
    );
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
        let after = remains(&net.nodes, &net.agents)?;
        let difference: Vec<_> = after.symmetric_difference(&before).collect();
        ensure!(difference.is_empty(), "{difference:?}");
        Ok(())
    })?;
    // And they can be had again.
    for container in forgotten {
        plugin.add(container)?;
        plugin.del(container)?;
    }
    net.nothing_was_dropped()
}

/// Has a container added and deleted, and kills its part of the calls, each after another while; how many
/// ended before that.
fn kill(plugin: &Plugin, container: &Container, number: u64) -> Result<u32> {
    let seed = u64::from(std::process::id()) << 20 | number;
    eprintln!("seed {seed}");
    let mut random = Random(seed);
    // As long as calls take now, as far as is known: then most are killed, and none too early to have
    // come anywhere.
    let mut longest = Duration::from_millis(50);
    let (mut killed, mut ended) = (0, 0);
    while killed < KILLS / AT_ONCE as u32 {
        let command = if random.chance(60) { "ADD" } else { "DEL" };
        let after = Duration::from_micros(random.below(longest.as_micros() as usize) as u64);
        if plugin.interrupt(command, container, after)? {
            ended += 1;
            longest = longest.mul_f32(0.95).max(Duration::from_millis(2));
        } else {
            killed += 1;
            longest = longest.mul_f32(1.02);
        }
    }
    Ok(ended)
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

fn quantile(times: &[Duration], share: f64) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let index = (share * (sorted.len() - 1) as f64) as usize;
    sorted[index]
}
