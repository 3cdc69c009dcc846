//! What is known of source ports, as memory that the kernel's programs share.
#![expect(
    unsafe_code,
    reason = "the elements are memory shared with the kernel's programs"
)]

use std::sync::atomic::{AtomicU64, Ordering};

use penstock_common::{PortChunk, limits};

use super::{FlowsError, table::Mapped};
use crate::dataplane::pins::Pins;

/// What is known of source ports.
pub(super) struct Ports {
    chunks: Mapped<PortChunk>,
    /// How often [`Self::doubt`] was called.
    doubts: u32,
}

impl Ports {
    /// Maps the pinned array.
    pub(super) fn open(pins: &Pins) -> Result<Self, FlowsError> {
        Ok(Self {
            chunks: Mapped::open(pins, "PORT_CHUNKS", limits::PORT_CHUNKS)?,
            doubts: 0,
        })
    }

    /// Has programs look again for free ports in some of the chunks that were full, in all of them
    /// in the course of many calls: an agent may have ended after it gave a port back, and before it
    /// said so. All at once would take programs too long.
    pub(super) fn doubt(&mut self) {
        const TURNS: u32 = 32;
        for index in (self.doubts % TURNS..limits::PORT_CHUNKS).step_by(TURNS as usize) {
            self.count_end(index);
        }
        self.doubts = self.doubts.wrapping_add(1);
    }

    /// Says that a port of a chunk was given back, after it was.
    pub(super) fn count_end(&self, index: u32) {
        let chunk = self.chunks.at(index % limits::PORT_CHUNKS);
        // SAFETY: an aligned field of an element in the mapping, which lives as long as `self`, and
        // which is only ever changed atomically.
        let ended = unsafe { AtomicU64::from_ptr(&raw mut (*chunk).ended) };
        ended.fetch_add(1, Ordering::SeqCst);
    }
}
