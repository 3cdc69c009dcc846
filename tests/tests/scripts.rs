//! Manifests in, map text out: what the kernel should hold, in files that a person reads.
//!
//! Each file in `tests/scripts/` is a sequence of steps; `UPDATE=1` writes what came out. Every
//! script runs against the maps in memory, against maps that fail every few writes, and against
//! the kernel's own, and must come to the same.
//!
//! ```text
//! == write FILE        the manifest FILE says what follows
//! == remove FILE       it is gone
//! == restart           the agent dies, another one begins with what the maps hold
//! == expect            the maps hold what follows
//! == problems          what follows can't be used, and why
//! ```
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result};
use penstock_agent::{
    dataplane::{Dataplane, bpf::Bpf, faulty::Faulty, memory::Memory, pins::Pins},
    model::{
        object::{Event, Kind, Object},
        world::World,
    },
    reconcile::Reconciler,
    report,
    watch::manifests,
};
use penstock_common::limits;
use penstock_testbed::{Testbed, require_kernel};

/// A step: its head and what follows it.
struct Step {
    head: String,
    body: String,
}

fn steps(text: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for line in text.lines() {
        if let Some(head) = line.strip_prefix("== ") {
            steps.push(Step {
                head: head.to_owned(),
                body: String::new(),
            });
        } else if let Some(step) = steps.last_mut() {
            step.body.push_str(line);
            step.body.push('\n');
        }
    }
    steps
}

/// Something that scripts run against.
trait Stage {
    type Maps: Dataplane;
    fn open(&mut self, left: Option<Self::Maps>) -> Self::Maps;
    /// Called before each step.
    fn disturb(&self, _maps: &mut Self::Maps) {}
}

struct InMemory;
impl Stage for InMemory {
    type Maps = Memory;
    fn open(&mut self, left: Option<Memory>) -> Memory {
        left.unwrap_or_default()
    }
}

struct Failing;
impl Stage for Failing {
    type Maps = Faulty;
    fn open(&mut self, left: Option<Faulty>) -> Faulty {
        left.unwrap_or_default()
    }
    fn disturb(&self, maps: &mut Faulty) {
        maps.fails_after = Some(3);
        maps.failures = 2;
    }
}

struct InKernel {
    pins: Pins,
    _programs: aya::Ebpf,
    _testbed: Testbed,
}
impl InKernel {
    fn new() -> Result<Self> {
        let testbed = Testbed::new()?;
        let bpffs = Path::new("/sys/fs/bpf").join(format!("{}-scripts", testbed.prefix()));
        let pins = Pins::create(&bpffs)?;
        let programs = pins.load(true, false, limits::FLOWS)?;
        Ok(Self {
            pins,
            _programs: programs,
            _testbed: testbed,
        })
    }
}
impl Stage for InKernel {
    type Maps = Bpf;
    fn open(&mut self, _: Option<Bpf>) -> Bpf {
        Bpf::open(&self.pins).expect("the maps are pinned")
    }
}

/// Runs a script. Returns it with what really came out in the place of what was expected.
fn run<S: Stage>(text: &str, stage: &mut S) -> Result<String> {
    let folder = tempfile::tempdir().context("making a folder")?;
    let mut reconciler =
        Some(Reconciler::new(stage.open(None), World::new("here")).context("reading the maps")?);
    let mut now = Duration::from_secs(1);
    let preface: String = text
        .lines()
        .take_while(|line| !line.starts_with("== "))
        .map(|line| format!("{line}\n"))
        .collect();
    let mut out = preface;
    for step in steps(text) {
        let current = reconciler.as_mut().context("a reconciler")?;
        stage.disturb(&mut current.dataplane);
        let (verb, file) = step.head.split_once(' ').unwrap_or((&step.head, ""));
        let mut body = step.body.clone();
        match verb {
            "write" => fs::write(folder.path().join(file), &step.body).context("writing")?,
            "remove" => fs::remove_file(folder.path().join(file)).context("removing")?,
            "restart" => {
                let left = reconciler.take().map(|old| old.dataplane);
                let world = World::new("here");
                reconciler = Some(Reconciler::new(stage.open(left), world).context("adopting")?);
            }
            "expect" => {
                read(folder.path(), current)?;
                settle(current, &mut now);
                let state = current.dataplane.observe().context("reading the maps")?;
                assert_eq!(state.problems(), Vec::<String>::new(), "{}", step.head);
                assert_eq!(state.leaks(), Vec::<String>::new(), "{}", step.head);
                body = state.canonical() + "\n";
            }
            "problems" => body = read(folder.path(), current)?.join("\n") + "\n\n",
            other => anyhow::bail!("there is no step {other:?}"),
        }
        out.push_str(&format!("== {}\n{body}", step.head));
    }
    Ok(out.trim_end().to_owned() + "\n")
}

/// Tells the world everything that the folder says; what can't be used.
fn read<D: Dataplane>(folder: &Path, reconciler: &mut Reconciler<D>) -> Result<Vec<String>> {
    let (events, rejections) = manifests::read_once(folder).context("reading")?;
    let mut objects: Vec<Object> = Vec::new();
    for event in events {
        if let Event::Applied(object) = event {
            objects.push(object);
        }
    }
    let mut problems: Vec<String> = rejections.iter().map(report::in_words).collect();
    for kind in Kind::ALL {
        let listed = objects
            .iter()
            .filter(|object| object.kind() == kind)
            .cloned()
            .collect();
        if let Err(rejection) = reconciler
            .world
            .apply(Event::Listed(kind, listed, Vec::new()))
        {
            problems.push(report::in_words(&rejection));
        }
    }
    problems.extend(reconciler.world.conflicts().iter().map(report::in_words));
    problems.extend(reconciler.world.left_out_of_nodes());
    let folder = format!("{}/", folder.display());
    Ok(problems
        .iter()
        .map(|problem| problem.replace(&folder, ""))
        .collect())
}

fn settle<D: Dataplane>(reconciler: &mut Reconciler<D>, now: &mut Duration) {
    for _ in 0..50 {
        *now += Duration::from_secs(2);
        reconciler.step(*now);
        match reconciler.next_due() {
            Some(due) => *now = due.max(*now),
            None => return,
        }
    }
    panic!("never settles: {:?}", reconciler.errors());
}

#[test]
fn every_script_comes_to_what_it_expects() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts");
    let mut files: Vec<_> = fs::read_dir(&folder)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    files.sort();
    assert!(!files.is_empty());
    let has_kernel = require_kernel().is_some();
    for file in files {
        let text = fs::read_to_string(&file)?;
        let name = file.display();
        let result = run(&text, &mut InMemory).with_context(|| format!("{name}"))?;
        if std::env::var_os("UPDATE").is_some() {
            fs::write(&file, &result)?;
        } else {
            assert_eq!(result, text, "{name}: this came out, that was expected");
        }
        let failing = run(&result, &mut Failing).with_context(|| format!("{name}, failing"))?;
        assert_eq!(failing, result, "{name}, with failing writes");
        if has_kernel {
            let kernel =
                run(&result, &mut InKernel::new()?).with_context(|| format!("{name}, kernel"))?;
            assert_eq!(kernel, result, "{name}, in the kernel");
        }
    }
    Ok(())
}
