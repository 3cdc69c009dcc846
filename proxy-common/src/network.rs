//! Where pods are: those of this node by interface, those of other nodes by range.

use crate::{
    net::{Addr, V4, V6, mixed, place},
    plain::map_types,
};

/// Bits of [`Endpoint::flags`].
pub struct EndpointFlags;

impl EndpointFlags {
    /// A queueing discipline at the host end limits what the pod gets, so that nothing may pass it
    /// by.
    pub const SHAPED: u32 = 1;
}

/// A pod of this node, found by its address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// The index of the host end of its interface.
    pub ifindex: u32,
    /// [`EndpointFlags`].
    pub flags: u32,
    /// The Ethernet address of the pod's end.
    pub mac: [u8; 6],
    /// The Ethernet address of the host's end.
    pub host_mac: [u8; 6],
}

/// What [`Route::kind`] says of a range of addresses.
pub struct RouteKind;

impl RouteKind {
    /// Another node's pods, behind a tunnel to it.
    pub const OVERLAY: u32 = 1;
    /// Reached as the kernel's routes say, with the pod's own address: another node's pods on a
    /// network that carries them.
    pub const DIRECT: u32 = 2;
    /// This node's own range: what is no endpoint of it is nobody.
    pub const OWN: u32 = 3;
    /// Another node itself, on a network that carries pods' addresses: it sees them, or could not tell
    /// their replies from others. For policies it is outside.
    pub const NODE: u32 = 4;
    /// What sees pods' own addresses because the operator said so, and is outside all the same.
    pub const UNMASKED: u32 = 5;

    /// Whether whoever is there is one of the cluster's pods.
    #[inline(always)]
    pub const fn is_of_pods(kind: u32) -> bool {
        matches!(kind, Self::OVERLAY | Self::DIRECT | Self::OWN)
    }
}

/// Where a range of addresses is; what no range covers is outside of the cluster.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Route {
    /// [`RouteKind`].
    pub kind: u32,
    /// The other node's IPv4 address, unspecified where the tunnel is IPv6.
    pub underlay4: V4,
    /// The other node's IPv6 address.
    pub underlay6: V6,
}

/// An interface to the outside, found by its index.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Uplink {
    /// This node's IPv4 address there, unspecified if it has none.
    pub addr4: V4,
    /// This node's IPv6 address there.
    pub addr6: V6,
}

/// An interface to the outside whose packets meet XDP first, found by its index.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct XdpUplink {
    /// Its Ethernet address: at XDP nobody has yet told what is for another host.
    pub mac: [u8; 6],
    /// Zero.
    pub pad: u16,
}

/// The Ethernet address of every node's overlay device: what arrives there is for that node, and
/// the tunnel alone says for which.
pub const OVERLAY_MAC: [u8; 6] = [0x02, 0x50, 0x53, 0, 0, 1];
/// Whom frames in the overlay come from; a device drops what seems to come from itself.
pub const OVERLAY_PEER_MAC: [u8; 6] = [0x02, 0x50, 0x53, 0, 0, 2];

/// What [`Shortcut::kind`] says of packets with the same ends.
pub struct ShortcutKind;

impl ShortcutKind {
    /// Nothing: no packet was noted here.
    pub const NONE: u32 = 0;
    /// They go to a pod of this node.
    pub const POD: u32 = 1;
    /// They go to another node's pod, through a tunnel.
    pub const TUNNEL: u32 = 2;
    /// They go elsewhere, and are no service's.
    pub const BEYOND: u32 = 3;
}

/// Where packets from one interface with these ends went a moment ago.
///
/// It holds while `CHANGED` is what it was before the tables were asked, and for two seconds at most:
/// an agent may end after it wrote to a table and before it says so.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shortcut<A> {
    /// `CHANGED` before the tables were asked.
    pub changed: u64,
    /// When, in seconds since boot.
    pub noted_secs: u32,
    /// [`ShortcutKind`].
    pub kind: u32,
    /// The interface that they came in by.
    pub ifindex: u32,
    /// Source address.
    pub src: A,
    /// Destination address.
    pub dst: A,
    /// The pod.
    pub to: Endpoint,
    /// The tunnel.
    pub route: Route,
}

impl<A: Addr> Shortcut<A> {
    /// For how long one holds at most, in seconds of a coarse clock.
    pub const LASTS_SECS: u32 = 2;

    /// Where the one of these packets is.
    #[inline(always)]
    pub fn index(ifindex: u32, src: A, dst: A) -> u32 {
        place(
            mixed(mixed(ifindex.into(), src), dst),
            crate::limits::SHORTCUTS,
        )
    }
}

map_types! { Shortcut<V4> = 72, Shortcut<V6> = 96, Endpoint = 20, Route = 24, Uplink = 20, XdpUplink = 8 }
