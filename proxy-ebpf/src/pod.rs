//! What happens to a packet at the host end of a pod's interface.
//!
//! Packets from a pod are sorted by [`classify`] and handed to [`request`], [`error_about_reply`]
//! or [`to_node`], a flow's first packet also to [`open`] and [`refuse`]; packets to a pod to
//! [`returning`]. Each of these is a
//! function of its own in the kernel, with a stack of its own, and parses what it needs.

use penstock_common::{
    Addr, AddressKind, Be16, Counter, FlowFlags, FlowId, FlowKey, Frontend, FrontendKey,
    NetworkFlags, Proto, Responder, Route, Vtep,
};

use crate::{
    dialled,
    env::Maps,
    family::{ETHERNET, Family, Network},
    flow::{self, succession},
    forward,
    packet::Packet,
    parse::{self, Segment},
    quoted, reject, rewrite,
    select::{self, Origin},
};

/// What becomes of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The kernel goes on with it.
    Pass,
    /// It goes back out of the interface that it came from.
    TurnAround,
    /// It begins a flow: [`open`].
    Open,
    /// What it begins is known: `flow::claim`.
    Opening,
    /// No record that its flow can have was met yet: `flow::claim` again.
    NoRecord,
    /// Its flow has this record: `flow::place`.
    Claimed(FlowId),
    /// Its flow has no source port yet: `flow::search`, from this place on.
    Search(u32),
    /// No source port is free for its flow: `flow::take_over`.
    TakeOver,
    /// Its flow has a source: `flow::enter`.
    Placed,
    /// Its flow is there now: [`request`] again.
    Opened,
    /// It is to be answered by [`refuse`], for this reason.
    Refuse(Counter),
    /// It goes to a pod of this node, and may be a reply: [`returning`], then `forward::deliver`.
    Local,
    /// It goes to a pod of this node, past the host end of its interface unless that limits it.
    Deliver {
        /// The host end.
        ifindex: u32,
        /// Whether a queueing discipline there must see it.
        is_shaped: bool,
    },
    /// It goes to the outside: `forward::leaving` and so on.
    Outside,
    /// The same, of a pod whose packets the kernel sends: `forward::held_answer` and so on.
    HeldOutside,
    /// It is this node's now, and goes to the outside: `forward::leave`.
    Leave,
    /// It goes wherever its destination is: `forward::from_pod`.
    Forward,
    /// It is for no service after all, and goes on as it came: `forward::from_pod`.
    Untouched,
    /// TCP, UDP or SCTP for a service, or for one of this node's ports, perhaps: [`request`].
    Request,
    /// A pod sent it to this node: [`to_node`].
    Node,
    /// A tunnel's packet came for this node: `tunnel::unwrap`.
    Wrapped,
    /// It came for this node: `external::arrived`.
    Arrived,
    /// An ICMP message that may be about a reply: [`error_about_reply`].
    Icmp,
    /// It leaves by this interface, for whatever neighbour the kernel's routes say.
    Routed(u32),
    /// Which flow it is of only the index knows, if any does: `xdp::look`.
    Look,
    /// It is of this flow: `xdp::carry`. It is a reply, or not.
    Known(FlowId, bool),
    /// How packets of this flow leave is not known, or no longer: `xdp::seek`. It is a reply, or not.
    Seek(FlowId, bool),
    /// It came in by this interface.
    In(u32),
    /// It goes no further, being too long or at the end of its life, and its sender has to hear of it:
    /// `external::shorten`.
    TooLong,
    /// The same, but it was not translated: `handover::shorten`.
    TooLongAsItCame,
    /// Its flow is handed over to another node: `handover::hand_over`.
    HandOver,
    /// The same, but it has to be split: `handover::split`.
    Split,
    /// It may be a part of such a packet: `handover::rejoin`.
    Rejoin,
    /// Another node handed it over: `handover::accept`.
    Handed,
    /// It is a reply that goes back to the node that handed its flow over: `handover::hand_back`.
    HandBack,
    /// It is a reply that came back: `handover::came_back`.
    CameBack,
    /// It gets this tunnel and goes on.
    Tunnel(Route),
    /// It gets this tunnel and leaves by the overlay.
    Overlay(Route),
}

