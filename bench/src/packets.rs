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
    contender::{self, Expected, PORT},
    family::Family,
    load::Summary,
    machine::Watch,
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
    Way::Direct,
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
        if self.lane.way != Way::Direct {
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
            "{}: frames are looked at where they come out, and not inside of tunnels",
            way.name()
        );
    }
    let named = Effort::naming(ways, &WAYS);
    let effort = effort.of(format!(
        "packets --services {services} --flows {flows} --family {family}{named}"
    ));
    let kube_proxy = program::required();
    let mut ways = outside::available(ways, kube_proxy.as_ref());
    ways.retain(|way| effort.names(way.name()));
    let mut testbed = Testbed::new()?;
    let forwarders: Vec<Forwarder> = ways
        .iter()
        .map(|way| {
            Forwarder::new(&mut testbed, kube_proxy.as_ref(), *way, (services, family))
                .with_context(|| way.name())
        })
        .collect::<Result<_>>()?;
    for (protocol, argument) in PROTOCOLS {
        let what = name(protocol, flows);
        if !effort.wants(&what) {
            continue;
        }
        let watch = Watch::begin();
        let said = family.said();
        let turns = trial((argument, flows), &forwarders, &effort)?;
        keeper.keep(Outcome {
            title: format!(
                "Packets to a node port of {services}{said}, the backend on another node"
            ),
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
        let name = forwarder.lane.name();
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
    Ok(turns)
}
