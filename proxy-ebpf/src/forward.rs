//! Between pods: past the kernel's routing wherever that makes no difference but speed.
//!
//! Whatever is out of the ordinary (a packet that is too long, one at the end of its life, a source
//! that is not the pod's own) is left to the kernel, whose routes lead to the same places and which
//! answers as a router must.

use penstock_common::{
    Addr, AddressKind, Be16, Counter, Dialled, Endpoint, EndpointFlags, FlowFlags, FlowKey,
    Handover, NetworkFlags, OVERLAY_MAC, OVERLAY_PEER_MAC, Proto, Responder, Route, RouteKind,
    ShortcutKind,
};

use crate::{
    checksum::Delta,
    dialled,
    env::{Maps, Record, Way},
    family::{ETHERNET, ETHERNET_SOURCE, Family},
    flow, handover,
    packet::{Packet, Refused},
    parse::{self, tcp},
    pod::{self, Verdict},
    tunnel,
};

/// Notes for the next packets where those from an interface with these ends go, which are no
/// service's: nowhere, if their source is not the interface's own.
#[inline(always)]
pub(crate) fn note_way<F: Family, M: Maps<F>>(
    changed: u64,
    ifindex: u32,
    maps: &M,
    ends: &(F::Addr, F::Addr),
) {
    let own = maps.endpoint(&ends.0);
    if own.is_none_or(|own| own.ifindex != ifindex) {
        return;
    }
    let mut way = Way {
        kind: ShortcutKind::BEYOND,
        ..Way::default()
    };
    if maps.is_held(ifindex) {
        // Each of them has to be looked at, lest it be sent past the kernel.
    } else if let Some(to) = maps.endpoint(&ends.1) {
        way.kind = ShortcutKind::POD;
        way.to = to;
    } else if let Some(route) = maps.route(&ends.1)
        && route.kind == RouteKind::OVERLAY
    {
        way.kind = ShortcutKind::TUNNEL;
        way.route = route;
    }
    maps.note_way(changed, ifindex, ends, &way);
}

/// Sends a packet that is no service's on its way.
#[inline(always)]
pub(crate) fn go<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
    ends: &(F::Addr, F::Addr),
    way: &Way,
) -> Result<Verdict, Counter> {
    match way.kind {
        ShortcutKind::POD => to_pod::<F, M>(packet, maps, ends.0, &way.to),
        ShortcutKind::TUNNEL => enter_overlay::<F>(packet, maps, way.route),
        _ => Ok(Verdict::Forward),
    }
}

/// A packet that a pod sent, its service translated if there was one.
#[inline(always)]
pub fn from_pod<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let network = maps.network();
    if network & NetworkFlags::FORWARD == 0 {
        return Ok(Verdict::Pass);
    }
    let Some(ends) = parse::addrs::<F>(packet, ETHERNET) else {
        return Ok(Verdict::Pass);
    };
    let is_own = maps
        .endpoint(&ends.0)
        .is_some_and(|own| own.ifindex == packet.ifindex());
    if !is_own {
        return somebody_elses::<F, M>(packet, maps);
    }
    if network & NetworkFlags::HELD != 0 && maps.is_held(packet.ifindex()) {
        return held::<F, M>(packet, maps, &ends);
    }
    if let Some(verdict) = to_local::<F, M>(packet, maps, &ends)? {
        return Ok(verdict);
    }
    match maps.route(&ends.1) {
        Some(route) if route.kind == RouteKind::OVERLAY => enter_overlay::<F>(packet, maps, route),
        // What is no pod's there is nobody's.
        Some(route) if route.kind == RouteKind::OWN => Ok(Verdict::Pass),
        None if network & NetworkFlags::MASQUERADE != 0 => leaving::<F, M>(packet, maps, &ends),
        _ => as_it_came::<F, M>(packet, maps, &ends),
    }
}

/// A packet to whoever sees pods' own addresses, by the kernel's routes but past its stack.
#[inline(always)]
fn as_it_came<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
    ends: &(F::Addr, F::Addr),
) -> Result<Verdict, Counter> {
    let Some(egress) = way_out::<F, M>(packet, maps, ends)? else {
        return Ok(Verdict::Pass);
    };
    if maps.is_held(packet.ifindex()) {
        return Ok(Verdict::Pass);
    }
    let Some(hops) = hops::<F>(packet) else {
        return Ok(Verdict::Pass);
    };
    take_hop::<F>(packet, hops).map_err(refused)?;
    Ok(Verdict::Routed(egress))
}

