//! External addresses as pods and processes of a node use them.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::Result;
use penstock_testbed::{PROTOCOLS, require_kernel, text};

use crate::stage::{Pods, Stage, ask};

#[test]
fn pods_and_processes_use_external_addresses_too() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    for pods in [Pods::Routed, Pods::Wired] {
        let stage = Stage::new(pods)?;
        let [here, there] = &stage.servers;
        stage.web(&[here, there], |web| web)?;
        stage.agents[0].wait_for_hooks(&[here, &stage.guests[0]])?;
        let all: BTreeSet<String> = [here.host.name.clone(), there.host.name.clone()].into();
        let node = &stage.nodes[0].host;
        for protocol in PROTOCOLS {
            // Not the same pod on both ways: its direct connections and its translated flows could
            // meet at one backend from one port.
            for from in [
                &here.host,
                &stage.guests[0].host.without_socket_hooks(),
                node,
            ] {
                for to in stage.addresses(protocol) {
                    let mut seen = BTreeSet::new();
                    for _ in 0..60 {
                        seen.insert(ask(from, protocol, to)?.server);
                    }
                    assert_eq!(seen, all, "{protocol} {to} from {}", from.name);
                }
            }
            // A pod's loopback address is its own.
            let number = stage.addresses(protocol)[0].port();
            for to in [
                SocketAddr::new(Ipv4Addr::LOCALHOST.into(), number),
                SocketAddr::new(Ipv6Addr::LOCALHOST.into(), number),
            ] {
                assert!(all.contains(&ask(node, protocol, to)?.server), "{to}");
                if protocol == "tcp" {
                    assert!(ask(&here.host, protocol, to).is_err(), "{to}");
                }
                // So is no address at all.
                let nowhere = match to {
                    SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                    SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
                };
                let nowhere = SocketAddr::new(nowhere, number).to_string();
                let answer = node.ask(protocol, &nowhere, &[])?;
                assert!(all.contains(text(&answer, "server")), "{answer}");
                assert_eq!(text(&answer, "peer"), to.to_string());
                if protocol == "tcp" {
                    let answer = here.host.ask(protocol, &nowhere, &[])?;
                    assert_eq!(text(&answer, "error"), "connection refused");
                }
            }
        }
    }
    Ok(())
}
