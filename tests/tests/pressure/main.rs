//! What becomes of flows when there are too many: of one destination's ports, of the table's records.
//!
//! Every packet is a BPF_PROG_TEST_RUN of the real program of an uplink (see `node`).
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

#[path = "../packets/addresses.rs"]
mod addresses;
mod handover;
mod node;
mod owners;
mod sizes;
mod succession;
mod xdp;

use std::{
    collections::HashSet,
    net::IpAddr,
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

use anyhow::Context;
use node::{End, Family, Node, SHOT, TCP, UDP, Uplink, frame, tcp};
use penstock_agent::flows::Lifetimes;
use penstock_common::{Counter, MASQUERADE_PORTS, Timeouts, limits};
use penstock_testbed::eventually;

/// How many source ports there are towards one destination.
const PORTS: u32 = MASQUERADE_PORTS.1 as u32 - MASQUERADE_PORTS.0 as u32 + 1;

/// Opens a flow; the source port that its backend sees.
fn open(uplink: Uplink<'_>, family: Family, client: End, number: u16, proto: u8) -> Option<u16> {
    let frontend = family.frontend(number);
    let (from, to) = uplink.pass(client, frontend, proto, tcp::SYN)?;
    assert_eq!(to, family.backend(number), "{client:?}");
    assert_eq!(from.0, family.overlay(), "{client:?}");
    Some(from.1)
}

/// Has the backend answer, which establishes the flow.
fn answer(uplink: Uplink<'_>, family: Family, client: End, number: u16, proto: u8, port: u16) {
    let to = (family.overlay(), port);
    let flags = tcp::SYN | tcp::ACK;
    let reply = uplink.pass(family.backend(number), to, proto, flags);
    assert_eq!(reply, Some((family.frontend(number), client)));
}

/// Opens and establishes flows of clients from the first on, until one is refused; their ports.
fn fill(uplink: Uplink<'_>, family: Family, number: u16, proto: u8, first: u32) -> Vec<u16> {
    let mut ports = Vec::new();
    loop {
        let client = family.client(first + ports.len() as u32);
        let Some(port) = open(uplink, family, client, number, proto) else {
            return ports;
        };
        answer(uplink, family, client, number, proto, port);
        ports.push(port);
    }
}

/// All ports of the range, each once.
fn assert_whole_range(ports: &[u16]) {
    let unique: HashSet<u16> = ports.iter().copied().collect();
    assert_eq!(unique.len(), ports.len(), "a port was given to two flows");
    let whole: HashSet<u16> = (MASQUERADE_PORTS.0..=MASQUERADE_PORTS.1).collect();
    let missing = whole.difference(&unique).count();
    assert!(unique == whole, "{missing} ports were never given");
}

#[test]
fn a_destination_gets_every_port_once_before_one_is_refused() {
    let Some(node) = Node::new("ports", 4) else {
        return;
    };
    for (family, proto) in [(Family::V4, TCP), (Family::V6, UDP)] {
        let (created, refused) = (
            node.count(Counter::FlowCreated),
            node.count(Counter::NoSourcePort),
        );
        // Each destination has all ports, whatever others have.
        for number in 0..4 {
            let began = Instant::now();
            let ports = fill(node.uplink(), family, number, proto, 0);
            eprintln!("{family:?}: {} flows in {:?}", ports.len(), began.elapsed());
            assert_whole_range(&ports);
        }
        assert_eq!(node.count(Counter::NoSourcePort) - refused, 4);
        assert_eq!(
            node.count(Counter::FlowCreated) - created,
            4 * u64::from(PORTS)
        );
        assert_eq!(node.count(Counter::FlowEvicted), 0);
    }

    // One flow ends: its port is the only one, and the next flow gets it.
    let (family, uplink) = (Family::V4, node.uplink());
    for turn in 0..100 {
        let client = family.client(turn * 17);
        let own = uplink.pass(client, family.frontend(0), TCP, tcp::FIN | tcp::ACK);
        let (source, _) = own.expect("it is established");
        let began = Instant::now();
        let port = open(uplink, family, client, 0, TCP);
        if turn % 50 == 0 {
            eprintln!("the only free port is found in {:?}", began.elapsed());
        }
        assert_eq!(port, Some(source.1), "turn {turn}");
        answer(uplink, family, client, 0, TCP, source.1);
        let other = family.client(PORTS + turn);
        assert_eq!(open(uplink, family, other, 0, TCP), None, "turn {turn}");
    }
    let began = Instant::now();
    for turn in 0..1_000 {
        let other = family.client(PORTS + turn);
        assert_eq!(open(uplink, family, other, 0, TCP), None);
    }
    eprintln!("a refusal takes {:?}", began.elapsed() / 1_000);
    // The agent has ports looked at anew, some of them with each sweep.
    let live = node.sweeper(Lifetimes::default()).sweep();
    assert_eq!((live.swept, live.v4 + live.v6), (0, 8 * PORTS as usize));
    // Of one destination, not of all four.
    assert_eq!(live.ports, [PORTS as usize; 2]);
    let began = Instant::now();
    assert_eq!(open(uplink, family, family.client(PORTS), 0, TCP), None);
    eprintln!("looking at some ports again takes {:?}", began.elapsed());

    // All end, as the agent sees it: all ports are there again.
    let live = node
        .sweeper(Lifetimes {
            tcp_syn_secs: 0,
            tcp_established_secs: 0,
            tcp_close_wait_secs: 0,
            tcp_closing_secs: 0,
            udp_secs: 0,
            udp_stream_secs: 0,
        })
        .sweep();
    assert_eq!((live.swept, live.v4 + live.v6), (8 * PORTS as usize, 0));
    assert_eq!(live.ports, [0, 0]);
    let families = [(Family::V4, TCP), (Family::V6, UDP)];
    for (place, (family, proto)) in families.into_iter().enumerate() {
        let ports = fill(node.uplink(), family, 0, proto, 500_000);
        assert_whole_range(&ports);
        let live = node.sweeper(Lifetimes::default()).sweep();
        assert_eq!(live.ports, [PORTS as usize, place * PORTS as usize]);
    }
    node.assert_responders_are_counted();
}

#[test]
fn ten_destinations_fill_the_table_and_no_destination_its_ports() {
    let Some(node) = Node::new("ten", 10) else {
        return;
    };
    let (family, uplink) = (Family::V4, node.uplink());
    let mut ports = vec![HashSet::new(); 10];
    for number in 0..limits::FLOWS {
        let (client, to) = (family.client(number), (number % 10) as u16);
        let port = open(uplink, family, client, to, TCP).expect("records and ports are left");
        answer(uplink, family, client, to, TCP, port);
        assert!(ports[usize::from(to)].insert(port), "{port} twice at {to}");
    }
    // Ten times the ports would be more than there are records.
    const { assert!(10 * PORTS > limits::FLOWS && 4 * PORTS < limits::FLOWS) };
    assert_eq!(
        open(uplink, family, family.client(limits::FLOWS), 0, TCP),
        None
    );
    assert_eq!(node.count(Counter::FlowTableFull), 1);
    assert_eq!(node.count(Counter::NoSourcePort), 0);
    assert_eq!(node.count(Counter::FlowEvicted), 0);
    node.assert_responders_are_counted();
}

#[test]
fn flows_that_are_over_give_their_ports_up_when_no_other_is_free() {
    let Some(node) = Node::new("over", 1) else {
        return;
    };
    let (family, uplink) = (Family::V4, node.uplink());
    let ports = fill(uplink, family, 0, TCP, 0);
    assert_whole_range(&ports);
    // Every second is reset: that none of them is met by chance is as good as impossible.
    let is_over = |number: u32| number.is_multiple_of(2);
    for number in (0..PORTS).filter(|number| is_over(*number)) {
        let reset = uplink.pass(family.client(number), family.frontend(0), TCP, tcp::RST);
        assert!(reset.is_some());
    }
    let freed: HashSet<u16> = (0..PORTS)
        .filter(|number| is_over(*number))
        .map(|number| ports[number as usize])
        .collect();
    // Who was refused a moment ago comes again.
    let again = family.client(PORTS);
    let port = eventually("flows give way", || {
        open(uplink, family, again, 0, TCP).context("refused")
    });
    let port = port.expect("within a second");
    assert!(freed.contains(&port), "{port}");
    answer(uplink, family, again, 0, TCP, port);
    let mut taken = HashSet::from([port]);
    for number in 1..2_000 {
        let client = family.client(PORTS + number);
        let port = open(uplink, family, client, 0, TCP).expect("many give way");
        answer(uplink, family, client, 0, TCP, port);
        assert!(freed.contains(&port) && taken.insert(port), "{port}");
    }
    assert_eq!(node.count(Counter::FlowEvicted), 2_000);
    // The rest is as it was.
    for number in (0..PORTS).filter(|number| !is_over(*number)) {
        let client = family.client(number);
        let passed = uplink.pass(client, family.frontend(0), TCP, tcp::ACK);
        let source = (family.overlay(), ports[number as usize]);
        assert_eq!(passed, Some((source, family.backend(0))), "{client:?}");
    }
    node.assert_responders_are_counted();
}

/// Sends one opening segment of each of these clients, to the frontends in turns; how many were
/// dropped.
fn flood(uplink: Uplink<'_>, family: Family, clients: std::ops::Range<u32>, to: u16) -> u32 {
    let mut frames: Vec<Vec<u8>> = (0..to)
        .map(|number| frame(family.client(0), family.frontend(number), TCP, tcp::SYN))
        .collect();
    let mut output = vec![0; frames[0].len()];
    let mut dropped = 0;
    for client in clients {
        let frame = &mut frames[(client % u32::from(to)) as usize];
        // The client's address, as [`Family::client`] makes it, or the end of it.
        match family {
            Family::V4 => frame[26..30].copy_from_slice(&(0x1400_0000 | client).to_be_bytes()),
            Family::V6 => frame[34..38].copy_from_slice(&client.to_be_bytes()),
        }
        if uplink.run(frame, &mut output) == SHOT {
            dropped += 1;
        }
    }
    dropped
}

#[test]
fn a_flood_of_openings_costs_no_established_connection() {
    a_flood_costs_none("flood", Family::V4, 5_000_000);
}

#[test]
fn a_flood_of_openings_over_ipv6_costs_no_established_connection() {
    a_flood_costs_none("flood6", Family::V6, 400_000);
}

fn a_flood_costs_none(name: &str, family: Family, openings: u32) {
    const BACKENDS: u16 = 8;
    if let Some(node) = Node::new(name, BACKENDS) {
        withstands(
            &node,
            node.uplink(),
            family,
            family.overlay(),
            BACKENDS,
            openings,
        );
    }
}

/// Floods a node that stands for clients with an address, and looks after connections that there were before.
fn withstands(
    node: &Node,
    uplink: Uplink<'_>,
    family: Family,
    source: IpAddr,
    backends: u16,
    openings: u32,
) {
    const ESTABLISHED: u32 = 1_000;
    let connections: Vec<(End, u16, u16)> = (0..ESTABLISHED)
        .map(|number| {
            let (client, to) = (family.client(number), (number % u32::from(backends)) as u16);
            let opened = uplink.pass(client, family.frontend(to), TCP, tcp::SYN);
            let (from, backend) = opened.expect("an empty table");
            assert_eq!((from.0, backend), (source, family.backend(to)));
            let reply = uplink.pass(backend, from, TCP, tcp::SYN | tcp::ACK);
            assert_eq!(reply, Some((family.frontend(to), client)));
            (client, to, from.1)
        })
        .collect();
    let began = Instant::now();
    let half = ESTABLISHED + openings / 2;
    let dropped: u32 = std::thread::scope(|scope| {
        let parts = [ESTABLISHED..half, half..ESTABLISHED + openings];
        let threads =
            parts.map(|clients| scope.spawn(move || flood(uplink, family, clients, backends)));
        let dropped = threads.map(|thread| thread.join().expect("packets run"));
        dropped.iter().sum()
    });
    let took = began.elapsed();
    eprintln!(
        "{openings} openings in {took:?}, {:?} each",
        took / openings
    );
    // A processor that stands still in the middle, as a virtual one may, can lose a record to others.
    assert!(
        dropped <= openings / 100_000,
        "{dropped} of {openings} openings found no record or port"
    );
    for (client, to, port) in &connections {
        let passed = uplink.pass(*client, family.frontend(*to), TCP, tcp::ACK);
        let from = (source, *port);
        assert_eq!(passed, Some((from, family.backend(*to))), "{client:?}");
        let reply = uplink.pass(family.backend(*to), from, TCP, tcp::ACK);
        assert_eq!(reply, Some((family.frontend(*to), *client)));
    }
    // What the flood cost: all but a table's worth of its flows gave way to others of it. One that has to before its own
    // packet is through, at XDP, is begun once more, at TC.
    let (all, lost) = (u64::from(ESTABLISHED + openings), u64::from(dropped));
    let created = node.count(Counter::FlowCreated);
    let twice = if uplink.is_past_xdp() {
        u64::from(openings / 100_000)
    } else {
        0
    };
    let is_all = (all - lost..=all + twice).contains(&created);
    assert!(is_all, "{created} of {all} were created, {lost} lost");
    let gone = created - u64::from(limits::FLOWS);
    let evicted = gone.abs_diff(node.count(Counter::FlowEvicted));
    assert!(evicted <= lost, "{evicted} off, {lost} lost");
    let reasons = [
        Counter::FlowTableFull,
        Counter::NoSourcePort,
        Counter::FlowRace,
    ];
    let counted: u64 = reasons.map(|reason| node.count(reason)).iter().sum();
    assert_eq!(counted, lost, "who is dropped is counted");
    node.assert_responders_are_counted();
}

#[test]
fn a_flood_to_one_backend_takes_ports_from_itself_alone() {
    const ESTABLISHED: u32 = 1_000;
    const FLOOD: u32 = 200_000;
    let Some(node) = Node::new("one", 1) else {
        return;
    };
    let (family, uplink) = (Family::V4, node.uplink());
    let mut connections = Vec::new();
    for number in 0..ESTABLISHED {
        let client = family.client(number);
        let port = open(uplink, family, client, 0, TCP).expect("an empty table");
        answer(uplink, family, client, 0, TCP, port);
        connections.push((client, port));
    }
    let began = Instant::now();
    let dropped = flood(uplink, family, ESTABLISHED..ESTABLISHED + FLOOD, 1);
    let took = began.elapsed();
    eprintln!("{FLOOD} openings in {took:?}, {:?} each", took / FLOOD);
    assert_eq!(dropped, 0, "an opening takes the port of another");
    for (client, port) in connections {
        let passed = uplink.pass(client, family.frontend(0), TCP, tcp::ACK);
        let source = (family.overlay(), port);
        assert_eq!(passed, Some((source, family.backend(0))), "{client:?}");
    }
    let left = u64::from(FLOOD - (PORTS - ESTABLISHED));
    assert_eq!(node.count(Counter::FlowEvicted), left);
    node.assert_responders_are_counted();
}

/// A packet looks at 1,024 records, and the next one goes on from there: so many of them see all.
const TURN: u32 = 200;
const _: () = assert!(TURN * 1_024 >= limits::FLOWS);

/// Opens a flow of the first of so many clients that gets one; that client, and its port.
fn open_one(uplink: Uplink<'_>, family: Family, number: u16, first: u32) -> Option<(End, u16)> {
    (first..first + TURN).find_map(|client| {
        let client = family.client(client);
        let port = open(uplink, family, client, number, TCP)?;
        Some((client, port))
    })
}

#[test]
fn a_nearly_full_table_still_finds_the_few_flows_that_give_way() {
    let Some(mut node) = Node::new("nearly", 10) else {
        return;
    };
    let family = Family::V4;
    let uplink = node.uplink();
    // One in a hundred is embryonic, or closing.
    let gives_way = |number: u32| number % 100 == 99;
    let is_reset = |number: u32| number % 200 == 199;
    let mut established = Vec::new();
    for number in 0..limits::FLOWS {
        let (client, to) = (family.client(number), (number % 10) as u16);
        let port = open(uplink, family, client, to, TCP).expect("records and ports are left");
        if !gives_way(number) || is_reset(number) {
            answer(uplink, family, client, to, TCP, port);
        }
        if is_reset(number) {
            let reset = uplink.pass(client, family.frontend(to), TCP, tcp::RST);
            assert!(reset.is_some());
        }
        if !gives_way(number) {
            established.push((client, to, port));
        }
    }
    let few = (0..limits::FLOWS)
        .filter(|number| gives_way(*number))
        .count() as u32;
    for number in 0..few {
        let client = family.client(limits::FLOWS + number);
        let port = open(uplink, family, client, 0, TCP).expect("one gives way");
        answer(uplink, family, client, 0, TCP, port);
    }
    assert_eq!(node.count(Counter::FlowEvicted), u64::from(few));
    let first = 2 * limits::FLOWS;
    assert_eq!(open_one(uplink, family, 0, first), None);
    assert_eq!(node.count(Counter::FlowTableFull), u64::from(TURN));

    // One whose client has sent a FIN stays too, for as long as a closing one may be idle.
    let (client, to, _) = established.swap_remove(established.len() / 2);
    let ended = uplink.pass(client, family.frontend(to), TCP, tcp::FIN | tcp::ACK);
    assert!(ended.is_some());
    assert_eq!(open_one(uplink, family, 0, first), None);
    node.configure(Timeouts {
        tcp_closing_secs: 0,
        ..Timeouts::default()
    });
    let uplink = node.uplink();
    let (client, port) = open_one(uplink, family, 0, first).expect("one gives way");
    answer(uplink, family, client, 0, TCP, port);
    assert_eq!(open_one(uplink, family, 0, first + TURN), None);
    assert_eq!(node.count(Counter::FlowEvicted), u64::from(few) + 1);

    for (client, to, port) in established {
        let passed = uplink.pass(client, family.frontend(to), TCP, tcp::ACK);
        let source = (family.overlay(), port);
        assert_eq!(passed, Some((source, family.backend(to))), "{client:?}");
    }
    node.assert_responders_are_counted();
}

#[test]
fn two_first_packets_of_a_flow_at_once_both_arrive_in_one_flow() {
    const ROUNDS: u32 = 25_000;
    const { assert!(ROUNDS < PORTS) };
    let Some(node) = Node::new("race", 1) else {
        return;
    };
    let family = Family::V4;
    let round = [AtomicU32::new(0), AtomicU32::new(0)];
    let packets = |cpu: usize| {
        let mut cpus = nix::sched::CpuSet::new();
        cpus.set(cpu).expect("a processor's number");
        // With one processor there is no race, and nothing to lose.
        let _ = nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus);
        let uplink = node.uplink();
        let mut seen = Vec::with_capacity(ROUNDS as usize);
        for number in 0..ROUNDS {
            // Both at once.
            round[cpu].store(number + 1, Ordering::Release);
            while round[1 - cpu].load(Ordering::Acquire) <= number {
                std::hint::spin_loop();
            }
            seen.push(uplink.pass(family.client(number), family.frontend(0), UDP, 0));
        }
        seen
    };
    let [ours, theirs] = std::thread::scope(|scope| {
        let threads = [0, 1].map(|cpu| scope.spawn(move || packets(cpu)));
        threads.map(|thread| thread.join().expect("no packet is lost"))
    });
    for (number, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        assert!(ours.is_some(), "packet {number} was dropped");
        assert_eq!(ours, theirs, "packet {number} is of two flows");
    }
    assert_eq!(node.count(Counter::FlowRace), 0);
    assert_eq!(node.count(Counter::FlowCreated), u64::from(ROUNDS));
    node.assert_responders_are_counted();
}