/// The interface to the outside that a pod's packet leaves by, unless the kernel has to have it: too
/// long, at the end of its life, for a group, or with no way out.
#[inline(always)]
fn way_out<F: Family, M: Maps<F>>(
    packet: &impl Packet,
    maps: &M,
    ends: &(F::Addr, F::Addr),
) -> Result<Option<u32>, Counter> {
    if F::is_multicast(ends.1) || hops::<F>(packet).is_none() {
        return Ok(None);
    }
    let egress = maps.egress(packet.ifindex(), &ends.0, &ends.1);
    let Some(egress) = egress.filter(|ifindex| maps.uplink(*ifindex).is_some()) else {
        return Ok(None);
    };
    // Of what was joined the kernel looks at the parts only where it sends them itself.
    if packet.is_joined() && !packet.fits_link(egress) {
        return Ok(None);
    }
    let header = F::network(packet, ETHERNET).ok_or(Counter::Truncated)?;
    if tunnel::forges(packet, maps, &header) {
        return Err(Counter::TunnelForged);
    }
    Ok(Some(egress))
}

/// A packet of a pod that `HELD` names: the kernel's routes lead where the hook would have sent it, and
/// the hooks there do what is left to do. Only the outside must not see the pod's address.
#[inline(always)]
fn held<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
    ends: &(F::Addr, F::Addr),
) -> Result<Verdict, Counter> {
    if maps.endpoint(&ends.1).is_some() {
        return Ok(Verdict::Pass);
    }
    let verdict = match maps.route(&ends.1) {
        Some(route) if matches!(route.kind, RouteKind::OVERLAY | RouteKind::OWN) => Verdict::Pass,
        None if maps.network() & NetworkFlags::MASQUERADE != 0 => {
            leaving::<F, M>(packet, maps, ends)?
        }
        _ => way_out::<F, M>(packet, maps, ends).map(|_| Verdict::Pass)?,
    };
    Ok(match verdict {
        Verdict::Outside => Verdict::HeldOutside,
        verdict => verdict,
    })
}

/// A held pod's packet to the outside, of no flow that it began: a reply to somebody outside is translated
/// as it leaves the node, by [`tunnel::sent`]; any other packet begins a flow of the pod's own.
#[inline(always)]
pub fn held_answer<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let (header, addrs) = pod::headers::<F>(packet)?;
    let segment = parse::segment::<F>(packet, maps, ETHERNET, &header, addrs)?;
    if !maps.may_respond(Responder::new(segment.proto, segment.src, segment.src_port)) {
        return Ok(Verdict::Open);
    }
    let key = FlowKey::new(
        FlowKey::<F::Addr>::REPLY,
        segment.proto,
        (segment.src, segment.src_port),
        (segment.dst, segment.dst_port),
    );
    if flow::find::<F, M>(maps, &key).is_none() {
        return Ok(Verdict::Open);
    }
    // Its next parts may be here before it has left the node.
    parse::remember_ports::<F>(maps, &header, &segment);
    Ok(Verdict::Pass)
}

/// A packet whose source is not its pod's own, which is the kernel's to judge, unless it pretends to be
/// another node's.
#[inline(always)]
fn somebody_elses<F: Family, M: Maps<F>>(
    packet: &impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    match F::network(packet, ETHERNET) {
        Some(header) if !tunnel::forges(packet, maps, &header) => Ok(Verdict::Pass),
        _ if maps.overlay().ifindex == 0 => Ok(Verdict::Pass),
        _ => Err(Counter::TunnelForged),
    }
}

/// A packet to the outside, which is to get this node's address.
#[inline(always)]
fn leaving<F: Family, M: Maps<F>>(
    packet: &impl Packet,
    maps: &M,
    ends: &(F::Addr, F::Addr),
) -> Result<Verdict, Counter> {
    if way_out::<F, M>(packet, maps, ends)?.is_none() {
        return Ok(Verdict::Pass);
    }
    let header = F::network(packet, ETHERNET).ok_or(Counter::Truncated)?;
    Ok(match header.proto {
        Proto::TCP | Proto::UDP | Proto::SCTP => Verdict::Outside,
        proto if proto == F::ICMP => {
            let icmp_type = packet.load::<u8>(header.transport);
            if header.fragment.is_later
                || icmp_type.is_some_and(|icmp_type| F::ECHO.contains(&icmp_type))
            {
                Verdict::Outside
            } else {
                Verdict::Icmp
            }
        }
        _ => Verdict::Pass,
    })
}

