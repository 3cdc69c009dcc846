//! Sweeps flows whose time is over, so that their records can serve new ones, and those whose frontend is
//! another service's by now, and adds what was counted of them to their backends' counts.
//!
//! The programs manage without: where no record is free they take one from a flow that gives way.
//! Invariant: a record is taken
//! away by moving its state to `RECLAIMING` with one compare-and-exchange, as the programs do.

mod ends;
pub(crate) mod owners;
mod table;

use std::{
    collections::{HashMap as Map, HashSet},
    hash::Hash,
    io,
    sync::atomic::Ordering,
};

use aya::maps::{HashMap, Map as AnyMap, MapData, MapError, Queue};
use penstock_common::{
    Addr, Backend, Be16, Fins, Flow, FlowCounts, FlowId, FlowKey, FlowState, FrontendKey,
    MASQUERADE_PORTS, Plain, Proto, SCTP_ESTABLISHED_SECS, ServiceId, Timeouts, V4, V6,
};

use ends::Ends;
use owners::{Asked, Owners};
pub use table::Table;

use crate::{
    dataplane::pins::{PinError, Pins},
    stats::{Ended, Keeper, Life},
};

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
    /// A map's elements can't be read.
    #[error("reading map {map}: {source}")]
    Read {
        /// The map.
        map: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
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

/// For how long flows may be idle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Lifetimes {
    /// TCP, seen in one direction only, in seconds.
    pub tcp_syn_secs: u32,
    /// TCP, established.
    pub tcp_established_secs: u32,
    /// TCP, after a FIN of one end: the agent's alone, programs leave such flows until they need
    /// their records.
    pub tcp_close_wait_secs: u32,
    /// TCP, after the FINs of both ends or a RST.
    pub tcp_closing_secs: u32,
    /// UDP and ICMP, seen in one direction only.
    pub udp_secs: u32,
    /// UDP and ICMP, seen in both directions.
    pub udp_stream_secs: u32,
}

impl Default for Lifetimes {
    fn default() -> Self {
        let Timeouts {
            tcp_syn_secs,
            tcp_established_secs,
            tcp_closing_secs,
            udp_secs,
            udp_stream_secs,
        } = Timeouts::default();
        Self {
            tcp_syn_secs,
            tcp_established_secs,
            tcp_close_wait_secs: 3_600,
            tcp_closing_secs,
            udp_secs,
            udp_stream_secs,
        }
    }
}

impl Lifetimes {
    /// What the programs are told.
    pub fn timeouts(&self) -> Timeouts {
        Timeouts {
            tcp_syn_secs: self.tcp_syn_secs,
            tcp_established_secs: self.tcp_established_secs,
            tcp_closing_secs: self.tcp_closing_secs,
            udp_secs: self.udp_secs,
            udp_stream_secs: self.udp_stream_secs,
        }
    }

    /// What is so where no agent is there to say it: half-closed flows last until a record is wanted.
    pub fn without_agent(timeouts: &Timeouts) -> Self {
        Self {
            tcp_syn_secs: timeouts.tcp_syn_secs,
            tcp_established_secs: timeouts.tcp_established_secs,
            tcp_close_wait_secs: timeouts.tcp_closing_secs,
            tcp_closing_secs: timeouts.tcp_closing_secs,
            udp_secs: timeouts.udp_secs,
            udp_stream_secs: timeouts.udp_stream_secs,
        }
    }

    /// For how long a flow may be idle.
    pub fn of<A>(&self, flow: &Flow<A>) -> u32 {
        match (flow.state, flow.proto) {
            // A program died in the middle, which takes far less than this.
            (FlowState::CLAIMED | FlowState::RECLAIMING, _) => 60,
            (FlowState::EMBRYONIC, proto) if proto.has_connections() => self.tcp_syn_secs,
            (FlowState::ESTABLISHED, proto) if proto.has_connections() && is_half_closed(flow) => {
                self.tcp_close_wait_secs
            }
            (FlowState::ESTABLISHED, Proto::TCP) => self.tcp_established_secs,
            (FlowState::ESTABLISHED, Proto::SCTP) => SCTP_ESTABLISHED_SECS,
            (FlowState::CLOSING, _) => self.tcp_closing_secs,
            (FlowState::EMBRYONIC, _) => self.udp_secs,
            (FlowState::ESTABLISHED, _) => self.udp_stream_secs,
            _ => u32::MAX,
        }
    }
}

