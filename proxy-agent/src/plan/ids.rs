//! Numbers for services and backends.
//!
//! Invariant: an id is free, in quarantine or in use, and each time it is put to use anew its
//! generation is another, so that whoever remembers (id, generation) knows what it remembers.

use std::{
    collections::{BTreeSet, VecDeque},
    time::Duration,
};

/// Hands out numbers of service ports, each once: what is remembered of one, in affinity or in counts,
/// is never taken for another's.
#[derive(Debug, Clone)]
pub struct Serial {
    last: u32,
}

impl Serial {
    /// Numbers above `last`, the highest that anything in the kernel names.
    pub fn after(last: u32) -> Self {
        Self { last }
    }

    /// The next one that is not in use, which counts where all 4,294,967,294 were handed out.
    pub fn next(&mut self, is_used: impl Fn(u32) -> bool) -> u32 {
        loop {
            self.last = self.last.checked_add(1).unwrap_or(1);
            if !is_used(self.last) {
                return self.last;
            }
        }
    }
}

/// Hands ids out, lowest first, each with the generation of its new life.
#[derive(Debug, Clone)]
pub struct Ids {
    limit: u32,
    /// No id from here on was ever used.
    fresh: u32,
    free: BTreeSet<u32>,
    quarantine: VecDeque<(Duration, u32)>,
    generations: Vec<u32>,
}

impl Ids {
    /// Ids below `limit`, from `first` on, all free.
    pub fn new(first: u32, limit: u32) -> Self {
        Self {
            limit,
            fresh: first,
            free: BTreeSet::new(),
            quarantine: VecDeque::new(),
            generations: Vec::new(),
        }
    }

    /// Takes over what the kernel remembers of an id: its generation, and whether it is in use.
    ///
    /// Ids are best given in ascending order.
    pub fn restore(&mut self, id: u32, generation: u32, is_used: bool) {
        if id >= self.limit {
            return;
        }
        while self.fresh <= id {
            self.free.insert(self.fresh);
            self.fresh += 1;
        }
        self.remember(id, generation);
        if is_used {
            self.free.remove(&id);
        } else {
            self.free.insert(id);
        }
    }

    /// An id and its generation, which is never 0.
    pub fn allocate(&mut self) -> Option<(u32, u32)> {
        let id = match self.free.pop_first() {
            Some(id) => id,
            None if self.fresh < self.limit => {
                self.fresh += 1;
                self.fresh - 1
            }
            None => return None,
        };
        let generation = self.generation(id).wrapping_add(1).max(1);
        self.remember(id, generation);
        Some((id, generation))
    }

    /// Takes an id back that was never written anywhere.
    pub fn release(&mut self, id: u32) {
        self.free.insert(id);
    }

    /// Takes an id back at `now` that programs may have met.
    pub fn retire(&mut self, id: u32, now: Duration) {
        self.quarantine.push_back((now, id));
    }

    /// Frees what was retired at least `grace` ago.
    pub fn settle(&mut self, now: Duration, grace: Duration) {
        while let Some((since, id)) = self.quarantine.front().copied() {
            if now.saturating_sub(since) < grace {
                break;
            }
            self.quarantine.pop_front();
            self.free.insert(id);
        }
    }

    /// How many ids are in use.
    pub fn used(&self) -> usize {
        self.fresh as usize - self.free.len() - self.quarantine.len()
    }

    fn generation(&self, id: u32) -> u32 {
        self.generations.get(id as usize).copied().unwrap_or(0)
    }

    fn remember(&mut self, id: u32, generation: u32) {
        let index = id as usize;
        if self.generations.len() <= index {
            self.generations.resize(index + 1, 0);
        }
        if let Some(known) = self.generations.get_mut(index) {
            *known = generation;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use proptest::prelude::*;

    use super::*;

    const GRACE: Duration = Duration::from_secs(1);

    proptest! {
        #[test]
        fn no_id_is_in_use_twice_and_no_life_repeats(steps in proptest::collection::vec((0..3, 0usize..64), 1..300)) {
            let mut ids = Ids::new(0, 20);
            let mut held: HashMap<u32, u32> = HashMap::new();
            let mut lives = HashSet::new();
            let mut now = Duration::ZERO;
            for (step, number) in steps {
                now += Duration::from_millis(400);
                match step {
                    0 => {
                        if let Some((id, generation)) = ids.allocate() {
                            prop_assert!(lives.insert((id, generation)));
                            prop_assert!(held.insert(id, generation).is_none());
                        } else {
                            prop_assert!(held.len() + ids.quarantine.len() == 20);
                        }
                    }
                    1 if !held.is_empty() => {
                        let id = *held.keys().nth(number % held.len()).expect("not empty");
                        held.remove(&id);
                        ids.retire(id, now);
                    }
                    _ => ids.settle(now, GRACE),
                }
                prop_assert_eq!(ids.used(), held.len());
            }
        }
    }

    #[test]
    fn no_number_is_handed_out_twice_until_all_were() {
        let mut serial = Serial::after(7);
        assert_eq!([serial.next(|_| false), serial.next(|_| false)], [8, 9]);
        let mut serial = Serial::after(u32::MAX - 1);
        let mut next = || serial.next(|id| id <= 3);
        assert_eq!([next(), next()], [u32::MAX, 4]);
    }

    #[test]
    fn a_restored_id_keeps_its_generation() {
        let mut ids = Ids::new(0, 10);
        ids.restore(2, 7, true);
        ids.restore(1, 4, false);
        assert_eq!(ids.used(), 1);
        assert_eq!(ids.allocate(), Some((0, 1)));
        assert_eq!(ids.allocate(), Some((1, 5)));
        assert_eq!(ids.allocate(), Some((3, 1)));
    }
}
