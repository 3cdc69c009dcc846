//! Who gets a source port that another flow still has: pods that reach one backend through two
//! services, packet by packet.

use std::{
    net::IpAddr,
    sync::{
        Barrier,
        atomic::{AtomicU16, Ordering},
    },
    time::Instant,
};

use penstock_common::{Counter, REMAPPED_PORTS};

use crate::node::{End, Family, Node, TCP, Uplink, frame_with, stamped, tcp};

const FAMILY: Family = Family::V4;

/// A node whose pods have two ways to one backend.
struct Bed(Node);

/// Frontends of the two ways.
const A: u16 = 0;
const B: u16 = 1;

/// Who ends a connection first.
#[derive(Clone, Copy, PartialEq)]
enum First {
    Client,
    Backend,
}

impl Bed {
    fn new(name: &str) -> Option<Self> {
        let mut node = Node::new(name, 1)?;
        node.load_pods();
        node.share(FAMILY, B, A);
        Some(Self(node))
    }

    fn pods_own(&self) -> Uplink<'_> {
        self.0.hook("from_pod")
    }

    fn for_pods(&self) -> Uplink<'_> {
        self.0.hook("to_pod")
    }

    /// A segment of a pod's; the source that the backend sees.
    fn ask(&self, client: End, way: u16, flags: u8, stamp: u32) -> Option<u16> {
        let to = FAMILY.frontend(way);
        let options = stamped(flags, stamp);
        let frame = frame_with(client, to, TCP, flags, &options, &[]);
        let (source, to) = self.pods_own().send(&frame)?;
        assert_eq!((source.0, to), (client.0, FAMILY.backend(A)), "{client:?}");
        Some(source.1)
    }

    /// A segment of the backend's; whom its receiver takes for its sender.
    fn reply(&self, client: IpAddr, port: u16, flags: u8, payload: &[u8]) -> Option<(End, End)> {
        let from = FAMILY.backend(A);
        let frame = frame_with(from, (client, port), TCP, flags, &[], payload);
        self.for_pods().send(&frame)
    }

    /// The three segments that a connection begins with; its port.
    fn connect(&self, client: End, way: u16, stamp: u32) -> Option<u16> {
        let port = self.ask(client, way, tcp::SYN, stamp)?;
        let reply = self.reply(client.0, port, tcp::SYN | tcp::ACK, &[]);
        assert_eq!(reply, Some((FAMILY.frontend(way), client)));
        assert_eq!(self.ask(client, way, tcp::ACK, stamp), Some(port));
        Some(port)
    }

    /// The segments that it ends with.
    fn close(&self, client: End, way: u16, port: u16, first: First, stamp: u32) {
        let fin = tcp::FIN | tcp::ACK;
        let backend_ends = || {
            let reply = self.reply(client.0, port, fin, &[]);
            assert_eq!(reply, Some((FAMILY.frontend(way), client)));
        };
        if first == First::Backend {
            backend_ends();
        }
        assert_eq!(self.ask(client, way, fin, stamp), Some(port));
        if first == First::Client {
            backend_ends();
            assert_eq!(self.ask(client, way, tcp::ACK, stamp), Some(port));
        }
    }

    fn count(&self, counter: Counter) -> u64 {
        self.0.count(counter)
    }
}

/// A pod's socket.
fn client(port: u16) -> End {
    (FAMILY.client(7).0, port)
}

fn is_remapped(port: u16) -> bool {
    (REMAPPED_PORTS.0..=REMAPPED_PORTS.1).contains(&port)
}

#[test]
fn a_pod_keeps_its_ports_however_often_it_goes_through_them() {
    let Some(bed) = Bed::new("turns") else {
        return;
    };
    // Far more connections than there are ports to choose from instead.
    const PORTS: u16 = 12_000;
    const TURNS: u32 = 3;
    let began = Instant::now();
    for turn in 0..TURNS {
        for port in 0..PORTS {
            let (client, way) = (client(32_768 + port), (turn % 2) as u16);
            let seen = bed.connect(client, way, 1_000 + turn);
            assert_eq!(seen, Some(client.1), "turn {turn}");
            bed.close(client, way, client.1, First::Client, 1_000 + turn);
        }
    }
    let number = TURNS * u32::from(PORTS);
    eprintln!("a connection takes {:?}", began.elapsed() / number);
    let evicted = u64::from((TURNS - 1) * u32::from(PORTS));
    assert_eq!(bed.count(Counter::FlowEvicted), evicted);
    assert_eq!(bed.count(Counter::FlowCreated), u64::from(number));
    assert_eq!(bed.count(Counter::NoSourcePort), 0);
    assert_eq!(bed.count(Counter::FlowRace), 0);
}

