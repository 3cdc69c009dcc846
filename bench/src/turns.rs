//! Contenders take turns: whatever drifts meanwhile, drifts for all.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::{
    contender::{Contender, Evidence},
    figures::Median,
    load::{Summary, Workload, is_there},
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
    /// Only trials whose names hold this are done.
    pub only: Option<String>,
    /// Only contenders whose names hold one of these take turns; all, if there are none.
    pub contenders: Vec<String>,
}

impl Effort {
    fn holds(&self, trial: &Trial) -> bool {
        let only = self.only.as_deref();
        only.is_none_or(|only| trial.name().contains(only))
    }

    /// Whether a contender of this name takes turns.
    pub fn names(&self, contender: &str) -> bool {
        let mut wanted = self.contenders.iter();
        self.contenders.is_empty() || wanted.any(|wanted| contender.contains(wanted))
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

    /// What of it is compared.
    pub fn metrics(&self) -> &'static [Metric] {
        match (self.workload, self.processors) {
            (Workload::Stream | Workload::Iperf, _) => &[Metric::Bits],
            (Workload::Wrk, _) => &[Metric::Rate],
            (Workload::UdpPackets, _) => &[Metric::Packets],
            (_, Processors::One) => &[Metric::Rate, Metric::P50],
            (_, Processors::Two) => &[Metric::P50, Metric::P99],
        }
    }
}

/// A number of a turn's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// The median time.
    P50,
    /// The time that one of a hundred exceeds.
    P99,
    /// Requests that were answered in a second.
    Rate,
    /// Packets that came through in a second.
    Packets,
    /// Bits that arrived in a second.
    Bits,
}

impl Metric {
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
) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    let contenders: Vec<&Contender> = contenders
        .iter()
        .filter(|contender| effort.names(&contender.name))
        .collect();
    for trial in trials.iter().filter(|trial| effort.holds(trial)) {
        let missing = trial
            .workload
            .program()
            .filter(|program| !is_there(program));
        if let Some(program) = missing {
            println!(
                "WARNING: there is no {program}: {} is left out",
                trial.name()
            );
            continue;
        }
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
            metrics: trial.metrics().to_vec(),
            turns,
        };
        crate::report::print(&outcome);
        outcomes.push(outcome);
    }
    Ok(outcomes)
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
