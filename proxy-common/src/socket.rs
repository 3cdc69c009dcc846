//! What the socket hooks remember of the sockets that they translated.
//!
//! Both families share these maps: an IPv6 socket may talk IPv4, so addresses are in IPv6's form.

use crate::{
    net::{Be16, Proto, V4, V6},
    plain::map_types,
    service::{BackendId, ServiceId},
};

/// An address and port that a socket talks to.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SockEndpoint {
    /// The address; IPv4 as `::ffff:a.b.c.d`.
    pub addr: V6,
    /// The port.
    pub port: Be16,
    /// The protocol.
    pub proto: Proto,
    pad: u8,
}

impl SockEndpoint {
    /// An endpoint without stray bits.
    #[inline(always)]
    pub const fn new(addr: V6, port: Be16, proto: Proto) -> Self {
        Self {
            addr,
            port,
            proto,
            pad: 0,
        }
    }
}

/// A connected socket's peer as the application and as the network know it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketPeer {
    /// The service's address, which the application dialled.
    pub frontend: SockEndpoint,
    /// The backend's address, which the socket is connected to.
    pub backend: SockEndpoint,
}

/// A place for the peer of a connected TCP socket, named by the low bits of the socket's cookie.
///
/// Socket storage holds the same, but costs two allocations a connection; it is for sockets whose
/// place another one has.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpPeer {
    /// The cookie of the socket that has the place, 0 if nobody has it: no socket has that cookie.
    pub cookie: u64,
    /// Its peer.
    pub peer: SocketPeer,
}

/// A UDP socket that was connected to a service: the agent connects it anew when its backend goes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectedUdp {
    /// The service's address.
    pub frontend: SockEndpoint,
    /// The service port.
    pub service: ServiceId,
    /// The backend, [`ConnectedUdp::NO_BACKEND`] where the service had none.
    pub backend: BackendId,
    /// The backend's generation.
    pub generation: u32,
    /// The process that connected it, by its id in the initial PID namespace; 0 if not known.
    pub pid: u32,
}

impl ConnectedUdp {
    /// The service had no backend when the socket was connected.
    pub const NO_BACKEND: BackendId = BackendId(u32::MAX);
    /// Where a generation would be, of a socket without backend: the agent connected it anew in vain, so that
    /// it still has the address of the backend that it had.
    pub const REFUSED: u32 = 1;
}

/// An unconnected UDP socket and somebody that it exchanges datagrams with.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DatagramKey {
    /// The socket's cookie.
    pub cookie: u64,
    /// The other side: a service's address in `DATAGRAMS`, a backend's in `DATAGRAM_PEERS`.
    pub peer: SockEndpoint,
    pad: [u8; 4],
}

impl DatagramKey {
    /// A key without stray bits.
    #[inline(always)]
    pub const fn new(cookie: u64, peer: SockEndpoint) -> Self {
        Self {
            cookie,
            peer,
            pad: [0; 4],
        }
    }
}

/// The backend that a socket's datagrams to a service go to.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Datagram {
    /// The backend.
    pub backend: BackendId,
    /// Its generation.
    pub generation: u32,
    /// When the last datagram was sent, in seconds since boot.
    pub used_secs: u32,
}

/// Bits of [`Netns::flags`].
pub struct NetnsFlags;

impl NetnsFlags {
    /// The socket hooks leave this namespace's sockets alone.
    pub const EXCLUDED: u32 = 1;
    /// The pod hook sees this namespace's packets, so what a socket hook leaves untranslated is
    /// translated or rejected there.
    pub const HAS_POD_HOOK: u32 = 2;
    /// This node's own, whose loopback address has node ports.
    pub const HOST: u32 = 4;
}

/// A network namespace on this node.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Netns {
    /// [`NetnsFlags`].
    pub flags: u32,
    /// Its IPv4 address, unspecified if it has none.
    pub addr4: V4,
    /// Its IPv6 address, unspecified if it has none.
    pub addr6: V6,
}

map_types! {
    SockEndpoint = 20, SocketPeer = 40, TcpPeer = 48, ConnectedUdp = 36, DatagramKey = 32, Datagram = 12,
    Netns = 24,
}
