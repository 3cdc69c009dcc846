//! ICMP errors about translated packets: the packet that an error quotes is translated back, so
//! that its receiver recognises it (RFC 5508, 4.2). Path MTU discovery lives on this.

use penstock_common::{Be16, Counter, FlowFlags, FlowId, FlowKey, Proto, V4};

use crate::{
    checksum::Delta,
    env::{Maps, Record},
    family::{ETHERNET, Family, MAX_TRANSPORT},
    flow,
    packet::{Covers, Packet, Refused, Zero},
    parse, pod, rewrite,
};

/// Length of an ICMP error's own header, in both families.
const ICMP_HEADER: usize = 8;

/// Where the packet lies that an ICMP error quotes: a TCP, UDP or SCTP packet with its ports, or an ICMP
/// echo.
#[derive(Clone, Copy)]
pub struct Quote {
    /// The offset of its network header, which follows the error's own.
    network: usize,
    /// The offset of its transport header.
    transport: usize,
    /// Its transport protocol.
    proto: Proto,
}

impl Quote {
    /// As a number other than 0.
    #[inline(always)]
    pub fn to_bits(self) -> u32 {
        (self.network as u32) << 16 | (self.transport as u32) << 8 | u32::from(self.proto.0)
    }

    /// What such a number says; `None` for 0.
    #[inline(always)]
    pub fn from_bits(bits: u32) -> Option<Self> {
        let [_, network, transport, proto] = bits.to_be_bytes();
        (bits != 0).then_some(Self {
            network: network.into(),
            transport: transport.into(),
            proto: Proto(proto),
        })
    }

    /// The ports.
    #[inline(always)]
    fn ports<F: Family>(&self, packet: &impl Packet) -> Option<(Be16, Be16)> {
        if self.proto == F::ICMP {
            parse::echo::<F>(packet, self.transport)
        } else {
            parse::ports(packet, self.transport)
        }
    }

    /// The key of packets that go the opposite way of this one, or, asked for `same`, its own.
    #[inline(always)]
    fn key<F: Family>(
        &self,
        packet: &impl Packet,
        direction: u8,
        is_opposite: bool,
    ) -> Option<FlowKey<F::Addr>> {
        let (src, dst) = parse::addrs::<F>(packet, self.network)?;
        let (src_port, dst_port) = self.ports::<F>(packet)?;
        let (src, dst) = ((src, src_port), (dst, dst_port));
        Some(if is_opposite {
            FlowKey::new(direction, self.proto, dst, src)
        } else {
            FlowKey::new(direction, self.proto, src, dst)
        })
    }
}

/// Looks for what a packet quotes, as [`Maps::quote`] says it: 0 for nothing, else as
/// [`Quote::from_bits`] understands.
///
/// A function that the kernel checks once, for all that need it.
#[inline(always)]
pub fn look<F: Family>(packet: &impl Packet) -> u32 {
    quote::<F>(packet).map_or(0, Quote::to_bits)
}

#[inline(always)]
fn quote<F: Family>(packet: &impl Packet) -> Option<Quote> {
    let header = F::network(packet, ETHERNET)?;
    if header.proto != F::ICMP || header.fragment.is_later {
        return None;
    }
    let icmp_type: u8 = packet.load(header.transport)?;
    if !F::is_icmp_error(icmp_type) {
        return None;
    }
    let network = header.transport + ICMP_HEADER;
    // A quote may be cut short: only the ports must be there (RFC 792; RFC 1812, 4.3.2.3).
    let inner = F::network(packet, network)?;
    if inner.transport > MAX_TRANSPORT || inner.fragment.is_later {
        return None;
    }
    if !(pod::is_translated(inner.proto) || inner.proto == F::ICMP) {
        return None;
    }
    let quote = Quote {
        network,
        transport: inner.transport,
        proto: inner.proto,
    };
    quote.ports::<F>(packet)?;
    Some(quote)
}

/// The key of the requests of the flow that an error is about, which quotes what the client sees: one of
/// them, or a reply.
#[inline(always)]
pub(crate) fn request_key<F: Family, M: Maps<F>>(
    packet: &impl Packet,
    maps: &M,
    is_about_reply: bool,
) -> Option<FlowKey<F::Addr>> {
    maps.quote()?
        .key::<F>(packet, FlowKey::<F::Addr>::REQUEST, is_about_reply)
}

/// Translates an error about a request, on its way to the client.
///
/// It quotes what left the client's node: source → backend. Returns the flow's flags if it was ours.
#[inline(always)]
pub fn about_request<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Option<u16>, Counter> {
    translate::<F, M>(packet, maps, true)
}