/// Whether a packet that a pod sent is certainly one that [`classify`] leaves to the kernel, as far as is
/// told at once. Where the pods' network is somebody else's, most are.
#[inline(always)]
pub fn is_kernels<F: Family, M: Maps<F>>(packet: &impl Packet, maps: &M) -> bool {
    let ends = parse::addrs::<F>(packet, ETHERNET);
    maps.network() & NetworkFlags::FORWARD == 0
        && ends.is_some_and(|(_, dst)| !maps.may_be_known(&dst))
}

/// Sorts a packet that a pod sent, and sends it where others like it went a moment ago.
///
/// That spares what tables say of source and destination, which between pods would be most of the
/// work; who may send and what fits is seen to for each packet.
#[inline(always)]
pub fn classify<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let Some(ends) = parse::addrs::<F>(packet, ETHERNET) else {
        return Ok(Verdict::Pass);
    };
    let network = maps.network();
    if network & NetworkFlags::FORWARD == 0 {
        return sort::<F, M>(packet, maps, &ends.1).map(|sorted| sorted.unwrap_or(Verdict::Pass));
    }
    if network & NetworkFlags::CHAINED != 0 && dialled::is_kernels::<F, M>(packet, maps, &ends) {
        return Ok(Verdict::Pass);
    }
    let ifindex = packet.ifindex();
    if let Some(way) = maps.way(ifindex, &ends) {
        return forward::go::<F, M>(packet, maps, &ends, &way);
    }
    if network & NetworkFlags::HELD != 0 && maps.is(&ends.0, AddressKind::NODE) {
        // A held pod's interface may have this node's address for a source, once translated.
        return Err(Counter::SourceForged);
    }
    let changed = maps.changed();
    if let Some(sorted) = sort::<F, M>(packet, maps, &ends.1)? {
        return Ok(sorted);
    }
    forward::note_way::<F, M>(changed, ifindex, maps, &ends);
    Ok(Verdict::Forward)
}

/// What is to be done about a packet to this address, if it is a service's or this node's.
#[inline(always)]
fn sort<F: Family, M: Maps<F>>(
    packet: &impl Packet,
    maps: &M,
    dst: &F::Addr,
) -> Result<Option<Verdict>, Counter> {
    let Some(address) = maps.address(dst) else {
        return Ok(None);
    };
    let header = F::network(packet, ETHERNET);
    Ok(Some(match (address.kind, header) {
        (AddressKind::SERVICE | AddressKind::EXTERNAL, None) => return Err(Counter::Truncated),
        (AddressKind::SERVICE | AddressKind::EXTERNAL, Some(header)) => {
            if header.proto == F::ICMP {
                Verdict::Icmp
            } else if is_translated(header.proto) {
                Verdict::Request
            } else {
                Verdict::Pass
            }
        }
        (AddressKind::NODE, Some(_)) => Verdict::Node,
        _ => Verdict::Pass,
    }))
}

/// Protocol and destination port of a packet, as far as it has them; for traces.
#[inline(always)]
pub fn destination<F: Family>(packet: &impl Packet) -> (Proto, Be16) {
    let Some(header) = F::network(packet, ETHERNET) else {
        return Default::default();
    };
    let ports = parse::ports(packet, header.transport);
    (header.proto, ports.unwrap_or_default().1)
}

/// Whether flows of a protocol are translated.
#[inline(always)]
pub(crate) fn is_translated(proto: Proto) -> bool {
    matches!(proto, Proto::TCP | Proto::UDP | Proto::SCTP)
}

/// Source and destination.
pub(crate) type Ends<A> = (A, A);

/// The headers of a packet that [`classify`] has seen.
#[inline(always)]
pub(crate) fn headers<F: Family>(
    packet: &impl Packet,
) -> Result<(Network, Ends<F::Addr>), Counter> {
    let addrs = parse::addrs::<F>(packet, ETHERNET).ok_or(Counter::Truncated)?;
    let header = F::network(packet, ETHERNET).ok_or(Counter::Truncated)?;
    Ok((header, addrs))
}

