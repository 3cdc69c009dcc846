//! What comes from the outside for a backend of another node, handed over to that node as it came.
//!
//! ```text
//! client ──► hand_over ══ overlay ══► accept ──► pod      the node that the client speaks to, and the
//!    ▲ ▲                                          │       backend's
//!    │ └── came_back ◄══ overlay ══ hand_back ◄───┤ tunnel
//!    └─────────────────────────────── leave ◄─────┘ dsr
//! ```
//!
//! Which backend a packet is for stands in its Ethernet addresses ([`Handover`]). The backend's node
//! has a flow of its own, with the same client and frontend, as if the packet had come to it.
//!
//! Invariant: what is believed of a packet in the overlay was sent by a node, and no pod can send what
//! another node would take for that.

use penstock_common::{
    Addr, AddressKind, Be16, Counter, Flow, FlowFlags, FlowKey, FlowState, Forwarding, Handover,
    NetworkFlags, OVERLAY_MAC, OVERLAY_PEER_MAC, Proto, Route, RouteKind, Vtep,
};

use crate::{
    env::{Maps, Record},
    family::{ETHERNET, ETHERNET_SOURCE, Family, Network},
    flow::{self, Known, succession},
    forward,
    packet::Packet,
    parse::{self, Segment, tcp},
    pod::{self, Ends, Verdict},
    quoted, reject, rewrite,
    select::Origin,
};

/// How a flow from the outside to this backend is handed over ([`FlowFlags`]); not at all where that
/// can't be, or where the client is a node, which might be the backend's own.
#[inline(always)]
pub(crate) fn way<F: Family, M: Maps<F>>(
    maps: &M,
    frontend_flags: u32,
    origin: Origin,
    proto: Proto,
    client: &F::Addr,
    backend: &F::Addr,
) -> u16 {
    let way = match Forwarding::of(frontend_flags) {
        Forwarding::Snat => return 0,
        Forwarding::Tunnel => FlowFlags::TUNNEL,
        Forwarding::Dsr => FlowFlags::DSR,
    };
    let wanted = NetworkFlags::FORWARD | F::HANDOVER;
    if origin != Origin::Outside
        || !may_be_handed(proto)
        || maps.network() & wanted != wanted
        || overlay_route(maps, backend).is_none()
        || maps.is_vtep(&F::vtep(*client))
    {
        return 0;
    }
    way
}

/// Whether flows of a protocol may be handed over: not SCTP's, whose way through each of these stages
/// would double what the kernel has to check.
#[inline(always)]
fn may_be_handed(proto: Proto) -> bool {
    matches!(proto, Proto::TCP | Proto::UDP)
}

/// The headers of a packet that was, or is about to be, handed over.
#[inline(always)]
fn headers<F: Family>(packet: &impl Packet) -> Result<(Network, Ends<F::Addr>), Counter> {
    let (header, addrs) = pod::headers::<F>(packet)?;
    if may_be_handed(header.proto) || header.proto == F::ICMP {
        Ok((header, addrs))
    } else {
        Err(Counter::HandoverUnknown)
    }
}

/// The tunnel to the node that a backend is on.
#[inline(always)]
fn overlay_route<F: Family, M: Maps<F>>(maps: &M, backend: &F::Addr) -> Option<Route> {
    let route = maps.route(backend)?;
    (route.kind == RouteKind::OVERLAY).then_some(route)
}

/// Takes a flow whose replies are not seen for established once its client shows that it has seen one:
/// it acknowledges something, or still sends datagrams in another second.
#[inline(always)]
fn presume<F: Family, M: Maps<F>>(
    maps: &M,
    known: &Known<F::Addr, M::Record>,
    segment: &Segment<F::Addr>,
) {
    if known.flags & FlowFlags::DSR == 0 || known.state != FlowState::EMBRYONIC {
        return;
    }
    let is_heard = if segment.proto == Proto::TCP {
        segment.tcp_flags & (tcp::ACK | tcp::SYN | tcp::FIN | tcp::RST) == tcp::ACK
    } else {
        known.record.last_seen().1 != maps.now_secs()
    };
    if is_heard {
        known
            .record
            .exchange_state(FlowState::EMBRYONIC, FlowState::ESTABLISHED);
    }
}

