//! What a pod's network costs before the pod can start: ADD, and DEL when it ends.
//!
//! A plugin is called as a runtime calls it, with a namespace that is there already; the time is
//! that of its process, from its start to its end.

use std::{
    fmt::{Display, Formatter},
    path::PathBuf,
    time::Instant,
};

use anyhow::{Context, Result};
use clap::ValueEnum;
use penstock_testbed::{Agent, Container, Node, Plugin, Service, Source, Testbed, list};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    bridge,
    figures::{self, Median},
    load::Summary,
    machine::{self, Watch},
    results::Keeper,
    turns::{Effort, Metric, Outcome, Turns, order},
};

/// What both say that pods' interfaces carry.
const MTU: u32 = 1_430;
/// A file system in memory.
const MEMORY: &str = "/dev/shm";
/// Programs that are measured: Penstock's plugin asks its agent. The plugins' own time is this program's, once they
/// have ended.
const MEASURED: &[&str] = &["penstock"];
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

/// Where plugins keep what they gave to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum State {
    /// A file system in memory, as `/run` is: no disk is measured.
    Memory,
    /// Beside this program: on a disk, wherever that is not in memory.
    Disk,
}

impl State {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::Memory, Self::Disk];

    fn folder(self) -> Result<PathBuf> {
        if self == Self::Memory {
            return Ok(MEMORY.into());
        }
        let program = std::env::current_exe().context("finding this program")?;
        let folder = program.with_file_name("bench-state");
        std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        Ok(folder)
    }

    /// In words, which are the same on each machine.
    const fn said(self) -> &'static str {
        match self {
            Self::Memory => "state in memory",
            Self::Disk => "state beside the program",
        }
    }

    /// The kind of file system that this is on this machine.
    fn file_system(self) -> Result<String> {
        let folder = self.folder()?;
        let folder = folder.to_str().context("a folder's name is no text")?;
        let kind = machine::said("findmnt", &["-no", "FSTYPE", "-T", folder]);
        Ok(kind.unwrap_or_else(|| "a file system of unknown kind".to_owned()))
    }
}

impl Display for State {
    fn fmt(&self, formatter: &mut Formatter) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Memory => "memory",
            Self::Disk => "disk",
        })
    }
}

/// How long each call of one plugin's took, over all rounds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Calls {
    /// What was measured, command first.
    pub what: String,
    /// The plugin.
    pub contender: String,
    /// All calls.
    pub nanos: Vec<u64>,
}

impl Calls {
    /// Whether the other is of the same plugin and command.
    pub fn is_of(&self, other: &Self) -> bool {
        (&self.what, &self.contender) == (&other.what, &other.contender)
    }

    /// The median and the time that one of a hundred exceeds.
    pub fn p50_and_p99(&self) -> (u64, u64) {
        let at = |percent| figures::percentile(&self.nanos, percent);
        (at(50), at(99))
    }

    /// How much longer one of a hundred takes than the median, with an interval that holds the true ratio.
    pub fn tail(&self) -> Median {
        figures::tail(&self.nanos)
    }
}

/// A plugin and the namespaces that it is called with.
struct Contender {
    name: &'static str,
    plugin: Plugin,
    containers: Vec<Container>,
}

/// Times of all calls, by turn.
#[derive(Default)]
struct Times {
    add: Vec<Vec<u64>>,
    del: Vec<Vec<u64>>,
}

/// What trials are called, command first.
fn name(command: &str, families: Families, state: State) -> String {
    let (families, state) = (families.name(), state.said());
    format!("{command} beside {RESIDENTS} pods, {families}, {state}")
}

const BRIDGE: &str = "bridge with host-local";
const PENSTOCK: &str = "Penstock";

/// All contenders.
pub fn contenders() -> Vec<String> {
    [BRIDGE, PENSTOCK].map(str::to_owned).to_vec()
}

/// What measures this alone.
pub fn command(calls: usize, state: State) -> String {
    format!("cni --calls {calls} --state {state}")
}

/// The names of all trials here.
pub fn names(states: &[State]) -> Vec<String> {
    let mut names = Vec::new();
    for state in if states.is_empty() {
        &State::ALL
    } else {
        states
    } {
        for families in [Families::V4, Families::Both] {
            names.extend(["ADD", "DEL"].map(|command| name(command, families, *state)));
        }
    }
    names
}

/// Measures, with so many calls a turn and what plugins keep in these places; in all, if none is named.
pub fn measure(effort: &Effort, calls: usize, states: &[State], keeper: &mut Keeper) -> Result<()> {
    let states = match states {
        [] if effort.is_brief => &[State::Disk],
        [] => &State::ALL[..],
        named => named,
    };
    let families = if effort.is_brief {
        &[Families::Both][..]
    } else {
        &[Families::V4, Families::Both]
    };
    for state in states {
        let place = format!("CNI plugins' {}", state.said());
        keeper.results.machine.found(&place, state.file_system()?);
        for families in families {
            let is_wanted = ["ADD", "DEL"]
                .iter()
                .any(|command| effort.wants(&name(command, *families, *state)));
            if is_wanted {
                let effort = effort.of(command(calls, *state));
                with(*families, *state, &effort, calls, keeper)?;
            }
        }
    }
    Ok(())
}