/// The address that a pod's packets to an address outside of the cluster get; `None` where it is
/// inside, or pods keep their own.
#[inline(always)]
fn source_outside<F: Family, M: Maps<F>>(
    maps: &M,
    ingress: u32,
    src: &F::Addr,
    dst: &F::Addr,
) -> Option<F::Addr> {
    let wanted = NetworkFlags::FORWARD | NetworkFlags::MASQUERADE;
    if maps.network() & wanted != wanted
        || maps.endpoint(dst).is_some()
        || maps.route(dst).is_some()
        || maps.address(dst).is_some()
        || maps.endpoint(src)?.ifindex != ingress
    {
        return None;
    }
    source_towards::<F, M>(maps, ingress, src, dst)
}

/// This node's address on the interface that a packet would leave by.
#[inline(always)]
pub(crate) fn source_towards<F: Family, M: Maps<F>>(
    maps: &M,
    ingress: u32,
    src: &F::Addr,
    dst: &F::Addr,
) -> Option<F::Addr> {
    let uplink = maps.uplink(maps.egress_anyway(ingress, src, dst)?)?;
    let source = F::of(uplink.addr4, uplink.addr6);
    (!source.is_unspecified()).then_some(source)
}

/// Gives a service's new flow this node's address, if its backend is outside of the cluster and
/// must see somebody that it can answer.
#[inline(always)]
pub fn disguise<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    if maps.network() == 0 {
        return Ok(Verdict::Opening);
    }
    let opening = maps.opening().ok_or(Counter::FlowTableFull)?;
    let reply = opening.key(FlowKey::<F::Addr>::REPLY);
    if let Some(source) = source_outside::<F, M>(maps, packet.ifindex(), &reply.dst, &reply.src) {
        if tunnel::is_tunnels(maps, reply.proto, reply.src_port) {
            return Err(Counter::TunnelForged);
        }
        opening.set_source(source, opening.flags() | FlowFlags::MASQUERADE);
    }
    Ok(Verdict::Opening)
}

/// Says which flow a packet to the outside begins.
#[inline(always)]
pub fn masquerade<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let segment = pod::segment::<F, M>(packet, maps)?;
    let way_back = if segment.proto == F::ICMP {
        // Only a reply has a second port, and nobody translates one but who translated its request.
        (segment.dst_port != Be16::default()).then_some(Dialled::PAST_KERNEL)
    } else {
        dialled::way_back::<F, M>(maps, &segment)
    };
    let is_answer = if segment.proto.has_connections() {
        segment.tcp_flags & (tcp::SYN | tcp::ACK) != tcp::SYN
    } else {
        way_back.is_some()
    };
    if is_answer {
        let (header, ends) = pod::headers::<F>(packet)?;
        parse::remember_ports::<F>(maps, &header, &segment);
        return match way_back {
            Some(Dialled::PAST_KERNEL) => as_it_came::<F, M>(packet, maps, &ends),
            // Of a connection that somebody else translates, perhaps.
            _ => Ok(Verdict::Pass),
        };
    }
    // That it leaves the cluster is known: `leaving` has looked.
    let source = source_towards::<F, M>(maps, packet.ifindex(), &segment.src, &segment.dst);
    let source = source.ok_or(Counter::MasqueradeNoAddress)?;
    maps.set_stamp(flow::succession::stamp(packet, &segment));
    flow::begin::<F, M>(maps, &flow::masquerading(maps, &segment, source))
}

/// Sends a masqueraded packet on its way. The kernel can't answer one that is too long: what has this node's
/// address for its source it takes for forged.
#[inline(always)]
pub fn leave<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let ends = parse::addrs::<F>(packet, ETHERNET).ok_or(Counter::Truncated)?;
    // One after the other: nothing that may be missing is to be kept across a look-up.
    let Some(ifindex) = maps.egress(packet.ifindex(), &ends.0, &ends.1) else {
        return Ok(if maps.way_mtu(packet.ifindex(), &ends.0, &ends.1) == 0 {
            Verdict::Pass
        } else {
            Verdict::TooLong
        });
    };
    if packet.is_joined() && !packet.fits_link(ifindex) {
        return Ok(Verdict::TooLong);
    }
    if maps.is_held(packet.ifindex()) {
        return Ok(Verdict::Pass);
    }
    let Some(hops) = hops::<F>(packet) else {
        return Ok(if maps.is(&ends.0, AddressKind::NODE) {
            Verdict::TooLong
        } else {
            Verdict::Pass
        });
    };
    take_hop::<F>(packet, hops).map_err(refused)?;
    Ok(Verdict::Routed(ifindex))
}

