//! Sweeps flows whose time is over, so that their records can serve new ones.
//!
//! The programs manage without: where no record is free they take one from a flow that gives way. Invariant: a record is taken
//! away by moving its state to `RECLAIMING` with one compare-and-exchange, as the programs do.
#![expect(
    unsafe_code,
    reason = "the flow table is memory shared with the kernel's programs"
)]

use std::{
    io,
    num::NonZeroUsize,
    os::fd::AsFd,
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use aya::maps::{Array, HashMap, Map, MapData, MapError, Queue};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use penstock_common::{
    Addr, Config, Flow, FlowId, FlowKey, FlowState, PortChunk, Proto, Timeouts, V4, V6, limits,
};

use crate::dataplane::pins::{PinError, Pins};

/// The flow table can't be reached.
#[derive(Debug, thiserror::Error)]
pub enum FlowsError {
    /// A pinned map can't be opened.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A map operation failed.
    #[error("map {map}: {source}")]
    Map {
        /// The map.
        map: &'static str,
        /// Why.
        #[source]
        source: MapError,
    },
    /// The table can't be mapped into memory.
    #[error("mapping {map} into memory: {source}")]
    Mmap {
        /// The map.
        map: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Seconds since boot on the programs' clock (CLOCK_MONOTONIC_COARSE).
pub fn now_secs() -> u32 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC_COARSE)
        .map_or(0, |time| time.tv_sec() as u32)
}

/// An array that the programs and this process share.
struct Shared<T> {
    elements: NonNull<T>,
    length: NonZeroUsize,
}

// SAFETY: the mapping belongs to this value alone and is not tied to a thread.
unsafe impl<T: Send> Send for Shared<T> {}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: mapped in `open` with this length, and nobody else has the pointer.
        let _ = unsafe { munmap(self.elements.cast(), self.length.get()) };
    }
}

impl<T> Shared<T> {
    /// Maps a pinned array of `count` elements.
    fn open(pins: &Pins, name: &'static str, count: u32) -> Result<Self, FlowsError> {
        /// To what the kernel rounds an array's elements up, in bytes.
        const STEP: usize = 8;
        const { assert!(size_of::<T>().is_multiple_of(STEP)) };
        let data = pins.map(name)?;
        let bytes = size_of::<T>() * count as usize;
        let bad = |source| FlowsError::Mmap { map: name, source };
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
        })
    }
}

/// What is known of source ports.
struct Ports {
    chunks: Shared<PortChunk>,
    /// How often [`Self::doubt`] was called.
    doubts: u32,
}

impl Ports {
    fn open(pins: &Pins) -> Result<Self, FlowsError> {
        Ok(Self {
            chunks: Shared::open(pins, "PORT_CHUNKS", limits::PORT_CHUNKS)?,
            doubts: 0,
        })
    }

    /// Has programs look again for free ports in some of the chunks that were full, in all of them
    /// in the course of many calls: an agent may have ended after it gave a port back, and before it
    /// said so. All at once would take programs too long.
    fn doubt(&mut self) {
        const TURNS: u32 = 32;
        for index in (self.doubts % TURNS..limits::PORT_CHUNKS).step_by(TURNS as usize) {
            self.count_end(index);
        }
        self.doubts = self.doubts.wrapping_add(1);
    }

    /// Says that a port of a chunk was given back, after it was.
    fn count_end(&self, index: u32) {
        let index = index % limits::PORT_CHUNKS;
        // SAFETY: the index is below `PORT_CHUNKS`, and the mapping holds that many; the field is
        // aligned and only ever changed atomically; the mapping lives as long as `self`.
        let ended = unsafe {
            let chunk = self.chunks.elements.as_ptr().add(index as usize);
            AtomicU64::from_ptr(&raw mut (*chunk).ended)
        };
        ended.fetch_add(1, Ordering::SeqCst);
    }
}

/// A family's flow table.
struct Table<A> {
    records: Shared<Flow<A>>,
    index: HashMap<MapData, FlowKey<A>, FlowId>,
    free: Queue<MapData, FlowId>,
}