fn with(
    families: Families,
    state: State,
    effort: &Effort,
    calls: usize,
    keeper: &mut Keeper,
) -> Result<()> {
    let mut testbed = Testbed::new_in(&state.folder()?)?;

    let bridged = testbed.node()?;
    let ranges = families.ranges(&bridged);
    let ranges: Vec<&str> = ranges.iter().map(String::as_str).collect();
    let kept = testbed.folder().join("host-local");
    let bridge = bridge::plugin(&bridged, &ranges, MTU, &kept)?;

    let ours = testbed.network_node()?;
    // A cluster without any service is not one.
    let kubernetes = Service::new("kubernetes", 1).port("https", 443, "TCP");
    let objects = [object(&ours, families), kubernetes.json()];
    ours.manifest("cluster.json", &list(&objects))?;
    let _agent = Agent::start_network(&ours, &Source::Manifests, &["--log-level", "info"])?;

    let mut contenders = Vec::new();
    let all = [
        (BRIDGE, &bridged, bridge),
        (PENSTOCK, &ours, ours.plugin()?),
    ];
    for (name, node, plugin) in all.into_iter().filter(|(name, ..)| effort.names(name)) {
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

    let watch = Watch::begin(MEASURED);
    let add = |plugin: &Plugin, container: &Container| plugin.add(container).map(drop);
    // Programs are in memory and neighbours' caches are as they will be, before anything counts.
    for contender in &contenders {
        contender.all(add)?;
        contender.all(Plugin::del)?;
    }
    let mut times: Vec<Times> = contenders.iter().map(|_| Times::default()).collect();
    for round in 0..effort.rounds {
        for (contender, times) in order(&contenders, &mut times, round) {
            times.add.push(contender.all(add)?);
            times.del.push(contender.all(Plugin::del)?);
        }
    }
    let quiet = watch.end();
    let (add, del): (Vec<_>, Vec<_>) = times
        .into_iter()
        .map(|times| (times.add, times.del))
        .unzip();
    for (command, times) in [("ADD", add), ("DEL", del)] {
        let what = name(command, families, state);
        if !effort.wants(&what) {
            continue;
        }
        let each = contenders.iter().zip(&times);
        let pooled: Vec<Calls> = each
            .map(|(contender, turns)| Calls {
                what: what.clone(),
                contender: contender.name.to_owned(),
                nanos: turns.concat(),
            })
            .collect();
        let turns = turns(&contenders, times);
        keeper.keep(Outcome {
            title: "CNI plugins".to_owned(),
            metrics: Metric::known(&[Metric::P50, Metric::P99], &turns),
            turns,
            command: effort.to_repeat(Some(&what)),
            quiet: Some(quiet),
            what,
        })?;
        for calls in pooled {
            let (p50, p99) = calls.p50_and_p99();
            println!(
                "  all {:5} {:40} p50 {:.2} ms, p99 {:.2} ms, p99 / p50 {}",
                calls.nanos.len(),
                calls.contender,
                p50 as f64 / 1e6,
                p99 as f64 / 1e6,
                calls.tail().within(2),
            );
            keeper.results.plugins.push(calls);
        }
    }
    Ok(())
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

/// Each contender's turns.
fn turns(contenders: &[Contender], times: Vec<Vec<Vec<u64>>>) -> Vec<Turns> {
    let summary = |times: Vec<u64>| {
        let seconds = times.iter().sum::<u64>() as f64 / 1e9;
        Summary::of_requests(times, seconds, 0)
    };
    let each = contenders.iter().zip(times);
    each.map(|(contender, times)| Turns {
        contender: contender.name.to_owned(),
        summaries: times.into_iter().map(summary).collect(),
        evidence: Vec::new(),
    })
    .collect()
}

impl Contender {
    /// Calls the plugin with each of the containers; how long each call took.
    fn all(&self, call: impl Fn(&Plugin, &Container) -> Result<()>) -> Result<Vec<u64>> {
        let mut times = Vec::with_capacity(self.containers.len());
        for container in &self.containers {
            let started = Instant::now();
            call(&self.plugin, container).context(self.name)?;
            times.push(started.elapsed().as_nanos() as u64);
        }
        Ok(times)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_call_in_a_hundred_is_beyond_the_ninety_ninth() {
        let mut nanos = vec![10; 990];
        nanos.extend([25; 10]);
        let calls = Calls {
            what: "ADD".to_owned(),
            contender: "one".to_owned(),
            nanos,
        };
        assert_eq!(calls.p50_and_p99(), (10, 25));
    }

    #[test]
    fn file_systems_are_the_machines_and_not_in_names() -> Result<()> {
        let kinds = [State::Memory.file_system()?, State::Disk.file_system()?];
        assert_eq!(kinds[0], "tmpfs");
        for name in names(&[]) {
            let is_named = kinds.iter().any(|kind| name.contains(kind.as_str()));
            assert!(!is_named, "{name} is not the same on each machine");
        }
        Ok(())
    }
}
