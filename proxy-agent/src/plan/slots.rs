//! What a block of slots holds: the difference between algorithms.
//!
//! Invariant: a block depends on the addresses, ports and weights of its backends alone, so that
//! every node that selects the same ones has the same block, but for ids.

use penstock_common::{Addr, Algorithm, Be16};

/// Sizes of Maglev's tables: primes, each about twice the one before.
const TABLE_SIZES: [u32; 12] = [
    251, 509, 1_021, 2_039, 4_093, 8_191, 16_381, 32_749, 65_521, 131_071, 262_139, 524_287,
];
/// How many slots of a table a backend has at least, as long as there is a table so large: 5 % is
/// then the most that one backend gets beyond another.
const SLOTS_PER_BACKEND: u32 = 20;
/// How many slots of a weighted block a backend has on average at most ...
const WEIGHTED_SLOTS_PER_BACKEND: u64 = 4;
/// ... and how many the whole block may have however few backends there are.
const WEIGHTED_SLOTS: u64 = 1_024;

/// A backend that new connections may get.
#[derive(Clone, Copy, Debug)]
pub struct Member<A> {
    /// Its address.
    pub addr: A,
    /// Its port.
    pub port: Be16,
    /// At least 1.
    pub weight: u16,
}

/// Which of the members, by their places, each slot of the block is given to.
pub fn fill<A: Addr>(algorithm: Algorithm, members: &[Member<A>]) -> Vec<usize> {
    match algorithm {
        Algorithm::Random | Algorithm::RoundRobin | Algorithm::SourceHash => {
            (0..members.len()).collect()
        }
        Algorithm::Maglev => maglev(members),
        Algorithm::Weighted | Algorithm::LeastConnections => weighted(members),
    }
}

/// Each member as often as its weight says, relative to the others'.
///
/// Exact as long as the block stays small; else rounded to the nearest slot, and to one at least.
fn weighted<A>(members: &[Member<A>]) -> Vec<usize> {
    let weights = || members.iter().map(|member| u64::from(member.weight));
    let divisor = weights().fold(0, gcd).max(1);
    let total = (weights().sum::<u64>() / divisor).max(1);
    let room = WEIGHTED_SLOTS.max(WEIGHTED_SLOTS_PER_BACKEND * members.len() as u64);
    let slots = |weight: u64| {
        let exact = weight / divisor;
        let slots = if total <= room {
            exact
        } else {
            (exact * room + total / 2) / total
        };
        slots.max(1) as usize
    };
    weights()
        .enumerate()
        .flat_map(|(place, weight)| std::iter::repeat_n(place, slots(weight)))
        .collect()
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Maglev's table (Eisenbud et al., NSDI 2016, 3.4): members take turns, each takes the next free
/// slot of an order of its own.
fn maglev<A: Addr>(members: &[Member<A>]) -> Vec<usize> {
    let Some(size) = table_size(members.len()) else {
        return (0..members.len()).collect();
    };
    let length = size as usize;
    let mut table: Vec<Option<usize>> = vec![None; length];
    let mut orders: Vec<Order> = members
        .iter()
        .map(|member| Order::of(member, size))
        .collect();
    let mut free = length;
    while free > 0 {
        for (place, order) in orders.iter_mut().enumerate().take(free) {
            // A size that is prime lets every order meet every slot.
            for slot in order {
                if let Some(slot @ None) = table.get_mut(slot) {
                    *slot = Some(place);
                    break;
                }
            }
        }
        free = free.saturating_sub(orders.len());
    }
    table.into_iter().flatten().collect()
}

/// The size of a table for so many members; none where there are no members, or more than the
/// largest table has slots.
fn table_size(members: usize) -> Option<u32> {
    let members = u32::try_from(members).ok().filter(|count| *count > 0)?;
    let ample = members.saturating_mul(SLOTS_PER_BACKEND);
    let largest = TABLE_SIZES.last().filter(|size| **size >= members);
    TABLE_SIZES
        .iter()
        .find(|size| **size >= ample)
        .or(largest)
        .copied()
}

/// The order in which a member wants a table's slots.
struct Order {
    next: u64,
    skip: u64,
    size: u64,
}

impl Order {
    fn of<A: Addr>(member: &Member<A>, size: u32) -> Self {
        let size = u64::from(size);
        let name = member
            .addr
            .words()
            .into_iter()
            .map(u32::from_be)
            .chain([u32::from(member.port.to_host())])
            .fold(0, |hash, word| mix(hash ^ u64::from(word)));
        Self {
            next: name % size,
            skip: mix(name) % (size - 1) + 1,
            size,
        }
    }
}

impl Iterator for Order {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let slot = self.next;
        self.next = (slot + self.skip) % self.size;
        Some(slot as usize)
    }
}

