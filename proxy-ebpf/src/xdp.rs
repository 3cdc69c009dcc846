//! What XDP does of [`crate::external`]'s work: packets that come in by an interface to the outside
//! and go out again, before the host's stack has seen them.
//!
//! Invariant: a packet is either translated and sent as the TC hook would have done it, or passed on
//! to that hook with no byte changed. All is decided before the first byte is written; from then on
//! a packet is sent or, if the kernel refuses a change, dropped and counted.
//!
//! A flow's packets find beside its counts what was decided for one of them a moment ago ([`seek`]),
//! and by which way it left. [`carry`] asks for nothing that this says.

pub mod overlay;

use penstock_common::{
    Addr, AddressKind, Be16, Counter, FlowFlags, FlowId, FlowKey, Hop, MASQUERADE_PORTS, Proto,
    Responder, Said,
};

use crate::{
    env::{Env, Maps, NextHop, Record},
    external::{self, WayOut},
    family::{ETHERNET, Family, Fragment, Network},
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
    let proto = F::plain(packet, ETHERNET).filter(|proto| pod::is_translated(*proto))?;
    let header = Network {
        transport: ETHERNET + F::HEADER,
        proto,
        transport_length: F::payload(packet, ETHERNET)?,
        fragment: Fragment::NONE,
    };
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

/// The key of a packet's flow if it is a reply, or a request.
#[inline(always)]
fn key<A: Addr>(segment: &Segment<A>, is_reply: bool) -> FlowKey<A> {
    let direction = if is_reply {
        FlowKey::<A>::REPLY
    } else {
        FlowKey::<A>::REQUEST
    };
    FlowKey::new(
        direction,
        segment.proto,
        (segment.src, segment.src_port),
        (segment.dst, segment.dst_port),
    )
}

/// Whether a packet may be a reply.
#[inline(always)]
fn may_be_reply<F: Family>(maps: &impl Maps<F>, segment: &Segment<F::Addr>) -> bool {
    may_answer(maps, segment.dst_port, key(segment, true).responder())
}

/// Whether a packet to this port of this node's from whom may be a reply.
#[inline(always)]
fn may_answer(maps: &impl Env, to: Be16, from: Responder) -> bool {
    // Whom this node speaks for has a port of these; others need not be looked for.
    let (low, high) = MASQUERADE_PORTS;
    (low..=high).contains(&to.to_host()) && maps.may_respond(from)
}

/// What a [`Hop`] is said of for this packet to `to`, of a flow with this key in the other direction.
#[inline(always)]
fn said<F: Family>(
    packet: &impl Packet,
    changed: u64,
    to: F::Addr,
    other: &FlowKey<F::Addr>,
) -> Option<Said<F::Addr>> {
    Some(Said {
        changed,
        ifindex: packet.ifindex(),
        receiver: packet.load(0)?,
        to,
        ends: (other.dst, other.src),
    })
}

/// A packet's flow that [`look`] has found, if it has. No `Option`: see [`crate::env::Way`].
#[derive(Clone, Copy, Default)]
pub struct Found {
    /// Whether it has.
    pub is_found: bool,
    /// The flow.
    pub id: FlowId,
    /// Whether the packet is a reply.
    pub is_reply: bool,
}

/// Translates a packet of a known flow and sends it on: of the one that [`look`] has found, or that
/// a hint leads to.
///
/// [`Verdict::Look`] where there is none, and [`Verdict::Seek`] where [`seek`] has to be asked first.
#[inline(always)]
pub fn carry<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
    found: Found,
) -> Result<Verdict, Counter> {
    let Some(dst) = packet.load(ETHERNET + F::ADDRS + size_of::<F::Addr>()) else {
        return Ok(Verdict::Pass);
    };
    if tunnel::is_own::<F, M>(packet, maps, &dst) {
        return Ok(Verdict::Wrapped);
    }
    // This node's own address needs no looking up; others are mostly nobody's here.
    if dst != maps.node() && maps.address(&dst).is_none() {
        return Ok(Verdict::Pass);
    }
    let Some(segment) = plain::<F, M>(packet, maps) else {
        return Ok(Verdict::Pass);
    };
    let is_reply = if found.is_found {
        found.is_reply
    } else {
        may_be_reply(maps, &segment)
    };
    let key = key(&segment, is_reply);
    let mut id = found.id;
    if !found.is_found {
        let place = key.hint_place(maps.ids());
        id = maps.hints(place).at(place);
        // Of a flow without a packet it is not sure yet that the index has its key.
        if !maps.has_counted(id, is_reply) {
            return Ok(Verdict::Look);
        }
    }
    let Some(known) = flow::known::<F, M>(maps, id, &key) else {
        return Ok(Verdict::Look);
    };
    let is_over = if is_reply {
        flow::is_anothers(&known, &segment)
    } else {
        !flow::may_continue(maps, &known, &segment)
    };
    let is_late = is_reply && succession::is_late::<F, M>(packet, &known, &segment);
    let now = maps.now_secs();
    let (_, seen) = known.record.last_seen();
    let is_due = (seen ^ now) >> PERIOD != 0;
    let kind = known.flags & !FlowFlags::SUCCESSOR;
    if kind != FlowFlags::EXTERNAL || is_over || is_late || is_due {
        return Ok(Verdict::Pass);
    }
    let Some(hops) = forward::hops::<F>(packet) else {
        return Ok(Verdict::Pass);
    };
    let Some(said) = said::<F>(packet, maps.changed(), segment.dst, &known.other) else {
        return Ok(Verdict::Pass);
    };
    let hop = maps.hop(known.id, is_reply);
    let holds = hop.holds(&said, now);
    if holds && hop.ifindex == LEFT_TO_TC {
        return Ok(Verdict::Pass);
    }
    if !holds || !packet.fits(hop.ifindex, hop.mtu) {
        return Ok(Verdict::Seek(known.id, is_reply));
    }

    let (src, dst) = known.ends();
    flow::follow_at(packet, maps, &known, &segment, is_reply, now);
    rewrite::translate::<F>(packet, &segment, src, dst)?;
    forward::take_hop::<F>(packet, hops).map_err(forward::refused)?;
    packet.store(0, &hop.ethernet).map_err(forward::refused)?;
    if hop.is_tunnel() {
        packet.enclose(F::ETHERTYPE).map_err(forward::refused)?;
    }
    maps.count(if is_reply {
        Counter::ExternalReply
    } else {
        Counter::ExternalRequest
    });
    maps.count(Counter::ExternalXdp);
    Ok(Verdict::Routed(hop.leaves_by()))
}

