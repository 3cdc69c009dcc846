//! Which address is next: pure arithmetic over a node's pod range.
//!
//! Addresses are given out in turn, so that one comes back only after all others had theirs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;

/// The addresses of a range that pods may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    range: IpNetwork,
    first: u128,
    last: u128,
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(ip.to_bits()),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

impl Pool {
    /// The pods' part of `range`: without its first address (the network's), its second (the
    /// node's own, see [`Self::node_address`]) and, for IPv4, its last (the broadcast address).
    /// `None` if nothing is left.
    pub fn new(range: IpNetwork) -> Option<Self> {
        let host_bits = if range.is_ipv4() { 32 } else { 128 } - u32::from(range.prefix());
        if host_bits < 2 {
            return None;
        }
        let first = number(range.network());
        let size_less_one = u128::MAX.checked_shr(128 - host_bits).unwrap_or(0);
        let last = first + size_less_one - u128::from(range.is_ipv4());
        Some(Self {
            range,
            first: first + 2,
            last,
        })
    }

    /// The range.
    pub fn range(&self) -> IpNetwork {
        self.range
    }

    /// The node's own address in the range, its second.
    pub fn node_address(&self) -> IpAddr {
        self.address(self.first - 1)
    }

    /// How many addresses pods can have.
    pub fn capacity(&self) -> u128 {
        self.last - self.first + 1
    }

    /// Whether pods can have an address.
    pub fn contains(&self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.range.is_ipv4() && (self.first..=self.last).contains(&number(ip))
    }

    fn address(&self, number: u128) -> IpAddr {
        if self.range.is_ipv4() {
            IpAddr::V4(Ipv4Addr::from_bits(number as u32))
        } else {
            IpAddr::V6(Ipv6Addr::from_bits(number))
        }
    }

    /// The first address after `previous`, going around once, that is not `taken`.
    ///
    /// Takes as many steps as there are taken addresses in its way, however large the range.
    pub fn next(
        &self,
        previous: Option<IpAddr>,
        mut is_taken: impl FnMut(IpAddr) -> bool,
    ) -> Option<IpAddr> {
        let start = previous
            .filter(|ip| self.contains(*ip))
            .map_or(self.first, |ip| number(ip) + 1);
        (start..=self.last)
            .chain(self.first..start.min(self.last + 1))
            .map(|number| self.address(number))
            .find(|ip| !is_taken(*ip))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn pool(range: &str) -> Option<Pool> {
        Pool::new(range.parse().unwrap())
    }

    #[test]
    fn ranges_keep_their_special_addresses() {
        let four = pool("10.244.1.0/24").unwrap();
        assert_eq!(four.capacity(), 253);
        assert_eq!(four.node_address().to_string(), "10.244.1.1");
        assert_eq!(
            four.next(None, |_| false).unwrap().to_string(),
            "10.244.1.2"
        );
        assert!(!four.contains("10.244.1.255".parse().unwrap()));
        let six = pool("fd00:244:1::/64").unwrap();
        assert_eq!(six.capacity(), (1 << 64) - 2);
        assert_eq!(
            six.next(None, |_| false).unwrap().to_string(),
            "fd00:244:1::2"
        );
        assert_eq!(pool("10.0.0.0/30").unwrap().capacity(), 1);
        assert_eq!(pool("10.0.0.0/31"), None);
        assert_eq!(pool("fd00::1/128"), None);
        assert!(pool("::/0").unwrap().capacity() > 1 << 100);
        assert_eq!(pool("0.0.0.0/0").unwrap().capacity(), (1 << 32) - 3);
    }

    proptest! {
        #[test]
        fn every_address_is_given_out_before_one_comes_back(prefix in 22_u8..=30, start in any::<u32>()) {
            let range = IpNetwork::new(Ipv4Addr::from_bits(0x0a00_0000).into(), prefix).unwrap();
            let pool = Pool::new(range).unwrap();
            let mut previous = Some(IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + start % 2_048)));
            let mut seen = HashSet::new();
            for _ in 0..pool.capacity() {
                let next = pool.next(previous, |_| false).unwrap();
                prop_assert!(pool.contains(next) && seen.insert(next));
                previous = Some(next);
            }
            prop_assert_eq!(pool.next(previous, |ip| seen.contains(&ip)), None);
            let free = *seen.iter().next().unwrap();
            seen.remove(&free);
            prop_assert_eq!(pool.next(previous, |ip| seen.contains(&ip)), Some(free));
        }
    }
}
