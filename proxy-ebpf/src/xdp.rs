//! What XDP does of [`crate::external`]'s work: packets that come in by an interface to the outside
//! and go out again, before the host's stack has seen them.
//!
//! Invariant: a packet is either translated and sent as the TC hook would have done it, or passed on
//! to that hook with no byte changed. All is decided before the first byte is written; from then on
//! a packet is sent or, if the kernel refuses a change, dropped and counted.

use penstock_common::{AddressKind, Counter, FlowFlags, FlowKey, Proto};

use crate::{
    env::{Maps, Record},
    external,
    family::{ETHERNET, Family, Fragment},
    flow::{self, succession},
    forward,
    packet::Packet,
    parse::{self, Segment, tcp},
    pod::{self, Verdict},
    reject, rewrite, sctp, tunnel,
};

/// A flow's first packet in each period of as many seconds, as a power of two, is the TC hook's:
/// only what the host's stack sends makes the kernel find out whether a neighbour is still there
/// (it waits for about as long itself, base_reachable_time).
const PERIOD: u32 = 4;

/// One in so many new flows begins at the TC hook, for the same reason.
const OPENED_BELOW: u32 = 16;

/// A TCP, UDP or SCTP packet without anything out of the ordinary: options, extensions, parts, or a checksum that its
/// sender left to an interface to complete, which veth passes on as it is.
#[inline(always)]
fn plain<F: Family, M: Maps<F>>(packet: &impl Packet, maps: &M) -> Option<Segment<F::Addr>> {
    let addrs = parse::addrs::<F>(packet, ETHERNET)?;
    let mut header = F::network(packet, ETHERNET)?;
    if header.transport != ETHERNET + F::HEADER
        || header.fragment.is_part
        || !pod::is_translated(header.proto)
    {
        return None;
    }
    // What was just compared, as constants: the verifier need not follow them.
    header.transport = ETHERNET + F::HEADER;
    header.fragment = Fragment::NONE;
    let segment = parse::segment::<F>(packet, maps, ETHERNET, &header, addrs).ok()?;
    let is_left_open = if segment.proto == Proto::SCTP {
        sctp::is_left_open(packet, segment.transport)
    } else {
        let (checksum, _) = rewrite::transport_checksum(segment.proto);
        let at = segment.transport + checksum;
        reject::has_partial_checksum(packet, &segment, at)
    };
    match is_left_open {
        Ok(false) => Some(segment),
        _ => None,
    }
}

/// Translates a packet of a known flow and sends it on; [`Verdict::Open`] where it may begin one.
#[inline(always)]
pub fn carry<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let Some(dst) = packet.load(ETHERNET + F::ADDRS + size_of::<F::Addr>()) else {
        return Ok(Verdict::Pass);
    };
    if tunnel::is_own::<F, M>(packet, maps, &dst) {
        return Ok(Verdict::Pass);
    }
    let Some(address) = maps.address(&dst) else {
        return Ok(Verdict::Pass);
    };
    if packet.is_for_another_host() {
        return Ok(Verdict::Pass);
    }
    let Some(segment) = plain::<F, M>(packet, maps) else {
        return Ok(Verdict::Pass);
    };
    let mut key = FlowKey::new(
        FlowKey::<F::Addr>::REPLY,
        segment.proto,
        (segment.src, segment.src_port),
        (segment.dst, segment.dst_port),
    );
    let mut known = None;
    if address.kind == AddressKind::NODE && maps.may_respond(key.responder()) {
        known = flow::find::<F, M>(maps, &key);
    }
    let is_reply = known.is_some();
    if !is_reply {
        key.direction = FlowKey::<F::Addr>::REQUEST;
        known = flow::find::<F, M>(maps, &key);
    }
    let Some(known) = known else {
        return Ok(if begins(maps, &segment) {
            Verdict::Open
        } else {
            Verdict::Pass
        });
    };
    let is_over = if is_reply {
        flow::is_anothers(&known, &segment)
    } else {
        !flow::may_continue(maps, &known, &segment)
    };
    let is_late = is_reply && succession::is_late::<F, M>(packet, &known, &segment);
    let (_, seen) = known.record.last_seen();
    let is_due = (seen ^ maps.now_secs()) >> PERIOD != 0;
    let kind = known.flags & !FlowFlags::SUCCESSOR;
    if kind != FlowFlags::EXTERNAL || is_over || is_late || is_due {
        return Ok(Verdict::Pass);
    }
    let (src, dst) = known.ends();
    let Some(hops) = forward::hops::<F>(packet) else {
        return Ok(Verdict::Pass);
    };
    if !external::leaves::<F, M>(maps, &src.0, &dst.0) {
        return Ok(Verdict::Pass);
    }
    let Some(hop) = maps.next_hop(packet.ifindex(), &src.0, &dst.0) else {
        return Ok(Verdict::Pass);
    };
    // Of other interfaces nobody knows whether they take frames from XDP, or lose them.
    if hop.ifindex != packet.ifindex() && maps.xdp_uplink(hop.ifindex).is_none() {
        return Ok(Verdict::Pass);
    }

    flow::follow(packet, maps, &known, &segment, is_reply);
    rewrite::translate::<F>(packet, &segment, src, dst)?;
    forward::take_hop::<F>(packet, hops).map_err(forward::refused)?;
    forward::frame(packet, hop.to, hop.from).map_err(forward::refused)?;
    maps.count(if is_reply {
        Counter::ExternalReply
    } else {
        Counter::ExternalRequest
    });
    maps.count(Counter::ExternalXdp);
    Ok(Verdict::Routed(hop.ifindex))
}

/// Whether a packet that is of no flow begins one here. What is in the middle of a connection is
/// most likely the node's own.
#[inline(always)]
fn begins<F: Family>(maps: &impl Maps<F>, segment: &Segment<F::Addr>) -> bool {
    let is_first =
        segment.proto == Proto::UDP || segment.tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN;
    is_first && !maps.random().is_multiple_of(OPENED_BELOW)
}

/// Makes the flow that a packet begins. Who is refused, and why, is the TC hook's to say and count.
#[inline(always)]
pub fn open<F: Family, M: Maps<F>>(packet: &mut impl Packet, maps: &M) -> Result<Verdict, Counter> {
    let Some(segment) = plain::<F, M>(packet, maps) else {
        return Ok(Verdict::Pass);
    };
    maps.set_stamp(succession::stamp(packet, &segment));
    Ok(
        match external::open_flow::<F, M>(packet.ifindex(), maps, &segment) {
            Ok(verdict) => verdict,
            Err(_) => Verdict::Pass,
        },
    )
}
