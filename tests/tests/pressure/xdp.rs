//! The same at XDP, before the TC hook of the uplink: the kernel's routes lead to backends of other nodes.

use std::{fs::File, thread, time::Instant};

use nix::sched::{CloneFlags, setns};
use penstock_common::{Counter, limits};
use penstock_testbed::{Host, Testbed, require_kernel};
use serde_json::Value;

use super::{
    PORTS,
    node::{End, Family, Node, TCP, tcp},
    withstands,
};

/// Gateways to everybody, which are found already.
const GATEWAYS: [(&str, &str); 2] = [("172.31.0.1", "-4"), ("fd00:31::1", "-6")];
const GATEWAY_MAC: &str = "02:00:00:00:00:fe";

/// The index of a host's interface, and its Ethernet address.
fn interface(host: &Host) -> (u32, [u8; 6]) {
    let links = host.run("ip", &["-j", "link", "show", "eth0"]).expect("ip");
    let links: Value = serde_json::from_str(&links).expect("JSON");
    let index = links[0]["ifindex"].as_u64().expect("a number") as u32;
    let mac = host.ethernet("eth0").expect("an address");
    (index, mac.try_into().expect("six bytes"))
}

/// Does something in a node's namespace, whose routes the kernel asks; nothing without the rights.
fn inside(act: impl FnOnce((u32, [u8; 6])) + Send) {
    let Some(()) = require_kernel() else {
        return;
    };
    let mut testbed = Testbed::new().expect("a testbed");
    let host = testbed.node().expect("a node").host;
    let run = |line: String| {
        let words: Vec<&str> = line.split(' ').collect();
        host.run("ip", &words).expect("ip");
    };
    for (gateway, family) in GATEWAYS {
        run(format!(
            "neigh replace {gateway} lladdr {GATEWAY_MAC} dev eth0 nud permanent"
        ));
        run(format!("{family} route replace default via {gateway}"));
    }
    let interface = interface(&host);
    thread::scope(|scope| {
        let acting = scope.spawn(|| {
            let namespace = File::open(format!("/run/netns/{}", host.name));
            setns(namespace.expect("its namespace"), CloneFlags::CLONE_NEWNET).expect("setns");
            act(interface);
        });
        if let Err(panic) = acting.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

#[test]
fn a_flood_of_openings_at_xdp_costs_no_established_connection() {
    const BACKENDS: u16 = 8;
    // Some times as many as there are records.
    const OPENINGS: u32 = 400_000;
    for family in [Family::V4, Family::V6] {
        inside(|interface| {
            let name = format!("flood-xdp-{family:?}");
            let node = Node::at_xdp(&name, BACKENDS, limits::FLOWS, interface);
            let node = node.expect("the kernel is there");
            withstands(&node, node.xdp(), family, family.node(), BACKENDS, OPENINGS);
            let sent = node.count(Counter::ExternalXdp);
            assert!(sent > u64::from(OPENINGS) * 9 / 10, "{sent} of {OPENINGS}");
        });
    }
}

#[test]
fn records_of_a_large_table_serve_at_xdp() {
    // More than the ids of 19 bits, and no power of two.
    const LAST: u32 = 524_288;
    const FLOWS: u32 = LAST + 5_001;
    const BACKENDS: u16 = (FLOWS / PORTS + 1) as u16;
    inside(|interface| {
        let family = Family::V4;
        let node = Node::at_xdp("large-xdp", BACKENDS, FLOWS, interface);
        let node = node.expect("the kernel is there");
        let uplink = node.xdp();
        let to = |number: u32| (number % u32::from(BACKENDS)) as u16;
        let began = Instant::now();
        let seen: Vec<End> = (0..FLOWS)
            .map(|number| {
                let (client, to) = (family.client(number), to(number));
                let opened = uplink.pass(client, family.frontend(to), TCP, tcp::SYN);
                let (from, backend) = opened.expect("records and ports are left");
                assert_eq!((from.0, backend), (family.node(), family.backend(to)));
                from
            })
            .collect();
        eprintln!("{FLOWS} flows in {:?}", began.elapsed());
        // Those with the last records, and some others, are known both ways, and XDP's.
        let some = (0..FLOWS).filter(|number| *number >= LAST || number.is_multiple_of(64));
        let some: Vec<u32> = some.collect();
        let before = node.count(Counter::ExternalXdp);
        for number in &some {
            let (client, from, to) = (family.client(*number), seen[*number as usize], to(*number));
            let reply = uplink.pass(family.backend(to), from, TCP, tcp::SYN | tcp::ACK);
            assert_eq!(reply, Some((family.frontend(to), client)));
            // The first packet after a while is TC's, and the others are not.
            for _ in 0..3 {
                let passed = uplink.pass(client, family.frontend(to), TCP, tcp::ACK);
                assert_eq!(passed, Some((from, family.backend(to))), "{client:?}");
            }
        }
        let sent = node.count(Counter::ExternalXdp) - before;
        let flows = some.len() as u64;
        assert!(sent >= 2 * flows, "{sent} packets of {flows} flows");
        assert_eq!(node.count(Counter::FlowCreated), u64::from(FLOWS));
        assert_eq!(node.count(Counter::FlowEvicted), 0);
        node.assert_responders_are_counted();
    });
}
