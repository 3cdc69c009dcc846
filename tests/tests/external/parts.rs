//! Datagrams of clients outside that come in parts: translated part by part, by what the first one says.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use penstock_testbed::{Host, Pod, eventually, require_kernel};

use crate::stage::{BALANCER, Pods, Stage, same_family};

/// How long the first part's payload is, UDP's header included: a multiple of eight.
const FIRST: usize = 64;
/// The whole datagram, with UDP's header.
const WHOLE: usize = 100;
const UDP: u8 = 17;

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// The ones' complement sum of words.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2);
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    let mut sum: u32 = words.map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The datagram, from UDP's header on.
fn datagram(from: IpAddr, to: SocketAddr) -> Vec<u8> {
    let mut datagram = Vec::new();
    datagram.extend(40_000_u16.to_be_bytes());
    datagram.extend(to.port().to_be_bytes());
    datagram.extend((WHOLE as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.resize(WHOLE, b'?');
    let pseudo = [octets(from), octets(to.ip()), vec![0, UDP, 0, WHOLE as u8]].concat();
    let checksum = !sum(&[pseudo, datagram.clone()].concat());
    datagram[6..8].copy_from_slice(&checksum.to_be_bytes());
    datagram
}

/// Both of its parts as frames, the first one first.
fn parts(stage: &Stage, to: SocketAddr, number: u16) -> Result<[Vec<u8>; 2]> {
    let node = &stage.nodes[0].host;
    let from = same_family(&stage.client, to.ip());
    let datagram = datagram(from, to);
    let (is_v4, to) = (to.is_ipv4(), to.ip());
    let head = [node.ethernet("eth0")?, stage.client.ethernet("eth0")?].concat();
    let part = |offset: usize, payload: &[u8], more: bool| {
        let mut frame = head.clone();
        let more = u16::from(more);
        if is_v4 {
            let mut header = vec![0x45, 0];
            header.extend((20 + payload.len() as u16).to_be_bytes());
            header.extend(number.to_be_bytes());
            header.extend((more << 13 | (offset / 8) as u16).to_be_bytes());
            header.extend([64, UDP, 0, 0]);
            header.extend(octets(from));
            header.extend(octets(to));
            let checksum = !sum(&header);
            header[10..12].copy_from_slice(&checksum.to_be_bytes());
            frame.extend([0x08, 0x00]);
            frame.extend(header);
        } else {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend((8 + payload.len() as u16).to_be_bytes());
            // A fragment header comes first (RFC 8200, 4.5).
            frame.extend([44, 64]);
            frame.extend(octets(from));
            frame.extend(octets(to));
            frame.extend([UDP, 0]);
            frame.extend((offset as u16 | more).to_be_bytes());
            frame.extend(u32::from(number).to_be_bytes());
        }
        frame.extend(payload);
        frame
    };
    Ok([
        part(0, &datagram[..FIRST], true),
        part(FIRST, &datagram[FIRST..], false),
    ])
}

/// How many datagrams a host has taken whole, with those that nobody there was waiting for.
fn taken(host: &Host, is_v4: bool) -> Result<u64> {
    let (file, names) = if is_v4 {
        ("snmp", ["InDatagrams", "NoPorts"])
    } else {
        ("snmp6", ["Udp6InDatagrams", "Udp6NoPorts"])
    };
    let text = host.run("cat", &[&format!("/proc/thread-self/net/{file}")])?;
    let count = |name: &str| -> Result<u64> {
        if !is_v4 {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            return Ok(line.context(name.to_owned())?.trim().parse()?);
        }
        let mut lines = text.lines().filter(|line| line.starts_with("Udp: "));
        let (names, values) = lines.next().zip(lines.next()).context("UDP's counters")?;
        let mut columns = names.split(' ').zip(values.split(' '));
        let column = columns.find(|(column, _)| *column == name);
        Ok(column.context(name.to_owned())?.1.parse()?)
    };
    Ok(count(names[0])? + count(names[1])?)
}

/// Sends datagrams to an address, which is the node's own or a balancer's.
fn arrive(stage: &Stage, backend: &Pod, to: SocketAddr, number: u16) -> Result<()> {
    let agent = &stage.agents[0];
    let is_v4 = to.is_ipv4();
    let is_own = same_family(&stage.nodes[0].host, to.ip()) == to.ip();
    let send = |frame: &[u8]| stage.client.send_frame("eth0", frame);
    let before = taken(&backend.host, is_v4)?;
    let [first, second] = parts(stage, to, number)?;
    send(&first)?;
    send(&second)?;
    eventually("a datagram whose parts come in order arrives", || {
        ensure!(taken(&backend.host, is_v4)? == before + 1);
        Ok(())
    })?;
    // The ports are in the first part: what comes before it can't be told whose it is. At a balancer's
    // address it is dropped; at its own the node may be waiting for it.
    let unmatched = agent.count("fragment_unmatched")?;
    let dropped = unmatched + u64::from(!is_own);
    let [first, second] = parts(stage, to, number + 1)?;
    send(&second)?;
    send(&first)?;
    // Nothing of it is left that would be in the way of the next one.
    let [first, second] = parts(stage, to, number + 2)?;
    send(&first)?;
    send(&second)?;
    eventually("the next datagram arrives", || {
        ensure!(taken(&backend.host, is_v4)? >= before + 2);
        Ok(())
    })?;
    assert_eq!(taken(&backend.host, is_v4)?, before + 2);
    assert_eq!(agent.count("fragment_unmatched")?, dropped);
    Ok(())
}

#[test]
fn datagrams_arrive_whose_first_part_is_first() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    for xdp in ["off", "generic"] {
        let stage = Stage::with(Pods::Routed, &["--xdp", xdp])?;
        for (number, backend) in stage.servers.iter().enumerate() {
            stage.web(&[backend], |web| web)?;
            let balancers = BALANCER.map(|ip| ip.parse().expect("an address"));
            let node = &stage.nodes[0].host;
            let own = [node.ip4, node.ip6].map(|ip| SocketAddr::new(ip, 30_081));
            let others = balancers.map(|ip| SocketAddr::new(ip, 80));
            for to in own.into_iter().chain(others) {
                // Neighbours are found first.
                stage.client.who_answers("udp", &to.to_string())?;
                arrive(&stage, backend, to, 10 * number as u16)
                    .with_context(|| format!("{to}, {}, XDP {xdp}", backend.host.name))?;
            }
        }
    }
    Ok(())
}
