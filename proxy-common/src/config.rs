//! What the agent tells the programs about this node; it may change while they run.

use crate::{
    net::{Be16, V4, V6},
    plain::map_types,
};

/// After how many idle seconds a flow is forgotten. Defaults are kube-proxy's and the kernel's.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP, seen in one direction only.
    pub tcp_syn_secs: u32,
    /// TCP, established.
    pub tcp_established_secs: u32,
    /// TCP, after a FIN or RST.
    pub tcp_closing_secs: u32,
    /// UDP, seen in one direction only.
    pub udp_secs: u32,
    /// UDP, seen in both directions.
    pub udp_stream_secs: u32,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            tcp_syn_secs: 60,
            tcp_established_secs: 86_400,
            tcp_closing_secs: 120,
            udp_secs: 30,
            udp_stream_secs: 120,
        }
    }
}

/// Bits of [`Config::network`].
pub struct NetworkFlags;

impl NetworkFlags {
    /// This node's pods are Penstock's to connect: `ENDPOINTS` and `ROUTES` count.
    pub const FORWARD: u32 = 1;
    /// What pods send to the outside gets the node's address.
    pub const MASQUERADE: u32 = 2;
    /// There is an overlay in which the ends of pods' IPv4 addresses tell them apart
    /// ([`crate::Handover`]).
    pub const HANDOVER4: u32 = 4;
    /// The same for IPv6.
    pub const HANDOVER6: u32 = 8;
    /// Somebody else translates packets to pods, in the kernel's stack: what they answer has to go back there.
    pub const CHAINED: u32 = 16;
    /// There are pods that `HELD` names: without any, nobody looks there.
    pub const HELD: u32 = 32;
}

/// The one element of `CONFIG`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// This node's IPv4 address, unspecified if it has none.
    pub node4: V4,
    /// This node's IPv6 address, unspecified if it has none.
    pub node6: V6,
    /// When flows are forgotten.
    pub timeouts: Timeouts,
    /// How many entries `EXCLUDED_CGROUPS` has: with none, nobody looks.
    pub excluded_cgroups: u32,
    /// [`NetworkFlags`].
    pub network: u32,
    /// The index of the overlay device, 0 if there is none.
    pub overlay_ifindex: u32,
    /// How long a packet in the overlay may be, in bytes, IP header included.
    pub overlay_mtu: u32,
    /// The overlay's VXLAN network identifier.
    pub overlay_vni: u32,
    /// The UDP port of its tunnels.
    pub overlay_port: Be16,
    /// Zero.
    pub pad: u16,
    /// This node's IPv4 address in the overlay, unspecified if it has none.
    pub overlay4: V4,
    /// This node's IPv6 address in the overlay, unspecified if it has none.
    pub overlay6: V6,
}

map_types! { Timeouts = 20, Config = 84 }
