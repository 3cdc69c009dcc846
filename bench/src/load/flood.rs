//! Sends frames into one end of a node's link, faster than any socket, and counts those that come back
//! out of it translated.
//!
//! Everything is done by one processor, in one process's system calls: the kernel runs a program once
//! for each frame (BPF_PROG_TEST_RUN with BPF_F_TEST_XDP_LIVE_FRAMES), the link's other end receives what
//! that sends, the node forwards it, and a program at this end counts and drops it. So a frame takes
//! as long as all of that.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use aya::{
    Ebpf, TestRun,
    maps::{Array, PerCpuArray},
    programs::{TestRunOptions, Xdp, xdp::XdpMode},
};
use clap::{Args, ValueEnum};
use penstock_bench_ebpf::{
    Expected, Layout, MARK, NOTED, Plan, SAMPLES, TCP, UDP, WORDS, Window, at, count,
};

use super::{Sent, Summary};

/// The programs.
pub static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/penstock-bench-ebpf"));

/// How often each flow sends at least before it is measured, to be known.
const WARM_UP: u32 = 16;
/// Frames that are sent at least before, to learn how many a turn is.
const WARM_UP_FRAMES: u32 = 65_536;
/// Frames that are made before the node gets them: a NAPI poll's.
const BATCH: u32 = 64;
/// Senders are of the ranges for benchmarks (RFC 2544, appendix C.2.2; RFC 5180, 8). They differ in their last two
/// octets.
const SENDERS: (Ipv4Addr, Ipv6Addr) = (
    Ipv4Addr::new(198, 18, 0, 0),
    Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 0),
);
/// Where senders send from.
const SENDER: [u8; 6] = [2, 0, 0, 0, 5, 1];
/// The time to live of frames that are sent, and of those that one router has forwarded.
const TTL: u8 = 64;
/// At least so many of a hundred frames have to come back; else it is the loss that is measured.
const LEAST: u64 = 90;
/// How often a turn is taken at most in which fewer do.
const ATTEMPTS: usize = 3;

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    /// Datagrams.
    Udp,
    /// Segments of connections whose beginning nobody saw.
    Tcp,
}

impl Protocol {
    const fn number(self) -> u8 {
        match self {
            Self::Udp => UDP,
            Self::Tcp => TCP,
        }
    }
}