#[test]
fn a_backend_that_waits_is_asked_again_only_with_a_newer_timestamp() {
    let Some(bed) = Bed::new("waits") else {
        return;
    };
    let cases = [
        // The last timestamp, the next one, whether the port is kept.
        (1_000, 1_001, true),
        (1_000, 1_000, false),
        (1_000, 999, false),
        (1_000, 0, false),
        (0, 1_000, false),
        (u32::MAX, 5, true),
        (5, u32::MAX, false),
    ];
    for (number, (last, next, keeps)) in cases.into_iter().enumerate() {
        let client = client(33_000 + number as u16);
        let port = bed.connect(client, A, last).expect("a free port");
        assert_eq!(port, client.1);
        bed.close(client, A, port, First::Backend, last);
        let port = bed.connect(client, B, next).expect("some port");
        assert_eq!(port == client.1, keeps, "{last} then {next}: {port}");
        assert!(keeps || is_remapped(port), "{port}");
    }
    // Where nearly all remapped ports are such flows', one of them is the next one's: no search.
    const CLIENTS: u16 = 20_000;
    const REMAPPED: u16 = REMAPPED_PORTS.1 - REMAPPED_PORTS.0 + 1;
    let evicted = bed.count(Counter::FlowEvicted);
    let began = Instant::now();
    for number in 0..CLIENTS {
        let client = client(40_000 + number);
        let port = bed.connect(client, A, 1_000).expect("a free port");
        assert_eq!(port, client.1);
        bed.close(client, A, port, First::Backend, 1_000);
        let port = bed.connect(client, B, 500).expect("some port");
        assert!(is_remapped(port), "{port}");
        bed.close(client, B, port, First::Backend, 450);
    }
    let each = began.elapsed() / u32::from(2 * CLIENTS);
    eprintln!("a connection takes {each:?}, every second one remapped");
    let more = bed.count(Counter::FlowEvicted) - evicted;
    assert!(more >= u64::from(CLIENTS - REMAPPED), "{more}");
    assert_eq!(bed.count(Counter::NoSourcePort), 0);
}

/// Whether the backend sends a segment, and what; one after the other.
type Story = &'static [(bool, u8)];

#[test]
fn flows_that_are_not_over_keep_their_ports() {
    let Some(bed) = Bed::new("alive") else {
        return;
    };
    const FIN: u8 = tcp::FIN | tcp::ACK;
    // The last says whether the port is another's then.
    let stories: [(&str, Story, bool); 7] = [
        ("embryonic", &[], false),
        ("established", &[(true, tcp::SYN | tcp::ACK)], false),
        (
            "half closed",
            &[(true, tcp::SYN | tcp::ACK), (false, FIN)],
            false,
        ),
        (
            "the last FIN not acknowledged",
            &[(true, tcp::SYN | tcp::ACK), (false, FIN), (true, FIN)],
            false,
        ),
        (
            "closed",
            &[
                (true, tcp::SYN | tcp::ACK),
                (false, FIN),
                (true, FIN),
                (false, tcp::ACK),
            ],
            true,
        ),
        (
            "broken off by the client",
            &[(true, tcp::SYN | tcp::ACK), (false, tcp::RST)],
            true,
        ),
        (
            "broken off by the backend",
            &[(true, tcp::SYN | tcp::ACK), (true, tcp::RST)],
            false,
        ),
    ];
    for (number, (name, story, is_over)) in stories.into_iter().enumerate() {
        let client = client(35_000 + number as u16);
        let port = bed.ask(client, A, tcp::SYN, 1);
        assert_eq!(port, Some(client.1));
        for (is_reply, flags) in story {
            if *is_reply {
                let reply = bed.reply(client.0, client.1, *flags, &[]);
                assert_eq!(reply, Some((FAMILY.frontend(A), client)), "{name}");
            } else {
                assert_eq!(bed.ask(client, A, *flags, 1), port, "{name}");
            }
        }
        let next = bed.connect(client, B, 1_000).expect("some port");
        assert_eq!(next == client.1, is_over, "{name}: {next}");
        // Who keeps it goes on.
        if !is_over {
            assert_eq!(bed.ask(client, A, tcp::ACK, 2), port, "{name}");
            let reply = bed.reply(client.0, client.1, tcp::ACK, &[]);
            assert_eq!(reply, Some((FAMILY.frontend(A), client)), "{name}");
        }
    }
}