/// One step of SplitMix64 (Steele et al., OOPSLA 2014).
fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use penstock_common::V4;
    use proptest::prelude::*;

    use super::*;

    fn members(hosts: impl IntoIterator<Item = u16>) -> Vec<Member<V4>> {
        weighing(hosts.into_iter().map(|host| (host, 1)))
    }

    fn weighing(hosts: impl IntoIterator<Item = (u16, u16)>) -> Vec<Member<V4>> {
        let member = |(host, weight): (u16, u16)| {
            let [high, low] = host.to_be_bytes();
            Member {
                addr: V4::from_octets([10, 244, high, low]),
                port: Be16::from_host(8080),
                weight,
            }
        };
        hosts.into_iter().map(member).collect()
    }

    /// Whom each slot names.
    fn table(members: &[Member<V4>]) -> Vec<V4> {
        maglev(members)
            .iter()
            .map(|place| members[*place].addr)
            .collect()
    }

    fn counts<T: Ord>(slots: impl IntoIterator<Item = T>) -> BTreeMap<T, usize> {
        let mut counts = BTreeMap::new();
        for slot in slots {
            *counts.entry(slot).or_default() += 1;
        }
        counts
    }

    #[test]
    fn sizes_are_primes() {
        for size in TABLE_SIZES {
            let mut divisors = (2..).take_while(|divisor| divisor * divisor <= size);
            assert!(divisors.all(|divisor| size % divisor != 0), "{size}");
        }
        assert_eq!(table_size(0), None);
        assert_eq!(table_size(12), Some(251));
        assert_eq!(table_size(13), Some(509));
        assert_eq!(table_size(524_287), Some(524_287));
        assert_eq!(table_size(524_288), None);
    }

    #[test]
    fn a_member_that_goes_moves_few_others_clients() {
        for count in [2, 5, 12, 100] {
            let before = table(&members(0..count));
            for gone in [0, count / 2, count - 1] {
                let after = table(&members((0..count).filter(|host| *host != gone)));
                let gone = members([gone])[0].addr;
                assert_eq!(before.len(), after.len(), "the size is the same");
                let moved = before
                    .iter()
                    .zip(&after)
                    .filter(|(old, new)| **old != gone && old != new)
                    .count();
                // The paper sees 1 to 2 % in tables a hundred times as large as members are many;
                // hashing anew would move nearly all.
                assert!(
                    moved * 8 < before.len(),
                    "{count}: {moved} of {}",
                    before.len()
                );
            }
        }
    }

    #[test]
    fn this_table_is_every_nodes_and_versions() {
        // Nodes of different versions must agree: if this fails, clients move at an upgrade.
        let table = maglev(&members([1, 2, 3]));
        assert_eq!(
            table[..16],
            [0, 1, 1, 2, 1, 2, 2, 1, 2, 1, 2, 0, 1, 1, 2, 1]
        );
    }

    proptest! {
        #[test]
        fn members_share_a_table_evenly(hosts in proptest::collection::btree_set(any::<u16>(), 1..400)) {
            let members = members(hosts);
            let slots = maglev(&members);
            prop_assert_eq!(Some(slots.len() as u32), table_size(members.len()));
            let counts = counts(slots);
            prop_assert_eq!(counts.len(), members.len());
            let (least, most) = (counts.values().min(), counts.values().max());
            prop_assert!(most.zip(least).is_some_and(|(most, least)| most - least <= 1));
        }

        #[test]
        fn weights_are_proportions(
            weights in proptest::collection::vec(1..=u16::MAX, 1..300),
        ) {
            let members = weighing((0..).zip(weights.iter().copied()));
            let slots = weighted(&members);
            let room = WEIGHTED_SLOTS.max(WEIGHTED_SLOTS_PER_BACKEND * members.len() as u64) as usize;
            // Whoever would have none has one, and rounding adds half a slot each.
            prop_assert!(slots.len() <= room + members.len());
            let counts = counts(slots.iter().copied());
            let total: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
            for (place, weight) in weights.iter().enumerate() {
                let exact = u64::from(*weight) as f64 * room as f64 / total as f64;
                let given = counts[&place] as f64;
                if slots.len() + members.len() >= room {
                    prop_assert!((given - exact.max(1.0)).abs() <= 1.0, "{given} for {exact}");
                }
            }
        }

        #[test]
        fn small_weights_are_exact(weights in proptest::collection::vec(1..20_u16, 1..50)) {
            let slots = weighted(&weighing((0..).zip(weights.iter().copied())));
            let counts = counts(slots);
            let least = weights.iter().enumerate().map(|(place, weight)| {
                counts[&place] as f64 / f64::from(*weight)
            });
            let ratios: Vec<f64> = least.collect();
            prop_assert!(ratios.iter().all(|ratio| (ratio - ratios[0]).abs() < 1e-9), "{ratios:?}");
        }
    }
}
