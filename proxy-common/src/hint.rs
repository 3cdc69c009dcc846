//! Where the record of a known flow may be, told sooner than by the index.

use crate::{
    flow::{FlowId, FlowKey},
    net::{Addr, mixed, place},
    plain::map_types,
};

/// An element of `HINTS4` or `HINTS6`: the records of the last four flows whose keys fall here, each with
/// some bits of its key; a new one comes first, and the last one goes.
///
/// It spares what the index says, which costs three cache lines and pages of a much larger table. What
/// it says has to be proved: only the record knows whose it is. So nobody minds one that two write at once.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hints([u32; 4]);

/// Where a flow's key is in `HINTS4` or `HINTS6`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HintPlace {
    /// The element.
    pub index: u32,
    /// In the bits that are not the record's: tells keys of one element apart.
    tag: u32,
    /// The bits that are the record's.
    ids: u32,
}

impl Hints {
    /// The bits that the records' ids of a table for so many flows take.
    pub const fn ids(flows: u32) -> u32 {
        flows.next_power_of_two() - 1
    }

    /// How many elements there are for a table of so many flows: with all of them known, of one key in
    /// fifty four others are in its element.
    pub const fn elements(flows: u32) -> u32 {
        Self::ids(flows) + 1
    }

    /// The record of the key with this place, perhaps; one that there is not, if it is not here.
    #[inline(always)]
    pub const fn at(self, place: HintPlace) -> FlowId {
        let [first, second, third, fourth] = self.0;
        let found = if place.is_of(first) {
            first
        } else if place.is_of(second) {
            second
        } else if place.is_of(third) {
            third
        } else if place.is_of(fourth) {
            fourth
        } else {
            return FlowId(u32::MAX);
        };
        FlowId(found & place.ids)
    }

    /// With the record of the key with this place.
    #[inline(always)]
    #[must_use]
    pub const fn with(self, place: HintPlace, id: FlowId) -> Self {
        let [first, second, third, fourth] = self.0;
        let new = place.tag | (id.0 & place.ids);
        // Its own goes, and else the last.
        Self(if place.is_of(first) {
            [new, second, third, fourth]
        } else if place.is_of(second) {
            [new, first, third, fourth]
        } else if place.is_of(third) {
            [new, first, second, fourth]
        } else {
            [new, first, second, third]
        })
    }
}

impl HintPlace {
    /// Whether a hint is of a key with this place.
    #[inline(always)]
    const fn is_of(self, hint: u32) -> bool {
        (hint ^ self.tag) & !self.ids == 0
    }
}

impl<A: Addr> FlowKey<A> {
    /// Where it is among the hints, where records' ids take these bits ([`Hints::ids`]).
    #[inline(always)]
    pub fn hint_place(&self, ids: u32) -> HintPlace {
        let ports = u64::from(self.src_port.raw()) << 16 | u64::from(self.dst_port.raw());
        let kind = u64::from(self.proto.0) << 1 | u64::from(self.direction);
        let hash = mixed(mixed(kind << 32 | ports, self.src), self.dst);
        HintPlace {
            index: place(hash, ids.wrapping_add(1)),
            tag: hash as u32 & !ids,
            ids,
        }
    }
}

map_types! { Hints = 16 }

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::net::{Be16, Proto, V4};

    fn key(index: u32, direction: u8) -> FlowKey<V4> {
        let [.., a, b] = (index / 64).to_be_bytes();
        let client = V4::from_octets([10, 0, a, b]);
        let port = |port: u16| Be16::from_host(port);
        let service = (V4::from_octets([192, 0, 2, 1]), port(30_080));
        let src = (client, port(40_000 + (index % 64) as u16));
        FlowKey::new(direction, Proto::TCP, src, service)
    }

    #[test]
    fn an_element_leads_to_the_last_four_keys_records() {
        let place = |tag: u32| HintPlace {
            index: 0,
            tag: tag << 17,
            ids: Hints::ids(131_072),
        };
        let nobody = FlowId(u32::MAX);
        let mut hints = Hints::default();
        let mut known: Vec<(u32, FlowId)> = Vec::new();
        assert_eq!(hints.at(place(1)), nobody);
        for (id, tag) in [1, 2, 1, 3, 4, 2, 3, 5, 1, 6, 6, 4, 3, 5]
            .into_iter()
            .enumerate()
        {
            let id = FlowId(131_071 - id as u32);
            hints = hints.with(place(tag), id);
            known.retain(|(known, _)| *known != tag);
            known.insert(0, (tag, id));
            known.truncate(4);
            for tag in 1..8 {
                let record = known.iter().find(|(known, _)| *known == tag);
                let record = record.map_or(nobody, |(_, id)| *id);
                assert_eq!(hints.at(place(tag)), record, "{tag} of {hints:x?}");
            }
        }
    }

    #[test]
    fn records_of_all_tables_are_led_to() {
        for flows in [1, 1_003, 131_072, 131_073, crate::limits::MOST_FLOWS] {
            let ids = Hints::ids(flows);
            let place = key(0, FlowKey::<V4>::REPLY).hint_place(ids);
            let last = FlowId(flows - 1);
            assert_eq!(Hints::default().with(place, last).at(place), last);
        }
    }

    #[test]
    fn neighbouring_keys_are_spread_over_the_elements() {
        let mut elements: HashMap<u32, u32> = HashMap::new();
        for index in 0..4_096 {
            for direction in [FlowKey::<V4>::REQUEST, FlowKey::<V4>::REPLY] {
                let place = key(index, direction).hint_place(Hints::ids(131_072));
                *elements.entry(place.index).or_default() += 1;
            }
        }
        // By chance five of 8,192 keys meet in one of 131,072 elements not once in a thousand tests.
        let crowded = elements.values().max();
        assert!(crowded < Some(&5), "{crowded:?}");
        assert!(elements.len() > 7_800, "{}", elements.len());
    }
}
