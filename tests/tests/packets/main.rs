//! The real packet programs against a model in plain Rust, over random packets.
//!
//! Every program run is BPF_PROG_TEST_RUN on the object that the agent embeds, with maps filled by
//! hand. A run is reproducible: `PENSTOCK_SEED` and `PENSTOCK_PACKETS` choose another one.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

mod addresses;
mod affinity;
mod answers;
mod beginnings;
mod errors;
mod frame;
mod held;
mod kernel;
mod model;
mod overlay;
mod xdp;
mod xdp_overlay;

use std::net::IpAddr;

use frame::{CHUNKS, SCTP, Spec, TCP, UDP};
use kernel::Kernel;
use model::{Done, Hook, Model, Service};
use penstock_common::{Algorithm, Fins, FlowState};
use penstock_testbed::Random;

/// After how many packets parts of datagrams are forgotten: fewer than any machine gets through in the half
/// minute that [`penstock_common::FragmentPorts::LASTS_SECS`] is, and enough for many parts to be met again.
const FORGOTTEN_AFTER: u64 = 5_000;

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address in this file")
}

const CLIENTS: [&str; 6] = [
    "10.244.1.5",
    "10.244.1.6",
    "10.244.1.7",
    "fd00:244:1::5",
    "fd00:244:1::6",
    "fd00:244:1::7",
];
const NODES: [&str; 2] = ["172.18.0.2", "fd00:30::2"];
const OTHERS: [&str; 4] = ["10.244.9.9", "1.1.1.1", "fd00:244:9::9", "2606::1"];

/// How a service spreads clients, by its address and protocol.
fn algorithm_of(host: u8, proto: u8) -> Algorithm {
    match (host, proto) {
        (1, TCP) | (4, UDP) => Algorithm::RoundRobin,
        (1, UDP) => Algorithm::SourceHash,
        (2, TCP) => Algorithm::Maglev,
        // Affinity comes first.
        (3, TCP) => Algorithm::RoundRobin,
        (3, UDP) => Algorithm::SourceHash,
        (4, TCP) | (7, _) => Algorithm::LeastConnections,
        _ => Algorithm::Random,
    }
}

fn model() -> Model {
    let mut model = Model::default();
    model.nodes = NODES.map(ip).into();
    for (prefix, pods) in [("10.96.0.", "10.244.2."), ("fd00:96::", "fd00:244:2::")] {
        let is_v4 = prefix.contains('.');
        let mut add = |host: u8, port, proto, backends: Vec<(IpAddr, u16)>, drops, affinity| {
            let frontend = (ip(&format!("{prefix}{host}")), port);
            model.service_addrs.insert(frontend.0);
            model.services.push(Service {
                frontend,
                proto,
                backends,
                drops_when_empty: drops,
                has_affinity: affinity,
                algorithm: algorithm_of(host, proto),
            });
        };
        let pod = |host: u8, port| (ip(&format!("{pods}{host}")), port);
        let own = |index: usize| (ip(CLIENTS[index + if is_v4 { 0 } else { 3 }]), 8080);
        add(
            1,
            80,
            TCP,
            vec![pod(1, 8080), pod(2, 8080), pod(3, 8081)],
            false,
            false,
        );
        add(1, 80, UDP, vec![pod(1, 8080), pod(2, 8080)], false, false);
        // The same backends behind a second service.
        add(2, 80, TCP, vec![pod(1, 8080), pod(2, 8080)], false, false);
        add(2, 53, UDP, vec![pod(1, 8080)], false, false);
        add(
            3,
            443,
            TCP,
            (1..=20).map(|host| pod(host, 8443)).collect(),
            false,
            true,
        );
        add(
            3,
            443,
            UDP,
            (1..=20).map(|host| pod(host, 8443)).collect(),
            false,
            true,
        );
        // Clients are among their own backends.
        add(4, 80, TCP, vec![own(0), own(1)], false, false);
        add(4, 80, UDP, vec![own(0), own(1)], false, false);
        add(5, 80, TCP, vec![], false, false);
        add(5, 80, UDP, vec![], false, false);
        add(
            7,
            80,
            TCP,
            (5..=8).map(|host| pod(host, 8080)).collect(),
            false,
            false,
        );
        add(
            7,
            80,
            UDP,
            (5..=8).map(|host| pod(host, 8080)).collect(),
            false,
            false,
        );
        // One of them without another port.
        let three = vec![pod(1, 2905), pod(2, 2905), pod(3, 3868)];
        add(1, 3868, SCTP, three, false, false);
        add(2, 3868, SCTP, vec![pod(1, 2905), pod(2, 2905)], false, true);
        add(4, 3868, SCTP, vec![own(0), own(1)], false, false);
        add(5, 3868, SCTP, vec![], false, false);
        add(6, 80, TCP, vec![], true, false);
        add(6, 80, UDP, vec![], true, false);
    }
    model
}