/// Translates an error about a reply, on its way from the client to the backend.
///
/// It quotes what reached the client: frontend → client. Returns the flow's flags if it was ours; one
/// that is handed over is left as it is.
#[inline(always)]
pub fn about_reply<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Option<u16>, Counter> {
    translate::<F, M>(packet, maps, false)
}

#[inline(always)]
fn translate<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
    is_about_request: bool,
) -> Result<Option<u16>, Counter> {
    let Some(quote) = maps.quote() else {
        return Ok(None);
    };
    let Some(key) = quote.key::<F>(packet, direction(is_about_request), true) else {
        return Ok(None);
    };
    let Some(known) = flow::find::<F, M>(maps, &key) else {
        return Ok(None);
    };
    if !is_about_request && known.flags & FlowFlags::HANDED_OVER != 0 {
        // Its backend's node knows what the backend has sent.
        return Ok(Some(known.flags));
    }
    if !maps.requote(quote, known.id, is_about_request) {
        return Err(Counter::RewriteFailed);
    }
    maps.count(Counter::IcmpError);
    Ok(Some(known.flags))
}

/// Translates an error's addresses and those of the packet that it quotes, a flow's. Whether that was
/// done.
///
/// A function of its own: what it needs does not fit into one stack with the look-up of the flow.
#[inline(always)]
pub fn requote<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
    quote: Quote,
    id: FlowId,
    is_about_request: bool,
) -> bool {
    let Some(record) = maps.record(id) else {
        return false;
    };
    // What was sent instead of what is quoted: that packet's opposite's other direction, turned around.
    let sent = record.key(direction(is_about_request) ^ FlowKey::<F::Addr>::REPLY);
    let Some(key) = quote.key::<F>(packet, direction(is_about_request), true) else {
        return false;
    };
    // The record may have got another flow meanwhile.
    if maps.flow_id(&key) != Some(id) {
        return false;
    }
    replace::<F>(packet, &quote, &sent, is_about_request).is_ok()
}

/// The direction of the opposite of what is quoted, which is what the error's sender would have answered
/// with.
#[inline(always)]
fn direction(is_about_request: bool) -> u8 {
    if is_about_request {
        FlowKey::<V4>::REPLY
    } else {
        FlowKey::<V4>::REQUEST
    }
}

/// Rewrites the outer addresses and the quote, which becomes a packet with this key.
///
/// The quoted transport checksum stays: a quote is cut short and nobody verifies it.
#[inline(always)]
fn replace<F: Family>(
    packet: &mut impl Packet,
    quote: &Quote,
    sent: &FlowKey<F::Addr>,
    is_about_request: bool,
) -> Result<(), Refused> {
    let (src_port, dst_port) = quote.ports::<F>(packet).ok_or(Refused)?;
    let inner = parse::addrs::<F>(packet, quote.network).ok_or(Refused)?;
    let speaker = parse::addrs::<F>(packet, ETHERNET).ok_or(Refused)?.0;
    let is_receivers = speaker == inner.1;
    // The error's own follows its type and code.
    let checksum = quote.network - ICMP_HEADER + 2;
    let mut inside = Delta::default()
        .port(src_port, sent.src_port)
        .port(dst_port, sent.dst_port);
    let addresses = Delta::default()
        .addr(inner.0, sent.src)
        .addr(inner.1, sent.dst);
    if let Some(offset) = F::HEADER_CHECKSUM {
        // The quoted header's own checksum takes the change up: the quote's sum stays.
        packet.change_header_checksum(quote.network + offset, addresses)?;
    } else {
        inside = inside.and(addresses);
    }
    packet.store(quote.network + F::ADDRS, &[sent.src, sent.dst])?;
    let ports = (sent.src_port, sent.dst_port);
    rewrite::store_ports::<F>(packet, quote.transport, quote.proto, ports.0, ports.1)?;
    packet.change_checksum(checksum, inside, Covers::Segment, Zero::Plain)?;

    let old = parse::addrs::<F>(packet, ETHERNET).ok_or(Refused)?;
    let mut new = (sent.dst, sent.src);
    // The quote's receiver itself speaks with the address that it was sent to; a router on the way keeps
    // its own.
    if is_about_request && !is_receivers {
        new.0 = old.0;
    }
    rewrite::replace_addrs::<F>(packet, ETHERNET, old, new)?;
    if F::HEADER_CHECKSUM.is_none() {
        let outside = Delta::default().addr(old.0, new.0).addr(old.1, new.1);
        packet.change_checksum(checksum, outside, Covers::PseudoHeader, Zero::Plain)?;
    }
    Ok(())
}