/// Sends a packet of a flow that is handed over, or an ICMP error about its replies, to the backend's
/// node.
#[inline(always)]
pub fn hand_over<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let (header, addrs) = headers::<F>(packet)?;
    let is_error = pod::is_error::<F>(packet, &header);
    let known = if is_error {
        let key = quoted::request_key::<F, M>(packet, maps, true).ok_or(Counter::Truncated)?;
        flow::find::<F, M>(maps, &key).ok_or(Counter::FlowRace)?
    } else {
        let segment = parse::segment::<F>(packet, maps, ETHERNET, &header, addrs)?;
        let key = pod::request_key(&segment);
        let known = flow::find::<F, M>(maps, &key).ok_or(Counter::FlowRace)?;
        parse::remember_ports::<F>(maps, &header, &segment);
        presume(maps, &known, &segment);
        flow::follow(packet, maps, &known, &segment, false);
        known
    };
    let (_, backend) = known.ends();
    let route = overlay_route(maps, &backend.0).ok_or(Counter::OverlayNoRoute)?;
    let Some(hops) = forward::hops::<F>(packet) else {
        return Ok(Verdict::TooLongAsItCame);
    };
    let overlay = maps.overlay();
    if !packet.fits(overlay.ifindex, overlay.mtu) {
        return if is_error {
            Err(Counter::TooLong)
        } else if F::may_be_split(packet, ETHERNET) {
            Ok(Verdict::Split)
        } else {
            Ok(Verdict::TooLongAsItCame)
        };
    }
    forward::take_hop::<F>(packet, hops).map_err(forward::refused)?;
    address(packet, known.flags, backend)?;
    maps.count(Counter::HandedOver);
    maps.count(Counter::OverlaySent);
    Ok(Verdict::Overlay(route))
}

/// Gives a frame the Ethernet addresses that say which backend it is for.
#[inline(always)]
fn address<A: Addr>(
    packet: &mut impl Packet,
    flags: u16,
    (backend, port): (A, Be16),
) -> Result<(), Counter> {
    let handover = Handover {
        kind: if flags & FlowFlags::DSR != 0 {
            Handover::DSR
        } else {
            Handover::TUNNEL
        },
        suffix: backend.suffix(),
        port,
    };
    let (to, from) = handover.macs();
    forward::frame(packet, to, from).map_err(forward::refused)
}

/// A packet that does not fit the overlay and may be split, which is the kernel's to do: translated, as
/// the kernel's routes know backends, and as if it had come in by the overlay's own device, which may
/// have any source. [`rejoin`] makes its parts what it was.
#[inline(always)]
pub fn split<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let (header, addrs) = headers::<F>(packet)?;
    let segment = parse::segment::<F>(packet, maps, ETHERNET, &header, addrs)?;
    let key = pod::request_key(&segment);
    let known = flow::find::<F, M>(maps, &key).ok_or(Counter::FlowRace)?;
    let (src, dst) = known.ends();
    rewrite::translate::<F>(packet, &segment, src, dst)?;
    forward::frame(packet, OVERLAY_MAC, OVERLAY_PEER_MAC).map_err(forward::refused)?;
    Ok(Verdict::In(maps.overlay().ifindex))
}

/// A packet that the kernel sends into the overlay for somebody else: perhaps what it has made of one
/// that was to be handed over.
#[inline(always)]
pub fn rejoin<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let (header, addrs) = pod::headers::<F>(packet)?;
    let route = overlay_route(maps, &addrs.1).ok_or(Counter::OverlayNoRoute)?;
    maps.count(Counter::OverlaySent);
    if may_be_handed(header.proto)
        && let Ok(segment) = parse::segment::<F>(packet, maps, ETHERNET, &header, addrs)
    {
        let key = FlowKey::new(
            FlowKey::<F::Addr>::REPLY,
            segment.proto,
            (segment.dst, segment.dst_port),
            (segment.src, segment.src_port),
        );
        if let Some(known) = flow::find::<F, M>(maps, &key)
            && known.flags & FlowFlags::HANDED_OVER != 0
        {
            parse::remember_ports::<F>(maps, &header, &segment);
            let (frontend, client) = known.ends();
            rewrite::translate::<F>(packet, &segment, client, frontend)?;
            address(packet, known.flags, (segment.dst, segment.dst_port))?;
            maps.count(Counter::HandedOver);
            return Ok(Verdict::Tunnel(route));
        }
    }
    forward::frame(packet, OVERLAY_MAC, OVERLAY_PEER_MAC).map_err(forward::refused)?;
    Ok(Verdict::Tunnel(route))
}