/// A random packet and the hook that meets it.
fn generate(random: &mut Random, model: &Model) -> (Hook, Vec<u8>) {
    let proto = random.pick(&[TCP, TCP, TCP, UDP, UDP, SCTP]);
    let (src, dst, hook) = match random.below(100) {
        0..55 => request(random, model),
        55..80 => reply(random, model).unwrap_or_else(|| request(random, model)),
        80..88 => return error(random, model),
        _ => stranger(random),
    };
    let proto = model
        .services
        .iter()
        .find(|service| service.frontend == dst)
        .map_or(proto, |service| {
            if random.chance(95) {
                service.proto
            } else {
                proto
            }
        });
    let size = match random.below(10) {
        0 => 1_200,
        1..4 => random.below(64),
        _ => 1 + random.below(8),
    };
    let tcp_flags = if proto == SCTP {
        random.pick(&CHUNKS)
    } else {
        random.pick(&[2, 0x10, 0x18, 0x10, 0x12, 0x11, 4, 0x14, 0x02, 0x18])
    };
    let mut spec = Spec {
        src,
        dst,
        proto,
        tcp_flags,
        payload: (0..size).map(|_| random.word() as u8).collect(),
        options: if random.chance(10) {
            1 + random.below(4)
        } else {
            0
        },
        fragment: None,
        without_checksum: (src.0.is_ipv4() || proto == SCTP) && random.chance(5),
    };
    if random.chance(8) {
        let offset = if random.chance(50) {
            0
        } else {
            1 + random.below(200) as u16
        };
        spec.fragment = Some((1 + random.below(40) as u32, offset, random.chance(70)));
    }
    (hook, mangle(random, frame::build(&spec)))
}

type Ends = ((IpAddr, u16), (IpAddr, u16), Hook);

fn request(random: &mut Random, model: &Model) -> Ends {
    let service = random.pick(&model.services);
    let dst = if random.chance(96) {
        service.frontend
    } else {
        (service.frontend.0, random.word() as u16)
    };
    let half = if dst.0.is_ipv4() { 0 } else { 3 };
    let client = ip(CLIENTS[half + random.below(3)]);
    let port = if random.chance(80) {
        40_000 + random.below(200) as u16
    } else {
        random.word() as u16
    };
    ((client, port), dst, Hook::FromPod)
}

/// What a backend would answer in a flow that the model knows.
fn reply(random: &mut Random, model: &Model) -> Option<Ends> {
    if model.flows.is_empty() {
        return None;
    }
    let flow = model.flows[random.below(model.flows.len())].as_ref()?;
    let hook = if flow.is_hairpin() {
        Hook::FromPod
    } else {
        Hook::ToPod
    };
    Some((flow.backend, flow.source, hook))
}

fn stranger(random: &mut Random) -> Ends {
    let is_v4 = random.chance(50);
    let among = |random: &mut Random, from: &[&str]| loop {
        let found = ip(from[random.below(from.len())]);
        if found.is_ipv4() == is_v4 {
            return found;
        }
    };
    let client = (among(random, &CLIENTS), random.word() as u16);
    let all = [OTHERS.as_slice(), NODES.as_slice(), CLIENTS.as_slice()].concat();
    let other = (among(random, &all), random.word() as u16);
    if random.chance(60) {
        (client, other, Hook::FromPod)
    } else {
        (other, client, Hook::ToPod)
    }
}

/// An ICMP error about a flow that the model knows, or about nothing.
fn error(random: &mut Random, model: &Model) -> (Hook, Vec<u8>) {
    let flow = (!model.flows.is_empty())
        .then(|| model.flows[random.below(model.flows.len())].clone())
        .flatten();
    let Some(flow) = flow else {
        let (src, dst, hook) = stranger(random);
        let spec = plain(src, dst, UDP, vec![1, 2, 3]);
        return (hook, frame::icmp_error(src.0, dst.0, &spec, &[]));
    };
    let about_request = random.chance(50);
    let (from, to) = if about_request {
        (flow.source, flow.backend)
    } else {
        (flow.frontend, flow.client)
    };
    let mut inner = plain(from, to, flow.proto, vec![7; random.below(64)]);
    inner.options = if random.chance(20) { 1 } else { 0 };
    let mut quoted = frame::build(&inner).split_off(14);
    let own = match flow.proto {
        TCP => 20,
        SCTP => 16,
        _ => 8,
    };
    let header = quoted.len() - inner.payload.len() - own;
    if random.chance(50) {
        quoted.truncate(header + 8);
    } else if random.chance(10) {
        quoted.truncate(random.below(header + 8));
    }
    let is_v4 = from.0.is_ipv4();
    let router = ip(if is_v4 { "192.0.2.1" } else { "2001:db8::1" });
    let (src, dst, hook) = if about_request {
        let speaker = if random.chance(50) {
            flow.backend.0
        } else {
            router
        };
        let hook = if flow.is_hairpin() {
            Hook::FromPod
        } else {
            Hook::ToPod
        };
        (speaker, flow.source.0, hook)
    } else {
        (flow.client.0, flow.frontend.0, Hook::FromPod)
    };
    let outer = plain((src, 0), (dst, 0), UDP, vec![]);
    (
        hook,
        mangle(random, frame::icmp_error(src, dst, &outer, &quoted)),
    )
}

