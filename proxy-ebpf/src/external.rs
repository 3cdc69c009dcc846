//! What comes from the outside for a service, and what a service answers there.
//!
//! A backend of this node sees the client; its reply passes one of this node's hooks anyway. To a
//! backend elsewhere this node speaks with an address and port of its own, so that the reply comes
//! back here. Packets whose source is this node's never meet the kernel's routing, which takes them
//! for forged: they leave from the hook.

use penstock_common::{
    Addr, AddressKind, Counter, FlowFlags, FlowKey, NetworkFlags, OVERLAY_MAC, OVERLAY_PEER_MAC,
    Route, RouteKind, V4,
};

use crate::{
    env::Maps,
    family::{ETHERNET, Family},
    flow::{self, succession},
    forward, handover,
    packet::Packet,
    parse::{self, Segment},
    pod::{self, Back, Verdict},
    reject, rewrite,
    select::{self, Origin},
    tunnel,
};

/// Sorts a packet that came in by an interface to the outside.
#[inline(always)]
pub fn from_uplink<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let verdict = sort::<F, M>(packet, maps)?;
    if verdict != Verdict::Pass {
        packet.forget_priority();
    }
    Ok(verdict)
}

#[inline(always)]
fn sort<F: Family, M: Maps<F>>(packet: &mut impl Packet, maps: &M) -> Result<Verdict, Counter> {
    // What is tagged meets this program again, without its tag, at the VLAN's own interface.
    if packet.is_for_another_host() || packet.is_tagged() {
        return Ok(Verdict::Pass);
    }
    let Some(ends) = parse::addrs::<F>(packet, ETHERNET) else {
        return Ok(Verdict::Pass);
    };
    if tunnel::is_own::<F, M>(packet, maps, &ends.1) {
        return Ok(Verdict::Wrapped);
    }
    let Some(address) = maps.address(&ends.1) else {
        let verdict = forward::arrives::<F, M>(packet, maps, &ends)?;
        return Ok(verdict.unwrap_or(Verdict::Pass));
    };
    let Some(header) = F::network(packet, ETHERNET) else {
        return Ok(Verdict::Pass);
    };
    Ok(match address.kind {
        AddressKind::NODE => Verdict::Arrived,
        AddressKind::SERVICE | AddressKind::EXTERNAL if header.proto == F::ICMP => Verdict::Icmp,
        AddressKind::SERVICE | AddressKind::EXTERNAL if pod::is_translated(header.proto) => {
            Verdict::Request
        }
        _ => Verdict::Pass,
    })
}

/// A packet for this node's own address: a reply to whom it speaks for, or a request.
#[inline(always)]
pub fn arrived<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    Ok(match pod::back::<F, M>(packet, maps)? {
        Back::Reply(_) => Verdict::Forward,
        Back::Request => Verdict::Request,
        Back::Error => Verdict::Icmp,
        Back::Foreign => Verdict::Pass,
    })
}

/// A reply of a pod to somebody outside, who spoke to it through a service; any other packet begins
/// a flow of the pod's own.
#[inline(always)]
pub fn answer<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    Ok(match pod::back::<F, M>(packet, maps)? {
        Back::Reply(flags) if flags & u32::from(FlowFlags::GOES_BACK) != 0 => Verdict::HandBack,
        Back::Reply(_) => Verdict::Leave,
        _ => Verdict::Open,
    })
}

/// Says which flow a packet from the outside to a service begins.
#[inline(always)]
pub fn open<F: Family, M: Maps<F>>(packet: &mut impl Packet, maps: &M) -> Result<Verdict, Counter> {
    let segment = pod::segment::<F, M>(packet, maps)?;
    maps.set_stamp(succession::stamp(packet, &segment));
    let result = open_flow::<F, M>(packet.ifindex(), maps, &segment);
    pod::opened::<F, M>(maps, &segment, result)
}

#[inline(always)]
pub(crate) fn open_flow<F: Family, M: Maps<F>>(
    ingress: u32,
    maps: &M,
    segment: &Segment<F::Addr>,
) -> Result<Verdict, Counter> {
    let frontend = pod::dialled::<F, M>(maps, segment)?;
    // Pods of other nodes come this way too, where the network does not hide them.
    let origin = match maps.route(&segment.src) {
        Some(route) if RouteKind::is_of_pods(route.kind) => Origin::Cluster,
        _ => Origin::Outside,
    };
    let chosen = select::backend(maps, &frontend, origin, segment.src)?;
    let mut opening = flow::opening(maps, segment, &chosen);
    let backend = &chosen.backend.addr;
    let way = handover::way::<F, M>(
        maps,
        frontend.flags,
        origin,
        segment.proto,
        &segment.src,
        backend,
    );
    opening.flags = FlowFlags::EXTERNAL | way;
    if way == 0
        && let Some(stand_in) = source::<F, M>(ingress, maps, segment, backend)?
    {
        if tunnel::is_tunnels(maps, segment.proto, chosen.backend.port) {
            return Err(Counter::TunnelForged);
        }
        opening.source = stand_in;
    }
    flow::begin::<F, M>(maps, &opening)
}

