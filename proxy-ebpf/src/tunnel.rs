//! The overlay's own packets between nodes: no service's and no flow's, but most of what an interface
//! to the outside sees.

use penstock_common::{Be16, Counter, Proto};

use crate::{
    env::Maps,
    family::{ETHERNET, Family},
    packet::Packet,
    parse,
    pod::Verdict,
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

/// A packet that the kernel sends to the outside; [`Verdict::Arrived`] where it may be a reply, which is
/// `pod::returning`'s, for whom this one's stack is to be gone.
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