/// Whether one end of an established flow has sent a FIN.
pub fn is_half_closed<A>(flow: &Flow<A>) -> bool {
    flow.state == FlowState::ESTABLISHED && flow.fins & (Fins::CLIENT | Fins::BACKEND) != 0
}

/// Whether nobody will miss a flow.
fn has_expired<A>(flow: &Flow<A>, lifetimes: &Lifetimes, now: u32) -> bool {
    now.saturating_sub(flow.seen_secs) >= lifetimes.of(flow)
}

/// A family's flow table with all that leads to its records.
struct Swept<A> {
    table: Table<A>,
    index: HashMap<MapData, FlowKey<A>, FlowId>,
    free: Queue<MapData, FlowId>,
}

/// What a sweep found.
#[derive(Clone, Debug, Default)]
pub struct Sweep {
    /// Flows that went.
    pub swept: usize,
    /// Those of them whose frontend is another service's.
    pub moved: usize,
    /// Flows that are there.
    pub live: usize,
    /// How many source ports of this node's those have that stay, towards the destination with most.
    pub ports: usize,
    /// What those that went had brought their backends.
    pub(crate) ended: Ended,
    /// The backends of those that are there, if they were asked for.
    pub(crate) referred: HashSet<Life>,
}

impl<A: Addr + Hash> Swept<A>
where
    FlowKey<A>: aya::Pod,
    Flow<A>: Plain,
    FrontendKey<A>: aya::Pod,
    Backend<A>: Plain + Default,
{
    fn open(
        pins: &Pins,
        [records, counts, index, free]: [&'static str; 4],
    ) -> Result<Self, FlowsError> {
        let map = |name, source| FlowsError::Map { map: name, source };
        Ok(Self {
            table: Table::open(pins, [records, counts])?,
            index: HashMap::try_from(AnyMap::HashMap(pins.map(index)?))
                .map_err(|source| map(index, source))?,
            free: Queue::try_from(AnyMap::Queue(pins.map(free)?))
                .map_err(|source| map(free, source))?,
        })
    }

    /// Fills the queue of free records anew.
    fn refill(&mut self) {
        while self.free.pop(0).is_ok() {}
        for id in 0..self.table.records() {
            if self.table.state(id).load(Ordering::Relaxed) == FlowState::FREE
                && self.free.push(FlowId(id), 0).is_err()
            {
                // Full: the programs look through the table for the rest.
                return;
            }
        }
    }

    /// Frees flows that have expired, and those whose next packet has to begin anew.
    fn sweep(
        &mut self,
        ends: &Ends,
        mut asked: Asked<'_, A>,
        lifetimes: &Lifetimes,
        now: u32,
        refers: bool,
    ) -> Sweep {
        let mut sweep = Sweep::default();
        let mut ports: Map<FlowKey<A>, usize> = Map::new();
        for id in 0..self.table.records() {
            if self.table.state(id).load(Ordering::Relaxed) == FlowState::FREE {
                continue;
            }
            let flow = self.table.read(id);
            // Once more as a whole, since somebody may be using it.
            let has_moved = asked.concern(&flow)
                && self
                    .table
                    .flow(id)
                    .is_some_and(|now| now.state == flow.state && asked.concern(&now));
            let taken = (has_moved || has_expired(&flow, lifetimes, now))
                .then(|| self.take(ends, id, flow.state))
                .flatten();
            let Some(flow) = taken else {
                sweep.live += 1;
                if let Some(destination) = destination(&flow) {
                    let taken = ports.entry(destination).or_default();
                    *taken += 1;
                    sweep.ports = sweep.ports.max(*taken);
                }
                if refers {
                    let life = (flow.backend_id, flow.backend_generation);
                    sweep.referred.insert(life);
                }
                continue;
            };
            sweep.swept += 1;
            sweep.moved += usize::from(has_moved);
            let counts = self.table.take_counts(id);
            self.table
                .state(id)
                .store(FlowState::FREE, Ordering::SeqCst);
            // Full: the programs find the record by themselves.
            let _ = self.free.push(FlowId(id), 0);
            add(&mut sweep.ended, &flow, &counts);
        }
        sweep
    }

    /// Makes a record in this state nobody's but this process's, and its keys lead nowhere.
    fn take(&mut self, ends: &Ends, id: u32, state: u32) -> Option<Flow<A>> {
        let claimed = self.table.state(id).compare_exchange(
            state,
            FlowState::RECLAIMING,
            Ordering::SeqCst,
            Ordering::Relaxed,
        );
        claimed.ok()?;
        // Again: it may have begun another life in the meantime.
        let flow = self.table.read(id);
        let reply = flow.reply_key();
        self.unlink(&flow.request_key(), id);
        if self.unlink(&reply, id) {
            ends.uncount(&reply);
        }
        ends.give_back(&reply);
        Some(flow)
    }

    /// Takes a key out, unless it already leads to another flow's record; whether it did.
    fn unlink(&mut self, key: &FlowKey<A>, id: u32) -> bool {
        let found = self.index.get(key, 0);
        found.is_ok_and(|found| found == FlowId(id)) && self.index.remove(key).is_ok()
    }
}

/// Towards whom a flow has a source port of this node's that it gives up for nobody: its reply's key
/// without that port.
fn destination<A: Addr>(flow: &Flow<A>) -> Option<FlowKey<A>> {
    let (low, high) = MASQUERADE_PORTS;
    let is_ours = flow.source != flow.client && (low..=high).contains(&flow.source_port.to_host());
    let stays = flow.state == FlowState::ESTABLISHED && !is_half_closed(flow);
    (is_ours && stays).then(|| {
        let mut key = flow.reply_key();
        key.dst_port = Be16::default();
        key
    })
}

/// Adds what was counted of a flow, unless it was no service's.
fn add<A>(ended: &mut Ended, flow: &Flow<A>, counts: &FlowCounts) {
    if flow.backend_generation == 0 {
        return;
    }
    let key = (flow.backend_id, flow.backend_generation);
    let sum: &mut (ServiceId, FlowCounts) = ended.entry(key).or_default();
    sum.0 = flow.service;
    sum.1 = sum.1.plus(counts);
}

/// Sweeps both families.
pub struct Sweeper {
    v4: Swept<V4>,
    v6: Swept<V6>,
    owners4: Owners<V4>,
    owners6: Owners<V6>,
    ends: Ends,
    keeper: Keeper,
    lifetimes: Lifetimes,
    sweeps: u32,
}

/// How many flows are there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Live {
    /// Flows that went, both families.
    pub swept: usize,
    /// Those of them whose frontend is another service's.
    pub moved: usize,
    /// IPv4 flows that are there.
    pub v4: usize,
    /// IPv6 flows that are there.
    pub v6: usize,
    /// [`Sweep::ports`] of each family.
    pub ports: [usize; 2],
}

