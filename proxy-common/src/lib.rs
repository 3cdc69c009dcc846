//! The contract between Penstock's kernel programs and its agent: every map's key and value.
//!
//! Both sides depend on this crate and it depends on neither. A type here is laid out identically
//! on both sides (`repr(C)`, explicit padding, sizes asserted at compile time), holds only what any
//! bit pattern may be read as ([`Plain`]), and keeps addresses and ports in network byte order
//! inside types that say so. [`ABI_VERSION`] is part of the path that the maps are pinned under, so
//! that a program never meets a map of another layout.
//!
//! | map | kind | key → value | written by | when full |
//! | --- | --- | --- | --- | --- |
//! | `ADDRESSES4/6` | hash | address → [`Address`] | agent | the service is reported and retried |
//! | `ADDRESS_FILTER4/6` | array | [`FilterBit`]'s element → bits of addresses that `ADDRESSES` has, or is about to have or has just had | agent | addresses share bits |
//! | `FRONTENDS4/6` | hash | [`FrontendKey`] → [`Frontend`] | agent | the service is reported and retried |
//! | `SLOTS` | array | slot → [`BackendId`] | agent | the service is reported and retried |
//! | `BACKENDS4/6` | array | [`BackendId`] → [`Backend`] | agent | the service is reported and retried |
//! | `AFFINITY4/6` | LRU hash | [`AffinityKey`] → [`Affinity`] | programs | the least recently used client is forgotten |
//! | `TURNS` | LRU hash | a block's first slot → whose turn is next | programs | an idle service's turns begin anew |
//! | `SOURCE_RANGES4/6` | LPM trie | [`SourceRange`] → 1 | agent | the service is reported and retried |
//! | `FLOW_INDEX4/6` | hash | [`FlowKey`] → [`FlowId`] | programs; agent deletes | as `FLOWS` |
//! | `FLOWS4/6` | array, mmapable | [`FlowId`] → [`Flow`] | programs; agent reclaims | embryonic and closing flows go first |
//! | `FLOW_COUNTS4/6` | array, mmapable | [`FlowId`] → [`FlowCounts`] | programs; who ends a flow takes them | |
//! | `FLOW_VTEPS4/6` | array | [`FlowId`] → [`Vtep`] that a flow's requests come from through the overlay, where replies go back | programs | |
//! | `FREE_FLOWS4/6` | queue | free [`FlowId`]s (hints: `Flow::state` decides) | both | |
//! | `HINTS4/6` | array | [`HintPlace`] of a [`FlowKey`] → [`Hints`] | programs | the older one is forgotten |
//! | `PORT_CHUNKS` | array, mmapable | [`PortPlace`] → [`PortChunk`] | both | destinations share elements |
//! | `RESPONDERS` | array, mmapable | [`Responder`] → how many replies' keys `FLOW_INDEX` has, or is about to have or has just had | both | responders share elements |
//! | `CONNECTIONS4/6` | array | [`BackendId`] → [`Connections`] | programs | |
//! | `LOADS4/6` | hash | [`BackendId`] → [`Load`] | agent | a backend's load is all that it was given |
//! | `BACKEND_COUNTS4/6` | hash | [`BackendLife`] → [`BackendCounts`] | programs and agent, each its own | backends that come next are not counted |
//! | `SERVICE_COUNTS` | LRU hash | [`ServiceId`] → [`BackendCounts`] of backends that are gone | agent | a service whose backends went long ago forgets them |
//! | `FRAGMENTS4/6` | LRU hash | [`FragmentKey`] → [`FragmentPorts`] | programs | the oldest datagram is forgotten |
//! | `DIALLED4/6` | LRU hash | [`FlowKey`] of the reply of a pod that somebody outside dialled → [`Dialled`] | programs | the least recent one is forgotten: the pod's next datagram there gets the node's address |
//! | `SOCKETS` | socket storage | socket → [`SocketPeer`] | programs | |
//! | `TCP_PEERS` | array | socket cookie's low bits → [`TcpPeer`] | programs | the socket is in `SOCKETS` |
//! | `CONNECTED_UDP` | hash | socket cookie → [`ConnectedUdp`] | programs | the socket is not translated |
//! | `DATAGRAMS` | LRU hash | [`DatagramKey`] → [`Datagram`] | programs | the oldest pair is forgotten |
//! | `DATAGRAM_PEERS` | LRU hash | [`DatagramKey`] → [`SockEndpoint`] | programs | the oldest pair is forgotten |
//! | `NETNS` | hash | network namespace cookie → [`Netns`] | agent | affinity falls back to the cookie |
//! | `EXCLUDED_CGROUPS` | hash | cgroup id → 1 | agent | reported |
//! | `ENDPOINTS4/6` | hash | address → [`Endpoint`] | agent | the pod is routed by the kernel |
//! | `ROUTES4/6` | LPM trie | range → [`Route`] | agent | reported |
//! | `SHORTCUTS4/6` | per-CPU array | a hash of interface and ends → [`Shortcut`] | programs | ends share elements: the last one has it |
//! | `CHANGED` | array of 1 | 0 → when a table, or the kernel's routes or neighbours, last changed that shortcuts and [`Hop`]s spare, in nanoseconds since boot | agent | |
//! | `VTEPS` | hash | [`Vtep`] of another node → 1 | agent | reported; nothing is handed over |
//! | `UPLINKS` | hash | interface index → [`Uplink`] | agent | reported |
//! | `XDP_UPLINKS` | hash | interface index → [`XdpUplink`] | agent | reported; TC serves the interface |
//! | `HELD` | hash | index of a pod's host end → 1, where somebody else's ingress queueing discipline has to see what the pod sends: that goes on to the kernel, translated, and is sent nowhere by the hook | agent | reported; what the pod sends passes it by |
//! | `CONFIG` | array of 1 | 0 → [`Config`] | agent | |
//! | `COUNTERS` | per-CPU array | [`Counter`] → u64 | programs | |
//!
//! All have room for as many as [`limits`] says, but for `FLOWS`, `FLOW_INDEX`, `FLOW_COUNTS`, `FLOW_VTEPS`
//! and `FREE_FLOWS`: how many flows they are for the first agent was told.
#![cfg_attr(target_arch = "bpf", no_std)]

