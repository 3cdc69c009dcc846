//! How what comes from the outside reaches a backend of another node, and how the overlay carries it.
//!
//! A packet that is handed over keeps its bytes from the IP header on. Which backend it is for stands
//! in its Ethernet addresses, which mean nothing in the overlay otherwise: every packet, segment and
//! fragment carries it, and none is longer for it.

use crate::{
    net::{Be16, V4, V6},
    plain::map_types,
    service::FrontendFlags,
};

/// A way to backends of other nodes for clients outside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Forwarding {
    /// With an address of this node, to which backends answer.
    #[default]
    Snat,
    /// As it came, to the backend's node; replies come back by way of this node.
    Tunnel,
    /// As it came, to the backend's node, which answers the client itself (direct server return).
    Dsr,
}

impl Forwarding {
    /// All ways.
    pub const ALL: [Self; 3] = [Self::Snat, Self::Tunnel, Self::Dsr];

    /// Its name.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Snat => "snat",
            Self::Tunnel => "tunnel",
            Self::Dsr => "dsr",
        }
    }

    /// The way of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|way| way.label() == name)
    }

    /// What it is in a frontend's flags.
    pub const fn flags(self) -> u32 {
        match self {
            Self::Snat => 0,
            Self::Tunnel => FrontendFlags::TUNNEL,
            Self::Dsr => FrontendFlags::DSR,
        }
    }

    /// The way in a frontend's flags.
    pub const fn of(flags: u32) -> Self {
        if flags & FrontendFlags::DSR != 0 {
            Self::Dsr
        } else if flags & FrontendFlags::TUNNEL != 0 {
            Self::Tunnel
        } else {
            Self::Snat
        }
    }
}

/// What the Ethernet addresses of a frame in the overlay say of it, where they are not those of all
/// others (`OVERLAY_MAC`, `OVERLAY_PEER_MAC`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handover {
    /// [`Handover::TUNNEL`], [`Handover::DSR`] or [`Handover::BACK`].
    pub kind: u8,
    /// The end of the backend's address ([`crate::Addr::suffix`]); its node knows how it begins. Zero in a
    /// frame that goes back.
    pub suffix: [u32; 2],
    /// The backend's port; zero likewise.
    pub port: Be16,
}

impl Handover {
    // First bytes of local unicast addresses (IEEE 802, 8.4), and none of the overlay's usual ones.
    /// To a backend of the receiving node. What it answers goes back the same way.
    pub const TUNNEL: u8 = 0x06;
    /// To a backend of the receiving node, which answers the client itself.
    pub const DSR: u8 = 0x0a;
    /// An answer, as the client is to see it.
    pub const BACK: u8 = 0x0e;
    /// The first byte of such a frame's sender.
    pub const SENDER: u8 = 0x12;

    /// An answer.
    pub const ANSWER: Self = Self {
        kind: Self::BACK,
        suffix: [0; 2],
        port: Be16::from_host(0),
    };

    /// A frame's receiver and sender that say this.
    #[inline(always)]
    pub fn macs(&self) -> ([u8; 6], [u8; 6]) {
        let [[a, b, c, d], [e, f, g, h]] = self.suffix.map(u32::to_ne_bytes);
        let [i, j] = self.port.raw().to_ne_bytes();
        ([self.kind, a, b, c, d, e], [Self::SENDER, f, g, h, i, j])
    }

    /// What a frame's receiver and sender say, if it is this.
    #[inline(always)]
    pub fn of(to: [u8; 6], from: [u8; 6]) -> Option<Self> {
        let ([kind, a, b, c, d, e], [sender, f, g, h, i, j]) = (to, from);
        if sender != Self::SENDER || !matches!(kind, Self::TUNNEL | Self::DSR | Self::BACK) {
            return None;
        }
        Some(Self {
            kind,
            suffix: [
                u32::from_ne_bytes([a, b, c, d]),
                u32::from_ne_bytes([e, f, g, h]),
            ],
            port: Be16::from_raw(u16::from_ne_bytes([i, j])),
        })
    }
}

/// The other end of a tunnel: one address, the other one unspecified.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Vtep {
    /// Its IPv4 address.
    pub v4: V4,
    /// Its IPv6 address.
    pub v6: V6,
}

map_types! { Vtep = 20 }

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Addr, OVERLAY_MAC, OVERLAY_PEER_MAC};

    #[test]
    fn a_way_is_found_again_in_flags_and_by_its_name() {
        for way in Forwarding::ALL {
            assert_eq!(Forwarding::of(way.flags()), way);
            assert_eq!(
                Forwarding::of(way.flags() | !(FrontendFlags::DSR | FrontendFlags::TUNNEL)),
                way
            );
            assert_eq!(Forwarding::named(way.label()), Some(way));
        }
        assert_eq!(Forwarding::named("DSR"), None);
    }

    #[test]
    fn a_backend_of_either_family_is_found_again_in_ethernet_addresses() {
        let own = V6::from_octets([0xfd, 0, 2, 0x44, 0, 2, 0, 3, 9, 9, 9, 9, 9, 9, 9, 1]);
        let pod = V6::from_octets([
            0xfd, 0, 2, 0x44, 0, 2, 0, 3, 1, 2, 0xff, 4, 5, 0xfe, 7, 0x80,
        ]);
        let pod4 = V4::from_octets([10, 244, 255, 129]);
        for kind in [Handover::TUNNEL, Handover::DSR] {
            for suffix in [pod.suffix(), pod4.suffix()] {
                let sent = Handover {
                    kind,
                    suffix,
                    port: Be16::from_host(0xabcd),
                };
                let (to, from) = sent.macs();
                assert_eq!(Handover::of(to, from), Some(sent));
                for mac in [to, from] {
                    assert_eq!(mac[0] & 3, 2, "a local unicast address");
                }
            }
        }
        assert_eq!(own.with_suffix(pod.suffix()), pod);
        assert_eq!(
            V4::from_octets([10, 244, 1, 1]).with_suffix(pod4.suffix()),
            pod4
        );
        assert_eq!(Handover::of(OVERLAY_MAC, OVERLAY_PEER_MAC), None);
        let (to, from) = Handover::ANSWER.macs();
        assert_eq!(Handover::of(to, from), Some(Handover::ANSWER));
    }
}
