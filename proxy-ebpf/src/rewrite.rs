//! The only code that changes addresses, ports and checksums of a packet that goes on.

use penstock_common::{Be16, Counter, Proto};

use crate::{
    checksum::Delta,
    family::Family,
    packet::{Covers, Packet, Refused, Zero},
    parse::Segment,
    sctp,
};

/// Where a transport's checksum lies, other than SCTP's, and what zero means in it.
#[inline(always)]
pub fn transport_checksum(proto: Proto) -> (usize, Zero) {
    match proto {
        Proto::TCP => (16, Zero::Plain),
        Proto::UDP => (6, Zero::MeansNone),
        _ => (2, Zero::Plain),
    }
}

/// Gives a packet another source and destination.
#[inline(always)]
pub fn translate<F: Family>(
    packet: &mut impl Packet,
    segment: &Segment<F::Addr>,
    src: (F::Addr, Be16),
    dst: (F::Addr, Be16),
) -> Result<(), Counter> {
    try_translate::<F>(packet, segment, src, dst).map_err(|Refused| Counter::RewriteFailed)
}

#[inline(always)]
fn try_translate<F: Family>(
    packet: &mut impl Packet,
    segment: &Segment<F::Addr>,
    src: (F::Addr, Be16),
    dst: (F::Addr, Be16),
) -> Result<(), Refused> {
    let addresses = Delta::default()
        .addr(segment.src, src.0)
        .addr(segment.dst, dst.0);
    replace_addrs::<F>(
        packet,
        segment.network,
        (segment.src, segment.dst),
        (src.0, dst.0),
    )?;
    if !segment.has_transport {
        return Ok(());
    }
    if segment.proto == Proto::SCTP {
        let ports = [src.1.raw(), dst.1.raw()].pair();
        let (at, length) = (segment.transport, segment.transport_length);
        return sctp::store_ports(packet, at, length, ports);
    }
    let (at, zero) = transport_checksum(segment.proto);
    let checksum = segment.transport + at;
    let ports = Delta::default()
        .port(segment.src_port, src.1)
        .port(segment.dst_port, dst.1);
    store_ports::<F>(packet, segment.transport, segment.proto, src.1, dst.1)?;
    // ICMP's checksum covers no addresses (RFC 792), ICMPv6's does (RFC 4443, 2.3).
    if segment.proto != Proto::ICMP {
        packet.change_checksum(checksum, addresses, Covers::PseudoHeader, zero)?;
    }
    packet.change_checksum(checksum, ports, Covers::Segment, zero)
}

/// Replaces the ports of the header at `at`, or an echo's identifier, which is one of the two.
#[inline(always)]
pub fn store_ports<F: Family>(
    packet: &mut impl Packet,
    at: usize,
    proto: Proto,
    src: Be16,
    dst: Be16,
) -> Result<(), Refused> {
    if proto == F::ICMP {
        packet.store(at + 4, &(src.raw() | dst.raw()))
    } else {
        packet.store(at, &[src.raw(), dst.raw()].pair())
    }
}

/// Replaces both addresses of the header at `at`, and its checksum if it has one.
#[inline(always)]
pub fn replace_addrs<F: Family>(
    packet: &mut impl Packet,
    at: usize,
    old: (F::Addr, F::Addr),
    new: (F::Addr, F::Addr),
) -> Result<(), Refused> {
    let addrs = [new.0, new.1];
    match F::HEADER_CHECKSUM {
        Some(checksum) => {
            let delta = Delta::default().addr(old.0, new.0).addr(old.1, new.1);
            packet.store(at + F::ADDRS, &addrs)?;
            packet.change_header_checksum(at + checksum, delta)
        }
        None => packet.store_uncovered(at + F::ADDRS, &addrs),
    }
}

/// Two 16-bit fields as they lie side by side in memory.
pub trait Pair {
    /// Both in one word.
    fn pair(self) -> u32;
}

impl Pair for [u16; 2] {
    #[inline(always)]
    fn pair(self) -> u32 {
        let [[a, b], [c, d]] = self.map(u16::to_ne_bytes);
        u32::from_ne_bytes([a, b, c, d])
    }
}

/// Sends a packet back to where it came from, as far as Ethernet is concerned.
#[inline(always)]
pub fn turn_around(packet: &mut impl Packet) -> Result<(), Counter> {
    // Destination, then source: three halves of a word each (IEEE 802.3, 3.2).
    let [a, b, c]: [u32; 3] = packet.load(0).ok_or(Counter::RewriteFailed)?;
    let half = |high: u32, low: u32| {
        let ([_, high], [low, _]) = (halves(high), halves(low));
        [high, low].pair()
    };
    let swapped = [half(b, c), half(c, a), half(a, b)];
    packet
        .store(0, &swapped)
        .map_err(|Refused| Counter::RewriteFailed)
}

/// The two 16-bit fields of a word as they lie in memory.
#[inline(always)]
fn halves(word: u32) -> [u16; 2] {
    let [a, b, c, d] = word.to_ne_bytes();
    [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])]
}
