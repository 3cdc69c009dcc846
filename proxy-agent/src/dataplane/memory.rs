//! A dataplane without a kernel: the maps as collections, with capacities like the real ones.

use std::{collections::BTreeMap, io};

use penstock_common::{Addr, SlotRange, limits};

use super::{ApplyError, Change, Dataplane, FamilyChange, FamilyState, MapError, MapState};

/// Maps in memory.
#[derive(Clone, Debug)]
pub struct Memory {
    /// What they hold.
    pub state: MapState,
    /// How many frontends fit.
    pub frontends: usize,
    /// How many writes were made.
    pub writes: usize,
    slots: BTreeMap<u32, penstock_common::BackendId>,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            state: MapState::default(),
            frontends: limits::FRONTENDS as usize,
            writes: 0,
            slots: BTreeMap::new(),
        }
    }
}

impl Memory {
    /// Makes one change, whatever else it is part of.
    pub fn write(&mut self, change: &Change) -> Result<(), MapError> {
        match change {
            Change::V4(change) => write(&mut self.state.v4, "FRONTENDS4", change, self.frontends)?,
            Change::V6(change) => write(&mut self.state.v6, "FRONTENDS6", change, self.frontends)?,
            Change::PutSlots { base, backends } => {
                self.slots.extend((*base..).zip(backends.iter().copied()));
            }
        }
        self.writes += 1;
        Ok(())
    }

    /// What [`Dataplane::observe`] would see, slots as far as frontends cover them.
    pub fn observed(&self) -> MapState {
        let mut state = self.state.clone();
        let ranges: Vec<SlotRange> = state.v4.ranges().chain(state.v6.ranges()).collect();
        state.slots = ranges
            .into_iter()
            .flat_map(|range| range.base..range.base + range.count)
            .filter_map(|slot| Some((slot, *self.slots.get(&slot)?)))
            .collect();
        state
    }
}

fn write<A: Addr + Ord>(
    state: &mut FamilyState<A>,
    map: &'static str,
    change: &FamilyChange<A>,
    room: usize,
) -> Result<(), MapError> {
    match *change {
        FamilyChange::PutBackend(id, backend) => {
            state.backends.insert(id, backend);
        }
        FamilyChange::PutFrontend(key, frontend) => {
            if state.frontends.len() >= room && !state.frontends.contains_key(&key) {
                return Err(MapError {
                    map,
                    operation: "writing",
                    source: io::Error::from_raw_os_error(libc::E2BIG),
                });
            }
            state.frontends.insert(key, frontend);
        }
        FamilyChange::DeleteFrontend(key) => {
            state.frontends.remove(&key);
        }
        FamilyChange::PutAddress(addr, address) => {
            state.addresses.insert(addr, address);
        }
        FamilyChange::DeleteAddress(addr) => {
            state.addresses.remove(&addr);
        }
        FamilyChange::PutSourceRange(range) => {
            state.source_ranges.insert(range);
        }
        FamilyChange::DeleteSourceRange(range) => {
            state.source_ranges.remove(&range);
        }
    }
    Ok(())
}

impl Dataplane for Memory {
    fn observe(&mut self) -> Result<MapState, MapError> {
        Ok(self.observed())
    }

    fn apply(&mut self, changes: &[Change]) -> Result<(), ApplyError> {
        for (applied, change) in changes.iter().enumerate() {
            self.write(change)
                .map_err(|source| ApplyError { applied, source })?;
        }
        Ok(())
    }
}
