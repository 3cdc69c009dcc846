//! Requests from outside that are at the end of their life where they are to go on to another node.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use penstock_testbed::{Host, eventually, require_kernel, text};

use crate::stage::{Pods, Stage};

#[test]
fn who_sends_what_goes_no_further_is_told() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    for pods in [Pods::Routed, Pods::Wired] {
        let stage = Stage::new(pods)?;
        let client = &stage.client;
        for settings in [
            "net.ipv4.ip_default_ttl=1",
            "net.ipv6.conf.eth0.hop_limit=1",
        ] {
            client.run("sysctl", &["-qw", settings])?;
        }
        let ways: &[&str] = match pods {
            Pods::Routed => &["snat"],
            Pods::Wired => &["snat", "tunnel", "dsr"],
        };
        for way in ways {
            stage.web(&[&stage.servers[1]], |service| {
                service.annotation("penstock.io/forwarding", way)
            })?;
            eventually("the way is what it is to be", || {
                let ports = stage.agents[0].show("services")?;
                let mut ports = ports.as_array().into_iter().flatten();
                ensure!(ports.all(|port| port["forwarding"] == *way), "{way}");
                Ok(())
            })?;
            let node = &stage.nodes[0].host;
            for (ip, counter) in [
                (node.ip4, "IcmpInTimeExcds"),
                (node.ip6, "Icmp6InTimeExcds"),
            ] {
                let before = told(client, counter)?;
                let to = SocketAddr::new(ip, 30_081).to_string();
                let lost = client.ask("udp", &to, &["--timeout-ms", "300"])?;
                let what = format!("{to}, {pods:?}, {way}: {lost}");
                assert_eq!(text(&lost, "error"), "operation would block", "{what}");
                assert!(told(client, counter)? > before, "{what}");
            }
        }
    }
    Ok(())
}

/// How often a host was told that something went no further.
fn told(host: &Host, counter: &str) -> Result<u64> {
    let text = host.run("nstat", &["-asz", counter])?;
    let line = text.lines().find(|line| line.starts_with(counter));
    let count = line.and_then(|line| line.split_whitespace().nth(1));
    count
        .and_then(|count| count.parse().ok())
        .with_context(|| text.clone())
}
