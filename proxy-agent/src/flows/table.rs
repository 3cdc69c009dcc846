//! The flow table as memory that the kernel's programs share.
//!
//! Invariant: elements are copied out and never borrowed; what several write is changed atomically,
//! a number or a state at a time.
#![expect(
    unsafe_code,
    reason = "the flow table is memory shared with the kernel's programs"
)]

use std::{
    io,
    num::NonZeroUsize,
    os::fd::AsFd,
    ptr::NonNull,
    sync::atomic::{AtomicU32, Ordering},
};

use aya::maps::{Array, Map, MapData};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use penstock_common::{Flow, FlowCounts, FlowState, Plain};

use super::FlowsError;
use crate::dataplane::pins::Pins;

/// An array that the kernel lets be mapped.
pub(super) struct Mapped<T> {
    elements: NonNull<T>,
    length: NonZeroUsize,
    last: u32,
}

// SAFETY: the mapping belongs to this value alone and is not tied to a thread.
unsafe impl<T: Send> Send for Mapped<T> {}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: mapped in `open` with this length, and nobody else has the pointer.
        let _ = unsafe { munmap(self.elements.cast(), self.length.get()) };
    }
}

impl<T: Plain> Mapped<T> {
    /// Maps a pinned array.
    pub(super) fn open(pins: &Pins, map: &'static str) -> Result<Self, FlowsError> {
        // The kernel rounds an array's elements up to 8 bytes.
        const { assert!(size_of::<T>().is_multiple_of(8)) };
        let data: MapData = pins.map(map)?;
        let bad = |source| FlowsError::Mmap { map, source };
        let info = data.info();
        let count = info
            .map_err(|source| FlowsError::Map { map, source })?
            .max_entries();
        let bytes = size_of::<T>() * count as usize;
        let length = NonZeroUsize::new(bytes.next_multiple_of(4_096))
            .ok_or_else(|| bad(io::ErrorKind::InvalidInput.into()))?;
        // SAFETY: a new mapping of a file descriptor, at no particular address.
        let memory = unsafe {
            let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            mmap(
                None,
                length,
                access,
                MapFlags::MAP_SHARED,
                data.fd().as_fd(),
                0,
            )
        }
        .map_err(|error| bad(error.into()))?;
        Ok(Self {
            elements: memory.cast(),
            length,
            last: count.saturating_sub(1),
        })
    }

    /// How many elements there are.
    pub(super) fn len(&self) -> u32 {
        self.last + 1
    }

    /// Where an element is; those beyond the last are the last.
    pub(super) fn at(&self, id: u32) -> *mut T {
        let id = id.min(self.last);
        // SAFETY: the mapping holds that many elements.
        unsafe { self.elements.as_ptr().add(id as usize) }
    }

    fn read(&self, id: u32) -> T {
        // SAFETY: inside the mapping; any bytes are a value.
        unsafe { self.at(id).read_volatile() }
    }
}

/// A family's records, and what was counted of their flows.
///
/// The counts are not mapped: they would be most of the agent's resident memory, and are wanted of few.
pub struct Table<A> {
    records: Mapped<Flow<A>>,
    counts: Array<MapData, FlowCounts>,
}

/// How often a record that changes while it is read is read again.
const READINGS: usize = 4;

impl<A: Copy + PartialEq> Table<A>
where
    Flow<A>: Plain,
{
    /// Maps the pinned arrays.
    pub fn open(pins: &Pins, [records, counts]: [&'static str; 2]) -> Result<Self, FlowsError> {
        Ok(Self {
            records: Mapped::open(pins, records)?,
            counts: Array::try_from(Map::Array(pins.map(counts)?)).map_err(|source| {
                FlowsError::Map {
                    map: counts,
                    source,
                }
            })?,
        })
    }

    /// How many records there are.
    pub fn records(&self) -> u32 {
        self.records.len()
    }

    /// A record's state.
    pub fn state(&self, id: u32) -> &AtomicU32 {
        // SAFETY: the first field of a record in the mapping, aligned, and only ever changed
        // atomically; the mapping lives as long as `self`.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.records.at(id)).state) }
    }

    /// A record as it is, perhaps in the middle of a change: for whoever compares its state before
    /// anything is done about it.
    pub fn read(&self, id: u32) -> Flow<A> {
        self.records.read(id)
    }

    /// The flow that a record is of, if it is of one: never half of one and half of the next.
    pub fn flow(&self, id: u32) -> Option<Flow<A>> {
        let is_live = |state| {
            matches!(
                state,
                FlowState::EMBRYONIC | FlowState::ESTABLISHED | FlowState::CLOSING
            )
        };
        let mut before = self.read(id);
        for _ in 0..READINGS {
            if !is_live(before.state) {
                return None;
            }
            // Whoever gives a record to another flow moves its state before and after.
            std::sync::atomic::fence(Ordering::Acquire);
            let again = self.read(id);
            let same = Flow {
                seen_secs: again.seen_secs,
                ..before
            };
            if same == again {
                return Some(again);
            }
            before = again;
        }
        None
    }

    /// What was counted of a record's flow.
    pub fn counts(&self, id: u32) -> FlowCounts {
        self.counts.get(&id, 0).unwrap_or_default()
    }

    /// Takes what was counted of a record's flow that nobody finds any more, and leaves zeros.
    pub fn take_counts(&mut self, id: u32) -> FlowCounts {
        let counts = self.counts(id);
        if counts != FlowCounts::default() {
            // An array's element is there to be written.
            let _ = self.counts.set(id, FlowCounts::default(), 0);
        }
        counts
    }
}
