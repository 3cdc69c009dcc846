//! Where packets of a flow went a moment ago, beside what is counted of them.

use crate::{net::Addr, plain::map_types};

/// The interface and the neighbour that packets of a flow's direction left by and for.
///
/// Any CPU writes it, and none waits for another: it is believed if [`Self::check`] is right, over
/// all that it says, what it is said of, and `CHANGED` before it was asked for. Whatever else is
/// there, another flow's or half of two, says nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hop {
    /// [`Said::check`].
    pub check: u64,
    /// The interface, with [`Hop::TUNNEL`]; 0 where such packets are not XDP's to send.
    pub ifindex: u32,
    /// When the kernel was asked, in seconds since boot.
    pub noted_secs: u32,
    /// The neighbour's Ethernet address and the interface's own, as they lie in a frame.
    pub ethernet: [u32; 3],
    /// How long a packet may be there, in bytes, its own IP header included.
    pub mtu: u32,
}

/// What a [`Hop`] is said of.
pub struct Said<A> {
    /// When the agent last heard that something changed on which it depends.
    pub changed: u64,
    /// The interface that packets come in by.
    pub ifindex: u32,
    /// What they begin with: the Ethernet address that they come for, and half of their sender's, which
    /// does not count.
    pub receiver: [u32; 2],
    /// Whom they come for.
    pub to: A,
    /// Source and destination once they are translated.
    pub ends: (A, A),
}

/// One half of a product of NH (Black et al., UMAC, CRYPTO 1999): without a chain from one product to
/// the next, which would take longer than all of them.
#[inline(always)]
fn product(index: u32, a: u32, b: u32) -> u64 {
    /// Odd, without a pattern: 2^32 divided by the golden ratio, and by the square root of 2.
    const FACTORS: (u32, u32) = (0x9e37_79b9, 0xb504_f333);
    let turn = 2 * index + 1;
    let a = a.wrapping_add(FACTORS.0.wrapping_mul(turn));
    let b = b.wrapping_add(FACTORS.1.wrapping_mul(turn));
    u64::from(a) * u64::from(b)
}

impl<A: Addr> Said<A> {
    /// What [`Hop::check`] is of a hop that is said of this.
    #[inline(always)]
    pub fn check(&self, hop: &Hop) -> u64 {
        /// The half of the second word that is still the receiver's.
        const RECEIVER: u32 = u32::from_ne_bytes([0xff, 0xff, 0, 0]);
        let [first, second] = self.receiver;
        let [a, b, c] = hop.ethernet;
        let mut sum = product(0, self.changed as u32, (self.changed >> 32) as u32)
            .wrapping_add(product(1, first, second & RECEIVER))
            .wrapping_add(product(2, self.ifindex, hop.ifindex))
            .wrapping_add(product(3, hop.noted_secs, hop.mtu))
            .wrapping_add(product(4, a, b))
            .wrapping_add(product(5, c, size_of::<A>() as u32));
        let mut index = 6;
        for addr in [&self.to, &self.ends.0, &self.ends.1] {
            let [a, b, c, d] = addr.words();
            sum = sum.wrapping_add(product(index, a, b));
            if size_of::<A>() > 4 {
                sum = sum.wrapping_add(product(index + 1, c, d));
            }
            index += 2;
        }
        sum
    }
}

impl Hop {
    /// For how long one holds at most, in seconds of a coarse clock.
    pub const LASTS_SECS: u32 = 2;
    /// The bit of an interface's index, of which none has it, that says: through a tunnel, which these
    /// Ethernet addresses are for.
    pub const TUNNEL: u32 = 1 << 31;
    /// None that holds.
    pub const NONE: Self = Self {
        check: 0,
        ifindex: 0,
        noted_secs: 0,
        ethernet: [0; 3],
        mtu: 0,
    };

    /// Whether packets leave through a tunnel.
    #[inline(always)]
    pub fn is_tunnel(&self) -> bool {
        self.ifindex & Self::TUNNEL != 0
    }

