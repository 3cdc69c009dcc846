//! Asks on both sides, again where they differ, and says in a table where they do.

use std::{
    collections::BTreeSet,
    fmt::Write,
    time::{Duration, Instant},
};

use anyhow::Result;

use crate::{
    cases::Case,
    differences::{self, Difference, expected},
    outcome::{Effort, Outcome, outcomes},
    service::Service,
    stage::Stage,
};

/// First a look; then, where it showed something, better ones. Who was too slow, or was left out by
/// chance, shows up: over IPv6 a client of kube-proxy's is refused only when it asks again, after a
/// second.
const EFFORTS: [Effort; 3] = [
    Effort {
        times: 6,
        timeout: Duration::from_millis(400),
    },
    Effort {
        times: 25,
        timeout: Duration::from_millis(2_500),
    },
    Effort {
        times: 50,
        timeout: Duration::from_millis(5_000),
    },
];

/// What came of all cases.
pub struct Comparison<'a> {
    services: &'a [Service],
    cases: &'a [Case],
    ours: Vec<Outcome>,
    theirs: Vec<Outcome>,
}

impl<'a> Comparison<'a> {
    /// Puts all questions.
    pub fn make(stage: &Stage, services: &'a [Service], cases: &'a [Case]) -> Result<Self> {
        let mut comparison = Self {
            services,
            cases,
            ours: vec![Outcome::default(); cases.len()],
            theirs: vec![Outcome::default(); cases.len()],
        };
        let mut numbers: Vec<usize> = (0..cases.len()).collect();
        for effort in EFFORTS {
            let began = Instant::now();
            comparison.ask(stage, &numbers, effort)?;
            let asked = numbers.len();
            numbers = comparison.suspects();
            eprintln!(
                "{asked} cases in {:?}: {} to look at",
                began.elapsed(),
                numbers.len()
            );
            if numbers.is_empty() {
                break;
            }
        }
        Ok(comparison)
    }

    fn ask(&mut self, stage: &Stage, numbers: &[usize], effort: Effort) -> Result<()> {
        let cases: Vec<Case> = numbers.iter().map(|number| self.cases[*number]).collect();
        for (side, all) in stage.sides.iter().zip([&mut self.ours, &mut self.theirs]) {
            let outcomes = outcomes(stage, side, self.services, &cases, effort)?;
            for (number, outcome) in numbers.iter().zip(outcomes) {
                all[*number] = outcome;
            }
        }
        Ok(())
    }

    /// Cases that are not as expected, and those that they were judged by.
    fn suspects(&self) -> Vec<usize> {
        let wrong = (0..self.cases.len()).filter(|number| !self.is_expected(*number));
        let all = wrong.flat_map(|number| [number, self.judge(number)]);
        all.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// The case whose outcome says what may come of this one: without affinity, which chooses one
    /// of many.
    fn judge(&self, number: usize) -> usize {
        let case = self.cases[number];
        if !self.services[case.service].affinity {
            return number;
        }
        let same = Case {
            service: case.service + 1,
            ..case
        };
        let mut cases = self.cases.iter();
        // Only every few services are asked at undefined ports.
        cases.position(|case| *case == same).unwrap_or(number)
    }

    fn expected(&self, number: usize) -> (Outcome, Vec<Difference>) {
        let judge = self.judge(number);
        let case = &self.cases[judge];
        expected(case, &self.services[case.service], &self.theirs[judge])
    }

    fn is_expected(&self, number: usize) -> bool {
        let (expected, why) = self.expected(number);
        let judge = self.judge(number);
        if judge == number {
            return self.ours[number] == expected;
        }
        let case = &self.cases[number];
        let one = if differences::is_affinity_shared(case, &self.services[case.service]) {
            is_among
        } else {
            is_one_of
        };
        // Where kube-proxy answers otherwise, that says nothing of affinity.
        one(&self.ours[number], &expected)
            && (!why.iter().all(|difference| difference.is_of_origin())
                || one(&self.theirs[number], &self.theirs[judge]))
    }

    /// The differences that were met.
    pub fn met(&self) -> BTreeSet<Difference> {
        let all = (0..self.cases.len()).flat_map(|number| self.expected(number).1);
        all.collect()
    }

    /// A table of what was not as expected; empty if all was.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let mut last = None;
        for number in (0..self.cases.len()).filter(|number| !self.is_expected(*number)) {
            let case = &self.cases[number];
            if last != Some(case.service) {
                last = Some(case.service);
                let _ = writeln!(text, "\n{}", self.services[case.service].text());
            }
            let (expected, why) = self.expected(number);
            let _ = writeln!(
                text,
                "  {case} | Penstock: {} | kube-proxy: {} | expected: {expected} {why:?}",
                self.ours[number], self.theirs[number]
            );
        }
        text
    }
}

/// Whether an outcome has nothing that another one has not.
fn is_among(one: &Outcome, all: &Outcome) -> bool {
    one.failures == all.failures
        && one.is_echoed == all.is_echoed
        && one.answers.is_empty() == all.answers.is_empty()
        && one.answers.is_subset(&all.answers)
}

/// The same, and one answer only.
fn is_one_of(one: &Outcome, all: &Outcome) -> bool {
    is_among(one, all) && one.answers.len() <= 1
}
