//! Pod networks beside each other: pod to pod on one node, and from node to node.

mod across;
mod one_node;

use anyhow::Result;
use penstock_testbed::Host;

use crate::{
    load::Workload,
    results::Keeper,
    turns::{Effort, Trial},
};

/// What every pod's interface carries: what VXLAN leaves of 1,500 where nodes have IPv6, too.
const MTU: u32 = 1_430;

/// A pod's interface.
pub const INTERFACE: &str = "eth0";

/// What is measured between pods.
pub const TRIALS: [Trial; 10] = [
    Trial::together(Workload::TcpRr),
    Trial::closed(Workload::TcpRr),
    Trial::open(Workload::TcpRr, 5_000),
    Trial::together(Workload::UdpRr),
    Trial::together(Workload::UdpPackets),
    Trial::closed(Workload::UdpRr),
    Trial::together(Workload::Stream),
    Trial::closed(Workload::Stream),
    Trial::streams(8),
    Trial::together(Workload::Iperf),
];

/// All contenders.
pub fn contenders() -> Vec<String> {
    let all = one_node::CONTENDERS.iter().chain(&across::CONTENDERS);
    all.map(|name| (*name).to_owned()).collect()
}

/// What measures this alone.
pub fn command() -> String {
    "pods".to_owned()
}

/// Measures.
pub fn measure(effort: &Effort, keeper: &mut Keeper) -> Result<()> {
    let effort = effort.of(command());
    one_node::measure(&effort, keeper)?;
    across::measure(&effort, keeper)
}

/// Has an interface carry what pods' interfaces carry.
pub fn set_mtu(host: &Host, interface: &str) -> Result<()> {
    let mtu = MTU.to_string();
    host.run("ip", &["link", "set", interface, "mtu", &mtu])
        .map(drop)
}
