//! For how long clients outside are kept with a backend.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use penstock_testbed::{PROTOCOLS, eventually, require_kernel};
use serde_json::json;

use crate::stage::{Pods, Stage, ask};

/// For how long a client may be away.
const TIMEOUT: Duration = Duration::from_secs(8);
/// Less than that, as near as a busy machine allows.
const SHORTER: Duration = Duration::from_secs(6);
/// More than that: whole seconds are counted.
const LONGER: Duration = Duration::from_secs(9);
/// How often to try to be fast enough.
const TRIES: usize = 6;

#[test]
fn clients_of_node_ports_are_kept_until_they_were_away_for_too_long() -> Result<()> {
    kept(&[])
}

#[test]
fn clients_of_node_ports_are_kept_past_xdp() -> Result<()> {
    kept(&["--xdp", "generic"])
}

fn kept(options: &[&str]) -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::with(Pods::Routed, options)?;
    stage.client.without_checksum_offload("eth0")?;
    let [here, there] = &stage.servers;
    // Whom a client is not bound to has its turn.
    stage.web(&[here, there], |web| {
        let timeout = json!({ "clientIP": { "timeoutSeconds": TIMEOUT.as_secs() } });
        web.annotation("penstock.io/algorithm", "round-robin")
            .set("sessionAffinity", "ClientIP")
            .set("sessionAffinityConfig", timeout)
    })?;
    let servers = || -> Result<Vec<String>> {
        let mut servers = Vec::new();
        // A connected socket's datagrams are those of one that is not.
        for protocol in &PROTOCOLS[..2] {
            for to in stage.addresses(protocol).into_iter().take(2) {
                servers.push(ask(&stage.client, protocol, to)?.server);
            }
        }
        Ok(servers)
    };
    // Neighbours are found first.
    eventually("all answer", &servers)?;
    for _ in 0..TRIES {
        let began = Instant::now();
        let first = servers()?;
        std::thread::sleep(SHORTER.saturating_sub(began.elapsed()));
        let second = servers()?;
        if began.elapsed() >= TIMEOUT {
            continue;
        }
        assert_eq!(second, first, "a client comes again within the timeout");
        // It is away since it came again.
        std::thread::sleep(LONGER);
        for (now, before) in servers()?.iter().zip(&second) {
            ensure!(now != before, "{before} is kept for ever");
        }
        return Ok(());
    }
    anyhow::bail!("asking four times took longer than {TIMEOUT:?} each time");
}
