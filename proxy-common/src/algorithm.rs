//! How a service spreads new connections over its backends.
//!
//! Every algorithm is an index into the block of slots that a frontend covers. Programs know four
//! indexes (by chance, by turn, by client, by load); the rest is what the agent writes into the block.

use crate::{net::Addr, service::FrontendFlags};

/// An algorithm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Algorithm {
    /// Each backend with equal chance.
    #[default]
    Random,
    /// One after the other.
    RoundRobin,
    /// By the client's address: the block holds each backend once.
    SourceHash,
    /// By the client's address: the block is a permutation table (Eisenbud et al., NSDI 2016) that
    /// moves few clients when backends come and go.
    Maglev,
    /// By chance, in the proportion of the backends' weights: the block repeats them.
    Weighted,
    /// The one of two by such chance that has fewer connections for its weight (Mitzenmacher, IEEE
    /// TPDS 12(10), 2001).
    LeastConnections,
}

impl Algorithm {
    /// All algorithms.
    pub const ALL: [Self; 6] = [
        Self::Random,
        Self::RoundRobin,
        Self::SourceHash,
        Self::Maglev,
        Self::Weighted,
        Self::LeastConnections,
    ];

    /// Its name.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::RoundRobin => "round-robin",
            Self::SourceHash => "source-hash",
            Self::Maglev => "maglev",
            Self::Weighted => "weighted",
            Self::LeastConnections => "least-connections",
        }
    }

    /// The algorithm of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|algorithm| algorithm.label() == name)
    }

    /// Whether it heeds backends' weights.
    pub const fn is_weighted(self) -> bool {
        matches!(self, Self::Weighted | Self::LeastConnections)
    }

    /// What it is in a frontend's flags.
    pub const fn flags(self) -> u32 {
        match self {
            Self::Random => 0,
            Self::RoundRobin => FrontendFlags::BY_TURN,
            Self::SourceHash => FrontendFlags::BY_CLIENT,
            Self::Maglev => FrontendFlags::BY_CLIENT | FrontendFlags::REPEATS,
            Self::Weighted => FrontendFlags::REPEATS,
            Self::LeastConnections => FrontendFlags::BY_LOAD | FrontendFlags::REPEATS,
        }
    }

    /// The algorithm in a frontend's flags.
    pub const fn of(flags: u32) -> Self {
        let by_client = flags & FrontendFlags::BY_CLIENT != 0;
        let repeats = flags & FrontendFlags::REPEATS != 0;
        match (by_client, repeats) {
            _ if flags & FrontendFlags::BY_TURN != 0 => Self::RoundRobin,
            _ if flags & FrontendFlags::BY_LOAD != 0 => Self::LeastConnections,
            (true, true) => Self::Maglev,
            (true, false) => Self::SourceHash,
            (false, true) => Self::Weighted,
            (false, false) => Self::Random,
        }
    }
}

/// A word that spreads clients evenly and is the same on every node: MurmurHash3's finalizer over
/// the address's words.
#[inline(always)]
pub fn client_hash<A: Addr>(client: &A) -> u32 {
    let [a, b, c, d] = client.words();
    // Zero would stay zero.
    let mut hash = 0x9e37_79b9;
    for word in [d, c, b, a] {
        hash ^= u32::from_be(word);
        hash = (hash ^ hash >> 16).wrapping_mul(0x85eb_ca6b);
        hash = (hash ^ hash >> 13).wrapping_mul(0xc2b2_ae35);
        hash ^= hash >> 16;
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::{Algorithm, client_hash};
    use crate::{net::V4, slot_at};

    #[test]
    fn flags_and_names_tell_algorithms_apart() {
        for algorithm in Algorithm::ALL {
            assert_eq!(Algorithm::of(algorithm.flags()), algorithm);
            assert_eq!(Algorithm::named(algorithm.label()), Some(algorithm));
        }
        assert_eq!(Algorithm::named("fewest"), None);
    }

    #[test]
    fn neighbouring_clients_are_spread_evenly() {
        let mut counts = [0_u32; 7];
        for client in 0..7_000_u16 {
            let [high, low] = client.to_be_bytes();
            let hash = client_hash(&V4::from_octets([10, 244, high, low]));
            if let Some(count) = counts.get_mut(slot_at(hash, 7) as usize) {
                *count += 1;
            }
        }
        // A thousand each; five standard deviations (29) to either side.
        assert!(
            counts.iter().all(|count| (855..1_145).contains(count)),
            "{counts:?}"
        );
    }
}