mod algorithm;
mod config;
mod count;
mod counter;
mod filter;
mod flow;
mod forwarding;
mod hint;
mod hop;
mod net;
mod network;
mod plain;
mod service;
mod socket;

pub use algorithm::{Algorithm, client_hash};
pub use config::{Config, NetworkFlags, Timeouts};
pub use count::{BackendCounts, BackendLife, Connections, FlowCounts, Load, Traffic};
pub use counter::Counter;
pub use filter::FilterBit;
pub use flow::{
    Dialled, Fins, Flow, FlowFlags, FlowId, FlowKey, FlowState, Fragment as FragmentKey,
    FragmentPorts, MASQUERADE_PORTS, PortChunk, PortPlace, PortRange, REMAPPED_PORTS, Responder,
    SCTP_ESTABLISHED_SECS,
};
pub use forwarding::{Forwarding, Handover, Vtep};
pub use hint::{HintPlace, Hints};
pub use hop::{Hop, Said};
pub use net::{Addr, Be16, Proto, V4, V6};
pub use network::{
    Endpoint, EndpointFlags, OVERLAY_MAC, OVERLAY_PEER_MAC, Route, RouteKind, Shortcut,
    ShortcutKind, Uplink, XdpUplink,
};
pub use plain::Plain;
pub use service::{
    Address, AddressKind, Affinity, AffinityKey, Backend, BackendFlags, BackendId, Frontend,
    FrontendFlags, FrontendKey, ServiceId, SlotRange, SourcePrefix, SourceRange, slot_at,
};
pub use socket::{
    ConnectedUdp, Datagram, DatagramKey, Netns, NetnsFlags, SockEndpoint, SocketPeer, TcpPeer,
};

/// The layout of every map. Changing a key, a value, a map's kind or a flag's meaning means
/// incrementing it.
pub const ABI_VERSION: u32 = 7;