/// A packet that another node sent through the overlay.
#[inline(always)]
pub fn from_overlay<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    // The device takes tunnels of any network. What this node lets in there itself had none.
    let network = packet.tunnel_network();
    if network.is_some_and(|vni| vni != maps.overlay().vni) {
        return Err(Counter::TunnelForged);
    }
    if let Some(verdict) = handover::sort::<F, M>(packet, maps)? {
        return Ok(verdict);
    }
    let Some(ends) = parse::addrs::<F>(packet, ETHERNET) else {
        return Ok(Verdict::Pass);
    };
    // Another node may speak with an address of its own that is in no range of pods.
    if let Some(verdict) = arrives::<F, M>(packet, maps, &ends)? {
        return Ok(verdict);
    }
    // The reply of a backend that is not this node's, to whom this node spoke for somebody.
    Ok(if maps.is(&ends.1, AddressKind::NODE) {
        Verdict::Arrived
    } else {
        Verdict::Pass
    })
}

/// A packet that is about to enter the overlay: this node's own, or one that [`enter_overlay`] has
/// given its tunnel already.
#[inline(always)]
pub fn to_overlay<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let sender: Option<[u8; 6]> = packet.load(ETHERNET_SOURCE);
    let has_tunnel = sender.is_some_and(|sender| {
        let [first, ..] = sender;
        sender == OVERLAY_PEER_MAC || first == Handover::SENDER
    });
    if has_tunnel {
        return Ok(Verdict::Pass);
    }
    let Some((src, dst)) = parse::addrs::<F>(packet, ETHERNET) else {
        return Ok(Verdict::Pass);
    };
    if F::is_multicast(dst) {
        // Nobody is behind a group here; the device drops what names no tunnel.
        return Ok(Verdict::Pass);
    }
    match maps.route(&dst) {
        Some(route) if route.kind == RouteKind::OVERLAY => {
            if handover::may_be_split_of::<F, M>(maps, &src) {
                return Ok(Verdict::Rejoin);
            }
            frame(packet, OVERLAY_MAC, OVERLAY_PEER_MAC).map_err(refused)?;
            maps.count(Counter::OverlaySent);
            Ok(Verdict::Tunnel(route))
        }
        _ => Err(Counter::OverlayNoRoute),
    }
}

/// Into the pod that a packet is for. [`pod::returning`] has made a reply the service's before.
#[inline(always)]
pub fn deliver<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let to = parse::addrs::<F>(packet, ETHERNET).and_then(|(_, dst)| maps.endpoint(&dst));
    let Some(to) = to else {
        return Ok(Verdict::Pass);
    };
    let Some(hops) = hops::<F>(packet) else {
        return Ok(Verdict::Pass);
    };
    into_pod::<F>(packet, maps, &to, hops)
}

/// What comes from elsewhere for a pod of this node, if it does: it may be a reply, and who sends it may
/// have to be remembered ([`dialled::came`]), unless neither was so a moment ago.
#[inline(always)]
pub(crate) fn arrives<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
    ends: &(F::Addr, F::Addr),
) -> Result<Option<Verdict>, Counter> {
    if let Some(way) = maps.way(packet.ifindex(), ends)
        && way.kind == ShortcutKind::POD
    {
        return to_pod::<F, M>(packet, maps, ends.0, &way.to).map(Some);
    }
    Ok(is_local::<F, M>(packet, maps, &ends.1).then_some(Verdict::Local))
}

/// Into the pod of this node that a packet is for, if it is for one: at once, unless it may be a
/// reply that has to be made the service's before.
#[inline(always)]
fn to_local<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
    ends: &(F::Addr, F::Addr),
) -> Result<Option<Verdict>, Counter> {
    let Some(to) = maps.endpoint(&ends.1) else {
        return Ok(None);
    };
    to_pod::<F, M>(packet, maps, ends.0, &to).map(Some)
}

#[inline(always)]
fn to_pod<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
    src: F::Addr,
    to: &Endpoint,
) -> Result<Verdict, Counter> {
    let Some(hops) = hops::<F>(packet) else {
        return Ok(Verdict::Pass);
    };
    if pod::may_be_back::<F, M>(packet, maps, ETHERNET, src) {
        return Ok(Verdict::Local);
    }
    into_pod::<F>(packet, maps, to, hops)
}