/// This node's address for a backend elsewhere; `None` for one of this node.
#[inline(always)]
fn source<F: Family, M: Maps<F>>(
    ingress: u32,
    maps: &M,
    segment: &Segment<F::Addr>,
    backend: &F::Addr,
) -> Result<Option<F::Addr>, Counter> {
    if maps.is(backend, AddressKind::NODE) || maps.endpoint(backend).is_some() {
        return Ok(None);
    }
    let is_behind_overlay = maps
        .route(backend)
        .is_some_and(|route| route.kind == RouteKind::OVERLAY);
    let source = if is_behind_overlay {
        let config = maps.config();
        F::of(config.overlay4, config.overlay6)
    } else {
        let egress = maps
            .egress_anyway(ingress, &segment.src, backend)
            .ok_or(Counter::SourceNoAddress)?;
        match maps.uplink(egress) {
            Some(uplink) => F::of(uplink.addr4, uplink.addr6),
            // Behind an interface of this node: a pod that somebody else connects.
            None => return Ok(None),
        }
    };
    if source.is_unspecified() {
        return Err(Counter::SourceNoAddress);
    }
    Ok(Some(source))
}

/// Sends a translated packet to its receiver, whoever that is.
#[inline(always)]
pub fn onward<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let Some((src, dst)) = parse::addrs::<F>(packet, ETHERNET) else {
        return Ok(Verdict::Pass);
    };
    if forward::is_local::<F, M>(packet, maps, &dst) {
        return Ok(Verdict::Local);
    }
    if maps.is(&dst, AddressKind::NODE) {
        return Ok(Verdict::Pass);
    }
    if let Some(route) = tunnel_to::<F, M>(maps, &dst) {
        // All parts of a packet go one way: a kernel that joins the long ones waits for the short one.
        let verdict = match F::plain(packet, ETHERNET) {
            Some(_) => forward::enter_overlay::<F>(packet, maps, route)?,
            None => Verdict::Pass,
        };
        return match verdict {
            Verdict::Pass if maps.is(&src, AddressKind::NODE) => by_kernel::<F>(packet, maps),
            verdict => Ok(verdict),
        };
    }
    if maps.address(&src).is_some() {
        return Ok(Verdict::Leave);
    }
    Ok(Verdict::Pass)
}

/// The tunnel that leads to an address.
#[inline(always)]
fn tunnel_to<F: Family, M: Maps<F>>(maps: &M, dst: &F::Addr) -> Option<Route> {
    if maps.network() & NetworkFlags::FORWARD == 0 {
        return None;
    }
    let route = maps.route(dst)?;
    (route.kind == RouteKind::OVERLAY).then_some(route)
}

/// How a packet leaves this node.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum WayOut {
    /// By the kernel's routes.
    Routes,
    /// Through the tunnel to this node.
    Tunnel(V4),
    /// Not at all, or by a way that is not to be told so.
    Other,
}

/// How [`onward`] lets a packet with these ends leave.
#[inline(always)]
pub(crate) fn way_out<F: Family, M: Maps<F>>(maps: &M, src: &F::Addr, dst: &F::Addr) -> WayOut {
    if maps.endpoint(dst).is_some() || maps.is(dst, AddressKind::NODE) {
        return WayOut::Other;
    }
    match tunnel_to::<F, M>(maps, dst) {
        Some(route) if route.underlay4.is_unspecified() => WayOut::Other,
        Some(route) => WayOut::Tunnel(route.underlay4),
        None if maps.address(src).is_some() => WayOut::Routes,
        None => WayOut::Other,
    }
}

/// A packet to the overlay that is out of the ordinary: the kernel sends it, split where it does not fit and
/// that is allowed, as if it had come in by the overlay's own device, which may have this node's
/// addresses for sources.
#[inline(always)]
fn by_kernel<F: Family>(packet: &mut impl Packet, maps: &impl Maps<F>) -> Result<Verdict, Counter> {
    let overlay = maps.overlay();
    let fits = F::may_be_split(packet, ETHERNET) || packet.fits(overlay.ifindex, overlay.mtu);
    if !fits || forward::hops::<F>(packet).is_none() {
        return Ok(Verdict::TooLong);
    }
    forward::frame(packet, OVERLAY_MAC, OVERLAY_PEER_MAC).map_err(forward::refused)?;
    Ok(Verdict::In(overlay.ifindex))
}

/// Tells the sender of a packet that was translated already, and goes no further, why: it is at the end of its
/// life, or does not fit its way, of which is said what does.
#[inline(always)]
pub fn shorten<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let mut segment = pod::segment::<F, M>(packet, maps)?;
    let key = FlowKey::new(
        FlowKey::<F::Addr>::REPLY,
        segment.proto,
        (segment.dst, segment.dst_port),
        (segment.src, segment.src_port),
    );
    let mut mtu = maps.overlay().mtu;
    if tunnel_to::<F, M>(maps, &segment.dst).is_none() {
        mtu = maps.way_mtu(packet.ifindex(), &segment.src, &segment.dst);
    }
    let is_expired = forward::hops::<F>(packet).is_none();
    let known = flow::find::<F, M>(maps, &key).ok_or(Counter::TooLong)?;
    let (frontend, client) = known.ends();
    rewrite::translate::<F>(packet, &segment, client, frontend)?;
    (segment.src, segment.src_port) = client;
    (segment.dst, segment.dst_port) = frontend;
    if is_expired {
        reject::expired::<F, M>(packet, maps, &segment)?;
    } else {
        reject::too_long::<F, M>(packet, maps, &segment, mtu)?;
    }
    Ok(Verdict::TurnAround)
}
