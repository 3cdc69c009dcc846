//! At which of this node's addresses its ports are services' (`--nodeport-addresses`).

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use ipnetwork::IpNetwork;

use super::object::Family;

/// Which addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// The first of each family: what kube-proxy does in its nftables mode.
    Primary,
    /// Those in any of these ranges.
    In(Vec<IpNetwork>),
}

/// Which addresses, and whether the loopback ones for this node's own processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePorts {
    /// Which of those that others know this node by.
    pub which: Which,
    /// 127.0.0.1 and ::1 too.
    pub loopback: bool,
}

impl Default for NodePorts {
    fn default() -> Self {
        Self {
            which: Which::Primary,
            loopback: true,
        }
    }
}

impl NodePorts {
    /// The addresses, of all that the node has in the order in which they stand for it.
    pub fn addresses(&self, all: &[IpAddr]) -> BTreeSet<IpAddr> {
        let mut chosen: BTreeSet<IpAddr> = match &self.which {
            Which::Primary => [Family::V4, Family::V6]
                .into_iter()
                .filter_map(|family| all.iter().find(|ip| Family::of(**ip) == family).copied())
                .collect(),
            Which::In(ranges) => {
                let is_in = |ip: &&IpAddr| ranges.iter().any(|range| range.contains(**ip));
                all.iter().filter(is_in).copied().collect()
            }
        };
        if self.loopback {
            chosen.insert(Ipv4Addr::LOCALHOST.into());
            chosen.insert(Ipv6Addr::LOCALHOST.into());
        }
        chosen
    }
}

impl FromStr for Which {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "primary" {
            return Ok(Self::Primary);
        }
        let range = |part: &str| {
            part.trim()
                .parse::<IpNetwork>()
                .map_err(|_| format!("{part:?} is neither \"primary\" nor a CIDR"))
        };
        text.split(',')
            .map(range)
            .collect::<Result<_, _>>()
            .map(Self::In)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_the_first_or_those_in_ranges() {
        let all = ["172.18.0.2", "10.0.0.9", "fd00::2", "fd00:1::2"];
        let all: Vec<IpAddr> = all.iter().map(|text| text.parse().unwrap()).collect();
        let at = |text: &str, loopback| {
            let which = text.parse().unwrap();
            let chosen = NodePorts { which, loopback }.addresses(&all);
            chosen.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(at("primary", false), ["172.18.0.2", "fd00::2"]);
        assert_eq!(
            at("primary", true),
            ["127.0.0.1", "172.18.0.2", "::1", "fd00::2"]
        );
        assert_eq!(
            at("10.0.0.0/8, fd00:1::/64", false),
            ["10.0.0.9", "fd00:1::2"]
        );
        assert!("first".parse::<Which>().is_err());
        assert!("10.0.0.0/33".parse::<Which>().is_err());
    }
}
