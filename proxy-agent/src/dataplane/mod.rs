//! The kernel as the agent sees it: map entries in, map entries out.
//!
//! Deliberately low: policies, expansion, ids and order are decided above it and tested without a
//! kernel; what is below is too simple to be wrong.

pub mod batch;
pub mod bpf;
pub mod changed;
pub mod faulty;
mod filter;
pub mod memory;
pub mod pins;
pub mod sizes;

use std::collections::{BTreeMap, BTreeSet};

use penstock_common::{
    Addr, Address, Backend, BackendId, Frontend, FrontendKey, SlotRange, SourcePrefix, V4, V6,
    limits,
};

/// The service maps of one address family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FamilyState<A: Addr + Ord> {
    /// `ADDRESSES`.
    pub addresses: BTreeMap<A, Address>,
    /// `FRONTENDS`.
    pub frontends: BTreeMap<FrontendKey<A>, Frontend>,
    /// `BACKENDS`, without ids that were never used (all zero).
    pub backends: BTreeMap<BackendId, Backend<A>>,
    /// `SOURCE_RANGES`.
    pub source_ranges: BTreeSet<SourcePrefix<A>>,
}

impl<A: Addr + Ord> FamilyState<A> {
    /// All blocks of slots.
    pub fn ranges(&self) -> impl Iterator<Item = SlotRange> + '_ {
        let frontends = self.frontends.values();
        frontends.flat_map(|frontend| [frontend.slots, frontend.external])
    }
}

impl<A: Addr + Ord> Default for FamilyState<A> {
    fn default() -> Self {
        Self {
            addresses: BTreeMap::new(),
            frontends: BTreeMap::new(),
            backends: BTreeMap::new(),
            source_ranges: BTreeSet::new(),
        }
    }
}

/// Every service map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MapState {
    /// IPv4.
    pub v4: FamilyState<V4>,
    /// IPv6.
    pub v6: FamilyState<V6>,
    /// `SLOTS` as far as frontends cover them.
    pub slots: BTreeMap<u32, BackendId>,
}

impl<A: Addr + Ord> FamilyState<A> {
    fn is_empty(&self) -> bool {
        let mut backends = self.backends.values();
        self.addresses.is_empty()
            && self.frontends.is_empty()
            && self.source_ranges.is_empty()
            && backends.all(|backend| backend.flags == 0)
    }
}

impl MapState {
    /// Whether nothing is served.
    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }
}

/// One write to the maps of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FamilyChange<A> {
    /// Writes an element of `BACKENDS`.
    PutBackend(BackendId, Backend<A>),
    /// Writes an element of `FRONTENDS`.
    PutFrontend(FrontendKey<A>, Frontend),
    /// Removes an element of `FRONTENDS`; it being absent is no error.
    DeleteFrontend(FrontendKey<A>),
    /// Writes an element of `ADDRESSES`.
    PutAddress(A, Address),
    /// Removes an element of `ADDRESSES`; it being absent is no error.
    DeleteAddress(A),
    /// Writes an element of `SOURCE_RANGES`.
    PutSourceRange(SourcePrefix<A>),
    /// Removes an element of `SOURCE_RANGES`; it being absent is no error.
    DeleteSourceRange(SourcePrefix<A>),
}

/// One write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// To the IPv4 maps.
    V4(FamilyChange<V4>),
    /// To the IPv6 maps.
    V6(FamilyChange<V6>),
    /// To `SLOTS`, consecutive slots from `base` on.
    PutSlots {
        /// The first slot.
        base: u32,
        /// What the slots hold.
        backends: Vec<BackendId>,
    },
}

/// Some change was not made; those before it were.
#[derive(Debug, thiserror::Error)]
#[error("change {applied} was refused: {source}")]
pub struct ApplyError {
    /// How many changes, from the first on, were made in full.
    pub applied: usize,
    /// Why the next one was not.
    #[source]
    pub source: MapError,
}

/// A map operation failed.
#[derive(Debug)]
pub struct MapError {
    /// The map's name.
    pub map: &'static str,
    /// What was tried.
    pub operation: &'static str,
    /// The kernel's answer; `E2BIG` from a hash map means that it is full.
    pub source: std::io::Error,
}

impl std::error::Error for MapError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        // For a full table the kernel's words say something else.
        self.full().is_none().then_some(&self.source)
    }
}

impl std::fmt::Display for MapError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            map,
            operation,
            source,
        } = self;
        match self.full() {
            Some((count, what)) => write!(
                f,
                "the kernel's table of {count} {what} is full ({map}); remove services to make room"
            ),
            None => write!(f, "{operation} on map {map}: {source}"),
        }
    }
}

impl MapError {
    /// Whether there is no room in the map: hash maps say `E2BIG`, tries `ENOSPC`.
    pub fn is_full(&self) -> bool {
        matches!(self.source.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC))
    }

    /// How many of what the map holds, if it is full.
    fn full(&self) -> Option<(u32, &'static str)> {
        if self.source.raw_os_error() != Some(libc::E2BIG) {
            return None;
        }
        match self.map {
            "FRONTENDS4" => Some((limits::FRONTENDS, "IPv4 frontends")),
            "FRONTENDS6" => Some((limits::FRONTENDS, "IPv6 frontends")),
            "ADDRESSES4" => Some((limits::ADDRESSES, "IPv4 service addresses")),
            "ADDRESSES6" => Some((limits::ADDRESSES, "IPv6 service addresses")),
            _ => None,
        }
    }
}

/// The service maps, wherever they are.
pub trait Dataplane {
    /// Reads every service map.
    fn observe(&mut self) -> Result<MapState, MapError>;

    /// Makes the changes in their order, as if one by one; stops at the first that fails.
    ///
    /// An implementation may batch neighbouring changes of one map. Every change is one map
    /// element, but for [`Change::PutSlots`]: one that fails may have written some of its slots.
    fn apply(&mut self, changes: &[Change]) -> Result<(), ApplyError>;
}

/// The kernel programs and the definitions of their maps, as an ELF object.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/penstock-ebpf"));
