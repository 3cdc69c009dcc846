//! At which of this node's addresses its ports are services' (`--nodeport-addresses`): what kube-proxy
//! 1.37 makes of the same list (pkg/proxy/util/nodeport_addresses.go), but for the default.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use ipnetwork::IpNetwork;

use super::object::Family;

/// One entry of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    /// The first address of each family, and the loopback ones.
    Primary,
    /// The loopback addresses.
    Localhost,
    /// All.
    All,
    /// Those in a range.
    In(IpNetwork),
}

impl Entry {
    /// Whether it says anything of a family.
    fn is_about(self, family: Family) -> bool {
        match self {
            Self::Primary | Self::Localhost | Self::All => true,
            Self::In(range) => Family::of(range.ip()) == family,
        }
    }

    fn has_loopback(self, family: Family) -> bool {
        match self {
            Self::Primary | Self::Localhost | Self::All => true,
            // A part of 127.0.0.0/8 means the whole, as in kube-proxy.
            Self::In(IpNetwork::V4(range)) => {
                let covers = range.contains(Ipv4Addr::new(127, 0, 0, 0));
                family == Family::V4 && (covers || range.ip().is_loopback())
            }
            Self::In(IpNetwork::V6(range)) => {
                family == Family::V6 && range.contains(Ipv6Addr::LOCALHOST)
            }
        }
    }
}

impl FromStr for Entry {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "primary" => return Ok(Self::Primary),
            "localhost" => return Ok(Self::Localhost),
            "all" => return Ok(Self::All),
            _ => {}
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            let whole = if address.is_ipv4() { 32 } else { 128 };
            return Err(format!(
                "{text:?} is an address; write a range: {text}/{whole} for this address alone"
            ));
        }
        text.parse().map(Self::In).map_err(|_| {
            format!("{text:?} is neither a range (10.0.0.0/8) nor primary, localhost or all")
        })
    }
}

/// Which addresses: a list of entries, of which an empty one is the default, `primary`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Which(Vec<Entry>);

impl Which {
    /// Whether nothing was said.
    pub fn is_default(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether no address of either family is left out.
    pub fn has_all(&self) -> bool {
        let of_family = |family| {
            let mut about = self.entries().iter().filter(|entry| entry.is_about(family));
            let is_any = |entry: &Entry| match entry {
                Entry::All => true,
                Entry::In(range) => range.prefix() == 0,
                Entry::Primary | Entry::Localhost => false,
            };
            let first = about.next();
            first.is_none_or(is_any) || about.any(is_any)
        };
        of_family(Family::V4) && of_family(Family::V6)
    }

    /// What several lists say together.
    pub fn joined(lists: impl IntoIterator<Item = Self>) -> Self {
        Self(lists.into_iter().flat_map(|list| list.0).collect())
    }

    fn entries(&self) -> &[Entry] {
        if self.is_default() {
            &[Entry::Primary]
        } else {
            &self.0
        }
    }
}

impl FromStr for Which {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        let entries = text.split(',').map(|entry| entry.trim().parse());
        entries.collect::<Result<_, _>>().map(Self)
    }
}

/// Which addresses, and whether the loopback ones may be among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePorts {
    /// Which.
    pub which: Which,
    /// Whether 127.0.0.1 and ::1 may be, for this node's own processes.
    pub loopback: bool,
}

impl Default for NodePorts {
    fn default() -> Self {
        Self {
            which: Which::default(),
            loopback: true,
        }
    }
}

