//! Turns a packet that nobody will serve into the answer that its sender deserves: a TCP reset or
//! an ICMP "port unreachable", from the address that it dialled. What kube-proxy's rules say to UDP
//! they say to SCTP too.

use penstock_common::{Counter, Plain, Proto};

use crate::{
    checksum::{fold, pseudo_header},
    env::Maps,
    family::{ETHERNET, Family},
    packet::{Packet, Refused},
    parse::{Segment, tcp},
    rewrite::{Pair, turn_around},
};

/// Length of an ICMP error's own header.
const ICMP_HEADER: usize = 8;
/// How much of a transport header an error must quote (RFC 792), in words.
const QUOTED: usize = 2;
/// The same of SCTP's: as far as the tag of an association that is to begin, by which its sender
/// knows the error for one about itself (RFC 9260, 10).
const QUOTED_OF_SCTP: usize = 5;

/// Replaces `packet` by the answer to it, addressed to where it came from.
#[inline(always)]
pub fn answer<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
    segment: &Segment<F::Addr>,
) -> Result<(), Counter> {
    // RFC 1122, 3.2.2: no errors about later fragments.
    if !segment.has_transport {
        return Err(Counter::FragmentUnmatched);
    }
    if segment.proto == Proto::TCP {
        // RFC 9293, 3.5.2: a reset is never answered.
        if segment.tcp_flags & tcp::RST != 0 {
            return Err(Counter::RejectUnanswered);
        }
        reset::<F>(packet, segment).map_err(|Refused| Counter::RewriteFailed)?;
    } else {
        if !maps.may_send_error() {
            return Err(Counter::RejectUnanswered);
        }
        let has_tag = packet.load::<u32>(segment.transport + 16).is_some();
        if segment.proto == Proto::SCTP && has_tag {
            error::<F, QUOTED_OF_SCTP>(packet, segment, F::PORT_UNREACHABLE, 0)
        } else {
            error::<F, QUOTED>(packet, segment, F::PORT_UNREACHABLE, 0)
        }
        .map_err(|Refused| Counter::RewriteFailed)?;
    }
    turn_around(packet)
}

/// RFC 9293, 3.10.7.1: the answer to a segment for a closed connection.
#[inline(always)]
fn reset<F: Family>(packet: &mut impl Packet, segment: &Segment<F::Addr>) -> Result<(), Refused> {
    let at = segment.transport;
    let length = segment.transport_length;
    let seq = u32::from_be(packet.load(at + 4).ok_or(Refused)?);
    let ack: u32 = packet.load(at + 8).ok_or(Refused)?;
    let offset: u8 = packet.load(at + 12).ok_or(Refused)?;
    let is_partial = has_partial_checksum(packet, segment, at + 16)?;
    let payload = u32::from(length).wrapping_sub(u32::from(offset >> 4) << 2);
    let flags = segment.tcp_flags;
    let counted = payload
        .wrapping_add(u32::from(flags & tcp::SYN != 0))
        .wrapping_add(u32::from(flags & tcp::FIN != 0));
    let (seq, ack, flags) = if flags & tcp::ACK != 0 {
        (ack, 0, tcp::RST)
    } else {
        (0, seq.wrapping_add(counted).to_be(), tcp::RST | tcp::ACK)
    };
    let ports = [segment.dst_port.raw(), segment.src_port.raw()].pair();
    let control = u32::from_ne_bytes([(tcp::HEADER as u8 / 4) << 4, flags, 0, 0]);
    let pseudo = pseudo_header(segment.dst, segment.src, Proto::TCP.0, tcp::HEADER as u16);
    let sum = u64::from(ports) + u64::from(seq) + u64::from(ack) + u64::from(control);
    // A checksum that the kernel has yet to complete holds the pseudo header's sum.
    let checksum = if is_partial {
        fold(pseudo)
    } else {
        !fold(pseudo + sum)
    };

    packet.resize((ETHERNET + F::HEADER + tcp::HEADER) as u32)?;
    let header = F::header(segment.dst, segment.src, Proto::TCP, tcp::HEADER as u16);
    packet.store(ETHERNET, &header)?;
    let at = ETHERNET + F::HEADER;
    packet.store(at, &[ports, seq, ack, control, [checksum, 0].pair()])
}

/// Replaces `packet` by the answer that it is too long for a way that carries `mtu` bytes (RFC 1191;
/// RFC 4443, 3.2).
#[inline(always)]
pub fn too_long<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
    segment: &Segment<F::Addr>,
    mtu: u32,
) -> Result<(), Counter> {
    if !segment.has_transport || !maps.may_send_error() {
        return Err(Counter::TooLong);
    }
    error::<F, QUOTED>(packet, segment, F::TOO_LONG, mtu.to_be())
        .map_err(|Refused| Counter::RewriteFailed)?;
    turn_around(packet)
}

/// Replaces `packet` by the answer that it was at the end of its life here (RFC 1812, 5.3.1; RFC 4443, 3.3).
#[inline(always)]
pub fn expired<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
    segment: &Segment<F::Addr>,
) -> Result<(), Counter> {
    if !segment.has_transport || !maps.may_send_error() {
        return Err(Counter::HopLimit);
    }
    error::<F, QUOTED>(packet, segment, F::EXPIRED, 0).map_err(|Refused| Counter::RewriteFailed)?;
    turn_around(packet)
}

/// RFC 792 and RFC 4443, 2.4: an error of a type and code, with what stands in its second word.
#[inline(always)]
fn error<F: Family, const QUOTED: usize>(
    packet: &mut impl Packet,
    segment: &Segment<F::Addr>,
    [icmp_type, code]: [u8; 2],
    second: u32,
) -> Result<(), Refused>
where
    [u32; QUOTED]: Plain,
{
    let quoted_header = F::quoted_header(packet, segment.network, segment.proto).ok_or(Refused)?;
    let quoted: [u32; QUOTED] = packet.load(segment.transport).ok_or(Refused)?;
    let payload = (ICMP_HEADER + F::HEADER + size_of::<[u32; QUOTED]>()) as u16;
    let first = u32::from_ne_bytes([icmp_type, code, 0, 0]);
    let mut sum = u64::from(first) + u64::from(second);
    for word in quoted_header.as_ref() {
        sum += u64::from(*word);
    }
    for word in quoted {
        sum += u64::from(word);
    }
    // ICMP for IPv4 covers no pseudo header.
    if F::HEADER_CHECKSUM.is_none() {
        sum += pseudo_header(segment.dst, segment.src, F::ICMP.0, payload);
    }
    let first = first | [0, !fold(sum)].pair();

    packet.resize((ETHERNET + F::HEADER) as u32 + u32::from(payload))?;
    let header = F::header(segment.dst, segment.src, F::ICMP, payload);
    packet.store(ETHERNET, &header)?;
    let at = ETHERNET + F::HEADER;
    packet.store(at, &[first, second])?;
    packet.store(at + ICMP_HEADER, &quoted_header)?;
    packet.store(at + ICMP_HEADER + F::HEADER, &quoted)
}

/// Whether a checksum holds the pseudo header's sum alone, as a local sender leaves it to the
/// interface to complete.
#[inline(always)]
pub(crate) fn has_partial_checksum<A: penstock_common::Addr>(
    packet: &impl Packet,
    segment: &Segment<A>,
    at: usize,
) -> Result<bool, Refused> {
    let checksum: u16 = packet.load(at).ok_or(Refused)?;
    let pseudo = pseudo_header(
        segment.src,
        segment.dst,
        segment.proto.0,
        segment.transport_length,
    );
    Ok(checksum == fold(pseudo))
}
