//! Frontends, the slots that they cover, and the backends that the slots name.
//!
//! Invariant after every single write of the agent: each slot that a frontend covers holds the id
//! of a live backend of that frontend's service. A frontend value is replaced whole, so a reader
//! meets the old block of slots or the new one, never a mix.

use crate::{
    net::{Addr, Be16, Proto},
    plain::map_types,
};

/// A service port of one address family: what frontends, backends and clients' affinity share.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceId(pub u32);

/// Index into `BACKENDS4` or `BACKENDS6`.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendId(pub u32);

/// What clients dial.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendKey<A> {
    /// The address.
    pub addr: A,
    /// The port.
    pub port: Be16,
    /// TCP, UDP or SCTP.
    pub proto: Proto,
    pad: u8,
}

impl<A: Addr> FrontendKey<A> {
    /// A key without stray bits.
    #[inline(always)]
    pub const fn new(addr: A, port: Be16, proto: Proto) -> Self {
        Self {
            addr,
            port,
            proto,
            pad: 0,
        }
    }

    /// A word that differs between keys, echoed in [`Frontend::key_check`].
    #[inline(always)]
    pub fn check(&self) -> u32 {
        check(&self.addr) ^ (u32::from(self.port.raw()) << 16 | u32::from(self.proto.0))
    }
}

/// Mixes an address into one word.
#[inline(always)]
fn check<A: Addr>(addr: &A) -> u32 {
    let [a, b, c, d] = addr.words();
    a ^ b.rotate_left(7) ^ c.rotate_left(13) ^ d.rotate_left(19)
}

/// `count` slots of `SLOTS` from `base` on: a block.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotRange {
    /// The first slot.
    pub base: u32,
    /// How many; 0 where the service has no backend.
    pub count: u32,
}

/// Bits of [`Frontend::flags`].
pub struct FrontendFlags;

impl FrontendFlags {
    /// A Local range without slots drops packets in silence instead of rejecting them: endpoints
    /// exist, but none on this node.
    pub const DROP_WHEN_EMPTY: u32 = 1;
    /// Not a cluster address: a node port, a host port, a load balancer's or an external address.
    pub const EXTERNAL: u32 = 2;
    /// [`Frontend::slots`] are the endpoints on this node.
    pub const LOCAL: u32 = 4;
    /// [`Frontend::external`] are the endpoints on this node.
    pub const EXTERNAL_LOCAL: u32 = 8;
    /// Only clients that `SOURCE_RANGES` names may come.
    pub const SOURCE_RANGES: u32 = 16;
    /// To backends of other nodes as it came, and back by way of this one ([`crate::Forwarding`]).
    pub const TUNNEL: u32 = 32;
    /// To backends of other nodes as it came; they answer clients themselves.
    pub const DSR: u32 = 64;
    /// New connections take the slots in turns ([`crate::Algorithm`]).
    pub const BY_TURN: u32 = 1 << 16;
    /// A client's address says which slot it gets.
    pub const BY_CLIENT: u32 = 1 << 17;
    /// A backend may be in several slots of a block.
    pub const REPEATS: u32 = 1 << 18;
    /// Of two slots by chance, the one is taken whose backend has fewer connections for its weight.
    pub const BY_LOAD: u32 = 1 << 19;
}

/// Where the traffic to a [`FrontendKey`] goes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Frontend {
    /// The service port that this frontend belongs to.
    pub service: ServiceId,
    /// [`FrontendFlags`].
    pub flags: u32,
    /// The block for clients in the cluster.
    pub slots: SlotRange,
    /// The block for clients outside of it.
    pub external: SlotRange,
    /// For how long after a client's last new connection it keeps its backend, in seconds; 0
    /// without session affinity.
    pub affinity_secs: u32,
    /// [`FrontendKey::check`] of the key that this value was written under.
    ///
    /// The kernel may reuse a hash map's element while a program still reads it, so a reader
    /// compares before it believes.
    pub key_check: u32,
}

/// What an address that programs should look at closer is.
pub struct AddressKind;

impl AddressKind {
    /// A service's own address: a port of it that is no frontend is rejected.
    pub const SERVICE: u32 = 1;
    /// One of this node's addresses.
    pub const NODE: u32 = 2;
    /// A load balancer's or an external address: a port of it that is no frontend is nobody's
    /// business here.
    pub const EXTERNAL: u32 = 3;
    /// This node's loopback address, which counts for its own processes alone.
    pub const LOOPBACK: u32 = 4;
}

/// An address that belongs to a service or to this node; every other destination costs a program
/// one look-up of this map and nothing more.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Address {
    /// [`AddressKind`].
    pub kind: u32,
}

