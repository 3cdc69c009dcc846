//! A client outside of the cluster asks a node port, and the backend is a pod of that node or of
//! another one: Penstock with every way to another node, kube-proxy, and the pod itself by way of the same
//! node.
//!
//! Every contender has nodes, a client and a server of its own.

mod lane;

use anyhow::Result;
use penstock_testbed::{Process, Testbed, patiently};

pub use lane::{Backend, Lane, UPLINK, Way};

use crate::{
    contender::{self, Contender},
    load::Workload,
    services::kube_proxy,
    turns::{self, Effort, Outcome, Trial},
};

/// What is measured. Connections only at a rate: every one leaves its source port taken for a while,
/// of which one node has some ten thousands towards one backend. For the same reason there is no short HTTP.
const TRIALS: [Trial; 9] = [
    Trial::open(Workload::Connect, 500),
    Trial::together(Workload::TcpRr),
    Trial::closed(Workload::TcpRr),
    Trial::together(Workload::UdpRr),
    Trial::closed(Workload::UdpRr),
    Trial::together(Workload::UdpPackets),
    Trial::together(Workload::Stream),
    Trial::closed(Workload::Stream),
    Trial::streams(8),
];

/// Measures some ways with so many services, of which the first is asked.
pub fn measure(count: usize, ways: &[Way], effort: &Effort) -> Result<Vec<Outcome>> {
    let mut ways = ways.to_vec();
    let assets = kube_proxy::assets();
    ways.retain(|way| *way != Way::Iptables || assets.is_some());
    let mut outcomes = Vec::new();
    for (backend, place) in [(Backend::Local, "the same"), (Backend::Remote, "another")] {
        let mut testbed = Testbed::new()?;
        let (mut lanes, mut opposites) = (Vec::new(), Vec::new());
        // What goes through an overlay has another node to go to.
        let through = |way: &&Way| backend == Backend::Remote || way.through_overlay().is_none();
        for way in ways.iter().filter(through) {
            if !effort.names(way.name()) {
                continue;
            }
            let mut lane = Lane::new(&mut testbed, *way, backend)?;
            lane.program(&mut testbed, assets.as_ref(), count)?;
            for port in lane.opposites() {
                opposites.push(opposite(&testbed, &port)?);
            }
            lanes.push(lane);
        }
        let contenders: Vec<Contender> = lanes
            .iter()
            .map(|lane| lane.contender(0))
            .collect::<Result<_>>()?;
        for contender in &contenders {
            patiently("the node port answers", || contender.answers())?;
        }
        let title = format!("A node port of {count}, the backend on {place} node");
        outcomes.extend(turns::take(&title, &contenders, &TRIALS, effort)?);
    }
    Ok(outcomes)
}

/// A program at the other end of a node's link, without which veth loses what the node sends from XDP.
fn opposite(testbed: &Testbed, port: &str) -> Result<Process> {
    let network = testbed.network()?;
    contender::start(&network, &["load", "pass", port])
}