fn plain(src: (IpAddr, u16), dst: (IpAddr, u16), proto: u8, payload: Vec<u8>) -> Spec {
    Spec {
        src,
        dst,
        proto,
        tcp_flags: 0x10,
        payload,
        options: 0,
        fragment: None,
        without_checksum: false,
    }
}

/// Cuts, tags or garbles a few frames.
fn mangle(random: &mut Random, mut frame: Vec<u8>) -> Vec<u8> {
    match random.below(100) {
        0..4 => frame.truncate(kernel::shortest(&frame).max(random.below(frame.len()))),
        4..6 => {
            // An 802.1Q tag that no interface took off: an inner one.
            frame.splice(12..12, [0x81, 0x00, 0x00, 0x2a]);
        }
        6..9 => {
            let at = 14 + random.below(frame.len() - 14);
            frame[at] = random.word() as u8;
        }
        _ => {}
    }
    frame
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

#[test]
fn a_connection_stays_until_both_ends_have_closed_it() {
    let model = model();
    let Some(mut kernel) = Kernel::load(&model) else {
        return;
    };
    let (client, frontend) = ((ip(CLIENTS[0]), 4_000), (ip("10.96.0.2"), 80));
    let segment = |src, dst, tcp_flags| {
        frame::build(&Spec {
            tcp_flags,
            ..plain(src, dst, TCP, vec![])
        })
    };
    let (syn, ack, fin, rst) = (2, 0x10, 0x11, 4);
    // Who sends what, the backend or the client, and what is then known of the flow.
    let closings = [
        vec![
            (false, fin, FlowState::ESTABLISHED, Fins::CLIENT),
            (true, ack, FlowState::ESTABLISHED, Fins::CLIENT),
            (true, fin, FlowState::CLOSING, Fins::CLIENT),
            (false, ack, FlowState::CLOSING, Fins::CLIENT | Fins::OVER),
        ],
        vec![
            (true, fin, FlowState::ESTABLISHED, Fins::BACKEND),
            (true, fin, FlowState::ESTABLISHED, Fins::BACKEND),
            (false, fin, FlowState::CLOSING, Fins::BACKEND),
        ],
        vec![
            (true, fin, FlowState::ESTABLISHED, Fins::BACKEND),
            (false, rst, FlowState::CLOSING, Fins::BACKEND | Fins::OVER),
        ],
        vec![(true, rst, FlowState::CLOSING, 0)],
    ];
    for closing in closings {
        // The same ports again: the last connection is over, and gives its place up.
        let (_, out) = kernel.run(Hook::FromPod, &segment(client, frontend, syn));
        assert_eq!(kernel.only_flow(), (FlowState::EMBRYONIC, 0), "{closing:?}");
        let header = frame::header(&out, 14, true).expect("IP");
        let (source, port) = frame::ports(&out, header.transport).expect("ports");
        let (backend, source) = ((header.dst, port), (header.src, source));
        let opening = [
            (true, syn | ack, FlowState::ESTABLISHED, 0),
            (false, ack, FlowState::ESTABLISHED, 0),
        ];
        for (is_reply, flags, state, fins) in opening.iter().chain(&closing).copied() {
            if is_reply {
                kernel.run(Hook::ToPod, &segment(backend, source, flags));
            } else {
                kernel.run(Hook::FromPod, &segment(client, frontend, flags));
            }
            assert_eq!(kernel.only_flow(), (state, fins), "{closing:?}");
        }
    }
    let connections: u64 = kernel
        .all_tallies()
        .values()
        .map(|tally| tally.connections)
        .sum();
    assert_eq!(connections, 4);
}

#[test]
fn programs_do_to_random_packets_what_the_model_says() {
    let mut model = model();
    let Some(mut kernel) = Kernel::load(&model) else {
        return;
    };
    let packets = setting("PENSTOCK_PACKETS", 200_000);
    let mut random = Random(setting("PENSTOCK_SEED", 0x9e37_79b9_7f4a_7c15));
    for number in 0..packets {
        // The programs do so by themselves when a datagram's first part is half a minute old; the model has no clock.
        if number % FORGOTTEN_AFTER == 0 {
            kernel.forget_parts();
            model.forget_parts();
        }
        let (hook, input) = generate(&mut random, &model);
        let (verdict, output) = kernel.run(hook, &input);
        let done = Done {
            verdict,
            frame: &output,
        };
        if let Err(problem) = model.check(hook, &input, &done) {
            panic!("packet {number} at {hook:?}: {problem}\ninput {input:02x?}");
        }
    }
    for (counter, expected) in &model.counts {
        assert_eq!(kernel.count(*counter), *expected, "{}", counter.label());
    }
    assert_eq!(kernel.all_tallies(), model.tallies);
    let both_ways = model.tallies.values().filter(|tally| tally.reply.bytes > 0);
    assert!(both_ways.count() > 10, "backends answered");
    let sctp = model.sctp.as_flattened();
    assert!(
        sctp.iter().all(|count| *count > packets / 5_000),
        "{sctp:?}"
    );
    eprintln!("{packets} packets: {:?}, SCTP {sctp:?}", model.counts);
}
