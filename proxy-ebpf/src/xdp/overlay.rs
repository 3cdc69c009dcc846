//! The overlay at XDP: packets of services' clients on their way to other nodes' pods get their tunnel
//! here, and the replies are taken out of theirs, without the kernel's device.
//!
//! Invariant: what this node sends is what its device would send, and what it takes apart and can't
//! send on is put together again before anybody else sees it.
//!
//! Tunnels between IPv6 addresses are the device's: they have a checksum over all that is inside
//! (RFC 6935, 5, lets tunnels do without it only where both ends agree).

use penstock_common::{
    Addr, AddressKind, Be16, Counter, OVERLAY_MAC, OVERLAY_PEER_MAC, Proto, Responder, Route,
    RouteKind, V4, V6,
};

use crate::{
    env::Maps,
    family::{CONGESTED, ETHERNET, Family, Splittable},
    forward,
    packet::{Packet, Refused},
    parse, pod,
    tunnel::{self, UDP_HEADER, VXLAN_FLAGS, VXLAN_HEADER},
};

/// What a tunnel's headers take, the inner Ethernet header included, in bytes.
const TUNNEL: usize = V4::HEADER + UDP_HEADER + VXLAN_HEADER + ETHERNET;

/// By how much they make an IP packet longer, in bytes.
pub(super) const ADDED: u32 = TUNNEL as u32;

/// Where the frame inside begins.
const INSIDE: usize = TUNNEL;

/// What a tunnel's headers say of one packet, as one number: the whole way there needs more stack than there
/// is, and a number is what functions of the kernel's can hand on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Label {
    /// The other end; specified.
    to: V4,
    /// The port that the packet leaves from.
    port: Be16,
    /// What routers have marked it with.
    marks: u8,
}

impl Label {
    #[inline(always)]
    fn to_bits(self) -> u64 {
        u64::from(self.to.raw()) << 32 | u64::from(self.port.to_host()) << 8 | u64::from(self.marks)
    }

    #[inline(always)]
    fn from_bits(bits: u64) -> Self {
        Self {
            to: V4::from_raw((bits >> 32) as u32),
            port: Be16::from_host((bits >> 8) as u16),
            marks: bits as u8,
        }
    }
}

/// Which tunnel a packet is to get, for [`enclose`]; 0 where none leads to its destination that XDP can make.
#[inline(always)]
pub fn label<F: Family, M: Maps<F>>(packet: &impl Packet, maps: &M) -> u64 {
    let Some((src, dst)) = parse::addrs::<F>(packet, ETHERNET) else {
        return 0;
    };
    let Some(ports) = packet.load::<u32>(ETHERNET + F::HEADER) else {
        return 0;
    };
    let Some(marks) = F::ecn(packet, ETHERNET) else {
        return 0;
    };
    let port = source_port(ports, &src, &dst);
    let Some(route) = maps.route(&dst) else {
        return 0;
    };
    if route.kind != RouteKind::OVERLAY || route.underlay4.is_unspecified() {
        return 0;
    }
    let label = Label {
        to: route.underlay4,
        port,
        marks,
    };
    label.to_bits()
}

/// Puts a packet into the tunnel that [`label`] named. The frame has the Ethernet addresses of the tunnel's
/// way already.
#[inline(always)]
pub fn enclose(packet: &mut impl Packet, maps: &impl Maps<V4>, label: u64) -> Result<(), Refused> {
    let label = Label::from_bits(label);
    let outside: [u32; 3] = packet.load(0).ok_or(Refused)?;
    let payload = packet.length() as u16 + (UDP_HEADER + VXLAN_HEADER) as u16;
    forward::frame(packet, OVERLAY_MAC, OVERLAY_PEER_MAC)?;
    packet.shift(-(TUNNEL as i32))?;
    packet.store(0, &outside)?;
    packet.store(ETHERNET - 2, &V4::ETHERTYPE.to_be())?;
    let header = V4::splittable(
        V4::header(maps.node(), label.to, Proto::UDP, payload),
        handed_on(label.marks),
        maps.random() as u16,
    );
    packet.store(ETHERNET, &header)?;
    let overlay = maps.overlay();
    // Without a checksum: what is inside has its own (RFC 7348, 5).
    let at = ETHERNET + V4::HEADER;
    packet.store(at, &[label.port, overlay.port])?;
    packet.store(at + 4, &[Be16::from_host(payload), Be16::default()])?;
    packet.store(at + UDP_HEADER, &[VXLAN_FLAGS, (overlay.vni << 8).to_be()])?;
    maps.count(Counter::OverlaySent);
    Ok(())
}