/// The fields of a packet that [`classify`] has seen.
#[inline(always)]
pub(crate) fn segment<F: Family, M: Maps<F>>(
    packet: &impl Packet,
    maps: &M,
) -> Result<Segment<F::Addr>, Counter> {
    let (header, addrs) = headers::<F>(packet)?;
    parse::segment::<F>(packet, maps, ETHERNET, &header, addrs)
}

/// A packet that a pod sent to a service: translated, if its flow is known.
#[inline(always)]
pub fn request<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let (header, addrs) = headers::<F>(packet)?;
    let segment = parse::segment::<F>(packet, maps, ETHERNET, &header, addrs)?;
    let Some(known) = flow::find::<F, M>(maps, &request_key(&segment)) else {
        return Ok(Verdict::Open);
    };
    if !flow::may_continue(maps, &known, &segment) {
        flow::retire(maps, &known);
        return Ok(Verdict::Open);
    }
    if known.flags & FlowFlags::HANDED_OVER != 0 {
        return Ok(Verdict::HandOver);
    }
    if known.flags & FlowFlags::GOES_BACK != 0 {
        // It has come here by itself this time.
        maps.set_flow_vtep(known.id, &Vtep::default());
    }
    parse::remember_ports::<F>(maps, &header, &segment);
    flow::follow(packet, maps, &known, &segment, false);
    let (src, dst) = known.ends();
    rewrite::translate::<F>(packet, &segment, src, dst)?;
    if known.flags & FlowFlags::MASQUERADE != 0 {
        maps.count(Counter::Masqueraded);
    }
    if known.flags & FlowFlags::EXTERNAL != 0 {
        maps.count(Counter::ExternalRequest);
    } else if dst.0 != segment.dst {
        maps.count(Counter::PacketRequest);
    }
    deliver(packet, known.flags)
}

/// The key of a request.
#[inline(always)]
pub(crate) fn request_key<A: Addr>(segment: &Segment<A>) -> FlowKey<A> {
    FlowKey::new(
        FlowKey::<A>::REQUEST,
        segment.proto,
        (segment.src, segment.src_port),
        (segment.dst, segment.dst_port),
    )
}

/// Says which flow a packet to a service begins.
#[inline(always)]
pub fn open<F: Family, M: Maps<F>>(packet: &mut impl Packet, maps: &M) -> Result<Verdict, Counter> {
    let segment = segment::<F, M>(packet, maps)?;
    maps.set_stamp(succession::stamp(packet, &segment));
    opened::<F, M>(maps, &segment, open_flow::<F, M>(maps, &segment))
}

/// What becomes of a packet whose flow can, or cannot be, opened.
#[inline(always)]
pub(crate) fn opened<F: Family, M: Maps<F>>(
    maps: &M,
    segment: &Segment<F::Addr>,
    result: Result<Verdict, Counter>,
) -> Result<Verdict, Counter> {
    match result {
        // Other ports of an address that is not a service's own may be somebody else's.
        Err(Counter::UndefinedPort) if !maps.is(&segment.dst, AddressKind::SERVICE) => {
            Ok(Verdict::Untouched)
        }
        Err(reason @ (Counter::NoEndpoints | Counter::UndefinedPort)) => {
            maps.count(reason);
            Ok(Verdict::Refuse(reason))
        }
        result => result,
    }
}

/// The frontend that a flow's first packet is for.
#[inline(always)]
pub(crate) fn dialled<F: Family, M: Maps<F>>(
    maps: &M,
    segment: &Segment<F::Addr>,
) -> Result<Frontend, Counter> {
    let key = FrontendKey::new(segment.dst, segment.dst_port, segment.proto);
    let frontend = maps.frontend(&key).ok_or(Counter::UndefinedPort)?;
    if !segment.has_transport {
        // The flow that its first fragment began is over.
        return Err(Counter::FragmentUnmatched);
    }
    Ok(frontend)
}

#[inline(always)]
fn open_flow<F: Family, M: Maps<F>>(
    maps: &M,
    segment: &Segment<F::Addr>,
) -> Result<Verdict, Counter> {
    let frontend = dialled::<F, M>(maps, segment)?;
    let chosen = select::backend(maps, &frontend, Origin::Cluster, segment.src)?;
    let opening = flow::opening(maps, segment, &chosen);
    let is_hairpin = opening.flags & FlowFlags::HAIRPIN != 0;
    if is_hairpin && opening.source.is_unspecified() {
        return Err(Counter::HairpinNoAddress);
    }
    flow::begin::<F, M>(maps, &opening)
}