#[inline(always)]
pub(crate) fn into_pod<F: Family>(
    packet: &mut impl Packet,
    maps: &impl Maps<F>,
    to: &Endpoint,
    hops: u16,
) -> Result<Verdict, Counter> {
    let is_shaped = to.flags & EndpointFlags::SHAPED != 0;
    // Past the host end's interface nobody asks; there it would be dropped without a word.
    if is_shaped && !packet.fits_link(to.ifindex) {
        return Ok(Verdict::Pass);
    }
    take_hop::<F>(packet, hops).map_err(refused)?;
    frame(packet, to.mac, to.host_mac).map_err(refused)?;
    maps.count(Counter::Delivered);
    Ok(Verdict::Deliver {
        ifindex: to.ifindex,
        is_shaped,
    })
}

/// To another node, with its tunnel, which the device's own hook needs not look up again.
#[inline(always)]
pub(crate) fn enter_overlay<F: Family>(
    packet: &mut impl Packet,
    maps: &impl Maps<F>,
    route: Route,
) -> Result<Verdict, Counter> {
    let Some(hops) = hops::<F>(packet) else {
        return Ok(Verdict::Pass);
    };
    let overlay = maps.overlay();
    if !packet.fits(overlay.ifindex, overlay.mtu) {
        return Ok(Verdict::Pass);
    }
    take_hop::<F>(packet, hops).map_err(refused)?;
    frame(packet, OVERLAY_MAC, OVERLAY_PEER_MAC).map_err(refused)?;
    maps.count(Counter::OverlaySent);
    Ok(Verdict::Overlay(route))
}

pub(crate) fn refused(_: Refused) -> Counter {
    Counter::RewriteFailed
}

/// The bits at [`Family::HOPS`] of a packet that has hops left.
#[inline(always)]
pub(crate) fn hops<F: Family>(packet: &impl Packet) -> Option<u16> {
    hops_at::<F>(packet, ETHERNET)
}

/// The same of the network header at `at`.
#[inline(always)]
pub(crate) fn hops_at<F: Family>(packet: &impl Packet, at: usize) -> Option<u16> {
    let word: u16 = packet.load(at + F::HOPS)?;
    (F::hops(word) > 1).then_some(word)
}

/// Whether a packet goes to a pod of this node at once.
#[inline(always)]
pub(crate) fn is_local<F: Family, M: Maps<F>>(
    packet: &impl Packet,
    maps: &M,
    dst: &F::Addr,
) -> bool {
    maps.endpoint(dst).is_some() && hops::<F>(packet).is_some()
}

/// Takes one from the hop limit (RFC 1812, 5.3.1).
#[inline(always)]
pub(crate) fn take_hop<F: Family>(packet: &mut impl Packet, old: u16) -> Result<(), Refused> {
    let new = F::with_one_hop_less(old);
    let at = ETHERNET + F::HOPS;
    let Some(checksum) = F::HEADER_CHECKSUM else {
        return packet.store_uncovered(at, &new);
    };
    // Its checksum follows it at once, and one write is cheaper than two.
    const {
        assert!(match F::HEADER_CHECKSUM {
            Some(checksum) => checksum == F::HOPS + 2,
            None => true,
        })
    };
    let delta = Delta::default().word(old.into(), new.into());
    let sum = delta.apply(packet.load(ETHERNET + checksum).ok_or(Refused)?);
    let ([a, b], [c, d]) = (new.to_ne_bytes(), sum.to_ne_bytes());
    packet.store(at, &[a, b, c, d])
}

/// Gives a frame its receiver and sender (IEEE 802.3, 3.2).
#[inline(always)]
pub(crate) fn frame(packet: &mut impl Packet, to: [u8; 6], from: [u8; 6]) -> Result<(), Refused> {
    packet.store(0, &ethernet(to, from))
}

/// Both as they lie in a frame.
#[inline(always)]
pub(crate) fn ethernet(to: [u8; 6], from: [u8; 6]) -> [u32; 3] {
    let [a, b, c, d, e, f] = to;
    let [g, h, i, j, k, l] = from;
    [
        u32::from_ne_bytes([a, b, c, d]),
        u32::from_ne_bytes([e, f, g, h]),
        u32::from_ne_bytes([i, j, k, l]),
    ]
}