/// What goes where and comes out how.
#[derive(Args)]
pub struct Flood {
    /// What is sent.
    protocol: Protocol,
    /// This end of the node's link.
    #[arg(long)]
    interface: String,
    /// The Ethernet address of the other end.
    #[arg(long, value_parser = ethernet)]
    to_ethernet: Ethernet,
    /// Where frames are sent to.
    #[arg(long)]
    to: SocketAddr,
    /// Where the node has to forward them to.
    #[arg(long)]
    backend: SocketAddr,
    /// The address that they have to be from by then; the senders' own if none is said.
    #[arg(long)]
    from: Option<IpAddr>,
    /// How many flows there are; a power of two.
    #[arg(long, default_value_t = 4_096, value_parser = power_of_two)]
    flows: u32,
    /// How long it is measured.
    #[arg(long, default_value_t = 1_000)]
    for_ms: u64,
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ethernet([u8; 6]);

fn ethernet(text: &str) -> Result<Ethernet, String> {
    let octets: Option<Vec<u8>> = text
        .split(':')
        .map(|octet| u8::from_str_radix(octet, 16).ok())
        .collect();
    let octets = octets.and_then(|octets| octets.try_into().ok());
    octets
        .map(Ethernet)
        .ok_or_else(|| format!("{text} is no Ethernet address"))
}

/// Reads a number that is a power of two.
pub fn power_of_two(text: &str) -> Result<u32, String> {
    match text.parse::<u32>() {
        Ok(number) if number.is_power_of_two() => Ok(number),
        _ => Err("has to be a power of two".to_owned()),
    }
}

/// Lets everything through at this end of a link, until it is killed, after saying "ready".
pub fn pass(interface: &str) -> Result<()> {
    let mut programs = Ebpf::load(OBJECT).context("loading the programs")?;
    let program: &mut Xdp = program(&mut programs, "pass")?;
    program.load()?;
    program
        .attach(interface, XdpMode::Driver)
        .with_context(|| format!("attaching to {interface}"))?;
    println!("ready");
    loop {
        std::thread::park();
    }
}

/// Sends and counts.
pub fn run(flood: &Flood) -> Result<Summary> {
    let mut programs = Ebpf::load(OBJECT).context("loading the programs")?;
    let interface = nix::net::if_::if_nametoindex(flood.interface.as_str())
        .with_context(|| format!("there is no {}", flood.interface))?;
    let map = programs.map_mut("PLAN").context("PLAN")?;
    Array::try_from(map)?.set(0, flood.plan(interface), 0)?;
    let map = programs.map_mut("EXPECTED").context("EXPECTED")?;
    Array::try_from(map)?.set(0, flood.expected(), 0)?;

    let [maker, sink] = flood.programs();
    let sink = program(&mut programs, sink)?;
    sink.load()?;
    sink.attach(&flood.interface, XdpMode::Driver)
        .with_context(|| format!("attaching to {}", flood.interface))?;
    program(&mut programs, maker)?.load()?;

    // The kernel takes milliseconds to begin a run and to end it, so that a turn is one run, and is
    // measured where frames come out.
    let known = flood.send(&mut programs, (flood.flows * WARM_UP).max(WARM_UP_FRAMES))?;
    let frames = known.per_second() * flood.for_ms as f64 / 1e3;
    let mut attempts = 0;
    let (measured, after, lost) = loop {
        let before = Counts::read(&programs)?;
        let measured = flood.send(&mut programs, frames as u32 + flood.flows)?;
        let after = Counts::read(&programs)?;
        ensure!(
            after.wrong == 0,
            "{} frames came out of the node otherwise than as {:?}",
            after.wrong,
            flood.expected()
        );
        let (sent, forwarded) = (after.sent - before.sent, after.forwarded - before.forwarded);
        attempts += 1;
        if forwarded * 100 >= sent * LEAST {
            break (measured, after, sent.saturating_sub(forwarded));
        }
        // A receiver that the kernel hands to another thread waits for the sender to be done, and its queue
        // is short.
        ensure!(
            attempts < ATTEMPTS,
            "{forwarded} of {sent} frames were forwarded, and too few {ATTEMPTS} times"
        );
    };
    let map = programs.map("SAMPLE").context("SAMPLE")?;
    let samples: Array<_, [u64; WORDS]> = Array::try_from(map)?;
    for place in 0..kept(after.forwarded) {
        flood.intact(&octets(samples.get(&place, 0)?))?;
    }
    Ok(
        Summary::of_packets(measured.count, measured.seconds, lost).with(Sent {
            requests: after.forwarded,
            ..Sent::default()
        }),
    )
}

/// How many of so many frames that came out are kept.
fn kept(forwarded: u64) -> u32 {
    forwarded.div_ceil(NOTED).min(SAMPLES.into()) as u32
}

/// Frames that came out within a time.
struct Rate {
    count: u64,
    seconds: f64,
}

impl Rate {
    fn per_second(&self) -> f64 {
        self.count as f64 / self.seconds
    }
}

fn program<'a>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    let program = programs.program_mut(name).context("a program")?;
    Ok(program.try_into()?)
}

/// What the programs counted.
struct Counts {
    sent: u64,
    forwarded: u64,
    wrong: u64,
}

impl Counts {
    fn read(programs: &Ebpf) -> Result<Self> {
        let map = programs.map("COUNTS").context("COUNTS")?;
        let counts: PerCpuArray<_, u64> = PerCpuArray::try_from(map)?;
        let sum = |index: u32| -> Result<u64> { Ok(counts.get(&index, 0)?.iter().sum()) };
        Ok(Self {
            sent: sum(count::SENT)?,
            forwarded: sum(count::FORWARDED)?,
            wrong: sum(count::WRONG)?,
        })
    }
}

impl Flood {
    fn layout(&self) -> Layout {
        Layout::of(self.to.is_ipv6())
    }

    /// What makes frames and what counts them.
    fn programs(&self) -> [&'static str; 2] {
        if self.to.is_ipv6() {
            ["generate6", "swallow6"]
        } else {
            ["generate", "swallow"]
        }
    }

    /// Sends so many frames, with the program that is loaded already.
    fn send(&self, programs: &mut Ebpf, frames: u32) -> Result<Rate> {
        let map = programs.map_mut("WINDOW").context("WINDOW")?;
        Array::try_from(map)?.set(0, Window::default(), 0)?;
        let [maker, _] = self.programs();
        let any = vec![0; self.layout().length];
        program(programs, maker)?.test_run(TestRunOptions {
            data_in: Some(&any),
            repeat: frames,
            attrs: aya::TestRunAttrs::new().xdp_live_frames(BATCH),
            ..TestRunOptions::new()
        })?;
        let map = programs.map("WINDOW").context("WINDOW")?;
        let window: Window = Array::try_from(map)?.get(&0, 0)?;
        let (count, nanos) = window.between();
        ensure!(nanos > 0, "of {frames} frames none were forwarded");
        Ok(Rate {
            count,
            seconds: nanos as f64 / 1e9,
        })
    }

