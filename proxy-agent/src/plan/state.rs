//! The service maps as text and as a claim that can be checked.
//!
//! Ids and slots are an implementation's freedom, so the text does not show them: two states that
//! serve alike read alike.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    net::IpAddr,
};

use penstock_common::{
    AddressKind, Algorithm, BackendFlags, BackendId, Forwarding, FrontendFlags, FrontendKey,
    SlotRange, SourceRange,
};

use super::side::PlannedAddr;
use crate::dataplane::{FamilyState, MapState};

impl MapState {
    /// The state in canonical text: one line an address or frontend, sorted.
    pub fn canonical(&self) -> String {
        let mut text = String::new();
        write_family(&mut text, &self.v4, &self.slots);
        write_family(&mut text, &self.v6, &self.slots);
        text
    }

    /// What is wrong with the state, if anything: what must hold after every single write.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut blocks = BTreeSet::new();
        check_family(&mut problems, &mut blocks, &self.v4, &self.slots);
        check_family(&mut problems, &mut blocks, &self.v6, &self.slots);
        let mut end = 0;
        for (range, service) in blocks {
            if range.base < end {
                problems.push(format!(
                    "the block {range:?} of {service} overlaps another's"
                ));
            }
            end = range.base + range.count;
        }
        problems
    }

    /// Live backends that no frontend's service has: leaked, once nothing is going on.
    pub fn leaks(&self) -> Vec<String> {
        let mut leaks = Vec::new();
        leaks_of(&mut leaks, &self.v4);
        leaks_of(&mut leaks, &self.v6);
        leaks
    }
}

fn write_family<A: PlannedAddr>(
    text: &mut String,
    state: &FamilyState<A>,
    slots: &BTreeMap<u32, BackendId>,
) {
    for (addr, address) in &state.addresses {
        let kind = match address.kind {
            AddressKind::SERVICE => "service",
            AddressKind::NODE => "node",
            AddressKind::EXTERNAL => "external",
            AddressKind::LOOPBACK => "loopback",
            _ => "unknown",
        };
        // Writing to a string can't fail.
        let _ = writeln!(text, "address {} {kind}", addr.into_ip());
    }
    for (key, frontend) in &state.frontends {
        let FrontendKey {
            addr, port, proto, ..
        } = *key;
        let _ = write!(text, "frontend {} {port} {proto}", addr.into_ip());
        if frontend.affinity_secs > 0 {
            let _ = write!(text, " affinity {}s", frontend.affinity_secs);
        }
        let algorithm = Algorithm::of(frontend.flags);
        if algorithm != Algorithm::default() {
            let _ = write!(text, " {}", algorithm.label());
        }
        let is = |flag| frontend.flags & flag != 0;
        if is(FrontendFlags::EXTERNAL) {
            text.push_str(" external");
        }
        let forwarding = Forwarding::of(frontend.flags);
        if forwarding != Forwarding::default() {
            let _ = write!(text, " {}", forwarding.label());
        }
        // Nothing where it has slots.
        let when_empty = |slots: SlotRange, local| match slots.count {
            0 if is(local) && is(FrontendFlags::DROP_WHEN_EMPTY) => " drop",
            0 => " reject",
            _ => "",
        };
        text.push_str(when_empty(frontend.slots, FrontendFlags::LOCAL));
        text.push('\n');
        if is(FrontendFlags::SOURCE_RANGES) {
            let ranges = state.source_ranges.iter();
            for range in ranges.filter(|range| range.range.service == frontend.service) {
                let bits = range.bits - SourceRange::<A>::SERVICE_BITS;
                let _ = writeln!(text, "  allow {}/{bits}", range.range.addr.into_ip());
            }
        }
        write_slots(text, ("backend", algorithm), frontend.slots, state, slots);
        if is(FrontendFlags::LOCAL) != is(FrontendFlags::EXTERNAL_LOCAL) {
            match when_empty(frontend.external, FrontendFlags::EXTERNAL_LOCAL) {
                "" => write_slots(
                    text,
                    ("outside", algorithm),
                    frontend.external,
                    state,
                    slots,
                ),
                empty => {
                    let _ = writeln!(text, "  outside{empty}");
                }
            }
        }
        let resting = state.backends.values().filter(|backend| {
            backend.service == frontend.service && backend.flags == BackendFlags::LIVE
        });
        let resting: BTreeSet<_> = resting
            .map(|backend| (backend.addr.into_ip(), backend.port.to_host()))
            .collect();
        for (ip, port) in resting {
            let _ = writeln!(text, "  resting {ip} {port}");
        }
    }
}