/// In place of the interface that packets leave by which are the TC hook's.
const LEFT_TO_TC: u32 = 0;

/// Finds the flow of a packet in the index, and notes it among the hints; [`Verdict::Open`] where it may
/// begin one.
#[inline(always)]
pub fn look<F: Family, M: Maps<F>>(packet: &impl Packet, maps: &M) -> Result<Verdict, Counter> {
    if packet.is_for_another_host() {
        return Ok(Verdict::Pass);
    }
    let Some(segment) = plain::<F, M>(packet, maps) else {
        return Ok(Verdict::Pass);
    };
    let Some(address) = maps.address(&segment.dst) else {
        return Ok(Verdict::Pass);
    };
    let mut is_reply = address.kind == AddressKind::NODE && may_be_reply(maps, &segment);
    let mut known = None;
    if is_reply {
        known = flow::find::<F, M>(maps, &key(&segment, true));
        is_reply = known.is_some();
    }
    if !is_reply {
        known = flow::find::<F, M>(maps, &key(&segment, false));
    }
    let Some(known) = known else {
        return Ok(if begins(maps, &segment) {
            Verdict::Open
        } else {
            Verdict::Pass
        });
    };
    let place = key(&segment, is_reply).hint_place(maps.ids());
    maps.set_hints(place, maps.hints(place).with(place, known.id));
    Ok(Verdict::Known(known.id, is_reply))
}

/// Asks the tables and the kernel how packets of a flow leave that go the way of this one, and notes
/// that for [`carry`]: [`Verdict::Forward`] where they do.
#[inline(always)]
pub fn seek<F: Family, M: Maps<F>>(
    packet: &impl Packet,
    maps: &M,
    id: FlowId,
    is_reply: bool,
) -> Result<Verdict, Counter> {
    // Before all that it is about.
    let changed = maps.changed();
    let Some(to) = for_us::<F, M>(packet, maps) else {
        return Ok(Verdict::Pass);
    };
    let Some(record) = maps.record(id) else {
        return Ok(Verdict::Pass);
    };
    // Should they be another flow's by now, nobody believes what is noted.
    let other = record.key(if is_reply {
        FlowKey::<F::Addr>::REQUEST
    } else {
        FlowKey::<F::Addr>::REPLY
    });
    let Some(said) = said::<F>(packet, changed, to, &other) else {
        return Ok(Verdict::Pass);
    };
    let mut hop = Hop {
        noted_secs: maps.now_secs(),
        ..Hop::NONE
    };
    let is_in_place = !is_reply || maps.is(&said.to, AddressKind::NODE);
    let (src, dst) = said.ends;
    let way = if is_in_place {
        external::way_out::<F, M>(maps, &src, &dst)
    } else {
        WayOut::Other
    };
    let (next, mark, longest) = match way {
        WayOut::Routes => (maps.next_hop(said.ifindex, &src, &dst), 0, u32::MAX),
        WayOut::Tunnel(to) => {
            let next = maps.tunnel_hop(said.ifindex, to);
            (next, Hop::TUNNEL, maps.overlay().mtu)
        }
        WayOut::Other => (Some(NextHop::default()), 0, 0),
    };
    let Some(next) = next else {
        // The kernel may think otherwise of the next.
        return Ok(Verdict::Pass);
    };
    // Of other interfaces nobody knows whether they take frames from XDP, or lose them.
    let takes_frames = next.ifindex == said.ifindex || maps.xdp_uplink(next.ifindex).is_some();
    if longest != 0 && takes_frames {
        hop.ifindex = next.ifindex | mark;
        hop.ethernet = forward::ethernet(next.to, next.from);
        hop.mtu = if mark == 0 {
            next.mtu
        } else {
            longest.min(next.mtu.saturating_sub(overlay::ADDED))
        };
    }
    hop.check = said.check(&hop);
    maps.set_hop(id, is_reply, &hop);
    Ok(if hop.ifindex == LEFT_TO_TC {
        Verdict::Pass
    } else {
        Verdict::Forward
    })
}

/// The address of interest that a packet is for, if it came for this node and not for another host.
#[inline(always)]
fn for_us<F: Family, M: Maps<F>>(packet: &impl Packet, maps: &M) -> Option<F::Addr> {
    let dst = packet.load(ETHERNET + F::ADDRS + size_of::<F::Addr>())?;
    (!packet.is_for_another_host() && maps.address(&dst).is_some()).then_some(dst)
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
