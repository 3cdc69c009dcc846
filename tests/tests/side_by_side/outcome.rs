//! What came of a question, in words that mean the same on both sides.

use std::{collections::BTreeSet, fmt, time::Duration};

use anyhow::{Context, Result};
use penstock_testbed::{Findings, Host, Question};

use crate::{
    cases::{Case, Client, ECHO},
    service::{Role, Service},
    side::Side,
    stage::Stage,
};

/// Whose address a backend saw.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The client's.
    Client,
    /// The asked node's.
    Node,
    /// Another one.
    Other(String),
}

/// How a question failed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    Refused,
    /// Nothing came back.
    Silence,
    Other(String),
}

/// What came of a question.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Who answered, and whom they were asked by.
    pub answers: BTreeSet<(Role, Origin)>,
    pub failures: BTreeSet<Failure>,
    /// Whether the address itself replied to an echo.
    pub is_echoed: bool,
}

impl Outcome {
    fn new(found: &Findings, case: &Case, service: &Service, side: &Side, client: &Host) -> Self {
        let mut outcome = Self::default();
        let to = case.to(service, side).to_string();
        for answer in &found.answers {
            match side.role(&answer.server) {
                _ if case.protocol == ECHO
                    && answer.peer == case.to(service, side).ip().to_string() =>
                {
                    outcome.is_echoed = true;
                }
                Some(role) if answer.peer == to => {
                    let origin = origin(&answer.source, side, client);
                    outcome.answers.insert((role, origin));
                }
                _ => {
                    let said = format!("{} answered as {}", answer.server, answer.peer);
                    outcome.failures.insert(Failure::Other(said));
                }
            }
        }
        for error in &found.errors {
            outcome.failures.insert(match error.as_str() {
                "connection refused" => Failure::Refused,
                // A datagram's answer that does not come is a read that would have to wait.
                "timed out" | "operation would block" => Failure::Silence,
                _ => Failure::Other(error.clone()),
            });
        }
        outcome
    }
}

fn origin(source: &str, side: &Side, client: &Host) -> Origin {
    let is = |host: &Host| {
        [host.ip4, host.ip6]
            .iter()
            .any(|ip| ip.to_string() == source)
    };
    if is(client) {
        Origin::Client
    } else if is(&side.node.host) {
        Origin::Node
    } else {
        Origin::Other(source.to_owned())
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let answers = self.answers.iter().map(|(role, origin)| match origin {
            Origin::Client => format!("{role:?}"),
            Origin::Node => format!("{role:?} by node"),
            Origin::Other(source) => format!("{role:?} by {source}"),
        });
        let failures = self.failures.iter().map(|failure| match failure {
            Failure::Other(text) => text.clone(),
            known => format!("{known:?}").to_lowercase(),
        });
        let all: Vec<String> = answers.chain(failures).collect();
        let echo = self.is_echoed.then(|| "echoed".to_owned());
        let all: Vec<String> = all.into_iter().chain(echo).collect();
        f.write_str(&all.join(", "))
    }
}

/// How hard to look.
#[derive(Clone, Copy)]
pub struct Effort {
    /// Questions for each endpoint that may answer.
    pub times: usize,
    /// How long to wait for an answer.
    pub timeout: Duration,
}

/// Asks on one side; what came of each case, in their order.
pub fn outcomes(
    stage: &Stage,
    side: &Side,
    services: &[Service],
    cases: &[Case],
    effort: Effort,
) -> Result<Vec<Outcome>> {
    let mut all = vec![Outcome::default(); cases.len()];
    for client in Client::ALL {
        let numbers: Vec<usize> = (0..cases.len())
            .filter(|number| cases[*number].client == client)
            .collect();
        let host = client.host(side);
        let questions: Vec<Question> = numbers
            .iter()
            .map(|number| {
                let case = &cases[*number];
                let service = &services[case.service];
                Question {
                    protocol: case.protocol,
                    to: case.to(service, side),
                    times: effort.times * service.endpoints.len().max(1),
                    timeout: effort.timeout,
                }
            })
            .collect();
        let found = host.survey(stage.folder(), &questions);
        let found = found.with_context(|| format!("{client:?} of {}", side.node.name()))?;
        for (number, found) in numbers.into_iter().zip(&found) {
            let case = &cases[number];
            all[number] = Outcome::new(found, case, &services[case.service], side, &host);
        }
    }
    Ok(all)
}