/// The mark outside for one inside (RFC 6040, 4.1, the compatibility that the kernel's tunnels have):
/// that there is congestion says whoever finds it.
#[inline(always)]
fn handed_on(marks: u8) -> u8 {
    /// ECT(0).
    const CAPABLE: u8 = 2;
    if marks == CONGESTED { CAPABLE } else { marks }
}

/// The port that a flow's packets leave from, so that networks spread flows and keep each in order
/// (RFC 7348, 5): one of those that systems give, which nobody takes for a service's.
#[inline(always)]
fn source_port<A: Addr>(ports: u32, src: &A, dst: &A) -> Be16 {
    const LOWEST: u16 = 32_768;
    const COUNT: u32 = 16_384;
    let mut hash = ports;
    for [a, b, c, d] in [src.words(), dst.words()] {
        hash = (hash ^ a ^ b.rotate_left(8) ^ c.rotate_left(16) ^ d.rotate_left(24))
            .wrapping_mul(0x9e37_79b9);
    }
    Be16::from_host(LOWEST + (hash >> 16) as u16 % COUNT as u16)
}

/// Takes a reply to whom this node speaks for out of its tunnel, for [`super::carry`]; the type of what
/// is inside, or `None` for what the kernel is to unwrap, which stays as it was.
#[inline(always)]
pub fn disclose<M: Maps<V4> + Maps<V6>>(packet: &mut impl Packet, maps: &M) -> Option<u16> {
    let own: V4 = packet.load(ETHERNET + V4::ADDRS + size_of::<V4>())?;
    let from: V4 = packet.load(ETHERNET + V4::ADDRS)?;
    if packet.is_for_another_host()
        || !tunnel::is_own::<V4, M>(packet, maps, &own)
        || maps.uplink(packet.ifindex())?.addr4 != own
        // A checksum over all of it is the kernel's to check, and a mark to hand on (RFC 6040).
        || packet.load::<u16>(ETHERNET + V4::HEADER + 6)? != 0
        || V4::ecn(packet, ETHERNET)? == CONGESTED
        // Other addresses say that a flow is handed over.
        || packet.load::<[u8; 6]>(INSIDE)? != OVERLAY_MAC
    {
        return None;
    }
    let ethertype = u16::from_be(packet.load(INSIDE + ETHERNET - 2)?);
    let may_be_reply = match ethertype {
        V4::ETHERTYPE => may_be_reply::<V4, M>(packet, maps, from)?,
        V6::ETHERTYPE => may_be_reply::<V6, M>(packet, maps, from)?,
        _ => false,
    };
    let uplink = maps.xdp_uplink(packet.ifindex())?;
    if !may_be_reply || packet.shift(TUNNEL as i32).is_err() {
        return None;
    }
    if packet.store(0, &uplink.mac).is_err() {
        // As long as it is, this can't be.
        return None;
    }
    Some(ethertype)
}

/// Whether the packet in a tunnel from `node` is from one of its pods, and may answer whom this node speaks for.
#[inline(always)]
fn may_be_reply<F: Family, M: Maps<F>>(packet: &impl Packet, maps: &M, node: V4) -> Option<bool> {
    let at = INSIDE + ETHERNET;
    let (src, dst) = parse::addrs::<F>(packet, at)?;
    let proto = F::plain(packet, at)?;
    let [from, to]: [Be16; 2] = packet.load(at + F::HEADER)?;
    Some(
        pod::is_translated(proto)
            && super::may_answer(maps, to, Responder::new(proto, src, from))
            && maps.is(&dst, AddressKind::NODE)
            && maps.route(&src).is_some_and(|route: Route| {
                route.kind == RouteKind::OVERLAY && route.underlay4 == node
            }),
    )
}

/// Puts together again what [`disclose`] took apart.
#[inline(always)]
pub fn restore(packet: &mut impl Packet) -> Result<(), Refused> {
    packet.store(0, &OVERLAY_MAC)?;
    packet.shift(-(TUNNEL as i32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_says_what_it_was_made_of() {
        for (to, port, marks) in [([172, 31, 0, 12], 49_151, 3), ([255, 0, 0, 1], 32_768, 0)] {
            let label = Label {
                to: V4::from_octets(to),
                port: Be16::from_host(port),
                marks,
            };
            assert_eq!(Label::from_bits(label.to_bits()), label);
        }
    }

    #[test]
    fn ports_are_spread_over_those_that_systems_give() {
        let (src, dst) = (
            V4::from_octets([10, 0, 0, 1]),
            V4::from_octets([10, 0, 0, 2]),
        );
        let all = (0..1_000_u32).map(|ports| source_port(ports, &src, &dst).to_host());
        let mut ports: Vec<u16> = all.collect();
        assert!(ports.iter().all(|port| (32_768..49_152).contains(port)));
        ports.sort_unstable();
        ports.dedup();
        assert!(ports.len() > 900, "{}", ports.len());
    }
}
