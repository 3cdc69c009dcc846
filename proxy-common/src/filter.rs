//! Which addresses programs need not look up: a Bloom filter of one hash function.
//!
//! Most packets are nobody's whom the tables know, and what is left of a look-up that finds nothing is
//! most of what such a packet costs. Invariant: the bit of each address in `ADDRESSES4` and `ADDRESSES6`
//! is set for as long as it is there, from before on and until after; others' may be.

use crate::{
    limits,
    net::{Addr, mixed, place},
};

/// A bit of `ADDRESS_FILTER4` or `ADDRESS_FILTER6`, which addresses share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FilterBit(u32);

impl FilterBit {
    /// How many elements hold them.
    pub const ELEMENTS: u32 = limits::FILTERED / u64::BITS;

    /// An address's.
    #[inline(always)]
    pub fn of<A: Addr>(addr: A) -> Self {
        Self(place(mixed(0, addr), limits::FILTERED))
    }

    /// The element that holds it.
    #[inline(always)]
    pub const fn element(self) -> u32 {
        self.0 / u64::BITS
    }

    /// Itself in there.
    #[inline(always)]
    pub const fn mask(self) -> u64 {
        1 << (self.0 % u64::BITS)
    }
}
