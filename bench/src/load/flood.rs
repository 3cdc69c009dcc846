//! Sends frames into one end of a node's link, faster than any socket, and counts those that come back
//! out of it translated.
//!
//! Everything is done by one processor, in one process's system calls: the kernel runs a program once
//! for each frame (BPF_PROG_TEST_RUN with BPF_F_TEST_XDP_LIVE_FRAMES), the link's other end receives what
//! that sends, the node forwards it, and a program at this end counts and drops it. So a frame takes
//! as long as all of that.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context, Result, ensure};
use aya::{
    Ebpf, TestRun,
    maps::{Array, PerCpuArray},
    programs::{TestRunOptions, Xdp, xdp::XdpMode},
};
use clap::{Args, ValueEnum};
use penstock_bench_ebpf::{Expected, LENGTH, MARK, MARK_AT, Plan, TCP, UDP, Window, at, count};

use super::Summary;

/// The programs.
static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/penstock-bench-ebpf"));

/// How often each flow sends at least before it is measured, to be known.
const WARM_UP: u32 = 16;
/// Frames that are sent at least before, to learn how many a turn is.
const WARM_UP_FRAMES: u32 = 65_536;
/// Frames that are made before the node gets them: a NAPI poll's.
const BATCH: u32 = 64;
/// Senders are of the range for benchmarks (RFC 2544, appendix C.2.2).
const SENDERS: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 0);
/// What senders' addresses have in common.
const SENDERS_MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 0, 0);
/// Where senders send from.
const SENDER: [u8; 6] = [2, 0, 0, 0, 5, 1];
/// The time to live of frames that are sent, and of those that one router has forwarded.
const TTL: u8 = 64;
/// At least so many of a hundred frames have to come back; else it is the loss that is measured.
const LEAST: u64 = 90;

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
    to: SocketAddrV4,
    /// Where the node has to forward them to.
    #[arg(long)]
    backend: SocketAddrV4,
    /// The address that they have to be from by then; the senders' own if none is said.
    #[arg(long)]
    from: Option<Ipv4Addr>,
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

    let sink = program(&mut programs, "swallow")?;
    sink.load()?;
    sink.attach(&flood.interface, XdpMode::Driver)
        .with_context(|| format!("attaching to {}", flood.interface))?;
    program(&mut programs, "generate")?.load()?;

    // The kernel takes milliseconds to begin a run and to end it, so that a turn is one run, and is
    // measured where frames come out.
    let known = send(&mut programs, (flood.flows * WARM_UP).max(WARM_UP_FRAMES))?;
    let frames = known.per_second() * flood.for_ms as f64 / 1e3;
    let before = Counts::read(&programs)?;
    let measured = send(&mut programs, frames as u32 + flood.flows)?;
    let after = Counts::read(&programs)?;

    ensure!(
        after.wrong == 0,
        "{} frames came out of the node otherwise than as {:?}",
        after.wrong,
        flood.expected()
    );
    let (sent, forwarded) = (after.sent - before.sent, after.forwarded - before.forwarded);
    ensure!(
        forwarded * 100 >= sent * LEAST,
        "{forwarded} of {sent} frames were forwarded"
    );
    let map = programs.map("SAMPLE").context("SAMPLE")?;
    let sample: [u64; LENGTH / 8] = Array::try_from(map)?.get(&0, 0)?;
    intact(&octets(sample), flood.protocol)?;
    let lost = sent.saturating_sub(forwarded);
    Ok(Summary::of_packets(measured.count, measured.seconds, lost))
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

