//! What a pod's network costs before the pod can start: ADD, and DEL when it ends.
//!
//! A plugin is called as a runtime calls it, with a namespace that is there already; the time is
//! that of its process, from its start to its end.

use std::{path::Path, time::Instant};

use anyhow::{Context, Result};
use penstock_testbed::{Agent, Container, Plugin, Service, Source, Testbed};

use crate::{
    bridge,
    load::Summary,
    report,
    turns::{Effort, Metric, Outcome, Turns, order},
};

/// What both say that pods' interfaces carry.
const MTU: u32 = 1_430;
/// A file system in memory.
const MEMORY: &str = "/dev/shm";
/// Pods that are there meanwhile, as on a busy node, of each contender.
const RESIDENTS: usize = 50;

/// A plugin and the namespaces that it is called with.
struct Contender {
    name: String,
    plugin: Plugin,
    containers: Vec<Container>,
}

/// Times of all calls.
#[derive(Default)]
struct Times {
    add: Vec<Summary>,
    del: Vec<Summary>,
}

/// Measures, with so many calls a turn.
pub fn measure(effort: Effort, calls: usize) -> Result<Vec<Outcome>> {
    // Both keep what they gave to whom in memory, so that no disk is measured.
    let mut testbed = Testbed::new_in(Path::new(MEMORY))?;

    let bridge_node = testbed.node()?;
    let (v4, v6) = bridge_node.pod_ranges();
    let folder = testbed.folder().to_path_buf();
    let bridge = bridge::plugin(&bridge_node, &[&v4, &v6], MTU, &folder.join("dual"))?;

    let single_node = testbed.node()?;
    let (v4, _) = single_node.pod_ranges();
    let single = bridge::plugin(&single_node, &[&v4], MTU, &folder.join("single"))?;

    let node = testbed.network_node()?;
    node.knows(&[&node])?;
    // A cluster without any service is not one.
    let kubernetes = Service::new("kubernetes", 1).port("https", 443, "TCP");
    node.manifest("kubernetes.json", &kubernetes.json().to_string())?;
    let _agent = Agent::start_network(&node, &Source::Manifests, &["--log-level", "info"])?;

    let mut contenders = Vec::new();
    for (name, node, plugin) in [
        ("bridge with host-local", &bridge_node, bridge),
        ("the same, IPv4 alone", &single_node, single),
        ("Penstock", &node, node.plugin()?),
    ] {
        for _ in 0..RESIDENTS {
            plugin.add(&testbed.container_on(node)?)?;
        }
        let containers = (0..calls)
            .map(|_| testbed.container_on(node))
            .collect::<Result<_>>()?;
        contenders.push(Contender {
            name: name.to_owned(),
            plugin,
            containers,
        });
    }

    let mut times: Vec<Times> = contenders.iter().map(|_| Times::default()).collect();
    for round in 0..effort.rounds {
        for (contender, times) in order(&contenders, &mut times, round) {
            times
                .add
                .push(contender.all(|plugin, container| plugin.add(container).map(drop))?);
            times.del.push(contender.all(Plugin::del)?);
        }
    }
    let mut outcomes = Vec::new();
    for (what, of) in [
        ("ADD", (|times| &times.add) as fn(&Times) -> &Vec<Summary>),
        ("DEL", |times| &times.del),
    ] {
        let turns = contenders
            .iter()
            .zip(&times)
            .map(|(contender, times)| Turns {
                contender: contender.name.clone(),
                summaries: of(times).clone(),
                evidence: Vec::new(),
            });
        let outcome = Outcome {
            title: "CNI plugins".to_owned(),
            what: format!("{what} beside {RESIDENTS} pods"),
            metrics: vec![Metric::P50, Metric::P99],
            turns: turns.collect(),
        };
        report::print(&outcome);
        outcomes.push(outcome);
    }
    Ok(outcomes)
}

impl Contender {
    /// Calls the plugin with each of the containers.
    fn all(&self, call: impl Fn(&Plugin, &Container) -> Result<()>) -> Result<Summary> {
        let begun = Instant::now();
        let mut times = Vec::with_capacity(self.containers.len());
        for container in &self.containers {
            let started = Instant::now();
            call(&self.plugin, container).with_context(|| self.name.clone())?;
            times.push(started.elapsed().as_nanos() as u64);
        }
        Ok(Summary::of_requests(
            times,
            begun.elapsed().as_secs_f64(),
            0,
        ))
    }
}
