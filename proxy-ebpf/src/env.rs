//! The kernel as the programs' logic sees it: maps, clock, randomness, counters.
//!
//! Values that another writer may change meanwhile are copied out, so that what was checked is
//! what is used.

use penstock_common::{
    Address, Affinity, AffinityKey, Backend, BackendId, Be16, Config, Counter, Dialled, Endpoint,
    Flow, FlowId, FlowKey, FragmentKey, FragmentPorts, Frontend, FrontendKey, HintPlace, Hints,
    Hop, PortChunk, Proto, Responder, Route, ServiceId, SourceRange, Uplink, V4, Vtep, XdpUplink,
};

use crate::{family::Family, pod::Back, quoted::Quote};

/// Where the kernel's routes send a packet, and to which neighbour there.
#[derive(Clone, Copy, Default)]
pub struct NextHop {
    /// The interface that it leaves by.
    pub ifindex: u32,
    /// The neighbour's Ethernet address.
    pub to: [u8; 6],
    /// The interface's own.
    pub from: [u8; 6],
    /// How long a packet may be there, in bytes, IP header included: what was asked for at least.
    pub mtu: u32,
}

/// The device that leads to other nodes' pods.
#[derive(Clone, Copy, Default)]
pub struct Overlay {
    /// Its index, 0 if there is none.
    pub ifindex: u32,
    /// How long a packet may be, in bytes, IP header included.
    pub mtu: u32,
    /// The VXLAN network identifier.
    pub vni: u32,
    /// The UDP port of tunnels.
    pub port: Be16,
}

/// Where packets of a pod of this node go.
///
/// No enumeration: of a value that is one or the other LLVM makes reads of what is neither.
#[derive(Clone, Copy, Default)]
pub struct Way {
    /// [`penstock_common::ShortcutKind`].
    pub kind: u32,
    /// The pod of this node.
    pub to: Endpoint,
    /// The tunnel to another node's pod.
    pub route: Route,
}

/// What is there for both families.
pub trait Env {
    /// Seconds since boot on a coarse clock (CLOCK_MONOTONIC_COARSE).
    fn now_secs(&self) -> u32;
    /// A random word.
    fn random(&self) -> u32;
    /// Whose turn it is at a block of slots: one more than at the last call, whatever the first.
    fn turn(&self, block: u32) -> u32;
    /// This node's settings.
    fn config(&self) -> Config;
    /// An interface to the outside.
    fn uplink(&self, ifindex: u32) -> Option<Uplink>;
    /// An interface to the outside whose packets meet XDP first.
    fn xdp_uplink(&self, ifindex: u32) -> Option<XdpUplink>;
    /// [`Config::network`].
    fn network(&self) -> u32;
    /// Whether what a pod sends by this host end of its is left to the kernel.
    fn is_held(&self, ifindex: u32) -> bool;
    /// When something last changed that [`Maps::way`] or [`Maps::hop`] spares.
    fn changed(&self) -> u64;
    /// Whether an address is another node's.
    fn is_vtep(&self, vtep: &Vtep) -> bool;
    /// The overlay device of [`Config`].
    fn overlay(&self) -> Overlay;
    /// Counts one.
    fn count(&self, counter: Counter);
    /// How often what may fail by chance is tried again.
    fn attempts(&self) -> u32;
    /// How many records are looked at in one go for one that gives way.
    fn reach(&self) -> u32;
    /// Whether there may be a flow with this end: nearly all packets that are no replies are told so
    /// by one element of an array, which costs far less than a hash table's.
    fn may_respond(&self, responder: Responder) -> bool;
    /// What is known of some source ports.
    fn port_chunk(&self, index: u32) -> PortChunk;
    /// Counts a flow that gave its source port back.
    fn count_port_end(&self, index: u32);
    /// Sets [`PortChunk::full`].
    fn set_full(&self, index: u32, full: u64);
    /// The timestamp of the segment that begins a flow, 0 if it has none; for the next stages.
    fn stamp(&self) -> u32;
    /// Sets [`Self::stamp`].
    fn set_stamp(&self, stamp: u32);
    /// Whether one more ICMP error may be sent within this second (RFC 4443, 2.4 (f)).
    fn may_send_error(&self) -> bool;
    /// Tells whoever traces what happened to a packet or socket of a service.
    fn trace(&self, counter: Counter, proto: Proto, port: u16);
}

