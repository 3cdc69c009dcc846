//! Who gets a source port at once that another flow still has: the successor of one that is over.
//!
//! Invariant: a backend that is asked from the port anew takes the new connection for what it is. It
//! has forgotten the old one where the client ended it first, or broke it off; where the
//! backend ended it first, it waits (RFC 9293, 3.6.1) and lets an opening segment in only if its
//! timestamp is newer than the last one's (RFC 6191). A client's timestamps towards two services of
//! the same backend have nothing to do with each other, so they are compared.

use penstock_common::{Be16, Fins, FlowFlags, FlowId, FlowKey, FlowState, Proto};

use super::{Known, free, idle_for, lasts, unlink};
use crate::{
    env::{Maps, Record},
    family::Family,
    packet::Packet,
    parse::{Segment, tcp},
};

/// A segment's timestamp (RFC 7323, 3.2), 0 if it has none where the stacks put it whose clients are
/// many: after the maximum segment size in an opening one, first in any other.
#[inline(always)]
pub fn stamp<A>(packet: &impl Packet, segment: &Segment<A>) -> u32 {
    /// No operation twice, or "selective acknowledgment permitted"; then kind and length of a
    /// timestamp.
    const BEFORE: [[u8; 4]; 2] = [[1, 1, 8, 10], [4, 2, 8, 10]];
    /// Of the option "maximum segment size" (RFC 9293, 3.2), in bytes.
    const SEGMENT_SIZE: usize = 4;
    if segment.proto != Proto::TCP || !segment.has_transport {
        return 0;
    }
    let mut at = segment.transport + tcp::HEADER;
    if segment.tcp_flags & tcp::SYN != 0 {
        at += SEGMENT_SIZE;
    }
    let Some([before, stamp]) = packet.load::<[u32; 2]>(at) else {
        return 0;
    };
    // Behind a header that is shorter than this there is data, which may look alike.
    let words = packet.load::<u8>(segment.transport + 12).unwrap_or(0) >> 4;
    let header = usize::from(words) << 2;
    let is_one = BEFORE.contains(&before.to_ne_bytes());
    if is_one && segment.transport + header >= at + size_of::<[u32; 2]>() {
        u32::from_be(stamp)
    } else {
        0
    }
}

/// Notes what a request says about the end of its flow.
#[inline(always)]
pub(super) fn note_request<F: Family, M: Maps<F>>(
    packet: &impl Packet,
    maps: &M,
    known: &Known<F::Addr, M::Record>,
    segment: &Segment<F::Addr>,
) {
    if segment.tcp_flags & tcp::RST != 0 {
        // Not so where the backend does: more of the same may be on its way.
        known.record.set_fins(known.record.fins() | Fins::OVER);
    } else if segment.tcp_flags & tcp::FIN != 0 {
        maps.set_last_stamp(known.id, stamp(packet, segment));
    } else if known.state == FlowState::CLOSING
        && segment.tcp_flags & tcp::ACK != 0
        && known.record.fins() == Fins::CLIENT
    {
        // What acknowledges the backend's FIN.
        known.record.set_fins(Fins::CLIENT | Fins::OVER);
    }
}

/// Whether a flow in this state leaves its source port to one that begins with this timestamp.
#[inline(always)]
fn gives_way<F: Family, M: Maps<F>>(maps: &M, id: FlowId, record: M::Record, state: u32) -> bool {
    let fins = record.fins();
    if state == FlowState::CLOSING && fins & Fins::OVER != 0 {
        return true;
    }
    if state == FlowState::CLOSING && fins == Fins::BACKEND {
        let (last, first) = (maps.last_stamp(id), maps.stamp());
        if last != 0 && first != 0 && first.wrapping_sub(last) as i32 > 0 {
            return true;
        }
    }
    let (proto, seen_secs) = record.last_seen();
    idle_for(maps.now_secs(), seen_secs) >= lasts(state, proto, fins, &maps.config().timeouts)
}

/// Gives a flow in its record a source port that another one has which is over. Whether it is.
#[inline(always)]
pub fn succeed<F: Family, M: Maps<F>>(maps: &M, id: FlowId, port: u16) -> bool {
    let Some(record) = maps.record(id) else {
        return false;
    };
    let mut reply = record.key(FlowKey::<F::Addr>::REPLY);
    reply.dst_port = Be16::from_host(port);
    let Some(other_id) = maps.flow_id(&reply) else {
        return false;
    };
    let Some(other) = maps.record(other_id) else {
        return false;
    };
    let state = other.state();
    if !gives_way::<F, M>(maps, other_id, other, state)
        || other.key(FlowKey::<F::Addr>::REPLY) != reply
        || !other.exchange_state(state, FlowState::RECLAIMING)
    {
        return false;
    }
    inherit::<F, M>(maps, id, &reply, other_id, other);
    true
}

/// Makes the port of a flow that is this program's own to end another one's.
#[inline(always)]
pub(super) fn inherit<F: Family, M: Maps<F>>(
    maps: &M,
    id: FlowId,
    reply: &FlowKey<F::Addr>,
    other_id: FlowId,
    other: M::Record,
) {
    unlink::<F, M>(maps, &other.key(FlowKey::<F::Addr>::REQUEST), other_id);
    maps.settle(other_id);
    if let Some(record) = maps.record(id) {
        record.set_source_port(reply.dst_port);
        record.set_source(reply.dst, record.flags() | FlowFlags::SUCCESSOR);
    }
    // In one step: nobody else gets the port between the two.
    maps.relink(reply, id);
    free::<F, M>(maps, other_id, other);
    maps.count(penstock_common::Counter::FlowEvicted);
}

/// Whether a flow waits for its backend to agree to it, at a port whose last flow may still be spoken
/// to.
#[inline(always)]
fn is_unanswered<F: Family, M: Maps<F>>(
    known: &Known<F::Addr, M::Record>,
    segment: &Segment<F::Addr>,
) -> bool {
    // One comparison, lest the verifier follow the rest of the way for each outcome of three.
    let differs = u32::from(segment.proto.0 ^ Proto::TCP.0)
        | (known.state ^ FlowState::EMBRYONIC)
        | u32::from(!known.flags & FlowFlags::SUCCESSOR);
    differs == 0
}

/// Whether a reply is late: of the flow that had the port before.
///
/// What a backend says about an opening segment either agrees to it, breaks it off, or is a bare
/// acknowledgment by which the client learns that the old connection is still there (RFC 9293,
/// 3.10.7.4).
#[inline(always)]
pub fn is_late<F: Family, M: Maps<F>>(
    packet: &impl Packet,
    known: &Known<F::Addr, M::Record>,
    segment: &Segment<F::Addr>,
) -> bool {
    if !is_unanswered::<F, M>(known, segment) || segment.tcp_flags & (tcp::SYN | tcp::RST) != 0 {
        return false;
    }
    let words = packet.load::<u8>(segment.transport + 12).unwrap_or(0) >> 4;
    let is_bare = segment.transport_length == u16::from(words) << 2;
    !segment.has_transport || !is_bare || segment.tcp_flags & tcp::FIN != 0
}

/// Whether a reply makes an embryonic flow an established one.
#[inline(always)]
pub(super) fn agrees<F: Family, M: Maps<F>>(
    known: &Known<F::Addr, M::Record>,
    segment: &Segment<F::Addr>,
) -> bool {
    !is_unanswered::<F, M>(known, segment) || segment.tcp_flags & tcp::SYN != 0
}
