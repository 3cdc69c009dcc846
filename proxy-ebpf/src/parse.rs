//! Bytes to a [`Segment`]: who sends to whom, and where the fields lie that translation changes.
//!
//! Reads only; a header that lies beyond the frame's end is `None`, never a guess.

use penstock_common::{Be16, Counter, FragmentKey, FragmentPorts, Proto};

use crate::{
    env::Maps,
    family::{Family, Network},
    packet::Packet,
    sctp,
};

/// TCP's flags and header (RFC 9293, 3.1).
pub mod tcp {
    /// No more data from the sender.
    pub const FIN: u8 = 1;
    /// The sender's first segment.
    pub const SYN: u8 = 2;
    /// The connection is refused or broken.
    pub const RST: u8 = 4;
    /// The acknowledgment field counts.
    pub const ACK: u8 = 16;
    /// The header's length without options, in bytes.
    pub const HEADER: usize = 20;
}

/// A TCP, UDP or SCTP packet, or an ICMP echo.
#[derive(Clone, Copy)]
pub struct Segment<A> {
    /// The network header's offset.
    pub network: usize,
    /// The transport header's offset.
    pub transport: usize,
    /// Its length as the network header says.
    pub transport_length: u16,
    /// TCP, UDP, SCTP or ICMP.
    pub proto: Proto,
    /// TCP's flags, or what stands for them ([`crate::sctp::flags`]); 0 for UDP and for later
    /// fragments.
    pub tcp_flags: u8,
    /// Whether the transport header is in this packet; not so in later fragments.
    pub has_transport: bool,
    /// Source address.
    pub src: A,
    /// Destination address.
    pub dst: A,
    /// Source port.
    pub src_port: Be16,
    /// Destination port.
    pub dst_port: Be16,
}

/// Source and destination address of the header at `at`.
#[inline(always)]
pub fn addrs<F: Family>(packet: &impl Packet, at: usize) -> Option<(F::Addr, F::Addr)> {
    let src = packet.load(at + F::ADDRS)?;
    let dst = packet.load(at + F::ADDRS + size_of::<F::Addr>())?;
    Some((src, dst))
}

/// Source and destination port of the header at `at`.
#[inline(always)]
pub fn ports(packet: &impl Packet, at: usize) -> Option<(Be16, Be16)> {
    Some((packet.load(at)?, packet.load(at + 2)?))
}

/// What stands for the ports of an ICMP echo: the identifier is the asking end's (RFC 5508, 3.1).
/// `None` for any other message.
#[inline(always)]
pub fn echo<F: Family>(packet: &impl Packet, at: usize) -> Option<(Be16, Be16)> {
    let icmp_type: u8 = packet.load(at)?;
    let id: Be16 = packet.load(at + 4)?;
    let [request, reply] = F::ECHO;
    if icmp_type == request {
        Some((id, Be16::default()))
    } else if icmp_type == reply {
        Some((Be16::default(), id))
    } else {
        None
    }
}

/// A TCP, UDP or SCTP packet's fields, or an ICMP echo's; for a later fragment with the ports of its datagram.
#[inline(always)]
pub fn segment<F: Family>(
    packet: &impl Packet,
    maps: &impl Maps<F>,
    network: usize,
    header: &Network,
    addrs: (F::Addr, F::Addr),
) -> Result<Segment<F::Addr>, Counter> {
    let transport = header.transport;
    let mut segment = Segment {
        network,
        transport,
        transport_length: header.transport_length,
        proto: header.proto,
        tcp_flags: 0,
        has_transport: !header.fragment.is_later,
        src: addrs.0,
        dst: addrs.1,
        src_port: Be16::default(),
        dst_port: Be16::default(),
    };
    if header.fragment.is_later {
        let key = FragmentKey::new(addrs.0, addrs.1, header.fragment.id, header.proto);
        let ports = maps.fragment(&key).ok_or(Counter::FragmentUnmatched)?;
        let age = maps.now_secs().wrapping_sub(ports.seen_secs);
        if age > FragmentPorts::LASTS_SECS {
            return Err(Counter::FragmentUnmatched);
        }
        segment.src_port = ports.src_port;
        segment.dst_port = ports.dst_port;
        return Ok(segment);
    }
    let (src_port, dst_port) = if header.proto == F::ICMP {
        echo::<F>(packet, transport).ok_or(Counter::Truncated)?
    } else {
        ports(packet, transport).ok_or(Counter::Truncated)?
    };
    segment.src_port = src_port;
    segment.dst_port = dst_port;
    if header.proto == Proto::TCP {
        segment.tcp_flags = packet.load(transport + 13).ok_or(Counter::Truncated)?;
        let _: u16 = packet.load(transport + 18).ok_or(Counter::Truncated)?;
    } else if header.proto == Proto::SCTP {
        if header.fragment.is_part {
            // The checksum covers what nobody has seen yet.
            return Err(Counter::RewriteFailed);
        }
        let chunk: u16 = packet
            .load(transport + sctp::HEADER)
            .ok_or(Counter::Truncated)?;
        if usize::from(header.transport_length) < sctp::LEAST {
            return Err(Counter::Truncated);
        }
        let [chunk, _] = chunk.to_ne_bytes();
        segment.tcp_flags = sctp::flags(chunk);
    } else {
        let _: u16 = packet.load(transport + 6).ok_or(Counter::Truncated)?;
    }
    Ok(segment)
}

/// Lets the later fragments of this datagram find its ports, if it has any.
#[inline(always)]
pub fn remember_ports<F: Family>(
    maps: &impl Maps<F>,
    header: &Network,
    segment: &Segment<F::Addr>,
) {
    if header.fragment.is_part && !header.fragment.is_later {
        let key = FragmentKey::new(segment.src, segment.dst, header.fragment.id, header.proto);
        let ports = FragmentPorts {
            src_port: segment.src_port,
            dst_port: segment.dst_port,
            seen_secs: maps.now_secs(),
        };
        maps.set_fragment(&key, &ports);
    }
}
