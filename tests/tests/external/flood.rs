//! Frames that a bridge shows to everybody.

use std::net::SocketAddr;

use anyhow::Result;
use penstock_testbed::require_kernel;

use crate::stage::{BALANCER, Pods, Stage, ask, failure};

#[test]
fn frames_for_another_host_are_left_alone() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    for xdp in ["off", "generic"] {
        left_alone(xdp)?;
    }
    Ok(())
}

fn left_alone(xdp: &str) -> Result<()> {
    let stage = Stage::with(Pods::Routed, &["--xdp", xdp])?;
    let [_, there] = &stage.servers;
    stage.client.without_checksum_offload("eth0")?;
    stage.web(&[there], |web| web)?;
    let gateways = ["172.31.0.250", "fd00:31::fa"];
    for (ip, gateway) in BALANCER.into_iter().zip(gateways) {
        let to = SocketAddr::new(ip.parse()?, 80);
        ask(&stage.client, "tcp", to)?;
        // Nobody has this Ethernet address, so the bridge sends to all of its ports.
        let ethernet = "02:00:00:00:00:fe";
        let neighbour = [
            "neigh",
            "add",
            gateway,
            "lladdr",
            ethernet,
            "dev",
            "eth0",
            "nud",
            "permanent",
        ];
        stage.client.run("ip", &neighbour)?;
        stage
            .client
            .run("ip", &["route", "replace", ip, "via", gateway])?;
        let before = stage.agents[0].count("external_request")?;
        assert_eq!(failure(&stage.client, "tcp", to)?, "timed out", "{to}");
        assert_eq!(
            failure(&stage.client, "udp", to)?,
            "operation would block",
            "{to}"
        );
        assert_eq!(stage.agents[0].count("external_request")?, before, "{to}");
    }
    Ok(())
}