/// Tells the sender of a packet that was not touched yet, and goes no further, why: it is at the end of its life,
/// or does not fit the overlay, of which is said what does.
#[inline(always)]
pub fn shorten<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let (header, addrs) = headers::<F>(packet)?;
    let segment = parse::segment::<F>(packet, maps, ETHERNET, &header, addrs)?;
    if forward::hops::<F>(packet).is_none() {
        reject::expired::<F, M>(packet, maps, &segment)?;
    } else {
        reject::too_long::<F, M>(packet, maps, &segment, maps.overlay().mtu)?;
    }
    Ok(Verdict::TurnAround)
}

/// What a frame from the overlay says of itself.
#[inline(always)]
fn said(packet: &impl Packet) -> Option<Handover> {
    Handover::of(packet.load(0)?, packet.load(ETHERNET_SOURCE)?)
}

/// Where a frame from the overlay goes that was handed over, or comes back; `None` for any other.
#[inline(always)]
pub(crate) fn sort<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Option<Verdict>, Counter> {
    let sender: Option<u8> = packet.load(ETHERNET_SOURCE);
    if sender != Some(Handover::SENDER) {
        return Ok(None);
    }
    let Some(handover) = said(packet) else {
        return Ok(None);
    };
    if !packet
        .tunnel_source()
        .is_some_and(|vtep| maps.is_vtep(&vtep))
    {
        return Err(Counter::HandoverForged);
    }
    packet.take_in().map_err(forward::refused)?;
    Ok(Some(if handover.kind == Handover::BACK {
        Verdict::CameBack
    } else {
        Verdict::Handed
    }))
}

/// The backend that a frame from the overlay is for, if it is a pod of this node, and whether its
/// answers go back.
#[inline(always)]
fn backend<F: Family, M: Maps<F>>(
    packet: &impl Packet,
    maps: &M,
) -> Result<((F::Addr, Be16), u16), Counter> {
    let handover = said(packet).ok_or(Counter::HandoverUnknown)?;
    let addr = maps.overlay_addr().with_suffix(handover.suffix);
    if maps.endpoint(&addr).is_none() {
        return Err(Counter::HandoverUnknown);
    }
    let flags = if handover.kind == Handover::TUNNEL {
        FlowFlags::GOES_BACK
    } else {
        0
    };
    Ok(((addr, handover.port), flags))
}

/// A packet that another node handed over: into the pod, if its flow is known.
#[inline(always)]
pub fn accept<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let (backend, flags) = backend::<F, M>(packet, maps)?;
    let (header, addrs) = headers::<F>(packet)?;
    if pod::is_error::<F>(packet, &header) {
        return Ok(Verdict::Icmp);
    }
    let segment = parse::segment::<F>(packet, maps, ETHERNET, &header, addrs)?;
    let key = pod::request_key(&segment);
    let Some(known) = flow::find::<F, M>(maps, &key) else {
        return Ok(Verdict::Open);
    };
    // The other node has the say: where it has forgotten the flow it may have chosen anew.
    let ways = FlowFlags::GOES_BACK | FlowFlags::HANDED_OVER;
    if (known.other.src, known.other.src_port) != backend
        || known.flags & ways != flags
        || !flow::may_continue(maps, &known, &segment)
    {
        flow::retire(maps, &known);
        return Ok(Verdict::Open);
    }
    parse::remember_ports::<F>(maps, &header, &segment);
    flow::follow(packet, maps, &known, &segment, false);
    if flags != 0
        && let Some(vtep) = packet.tunnel_source()
    {
        maps.set_flow_vtep(known.id, &vtep);
    }
    let (src, dst) = known.ends();
    rewrite::translate::<F>(packet, &segment, src, dst)?;
    maps.count(Counter::ExternalRequest);
    Ok(Verdict::Local)
}

