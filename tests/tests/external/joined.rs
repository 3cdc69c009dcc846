//! Datagrams that a client sends in one piece (UDP_SEGMENT) are as many on their way to backends and arrive as
//! they were meant.

use anyhow::{Context, Result, ensure};
use penstock_common::Forwarding;
use penstock_testbed::{eventually, require_kernel};

use crate::stage::{Pods, Stage, ask};

/// How many are joined, and how long each is.
const COUNT: usize = 16;
const SIZE: usize = 1_200;

/// Sends some to a backend of the same node, and to one of another.
fn arrive(stage: &Stage, forwarding: Forwarding) -> Result<()> {
    for backend in &stage.servers {
        let way = ("penstock.io/forwarding", forwarding.label());
        stage.web(&[backend], |web| web.annotation(way.0, way.1))?;
        for to in stage.addresses("udp") {
            let what = || format!("{to}, {forwarding:?}, {}", backend.host.name);
            // Neighbours are found first, and what is asked of the service before is answered.
            eventually("the backend answers", || {
                let answer = ask(&stage.client, "udp", to)?;
                ensure!(answer.server == backend.host.name, "{answer:?}");
                Ok(())
            })
            .with_context(what)?;
            let reached = stage.client.burst(&to.to_string(), COUNT, SIZE)?;
            assert_eq!(reached, [SIZE; COUNT], "{}", what());
        }
        assert_eq!(backend.checksum_errors()?, 0);
    }
    assert_eq!(stage.client.checksum_errors()?, 0);
    Ok(())
}

#[test]
fn joined_datagrams_reach_pods_that_the_kernel_routes_to() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    arrive(&Stage::new(Pods::Routed)?, Forwarding::Snat)
}

#[test]
fn joined_datagrams_reach_pods_past_xdp() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::with(Pods::Routed, &["--xdp", "generic"])?;
    stage.client.without_checksum_offload("eth0")?;
    arrive(&stage, Forwarding::Snat)
}

#[test]
fn joined_datagrams_reach_pods_behind_the_overlay() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::new(Pods::Wired)?;
    for forwarding in Forwarding::ALL {
        arrive(&stage, forwarding)?;
    }
    Ok(())
}
