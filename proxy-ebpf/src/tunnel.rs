//! The overlay's own packets between nodes: no service's and no flow's, but most of what an interface
//! to the outside sees.
//!
//! What comes for a pod of this node is unwrapped here and goes into the pod at once, past the
//! kernel's receiving end, which would take most of a packet's time; if it comes from the node that
//! its source is a pod of. All else the kernel unwraps: what may be a reply to a translated request,
//! what is for the node itself, fragments, whatever is unusual.

use penstock_common::{
    Addr, Be16, Counter, FlowFlags, OVERLAY_MAC, Proto, Route, RouteKind, ShortcutKind, Uplink, V4,
    V6,
};

use crate::{
    env::{Maps, Way},
    family::{CONGESTED, ETHERNET, Family, Network},
    forward,
    packet::Packet,
    parse,
    pod::{self, Back, Verdict},
};

/// The length of a UDP header (RFC 768), in bytes.
pub(crate) const UDP_HEADER: usize = 8;
/// A VXLAN header's first word: there is a network identifier (RFC 7348, 5).
pub(crate) const VXLAN_FLAGS: u32 = u32::from_ne_bytes([8, 0, 0, 0]);

/// Whether a packet is a tunnel's, of which `own` is this node's end, and whole.
///
/// It is told by its VXLAN header too: a client's port may be any, the tunnels' among them.
#[inline(always)]
pub(crate) fn is_own<F: Family, M: Maps<F>>(packet: &impl Packet, maps: &M, own: &F::Addr) -> bool {
    if F::plain(packet, ETHERNET) != Some(Proto::UDP) {
        return false;
    }
    let overlay = maps.overlay();
    let to: Option<Be16> = packet.load(ETHERNET + F::HEADER + 2);
    let vxlan: Option<[u32; 2]> = packet.load(ETHERNET + F::HEADER + UDP_HEADER);
    overlay.ifindex != 0
        && to == Some(overlay.port)
        && vxlan == Some([VXLAN_FLAGS, (overlay.vni << 8).to_be()])
        && *own == maps.node()
}

/// A packet that the kernel sends to the outside: [`Verdict::Arrived`], which is [`sent`]'s, where it may
/// be a reply.
#[inline(always)]
pub fn to_uplink<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    match parse::addrs::<F>(packet, ETHERNET) {
        Some((src, _)) if is_own::<F, M>(packet, maps, &src) => Ok(Verdict::Pass),
        _ => Ok(Verdict::Arrived),
    }
}

/// A packet that the kernel sends to the outside and that is no tunnel's: by a function of its own, since
/// [`to_uplink`]'s stack has to be gone by then.
#[inline(always)]
pub fn sent<F: Family, M: Maps<F>>(packet: &mut impl Packet, maps: &M) -> Result<Verdict, Counter> {
    Ok(match pod::back::<F, M>(packet, maps)? {
        Back::Reply(flags) if flags & u32::from(FlowFlags::GOES_BACK) != 0 => Verdict::HandBack,
        _ => Verdict::Pass,
    })
}

/// The length of a VXLAN header (RFC 7348, 5), in bytes.
pub(crate) const VXLAN_HEADER: usize = 8;
/// The longest headers that are looked at inside, in bytes: IPv6's and as much of TCP's as has ports.
const LOOKED_AT: usize = V6::HEADER + 8;

/// Unwraps a tunnel's packet to this node ([`is_own`]) and hands what is inside to its pod.
#[inline(always)]
pub fn unwrap<F: Family, M: Maps<F> + Maps<V4> + Maps<V6>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    let at = ETHERNET + F::HEADER + UDP_HEADER + VXLAN_HEADER;
    packet.reach(at + ETHERNET + LOOKED_AT);
    let Some(from) = packet.load::<F::Addr>(ETHERNET + F::ADDRS) else {
        return Ok(Verdict::Pass);
    };
    // A checksum over all of it is the kernel's to check, and a mark to hand on (RFC 6040).
    if from.is_unspecified()
        || packet.load::<u16>(ETHERNET + F::HEADER + 6) != Some(0)
        || F::ecn(packet, ETHERNET) == Some(CONGESTED)
    {
        return Ok(Verdict::Pass);
    }
    // Other addresses say that a flow is handed over.
    if packet.load(at) != Some(OVERLAY_MAC) {
        return Ok(Verdict::Pass);
    }
    let node: F::Addr = Maps::<F>::node(maps);
    let tunnel = Tunnel {
        at,
        ends_here: |uplink: Uplink| F::of(uplink.addr4, uplink.addr6) == node,
        is_from: |route: &Route| from == F::of(route.underlay4, route.underlay6),
    };
    let ethertype: Option<u16> = packet.load(at + ETHERNET - 2);
    match ethertype.map(u16::from_be) {
        Some(V4::ETHERTYPE) => inside::<V4, M, _, _>(packet, maps, &tunnel),
        Some(V6::ETHERTYPE) => inside::<V6, M, _, _>(packet, maps, &tunnel),
        _ => Ok(Verdict::Pass),
    }
}

/// What is to be known of a tunnel's packet, whatever its family.
struct Tunnel<H, S> {
    /// Where the frame inside begins.
    at: usize,
    /// Whether tunnels end at an interface's address.
    ends_here: H,
    /// Whether it comes from the node that a route leads to.
    is_from: S,
}

/// What to do with the frame inside.
#[inline(always)]
fn inside<F: Family, M: Maps<F>, H: Fn(Uplink) -> bool, S: Fn(&Route) -> bool>(
    packet: &mut impl Packet,
    maps: &M,
    tunnel: &Tunnel<H, S>,
) -> Result<Verdict, Counter> {
    let network = tunnel.at + ETHERNET;
    let Some(ends) = parse::addrs::<F>(packet, network) else {
        return Ok(Verdict::Pass);
    };
    let ifindex = packet.ifindex();
    let way = match maps.way(ifindex, &ends) {
        Some(way) => way,
        None => arrival::<F, M>(maps, ifindex, &ends, &tunnel.ends_here),
    };
    if way.kind != ShortcutKind::POD || !(tunnel.is_from)(&way.route) {
        return Ok(Verdict::Pass);
    }
    // Joined datagrams keep a note of the tunnel that only the kernel can take off, and would be cut
    // apart wrongly.
    if packet.is_joined() && F::plain(packet, network) != Some(Proto::TCP) {
        return Ok(Verdict::Pass);
    }
    let Some(hops) = forward::hops_at::<F>(packet, network) else {
        return Ok(Verdict::Pass);
    };
    if pod::may_be_back::<F, M>(packet, maps, network, ends.0)
        || packet.unwrap(tunnel.at, F::ETHERTYPE).is_err()
    {
        return Ok(Verdict::Pass);
    }
    forward::into_pod::<F>(packet, maps, &way.to, hops)
}

/// The pod of this node that packets with these ends are for, and the tunnel that leads to their
/// source, if tunnels end at this interface; noted for those that follow.
#[inline(always)]
fn arrival<F: Family, M: Maps<F>>(
    maps: &M,
    ifindex: u32,
    ends: &(F::Addr, F::Addr),
    ends_here: impl Fn(Uplink) -> bool,
) -> Way {
    let changed = maps.changed();
    let mut way = Way {
        kind: ShortcutKind::BEYOND,
        ..Way::default()
    };
    if maps.uplink(ifindex).is_some_and(ends_here)
        && let Some(to) = maps.endpoint(&ends.1)
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
