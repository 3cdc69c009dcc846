//! How full the kernel's tables are, and which are about to refuse something.

use std::{
    collections::BTreeSet,
    os::fd::AsFd,
    sync::{Arc, Mutex},
};

use penstock_common::{
    Affinity, AffinityKey, BackendCounts, BackendId, BackendLife, ConnectedUdp, Datagram,
    DatagramKey, Endpoint, Load, MASQUERADE_PORTS, Netns, Plain, Route, SourcePrefix, Uplink, V4,
    V6, Vtep, XdpUplink, limits,
};
use serde::{Deserialize, Serialize};

use crate::{
    attach::follow::lock,
    dataplane::{batch, pins::Pins},
};

/// How full a table is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fill {
    /// What it holds.
    pub table: String,
    /// How many there are.
    pub used: u64,
    /// How many there may be.
    pub limit: u64,
    /// What happens when it is full and one more comes.
    pub when_full: String,
    /// Whether that is worse than to forget what was used least.
    pub refuses: bool,
}

impl Fill {
    /// A table that has no place for one more when it is full.
    pub fn refusing(table: &str, used: usize, limit: u32, when_full: &str) -> Self {
        Self {
            table: table.to_owned(),
            used: used as u64,
            limit: u64::from(limit),
            when_full: when_full.to_owned(),
            refuses: true,
        }
    }

    /// A table that forgets what was used least.
    fn forgetting(table: &str, used: usize, limit: u32, when_full: &str) -> Self {
        Self {
            refuses: false,
            ..Self::refusing(table, used, limit, when_full)
        }
    }

    /// How full it is in percent, rounded down.
    pub fn percent(&self) -> u64 {
        self.used.saturating_mul(100) / self.limit.max(1)
    }
}

/// From how many percent on a table is a problem.
const HIGH: u64 = 80;
/// Below how many percent it no longer is one.
const LOW: u64 = 75;

/// Tables that are nearly full, which a table is until it is well below of what made it one.
#[derive(Debug, Default)]
pub struct Pressure(BTreeSet<String>);

impl Pressure {
    /// Looks at tables anew.
    pub fn update(&mut self, fills: &[Fill]) {
        for fill in fills.iter().filter(|fill| fill.refuses) {
            let percent = fill.percent();
            let problem = || {
                format!(
                    "{}: more than {HIGH} % of {} are in use; when all are, {}",
                    fill.table, fill.limit, fill.when_full
                )
            };
            if percent >= HIGH {
                self.0.insert(problem());
            } else if percent < LOW && !self.0.is_empty() {
                self.0.remove(&problem());
            }
        }
    }

    /// In words that stay the same while a table is nearly full.
    pub fn problems(&self) -> impl Iterator<Item = String> {
        self.0.iter().cloned()
    }
}

/// What was counted last of the tables that nobody keeps an account of.
pub type Counted = Arc<Mutex<Vec<Fill>>>;

/// Elements that are read at once.
const CHUNK: usize = 4_096;

fn count<K: Plain + Default, V: Plain + Default>(pins: &Pins, map: &str) -> usize {
    let all = |map| {
        let data = pins.map(map).ok()?;
        batch::lookup_all::<K, V>(data.fd().as_fd(), CHUNK).ok()
    };
    all(map).map_or(0, |all| all.len())
}

/// What services fill: frontends, addresses and backends of each family, and slots.
pub fn services(sizes: [[usize; 3]; 2], slots: u32) -> Vec<Fill> {
    let fill = |table: &str, used, limit| {
        Fill::refusing(
            table,
            used,
            limit,
            "services that do not fit are not served",
        )
    };
    let mut fills = Vec::new();
    for (family, [frontends, addresses, backends]) in ["IPv4", "IPv6"].iter().zip(sizes) {
        let name = |what| format!("{family} {what}");
        fills.push(fill(&name("frontends"), frontends, limits::FRONTENDS));
        fills.push(fill(
            &name("addresses of services"),
            addresses,
            limits::ADDRESSES,
        ));
        fills.push(fill(&name("backends"), backends, limits::BACKENDS));
    }
    fills.push(fill("slots", slots as usize, limits::SLOTS));
    fills
}

/// Flows that are there, by family, each of which may have so many.
pub fn flows(v4: usize, v6: usize, limit: u32) -> [Fill; 2] {
    let fill = |table, used| {
        let when_full = "new connections that are translated packet by packet are dropped";
        Fill::refusing(table, used, limit, when_full)
    };
    [fill("IPv4 flows", v4), fill("IPv6 flows", v6)]
}

/// Source ports of this node's towards the destination with most, by family.
pub fn source_ports(used: [usize; 2]) -> [Fill; 2] {
    let (low, high) = MASQUERADE_PORTS;
    let limit = u32::from(high - low) + 1;
    let fill = |family: &str, used| {
        let table = format!("{family} source ports of the busiest destination");
        let when_full = "what is new to it is dropped; penstock conntrack shows which one it is";
        Fill::refusing(&table, used, limit, when_full)
    };
    let [v4, v6] = used;
    [fill("IPv4", v4), fill("IPv6", v6)]
}

/// The other tables.
pub fn others(pins: &Pins) -> Vec<Fill> {
    let mut fills = filled_by_programs(pins);
    fills.extend(filled_by_agent(pins));
    fills
}

/// A range as the kernel's tries have it as their key: its length, and its address in 4 or in 16 bytes.
type Range4 = [u32; 2];
type Range6 = [u32; 5];

