//! Contenders take turns: whatever drifts meanwhile, drifts for all.

use std::fmt::Display;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    contender::{Contender, Evidence},
    figures::Median,
    load::{Summary, Workload, is_there},
    machine::{self, Quiet, Watch},
    results::Keeper,
};

/// How much is measured.
#[derive(Clone, Debug)]
pub struct Effort {
    /// How often each contender gets its turn.
    pub rounds: usize,
    /// How long a turn is.
    pub turn_ms: u64,
    /// How long it is done before, unmeasured.
    pub warm_up_ms: u64,
    /// Only trials whose names hold this are done; after an equals sign it has to be all of the name.
    pub only: Vec<String>,
    /// Only contenders whose names hold one of these take turns; all, if there are none.
    pub contenders: Vec<String>,
    /// Whether only those trials are done that tell most in the least time.
    pub is_brief: bool,
    /// What this program was asked for, without how much of it.
    pub command: String,
}

impl Effort {
    /// The same for a part of what was asked for, which alone is asked for so.
    pub fn of(&self, command: String) -> Self {
        Self {
            command,
            ..self.clone()
        }
    }

    /// The part of a command that names some of all ways; nothing if it is all.
    pub fn naming<T: Copy + PartialEq + Display>(ways: &[T], all: &[T]) -> String {
        if ways == all {
            return String::new();
        }
        let names: Vec<String> = ways.iter().map(T::to_string).collect();
        format!(" --ways {}", names.join(","))
    }

    /// Whether what has this name is to be measured.
    pub fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| is_named(only, name))
    }

    /// What of these trials is to be measured.
    pub fn chosen<'a>(&self, trials: &'a [Trial]) -> Vec<&'a Trial> {
        let is_chosen =
            |trial: &&Trial| self.wants(&trial.name()) && (!self.is_brief || trial.is_brief());
        trials.iter().filter(is_chosen).collect()
    }

    /// What one has to type to measure this alone, in the same way.
    pub fn to_repeat(&self, what: Option<&str>) -> String {
        let only = what.map_or_else(String::new, |what| {
            format!(" --only {}", quoted(&format!("={what}")))
        });
        let contenders: String = self
            .contenders
            .iter()
            .map(|name| format!(" --contender {}", quoted(name)))
            .collect();
        format!(
            "{}{only}{contenders} --rounds {} --turn-ms {} --warm-up-ms {}",
            self.command, self.rounds, self.turn_ms, self.warm_up_ms
        )
    }

    /// Whether anything of a comparison with these trials and contenders was asked for.
    pub fn concerns(&self, trials: &[String], contenders: &[String]) -> bool {
        let is_wanted = self.only.is_empty() || trials.iter().any(|name| self.wants(name));
        is_wanted && (self.contenders.is_empty() || contenders.iter().any(|name| self.names(name)))
    }

    /// Refuses what is called like nothing among these: it would measure nothing, and say so to nobody.
    pub fn check(&self, trials: &[String], contenders: &[String]) -> Result<()> {
        for only in &self.only {
            ensure!(
                trials.iter().any(|name| is_named(only, name)),
                "--only {}: no trial here is called so; {}",
                quoted(only),
                choice(trials)
            );
        }
        for wanted in &self.contenders {
            ensure!(
                contenders.iter().any(|name| name.contains(wanted)),
                "--contender {}: nobody here is called so; {}",
                quoted(wanted),
                choice(contenders)
            );
        }
        Ok(())
    }

    /// Whether a contender of this name takes turns.
    pub fn names(&self, contender: &str) -> bool {
        let mut wanted = self.contenders.iter();
        self.contenders.is_empty() || wanted.any(|wanted| contender.contains(wanted))
    }
}

/// Whether a name has this in it, or is what follows an equals sign.
fn is_named(only: &str, name: &str) -> bool {
    match only.strip_prefix('=') {
        Some(whole) => name == whole,
        None => name.contains(only),
    }
}

/// A word as a shell takes it for one.
pub fn quoted(word: &str) -> String {
    let is_plain =
        |character: char| character.is_ascii_alphanumeric() || "-_=.,:/".contains(character);
    match word {
        plain if !plain.is_empty() && plain.chars().all(is_plain) => plain.to_owned(),
        // No name has what double quotes leave to the shell.
        apostrophe if apostrophe.contains('\'') => format!("\"{apostrophe}\""),
        other => format!("'{other}'"),
    }
}