/// Answers a packet that nobody will serve.
#[inline(always)]
pub fn refuse<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let segment = segment::<F, M>(packet, maps)?;
    reject::answer::<F, M>(packet, maps, &segment)?;
    Ok(Verdict::TurnAround)
}

/// An ICMP message that a pod sent to a service.
#[inline(always)]
pub fn error_about_reply<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let flags = quoted::about_reply::<F, M>(packet, maps)?;
    let flags = flags.unwrap_or_default();
    if flags & FlowFlags::HANDED_OVER != 0 {
        return Ok(Verdict::HandOver);
    }
    deliver(packet, flags)
}

/// A packet that a pod sent to this node's address: the reply to itself, or a request.
#[inline(always)]
pub fn to_node<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    Ok(match back::<F, M>(packet, maps)? {
        Back::Reply(flags) if flags & u32::from(FlowFlags::HAIRPIN) != 0 => {
            return deliver(packet, flags as u16);
        }
        Back::Request => Verdict::Request,
        Back::Error => Verdict::Icmp,
        Back::Reply(_) | Back::Foreign => Verdict::Pass,
    })
}

/// Whether a packet on its way to a pod may be one that [`returning`] has anything to do with, as far as
/// is told at once. Most are not.
#[inline(always)]
pub fn may_return<F: Family, M: Maps<F>>(packet: &impl Packet, maps: &M) -> bool {
    let ends = parse::addrs::<F>(packet, ETHERNET);
    ends.is_none_or(|(src, _)| may_be_back::<F, M>(packet, maps, ETHERNET, src))
}

/// A packet on its way to a pod: [`Verdict::Untouched`], which is [`dialled`]'s, where it is no reply.
#[inline(always)]
pub fn returning<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    Ok(match back::<F, M>(packet, maps)? {
        Back::Request => Verdict::Untouched,
        _ => Verdict::Pass,
    })
}

/// Whether a packet is an ICMP error.
#[inline(always)]
pub(crate) fn is_error<F: Family>(packet: &impl Packet, header: &Network) -> bool {
    let icmp_type = || packet.load(header.transport);
    header.proto == F::ICMP
        && !header.fragment.is_later
        && icmp_type().is_some_and(F::is_icmp_error)
}

/// What a packet that may be on its way back turned out to be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Back {
    /// A reply or an error about a request, now translated; its flow's flags.
    Reply(u32),
    /// No reply, but what may be a request.
    Request,
    /// An ICMP error about no request; perhaps about a reply.
    Error,
    /// Nothing that is translated.
    Foreign,
}

/// Whether [`back`] may have anything to do with a packet of this source, whose network header is at
/// `at`, as far as is told at once.
#[inline(always)]
pub(crate) fn may_be_back<F: Family, M: Maps<F>>(
    packet: &impl Packet,
    maps: &M,
    at: usize,
    src: F::Addr,
) -> bool {
    let Some(proto) = F::plain(packet, at).filter(|proto| is_translated(*proto)) else {
        return true;
    };
    let port = packet.load(at + F::HEADER);
    port.is_none_or(|port| maps.may_respond(Responder::new(proto, src, port)))
}

/// Translates a packet that is on its way back to whom began its flow, if it is one: [`back_itself`] or
/// [`about_request`], each by a function of its own.
#[inline(always)]
pub(crate) fn back<F: Family, M: Maps<F>>(_: &mut impl Packet, maps: &M) -> Result<Back, Counter> {
    maps.back()
}

/// Translates an ICMP error about a request, if it is about one.
#[inline(always)]
pub fn about_request<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Option<Back>, Counter> {
    let flags = quoted::about_request::<F, M>(packet, maps)?;
    Ok(Some(
        flags.map_or(Back::Error, |flags| Back::Reply(flags.into())),
    ))
}