fn write_slots<A: PlannedAddr>(
    text: &mut String,
    (word, algorithm): (&str, Algorithm),
    range: SlotRange,
    state: &FamilyState<A>,
    slots: &BTreeMap<u32, BackendId>,
) {
    let held: Vec<Option<(IpAddr, u16)>> = (range.base..range.base.saturating_add(range.count))
        .map(|slot| {
            let backend = slots.get(&slot).and_then(|id| state.backends.get(id))?;
            Some((backend.addr.into_ip(), backend.port.to_host()))
        })
        .collect();
    let mut shares: BTreeMap<Option<(IpAddr, u16)>, usize> = BTreeMap::new();
    for slot in &held {
        *shares.entry(*slot).or_default() += 1;
    }
    let line = |text: &mut String, slot: Option<(IpAddr, u16)>, share: &str| {
        let _ = match slot {
            Some((ip, port)) => writeln!(text, "  {word} {ip} {port}{share}"),
            None => writeln!(text, "  {word} missing{share}"),
        };
    };
    match algorithm {
        Algorithm::Random | Algorithm::RoundRobin | Algorithm::SourceHash => {
            held.iter().for_each(|slot| line(text, *slot, ""));
        }
        Algorithm::Maglev | Algorithm::Weighted | Algorithm::LeastConnections => {
            for (slot, share) in shares {
                line(text, slot, &format!(" {share} of {}", held.len()));
            }
        }
    }
    // The order of a table decides who gets whom; two that read alike here are alike.
    if algorithm == Algorithm::Maglev && !held.is_empty() {
        let mut words = String::new();
        for slot in &held {
            line(&mut words, *slot, "");
        }
        let _ = writeln!(text, "  {word} table {:016x}", fnv(words.as_bytes()));
    }
}

/// FNV-1a, to tell tables apart in a line.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn check_family<A: PlannedAddr>(
    problems: &mut Vec<String>,
    blocks: &mut BTreeSet<(SlotRange, String)>,
    state: &FamilyState<A>,
    slots: &BTreeMap<u32, BackendId>,
) {
    for (key, frontend) in &state.frontends {
        let name = format!("frontend {} {} {}", key.addr.into_ip(), key.port, key.proto);
        if frontend.key_check != key.check() {
            problems.push(format!("{name} does not carry its key"));
        }
        if !state.addresses.contains_key(&key.addr) {
            problems.push(format!("{name} has an address that is not looked at"));
        }
        let has = |flag| frontend.flags & flag != 0;
        if has(FrontendFlags::SOURCE_RANGES) {
            let mut ranges = state.source_ranges.iter();
            if !ranges.any(|range| range.range.service == frontend.service) {
                problems.push(format!("{name} lets nobody in"));
            }
        }
        let ranges = [
            (frontend.slots, has(FrontendFlags::LOCAL)),
            (frontend.external, has(FrontendFlags::EXTERNAL_LOCAL)),
        ];
        for (range, is_local) in ranges {
            let scope = if is_local {
                BackendFlags::LOCAL
            } else {
                BackendFlags::CLUSTER
            };
            if range.count > 0 {
                blocks.insert((range, format!("service {}", frontend.service.0)));
            }
            for slot in range.base..range.base.saturating_add(range.count) {
                let backend = slots.get(&slot).and_then(|id| state.backends.get(id));
                let wanted = BackendFlags::LIVE | scope;
                match backend {
                    None => problems.push(format!("{name}: slot {slot} names no backend")),
                    Some(backend) if backend.service != frontend.service => {
                        problems.push(format!(
                            "{name}: slot {slot} names another service's backend"
                        ));
                    }
                    Some(backend) if backend.flags & wanted != wanted => {
                        problems.push(format!("{name}: slot {slot} names a backend that is dead"));
                    }
                    Some(_) => {}
                }
            }
        }
    }
}

fn leaks_of<A: PlannedAddr>(leaks: &mut Vec<String>, state: &FamilyState<A>) {
    let services: BTreeSet<_> = state
        .frontends
        .values()
        .map(|frontend| frontend.service)
        .collect();
    for (id, backend) in state
        .backends
        .iter()
        .filter(|(_, backend)| backend.flags != 0)
    {
        if !services.contains(&backend.service) {
            leaks.push(format!(
                "backend {} of service {} is nobody's",
                id.0, backend.service.0
            ));
        }
    }
    for range in &state.source_ranges {
        if !services.contains(&range.range.service) {
            leaks.push(format!(
                "a range of service {} is nobody's",
                range.range.service.0
            ));
        }
    }
    let used: BTreeSet<A> = state.frontends.keys().map(|key| key.addr).collect();
    for (addr, address) in &state.addresses {
        if address.kind != AddressKind::NODE && !used.contains(addr) {
            leaks.push(format!("address {} has no frontend", addr.into_ip()));
        }
    }
}