impl NodePorts {
    /// The loopback addresses that ports of this node may be at.
    pub fn loopback_addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        let both = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        both.into_iter().take(if self.loopback { 2 } else { 0 })
    }

    /// The addresses, of all that the node has in the order in which they stand for it.
    pub fn addresses(&self, all: &[IpAddr]) -> BTreeSet<IpAddr> {
        let families = [
            (Family::V4, IpAddr::from(Ipv4Addr::LOCALHOST)),
            (Family::V6, IpAddr::from(Ipv6Addr::LOCALHOST)),
        ];
        let mut chosen = BTreeSet::new();
        for (family, loopback) in families {
            let own = all.iter().filter(|ip| Family::of(**ip) == family);
            let own: Vec<IpAddr> = own.copied().collect();
            let entries = self.which.entries().iter().copied();
            let mut entries: Vec<Entry> = entries.filter(|entry| entry.is_about(family)).collect();
            if entries.is_empty() {
                // Ranges of the other family restrict nothing of this one.
                entries.push(Entry::All);
            }
            for entry in entries {
                match entry {
                    Entry::Primary => chosen.extend(own.first()),
                    Entry::Localhost => {}
                    Entry::All => chosen.extend(&own),
                    Entry::In(range) => chosen.extend(own.iter().filter(|ip| range.contains(**ip))),
                }
                if self.loopback && entry.has_loopback(family) {
                    chosen.insert(loopback);
                }
            }
        }
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Those of a node with two of each family.
    fn at(text: &str, loopback: bool) -> Vec<String> {
        let all = ["172.18.0.2", "10.0.0.9", "fd00::2", "fd00:1::2"];
        let all: Vec<IpAddr> = all.iter().map(|text| text.parse().unwrap()).collect();
        let which = text.parse().unwrap();
        let chosen = NodePorts { which, loopback }.addresses(&all);
        chosen.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn addresses_are_the_first_or_those_in_ranges() {
        let primary = ["127.0.0.1", "172.18.0.2", "::1", "fd00::2"];
        assert_eq!(at("primary", true), primary);
        assert_eq!(at("", true), primary);
        assert_eq!(at("primary", false), ["172.18.0.2", "fd00::2"]);
        assert_eq!(
            at("10.0.0.0/8, fd00:1::/64", true),
            ["10.0.0.9", "fd00:1::2"]
        );
        assert_eq!(
            at("primary,10.0.0.0/8", false),
            ["10.0.0.9", "172.18.0.2", "fd00::2"]
        );
    }

    #[test]
    fn a_family_that_no_range_is_of_has_them_all() {
        let v6 = ["::1", "fd00::2", "fd00:1::2"];
        assert_eq!(at("10.0.0.0/8", true), [&["10.0.0.9"], &v6[..]].concat());
        let all = [&["10.0.0.9", "127.0.0.1", "172.18.0.2"], &v6[..]].concat();
        for text in ["all", "0.0.0.0/0", "::/0", "0.0.0.0/0,::/0", "all,primary"] {
            assert_eq!(at(text, true), all, "{text}");
        }
        let others = ["10.0.0.9", "172.18.0.2", "fd00::2", "fd00:1::2"];
        assert_eq!(at("all", false), others);
        let has_all = |text: &str| text.parse::<Which>().unwrap().has_all();
        for all in ["all", "0.0.0.0/0", "10.0.0.0/8,0.0.0.0/0", "primary,all"] {
            assert!(has_all(all), "{all}");
        }
        for some in ["", "primary", "localhost", "10.0.0.0/8", "10.0.0.0/8,::/0"] {
            assert!(!has_all(some), "{some}");
        }
    }

    #[test]
    fn loopback_addresses_are_named_or_in_a_range() {
        assert_eq!(at("localhost", true), ["127.0.0.1", "::1"]);
        assert!(at("localhost", false).is_empty());
        // Host ports are there whatever node ports were restricted to.
        let which: Which = "10.0.0.0/8,fd00::/64".parse().unwrap();
        for (loopback, count) in [(true, 2), (false, 0)] {
            let which = which.clone();
            let node_ports = NodePorts { which, loopback };
            assert_eq!(node_ports.loopback_addresses().count(), count);
        }
        assert_eq!(at("127.0.0.0/8,::1/128", true), ["127.0.0.1", "::1"]);
        assert_eq!(
            at("127.0.0.2/32,fd00:1::/64", true),
            ["127.0.0.1", "fd00:1::2"]
        );
    }

    #[test]
    fn lists_add_up() {
        let lists = ["10.0.0.0/8", "", "localhost"].map(|text| text.parse().unwrap());
        let together: Which = "10.0.0.0/8,localhost".parse().unwrap();
        assert_eq!(Which::joined(lists), together);
        assert!(Which::joined(["".parse().unwrap()]).is_default());
    }

    #[test]
    fn what_is_no_entry_is_refused_by_name() {
        let refused = |text: &str| text.parse::<Which>().unwrap_err();
        for (text, entry) in [
            ("first", "\"first\""),
            ("Primary", "\"Primary\""),
            ("10.0.0.0/33", "\"10.0.0.0/33\""),
            ("10.0.0.0/8,,::/0", "\"\""),
            ("127.0.0.1/32,0,1.2.3.0/24", "\"0\""),
        ] {
            let error = refused(text);
            assert!(
                error.starts_with(&format!("{entry} is neither a range")),
                "{error}"
            );
        }
        let error = refused("10.0.0.0/8,10.20.30.40");
        assert!(error.contains("write a range: 10.20.30.40/32"), "{error}");
    }
}
