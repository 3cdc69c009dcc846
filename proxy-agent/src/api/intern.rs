//! Strings that repeat, kept once.

use std::{collections::HashSet, sync::Arc};

/// Shared strings. What nobody else holds is dropped once in a while.
#[derive(Debug, Default)]
pub struct Interner {
    known: HashSet<Arc<str>>,
    limit: usize,
}

impl Interner {
    /// The shared form of a string.
    pub fn get(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.known.get(text) {
            return known.clone();
        }
        if self.known.len() >= self.limit {
            self.known.retain(|text| Arc::strong_count(text) > 1);
            self.limit = (self.known.len() * 2).max(1_024);
        }
        let text: Arc<str> = text.into();
        self.known.insert(text.clone());
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_strings_are_one() {
        let mut interner = Interner::default();
        assert!(Arc::ptr_eq(
            &interner.get("zone-a"),
            &interner.get("zone-a")
        ));
    }

    #[test]
    fn unused_strings_do_not_pile_up() {
        let mut interner = Interner::default();
        for number in 0..100_000 {
            interner.get(&number.to_string());
        }
        assert!(interner.known.len() <= 1_024);
    }
}
