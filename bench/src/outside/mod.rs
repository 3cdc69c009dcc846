//! A client outside of the cluster asks a node port, and the backend is a pod of that node or of
//! another one: Penstock with every way to another node, kube-proxy, and the pod itself by way of the same
//! node.
//!
//! Every contender has nodes, a client and a server of its own.

mod lane;

use anyhow::{Result, ensure};
use penstock_testbed::{Process, Testbed, patiently};

pub use lane::{Backend, Lane, UPLINK, Way};

use crate::{
    contender::{self, Contender},
    family::Family,
    load::Workload,
    results::Keeper,
    services::{
        objects,
        program::{self, Program},
    },
    turns::{self, Effort, Trial},
};

/// What is measured. Connections only at a rate: every one leaves its source port taken for a while,
/// of which one node has some ten thousands towards one backend. For the same reason wrk's connections stay.
pub const TRIALS: [Trial; 10] = [
    Trial::open(Workload::Connect, 500),
    Trial::together(Workload::WrkKept),
    Trial::together(Workload::TcpRr),
    Trial::closed(Workload::TcpRr),
    Trial::together(Workload::Stream),
    Trial::closed(Workload::Stream),
    Trial::streams(8),
    Trial::together(Workload::UdpRr),
    Trial::closed(Workload::UdpRr),
    Trial::together(Workload::UdpPackets),
];
/// How many of them are over TCP.
const OVER_TCP: usize = 7;

/// The ways that are wanted and can be had here; of each of the others that are wanted it is noted why not.
pub fn available(
    ways: &[Way],
    kube_proxy: Option<&Program>,
    effort: &Effort,
    keeper: &mut Keeper,
) -> Vec<Way> {
    let mut ways = ways.to_vec();
    ways.retain(|way| {
        let name = way.name(kube_proxy);
        let missing = |mode| program::missing(mode, kube_proxy);
        effort.names(name) && keeper.has(name, way.mode().and_then(missing))
    });
    ways
}

/// What measures so many services alone, by some ways.
pub fn command(count: usize, family: Family, ways: &[Way]) -> String {
    let named = Effort::naming(ways, &Way::ALL);
    format!("outside --services {count} --family {family}{named}")
}

/// Measures some ways with so many services, whose first and last are asked.
pub fn measure(
    count: usize,
    family: Family,
    ways: &[Way],
    effort: &Effort,
    keeper: &mut Keeper,
) -> Result<()> {
    ensure!(count > 0, "there has to be a service to be asked");
    let kube_proxy = program::introduced();
    let effort = effort.of(command(count, family, ways));
    let ways = available(ways, kube_proxy.as_ref(), &effort, keeper);
    for (backend, place) in [(Backend::Local, "the same"), (Backend::Remote, "another")] {
        let mut testbed = Testbed::new()?;
        let (mut lanes, mut opposites) = (Vec::new(), Vec::new());
        let through = |way: &&Way| backend == Backend::Remote || !way.is_to_another_node();
        // What answers clients directly is only to be compared with what does, too.
        let is_brief = |way: &&Way| !way.is_handing_over() && *way != &Way::ThereOnly;
        let chosen = |way: &&Way| !effort.is_brief || is_brief(way);
        for way in ways.iter().filter(through).filter(chosen) {
            let mut lane = Lane::new(&mut testbed, *way, backend, family)?;
            lane.program(&mut testbed, kube_proxy.as_ref(), count)?;
            for port in lane.opposites() {
                opposites.push(opposite(&testbed, &port)?);
            }
            lanes.push(lane);
        }
        for (index, which) in ["first", "last"].into_iter().enumerate() {
            let order = order(&mut lanes, count)?;
            let [first, last] = order;
            let (tcp, udp) = if index == 0 { first } else { last };
            let which = if count == 1 {
                String::new()
            } else {
                format!(", the {which}")
            };
            let said = family.said();
            let title = format!("A node port of {count}{said}{which}, the backend on {place} node");
            let (over_tcp, over_udp) = TRIALS.split_at(OVER_TCP);
            for (trials, number) in [(over_tcp, tcp), (over_udp, udp)] {
                let contenders: Vec<Contender> = lanes
                    .iter()
                    .map(|lane| lane.contender(number))
                    .collect::<Result<_>>()?;
                for contender in &contenders {
                    patiently("the node port answers", || contender.answers())?;
                }
                turns::take(&title, &contenders, trials, &effort, keeper)?;
            }
            ensure!(
                self::order(&mut lanes, count)? == order,
                "kube-proxy has written its rules in another order meanwhile: {title} was not that"
            );
            if first == last {
                break;
            }
        }
    }
    Ok(())
}

/// The numbers of the services that come first and last, of TCP and of UDP: in kube-proxy's rules, which have an
/// order of their own; without them any two will do.
fn order(lanes: &mut [Lane], count: usize) -> Result<[(usize, usize); 2]> {
    let order = lanes.iter_mut().find_map(Lane::order);
    order.unwrap_or_else(|| Ok(objects::numbers(count).map(|number| (number, number))))
}

/// A program at the other end of a node's link, without which veth loses what the node sends from XDP.
fn opposite(testbed: &Testbed, port: &str) -> Result<Process> {
    let network = testbed.network()?;
    contender::start(&network, &["load", "pass", port])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trials_over_tcp_come_first() {
        let is_tcp = |trial: &Trial| {
            matches!(
                trial.workload,
                Workload::Connect | Workload::WrkKept | Workload::TcpRr | Workload::Stream
            )
        };
        let (over_tcp, over_udp) = TRIALS.split_at(OVER_TCP);
        assert!(over_tcp.iter().all(is_tcp) && !over_udp.iter().any(is_tcp));
    }
}
