//! The service maps as text and as a claim that can be checked.
//!
//! Ids and slots are an implementation's freedom, so the text does not show them: two states that
//! serve alike read alike.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

use penstock_common::{
    AddressKind, BackendFlags, BackendId, FrontendFlags, FrontendKey, SlotRange,
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
        if frontend.slots.count == 0 {
            let drops = frontend.flags & FrontendFlags::DROP_WHEN_EMPTY != 0;
            text.push_str(if drops { " drop" } else { " reject" });
        }
        text.push('\n');
        let range = frontend.slots;
        for slot in range.base..range.base.saturating_add(range.count) {
            let backend = slots.get(&slot).and_then(|id| state.backends.get(id));
            let _ = match backend {
                Some(backend) => {
                    writeln!(
                        text,
                        "  backend {} {}",
                        backend.addr.into_ip(),
                        backend.port
                    )
                }
                None => writeln!(text, "  backend missing"),
            };
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
        let range = frontend.slots;
        if range.count > 0 {
            blocks.insert((range, format!("service {}", frontend.service.0)));
        }
        for slot in range.base..range.base.saturating_add(range.count) {
            let backend = slots.get(&slot).and_then(|id| state.backends.get(id));
            let wanted = BackendFlags::LIVE | BackendFlags::SELECTED;
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
    let used: BTreeSet<A> = state.frontends.keys().map(|key| key.addr).collect();
    for (addr, address) in &state.addresses {
        if address.kind == AddressKind::SERVICE && !used.contains(addr) {
            leaks.push(format!("address {} has no frontend", addr.into_ip()));
        }
    }
}