    /// The interface that packets leave by.
    #[inline(always)]
    pub fn leaves_by(&self) -> u32 {
        self.ifindex & !Self::TUNNEL
    }

    /// Whether it holds for this.
    #[inline(always)]
    pub fn holds<A: Addr>(&self, said: &Said<A>, now_secs: u32) -> bool {
        self.check == said.check(self) && now_secs.wrapping_sub(self.noted_secs) < Self::LASTS_SECS
    }
}

map_types! { Hop = 32 }

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{V4, V6};

    fn said<A>(to: A, ends: (A, A)) -> Said<A> {
        Said {
            changed: 1 << 40,
            ifindex: 2,
            receiver: [0x0102_0304, 0x0506_0708],
            to,
            ends,
        }
    }

    fn noted<A: Addr>(said: &Said<A>) -> Hop {
        let mut hop = Hop {
            check: 0,
            ifindex: 2,
            noted_secs: 100,
            ethernet: [1, 2, 3],
            mtu: 1_500,
        };
        hop.check = said.check(&hop);
        hop
    }

    /// Changes each bit of some words in turn.
    fn each_bit(count: usize, mut look: impl FnMut(usize, u32)) {
        for word in 0..count {
            for bit in 0..32 {
                look(word, 1 << bit);
            }
        }
    }

    #[test]
    fn it_holds_for_what_it_is_said_of_and_for_two_seconds() {
        let said = said(V4::from_octets([10, 0, 0, 1]), Default::default());
        let hop = noted(&said);
        assert!(hop.holds(&said, 100));
        assert!(hop.holds(&said, 101));
        assert!(!hop.holds(&said, 102));
        assert!(!hop.holds(&said, 99));
        assert!(!Hop::default().holds(&said, 0));
    }

    #[test]
    fn each_bit_counts_that_it_depends_on() {
        let v6 = |words: [u32; 4]| V6::from_raw(words);
        let (a, b, c) = (v6([1, 2, 3, 4]), v6([5, 6, 7, 8]), v6([9, 10, 11, 12]));
        let hop = noted(&said(a, (b, c)));
        each_bit(12, |word, bit| {
            let mut words = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]];
            words[word / 4][word % 4] ^= bit;
            let [a, b, c] = words.map(v6);
            assert!(!hop.holds(&said(a, (b, c)), 100), "{word} {bit:x}");
        });
        each_bit(5, |word, bit| {
            let mut other = said(a, (b, c));
            match word {
                0 => other.changed ^= u64::from(bit),
                1 => other.changed ^= u64::from(bit) << 32,
                2 => other.ifindex ^= bit,
                word => other.receiver[word - 3] ^= bit,
            }
            let is_senders = word == 4 && bit & u32::from_ne_bytes([0xff, 0xff, 0, 0]) == 0;
            assert_eq!(hop.holds(&other, 100), is_senders, "{word} {bit:x}");
        });
        each_bit(6, |word, bit| {
            let mut other = hop;
            match word {
                0 => other.ifindex ^= bit,
                1 => other.noted_secs ^= bit,
                2 => other.mtu ^= bit,
                word => other.ethernet[word - 3] ^= bit,
            }
            let now = other.noted_secs;
            assert!(!other.holds(&said(a, (b, c)), now), "{word} {bit:x}");
        });
    }

    #[test]
    fn ends_are_not_mixed_up() {
        let [a, b, c] = [1, 2, 3].map(|last| V4::from_octets([10, 0, 0, last]));
        let hop = noted(&said(a, (b, c)));
        for (to, ends) in [
            (a, (c, b)),
            (b, (a, c)),
            (c, (b, a)),
            (a, (b, b)),
            (a, (a, c)),
        ] {
            assert!(!hop.holds(&said(to, ends), 100), "{to} {ends:?}");
        }
    }
}