/// Says which flow a packet begins that another node handed over.
#[inline(always)]
pub fn open<F: Family, M: Maps<F>>(packet: &mut impl Packet, maps: &M) -> Result<Verdict, Counter> {
    let (backend, flags) = backend::<F, M>(packet, maps)?;
    let (header, addrs) = headers::<F>(packet)?;
    let segment = parse::segment::<F>(packet, maps, ETHERNET, &header, addrs)?;
    if !segment.has_transport {
        return Err(Counter::FragmentUnmatched);
    }
    maps.set_stamp(succession::stamp(packet, &segment));
    flow::begin::<F, M>(
        maps,
        &Flow {
            state: FlowState::CLAIMED,
            seen_secs: maps.now_secs(),
            client: segment.src,
            frontend: segment.dst,
            backend: backend.0,
            source: segment.src,
            client_port: segment.src_port,
            frontend_port: segment.dst_port,
            backend_port: backend.1,
            source_port: segment.src_port,
            flags: FlowFlags::EXTERNAL | flags,
            proto: segment.proto,
            ..Flow::default()
        },
    )
}

/// The flow of a reply as its client is to see it, or of an ICMP error about a request likewise.
#[inline(always)]
fn answered<F: Family, M: Maps<F>>(
    packet: &impl Packet,
    maps: &M,
    header: &Network,
    addrs: (F::Addr, F::Addr),
    follows: bool,
) -> Result<Known<F::Addr, M::Record>, Counter> {
    if pod::is_error::<F>(packet, header) {
        let key = quoted::request_key::<F, M>(packet, maps, false).ok_or(Counter::Truncated)?;
        return flow::find::<F, M>(maps, &key).ok_or(Counter::HandoverUnknown);
    }
    let segment = parse::segment::<F>(packet, maps, ETHERNET, header, addrs)?;
    let key = FlowKey::new(
        FlowKey::<F::Addr>::REQUEST,
        segment.proto,
        (segment.dst, segment.dst_port),
        (segment.src, segment.src_port),
    );
    let known = flow::find::<F, M>(maps, &key).ok_or(Counter::HandoverUnknown)?;
    parse::remember_ports::<F>(maps, header, &segment);
    if follows {
        flow::follow(packet, maps, &known, &segment, true);
    }
    Ok(known)
}

/// Sends a reply, translated already, back to the node that handed its flow over.
#[inline(always)]
pub fn hand_back<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let (header, addrs) = headers::<F>(packet)?;
    let known = answered::<F, M>(packet, maps, &header, addrs, false)?;
    let vtep = maps.flow_vtep(known.id);
    if vtep == Vtep::default() {
        // The client's way changed in the middle of the flow, and leads to this node now.
        return Ok(Verdict::Leave);
    }
    let hops = forward::hops::<F>(packet).ok_or(Counter::HopLimit)?;
    let overlay = maps.overlay();
    if !packet.fits(overlay.ifindex, overlay.mtu) {
        return Err(Counter::TooLong);
    }
    forward::take_hop::<F>(packet, hops).map_err(forward::refused)?;
    let (to, from) = Handover::ANSWER.macs();
    forward::frame(packet, to, from).map_err(forward::refused)?;
    maps.count(Counter::HandedBack);
    maps.count(Counter::OverlaySent);
    Ok(Verdict::Overlay(Route {
        kind: RouteKind::OVERLAY,
        underlay4: vtep.v4,
        underlay6: vtep.v6,
    }))
}

/// A reply that the backend's node sent back: on to the client.
#[inline(always)]
pub fn came_back<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let (header, addrs) = headers::<F>(packet)?;
    let known = answered::<F, M>(packet, maps, &header, addrs, true)?;
    if known.flags & FlowFlags::TUNNEL == 0 {
        return Err(Counter::HandoverUnknown);
    }
    maps.count(Counter::ExternalReply);
    Ok(Verdict::Leave)
}

/// Whether a packet that the kernel sends into the overlay may be one that [`split`] gave it.
#[inline(always)]
pub(crate) fn may_be_split_of<F: Family, M: Maps<F>>(maps: &M, src: &F::Addr) -> bool {
    maps.network() & F::HANDOVER != 0 && !maps.is(src, AddressKind::NODE)
}