/// What there is to be named.
fn choice(names: &[String]) -> String {
    let mut all: Vec<&str> = Vec::new();
    for name in names {
        if !all.contains(&name.as_str()) {
            all.push(name);
        }
    }
    match all.as_slice() {
        [] => "there is nothing to be named".to_owned(),
        names => format!("there is\n  {}", names.join("\n  ")),
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trial {
    /// What is sent.
    pub workload: Workload,
    /// Requests a second; as many as go if `None`.
    pub rate: Option<u32>,
    /// Connections at once, of streams.
    pub connections: usize,
    /// Where client and server are.
    pub processors: Processors,
}

/// Where client and server are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Processors {
    /// Both on one, so that a request costs what all of its work costs, and nobody waits for a
    /// processor that sleeps to wake up.
    One,
    /// One for each.
    Two,
}

impl Trial {
    /// As many requests as go, or one stream.
    pub const fn closed(workload: Workload) -> Self {
        Self {
            workload,
            rate: None,
            connections: 1,
            processors: Processors::Two,
        }
    }

    /// As many requests as go, or one stream, with one processor for both sides.
    pub const fn together(workload: Workload) -> Self {
        Self {
            processors: Processors::One,
            ..Self::closed(workload)
        }
    }

    /// So many requests a second.
    pub const fn open(workload: Workload, rate: u32) -> Self {
        Self {
            rate: Some(rate),
            ..Self::closed(workload)
        }
    }

    /// Several streams at once.
    pub const fn streams(connections: usize) -> Self {
        Self {
            connections,
            ..Self::closed(Workload::Stream)
        }
    }

    /// Its name in tables.
    pub fn name(&self) -> String {
        let name = self.workload.name();
        let name = match (self.rate, self.connections) {
            (Some(rate), _) => format!("{name}, {rate} a second"),
            (None, 1) => name.to_owned(),
            (None, connections) => format!("{connections} x {name}"),
        };
        match self.processors {
            Processors::One => format!("{name}, one processor for both"),
            Processors::Two => name,
        }
    }

    /// Whether it is measured in a brief run, too: what says most about a way in the least time. Clients of
    /// others measure for whole seconds.
    pub fn is_brief(&self) -> bool {
        match (self.workload, self.processors) {
            (Workload::Stream, Processors::Two) => self.connections > 1,
            (Workload::Connect, Processors::Two) => self.rate.is_some_and(|rate| rate < 1_000),
            (Workload::Connect | Workload::TcpRr | Workload::Stream, Processors::One) => true,
            (Workload::UdpRr | Workload::UdpPackets, Processors::One) => true,
            _ => false,
        }
    }

    /// What of it is compared.
    pub fn metrics(&self) -> &'static [Metric] {
        match (self.workload, self.processors) {
            (Workload::Stream | Workload::Iperf, _) => &[Metric::Bits],
            (Workload::Wrk | Workload::WrkKept, _) => &[Metric::Rate],
            (Workload::UdpPackets, _) => &[Metric::Packets],
            (_, Processors::One) => &[Metric::Rate, Metric::P50],
            (_, Processors::Two) => &[Metric::P50, Metric::P99],
        }
    }
}

/// Requests of a turn of which one can say what one of a hundred exceeds: of fewer than a hundred that is the
/// longest, of fewer than these the longest but one.
pub const ENOUGH_FOR_P99: u64 = 200;

/// A number of a turn's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// The median time.
    P50,
    /// The time that one of a hundred exceeds; of turns with [`ENOUGH_FOR_P99`] requests.
    P99,
    /// Requests that were answered in a second.
    Rate,
    /// Packets that came through in a second.
    Packets,
    /// Bits that arrived in a second.
    Bits,
}

impl Metric {
    /// Those of these that so many requests are enough for, in each turn.
    pub fn known(metrics: &[Self], turns: &[Turns]) -> Vec<Self> {
        let summaries = || turns.iter().flat_map(|turns| &turns.summaries);
        let is_enough = summaries().all(|summary| summary.count >= ENOUGH_FOR_P99);
        let is_known = |metric: &Self| *metric != Self::P99 || is_enough;
        metrics.iter().copied().filter(is_known).collect()
    }

