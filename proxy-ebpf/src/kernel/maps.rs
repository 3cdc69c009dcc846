//! Every map. What each holds, who writes it and what happens when it is full stands in
//! `penstock_common`.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, Queue},
};
use penstock_common::{
    Address, Affinity, AffinityKey, Backend, BackendCounts, BackendId, BackendLife, Config,
    ConnectedUdp, Connections, Datagram, DatagramKey, Dialled, Endpoint, FilterBit, Flow,
    FlowCounts, FlowId, FlowKey, FragmentKey, FragmentPorts, Frontend, FrontendKey, Hints, Load,
    Netns, PortChunk, Route, ServiceId, Shortcut, SockEndpoint, SocketPeer, SourceRange, TcpPeer,
    Uplink, V4, V6, Vtep, XdpUplink, limits,
};

/// A family's maps: a static cannot be generic.
macro_rules! family_maps {
    ($family:ty: $addresses:ident, $filter:ident, $frontends:ident, $backends:ident, $affinity:ident,
        $index:ident, $flows:ident, $vteps:ident, $counts:ident, $connections:ident, $loads:ident, $backend_counts:ident, $free:ident, $fragments:ident, $dialled:ident, $endpoints:ident, $routes:ident,
        $source_ranges:ident, $openings:ident, $hands:ident, $shortcuts:ident, $hints:ident) => {
        #[map]
        pub(crate) static $addresses: HashMap<$family, Address> =
            HashMap::pinned(limits::ADDRESSES, BPF_F_NO_PREALLOC);
        #[map]
        pub(crate) static $filter: Array<u64> = Array::pinned(FilterBit::ELEMENTS, 0);
        #[map]
        pub(crate) static $frontends: HashMap<FrontendKey<$family>, Frontend> =
            HashMap::pinned(limits::FRONTENDS, BPF_F_NO_PREALLOC);
        #[map]
        pub(crate) static $backends: Array<Backend<$family>> = Array::pinned(limits::BACKENDS, 0);
        #[map]
        pub(crate) static $affinity: LruHashMap<AffinityKey<$family>, Affinity> =
            LruHashMap::pinned(limits::AFFINITY, 0);
        #[map]
        pub(crate) static $index: HashMap<FlowKey<$family>, FlowId> =
            HashMap::pinned(limits::flow_index(limits::FLOWS), BPF_F_NO_PREALLOC);
        #[map]
        pub(crate) static $flows: Array<Flow<$family>> =
            Array::pinned(limits::FLOWS, BPF_F_MMAPABLE);
        #[map]
        pub(crate) static $vteps: Array<Vtep> = Array::pinned(limits::FLOWS, 0);
        #[map]
        pub(crate) static $counts: Array<FlowCounts> = Array::pinned(limits::FLOWS, BPF_F_MMAPABLE);
        #[map]
        pub(crate) static $connections: Array<Connections> = Array::pinned(limits::BACKENDS, 0);
        #[map]
        pub(crate) static $loads: HashMap<BackendId, Load> =
            HashMap::pinned(limits::LOADS, BPF_F_NO_PREALLOC);
        #[map]
        pub(crate) static $backend_counts: HashMap<BackendLife, BackendCounts> =
            HashMap::pinned(limits::BACKEND_COUNTS, BPF_F_NO_PREALLOC);
        #[map]
        pub(crate) static $free: Queue<FlowId> = Queue::pinned(limits::FLOWS, 0);
        #[map]
        pub(crate) static $endpoints: HashMap<$family, Endpoint> =
            HashMap::pinned(limits::ENDPOINTS, BPF_F_NO_PREALLOC);
        #[map]
        pub(crate) static $routes: LpmTrie<$family, Route> = LpmTrie::pinned(limits::ROUTES, 0);
        #[map]
        pub(crate) static $source_ranges: LpmTrie<SourceRange<$family>, u32> =
            LpmTrie::pinned(limits::SOURCE_RANGES, BPF_F_NO_PREALLOC);
        #[map]
        pub(crate) static $fragments: LruHashMap<FragmentKey<$family>, FragmentPorts> =
            LruHashMap::pinned(limits::FRAGMENTS, 0);
        #[map]
        pub(crate) static $dialled: LruHashMap<FlowKey<$family>, Dialled> =
            LruHashMap::pinned(limits::DIALLED, 0);
        /// What the tables said of packets a moment ago.
        #[map]
        pub(crate) static $shortcuts: PerCpuArray<Shortcut<$family>> =
            PerCpuArray::with_max_entries(limits::SHORTCUTS, 0);
        /// The flows that XDP met.
        #[map]
        pub(crate) static $hints: Array<Hints> =
            Array::with_max_entries(Hints::elements(limits::FLOWS), 0);
        /// The flow that a packet begins, between two stages.
        #[map]
        pub(crate) static $openings: PerCpuArray<Flow<$family>> =
            PerCpuArray::with_max_entries(1, 0);
        /// Where the search for records that give way goes on.
        #[map]
        pub(crate) static $hands: Array<u32> = Array::with_max_entries(1, 0);
    };
}

