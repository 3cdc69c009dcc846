//! Many questions of one host at once.

use std::{collections::BTreeSet, fs, net::SocketAddr, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::host::Host;

/// What to ask.
#[derive(Clone, Debug)]
pub struct Question {
    /// One of [`crate::PROTOCOLS`].
    pub protocol: &'static str,
    /// Where.
    pub to: SocketAddr,
    /// How often, unless nobody answers the first time.
    pub times: usize,
    /// How long to wait for an answer.
    pub timeout: Duration,
}

/// An answer to a question.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Answer {
    /// Who answered.
    pub server: String,
    /// The address that it says it was asked from.
    pub source: String,
    /// The address that the asking socket says answered.
    pub peer: String,
}

/// What came of a question: what was answered, and how it failed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Different answers.
    pub answers: BTreeSet<Answer>,
    /// Errors' names.
    pub errors: BTreeSet<String>,
}

impl Host {
    /// Puts all questions from one process; what came of each, in their order. `folder` is for the
    /// questions' file.
    pub fn survey(&self, folder: &Path, questions: &[Question]) -> Result<Vec<Findings>> {
        let list: Vec<Value> = questions
            .iter()
            .map(|question| {
                json!({
                    "protocol": question.protocol,
                    "to": question.to.to_string(),
                    "times": question.times,
                    "timeout_ms": question.timeout.as_millis() as u64,
                })
            })
            .collect();
        let file = tempfile::NamedTempFile::new_in(folder).context("making a file")?;
        fs::write(file.path(), Value::from(list).to_string()).context("writing questions")?;
        let path = file.path().to_str().context("a file's name is no text")?;
        let text = self.run_traffic(&["survey", path])?;
        let found: Vec<Value> =
            serde_json::from_str(&text).with_context(|| format!("{text:?} is no list"))?;
        ensure!(found.len() == questions.len(), "questions were left out");
        found.iter().map(findings).collect()
    }
}

fn findings(value: &Value) -> Result<Findings> {
    let list = |value: &Value, field: &str| -> Result<Vec<Value>> {
        let list = value.get(field).and_then(Value::as_array);
        list.cloned()
            .with_context(|| format!("{value} has no {field}"))
    };
    let word = |value: &Value| value.as_str().map(str::to_owned);
    let answer = |words: &Value| {
        let words: Vec<String> = words.as_array()?.iter().filter_map(word).collect();
        let [server, source, peer] = <[String; 3]>::try_from(words).ok()?;
        Some(Answer {
            server,
            source,
            peer,
        })
    };
    Ok(Findings {
        answers: list(value, "answers")?.iter().filter_map(answer).collect(),
        errors: list(value, "errors")?.iter().filter_map(word).collect(),
    })
}