    fn of(self, summary: &Summary) -> f64 {
        match self {
            Self::P50 => summary.p50 as f64,
            Self::P99 => summary.p99 as f64,
            Self::Rate | Self::Packets => summary.per_second,
            Self::Bits => summary.bits_per_second,
        }
    }

    /// Its name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::P50 => "p50",
            Self::P99 => "p99",
            Self::Rate => "requests",
            Self::Packets => "packets",
            Self::Bits => "throughput",
        }
    }

    /// The unit that such values are shown in, and how many of a metric's own are one of these.
    pub fn unit(self, values: impl Iterator<Item = f64>) -> (&'static str, f64) {
        let most = values.fold(0.0, f64::max);
        match self {
            Self::P50 | Self::P99 if most < 1e7 => ("µs", 1e3),
            Self::P50 | Self::P99 => ("ms", 1e6),
            Self::Rate => ("a second", 1.0),
            Self::Packets => ("thousands a second", 1e3),
            Self::Bits => ("Gbit/s", 1e9),
        }
    }

    /// Whether less of it is better, in words.
    pub const fn better(self) -> &'static str {
        if self.is_less_better() {
            "less is better"
        } else {
            "more is better"
        }
    }

    /// Whether less of it is better.
    pub const fn is_less_better(self) -> bool {
        matches!(self, Self::P50 | Self::P99)
    }
}

/// All turns of a trial.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// What was compared.
    pub title: String,
    /// What was measured.
    pub what: String,
    /// What of it is compared.
    pub metrics: Vec<Metric>,
    /// Everybody's turns. All others are compared with the first.
    pub turns: Vec<Turns>,
    /// What measures this alone, as the arguments of the benchmark.
    #[serde(default)]
    pub command: String,
    /// What others did on the machine meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quiet: Option<Quiet>,
}

impl Outcome {
    /// Its name among all outcomes.
    pub fn name(&self) -> String {
        format!("{}: {}", self.title, self.what)
    }
}

/// A contender's turns.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Turns {
    /// Its name.
    pub contender: String,
    /// What its clients saw.
    pub summaries: Vec<Summary>,
    /// That its traffic took its way.
    pub evidence: Vec<Evidence>,
}

impl Turns {
    /// Whether this is a way of Penstock's.
    pub fn is_ours(&self) -> bool {
        self.contender.starts_with("Penstock")
    }

    /// Which of kube-proxy's modes this is, if it is one.
    pub fn mode(&self) -> Option<&str> {
        let (proxy, mode) = self.contender.rsplit_once(", ")?;
        proxy.starts_with("kube-proxy").then_some(mode)
    }

    /// The median of a metric.
    pub fn median(&self, metric: Metric) -> Median {
        Median::of(&self.values(metric))
    }

    fn values(&self, metric: Metric) -> Vec<f64> {
        let summaries = self.summaries.iter();
        summaries.map(|summary| metric.of(summary)).collect()
    }

    /// The ratio to another's, round by round.
    pub fn ratio(&self, to: &Self, metric: Metric) -> Median {
        let (ours, theirs) = (self.values(metric), to.values(metric));
        let ratios = ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs);
        Median::of(&ratios.collect::<Vec<_>>())
    }
}

/// In which order who takes its turn: forwards and backwards, and each begins as often as others, so
/// that nobody always comes after the same.
pub fn order<'a, A, B>(
    contenders: &'a [A],
    turns: &'a mut [B],
    round: usize,
) -> Vec<(&'a A, &'a mut B)> {
    let mut order: Vec<_> = contenders.iter().zip(turns).collect();
    order.rotate_left(round / 2 % contenders.len().max(1));
    if round % 2 == 1 {
        order.reverse();
    }
    order
}

