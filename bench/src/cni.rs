//! What a pod's network costs before the pod can start: ADD, and DEL when it ends.
//!
//! A plugin is called as a runtime calls it, with a namespace that is there already; the time is
//! that of its process, from its start to its end.

use std::{path::Path, time::Instant};

use anyhow::{Context, Result};
use penstock_testbed::{Agent, Container, Node, Plugin, Service, Source, Testbed, list};
use serde_json::{Value, json};

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

/// The addresses that pods get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Families {
    V4,
    Both,
}

impl Families {
    const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::Both => "IPv4 and IPv6",
        }
    }

    /// A node's ranges of these families.
    fn ranges(self, node: &Node) -> Vec<String> {
        let (v4, v6) = node.pod_ranges();
        match self {
            Self::V4 => vec![v4],
            Self::Both => vec![v4, v6],
        }
    }
}

/// A plugin and the namespaces that it is called with.
struct Contender {
    name: &'static str,
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
pub fn measure(effort: &Effort, calls: usize) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for families in [Families::V4, Families::Both] {
        outcomes.extend(with(families, effort, calls)?);
    }
    Ok(outcomes)
}

fn with(families: Families, effort: &Effort, calls: usize) -> Result<Vec<Outcome>> {
    // Both keep what they gave to whom in memory, so that no disk is measured.
    let mut testbed = Testbed::new_in(Path::new(MEMORY))?;

    let bridged = testbed.node()?;
    let ranges = families.ranges(&bridged);
    let ranges: Vec<&str> = ranges.iter().map(String::as_str).collect();
    let state = testbed.folder().join("host-local");
    let bridge = bridge::plugin(&bridged, &ranges, MTU, &state)?;

    let ours = testbed.network_node()?;
    // A cluster without any service is not one.
    let kubernetes = Service::new("kubernetes", 1).port("https", 443, "TCP");
    let objects = [object(&ours, families), kubernetes.json()];
    ours.manifest("cluster.json", &list(&objects))?;
    let _agent = Agent::start_network(&ours, &Source::Manifests, &["--log-level", "info"])?;

    let mut contenders = Vec::new();
    for (name, node, plugin) in [
        ("bridge with host-local", &bridged, bridge),
        ("Penstock", &ours, ours.plugin()?),
    ] {
        for _ in 0..RESIDENTS {
            plugin.add(&testbed.container_on(node)?)?;
        }
        let containers = (0..calls)
            .map(|_| testbed.container_on(node))
            .collect::<Result<_>>()?;
        contenders.push(Contender {
            name,
            plugin,
            containers,
        });
    }

    let mut times: Vec<Times> = contenders.iter().map(|_| Times::default()).collect();
    for round in 0..effort.rounds {
        for (contender, times) in order(&contenders, &mut times, round) {
            let add = |plugin: &Plugin, container: &Container| plugin.add(container).map(drop);
            times.add.push(contender.all(add)?);
            times.del.push(contender.all(Plugin::del)?);
        }
    }
    let (add, del) = times
        .into_iter()
        .map(|times| (times.add, times.del))
        .unzip();
    Ok(vec![
        outcome("ADD", families, &contenders, add),
        outcome("DEL", families, &contenders, del),
    ])
}

/// A node's object, with its ranges of these families.
fn object(node: &Node, families: Families) -> Value {
    let ranges = families.ranges(node);
    let mut object = node.object();
    if let Some(spec) = object.get_mut("spec") {
        *spec = json!({ "podCIDR": ranges.first(), "podCIDRs": ranges });
    }
    object
}

fn outcome(
    command: &str,
    families: Families,
    contenders: &[Contender],
    summaries: Vec<Vec<Summary>>,
) -> Outcome {
    let turns = contenders.iter().zip(summaries);
    let turns = turns.map(|(contender, summaries)| Turns {
        contender: contender.name.to_owned(),
        summaries,
        evidence: Vec::new(),
    });
    let outcome = Outcome {
        title: "CNI plugins".to_owned(),
        what: format!("{command} beside {RESIDENTS} pods, {}", families.name()),
        metrics: vec![Metric::P50, Metric::P99],
        turns: turns.collect(),
    };
    report::print(&outcome);
    outcome
}

impl Contender {
    /// Calls the plugin with each of the containers.
    fn all(&self, call: impl Fn(&Plugin, &Container) -> Result<()>) -> Result<Summary> {
        let begun = Instant::now();
        let mut times = Vec::with_capacity(self.containers.len());
        for container in &self.containers {
            let started = Instant::now();
            call(&self.plugin, container).context(self.name)?;
            times.push(started.elapsed().as_nanos() as u64);
        }
        let seconds = begun.elapsed().as_secs_f64();
        Ok(Summary::of_requests(times, seconds, 0))
    }
}