#[test]
fn what_comes_late_for_a_flow_is_not_its_successors() {
    let Some(bed) = Bed::new("late") else {
        return;
    };
    let client = client(36_000);
    let port = bed.connect(client, A, 1).expect("a free port");
    bed.close(client, A, port, First::Client, 1);
    assert_eq!(bed.ask(client, B, tcp::SYN, 1), Some(port));
    // A FIN that was sent twice, and data that took another way.
    let fin = tcp::FIN | tcp::ACK;
    assert_eq!(bed.reply(client.0, port, fin, &[]), None);
    assert_eq!(bed.reply(client.0, port, tcp::ACK, b"late"), None);
    assert_eq!(bed.count(Counter::FlowRace), 2);
    // By this the client learns that the backend still has the old connection, and breaks it off.
    let bare = bed.reply(client.0, port, tcp::ACK, &[]);
    assert_eq!(bare, Some((FAMILY.frontend(B), client)));
    // Nothing of that has begun or ended the new one.
    let agreed = bed.reply(client.0, port, tcp::SYN | tcp::ACK, &[]);
    assert_eq!(agreed, Some((FAMILY.frontend(B), client)));
    assert_eq!(bed.ask(client, B, tcp::ACK, 2), Some(port));
    let data = bed.reply(client.0, port, tcp::ACK, b"data");
    assert_eq!(data, Some((FAMILY.frontend(B), client)));
    // What the client sends late to the old service is none of the new flow's either.
    let late = bed.ask(client, A, tcp::ACK, 2).expect("it is let through");
    assert!(is_remapped(late), "{late}");
    let data = bed.reply(client.0, port, tcp::ACK, b"more");
    assert_eq!(data, Some((FAMILY.frontend(B), client)));
}

#[test]
fn of_two_successors_at_once_one_gets_the_port() {
    const ROUNDS: u16 = 20_000;
    const C: u16 = 2;
    let Some(mut bed) = Bed::new("two") else {
        return;
    };
    bed.0.share(FAMILY, C, A);
    let bed = &bed;
    let barrier = Barrier::new(2);
    let ports = [const { AtomicU16::new(0) }; 2];
    let (barrier, ports) = (&barrier, &ports);
    std::thread::scope(|scope| {
        for cpu in 0..2_usize {
            scope.spawn(move || {
                let mut cpus = nix::sched::CpuSet::new();
                cpus.set(cpu).expect("a processor's number");
                // With one processor there is no race, and nothing to lose.
                let _ = nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus);
                for round in 0..ROUNDS {
                    let client = client(20_000 + round);
                    if cpu == 0 {
                        let port = bed.connect(client, A, 1).expect("a free port");
                        bed.close(client, A, port, First::Client, 1);
                    }
                    barrier.wait();
                    let way = [B, C][cpu];
                    let port = bed.ask(client, way, tcp::SYN, 1).expect("some port");
                    ports[cpu].store(port, Ordering::SeqCst);
                    barrier.wait();
                    let both = [0, 1].map(|cpu: usize| ports[cpu].load(Ordering::SeqCst));
                    let kept = both.iter().filter(|port| **port == client.1).count();
                    // Both may have seen it taken: the second by the first, the first by the old
                    // flow while the second ended it.
                    assert!(kept <= 1, "{both:?} for {client:?}");
                    assert_ne!(both[0], both[1]);
                    let flags = tcp::SYN | tcp::ACK;
                    let reply = bed.reply(client.0, port, flags, &[]);
                    assert_eq!(reply, Some((FAMILY.frontend(way), client)));
                    assert_eq!(bed.ask(client, way, tcp::RST, 1), Some(port));
                    barrier.wait();
                }
            });
        }
    });
    assert_eq!(bed.count(Counter::FlowRace), 0);
}
