//! Ranges of `SLOTS`: one contiguous block a service port.
//!
//! Invariant: every slot is free, in quarantine or in exactly one block.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use penstock_common::SlotRange;

/// Hands out blocks, best fit.
#[derive(Debug, Clone)]
pub struct Blocks {
    /// Free intervals: base to length, never adjacent.
    free: BTreeMap<u32, u32>,
    /// The same by length.
    by_length: BTreeSet<(u32, u32)>,
    quarantine: VecDeque<(Duration, SlotRange)>,
    free_slots: u32,
}

impl Blocks {
    /// All slots free.
    pub fn new(slots: u32) -> Self {
        let mut blocks = Self {
            free: BTreeMap::new(),
            by_length: BTreeSet::new(),
            quarantine: VecDeque::new(),
            free_slots: 0,
        };
        blocks.insert(SlotRange {
            base: 0,
            count: slots,
        });
        blocks
    }

    /// Takes a range that the kernel already uses; false if part of it is taken.
    pub fn reserve(&mut self, range: SlotRange) -> bool {
        if range.count == 0 {
            return true;
        }
        let Some((&base, &length)) = self.free.range(..=range.base).next_back() else {
            return false;
        };
        let (end, range_end) = (base + length, range.base.saturating_add(range.count));
        if range_end > end {
            return false;
        }
        self.remove(base, length);
        self.insert(SlotRange {
            base,
            count: range.base - base,
        });
        self.insert(SlotRange {
            base: range_end,
            count: end - range_end,
        });
        true
    }

    /// A block of `count` slots.
    pub fn allocate(&mut self, count: u32) -> Option<SlotRange> {
        if count == 0 {
            return Some(SlotRange::default());
        }
        let &(length, base) = self.by_length.range((count, 0)..).next()?;
        self.remove(base, length);
        self.insert(SlotRange {
            base: base + count,
            count: length - count,
        });
        Some(SlotRange { base, count })
    }

    /// Takes a block back that no program can have met.
    pub fn release(&mut self, range: SlotRange) {
        self.insert(range);
    }

    /// Takes a block back at `now` that programs may be reading until the grace period has passed.
    pub fn retire(&mut self, range: SlotRange, now: Duration) {
        if range.count > 0 {
            self.quarantine.push_back((now, range));
        }
    }

    /// Frees what was retired at least `grace` ago.
    pub fn settle(&mut self, now: Duration, grace: Duration) {
        while let Some((since, range)) = self.quarantine.front().copied() {
            if now.saturating_sub(since) < grace {
                break;
            }
            self.quarantine.pop_front();
            self.insert(range);
        }
    }

    /// How many slots are free.
    pub fn free_slots(&self) -> u32 {
        self.free_slots
    }

    /// How many slots wait for their grace period.
    pub fn retired_slots(&self) -> u32 {
        self.quarantine.iter().map(|(_, range)| range.count).sum()
    }

    fn remove(&mut self, base: u32, length: u32) {
        self.free.remove(&base);
        self.by_length.remove(&(length, base));
        self.free_slots -= length;
    }

    fn insert(&mut self, range: SlotRange) {
        let SlotRange {
            mut base,
            mut count,
        } = range;
        if count == 0 {
            return;
        }
        if let Some((&before, &length)) = self.free.range(..base).next_back()
            && before + length == base
        {
            self.remove(before, length);
            base = before;
            count += length;
        }
        if let Some(&length) = self.free.get(&(base + count)) {
            self.remove(base + count, length);
            count += length;
        }
        self.free.insert(base, count);
        self.by_length.insert((count, base));
        self.free_slots += count;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GRACE: Duration = Duration::from_secs(1);

    proptest! {
        #[test]
        fn every_slot_is_in_one_place(steps in proptest::collection::vec((0..3, 1u32..40), 1..200)) {
            let mut blocks = Blocks::new(500);
            let mut held: Vec<SlotRange> = Vec::new();
            let mut now = Duration::ZERO;
            for (step, number) in steps {
                now += Duration::from_millis(300);
                match step {
                    0 => held.extend(blocks.allocate(number)),
                    1 if !held.is_empty() => {
                        let range = held.swap_remove(number as usize % held.len());
                        blocks.retire(range, now);
                    }
                    _ => blocks.settle(now, GRACE),
                }
                let mut used = vec![false; 500];
                for range in &held {
                    for slot in range.base..range.base + range.count {
                        prop_assert!(!used[slot as usize], "slot {slot} is in two blocks");
                        used[slot as usize] = true;
                    }
                }
                let held_slots: u32 = held.iter().map(|range| range.count).sum();
                prop_assert_eq!(blocks.free_slots() + blocks.retired_slots() + held_slots, 500);
            }
            for range in held {
                blocks.release(range);
            }
            blocks.settle(now + GRACE, GRACE);
            // Everything is one interval again.
            prop_assert_eq!(blocks.allocate(500), Some(SlotRange { base: 0, count: 500 }));
        }

        #[test]
        fn reserved_ranges_are_not_given_out(ranges in proptest::collection::vec((0u32..100, 1u32..10), 1..20)) {
            let mut blocks = Blocks::new(100);
            let mut used = [false; 100];
            for (base, count) in ranges {
                let wanted = base as usize..(base + count) as usize;
                let is_free = wanted.end <= 100 && !used[wanted.clone()].contains(&true);
                prop_assert_eq!(blocks.reserve(SlotRange { base, count }), is_free);
                if is_free {
                    used[wanted].fill(true);
                }
            }
            while let Some(range) = blocks.allocate(1) {
                prop_assert!(!used[range.base as usize]);
                used[range.base as usize] = true;
            }
            prop_assert!(!used.contains(&false));
        }
    }

    #[test]
    fn a_retired_block_waits_for_its_grace_period() {
        let mut blocks = Blocks::new(10);
        let range = blocks.allocate(10).expect("all are free");
        blocks.retire(range, Duration::from_secs(5));
        blocks.settle(Duration::from_millis(5_900), GRACE);
        assert_eq!(blocks.allocate(1), None);
        blocks.settle(Duration::from_secs(6), GRACE);
        assert!(blocks.allocate(10).is_some());
    }
}