/// Sends so many frames, with the program that is loaded already.
fn send(programs: &mut Ebpf, frames: u32) -> Result<Rate> {
    let map = programs.map_mut("WINDOW").context("WINDOW")?;
    Array::try_from(map)?.set(0, Window::default(), 0)?;
    program(programs, "generate")?.test_run(TestRunOptions {
        data_in: Some(&[0; LENGTH]),
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
    fn plan(&self, interface: u32) -> Plan {
        let frame = self.frame();
        Plan {
            frame: words(&frame),
            header_sum: sum(&frame[14..34]),
            transport_sum: transport_sum(&frame),
            flows: self.flows,
            interface,
            protocol: self.protocol.number().into(),
            pad: 0,
        }
    }

    fn expected(&self) -> Expected {
        let (source, mask) = match self.from {
            Some(node) => (node, Ipv4Addr::BROADCAST),
            None => (SENDERS, SENDERS_MASK),
        };
        Expected {
            source: source.octets(),
            mask: mask.octets(),
            destination: self.backend.ip().octets(),
            port: self.backend.port().to_be_bytes(),
            protocol: self.protocol.number(),
            ttl: TTL - 1,
        }
    }

    /// A frame without what is each flow's own.
    fn frame(&self) -> [u8; LENGTH] {
        let mut frame = [0; LENGTH];
        let mut put = |at: usize, octets: &[u8]| {
            for (to, from) in frame.iter_mut().skip(at).zip(octets) {
                *to = *from;
            }
        };
        let ip_length = (LENGTH - ETHERNET) as u16;
        put(0, &self.to_ethernet.0);
        put(6, &SENDER);
        put(at::ETHERTYPE, &[8, 0, 0x45, 0]);
        put(at::ETHERTYPE + 4, &ip_length.to_be_bytes());
        // Don't fragment, as from sockets.
        put(at::ETHERTYPE + 8, &[0x40, 0, TTL, self.protocol.number()]);
        put(at::SOURCE, &SENDERS.octets());
        put(at::DESTINATION, &self.to.ip().octets());
        put(at::DESTINATION_PORT, &self.to.port().to_be_bytes());
        match self.protocol {
            Protocol::Udp => put(38, &(ip_length - IP).to_be_bytes()),
            // Five words of header, ACK, some window.
            Protocol::Tcp => put(38, &[0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0x20, 0]),
        }
        put(MARK_AT, &MARK);
        frame
    }
}

/// The length of an Ethernet header.
const ETHERNET: usize = 14;
/// The length of IPv4's header.
const IP: u16 = 20;

/// The sum of words of two octets, most significant first.
fn sum(octets: &[u8]) -> u32 {
    let words = octets.chunks(2).map(|word| match word {
        [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
        [high] => u32::from(*high) << 8,
        _ => 0,
    });
    words.sum()
}

/// The sum of what the checksum of TCP or UDP covers: addresses, protocol, length, and all the rest.
fn transport_sum(frame: &[u8; LENGTH]) -> u32 {
    let transport = LENGTH - ETHERNET - usize::from(IP);
    sum(&frame[at::SOURCE..]) + u32::from(frame[at::PROTOCOL]) + transport as u32
}

/// Whether a frame's checksums are right.
fn intact(frame: &[u8; LENGTH], protocol: Protocol) -> Result<()> {
    let header = penstock_bench_ebpf::checksum(sum(&frame[14..34]));
    let transport = penstock_bench_ebpf::checksum(transport_sum(frame));
    ensure!(
        header == 0 && transport == 0,
        "a {protocol:?} frame came out with a wrong checksum: {frame:02x?}"
    );
    Ok(())
}

/// A frame's words as they lie in memory.
fn words(frame: &[u8; LENGTH]) -> [u64; LENGTH / 8] {
    let mut words = [0; LENGTH / 8];
    for (word, octets) in words.iter_mut().zip(frame.chunks_exact(8)) {
        *word = octets.try_into().map_or(0, u64::from_ne_bytes);
    }
    words
}

/// The octets of words that lie in memory so.
fn octets(words: [u64; LENGTH / 8]) -> [u8; LENGTH] {
    let mut octets = [0; LENGTH];
    for (to, word) in octets.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    octets
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flood(protocol: Protocol) -> Flood {
        Flood {
            protocol,
            interface: "f11".to_owned(),
            to_ethernet: ethernet("02:00:00:00:00:0b").unwrap(),
            to: "172.31.0.11:30000".parse().unwrap(),
            backend: "10.244.2.1:8080".parse().unwrap(),
            from: None,
            flows: 4_096,
            for_ms: 1,
        }
    }

    /// The frame that the program makes.
    fn made(flood: &Flood, number: u32) -> [u8; LENGTH] {
        let plan = flood.plan(1);
        let new = plan.variation(number);
        let mut frame = octets(plan.frame);
        let mut put = |at: usize, octets: [u8; 2]| frame[at..at + 2].copy_from_slice(&octets);
        put(at::SOURCE + 2, new.host);
        put(at::SOURCE_PORT, new.port);
        put(at::HEADER_CHECKSUM, new.header_checksum);
        match flood.protocol {
            Protocol::Udp => put(at::UDP_CHECKSUM, new.transport_checksum),
            Protocol::Tcp => put(at::TCP_CHECKSUM, new.transport_checksum),
        }
        frame
    }

    #[test]
    fn every_flow_has_right_checksums() {
        for protocol in [Protocol::Udp, Protocol::Tcp] {
            let flood = flood(protocol);
            for number in 0..flood.flows {
                intact(&made(&flood, number), protocol).unwrap();
            }
        }
    }

    #[test]
    fn a_changed_octet_is_seen() {
        for protocol in [Protocol::Udp, Protocol::Tcp] {
            let whole = made(&flood(protocol), 7);
            for at in ETHERNET..LENGTH {
                let mut frame = whole;
                frame[at] ^= 1;
                assert!(intact(&frame, protocol).is_err(), "{protocol:?} {at}");
            }
        }
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
