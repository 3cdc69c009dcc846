//! [`Dataplane`] by way of the pinned maps.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use aya::maps::MapData;
use penstock_common::{
    Addr, Address, Backend, BackendId, Frontend, FrontendKey, Plain, SourcePrefix, V4, V6,
};

use super::{
    ApplyError, Change, Dataplane, FamilyChange, FamilyState, MapError, MapState,
    batch::{self, Stopped},
    changed::Changed,
    filter::Filter,
    pins::{PinError, Pins},
};

/// Elements that are read at once.
const CHUNK: usize = 8_192;

/// The service maps of one family.
struct FamilyMaps<A> {
    names: [&'static str; 4],
    addresses: MapData,
    filter: Filter<A>,
    frontends: MapData,
    backends: MapData,
    source_ranges: MapData,
}

/// The kernel's service maps.
pub struct Bpf {
    v4: FamilyMaps<V4>,
    v6: FamilyMaps<V6>,
    slots: MapData,
    changed: Changed,
}

impl Bpf {
    /// Opens the pinned maps.
    pub fn open(pins: &Pins) -> Result<Self, PinError> {
        let v4 = ["ADDRESSES4", "FRONTENDS4", "BACKENDS4", "SOURCE_RANGES4"];
        let v6 = ["ADDRESSES6", "FRONTENDS6", "BACKENDS6", "SOURCE_RANGES6"];
        Ok(Self {
            v4: open_family(pins, v4, "ADDRESS_FILTER4")?,
            v6: open_family(pins, v6, "ADDRESS_FILTER6")?,
            slots: pins.map("SLOTS")?,
            changed: Changed::open(pins)?,
        })
    }
}

fn open_family<A: Addr + Ord>(
    pins: &Pins,
    names: [&'static str; 4],
    filter: &'static str,
) -> Result<FamilyMaps<A>, PinError> {
    let [addresses, frontends, backends, source_ranges] = names;
    Ok(FamilyMaps {
        names,
        addresses: pins.map(addresses)?,
        filter: Filter::open(pins, filter)?,
        frontends: pins.map(frontends)?,
        backends: pins.map(backends)?,
        source_ranges: pins.map(source_ranges)?,
    })
}

fn error(map: &'static str, operation: &'static str) -> impl Fn(io::Error) -> MapError {
    move |source| MapError {
        map,
        operation,
        source,
    }
}

/// Reads a family's maps.
fn observe_family<A>(maps: &FamilyMaps<A>) -> Result<FamilyState<A>, MapError>
where
    A: Addr + Ord,
    FrontendKey<A>: Plain + Default + Ord,
    Backend<A>: Plain + Default,
    SourcePrefix<A>: Plain + Default + Ord,
{
    let [addresses, frontends, backends, source_ranges] = maps.names;
    let read = "reading all elements";
    let all_addresses = batch::lookup_all::<A, Address>(maps.addresses.fd().as_fd(), CHUNK)
        .map_err(error(addresses, read))?;
    let all_frontends =
        batch::lookup_all::<FrontendKey<A>, Frontend>(maps.frontends.fd().as_fd(), CHUNK)
            .map_err(error(frontends, read))?;
    let all_backends = batch::lookup_all::<u32, Backend<A>>(maps.backends.fd().as_fd(), CHUNK)
        .map_err(error(backends, read))?;
    let all_ranges =
        batch::lookup_all::<SourcePrefix<A>, u32>(maps.source_ranges.fd().as_fd(), CHUNK)
            .map_err(error(source_ranges, read))?;
    Ok(FamilyState {
        source_ranges: all_ranges.into_iter().map(|(range, _)| range).collect(),
        addresses: all_addresses.into_iter().collect(),
        frontends: all_frontends.into_iter().collect(),
        backends: all_backends
            .into_iter()
            .filter(|(_, backend)| backend.generation != 0)
            .map(|(id, backend)| (BackendId(id), backend))
            .collect(),
    })
}

/// Neighbouring writes to one map, made by one call.
enum Run<A> {
    Backends(Vec<u32>, Vec<Backend<A>>),
    Frontends(Vec<FrontendKey<A>>, Vec<Frontend>),
    DeleteFrontends(Vec<FrontendKey<A>>),
    Addresses(Vec<A>, Vec<Address>),
    DeleteAddresses(Vec<A>),
    SourceRanges(Vec<SourcePrefix<A>>),
    DeleteSourceRanges(Vec<SourcePrefix<A>>),
}

impl<A> Run<A>
where
    A: Addr + Ord,
    FrontendKey<A>: Plain,
    Backend<A>: Plain,
    SourcePrefix<A>: Plain,
{
    fn begin(change: &FamilyChange<A>) -> Self {
        match *change {
            FamilyChange::PutBackend(id, value) => Self::Backends(vec![id.0], vec![value]),
            FamilyChange::PutFrontend(key, value) => Self::Frontends(vec![key], vec![value]),
            FamilyChange::DeleteFrontend(key) => Self::DeleteFrontends(vec![key]),
            FamilyChange::PutAddress(key, value) => Self::Addresses(vec![key], vec![value]),
            FamilyChange::DeleteAddress(key) => Self::DeleteAddresses(vec![key]),
            FamilyChange::PutSourceRange(key) => Self::SourceRanges(vec![key]),
            FamilyChange::DeleteSourceRange(key) => Self::DeleteSourceRanges(vec![key]),
        }
    }

    /// Takes one more change in, if it is to the same map and of the same sort.
    fn extend(&mut self, change: &FamilyChange<A>) -> bool {
        match (self, *change) {
            (Self::Backends(keys, values), FamilyChange::PutBackend(key, value)) => {
                keys.push(key.0);
                values.push(value);
            }
            (Self::Frontends(keys, values), FamilyChange::PutFrontend(key, value)) => {
                keys.push(key);
                values.push(value);
            }
            (Self::Addresses(keys, values), FamilyChange::PutAddress(key, value)) => {
                keys.push(key);
                values.push(value);
            }
            (Self::DeleteFrontends(keys), FamilyChange::DeleteFrontend(key)) => keys.push(key),
            (Self::DeleteAddresses(keys), FamilyChange::DeleteAddress(key)) => keys.push(key),
            (Self::SourceRanges(keys), FamilyChange::PutSourceRange(key))
            | (Self::DeleteSourceRanges(keys), FamilyChange::DeleteSourceRange(key)) => {
                keys.push(key);
            }
            _ => return false,
        }
        true
    }

    fn write(&self, maps: &mut FamilyMaps<A>) -> Result<(), (usize, MapError)> {
        let [addresses, frontends, backends, source_ranges] = maps.names;
        let (map, operation, result) = match self {
            Self::Backends(keys, values) => (
                backends,
                "writing",
                batch::update(maps.backends.fd().as_fd(), keys, values),
            ),
            Self::Frontends(keys, values) => (
                frontends,
                "writing",
                batch::update(maps.frontends.fd().as_fd(), keys, values),
            ),
            Self::DeleteFrontends(keys) => (
                frontends,
                "deleting",
                batch::delete(maps.frontends.fd().as_fd(), keys),
            ),
            Self::Addresses(keys, values) => {
                let map = maps.addresses.fd().as_fd();
                if let Err(source) = maps.filter.admit(map, keys) {
                    return Err((0, error(maps.filter.name(), "writing")(source)));
                }
                let result = batch::update(map, keys, values);
                // The others may have been there before, with another value.
                let (there, _) = keys.split_at(done(&result, keys.len()));
                settle(&mut maps.filter, map, there, &[]);
                (addresses, "writing", result)
            }
            Self::DeleteAddresses(keys) => {
                let map = maps.addresses.fd().as_fd();
                let result = batch::delete(map, keys);
                let (gone, _) = keys.split_at(done(&result, keys.len()));
                settle(&mut maps.filter, map, &[], gone);
                (addresses, "deleting", result)
            }
            Self::SourceRanges(keys) => (
                source_ranges,
                "writing",
                batch::update(
                    maps.source_ranges.fd().as_fd(),
                    keys,
                    &vec![1_u32; keys.len()],
                ),
            ),
            Self::DeleteSourceRanges(keys) => (
                source_ranges,
                "deleting",
                batch::delete(maps.source_ranges.fd().as_fd(), keys),
            ),
        };
        result.map_err(|stopped| (stopped.done, error(map, operation)(stopped.source)))
    }
}

/// How many elements a batch of so many got done.
fn done(result: &Result<(), Stopped>, all: usize) -> usize {
    result
        .as_ref()
        .map_or_else(|stopped| stopped.done.min(all), |()| all)
}

/// [`Filter::settle`], without which programs look up more than they have to.
fn settle<A: Addr + Ord>(filter: &mut Filter<A>, map: BorrowedFd<'_>, there: &[A], gone: &[A]) {
    if let Err(error) = filter.settle(map, there, gone) {
        tracing::warn!("writing map {}: {error}", filter.name());
    }
}

/// How many of the first changes belong to one family's run, and what writing them gave.
fn write_run<'a, A>(
    maps: &mut FamilyMaps<A>,
    first: &FamilyChange<A>,
    rest: impl Iterator<Item = Option<&'a FamilyChange<A>>>,
) -> (usize, Result<(), (usize, MapError)>)
where
    A: Addr + Ord,
    FrontendKey<A>: Plain,
    Backend<A>: Plain,
    SourcePrefix<A>: Plain,
{
    let mut run = Run::begin(first);
    let mut length = 1;
    for change in rest {
        if !change.is_some_and(|change| run.extend(change)) {
            break;
        }
        length += 1;
    }
    (length, run.write(maps))
}

/// Writes consecutive slots of consecutive changes; how many changes, and how many of them done.
fn write_slots(
    slots: BorrowedFd<'_>,
    changes: &[Change],
) -> (usize, Result<(), (usize, MapError)>) {
    let (mut keys, mut values, mut ends) = (Vec::new(), Vec::new(), Vec::new());
    for change in changes {
        let Change::PutSlots { base, backends } = change else {
            break;
        };
        keys.extend((*base..).take(backends.len()));
        values.extend_from_slice(backends);
        ends.push(keys.len());
    }
    let result = batch::update(slots, &keys, &values).map_err(|stopped| {
        let whole = ends.iter().filter(|end| **end <= stopped.done).count();
        (whole, error("SLOTS", "writing")(stopped.source))
    });
    (ends.len(), result)
}

impl Dataplane for Bpf {
    fn observe(&mut self) -> Result<MapState, MapError> {
        let (v4, v6) = (
            observe_family::<V4>(&self.v4)?,
            observe_family::<V6>(&self.v6)?,
        );
        let all = batch::lookup_all::<u32, BackendId>(self.slots.fd().as_fd(), CHUNK)
            .map_err(error("SLOTS", "reading all elements"))?;
        let content: Vec<BackendId> = all.into_iter().map(|(_, backend)| backend).collect();
        let slots = v4
            .ranges()
            .chain(v6.ranges())
            .flat_map(|range| range.base..range.base.saturating_add(range.count))
            .filter_map(|slot| Some((slot, *content.get(slot as usize)?)))
            .collect();
        Ok(MapState { v4, v6, slots })
    }

