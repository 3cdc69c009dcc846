//! How large the flow table is made: the one size that is not the same everywhere.
//!
//! Invariant: all maps of the table are for the same number of flows, and the programs are told it.

use aya::EbpfLoader;
use penstock_common::{Hints, limits};

/// Maps with an element for each flow.
const BY_FLOW: [&str; 8] = [
    "FLOWS4",
    "FLOWS6",
    "FLOW_COUNTS4",
    "FLOW_COUNTS6",
    "FLOW_VTEPS4",
    "FLOW_VTEPS6",
    "FREE_FLOWS4",
    "FREE_FLOWS6",
];

/// Maps of flows' keys.
const BY_KEY: [&str; 2] = ["FLOW_INDEX4", "FLOW_INDEX6"];

/// Maps of hints where records are, which last no longer than the programs.
const HINTS: [&str; 2] = ["HINTS4", "HINTS6"];

/// How many entries a map of the flow table has with so many flows of each family; nothing for other
/// maps.
pub(super) fn entries(map: &str, flows: u32) -> Option<u32> {
    if BY_FLOW.contains(&map) {
        Some(flows)
    } else if BY_KEY.contains(&map) {
        Some(limits::flow_index(flows))
    } else {
        None
    }
}

/// The maps of the flow table.
pub(super) fn maps() -> impl Iterator<Item = &'static str> {
    BY_FLOW.into_iter().chain(BY_KEY)
}

/// For how many flows of each family a map of the table with so many entries was made.
pub(super) fn flows(map: &str, entries: u32) -> u32 {
    if BY_KEY.contains(&map) {
        limits::flows_of_index(entries)
    } else {
        entries
    }
}

/// What maps and programs are made with for a number of flows of each family.
pub struct Sizes {
    flows: u32,
    ids: u32,
}

impl Sizes {
    /// For so many flows of each family.
    pub fn new(flows: u32) -> Self {
        Self {
            flows,
            ids: Hints::ids(flows),
        }
    }

    /// Has maps made of these sizes, and programs that know them.
    pub fn tell<'a>(&'a self, loader: &mut EbpfLoader<'a>) {
        for map in maps() {
            if let Some(entries) = entries(map, self.flows) {
                loader.map_max_entries(map, entries);
            }
        }
        for map in HINTS {
            loader.map_max_entries(map, Hints::elements(self.flows));
        }
        loader.override_global("RECORDS", &self.flows, true);
        loader.override_global("IDS", &self.ids, true);
    }
}

/// As many flows of each family as kube-proxy would have the kernel track; nothing where that is to
/// stay as it is.
pub fn wanted(per_core: u32, least: u32, cores: u32) -> Option<u32> {
    let scaled = per_core.saturating_mul(cores);
    (per_core > 0).then(|| scaled.max(least).clamp(1, limits::MOST_FLOWS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_as_large_as_kube_proxys_flags_say() {
        let cores = 5;
        assert_eq!(wanted(0, 0, cores), None);
        assert_eq!(wanted(0, 64 * 1_024, cores), None);
        assert_eq!(wanted(3, 0, cores), Some(15));
        assert_eq!(wanted(10, 5, cores), Some(50));
        assert_eq!(wanted(1, 17, cores), Some(17));
        assert_eq!(wanted(32_768, 131_072, 2), Some(131_072));
        assert_eq!(wanted(32_768, 131_072, 64), Some(2_097_152));
        assert_eq!(wanted(u32::MAX, 1, 1_000), Some(limits::MOST_FLOWS));
    }

    #[test]
    fn every_map_of_the_table_tells_its_size() {
        for wanted in [1, 1_000, limits::FLOWS, limits::MOST_FLOWS] {
            for map in maps() {
                let entries = entries(map, wanted).expect(map);
                assert_eq!(flows(map, entries), wanted, "{map}");
            }
        }
        assert_eq!(entries("FRONTENDS4", 1), None);
    }
}
