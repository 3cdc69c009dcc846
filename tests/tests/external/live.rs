//! Ten thousand live connections, by every way that there is, beside an agent that dies and comes
//! back and a service that changes how it spreads clients: none of them may notice.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use penstock_common::Algorithm;
use penstock_testbed::{PROTOCOLS, eventually, require_kernel};

use crate::{
    crowd::{Crowd, ask},
    stage::{Pods, Stage},
};

/// Connections of one client by one protocol.
const CROWD: usize = 1_120;

#[test]
fn ten_thousand_connections_outlive_the_agent_and_an_algorithm() -> Result<()> {
    outlive("off")
}

#[test]
fn ten_thousand_connections_outlive_the_agent_and_an_algorithm_past_xdp() -> Result<()> {
    outlive("generic")
}

fn outlive(xdp: &str) -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut stage = Stage::with(Pods::Wired, &["--xdp", xdp])?;
    stage.client.without_checksum_offload("eth0")?;
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
        crowds.push(Crowd::new("sockets", by_socket, protocol, &cluster, CROWD)?);
        crowds.push(Crowd::new(
            "packets", &by_packet, protocol, &cluster, CROWD,
        )?);
        crowds.push(Crowd::new(
            "outside",
            &stage.client,
            protocol,
            outside,
            CROWD,
        )?);
    }
    ensure!(CROWD * crowds.len() >= 10_000);
    let agent = &mut stage.agents[0];
    for counter in ["socket_connect", "packet_request", "external_request"] {
        let count = agent.count(counter)?;
        ensure!(count >= CROWD as u64, "{count} of {counter}");
    }

    let by_xdp = agent.count("external_xdp")?;
    assert_eq!(by_xdp > CROWD as u64, xdp != "off", "{by_xdp}");

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
