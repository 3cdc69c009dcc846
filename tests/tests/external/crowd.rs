//! Many connections of one client, each of which must go on as it began.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use penstock_testbed::{Host, Process};
use serde_json::Value;

/// Connections of one client, held by a process.
pub struct Crowd {
    name: String,
    size: usize,
    process: Process,
}

impl Crowd {
    /// So many connections to these places in turns, each of which was answered.
    pub fn new(
        name: &str,
        host: &Host,
        protocol: &str,
        to: &[SocketAddr],
        size: usize,
    ) -> Result<Self> {
        let count = size.to_string();
        let to: Vec<String> = to.iter().map(ToString::to_string).collect();
        let mut arguments = vec!["crowd", protocol, "--count", &count];
        // A server may be slow to accept that many.
        arguments.extend(["--timeout-ms", "10000"]);
        arguments.extend(to.iter().map(String::as_str));
        let mut crowd = Self {
            name: format!("{name} by {protocol}"),
            size,
            process: host.traffic(&arguments)?,
        };
        crowd.was_answered().context("at the beginning")?;
        Ok(crowd)
    }

    /// Each connection was answered, by who answered it first, who saw the same client.
    fn was_answered(&mut self) -> Result<()> {
        let line = self.process.line().with_context(|| self.name.clone())?;
        let said: Value = serde_json::from_str(&line).with_context(|| line.clone())?;
        ensure!(said["answered"] == self.size, "{}: {line}", self.name);
        Ok(())
    }
}

/// Asks over every connection.
pub fn ask(crowds: &mut [Crowd], when: &str) -> Result<()> {
    for crowd in crowds.iter() {
        crowd.process.signal(Signal::SIGUSR1)?;
    }
    for crowd in crowds {
        crowd.was_answered().with_context(|| when.to_owned())?;
    }
    Ok(())
}
