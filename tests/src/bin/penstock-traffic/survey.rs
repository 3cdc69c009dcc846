//! Many questions from one process: who answers at each of many addresses, and how it fails there.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::ask;

/// Questions that are asked at the same time: most of them wait for an answer that does not come.
const TASKS: usize = 32;

/// Failures after which the others would be more of the same.
const FAILURES: usize = 3;

/// What to ask.
struct Question {
    protocol: String,
    to: SocketAddr,
    times: usize,
    timeout: Duration,
}

/// What came of it.
#[derive(Default)]
struct Findings {
    /// Who answered, whom they say they were asked by, and who the asking socket says answered.
    answers: BTreeSet<[String; 3]>,
    errors: BTreeSet<String>,
}

/// Reads questions from a file and prints one line with what came of each, in their order.
pub fn run(file: &Path) -> Result<()> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    let questions: Vec<Value> = serde_json::from_str(&text).context("reading questions")?;
    let questions: Vec<Question> = questions.iter().map(question).collect::<Result<_>>()?;
    let next = AtomicUsize::new(0);
    let found = Mutex::new(vec![Value::Null; questions.len()]);
    std::thread::scope(|scope| {
        for _ in 0..TASKS {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(question) = questions.get(number) else {
                        break;
                    };
                    let Findings { answers, errors } = question.put();
                    let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(place) = found.get_mut(number) {
                        *place = json!({ "answers": answers, "errors": errors });
                    }
                }
            });
        }
    });
    let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!("{}", Value::from(found));
    Ok(())
}

fn question(value: &Value) -> Result<Question> {
    let text = |field: &str| value.get(field).and_then(Value::as_str);
    let number = |field: &str| value.get(field).and_then(Value::as_u64);
    let read = || {
        Some(Question {
            protocol: text("protocol")?.to_owned(),
            to: text("to")?.parse().ok()?,
            times: usize::try_from(number("times")?).ok()?,
            timeout: Duration::from_millis(number("timeout_ms")?),
        })
    };
    read().with_context(|| format!("{value} is no question"))
}

impl Question {
    /// Asks so many times, or until it is plain that nobody answers.
    fn put(&self) -> Findings {
        let mut found = Findings::default();
        let mut failures = 0;
        for _ in 0..self.times {
            match ask(&self.protocol, self.to, 1, 0, self.timeout) {
                Ok(answer) => {
                    let field = |name: &str| {
                        let text = answer.get(name).and_then(Value::as_str);
                        text.unwrap_or_default().to_owned()
                    };
                    let source = field("source").parse();
                    let source = source.map(|source: SocketAddr| source.ip().to_string());
                    let answer = [field("server"), source.unwrap_or_default(), field("peer")];
                    found.answers.insert(answer);
                }
                Err(error) => {
                    found.errors.insert(error.kind().to_string());
                    failures += 1;
                    // Whoever waited once in vain has waited enough.
                    if found.answers.is_empty() || failures == FAILURES {
                        break;
                    }
                }
            }
        }
        found
    }
}