    fn plan(&self, interface: u32) -> Plan {
        let frame = self.frame();
        Plan {
            frame: words(&frame),
            header_sum: self.header_sum(&frame),
            transport_sum: self.transport_sum(&frame),
            flows: self.flows,
            interface,
            protocol: self.protocol.number().into(),
            pad: 0,
        }
    }

    fn expected(&self) -> Expected {
        let (source, mask) = match self.from {
            Some(node) => (node, [0xff; 16]),
            None => (self.senders(), self.senders_mask()),
        };
        Expected {
            source: address_words(source),
            mask: four_words(mask),
            destination: address_words(self.backend.ip()),
            port: self.backend.port().to_be_bytes(),
            protocol: self.protocol.number(),
            ttl: TTL - 1,
        }
    }

    const fn senders(&self) -> IpAddr {
        match self.to {
            SocketAddr::V4(_) => IpAddr::V4(SENDERS.0),
            SocketAddr::V6(_) => IpAddr::V6(SENDERS.1),
        }
    }

    /// What senders' addresses have in common: all but the last two octets.
    fn senders_mask(&self) -> [u8; 16] {
        let common = self.layout().address - 2;
        std::array::from_fn(|index| if index < common { 0xff } else { 0 })
    }

    /// A frame without what is each flow's own, and zeros behind it where it is shorter than the longest.
    fn frame(&self) -> [u8; WORDS * 8] {
        let layout = self.layout();
        let mut frame = [0; WORDS * 8];
        let mut put = |at: usize, octets: &[u8]| {
            for (to, from) in frame.iter_mut().skip(at).zip(octets) {
                *to = *from;
            }
        };
        let ip_length = (layout.length - ETHERNET) as u16;
        let transport_length = ip_length - layout.ip_header as u16;
        put(0, &self.to_ethernet.0);
        put(6, &SENDER);
        if self.to.is_ipv4() {
            put(at::ETHERTYPE, &[8, 0, 0x45, 0]);
            put(at::ETHERTYPE + 4, &ip_length.to_be_bytes());
            // Don't fragment, as from sockets.
            put(at::ETHERTYPE + 8, &[0x40, 0]);
        } else {
            put(at::ETHERTYPE, &[0x86, 0xdd, 0x60]);
            put(at::ETHERTYPE + 6, &transport_length.to_be_bytes());
        }
        put(layout.ttl, &[TTL]);
        put(layout.protocol, &[self.protocol.number()]);
        put(layout.source, &octets_of(self.senders()));
        put(layout.destination, &octets_of(self.to.ip()));
        put(layout.destination_port(), &self.to.port().to_be_bytes());
        let behind_ports = layout.source_port + 4;
        match self.protocol {
            Protocol::Udp => put(behind_ports, &transport_length.to_be_bytes()),
            // Five words of header, ACK, some window.
            Protocol::Tcp => put(behind_ports, &[0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0x20, 0]),
        }
        put(layout.mark, &MARK);
        frame
    }

    /// The sum of what the checksum of IPv4's header covers.
    fn header_sum(&self, frame: &[u8; WORDS * 8]) -> u32 {
        sum(frame
            .get(ETHERNET..ETHERNET + self.layout().ip_header)
            .unwrap_or_default())
    }

    /// The sum of what the checksum of TCP or UDP covers: addresses, protocol, length, and all the rest.
    fn transport_sum(&self, frame: &[u8; WORDS * 8]) -> u32 {
        let layout = self.layout();
        let transport = layout.length - ETHERNET - layout.ip_header;
        let covered = frame.get(layout.source..layout.length);
        sum(covered.unwrap_or_default()) + u32::from(self.protocol.number()) + transport as u32
    }

    /// Whether a frame's checksums are right.
    fn intact(&self, frame: &[u8; WORDS * 8]) -> Result<()> {
        // IPv6's header has none.
        let header = if self.to.is_ipv4() {
            penstock_bench_ebpf::checksum(self.header_sum(frame))
        } else {
            0
        };
        let transport = penstock_bench_ebpf::checksum(self.transport_sum(frame));
        ensure!(
            header == 0 && transport == 0,
            "a {:?} frame came out with a wrong checksum: {frame:02x?}",
            self.protocol
        );
        Ok(())
    }
}

/// The length of an Ethernet header.
const ETHERNET: usize = 14;