/// Measures some trials of some contenders, of which the first is what the others are compared with.
pub fn take(
    title: &str,
    contenders: &[Contender],
    trials: &[Trial],
    effort: &Effort,
    keeper: &mut Keeper,
) -> Result<()> {
    let contenders: Vec<&Contender> = contenders
        .iter()
        .filter(|contender| effort.names(&contender.name))
        .collect();
    if contenders.is_empty() {
        return Ok(());
    }
    for trial in effort.chosen(trials) {
        let missing = trial
            .workload
            .program()
            .filter(|program| !is_there(program))
            .map(|program| format!("{program} is not there (package {program})"));
        if !keeper.has(&format!("all trials of {}", trial.name()), missing) {
            continue;
        }
        let watch = Watch::begin(machine::NOBODY);
        let before: Vec<Vec<u64>> = contenders
            .iter()
            .map(|contender| contender.witnesses())
            .collect::<Result<_>>()?;
        let mut summaries: Vec<Vec<Summary>> = vec![Vec::new(); contenders.len()];
        for round in 0..effort.rounds {
            for (contender, summaries) in order(&contenders, &mut summaries, round) {
                summaries.push(contender.turn(trial, effort)?);
            }
        }
        let mut turns = Vec::new();
        for ((contender, summaries), before) in contenders.iter().zip(summaries).zip(&before) {
            turns.push(Turns {
                contender: contender.name.clone(),
                evidence: contender.evidence(before, trial.workload, &summaries)?,
                summaries,
            });
        }
        let outcome = Outcome {
            title: title.to_owned(),
            what: trial.name(),
            metrics: Metric::known(trial.metrics(), &turns),
            turns,
            command: effort.to_repeat(Some(&trial.name())),
            quiet: Some(watch.end()),
        };
        keeper.keep(outcome)?;
    }
    Ok(())
}