family_maps!(V4: ADDRESSES4, ADDRESS_FILTER4, FRONTENDS4, BACKENDS4, AFFINITY4, FLOW_INDEX4, FLOWS4, FLOW_VTEPS4, FLOW_COUNTS4, CONNECTIONS4, LOADS4, BACKEND_COUNTS4, FREE_FLOWS4, FRAGMENTS4, DIALLED4, ENDPOINTS4, ROUTES4,
    SOURCE_RANGES4, OPENINGS4, HANDS4, SHORTCUTS4, HINTS4);
family_maps!(V6: ADDRESSES6, ADDRESS_FILTER6, FRONTENDS6, BACKENDS6, AFFINITY6, FLOW_INDEX6, FLOWS6, FLOW_VTEPS6, FLOW_COUNTS6, CONNECTIONS6, LOADS6, BACKEND_COUNTS6, FREE_FLOWS6, FRAGMENTS6, DIALLED6, ENDPOINTS6, ROUTES6,
    SOURCE_RANGES6, OPENINGS6, HANDS6, SHORTCUTS6, HINTS6);

#[map]
pub(crate) static PORT_CHUNKS: Array<PortChunk> =
    Array::pinned(limits::PORT_CHUNKS, BPF_F_MMAPABLE);
#[map]
pub(crate) static RESPONDERS: Array<u64> = Array::pinned(limits::RESPONDERS, BPF_F_MMAPABLE);
#[map]
pub(crate) static SLOTS: Array<BackendId> = Array::pinned(limits::SLOTS, 0);
/// The agent's alone; defined here so that it is made and pinned like all others.
#[map]
pub(crate) static SERVICE_COUNTS: LruHashMap<ServiceId, BackendCounts> =
    LruHashMap::pinned(limits::SERVICE_COUNTS, 0);
#[map]
pub(crate) static TURNS: LruHashMap<u32, u32> = LruHashMap::pinned(limits::TURNS, 0);
#[map]
pub(crate) static VTEPS: HashMap<Vtep, u32> = HashMap::pinned(limits::VTEPS, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static UPLINKS: HashMap<u32, Uplink> =
    HashMap::pinned(limits::UPLINKS, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static XDP_UPLINKS: HashMap<u32, XdpUplink> =
    HashMap::pinned(limits::UPLINKS, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static HELD: HashMap<u32, u32> = HashMap::pinned(limits::HELD, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static CHANGED: Array<u64> = Array::pinned(1, 0);
#[map]
pub(crate) static CONFIG: Array<Config> = Array::pinned(1, 0);
#[map]
pub(crate) static COUNTERS: PerCpuArray<u64> = PerCpuArray::pinned(limits::COUNTERS, 0);
/// Second and count of the ICMP errors sent within it.
#[map]
pub(crate) static ERRORS_SENT: PerCpuArray<[u32; 2]> = PerCpuArray::pinned(1, 0);

/// The timestamp of the segment that begins a flow, between two stages.
#[map]
pub(crate) static OPENING_STAMP: PerCpuArray<u32> = PerCpuArray::with_max_entries(1, 0);

/// Room for a question to the kernel's routes, for which stacks have none.
#[map]
pub(crate) static WAYS: PerCpuArray<[u32; 16]> = PerCpuArray::with_max_entries(1, 0);

#[btf_map]
pub(crate) static SOCKETS: SkStorage<SocketPeer> = SkStorage::new();
#[map]
pub(crate) static TCP_PEERS: Array<TcpPeer> = Array::pinned(limits::TCP_PEERS, 0);
#[map]
pub(crate) static CONNECTED_UDP: HashMap<u64, ConnectedUdp> =
    HashMap::pinned(limits::CONNECTED_UDP, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static DATAGRAMS: LruHashMap<DatagramKey, Datagram> =
    LruHashMap::pinned(limits::DATAGRAMS, 0);
#[map]
pub(crate) static DATAGRAM_PEERS: LruHashMap<DatagramKey, SockEndpoint> =
    LruHashMap::pinned(limits::DATAGRAMS, 0);
#[map]
pub(crate) static NETNS: HashMap<u64, Netns> = HashMap::pinned(limits::NETNS, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static EXCLUDED_CGROUPS: HashMap<u64, u8> =
    HashMap::pinned(limits::EXCLUDED_CGROUPS, BPF_F_NO_PREALLOC);