impl<A: Addr> Table<A>
where
    FlowKey<A>: aya::Pod,
{
    fn open(pins: &Pins, [records, index, free]: [&'static str; 3]) -> Result<Self, FlowsError> {
        let map = |name, source| FlowsError::Map { map: name, source };
        Ok(Self {
            records: Shared::open(pins, records, limits::FLOWS)?,
            index: HashMap::try_from(Map::HashMap(pins.map(index)?))
                .map_err(|source| map(index, source))?,
            free: Queue::try_from(Map::Queue(pins.map(free)?))
                .map_err(|source| map(free, source))?,
        })
    }

    fn record(&self, id: u32) -> *mut Flow<A> {
        // SAFETY: ids are below `FLOWS`, and the mapping holds that many records.
        unsafe { self.records.elements.as_ptr().add(id as usize) }
    }

    fn state(&self, id: u32) -> &AtomicU32 {
        // SAFETY: the first field of a record in the mapping, aligned, and only ever changed
        // atomically; the mapping lives as long as `self`.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.record(id)).state) }
    }

    fn read(&self, id: u32) -> Flow<A> {
        // SAFETY: inside the mapping; any bytes are a flow, and what a program changes meanwhile
        // is caught by the compare-and-exchange that follows.
        unsafe { self.record(id).read_volatile() }
    }

    /// Fills the queue of free records anew.
    fn refill(&mut self) {
        while self.free.pop(0).is_ok() {}
        for id in 0..limits::FLOWS {
            if self.state(id).load(Ordering::Relaxed) == FlowState::FREE
                && self.free.push(FlowId(id), 0).is_err()
            {
                // Full: the programs look through the table for the rest.
                return;
            }
        }
    }

    /// Frees flows that have expired; how many, and how many there are.
    fn sweep(&mut self, ports: &Ports, timeouts: &Timeouts, now: u32) -> (usize, usize) {
        let (mut swept, mut live) = (0, 0);
        for id in 0..limits::FLOWS {
            let state = self.state(id).load(Ordering::Relaxed);
            if state == FlowState::FREE {
                continue;
            }
            live += 1;
            let flow = self.read(id);
            if !has_expired(&flow, timeouts, now) {
                continue;
            }
            let claimed = self.state(id).compare_exchange(
                flow.state,
                FlowState::RECLAIMING,
                Ordering::SeqCst,
                Ordering::Relaxed,
            );
            if claimed.is_err() {
                continue;
            }
            // Again: it may have begun another life in the meantime.
            let flow = self.read(id);
            let reply = flow.reply_key();
            for key in [flow.request_key(), reply] {
                // An index entry may already lead to another flow's record.
                if self
                    .index
                    .get(&key, 0)
                    .is_ok_and(|found| found == FlowId(id))
                {
                    let _ = self.index.remove(&key);
                }
            }
            ports.count_end(reply.port_place().index(reply.dst_port.to_host()));
            self.state(id).store(FlowState::FREE, Ordering::SeqCst);
            // Full: the programs find the record by themselves.
            let _ = self.free.push(FlowId(id), 0);
            swept += 1;
            live -= 1;
        }
        (swept, live)
    }
}

/// Whether nobody will miss a flow.
fn has_expired<A>(flow: &Flow<A>, timeouts: &Timeouts, now: u32) -> bool {
    let idle = now.saturating_sub(flow.seen_secs);
    let timeout = match (flow.state, flow.proto) {
        // A program died in the middle, which takes far less than this.
        (FlowState::CLAIMED | FlowState::RECLAIMING, _) => 60,
        (FlowState::EMBRYONIC, Proto::TCP) => timeouts.tcp_syn_secs,
        (FlowState::ESTABLISHED, Proto::TCP) => timeouts.tcp_established_secs,
        (FlowState::CLOSING, _) => timeouts.tcp_closing_secs,
        (FlowState::EMBRYONIC, _) => timeouts.udp_secs,
        (FlowState::ESTABLISHED, _) => timeouts.udp_stream_secs,
        _ => return false,
    };
    idle >= timeout
}

/// Sweeps both families.
pub struct Sweeper {
    v4: Table<V4>,
    v6: Table<V6>,
    ports: Ports,
    config: Array<MapData, Config>,
}

impl Sweeper {
    /// Maps the pinned tables.
    pub fn open(pins: &Pins) -> Result<Self, FlowsError> {
        let config =
            Array::try_from(Map::Array(pins.map("CONFIG")?)).map_err(|source| FlowsError::Map {
                map: "CONFIG",
                source,
            })?;
        Ok(Self {
            v4: Table::open(pins, ["FLOWS4", "FLOW_INDEX4", "FREE_FLOWS4"])?,
            v6: Table::open(pins, ["FLOWS6", "FLOW_INDEX6", "FREE_FLOWS6"])?,
            ports: Ports::open(pins)?,
            config,
        })
    }

    /// Fills the queues of free records anew: ids are lost where a program or an agent ended between
    /// taking one and using it. Programs that meet an empty queue look through the table meanwhile.
    pub fn refill(&mut self) {
        self.v4.refill();
        self.v6.refill();
    }

    /// Frees what has expired. Returns how many flows went and how many are there.
    pub fn sweep(&mut self) -> (usize, usize) {
        let timeouts = self.config.get(&0, 0).unwrap_or_default().timeouts;
        let now = now_secs();
        self.ports.doubt();
        let (swept4, live4) = self.v4.sweep(&self.ports, &timeouts, now);
        let (swept6, live6) = self.v6.sweep(&self.ports, &timeouts, now);
        (swept4 + swept6, live4 + live6)
    }
}
