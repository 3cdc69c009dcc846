//! Internet checksums, changed rather than recomputed (RFC 1624).
//!
//! A one's complement sum does not care about byte order as long as all of it is summed alike
//! (RFC 1071, 2.B): words are summed as they lie in memory and never converted.

use penstock_common::{Addr, Be16};

/// The difference that a change makes to a one's complement sum.
#[derive(Clone, Copy, Default)]
pub struct Delta(u64);

impl Delta {
    /// Adds the replacement of one 32-bit word by another.
    #[inline(always)]
    #[must_use]
    pub fn word(self, old: u32, new: u32) -> Self {
        Self(self.0 + u64::from(!old) + u64::from(new))
    }

    /// Adds the replacement of one address by another.
    #[inline(always)]
    #[must_use]
    pub fn addr<A: Addr>(self, old: A, new: A) -> Self {
        let ([a, b, c, d], [e, f, g, h]) = (old.words(), new.words());
        self.word(a, e).word(b, f).word(c, g).word(d, h)
    }

    /// Adds the replacement of one port by another.
    #[inline(always)]
    #[must_use]
    pub fn port(self, old: Be16, new: Be16) -> Self {
        Self(self.0 + u64::from(!old.raw()) + u64::from(new.raw()))
    }

    /// Adds what another change makes.
    #[inline(always)]
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// As the kernel's helpers take it: a 32-bit one's complement number.
    #[inline(always)]
    pub fn to_wsum(self) -> u32 {
        let once = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        ((once & 0xffff_ffff) + (once >> 32)) as u32
    }

    /// What a checksum becomes by this change.
    #[inline(always)]
    pub fn apply(self, checksum: u16) -> u16 {
        !fold(u64::from(!checksum) + u64::from(self.to_wsum()))
    }
}

/// A sum of 16-bit or 32-bit words in 16 bits.
#[inline(always)]
pub fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + ((sum >> 16) & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// The sum of the words of an address.
#[inline(always)]
pub fn sum_addr<A: Addr>(addr: A) -> u64 {
    let [a, b, c, d] = addr.words();
    u64::from(a) + u64::from(b) + u64::from(c) + u64::from(d)
}

/// The sum of a pseudo header (RFC 9293, 3.1; RFC 8200, 8.1).
#[inline(always)]
pub fn pseudo_header<A: Addr>(src: A, dst: A, proto: u8, length: u16) -> u64 {
    sum_addr(src) + sum_addr(dst) + u64::from(u16::from(proto).to_be()) + u64::from(length.to_be())
}

#[cfg(test)]
mod tests {
    use penstock_common::V4;

    use super::*;

    fn full(words: &[u16]) -> u16 {
        !fold(words.iter().map(|word| u64::from(*word)).sum())
    }

    #[test]
    fn a_changed_checksum_equals_a_recomputed_one() {
        let mut state = 0x1234_5678_9abc_def0_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for _ in 0..200_000 {
            let mut words: [u16; 6] = core::array::from_fn(|_| next() as u16);
            let before = full(&words);
            let old = V4::from_raw(u32::from(words[1]) | u32::from(words[2]) << 16);
            let new = V4::from_raw(next() as u32);
            let (old_port, new_port) = (Be16::from_raw(words[4]), Be16::from_raw(next() as u16));
            words[1] = new.raw() as u16;
            words[2] = (new.raw() >> 16) as u16;
            words[4] = new_port.raw();
            let after = Delta::default()
                .addr(old, new)
                .port(old_port, new_port)
                .apply(before);
            // Both zeroes of one's complement are the same number.
            assert_eq!(after % 0xffff, full(&words) % 0xffff);
        }
    }
}
