//! ICMP errors about translated packets: the packet that an error quotes is translated back, so
//! that its receiver recognises it (RFC 5508, 4.2). Path MTU discovery lives on this.

use penstock_common::{Be16, Counter, FlowFlags, FlowKey, Proto};

use crate::{
    checksum::Delta,
    env::Maps,
    family::{Family, Network},
    flow,
    packet::{Covers, Packet, Refused, Zero},
    parse,
};

/// Length of an ICMP error's own header, in both families.
const ICMP_HEADER: usize = 8;

/// The two addresses and ports of a quoted packet, and where they lie.
struct Quote<A> {
    network: usize,
    transport: usize,
    proto: Proto,
    src: A,
    dst: A,
    src_port: Be16,
    dst_port: Be16,
}

/// The packet that the ICMP message at `header.transport` quotes, if it is an error that quotes a
/// TCP, UDP or SCTP packet with its ports, or an ICMP echo.
#[inline(always)]
fn quote<F: Family>(packet: &impl Packet, header: &Network) -> Option<Quote<F::Addr>> {
    if header.proto != F::ICMP || header.fragment.is_later {
        return None;
    }
    let icmp_type: u8 = packet.load(header.transport)?;
    if !F::is_icmp_error(icmp_type) {
        return None;
    }
    let network = header.transport + ICMP_HEADER;
    let (src, dst) = parse::addrs::<F>(packet, network)?;
    // A quote may be cut short: only the ports must be there (RFC 792; RFC 1812, 4.3.2.3).
    let inner = F::network(packet, network)?;
    if inner.fragment.is_later {
        return None;
    }
    let (src_port, dst_port) = match inner.proto {
        Proto::TCP | Proto::UDP | Proto::SCTP => parse::ports(packet, inner.transport)?,
        proto if proto == F::ICMP => parse::echo::<F>(packet, inner.transport)?,
        _ => return None,
    };
    Some(Quote {
        network,
        transport: inner.transport,
        proto: inner.proto,
        src,
        dst,
        src_port,
        dst_port,
    })
}

/// The key of the requests of the flow that an error is about, which quotes what the client sees: one of
/// them, or a reply.
#[inline(always)]
pub(crate) fn request_key<F: Family>(
    packet: &impl Packet,
    header: &Network,
    is_about_reply: bool,
) -> Option<FlowKey<F::Addr>> {
    let quote = quote::<F>(packet, header)?;
    let (src, dst) = ((quote.src, quote.src_port), (quote.dst, quote.dst_port));
    let (client, frontend) = if is_about_reply {
        (dst, src)
    } else {
        (src, dst)
    };
    Some(FlowKey::new(
        FlowKey::<F::Addr>::REQUEST,
        quote.proto,
        client,
        frontend,
    ))
}

/// Translates an error about a request, on its way to the client.
///
/// It quotes what left the client's node: source → backend. Returns the flow's flags if it was ours.
#[inline(always)]
pub fn about_request<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
    network: usize,
    header: &Network,
    outer: (F::Addr, F::Addr),
) -> Result<Option<u16>, Counter> {
    translate::<F, M>(packet, maps, network, header, outer, true)
}

/// Translates an error about a reply, on its way from the client to the backend.
///
/// It quotes what reached the client: frontend → client. Returns the flow's flags if it was ours; one
/// that is handed over is left as it is.
#[inline(always)]
pub fn about_reply<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
    network: usize,
    header: &Network,
    outer: (F::Addr, F::Addr),
) -> Result<Option<u16>, Counter> {
    translate::<F, M>(packet, maps, network, header, outer, false)
}

#[inline(always)]
fn translate<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
    network: usize,
    header: &Network,
    outer: (F::Addr, F::Addr),
    is_about_request: bool,
) -> Result<Option<u16>, Counter> {
    let Some(quote) = quote::<F>(packet, header) else {
        return Ok(None);
    };
    // The quoted packet's opposite is what the error's sender would have answered with.
    let key = FlowKey::new(
        if is_about_request {
            FlowKey::<F::Addr>::REPLY
        } else {
            FlowKey::<F::Addr>::REQUEST
        },
        quote.proto,
        (quote.dst, quote.dst_port),
        (quote.src, quote.src_port),
    );
    let Some(known) = flow::find::<F, M>(maps, &key) else {
        return Ok(None);
    };
    if !is_about_request && known.flags & FlowFlags::HANDED_OVER != 0 {
        // Its backend's node knows what the backend has sent.
        return Ok(Some(known.flags));
    }
    // What was sent instead of what is quoted: the key's other direction, turned around.
    let (dst, src) = known.ends();
    let ends = if is_about_request {
        // The backend itself speaks with the service's address; a router on the way keeps its own.
        let speaker = if outer.0 == quote.dst { dst.0 } else { outer.0 };
        (speaker, src.0)
    } else {
        (dst.0, src.0)
    };
    let quoted = (src, dst);
    replace::<F>(packet, network, header, outer, ends, &quote, quoted)
        .map_err(|Refused| Counter::RewriteFailed)?;
    maps.count(Counter::IcmpError);
    Ok(Some(known.flags))
}

/// Rewrites the outer addresses and the quote.
///
/// The quoted transport checksum stays: a quote is cut short and nobody verifies it.
#[inline(always)]
fn replace<F: Family>(
    packet: &mut impl Packet,
    network: usize,
    header: &Network,
    old: (F::Addr, F::Addr),
    new: (F::Addr, F::Addr),
    quote: &Quote<F::Addr>,
    quoted: ((F::Addr, Be16), (F::Addr, Be16)),
) -> Result<(), Refused> {
    let (src, dst) = quoted;
    let checksum = header.transport + 2;
    let mut inside = Delta::default()
        .port(quote.src_port, src.1)
        .port(quote.dst_port, dst.1);
    let addresses = Delta::default()
        .addr(quote.src, src.0)
        .addr(quote.dst, dst.0);
    let at = quote.network + F::ADDRS;
    packet.store(at, &src.0)?;
    packet.store(at + size_of::<F::Addr>(), &dst.0)?;
    match F::HEADER_CHECKSUM {
        // The quoted header's own checksum takes the change up: the quote's sum stays.
        Some(offset) => packet.change_header_checksum(quote.network + offset, addresses)?,
        None => inside = inside.addr(quote.src, src.0).addr(quote.dst, dst.0),
    }
    crate::rewrite::store_ports::<F>(packet, quote.transport, quote.proto, src.1, dst.1)?;
    packet.change_checksum(checksum, inside, Covers::Segment, Zero::Plain)?;
    crate::rewrite::replace_addrs::<F>(packet, network, old, new)?;
    if F::HEADER_CHECKSUM.is_none() {
        let outer = Delta::default().addr(old.0, new.0).addr(old.1, new.1);
        packet.change_checksum(checksum, outer, Covers::PseudoHeader, Zero::Plain)?;
    }
    Ok(())
}
