//! Whether clients outside can be handed over to backends on other nodes, and why not.

use super::{State, plan::Hop};

/// The longest range of IPv6 addresses whose ends tell them apart ([`penstock_common::Handover`]).
const LONGEST_RANGE_V6: u8 = 64;

impl State {
    /// Whether the ends of all pods' addresses tell them apart, as far as the overlay goes.
    pub fn has_short_ranges(&self, is_v4: bool) -> bool {
        let others = self.remote.iter().map(|remote| &remote.range);
        let mut ranges = self.own.iter().chain(others);
        is_v4 || ranges.all(|range| range.is_ipv4() || range.prefix() >= LONGEST_RANGE_V6)
    }
}

/// Why what comes from the outside can't be handed over to all backends on other nodes, where that is
/// so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Obstacles {
    v4: Option<&'static str>,
    v6: Option<&'static str>,
}

impl Obstacles {
    /// As the network is; none where nobody asked for one.
    pub fn of(network: Option<&State>) -> Self {
        Self {
            v4: obstacle(network, true),
            v6: obstacle(network, false),
        }
    }

    /// That of a family.
    pub fn to(self, is_v4: bool) -> Option<&'static str> {
        if is_v4 { self.v4 } else { self.v6 }
    }
}

fn obstacle(network: Option<&State>, is_v4: bool) -> Option<&'static str> {
    let Some(state) = network else {
        return Some("there is no overlay between nodes (--network)");
    };
    let mut hops = state.remote.iter();
    if hops.any(|remote| remote.range.is_ipv4() == is_v4 && matches!(remote.hop, Hop::Via(_))) {
        return Some("nodes are reached without a tunnel (--routing native)");
    }
    (!state.has_short_ranges(is_v4)).then_some("a node's range of pods is larger than /64")
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::network::plan::Remote;

    fn state(own: &str, remote: &[(&str, bool)]) -> State {
        let ip = IpAddr::from([10, 0, 0, 2]);
        let remote = remote.iter().map(|(range, is_tunnel)| Remote {
            node: "b".into(),
            range: range.parse().unwrap(),
            hop: if *is_tunnel {
                Hop::Tunnel(ip)
            } else {
                Hop::Via(ip)
            },
        });
        State {
            own: vec![own.parse().unwrap()],
            remote: remote.collect(),
            ..State::default()
        }
    }

    #[test]
    fn what_keeps_a_family_from_being_handed_over_is_its_own() {
        let tunnels = state(
            "10.244.0.0/24",
            &[("10.244.1.0/24", true), ("fd00:b::/64", true)],
        );
        for is_v4 in [true, false] {
            assert_eq!(obstacle(Some(&tunnels), is_v4), None);
            assert!(obstacle(None, is_v4).is_some_and(|why| why.contains("no overlay")));
        }
        let one_direct = state(
            "10.244.0.0/24",
            &[
                ("10.244.1.0/24", true),
                ("10.244.2.0/24", false),
                ("fd00:b::/64", true),
            ],
        );
        let obstacles = [true, false].map(|is_v4| obstacle(Some(&one_direct), is_v4));
        assert!(obstacles[0].is_some_and(|why| why.contains("native")));
        assert_eq!(obstacles[1], None);
        // Nobody knows how long addresses' beginnings are but who has the range.
        for large in [
            state("10.0.0.0/8", &[("fd00::/56", true)]),
            state("fd00::/56", &[("10.244.1.0/8", true)]),
        ] {
            assert_eq!(obstacle(Some(&large), true), None);
            assert!(large.has_short_ranges(true) && !large.has_short_ranges(false));
            assert!(obstacle(Some(&large), false).is_some_and(|why| why.contains("/64")));
        }
    }
}
