//! Which addresses programs look up: `ADDRESS_FILTER4` and `ADDRESS_FILTER6`.
//!
//! Invariant: that of [`FilterBit`], whenever the agent ends. What one that ended left behind, bits of
//! addresses that never came or that have gone, the next one clears before it writes.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{AsFd, BorrowedFd},
};

use aya::maps::MapData;
use penstock_common::{Addr, Address, FilterBit};

use super::{
    batch,
    pins::{PinError, Pins},
};

/// Elements that are read at once.
const CHUNK: usize = 8_192;

/// A family's filter.
pub(super) struct Filter<A> {
    name: &'static str,
    map: MapData,
    known: Option<Known<A>>,
}

/// What the maps hold.
struct Known<A> {
    addresses: BTreeSet<(FilterBit, A)>,
    elements: Vec<u64>,
}

impl<A: Addr + Ord> Known<A> {
    /// Whether an address that is there has this bit.
    fn is_held(&self, bit: FilterBit) -> bool {
        let mut rest = self.addresses.range((bit, A::default())..);
        rest.next().is_some_and(|(next, _)| *next == bit)
    }
}

impl<A: Addr + Ord> Filter<A> {
    /// Opens the pinned map.
    pub(super) fn open(pins: &Pins, name: &'static str) -> Result<Self, PinError> {
        Ok(Self {
            name,
            map: pins.map(name)?,
            known: None,
        })
    }

    /// The map's name.
    pub(super) const fn name(&self) -> &'static str {
        self.name
    }

    /// Has programs look addresses up that are about to be put into this map.
    pub(super) fn admit(&mut self, map: BorrowedFd<'_>, addresses: &[A]) -> io::Result<()> {
        let bits = addresses.iter().map(|addr| FilterBit::of(*addr));
        let bits: BTreeSet<FilterBit> = bits.collect();
        self.write(map, &bits, |_, _| true)
    }

    /// Says which addresses are in this map now, and which were taken out; what can be spared of looking up the
    /// latter is.
    pub(super) fn settle(
        &mut self,
        map: BorrowedFd<'_>,
        there: &[A],
        gone: &[A],
    ) -> io::Result<()> {
        let Some(known) = &mut self.known else {
            return Ok(());
        };
        let of = |addr: &A| (FilterBit::of(*addr), *addr);
        known.addresses.extend(there.iter().map(of));
        let gone: Vec<(FilterBit, A)> = gone.iter().map(of).collect();
        for address in &gone {
            known.addresses.remove(address);
        }
        let bits = gone.into_iter().map(|(bit, _)| bit).collect();
        self.write(map, &bits, Known::is_held)
    }

    /// Sets these bits or clears them, as `is_set` says.
    fn write(
        &mut self,
        map: BorrowedFd<'_>,
        bits: &BTreeSet<FilterBit>,
        is_set: impl Fn(&Known<A>, FilterBit) -> bool,
    ) -> io::Result<()> {
        let known = match &mut self.known {
            Some(known) => known,
            None => self.known.insert(observe(&self.map, map)?),
        };
        let mut changed: BTreeMap<u32, u64> = BTreeMap::new();
        for bit in bits {
            let element = bit.element();
            let old = known.elements.get(element as usize).copied();
            let now = changed.entry(element).or_insert(old.unwrap_or_default());
            if is_set(known, *bit) {
                *now |= bit.mask();
            } else {
                *now &= !bit.mask();
            }
        }
        changed.retain(|element, now| known.elements.get(*element as usize) != Some(now));
        let (elements, values): (Vec<u32>, Vec<u64>) = changed.into_iter().unzip();
        if let Err(stopped) = batch::update(self.map.fd().as_fd(), &elements, &values) {
            // What is there is to be read again.
            self.known = None;
            return Err(stopped.source);
        }
        for (element, value) in elements.into_iter().zip(values) {
            if let Some(known) = known.elements.get_mut(element as usize) {
                *known = value;
            }
        }
        Ok(())
    }
}

/// Reads what is there, and makes the filter that of the addresses.
fn observe<A: Addr + Ord>(filter: &MapData, map: BorrowedFd<'_>) -> io::Result<Known<A>> {
    let addresses = batch::lookup_all::<A, Address>(map, CHUNK)?;
    let addresses: BTreeSet<(FilterBit, A)> = addresses
        .into_iter()
        .map(|(addr, _)| (FilterBit::of(addr), addr))
        .collect();
    let found = batch::lookup_all::<u32, u64>(filter.fd().as_fd(), CHUNK)?;
    let mut elements = vec![0; found.len()];
    for (bit, _) in &addresses {
        if let Some(element) = elements.get_mut(bit.element() as usize) {
            *element |= bit.mask();
        }
    }
    let differ = found
        .iter()
        .filter_map(|(index, found)| Some((*index, *elements.get(*index as usize)?, *found)))
        .filter(|(_, wanted, found)| wanted != found);
    let (keys, values): (Vec<u32>, Vec<u64>) = differ.map(|(index, new, _)| (index, new)).unzip();
    batch::update(filter.fd().as_fd(), &keys, &values).map_err(|stopped| stopped.source)?;
    Ok(Known {
        addresses,
        elements,
    })
}