/// A flow's record in its array.
pub trait Record<A>: Copy {
    /// Its state.
    fn state(self) -> u32;
    /// Its flags.
    fn flags(self) -> u16;
    /// Its backend's id and generation; generation 0 where no service is involved.
    fn backend(self) -> (BackendId, u32);
    /// The service port.
    fn service(self) -> ServiceId;
    /// Who has sent a FIN ([`penstock_common::Fins`]).
    fn fins(self) -> u8;
    /// Notes who has sent a FIN.
    fn set_fins(self, fins: u8);
    /// The key that should lead to it from a direction.
    fn key(self, direction: u8) -> FlowKey<A>;
    /// Its protocol, and when a packet was last seen.
    fn last_seen(self) -> (Proto, u32);
    /// Moves the state from `from` to `to`, unless somebody else moved it before.
    fn exchange_state(self, from: u32, to: u32) -> bool;
    /// Sets the state of a record that is this program's alone, or among its live states.
    fn set_state(self, state: u32);
    /// Notes that a packet was seen.
    fn touch(self, now_secs: u32);
    /// Gives a record that is this program's alone another source port.
    fn set_source_port(self, port: Be16);
    /// Gives a record that is this program's alone another source, and flags that say so.
    fn set_source(self, source: A, flags: u16);
    /// Writes all but the state of a record that is this program's alone.
    fn store(self, flow: &Flow<A>);
    /// Gives a record that is this program's alone all but the state of another.
    fn assume(self, other: Self);
}

/// The maps of one family.
pub trait Maps<F: Family>: Env {
    /// A flow's record.
    type Record: Record<F::Addr>;