/// Bits of [`Backend::flags`].
pub struct BackendFlags;

impl BackendFlags {
    /// The endpoint still serves: flows that have it may keep it, whatever policies say.
    pub const LIVE: u32 = 1;
    /// The endpoint is in its service's present block for the Cluster policy.
    pub const CLUSTER: u32 = 2;
    /// The endpoint is in its service's present block for the Local policy.
    pub const LOCAL: u32 = 4;
    /// Any of the two: new connections may get it.
    pub const SELECTED: u32 = Self::CLUSTER | Self::LOCAL;
}

/// A backend of one service port.
///
/// `generation` and `flags` share one 8-byte word, aligned because the kernel aligns array elements
/// to 8 bytes. An id that is given out anew first lies dead for a grace period and then returns with another generation, so a reader that remembers
/// (id, generation) either meets its backend or knows that it is gone.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Backend<A> {
    /// Counts the lives of this id.
    pub generation: u32,
    /// [`BackendFlags`]; 0 for an id that is free.
    pub flags: u32,
    /// The service port.
    pub service: ServiceId,
    /// The address.
    pub addr: A,
    /// The port.
    pub port: Be16,
    /// Its weight beyond 1, for those who compare loads.
    extra_weight: u16,
}

impl<A: Addr> Backend<A> {
    /// A backend of weight 1.
    pub const fn new(generation: u32, flags: u32, service: ServiceId, addr: A, port: Be16) -> Self {
        Self {
            generation,
            flags,
            service,
            addr,
            port,
            extra_weight: 0,
        }
    }

    /// The same with a weight; 0 is 1.
    #[must_use]
    pub const fn weighing(self, weight: u16) -> Self {
        Self {
            extra_weight: weight.saturating_sub(1),
            ..self
        }
    }

    /// How many connections it may have for each of one whose weight is 1.
    #[inline(always)]
    pub const fn weight(&self) -> u32 {
        self.extra_weight as u32 + 1
    }

    /// Whether this is still life `generation` of the id, with all of `flags`.
    #[inline(always)]
    pub const fn is(&self, generation: u32, flags: u32) -> bool {
        self.generation == generation && self.flags & flags == flags
    }
}

/// A client of a service with session affinity.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AffinityKey<A> {
    /// The service port.
    pub service: ServiceId,
    /// The client's address, or [`Addr::from_cookie`] where it is not known.
    pub client: A,
}

/// A range of clients that a service lets in: `loadBalancerSourceRanges`. The prefix that a trie
/// matches covers the whole id and as much of the address as the range fixes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceRange<A> {
    /// The service port.
    pub service: ServiceId,
    /// A client's address, or a range's first.
    pub addr: A,
}

impl<A> SourceRange<A> {
    /// Bits of the prefix that are the service's.
    pub const SERVICE_BITS: u32 = 32;
}

/// A [`SourceRange`] with its length, as the kernel's tries take their keys (`bpf_lpm_trie_key`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourcePrefix<A> {
    /// The prefix's length in bits, at least [`SourceRange::SERVICE_BITS`].
    pub bits: u32,
    /// The range.
    pub range: SourceRange<A>,
}

impl<A> SourcePrefix<A> {
    /// A range that fixes `bits` of an address.
    pub const fn new(service: ServiceId, addr: A, bits: u8) -> Self {
        Self {
            bits: SourceRange::<A>::SERVICE_BITS + bits as u32,
            range: SourceRange { service, addr },
        }
    }
}

/// The backend that a client is bound to.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Affinity {
    /// The backend.
    pub backend: BackendId,
    /// Its generation.
    pub generation: u32,
    /// When the client last opened a connection, in seconds since boot.
    pub used_secs: u32,
}

/// Which of `count` slots a random word or a hash picks, each with equal chance (multiply and shift; Lemire 2016).
#[inline(always)]
pub const fn slot_at(random: u32, count: u32) -> u32 {
    ((random as u64 * count as u64) >> 32) as u32
}

use crate::net::{V4, V6};
map_types! {
    ServiceId = 4, BackendId = 4, SlotRange = 8, Frontend = 32, Address = 4, Affinity = 12,
    FrontendKey<V4> = 8, FrontendKey<V6> = 20, Backend<V4> = 20, Backend<V6> = 32,
    AffinityKey<V4> = 8, AffinityKey<V6> = 20,
    SourceRange<V4> = 8, SourceRange<V6> = 20,
    SourcePrefix<V4> = 12, SourcePrefix<V6> = 24,
}
