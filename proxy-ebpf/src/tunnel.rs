//! The overlay's own packets between nodes: no service's and no flow's, but most of what an interface
//! to the outside sees.
//!
//! What comes for a pod of this node is unwrapped here and goes into the pod at once, past the
//! kernel's receiving end, which would take most of a packet's time; if it comes from the node that
//! its source is a pod of. All else the kernel unwraps: what may be a reply to a translated request,
//! what is for the node itself, fragments, whatever is unusual.

use penstock_common::{
    Be16, Counter, FlowFlags, OVERLAY_MAC, Proto, Route, RouteKind, ShortcutKind, V4, V6,
};

use crate::{
    env::{Maps, Way},
    family::{ETHERNET, Family, Network},
    forward,
    packet::Packet,
    parse,
    pod::{self, Back, Verdict},
};

/// The length of a UDP header (RFC 768), in bytes.
const UDP_HEADER: usize = 8;
/// A VXLAN header's first word: there is a network identifier (RFC 7348, 5).
const VXLAN_FLAGS: u32 = u32::from_ne_bytes([8, 0, 0, 0]);

/// Whether a packet is a tunnel's, of which `own` is this node's end.
///
/// It is told by its VXLAN header too: a client's port may be any, the tunnels' among them.
#[inline(always)]
pub(crate) fn is_own<F: Family, M: Maps<F>>(packet: &impl Packet, maps: &M, own: &F::Addr) -> bool {
    let Some(header) = F::network(packet, ETHERNET) else {
        return false;
    };
    if header.proto != Proto::UDP || header.fragment.is_later {
        return false;
    }
    let overlay = maps.overlay();
    let to: Option<Be16> = packet.load(header.transport + 2);
    let vxlan: Option<[u32; 2]> = packet.load(header.transport + UDP_HEADER);
    overlay.ifindex != 0
        && to == Some(overlay.port)
        && vxlan == Some([VXLAN_FLAGS, (overlay.vni << 8).to_be()])
        && *own == maps.node()
}

/// A packet that the kernel sends to the outside.
#[inline(always)]
pub fn to_uplink<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    match parse::addrs::<F>(packet, ETHERNET) {
        Some((src, _)) if is_own::<F, M>(packet, maps, &src) => Ok(Verdict::Pass),
        _ => Ok(match pod::back::<F, M>(packet, maps)? {
            Back::Reply(flags) if flags & FlowFlags::GOES_BACK != 0 => Verdict::HandBack,
            _ => Verdict::Pass,
        }),
    }
}

/// The length of a VXLAN header (RFC 7348, 5), in bytes.
const VXLAN_HEADER: usize = 8;
/// The longest headers that are looked at inside, in bytes: IPv6's and as much of TCP's as has ports.
const LOOKED_AT: usize = V6::HEADER + 8;

/// Unwraps a tunnel's packet to this node and hands what is inside to its pod.
#[inline(always)]
pub fn unwrap<F: Family, M: Maps<F> + Maps<V4> + Maps<V6>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let at = ETHERNET + F::HEADER + UDP_HEADER + VXLAN_HEADER;
    packet.reach(at + ETHERNET + LOOKED_AT);
    let (Some(header), Some(from)) = (
        F::network(packet, ETHERNET),
        packet.load::<F::Addr>(ETHERNET + F::ADDRS),
    ) else {
        return Ok(Verdict::Pass);
    };
    // A checksum over all of it is the kernel's to check.
    let checksum: Option<u16> = packet.load(ETHERNET + F::HEADER + 6);
    if header.transport != ETHERNET + F::HEADER || header.fragment.is_part || checksum != Some(0) {
        return Ok(Verdict::Pass);
    }
    // Other addresses say that a flow is handed over.
    if packet.load(at) != Some(OVERLAY_MAC) {
        return Ok(Verdict::Pass);
    }
    let ethertype: Option<u16> = packet.load(at + ETHERNET - 2);
    match ethertype.map(u16::from_be) {
        Some(V4::ETHERTYPE) => inside::<V4, M>(packet, maps, at, |route| {
            from == F::of(route.underlay4, route.underlay6)
        }),
        Some(V6::ETHERTYPE) => inside::<V6, M>(packet, maps, at, |route| {
            from == F::of(route.underlay4, route.underlay6)
        }),
        _ => Ok(Verdict::Pass),
    }
}

/// What to do with the frame at `at`, of whose source's node `is_from` knows whether it sent it.
#[inline(always)]
fn inside<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
    at: usize,
    is_from: impl FnOnce(&Route) -> bool,
) -> Result<Verdict, Counter> {
    let network = at + ETHERNET;
    let Some(ends) = parse::addrs::<F>(packet, network) else {
        return Ok(Verdict::Pass);
    };
    let ifindex = packet.ifindex();
    let way = match maps.way(ifindex, &ends) {
        Some(way) => way,
        None => arrival::<F, M>(maps, ifindex, &ends),
    };
    if way.kind != ShortcutKind::POD || !is_from(&way.route) {
        return Ok(Verdict::Pass);
    }
    let Some(hops) = forward::hops_at::<F>(packet, network) else {
        return Ok(Verdict::Pass);
    };
    if pod::may_be_back::<F, M>(packet, maps, network, ends.0)
        || packet.unwrap(at, F::ETHERTYPE).is_err()
    {
        return Ok(Verdict::Pass);
    }
    forward::into_pod::<F>(packet, maps, &way.to, hops)
}

/// The pod of this node that packets with these ends are for, and the tunnel that leads to their
/// source; noted for those that follow.
#[inline(always)]
fn arrival<F: Family, M: Maps<F>>(maps: &M, ifindex: u32, ends: &(F::Addr, F::Addr)) -> Way {
    let changed = maps.changed();
    let mut way = Way {
        kind: ShortcutKind::BEYOND,
        ..Way::default()
    };
    if let Some(to) = maps.endpoint(&ends.1)
        && let Some(route) = maps.route(&ends.0)
        && route.kind == RouteKind::OVERLAY
    {
        way = Way {
            kind: ShortcutKind::POD,
            to,
            route,
        };
    }
    maps.note_way(changed, ifindex, ends, &way);
    way
}

/// Whether a packet, once this node has sent it, would look like one of its tunnels'.
#[inline(always)]
pub(crate) fn is_tunnels<F: Family>(maps: &impl Maps<F>, proto: Proto, to: Be16) -> bool {
    if proto != Proto::UDP {
        return false;
    }
    let overlay = maps.overlay();
    overlay.ifindex != 0 && to == overlay.port
}

/// The same of a packet by its headers. Later fragments go nowhere without their first.
#[inline(always)]
pub(crate) fn forges<F: Family>(
    packet: &impl Packet,
    maps: &impl Maps<F>,
    header: &Network,
) -> bool {
    if header.proto != Proto::UDP || header.fragment.is_later {
        return false;
    }
    let to: Option<Be16> = packet.load(header.transport + 2);
    to.is_some_and(|to| is_tunnels(maps, Proto::UDP, to))
}
