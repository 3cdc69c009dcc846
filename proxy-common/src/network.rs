//! Where pods are: those of this node by interface, those of other nodes by range.

use crate::{
    net::{V4, V6},
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
    /// network that carries them, or what the operator declared so.
    pub const DIRECT: u32 = 2;
    /// This node's own range: what is no endpoint of it is nobody.
    pub const OWN: u32 = 3;
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

/// Source ports of masqueraded flows: below those that the kernel gives to sockets (32,768 to 60,999
/// by default) and those of node ports (30,000 to 32,767), so that no flow meets another's.
pub const MASQUERADE_PORTS: (u16, u16) = (1_024, 29_999);

/// The Ethernet address of every node's overlay device: what arrives there is for that node, and
/// the tunnel alone says for which.
pub const OVERLAY_MAC: [u8; 6] = [0x02, 0x50, 0x53, 0, 0, 1];
/// Whom frames in the overlay come from; a device drops what seems to come from itself.
pub const OVERLAY_PEER_MAC: [u8; 6] = [0x02, 0x50, 0x53, 0, 0, 2];

map_types! { Endpoint = 20, Route = 24, Uplink = 20, XdpUplink = 8 }