/// How many entries each map holds.
pub mod limits {
    /// Frontends of one family; one a port, protocol and address of a service.
    pub const FRONTENDS: u32 = 262_144;
    /// Addresses of one family that belong to services or to this node.
    pub const ADDRESSES: u32 = 262_144;
    /// Bits of one family's filter: with 10,000 addresses, one of a hundred others is looked up in vain.
    pub const FILTERED: u32 = 1 << 20;
    /// Ranges of clients of one family that services let in, over all services.
    pub const SOURCE_RANGES: u32 = 65_536;
    /// Slots of all blocks together.
    pub const SLOTS: u32 = 1_048_576;
    /// Backends of one family.
    pub const BACKENDS: u32 = 524_288;
    /// Clients of one family that are bound to a backend.
    pub const AFFINITY: u32 = 65_536;
    /// Blocks of services that go round robin.
    pub const TURNS: u32 = 16_384;
    /// Flows of one family that are translated packet by packet, unless the agent made the maps for
    /// another number of them.
    pub const FLOWS: u32 = 131_072;
    /// The most that they can be made for: more keys the kernel's hash tables do not take.
    pub const MOST_FLOWS: u32 = ((1 << 27) - SPARE_KEYS) / 2;
    /// Keys of flows that change hands.
    const SPARE_KEYS: u32 = 4_096;

    /// Keys of so many flows: two for each, and some for those that change hands.
    pub const fn flow_index(flows: u32) -> u32 {
        2 * flows + SPARE_KEYS
    }

    /// For how many flows so many keys are.
    pub const fn flows_of_index(keys: u32) -> u32 {
        keys.saturating_sub(SPARE_KEYS) / 2
    }

    /// Elements that destinations' source ports are spread over; more only save looking for free ports
    /// in vain.
    pub const PORT_CHUNKS: u32 = 65_536;
    /// Elements that all who reply in flows are spread over: in one of 65,536 a packet of no flow meets
    /// with 1,000 such about one time in 66.
    pub const RESPONDERS: u32 = 65_536;
    /// Backends of one family that this node sent something to; what the agent counts of one is one more.
    pub const BACKEND_COUNTS: u32 = 131_072;
    /// Backends of one family whose connections that are there are counted, of services with the
    /// algorithm `least-connections`.
    pub const LOADS: u32 = 131_072;
    /// Services that remember what backends did that are gone.
    pub const SERVICE_COUNTS: u32 = 16_384;
    /// Fragmented datagrams of one family whose ports are remembered.
    pub const FRAGMENTS: u32 = 8_192;
    /// Pairs of a pod and somebody outside of one family who dialled it.
    pub const DIALLED: u32 = 65_536;
    /// What programs count: room for more than there is, so that a new reason needs no other layout.
    pub const COUNTERS: u32 = 64;
    /// Connected TCP sockets whose peers have a place outside of the sockets' own storage; a power of
    /// two.
    pub const TCP_PEERS: u32 = 65_536;
    /// Connected UDP sockets that were translated.
    pub const CONNECTED_UDP: u32 = 65_536;
    /// Pairs of an unconnected UDP socket and a service that it sends to.
    pub const DATAGRAMS: u32 = 65_536;
    /// Network namespaces on this node whose addresses are known.
    pub const NETNS: u32 = 4_096;
    /// Cgroups that opted out of socket translation.
    pub const EXCLUDED_CGROUPS: u32 = 1_024;
    /// Pods' addresses of one family on this node.
    pub const ENDPOINTS: u32 = 16_384;
    /// Pods of this node whose packets are left to the kernel.
    pub const HELD: u32 = 16_384;
    /// Ranges of one family: other nodes' pods, and what is not masqueraded.
    pub const ROUTES: u32 = 65_536;
    /// Places for shortcuts of one family, on each CPU.
    pub const SHORTCUTS: u32 = 512;
    /// Other nodes' ends of tunnels.
    pub const VTEPS: u32 = 16_384;
    /// Interfaces to the outside.
    pub const UPLINKS: u32 = 256;
    /// How deep below the root an excluded cgroup may lie.
    pub const CGROUP_DEPTH: u32 = 8;
}
