//! Ten thousand live connections, by every way that there is, beside an agent that dies and comes
//! back and a service that changes how it spreads clients: none of them may notice.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use penstock_common::Algorithm;
use penstock_testbed::{Host, PROTOCOLS, Process, eventually, require_kernel};
use serde_json::Value;

use crate::stage::{Pods, Stage};

/// Connections of one client by one protocol.
const CROWD: usize = 1_120;

/// Connections of one client, held by a process.
struct Crowd {
    name: String,
    process: Process,
}

impl Crowd {
    fn new(name: &str, host: &Host, protocol: &str, to: &[SocketAddr]) -> Result<Self> {
        let count = CROWD.to_string();
        let to: Vec<String> = to.iter().map(ToString::to_string).collect();
        let mut arguments = vec!["crowd", protocol, "--count", &count];
        // A server may be slow to accept that many.
        arguments.extend(["--timeout-ms", "10000"]);
        arguments.extend(to.iter().map(String::as_str));
        let mut crowd = Self {
            name: format!("{name} by {protocol}"),
            process: host.traffic(&arguments)?,
        };
        crowd.was_answered().context("at the beginning")?;
        Ok(crowd)
    }

    /// Each connection was answered, by who answered it first, who saw the same client.
    fn was_answered(&mut self) -> Result<()> {
        let line = self.process.line().with_context(|| self.name.clone())?;
        let said: Value = serde_json::from_str(&line).with_context(|| line.clone())?;
        ensure!(said["answered"] == CROWD, "{}: {line}", self.name);
        Ok(())
    }
}

/// Asks over every connection.
fn ask(crowds: &mut [Crowd], when: &str) -> Result<()> {
    for crowd in crowds.iter() {
        crowd.process.signal(Signal::SIGUSR1)?;
    }
    for crowd in crowds {
        crowd.was_answered().with_context(|| when.to_owned())?;
    }
    Ok(())
}

#[test]
fn ten_thousand_connections_outlive_the_agent_and_an_algorithm() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut stage = Stage::new(Pods::Wired)?;
    let pods = stage.servers.clone();
    let pods = [&pods[0], &pods[1]];
    stage.web(&pods, |web| web)?;
    let cluster: [SocketAddr; 2] = ["10.96.0.10:80".parse()?, "[fd00:96::a]:80".parse()?];
    let mut crowds = Vec::new();
    for protocol in PROTOCOLS {
        // Pods of their own: nobody sees what a pod sends to other pods past its services, so that
        // it may have a port twice that one of its flows has.
        let by_socket = &stage.guests[0].host;
        let by_packet = stage.guests[1].host.without_socket_hooks();
        // The first two are the node's own.
        let outside = &stage.addresses(protocol)[..2];
        crowds.push(Crowd::new("sockets", by_socket, protocol, &cluster)?);
        crowds.push(Crowd::new("packets", &by_packet, protocol, &cluster)?);
        crowds.push(Crowd::new("outside", &stage.client, protocol, outside)?);
    }
    ensure!(CROWD * crowds.len() >= 10_000);
    let agent = &mut stage.agents[0];
    for counter in ["socket_connect", "packet_request", "external_request"] {
        let count = agent.count(counter)?;
        ensure!(count >= CROWD as u64, "{count} of {counter}");
    }

    agent.kill();
    ask(&mut crowds, "without an agent")?;
    let agent = &mut stage.agents[0];
    agent.restart()?;
    agent.wait_until_settled()?;
    ask(&mut crowds, "with another agent")?;

    for algorithm in [Algorithm::Maglev, Algorithm::RoundRobin] {
        let label = algorithm.label();
        stage.web(&pods, |web| web.annotation("penstock.io/algorithm", label))?;
        eventually("every port has the algorithm", || {
            let ports = stage.agents[0].show("services")?;
            let all = ports.as_array().context("a list")?;
            let is_done = all.iter().all(|port| port["algorithm"] == label);
            ensure!(is_done && !all.is_empty(), "{ports}");
            Ok(())
        })?;
        ask(&mut crowds, label)?;
    }
    for counter in [
        "flow_evicted",
        "flow_table_full",
        "no_source_port",
        "flow_race",
    ] {
        ensure!(stage.agents[0].count(counter)? == 0, "{counter}");
    }
    Ok(())
}
