//! What one processor forwards: packets of many flows to a node port whose backend is on another node,
//! for Penstock at XDP and at TC, for kube-proxy, and for the kernel that routes to the pod.
//!
//! Only the measured node works. Packets are made at the other end of its link ([`crate::load`]), and what
//! it sends is counted and dropped there.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use penstock_testbed::{Host, Testbed, patiently};
use serde_json::Value;

use crate::{
    contender::{self, Counts, Expected, PORT, Witness},
    family::Family,
    load::Summary,
    machine::{self, Watch},
    outside::{self, Backend, Lane, UPLINK, Way},
    results::Keeper,
    services::program::{self, Program},
    turns::{Effort, Metric, Outcome, Turns, order},
};

/// In which order they stand: the others are compared with kube-proxy.
pub const WAYS: [Way; 6] = [
    Way::Iptables,
    Way::Nftables,
    Way::Ipvs,
    Way::Tc,
    Way::Xdp,
    // Nothing comes back here.
    Way::ThereOnly,
];

/// Protocols, as they are called in titles and on the command line.
const PROTOCOLS: [(&str, &str); 2] = [("UDP", "udp"), ("TCP", "tcp")];

/// A node that forwards, and the other end of its link.
struct Forwarder {
    lane: Lane,
    family: Family,
    network: Host,
    /// The Ethernet address of the node's end.
    ethernet: String,
}

impl Forwarder {
    fn new(
        testbed: &mut Testbed,
        kube_proxy: Option<&Program>,
        way: Way,
        (services, family): (usize, Family),
    ) -> Result<Self> {
        let mut lane = Lane::new(testbed, way, Backend::Remote, family)?;
        let node = &lane.node.host;
        // With it veth receives by NAPI, as network cards do; an XDP program brings both.
        node.run("ethtool", &["-K", UPLINK, "gro", "on"])?;
        let links = node.run("ip", &["-j", "link", "show", UPLINK])?;
        let links: Value = serde_json::from_str(&links).context("ip's JSON")?;
        let ethernet = links.pointer("/0/address").and_then(Value::as_str);
        let ethernet = ethernet
            .context("the link has an Ethernet address")?
            .to_owned();
        lane.program(testbed, kube_proxy, services)?;
        Ok(Self {
            lane,
            family,
            network: testbed.network()?,
            ethernet,
        })
    }

    /// One turn of so many milliseconds, after each flow has become known.
    fn turn(&self, protocol: &str, flows: u32, for_ms: u64) -> Result<Summary> {
        let to = SocketAddr::from(self.lane.target(0)?).to_string();
        let server = self.family.of(&self.lane.server.host);
        let backend = SocketAddr::new(server, PORT).to_string();
        let node = self.family.of(&self.lane.node.host).to_string();
        let interface = self.lane.node.port();
        let (flows, for_ms) = (flows.to_string(), for_ms.to_string());
        let mut arguments = vec!["flood", protocol, "--interface", &interface];
        arguments.extend(["--to-ethernet", &self.ethernet, "--to", &to]);
        arguments.extend(["--backend", &backend]);
        if !self.lane.way.is_without_service() {
            // A node translates the source, too, for backends elsewhere.
            arguments.extend(["--from", &node]);
        }
        arguments.extend(["--flows", &flows, "--for-ms", &for_ms]);
        contender::measured(&self.network, &arguments).with_context(|| self.lane.name())
    }
}

/// The names of all trials with so many flows.
pub fn names(flows: u32) -> Vec<String> {
    PROTOCOLS
        .iter()
        .map(|(protocol, _)| name(protocol, flows))
        .collect()
}

fn name(protocol: &str, flows: u32) -> String {
    format!("{protocol} packets of {flows} flows, one processor for all")
}

/// What measures so many flows alone, by some ways.
pub fn command(services: usize, flows: u32, family: Family, ways: &[Way]) -> String {
    let named = Effort::naming(ways, &WAYS);
    format!("packets --services {services} --flows {flows} --family {family}{named}")
}

/// What the comparison is called with so many services.
pub fn title(services: usize, family: Family) -> String {
    let said = family.said();
    format!("Packets to a node port of {services}{said}, the backend on another node")
}