/// The tables that the agent fills, without those that [`services`] knows.
fn filled_by_agent(pins: &Pins) -> Vec<Fill> {
    let ranges4 = count::<SourcePrefix<V4>, u32>(pins, "SOURCE_RANGES4");
    let ranges6 = count::<SourcePrefix<V6>, u32>(pins, "SOURCE_RANGES6");
    let pods4 = count::<V4, Endpoint>(pins, "ENDPOINTS4");
    let pods6 = count::<V6, Endpoint>(pins, "ENDPOINTS6");
    let routes4 = count::<Range4, Route>(pins, "ROUTES4");
    let routes6 = count::<Range6, Route>(pins, "ROUTES6");
    let loads4 = count::<BackendId, Load>(pins, "LOADS4");
    let loads6 = count::<BackendId, Load>(pins, "LOADS6");
    let mut fills = Vec::new();
    for (family, [ranges, pods, routes, loads]) in [
        ("IPv4", [ranges4, pods4, routes4, loads4]),
        ("IPv6", [ranges6, pods6, routes6, loads6]),
    ] {
        let mut add = |table: &str, used, limit, when_full| {
            let table = format!("{family} {table}");
            fills.push(Fill::refusing(&table, used, limit, when_full));
        };
        add(
            "ranges of clients",
            ranges,
            limits::SOURCE_RANGES,
            "services that do not fit are not served",
        );
        add(
            "addresses of pods",
            pods,
            limits::ENDPOINTS,
            "one more is reached by the kernel's routes",
        );
        add(
            "ranges of nodes",
            routes,
            limits::ROUTES,
            "pods of one more are not reached",
        );
        add(
            "backends' loads",
            loads,
            limits::LOADS,
            "one more counts as new with least-connections",
        );
    }
    let vteps = count::<Vtep, u32>(pins, "VTEPS");
    let namespaces = count::<u64, Netns>(pins, "NETNS");
    let cgroups = count::<u64, u8>(pins, "EXCLUDED_CGROUPS");
    let uplinks = count::<u32, Uplink>(pins, "UPLINKS");
    let xdp = count::<u32, XdpUplink>(pins, "XDP_UPLINKS");
    for (table, used, limit, when_full) in [
        (
            "ends of tunnels",
            vteps,
            limits::VTEPS,
            "what one more hands over is dropped",
        ),
        (
            "network namespaces",
            namespaces,
            limits::NETNS,
            "the affinity of one more is one for its sockets and one for its packets",
        ),
        (
            "cgroups that are left alone",
            cgroups,
            limits::EXCLUDED_CGROUPS,
            "the sockets of one more are translated",
        ),
        (
            "interfaces to the outside",
            uplinks,
            limits::UPLINKS,
            "pods do not leave by one more",
        ),
        (
            "interfaces with XDP",
            xdp,
            limits::UPLINKS,
            "one more is served at TC",
        ),
    ] {
        fills.push(Fill::refusing(table, used, limit, when_full));
    }
    fills
}

fn filled_by_programs(pins: &Pins) -> Vec<Fill> {
    let affinity = |table, used| {
        let when_full = "the client whose last connection is longest ago is forgotten";
        Fill::forgetting(table, used, limits::AFFINITY, when_full)
    };
    let counted = |table, used| {
        let when_full = "what goes to other backends is not counted";
        Fill::refusing(table, used, limits::BACKEND_COUNTS, when_full)
    };
    let clients4 = count::<AffinityKey<V4>, Affinity>(pins, "AFFINITY4");
    let clients6 = count::<AffinityKey<V6>, Affinity>(pins, "AFFINITY6");
    let sockets = count::<u64, ConnectedUdp>(pins, "CONNECTED_UDP");
    let datagrams = count::<DatagramKey, Datagram>(pins, "DATAGRAMS");
    let counts4 = count::<BackendLife, BackendCounts>(pins, "BACKEND_COUNTS4");
    let counts6 = count::<BackendLife, BackendCounts>(pins, "BACKEND_COUNTS6");
    vec![
        affinity("IPv4 clients with affinity", clients4),
        affinity("IPv6 clients with affinity", clients6),
        Fill::refusing(
            "connected UDP sockets",
            sockets,
            limits::CONNECTED_UDP,
            "one more does not follow its service",
        ),
        Fill::forgetting(
            "unconnected UDP sockets' services",
            datagrams,
            limits::DATAGRAMS,
            "the one that was used longest ago chooses anew",
        ),
        counted("IPv4 backends' counts", counts4),
        counted("IPv6 backends' counts", counts6),
    ]
}

/// Replaces the fills of tables that were looked at.
pub fn tell(counted: &Counted, news: impl IntoIterator<Item = Fill>) {
    let mut counted = lock(counted);
    for fill in news {
        match counted.iter_mut().find(|old| old.table == fill.table) {
            Some(old) => *old = fill,
            None => counted.push(fill),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_a_problem_from_four_fifths_until_it_is_well_below() {
        let mut pressure = Pressure::default();
        let mut problems = |used| {
            let fills = [
                Fill::refusing("flows", used, 1_000, "new ones are dropped"),
                Fill::forgetting("clients", 1_000, 1_000, "one is forgotten"),
            ];
            pressure.update(&fills);
            pressure.problems().collect::<Vec<_>>()
        };
        let none: Vec<String> = Vec::new();
        let problem =
            "flows: more than 80 % of 1000 are in use; when all are, new ones are dropped";
        assert_eq!(problems(799), none);
        assert_eq!(problems(800), [problem]);
        assert_eq!(problems(1_000), [problem]);
        // No back and forth at the edge.
        assert_eq!(problems(799), [problem]);
        assert_eq!(problems(750), [problem]);
        assert_eq!(problems(749), none);
        assert_eq!(problems(799), none);
    }
}