/// What [`back_itself`] did, as a number of at least 0, or why the packet goes no further, below 0.
#[inline(always)]
pub fn encode_back(result: Result<Option<Back>, Counter>) -> i32 {
    match result {
        Ok(Some(Back::Foreign)) => FOREIGN,
        Ok(Some(Back::Request)) => REQUEST,
        Ok(Some(Back::Error)) => ERROR,
        Ok(None) => QUOTING,
        Ok(Some(Back::Reply(flags))) => REPLY + (flags & 0xffff) as i32,
        Err(reason) => -1 - reason as i32,
    }
}

/// What such a number says.
#[inline(always)]
pub fn decode_back(number: i32) -> Result<Back, Counter> {
    match number {
        i32::MIN..=-1 => {
            let reason = Counter::ALL.get((-1 - number) as usize);
            Err(reason.copied().unwrap_or(Counter::RewriteFailed))
        }
        FOREIGN => Ok(Back::Foreign),
        REQUEST => Ok(Back::Request),
        ERROR => Ok(Back::Error),
        _ => Ok(Back::Reply((number - REPLY) as u32)),
    }
}

const FOREIGN: i32 = 0;
const REQUEST: i32 = 1;
const ERROR: i32 = 2;
const REPLY: i32 = 3;
/// None of [`Back`], but an ICMP error, which [`about_request`] has to look at before anybody decodes it.
pub const QUOTING: i32 = i32::MAX;

/// [`back`], for whoever makes it a function of its own: four of a hook's stages need it, and the
/// kernel is to check it once. `None` where [`about_request`] has the say, which needs a stack of its own.
#[inline(always)]
pub fn back_itself<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Option<Back>, Counter> {
    let Some(addrs) = parse::addrs::<F>(packet, ETHERNET) else {
        return Ok(Some(Back::Foreign));
    };
    let Some(header) = F::network(packet, ETHERNET) else {
        return Ok(Some(Back::Foreign));
    };
    if is_error::<F>(packet, &header) {
        return Ok(None);
    }
    reply::<F, M>(packet, maps, &header, addrs).map(Some)
}

/// Translates a packet that a backend sent back, if it is one.
#[inline(always)]
fn reply<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
    header: &Network,
    addrs: (F::Addr, F::Addr),
) -> Result<Back, Counter> {
    if !is_translated(header.proto) && header.proto != F::ICMP {
        return Ok(Back::Foreign);
    }
    // What can't be parsed can't be told from other traffic, so it is the kernel's.
    let Ok(segment) = parse::segment::<F>(packet, maps, ETHERNET, header, addrs) else {
        return Ok(Back::Foreign);
    };
    let (from, to) = (
        (segment.src, segment.src_port),
        (segment.dst, segment.dst_port),
    );
    let no_reply = if is_translated(header.proto) {
        Back::Request
    } else {
        Back::Foreign
    };
    if !maps.may_respond(Responder::new(segment.proto, from.0, from.1)) {
        return Ok(no_reply);
    }
    let key = FlowKey::new(FlowKey::<F::Addr>::REPLY, segment.proto, from, to);
    let Some(known) = flow::find::<F, M>(maps, &key) else {
        return Ok(no_reply);
    };
    if flow::is_anothers(&known, &segment) {
        flow::retire(maps, &known);
        return Ok(Back::Foreign);
    }
    if succession::is_late::<F, M>(packet, &known, &segment) {
        return Err(Counter::FlowRace);
    }
    parse::remember_ports::<F>(maps, header, &segment);
    flow::follow(packet, maps, &known, &segment, true);
    let (src, dst) = known.ends();
    rewrite::translate::<F>(packet, &segment, src, dst)?;
    maps.count(if known.flags & FlowFlags::EXTERNAL != 0 {
        Counter::ExternalReply
    } else {
        Counter::PacketReply
    });
    Ok(Back::Reply(known.flags.into()))
}

/// Where a translated packet goes: back, where client and backend are the same pod.
#[inline(always)]
fn deliver(packet: &mut impl Packet, flags: u16) -> Result<Verdict, Counter> {
    if flags & FlowFlags::MASQUERADE != 0 {
        return Ok(Verdict::Leave);
    }
    if flags & FlowFlags::HAIRPIN == 0 {
        return Ok(Verdict::Forward);
    }
    rewrite::turn_around(packet)?;
    Ok(Verdict::TurnAround)
}