/// Every how many sweeps the counts of backends are looked through.
const TIDY: u32 = 8;

impl Sweeper {
    /// Maps the pinned tables.
    pub fn open(pins: &Pins, lifetimes: Lifetimes) -> Result<Self, FlowsError> {
        Ok(Self {
            v4: Swept::open(
                pins,
                ["FLOWS4", "FLOW_COUNTS4", "FLOW_INDEX4", "FREE_FLOWS4"],
            )?,
            v6: Swept::open(
                pins,
                ["FLOWS6", "FLOW_COUNTS6", "FLOW_INDEX6", "FREE_FLOWS6"],
            )?,
            owners4: Owners::open(pins, ["FRONTENDS4", "BACKENDS4"])?,
            owners6: Owners::open(pins, ["FRONTENDS6", "BACKENDS6"])?,
            ends: Ends::open(pins)?,
            keeper: Keeper::open(pins)?,
            lifetimes,
            sweeps: 0,
        })
    }

    /// For how many flows of each family the table was made.
    pub fn records(&self) -> u32 {
        self.v4.table.records()
    }

    /// Fills the queues of free records anew: ids are lost where a program or an agent ended between
    /// taking one and using it. Programs that meet an empty queue look through the table meanwhile.
    pub fn refill(&mut self) {
        self.v4.refill();
        self.v6.refill();
    }

    /// Frees what has expired, and what goes to a frontend's former owner.
    pub fn sweep(&mut self) -> Live {
        let now = now_secs();
        self.sweeps = self.sweeps.wrapping_add(1);
        let tidies = self.sweeps.is_multiple_of(TIDY);
        self.ends.doubt();
        let (ends, lifetimes) = (&self.ends, &self.lifetimes);
        let asked = self.owners4.ask();
        let v4 = self.v4.sweep(ends, asked, lifetimes, now, tidies);
        let asked = self.owners6.ask();
        let v6 = self.v6.sweep(ends, asked, lifetimes, now, tidies);
        self.keeper.add([&v4.ended, &v6.ended]);
        if tidies {
            self.keeper.tidy([&v4.referred, &v6.referred]);
        }
        Live {
            swept: v4.swept + v6.swept,
            moved: v4.moved + v6.moved,
            v4: v4.live,
            v6: v6.live,
            ports: [v4.ports, v6.ports],
        }
    }
}