    /// [`crate::pod::back_itself`] of the packet that the program was called for, or
    /// [`crate::pod::about_request`].
    fn back(&self) -> Result<Back, Counter>;
    /// [`crate::quoted::look`] at the packet that the program was called for.
    fn quote(&self) -> Option<Quote>;
    /// [`crate::quoted::requote`] of that packet.
    fn requote(&self, quote: Quote, id: FlowId, is_about_request: bool) -> bool;
    /// [`crate::flow::evict`], by a function of its own: the kernel follows each turn of the loop that it
    /// is part of. So do those below.
    fn evict(&self, id: FlowId) -> bool;
    /// [`crate::flow::take_port`].
    fn take_port(&self, id: FlowId, port: u16) -> bool;
    /// [`crate::flow::evict_port`].
    fn evict_port(&self, id: FlowId, port: u16) -> bool;
    /// [`crate::flow::succession::succeed`].
    fn succeed(&self, id: FlowId, port: u16) -> bool;
    /// This node's own address, unspecified if it has none of this family.
    fn node(&self) -> F::Addr;
    /// This node's address in the overlay, unspecified if it has none of this family.
    fn overlay_addr(&self) -> F::Addr;
    /// Whether [`Self::address`] may know an address, as far as is told at once.
    fn may_be_known(&self, addr: &F::Addr) -> bool;
    /// Whether an address is of interest.
    fn address(&self, addr: &F::Addr) -> Option<Address>;
    /// Whether an address is of a kind ([`penstock_common::AddressKind`]).
    #[inline(always)]
    fn is(&self, addr: &F::Addr, kind: u32) -> bool {
        self.address(addr)
            .is_some_and(|address| address.kind == kind)
    }
    /// A frontend, if it is the key's own (see `Frontend::key_check`).
    fn frontend(&self, key: &FrontendKey<F::Addr>) -> Option<Frontend>;
    /// Whether a service lets a client in that has to be named.
    fn lets_in(&self, client: &SourceRange<F::Addr>) -> bool;
    /// What a slot holds.
    fn slot(&self, slot: u32) -> Option<BackendId>;
    /// A backend.
    fn backend(&self, id: BackendId) -> Option<Backend<F::Addr>>;
    /// The one of two slots whose backend has fewer connections for its weight; the first where
    /// neither has.
    fn lighter(&self, first: u32, second: u32) -> u32;
    /// The backend that a client is bound to.
    fn affinity(&self, key: &AffinityKey<F::Addr>) -> Option<Affinity>;
    /// Binds a client to a backend.
    fn set_affinity(&self, key: &AffinityKey<F::Addr>, affinity: &Affinity);
    /// The record that a key leads to.
    fn flow_id(&self, key: &FlowKey<F::Addr>) -> Option<FlowId>;
    /// A record.
    fn record(&self, id: FlowId) -> Option<Self::Record>;
    /// Makes a key lead to a record, unless it leads to one already.
    fn link(&self, key: &FlowKey<F::Addr>, id: FlowId) -> bool;
    /// Makes a key lead nowhere.
    fn unlink(&self, key: &FlowKey<F::Addr>);
    /// Makes a key lead to a record, wherever it led.
    fn relink(&self, key: &FlowKey<F::Addr>, id: FlowId);
    /// The flow that this packet begins, for the next stage.
    fn opening(&self) -> Option<Self::Record>;
    /// Where a flow's requests come from through the overlay.
    fn flow_vtep(&self, id: FlowId) -> Vtep;
    /// Notes where a flow's requests come from through the overlay.
    fn set_flow_vtep(&self, id: FlowId, vtep: &Vtep);
    /// Counts a packet of a flow; whether it is the first in its direction.
    fn count_packet(&self, id: FlowId, is_reply: bool, bytes: u32) -> bool;
    /// What is known of the flows whose keys have this place.
    fn hints(&self, place: HintPlace) -> Hints;
    /// Replaces it.
    fn set_hints(&self, place: HintPlace, hints: Hints);
    /// Whether a packet of a flow's direction was counted.
    fn has_counted(&self, id: FlowId, is_reply: bool) -> bool;
    /// Where packets of a flow's direction went a moment ago, if [`Hop::holds`].
    fn hop(&self, id: FlowId, is_reply: bool) -> Hop;
    /// Notes where they go.
    fn set_hop(&self, id: FlowId, is_reply: bool, hop: &Hop);
    /// The timestamp of the FIN of a flow's client, 0 if it had none.
    fn last_stamp(&self, id: FlowId) -> u32;
    /// Sets [`Self::last_stamp`].
    fn set_last_stamp(&self, id: FlowId, stamp: u32);
    /// Counts a connection to a backend.
    fn count_connection(&self, id: BackendId, generation: u32, service: ServiceId);
    /// Adds what was counted of a flow that this program ended to its backend's counts.
    fn settle(&self, id: FlowId);
    /// A record that is probably free.
    fn pop_free(&self) -> Option<FlowId>;
    /// Says that a record is free.
    fn push_free(&self, id: FlowId);
    /// Where the search for records that give way goes on, modulo their number.
    fn hand(&self) -> u32;
    /// Moves the hand on to there, unless another program has moved it further.
    fn move_hand(&self, hand: u32);
    /// The bits that records' ids take.
    fn ids(&self) -> u32;
    /// How many records there are.
    fn records(&self) -> u32;
    /// The pod of this node that has an address.
    fn endpoint(&self, addr: &F::Addr) -> Option<Endpoint>;
    /// Where packets from an interface with these ends went a moment ago, if no table has changed.
    fn way(&self, ifindex: u32, ends: &(F::Addr, F::Addr)) -> Option<Way>;
    /// Notes where they go. The tables were asked after [`Env::changed`] said `changed`.
    fn note_way(&self, changed: u64, ifindex: u32, ends: &(F::Addr, F::Addr), way: &Way);
    /// The interface that a packet of this source leaves by, having come in by `ingress`, if the
    /// kernel's routes and the packet's length let it.
    fn egress(&self, ingress: u32, src: &F::Addr, dst: &F::Addr) -> Option<u32>;
    /// The same, however long the packet is.
    fn egress_anyway(&self, ingress: u32, src: &F::Addr, dst: &F::Addr) -> Option<u32>;
    /// How long a packet may be on that way, in bytes, IP header included; 0 where there is none.
    fn way_mtu(&self, ingress: u32, src: &F::Addr, dst: &F::Addr) -> u32;
    /// The interface that it leaves by, and the neighbour there if the kernel knows it.
    fn next_hop(&self, ingress: u32, src: &F::Addr, dst: &F::Addr) -> Option<NextHop>;
    /// The kernel's way to the other end of a tunnel.
    fn tunnel_hop(&self, ingress: u32, to: V4) -> Option<NextHop>;
    /// The narrowest range that covers an address.
    fn route(&self, addr: &F::Addr) -> Option<Route>;
    /// The ports of a fragmented datagram.
    fn fragment(&self, key: &FragmentKey<F::Addr>) -> Option<FragmentPorts>;
    /// Remembers the ports of a fragmented datagram.
    fn set_fragment(&self, key: &FragmentKey<F::Addr>, ports: &FragmentPorts);
    /// When and how somebody outside last dialled a pod, by the key of what the pod answers.
    fn dialled(&self, answer: &FlowKey<F::Addr>) -> Option<Dialled>;
    /// Notes that it was just now, by this way ([`Dialled::way`]).
    fn note_dialled(&self, answer: &FlowKey<F::Addr>, way: u32);
}
