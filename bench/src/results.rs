//! What was measured, as files: all of it as JSON, and from that a report and pictures.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    cni::Calls,
    machine::{Machine, Quiet},
    plot, report,
    turns::{Outcome, quoted},
};

/// What this program was asked for, as one would type it, but for where it writes.
fn asked_for(mut arguments: impl Iterator<Item = String>) -> String {
    let mut words = Vec::new();
    while let Some(word) = arguments.next() {
        match word.as_str() {
            "--results" | "--name" => drop(arguments.next()),
            _ => words.push(quoted(&word)),
        }
    }
    words.join(" ")
}

/// Results of a run that goes on: what is measured stays, should something fail later.
pub struct Keeper {
    /// What there is so far.
    pub results: Results,
    folder: PathBuf,
    name: String,
}

impl Keeper {
    /// Results that are written into a folder.
    pub fn new(results: Results, folder: &Path, name: &str) -> Self {
        Self {
            results,
            folder: folder.to_owned(),
            name: name.to_owned(),
        }
    }

    /// Whether something can be measured: not, if there is a reason, which is said and noted.
    pub fn has(&mut self, what: &str, reason: Option<String>) -> bool {
        let Some(reason) = reason else {
            return true;
        };
        let absent = Absent {
            what: what.to_owned(),
            reason,
        };
        if !self.results.absent.contains(&absent) {
            println!("WARNING: left out: {}: {}", absent.what, absent.reason);
            self.results.absent.push(absent);
        }
        false
    }

    /// Says what came out of a trial, and writes it down.
    pub fn keep(&mut self, outcome: Outcome) -> Result<()> {
        report::print(&outcome);
        self.results.outcomes.push(outcome);
        self.results.write_json(&self.folder, &self.name).map(drop)
    }

    /// Writes everything, the report and the pictures too; where they are.
    pub fn write(&self) -> Result<Vec<PathBuf>> {
        self.results.write(&self.folder, &self.name)
    }
}

/// What was to be measured and could not be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Absent {
    /// A contender or a trial.
    pub what: String,
    /// Why.
    pub reason: String,
}

/// Everything of one run.
#[derive(Serialize, Deserialize)]
pub struct Results {
    /// Where and when.
    pub machine: Machine,
    /// What was asked for: the benchmark's arguments, run by run.
    #[serde(default)]
    pub commands: Vec<String>,
    /// What was compared.
    pub outcomes: Vec<Outcome>,
    /// What a brief run leaves out, if this is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_out: Option<String>,
    /// What was to be measured and could not be.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub absent: Vec<Absent>,
    /// All calls of CNI plugins, where they were measured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub plugins: Vec<Calls>,
    /// What programming takes, where it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<Value>,
    /// What packets cost in each program, where it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub programs: Option<Value>,
}

impl Results {
    /// Nothing yet.
    pub fn new(machine: Machine) -> Self {
        Self {
            machine,
            commands: vec![asked_for(std::env::args().skip(1))],
            outcomes: Vec::new(),
            left_out: None,
            absent: Vec::new(),
            plugins: Vec::new(),
            control: None,
            programs: None,
        }
    }