/// Measures some ways with so many services, of which the first is sent to, and so many flows, a power
/// of two.
pub fn measure(
    services: usize,
    flows: u32,
    family: Family,
    ways: &[Way],
    effort: &Effort,
    keeper: &mut Keeper,
) -> Result<()> {
    for way in ways {
        anyhow::ensure!(
            way.through_overlay().is_none(),
            "{way}: frames are looked at where they come out, and not inside of tunnels"
        );
    }
    let effort = effort.of(command(services, flows, family, ways));
    let kube_proxy = program::introduced();
    let ways = outside::available(ways, kube_proxy.as_ref(), &effort, keeper);
    let mut testbed = Testbed::new()?;
    let forwarders: Vec<Forwarder> = ways
        .iter()
        .map(|way| {
            Forwarder::new(&mut testbed, kube_proxy.as_ref(), *way, (services, family))
                .with_context(|| way.to_string())
        })
        .collect::<Result<_>>()?;
    for (protocol, argument) in PROTOCOLS {
        let what = name(protocol, flows);
        if !effort.wants(&what) {
            continue;
        }
        let watch = Watch::begin(machine::NOBODY);
        let turns = trial((argument, flows), &forwarders, &effort)?;
        keeper.keep(Outcome {
            title: title(services, family),
            metrics: vec![Metric::Packets],
            turns,
            command: effort.to_repeat(Some(&what)),
            quiet: Some(watch.end()),
            what,
        })?;
    }
    Ok(())
}

fn trial(
    (protocol, flows): (&str, u32),
    forwarders: &[Forwarder],
    effort: &Effort,
) -> Result<Vec<Turns>> {
    let witnesses: Vec<_> = forwarders
        .iter()
        .map(|forwarder| forwarder.lane.witnesses())
        .collect();
    let read = || -> Result<Vec<Vec<u64>>> {
        let witnesses = witnesses.iter();
        witnesses
            .map(|witnesses| contender::read(witnesses))
            .collect()
    };
    let before = read()?;
    for forwarder in forwarders {
        patiently("the node forwards", || {
            forwarder.turn(protocol, flows, 1).map(drop)
        })?;
    }
    let known = read()?;
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
        .zip(before.iter().zip(&known));
    for (((forwarder, summaries), witnesses), (before, known)) in all {
        let name = forwarder.lane.name();
        let expected = expected(flows, &summaries);
        let before = since(witnesses, before, known);
        turns.push(Turns {
            contender: name.to_owned(),
            evidence: contender::testimony(witnesses, &before, &expected)
                .with_context(|| name.to_owned())?,
            summaries,
        });
    }
    Ok(turns)
}

/// What all frames of these turns make, those included that come before the rate is taken: they are of flows that
/// are known already. What is dropped where it comes out is answered by nobody.
fn expected(flows: u32, turns: &[Summary]) -> Expected {
    let frames = turns.iter().map(|turn| turn.sent.requests).sum();
    Expected {
        connections: flows.into(),
        flows: flows.into(),
        requests: frames,
        most_requests: frames,
        replies: 0,
    }
}

/// From when on counters count: what counts packets from when all flows are known, so that nothing but measured turns
/// moves it; what counts flows from before, since they are new only once.
fn since(witnesses: &[Witness], before: &[u64], known: &[u64]) -> Vec<u64> {
    let all = witnesses.iter().zip(before.iter().zip(known));
    all.map(|(witness, (before, known))| match witness.counts() {
        Counts::Connections | Counts::Flows => *before,
        _ => *known,
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Sent;

    #[test]
    fn first_packets_of_flows_are_not_those_that_are_measured() {
        let says = |counts, now| Witness::new("packets", counts, move || Ok(now));
        let turns = vec![
            Summary::of_packets(900, 1.0, 0).with(Sent {
                requests: 1_000,
                ..Sent::default()
            });
            6
        ];
        let expected = expected(64, &turns);
        // 64 flows begin with 8,000 frames; 6,000 more are measured.
        let verdict = |at_the_end| {
            let witnesses = [
                says(Counts::Flows, 64),
                says(Counts::Requests, at_the_end),
                says(Counts::BothWays, at_the_end),
                says(Counts::OneWay, at_the_end),
                says(Counts::Replies, 0),
            ];
            let (before, known) = ([0; 5], [64, 8_000, 8_000, 8_000, 0]);
            let before = since(&witnesses, &before, &known);
            contender::testimony(&witnesses, &before, &expected).is_ok()
        };
        assert!(verdict(14_000));
        // All of the first, and most of the others by another way.
        assert!(!verdict(10_000));
        assert!(!verdict(13_600));
    }
}