#[cfg(test)]
impl Outcome {
    /// One in which each contender had the same in six rounds.
    pub fn of(title: &str, what: &str, metric: Metric, medians: &[(&str, u64)]) -> Self {
        let turns = |(contender, value): &(&str, u64)| Turns {
            contender: (*contender).to_owned(),
            summaries: vec![
                Summary {
                    p50: *value,
                    per_second: *value as f64,
                    ..Summary::default()
                };
                crate::figures::LEAST
            ],
            evidence: Vec::new(),
        };
        Self {
            title: title.to_owned(),
            what: what.to_owned(),
            metrics: vec![metric],
            turns: medians.iter().map(turns).collect(),
            command: "this".to_owned(),
            quiet: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn orders(contenders: &[usize]) -> Vec<Vec<usize>> {
        let rounds = 0..2 * contenders.len();
        let mut turns = vec![(); contenders.len()];
        rounds
            .map(|round| {
                let order = order(contenders, &mut turns, round);
                order
                    .into_iter()
                    .map(|(contender, ())| *contender)
                    .collect()
            })
            .collect()
    }

    #[test]
    fn everybody_begins_as_often() {
        for count in 2..6 {
            let contenders: Vec<usize> = (0..count).collect();
            let orders = orders(&contenders);
            for contender in &contenders {
                let begins = orders
                    .iter()
                    .filter(|order| order.first() == Some(contender));
                assert_eq!(begins.count(), 2, "{orders:?}");
                let ends = orders
                    .iter()
                    .filter(|order| order.last() == Some(contender));
                assert_eq!(ends.count(), 2, "{orders:?}");
            }
        }
    }

    fn effort(only: Option<&str>, is_brief: bool) -> Effort {
        Effort {
            rounds: 6,
            turn_ms: 50,
            warm_up_ms: 10,
            only: only.map(str::to_owned).into_iter().collect(),
            contenders: Vec::new(),
            is_brief,
            command: "services --services 5".to_owned(),
        }
    }

    #[test]
    fn a_name_after_an_equals_sign_is_all_of_it() {
        let one = Trial::together(Workload::Connect);
        let (two, open) = (
            Trial::closed(Workload::Connect),
            Trial::open(Workload::Connect, 500),
        );
        let trials = [one, two, open];
        let chosen = |only| effort(only, false).chosen(&trials).len();
        assert_eq!(chosen(None), 3);
        assert_eq!(chosen(Some("TCP connect, request, close")), 3);
        assert_eq!(chosen(Some("=TCP connect, request, close")), 1);
        assert_eq!(chosen(Some("=TCP connect")), 0);
        let only = ["500 a second", "=TCP connect, request, close"].map(str::to_owned);
        let both = Effort {
            only: only.to_vec(),
            ..effort(None, false)
        };
        assert_eq!(both.chosen(&trials).len(), 2);
    }

    #[test]
    fn a_trial_can_be_repeated_alone() {
        let name = Trial::together(Workload::TcpRr).name();
        let command = effort(None, true).to_repeat(Some(&name));
        let expected = "services --services 5 --only '=TCP request and response, one processor for both' \
                        --rounds 6 --turn-ms 50 --warm-up-ms 10";
        assert_eq!(command, expected);
        assert_eq!(Effort::naming(&[1, 2], &[1, 2]), "");
        assert_eq!(Effort::naming(&[2, 3], &[1, 2, 3]), " --ways 2,3");
    }

    #[test]
    fn what_names_nothing_is_refused_with_what_there_is_to_name() {
        let names = ["a trial", "another"].map(str::to_owned);
        let contenders = ["Penstock", "kube-proxy's rules, nftables"].map(str::to_owned);
        let check = |only, wanted: &[&str]| {
            let effort = Effort {
                contenders: wanted.iter().map(|name| (*name).to_owned()).collect(),
                ..effort(only, false)
            };
            let checked = effort.check(&names, &contenders);
            (
                checked.map_err(|error| error.to_string()),
                effort.concerns(&names, &contenders),
            )
        };
        assert_eq!(check(Some("trial"), &["Penstock", "rules"]), (Ok(()), true));
        assert_eq!(check(None, &[]), (Ok(()), true));
        let (error, concerns) = check(Some("=trial"), &[]);
        let error = error.unwrap_err();
        assert!(
            error.contains("--only =trial:") && error.contains("\n  another"),
            "{error}"
        );
        assert!(!concerns);
        // Each of them has to be something, or somebody.
        let only = ["trial", "nothing"].map(str::to_owned);
        let effort = Effort {
            only: only.to_vec(),
            ..effort(None, false)
        };
        let error = effort.check(&names, &contenders).unwrap_err();
        assert!(error.to_string().contains("--only nothing:"), "{error}");
        let (error, _) = check(None, &["Penstock", "nobody's"]);
        let error = error.unwrap_err();
        assert!(error.contains("--contender \"nobody's\":"), "{error}");
        assert!(error.contains("kube-proxy's rules, nftables"), "{error}");
        assert!(!check(None, &["nobody"]).1);
    }

    #[test]
    fn no_percentile_is_told_of_too_few_requests() {
        let turns = |counts: [u64; 2]| {
            let summaries = counts.map(|count| Summary {
                count,
                ..Summary::default()
            });
            [Turns {
                contender: String::new(),
                summaries: summaries.to_vec(),
                evidence: Vec::new(),
            }]
        };
        let known = |counts| Metric::known(&[Metric::P50, Metric::P99], &turns(counts));
        assert_eq!(known([200, 900]), [Metric::P50, Metric::P99]);
        assert_eq!(known([199, 900]), [Metric::P50]);
    }

    #[test]
    fn a_brief_run_leaves_out_what_takes_whole_seconds() {
        let trials = [
            Trial::together(Workload::Wrk),
            Trial::together(Workload::Iperf),
            Trial::together(Workload::Connect),
            Trial::streams(8),
        ];
        let names = |is_brief| {
            let effort = effort(None, is_brief);
            let chosen = effort.chosen(&trials).into_iter();
            chosen.map(|trial| trial.workload).collect::<Vec<_>>()
        };
        assert_eq!(names(true), [Workload::Connect, Workload::Stream]);
        assert_eq!(names(false).len(), 4);
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        let turns = |times: [u64; 6]| Turns {
            contender: String::new(),
            summaries: times
                .map(|p50| Summary {
                    p50,
                    ..Summary::default()
                })
                .to_vec(),
            evidence: Vec::new(),
        };
        // What drifts drifts for both: twice as long in every round.
        let (slow, fast) = (
            turns([20, 40, 80, 200, 600, 2_000]),
            turns([10, 20, 40, 100, 300, 1_000]),
        );
        let ratio = slow.ratio(&fast, Metric::P50);
        assert_eq!((ratio.low, ratio.value, ratio.high), (2.0, 2.0, 2.0));
    }
}