/// What the flows of a backend that are there did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Running {
    /// The service port.
    pub service: ServiceId,
    /// How many are not about to end.
    pub flows: u64,
    /// What they brought it.
    pub counts: FlowCounts,
}

/// What flows that are there did, by backend and its generation.
pub fn running<A: Addr>(table: &Table<A>) -> Map<Life, Running>
where
    Flow<A>: Plain,
{
    let mut all: Map<_, Running> = Map::new();
    for id in 0..table.records() {
        let Some(flow) = table.flow(id).filter(|flow| flow.backend_generation != 0) else {
            continue;
        };
        let key = (flow.backend_id, flow.backend_generation);
        let running = all.entry(key).or_default();
        running.service = flow.service;
        running.flows += u64::from(flow.state != FlowState::CLOSING);
        running.counts = running.counts.plus(&table.counts(id));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_taken_by_flows_that_stay() {
        let flow = Flow::<V4> {
            state: FlowState::ESTABLISHED,
            proto: Proto::TCP,
            client: V4::from_octets([192, 0, 2, 1]),
            source: V4::from_octets([172, 18, 0, 2]),
            source_port: Be16::from_host(1_024),
            backend: V4::from_octets([10, 244, 1, 5]),
            backend_port: Be16::from_host(8_080),
            ..Flow::default()
        };
        let to = destination(&flow).expect("it has one");
        let other = Flow {
            source_port: Be16::from_host(29_999),
            ..flow
        };
        assert_eq!(destination(&other), Some(to), "another port of the same");
        let other = Flow {
            backend_port: Be16::from_host(8_081),
            ..flow
        };
        assert_ne!(destination(&other), Some(to));
        for gives_way in [
            Flow {
                state: FlowState::EMBRYONIC,
                ..flow
            },
            Flow {
                state: FlowState::CLOSING,
                ..flow
            },
            Flow {
                fins: Fins::CLIENT,
                ..flow
            },
            Flow {
                source: flow.client,
                ..flow
            },
            Flow {
                source_port: Be16::from_host(61_000),
                ..flow
            },
        ] {
            assert_eq!(destination(&gives_way), None, "{gives_way:?}");
        }
    }

    #[test]
    fn a_flow_goes_once_it_was_idle_for_as_long_as_its_state_may_be() {
        let lifetimes = Lifetimes {
            tcp_syn_secs: 1,
            tcp_established_secs: 2,
            tcp_close_wait_secs: 3,
            tcp_closing_secs: 4,
            udp_secs: 5,
            udp_stream_secs: 6,
        };
        let flow = |state, proto, fins| Flow::<V4> {
            state,
            proto,
            fins,
            seen_secs: 100,
            ..Flow::default()
        };
        for (state, proto, fins, lasts) in [
            (FlowState::EMBRYONIC, Proto::TCP, 0, 1),
            (FlowState::ESTABLISHED, Proto::TCP, 0, 2),
            (FlowState::ESTABLISHED, Proto::TCP, Fins::CLIENT, 3),
            (FlowState::ESTABLISHED, Proto::TCP, Fins::BACKEND, 3),
            (FlowState::CLOSING, Proto::TCP, Fins::BACKEND, 4),
            (FlowState::EMBRYONIC, Proto::SCTP, 0, 1),
            (
                FlowState::ESTABLISHED,
                Proto::SCTP,
                0,
                SCTP_ESTABLISHED_SECS,
            ),
            (FlowState::ESTABLISHED, Proto::SCTP, Fins::CLIENT, 3),
            (FlowState::CLOSING, Proto::SCTP, Fins::CLIENT, 4),
            (FlowState::EMBRYONIC, Proto::UDP, 0, 5),
            (FlowState::ESTABLISHED, Proto::UDP, 0, 6),
        ] {
            let flow = flow(state, proto, fins);
            let expires = |now| has_expired(&flow, &lifetimes, now);
            assert!(!expires(100 + lasts - 1), "{flow:?}");
            assert!(expires(100 + lasts), "{flow:?}");
            // A clock that a program read a moment later.
            assert!(!expires(99), "{flow:?}");
        }
        assert!(!has_expired(
            &flow(FlowState::FREE, Proto::UDP, 0),
            &lifetimes,
            4_000
        ));
        let told = lifetimes.timeouts();
        assert_eq!((told.tcp_established_secs, told.udp_stream_secs), (2, 6));
    }
}