    /// Reads an earlier run's.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is no result", path.display()))
    }

    /// Reads several earlier runs' as one: the first's machine, and of what two have measured the later's.
    /// They have to be of one machine and kernel, and of one version of Penstock and of what it is compared with.
    pub fn read_all(paths: &[PathBuf]) -> Result<Self> {
        let mut all: Option<Self> = None;
        for path in paths {
            let next = Self::read(path)?;
            match &mut all {
                Some(all) => {
                    let (ours, theirs) = (all.machine.identity(), next.machine.identity());
                    ensure!(
                        ours == theirs,
                        "{} is not of the machine and version of {}: {theirs}, and not {ours}",
                        path.display(),
                        paths
                            .first()
                            .map_or_else(String::new, |path| path.display().to_string()),
                    );
                    all.take_in(next);
                }
                None => all = Some(next),
            }
        }
        all.context("no results are named")
    }

    /// Puts a later run's in the place of its own, or beside them.
    fn take_in(&mut self, later: Self) {
        self.machine.quiet.extend(later.machine.quiet);
        for (what, is) in later.machine.programs {
            self.machine.found(&what, is);
        }
        self.commands.extend(later.commands);
        for outcome in later.outcomes {
            let is_same =
                |one: &&mut Outcome| (&one.title, &one.what) == (&outcome.title, &outcome.what);
            match self.outcomes.iter_mut().find(is_same) {
                Some(earlier) => *earlier = outcome,
                None => self.outcomes.push(outcome),
            }
        }
        for calls in later.plugins {
            match self.plugins.iter_mut().find(|one| one.is_of(&calls)) {
                Some(earlier) => *earlier = calls,
                None => self.plugins.push(calls),
            }
        }
        for absent in later.absent {
            if !self.absent.contains(&absent) {
                self.absent.push(absent);
            }
        }
        self.left_out = self.left_out.take().and(later.left_out);
        // What is of one title stays together.
        let titles: Vec<String> = self.titles().into_iter().map(str::to_owned).collect();
        let place = |outcome: &Outcome| titles.iter().position(|title| *title == outcome.title);
        self.outcomes.sort_by_key(place);
        self.control = later.control.or(self.control.take());
        self.programs = later.programs.or(self.programs.take());
    }

    /// Writes NAME.json, NAME.md and the pictures that it shows; their paths.
    pub fn write(&self, folder: &Path, name: &str) -> Result<Vec<PathBuf>> {
        let mut files = vec![self.write_json(folder, name)?];
        let mut plots = Vec::new();
        for outcome in &self.outcomes {
            let file = format!("{name}-{}.svg", slug(&outcome.name()));
            let path = folder.join(&file);
            plot::draw(&path, outcome)?;
            plots.push((outcome.name(), file));
            files.push(path);
        }
        let file = format!("{name}-growth.svg");
        let path = folder.join(&file);
        if plot::growth(&path, &self.outcomes)? {
            plots.push((report::GROWTH.to_owned(), file));
            files.push(path);
        }
        let path = folder.join(format!("{name}.md"));
        let text = report::markdown(self, &plots);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        files.push(path);
        Ok(files)
    }

    /// Writes NAME.json.
    fn write_json(&self, folder: &Path, name: &str) -> Result<PathBuf> {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let path = folder.join(format!("{name}.json"));
        let json = serde_json::to_string(self).context("writing JSON")? + "\n";
        fs::write(&path, json).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }

    /// Why the numbers should not be relied upon.
    pub fn reservations(&self) -> Vec<String> {
        let mut reasons = self.machine.reservations();
        let watched = self.outcomes.iter().filter_map(|outcome| outcome.quiet);
        let (quiet, loud): (Vec<Quiet>, Vec<Quiet>) = watched.partition(|one| one.is_idle());
        let loudest = loud.iter().max_by(|a, b| a.in_all().total_cmp(&b.in_all()));
        if let Some(loudest) = loudest {
            reasons.push(format!(
                "during {} of {} trials the machine was not idle, of which each says so: {} at most; their \
                 numbers are provisional",
                loud.len(),
                loud.len() + quiet.len(),
                loudest.shown()
            ));
        }
        reasons
    }

    /// The titles of comparisons, in their order.
    fn titles(&self) -> Vec<&str> {
        let mut titles: Vec<&str> = Vec::new();
        for outcome in &self.outcomes {
            if !titles.contains(&outcome.title.as_str()) {
                titles.push(&outcome.title);
            }
        }
        titles
    }
}