    fn apply(&mut self, changes: &[Change]) -> Result<(), ApplyError> {
        let result = self.write(changes);
        if changes.iter().any(is_of_address) {
            self.changed.note();
        }
        result
    }
}

/// Whether a change is one of `ADDRESSES`.
fn is_of_address(change: &Change) -> bool {
    matches!(
        change,
        Change::V4(FamilyChange::PutAddress(..) | FamilyChange::DeleteAddress(_))
            | Change::V6(FamilyChange::PutAddress(..) | FamilyChange::DeleteAddress(_))
    )
}

impl Bpf {
    fn write(&mut self, changes: &[Change]) -> Result<(), ApplyError> {
        let mut applied = 0;
        while let Some((first, rest)) = changes.get(applied..).and_then(<[Change]>::split_first) {
            let (length, result) = match first {
                Change::V4(first) => write_run(
                    &mut self.v4,
                    first,
                    rest.iter().map(|change| match change {
                        Change::V4(change) => Some(change),
                        _ => None,
                    }),
                ),
                Change::V6(first) => write_run(
                    &mut self.v6,
                    first,
                    rest.iter().map(|change| match change {
                        Change::V6(change) => Some(change),
                        _ => None,
                    }),
                ),
                Change::PutSlots { .. } => write_slots(
                    self.slots.fd().as_fd(),
                    changes.get(applied..).unwrap_or_default(),
                ),
            };
            if let Err((done, source)) = result {
                return Err(ApplyError {
                    applied: applied + done,
                    source,
                });
            }
            applied += length;
        }
        Ok(())
    }
}
