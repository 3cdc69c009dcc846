//! What is known of flows' ends, as memory that the kernel's programs share: source ports, and who
//! replies.
//!
//! Invariant: no element of `RESPONDERS` is ever less than the keys that it counts.
#![expect(
    unsafe_code,
    reason = "the elements are memory shared with the kernel's programs"
)]

use std::sync::atomic::{AtomicU64, Ordering};

use penstock_common::{Addr, FlowKey, PortChunk};

use super::{FlowsError, table::Mapped};
use crate::dataplane::pins::Pins;

/// What is known of source ports and of who replies.
pub(super) struct Ends {
    chunks: Mapped<PortChunk>,
    responders: Mapped<u64>,
    /// How often [`Self::doubt`] was called.
    doubts: u32,
}

impl Ends {
    /// Maps the pinned arrays.
    pub(super) fn open(pins: &Pins) -> Result<Self, FlowsError> {
        Ok(Self {
            chunks: Mapped::open(pins, "PORT_CHUNKS")?,
            responders: Mapped::open(pins, "RESPONDERS")?,
            doubts: 0,
        })
    }

    /// Has programs look again for free ports in some of the chunks that were full, in all of them
    /// in the course of many calls: an agent may have ended after it gave a port back, and before it
    /// said so. All at once would take programs too long.
    pub(super) fn doubt(&mut self) {
        const TURNS: u32 = 32;
        for index in (self.doubts % TURNS..self.chunks.len()).step_by(TURNS as usize) {
            self.count_end(index);
        }
        self.doubts = self.doubts.wrapping_add(1);
    }

    /// Says that a reply's key was taken out of the index, after it was.
    pub(super) fn uncount<A: Addr>(&self, reply: &FlowKey<A>) {
        let count = self.responders.at(reply.responder().0);
        // SAFETY: an element in the mapping, aligned, which lives as long as `self`, and which is only
        // ever changed atomically.
        unsafe { AtomicU64::from_ptr(count) }.fetch_sub(1, Ordering::SeqCst);
    }

    /// Says that a reply's port was given back, after it was.
    pub(super) fn give_back<A: Addr>(&self, reply: &FlowKey<A>) {
        self.count_end(reply.port_place().index(reply.dst_port.to_host()));
    }

    fn count_end(&self, index: u32) {
        let chunk = self.chunks.at(index);
        // SAFETY: an aligned field of an element in the mapping, which lives as long as `self`, and
        // which is only ever changed atomically.
        let ended = unsafe { AtomicU64::from_ptr(&raw mut (*chunk).ended) };
        ended.fetch_add(1, Ordering::SeqCst);
    }
}