/// A title as part of a file's name.
fn slug(title: &str) -> String {
    let words = title
        .split(|character: char| !character.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join("-").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        load::Summary,
        turns::{Metric, Turns},
    };

    #[test]
    fn what_was_asked_for_can_be_typed() {
        let words = ["--name", "x", "pods", "--only", "one processor"].map(str::to_owned);
        assert_eq!(asked_for(words.into_iter()), "pods --only 'one processor'");
    }

    #[test]
    fn of_what_two_runs_have_measured_the_later_counts() {
        let run = |titles: &[(&str, &str)], rounds| Results {
            outcomes: titles
                .iter()
                .map(|(title, what)| Outcome {
                    title: (*title).to_owned(),
                    what: (*what).to_owned(),
                    metrics: vec![Metric::P50],
                    turns: vec![Turns {
                        contender: "one".to_owned(),
                        summaries: vec![Summary::default(); rounds],
                        evidence: Vec::new(),
                    }],
                    command: String::new(),
                    quiet: None,
                })
                .collect(),
            ..Results::new(Machine::look())
        };
        let mut all = run(&[("a", "x"), ("b", "x")], 6);
        all.take_in(run(&[("b", "x"), ("c", "x"), ("a", "y")], 9));
        let found: Vec<_> = all
            .outcomes
            .iter()
            .map(|one| {
                (
                    one.title.as_str(),
                    one.what.as_str(),
                    one.turns[0].summaries.len(),
                )
            })
            .collect();
        assert_eq!(
            found,
            [("a", "x", 6), ("a", "y", 9), ("b", "x", 9), ("c", "x", 9)]
        );
    }

    #[test]
    fn a_trial_beside_others_work_is_named_and_a_quiet_one_is_not() {
        let run = |busy| {
            let quiet = |busy| Quiet {
                busy,
                background: 0.0,
                stolen: 0.0,
                load: 3.0,
            };
            let mut results = Results::new(Machine {
                quiet: vec![quiet(0.01)],
                ..Machine::look()
            });
            results.outcomes = [0.01, busy]
                .map(|busy| Outcome {
                    title: "a".to_owned(),
                    what: "x".to_owned(),
                    metrics: Vec::new(),
                    turns: Vec::new(),
                    command: String::new(),
                    quiet: Some(quiet(busy)),
                })
                .to_vec();
            results.reservations().join("\n")
        };
        assert!(!run(0.04).contains("idle"), "{}", run(0.04));
        let said = run(0.3);
        assert!(said.contains("during 1 of 2 trials"), "{said}");
        assert!(said.contains("used 30 %"), "{said}");
    }

    #[test]
    fn what_is_left_out_is_kept_once_with_its_reason() {
        let folder = tempfile::tempdir().unwrap();
        let results = Results::new(Machine::look());
        let mut keeper = Keeper::new(results, folder.path(), "some");
        assert!(keeper.has("kube-proxy, iptables", None));
        for _ in 0..2 {
            let reason = Some("this kernel has no IPVS".to_owned());
            assert!(!keeper.has("kube-proxy, ipvs", reason));
        }
        keeper.write().unwrap();
        let mut read = Results::read(&folder.path().join("some.json")).unwrap();
        assert_eq!(read.absent, keeper.results.absent);
        assert_eq!(read.absent.len(), 1);
        let text = fs::read_to_string(folder.path().join("some.md")).unwrap();
        let line = "* left out: kube-proxy, ipvs: this kernel has no IPVS";
        assert!(text.contains(line), "{text}");
        // And of runs that are put together, all.
        let mut later = Results::new(Machine::look());
        let disk = ("plugins' state".to_owned(), "ext4".to_owned());
        later.machine.programs.push(disk.clone());
        later.absent = vec![
            read.absent[0].clone(),
            Absent {
                what: "all trials of wrk".to_owned(),
                reason: "wrk is not there".to_owned(),
            },
        ];
        read.take_in(later);
        assert_eq!(read.absent.len(), 2);
        assert!(read.machine.programs.contains(&disk));
    }

    #[test]
    fn runs_with_another_kube_proxy_are_not_put_together() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, change: fn(&mut Machine)| {
            let mut results = Results::new(Machine {
                programs: vec![
                    ("penstock".to_owned(), "0.1.0 (abc)".to_owned()),
                    ("kube-proxy".to_owned(), "Kubernetes v1.20.2".to_owned()),
                    (
                        "iptables' backend".to_owned(),
                        "v1.8.9 (nf_tables)".to_owned(),
                    ),
                ],
                ..Machine::look()
            });
            change(&mut results.machine);
            results.write_json(folder.path(), name).unwrap()
        };
        let first = write("first", |_| {});
        let merged = |name, change| Results::read_all(&[first.clone(), write(name, change)]);
        assert!(merged("same", |machine| machine.time += 60).is_ok());
        let others: [fn(&mut Machine); 4] = [
            |machine| machine.programs[1].1 = "Kubernetes v1.31.0".to_owned(),
            |machine| machine.programs[2].1 = "v1.8.9 (legacy)".to_owned(),
            |machine| machine.processors += 2,
            |machine| machine.memory_mib *= 2,
        ];
        for (number, change) in others.into_iter().enumerate() {
            let error = merged("other", change).err().map(|error| error.to_string());
            assert!(
                error.is_some_and(|error| error.contains("is not of the machine")),
                "{number}"
            );
        }
    }

    #[test]
    fn titles_become_names_of_files() {
        assert_eq!(slug("Pods on one node"), "pods-on-one-node");
        assert_eq!(slug("5,000 services, last"), "5-000-services-last");
    }
}
