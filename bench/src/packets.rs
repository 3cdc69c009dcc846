//! What one processor forwards: packets of many flows to a node port whose backend is on another node,
//! for Penstock at XDP and at TC, for kube-proxy, and for the kernel that routes to the pod.
//!
//! Only the measured node works. Packets are made at the other end of its link ([`crate::load`]), and what
//! it sends is counted and dropped there.

use std::path::PathBuf;

use anyhow::{Context, Result};
use penstock_testbed::{Host, Testbed, patiently};
use serde_json::Value;

use crate::{
    contender::{self, Expected, PORT},
    load::Summary,
    outside::{Backend, Lane, UPLINK, Way},
    report,
    services::kube_proxy,
    turns::{Effort, Metric, Outcome, Turns, order},
};

/// In which order they stand: the others are compared with kube-proxy.
pub const WAYS: [Way; 5] = [Way::Iptables, Way::Nftables, Way::Tc, Way::Xdp, Way::Direct];

/// Protocols, as they are called in titles and on the command line.
const PROTOCOLS: [(&str, &str); 2] = [("UDP", "udp"), ("TCP", "tcp")];

/// A node that forwards, and the other end of its link.
struct Forwarder {
    lane: Lane,
    network: Host,
    /// The Ethernet address of the node's end.
    ethernet: String,
}

impl Forwarder {
    fn new(
        testbed: &mut Testbed,
        assets: Option<&PathBuf>,
        way: Way,
        services: usize,
    ) -> Result<Self> {
        let mut lane = Lane::new(testbed, way, Backend::Remote)?;
        let node = &lane.node.host;
        // With it veth receives by NAPI, as network cards do; an XDP program brings both.
        node.run("ethtool", &["-K", UPLINK, "gro", "on"])?;
        let links = node.run("ip", &["-j", "link", "show", UPLINK])?;
        let links: Value = serde_json::from_str(&links).context("ip's JSON")?;
        let ethernet = links.pointer("/0/address").and_then(Value::as_str);
        let ethernet = ethernet
            .context("the link has an Ethernet address")?
            .to_owned();
        lane.program(testbed, assets, services)?;
        Ok(Self {
            lane,
            network: testbed.network()?,
            ethernet,
        })
    }

    /// One turn of so many milliseconds, after each flow has become known.
    fn turn(&self, protocol: &str, flows: u32, for_ms: u64) -> Result<Summary> {
        let (ip, port) = self.lane.target(0)?;
        let to = format!("{ip}:{port}");
        let backend = format!("{}:{PORT}", self.lane.server.host.ip4);
        let (interface, node) = (self.lane.node.port(), self.lane.node.host.ip4.to_string());
        let (flows, for_ms) = (flows.to_string(), for_ms.to_string());
        let mut arguments = vec!["flood", protocol, "--interface", &interface];
        arguments.extend(["--to-ethernet", &self.ethernet, "--to", &to]);
        arguments.extend(["--backend", &backend]);
        if self.lane.way != Way::Direct {
            // A node translates the source, too, for backends elsewhere.
            arguments.extend(["--from", &node]);
        }
        arguments.extend(["--flows", &flows, "--for-ms", &for_ms]);
        contender::measured(&self.network, &arguments).with_context(|| self.lane.way.name())
    }
}

/// Measures some ways with so many services, of which the first is sent to, and so many flows, a power
/// of two.
pub fn measure(services: usize, flows: u32, ways: &[Way], effort: &Effort) -> Result<Vec<Outcome>> {
    let mut ways = ways.to_vec();
    for way in &ways {
        anyhow::ensure!(
            way.through_overlay().is_none(),
            "{}: frames are looked at where they come out, and not inside of tunnels",
            way.name()
        );
    }
    let assets = kube_proxy::assets();
    ways.retain(|way| *way != Way::Iptables || assets.is_some());
    ways.retain(|way| effort.names(way.name()));
    let mut testbed = Testbed::new()?;
    let forwarders: Vec<Forwarder> = ways
        .iter()
        .map(|way| Forwarder::new(&mut testbed, assets.as_ref(), *way, services))
        .collect::<Result<_>>()?;
    let mut outcomes = Vec::new();
    for (protocol, argument) in PROTOCOLS {
        let what = format!("{protocol} packets of {flows} flows, one processor for all");
        if !effort
            .only
            .as_deref()
            .is_none_or(|only| what.contains(only))
        {
            continue;
        }
        outcomes.push(trial(
            &what,
            (argument, flows),
            &forwarders,
            services,
            effort,
        )?);
    }
    Ok(outcomes)
}

fn trial(
    what: &str,
    (protocol, flows): (&str, u32),
    forwarders: &[Forwarder],
    services: usize,
    effort: &Effort,
) -> Result<Outcome> {
    let witnesses: Vec<_> = forwarders
        .iter()
        .map(|forwarder| forwarder.lane.witnesses())
        .collect();
    let before: Vec<Vec<u64>> = witnesses
        .iter()
        .map(|witnesses| contender::read(witnesses))
        .collect::<Result<_>>()?;
    for forwarder in forwarders {
        patiently("the node forwards", || {
            forwarder.turn(protocol, flows, 1).map(drop)
        })?;
    }
    let mut summaries: Vec<Vec<Summary>> = vec![Vec::new(); forwarders.len()];
    for round in 0..effort.rounds {
        for (forwarder, summaries) in order(forwarders, &mut summaries, round) {
            summaries.push(forwarder.turn(protocol, flows, effort.turn_ms)?);
        }
    }
    let mut turns = Vec::new();
    let all = forwarders
        .iter()
        .zip(summaries)
        .zip(&witnesses)
        .zip(&before);
    for (((forwarder, summaries), witnesses), before) in all {
        let name = forwarder.lane.way.name();
        let expected = Expected {
            connections: flows.into(),
            flows: flows.into(),
            packets: summaries.iter().map(|summary| summary.count).sum(),
            // What is dropped where it comes out is answered by nobody.
            answers: 0,
        };
        turns.push(Turns {
            contender: name.to_owned(),
            evidence: contender::testimony(witnesses, before, &expected)
                .with_context(|| name.to_owned())?,
            summaries,
        });
    }
    let outcome = Outcome {
        title: format!("Packets to a node port of {services}, the backend on another node"),
        what: what.to_owned(),
        metrics: vec![Metric::Packets],
        turns,
    };
    report::print(&outcome);
    Ok(outcome)
}