/// An address's octets.
fn octets_of(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// An address's words, with zeros behind IPv4's.
fn address_words(address: IpAddr) -> [[u8; 4]; 4] {
    let mut octets = [0; 16];
    for (to, from) in octets.iter_mut().zip(octets_of(address)) {
        *to = from;
    }
    four_words(octets)
}

fn four_words(octets: [u8; 16]) -> [[u8; 4]; 4] {
    let (words, _) = octets.as_chunks();
    std::array::from_fn(|index| words.get(index).copied().unwrap_or_default())
}

/// The sum of words of two octets, most significant first.
fn sum(octets: &[u8]) -> u32 {
    let words = octets.chunks(2).map(|word| match word {
        [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
        [high] => u32::from(*high) << 8,
        _ => 0,
    });
    words.sum()
}

/// A frame's words as they lie in memory.
fn words(frame: &[u8; WORDS * 8]) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    for (word, octets) in words.iter_mut().zip(frame.chunks_exact(8)) {
        *word = octets.try_into().map_or(0, u64::from_ne_bytes);
    }
    words
}

/// The octets of words that lie in memory so.
fn octets(words: [u64; WORDS]) -> [u8; WORDS * 8] {
    let mut octets = [0; WORDS * 8];
    for (to, word) in octets.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    octets
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flood(protocol: Protocol, is_v4: bool) -> Flood {
        let (to, backend) = if is_v4 {
            ("172.31.0.11:30000", "10.244.2.1:8080")
        } else {
            ("[fd00:31::11]:30000", "[fd00:244:2::1]:8080")
        };
        Flood {
            protocol,
            interface: "f11".to_owned(),
            to_ethernet: ethernet("02:00:00:00:00:0b").unwrap(),
            to: to.parse().unwrap(),
            backend: backend.parse().unwrap(),
            from: None,
            flows: 4_096,
            for_ms: 1,
        }
    }

    fn all() -> impl Iterator<Item = Flood> {
        let protocols = [Protocol::Udp, Protocol::Tcp].into_iter();
        protocols.flat_map(|protocol| [true, false].map(|is_v4| flood(protocol, is_v4)))
    }

    /// The frame that the program makes.
    fn made(flood: &Flood, number: u32) -> [u8; WORDS * 8] {
        let (plan, layout) = (flood.plan(1), flood.layout());
        let new = plan.variation(number);
        let mut frame = octets(plan.frame);
        let mut put = |at: usize, octets: [u8; 2]| frame[at..at + 2].copy_from_slice(&octets);
        put(layout.destination - 2, new.host);
        put(layout.source_port, new.port);
        if flood.to.is_ipv4() {
            put(at::HEADER_CHECKSUM, new.header_checksum);
        }
        match flood.protocol {
            Protocol::Udp => put(layout.udp_checksum(), new.transport_checksum),
            Protocol::Tcp => put(layout.tcp_checksum(), new.transport_checksum),
        }
        frame
    }

    #[test]
    fn every_flow_has_right_checksums() {
        for flood in all() {
            for number in 0..flood.flows {
                flood.intact(&made(&flood, number)).unwrap();
            }
        }
    }

    #[test]
    fn a_changed_octet_is_seen() {
        for flood in all() {
            let (whole, layout) = (made(&flood, 7), flood.layout());
            // IPv6's header has no checksum; of it the other covers addresses, protocol and no more.
            let from = if flood.to.is_ipv4() {
                ETHERNET
            } else {
                layout.source
            };
            for at in from..layout.length {
                let mut frame = whole;
                frame[at] ^= 1;
                assert!(flood.intact(&frame).is_err(), "{} {at}", flood.to);
            }
        }
    }

    #[test]
    fn a_sender_is_expected_whatever_its_last_octets() {
        let expected = flood(Protocol::Udp, false).expected();
        let found = |text: &str| Expected {
            source: address_words(text.parse().unwrap()),
            ..expected
        };
        assert!(expected.is_met_by(&found("2001:2::3ff"), 4));
        assert!(!expected.is_met_by(&found("2001:2::1:3ff"), 4));
    }

    #[test]
    fn as_many_frames_are_looked_at_as_are_kept() {
        assert_eq!([0, 1, 256, 257].map(kept), [0, 1, 1, 2]);
        assert_eq!(kept(10_000_000), SAMPLES);
    }

    #[test]
    fn ethernet_addresses_are_read() {
        assert_eq!(
            ethernet("02:00:00:00:00:0b"),
            Ok(Ethernet([2, 0, 0, 0, 0, 11]))
        );
        assert!(ethernet("02:00:00:00:00").is_err());
        assert!(ethernet("02:00:00:00:00:xx").is_err());
    }
}
