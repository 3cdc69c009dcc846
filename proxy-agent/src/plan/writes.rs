//! The writes that a port, a removal or an address needs, in an order that keeps the invariant.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
};

use penstock_common::{
    Address, AddressKind, Backend, BackendFlags, BackendId, Be16, Frontend, FrontendFlags,
    FrontendKey, Proto, ServiceId, SlotRange, SourcePrefix, limits,
};

use super::{
    blocks::Blocks,
    side::{Held, PlannedAddr, PortState, Side, Uses},
    slots::{self, Member},
};
use crate::{
    dataplane::{Change, FamilyChange},
    model::{
        object::{Family, ObjectName, Protocol},
        port::{FrontendKind, Port, PortFrontend, Scope},
    },
};

/// A service can't be programmed for now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// All backend ids are taken.
    #[error("all {limit} backends of this family are in use")]
    NoBackendId {
        /// How many there are.
        limit: u32,
    },
    /// No range of slots is large enough.
    #[error("no {wanted} consecutive slots are free ({free} of {limit} are)", limit = limits::SLOTS)]
    NoSlots {
        /// How many were wanted.
        wanted: u32,
        /// How many are free in all.
        free: u32,
    },
}

/// The order of writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    PutBackends,
    PutSlots,
    PutAddresses,
    PutSourceRanges,
    PutFrontends,
    DeleteFrontends,
    DeleteSourceRanges,
    DeleteAddresses,
    TakeBackends,
}

/// One write and whose it is.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) phase: Phase,
    pub(super) family: Family,
    pub(super) service: usize,
    pub(super) change: Change,
}

/// Ordered writes.
#[derive(Debug, Default)]
pub struct Plan {
    /// What to write, in this order.
    pub changes: Vec<Change>,
    /// Services that can't be programmed, and why.
    pub failures: Vec<(ObjectName, PlanError)>,
    /// Whether a UDP port lost a backend, or got its first.
    pub has_udp_change: bool,
    /// Whether a frontend goes from one port to another, and flows there with it.
    pub has_moved: bool,
    pub(super) services: Vec<ObjectName>,
    pub(super) owners: Vec<usize>,
    pub(super) touched: Vec<(Family, ServiceId)>,
    pub(super) new_backends: HashSet<(Family, BackendId)>,
    pub(super) new_blocks: Vec<(Family, ServiceId, SlotRange)>,
}

impl Plan {
    /// Whose change the one at `index` is; `None` for what belongs to no service.
    pub fn service_of(&self, index: usize) -> Option<&ObjectName> {
        self.services.get(*self.owners.get(index)?)
    }

    /// The services with changes from `index` on.
    pub fn services_from(&self, index: usize) -> HashSet<&ObjectName> {
        let rest = self.owners.get(index..).unwrap_or_default();
        rest.iter()
            .filter_map(|owner| self.services.get(*owner))
            .collect()
    }
}

pub(crate) fn proto(protocol: Protocol) -> Proto {
    match protocol {
        Protocol::Tcp => Proto::TCP,
        Protocol::Udp => Proto::UDP,
        Protocol::Sctp => Proto::SCTP,
    }
}

pub(super) fn family_of<A: PlannedAddr>() -> Family {
    if size_of::<A>() == 4 {
        Family::V4
    } else {
        Family::V6
    }
}

/// Plans one port; on an error nothing is kept of what was planned for it.
pub(super) fn plan_port<A: PlannedAddr>(
    side: &mut Side<A>,
    blocks: &mut Blocks,
    plan: &mut Plan,
    steps: &mut Vec<Step>,
    service: usize,
    id: ServiceId,
    port: &Port,
) -> Result<(), PlanError> {
    let family = family_of::<A>();
    let step = |phase, change| Step {
        phase,
        family,
        service,
        change: A::change(change),
    };
    let known = side
        .ports
        .get(&id)
        .map(|state| state.backends.clone())
        .unwrap_or_default();
    let mut wanted = HashSet::with_capacity(port.backends.len());
    let mut in_cluster = Vec::with_capacity(port.backends.len());
    let mut in_local = Vec::new();
    let scopes: BTreeSet<Scope> = port
        .frontends
        .iter()
        .flat_map(|frontend| [frontend.internal, frontend.external])
        .collect();
    let mut own_steps = Vec::new();
    let mut new = Vec::new();
    for backend in &port.backends {
        let Some(addr) = A::from_ip(backend.address) else {
            continue;
        };
        let key = (addr, Be16::from_host(backend.port));
        let mut flags = BackendFlags::LIVE;
        for scope in scopes.iter().filter(|scope| backend.is_in(**scope)) {
            flags |= flag_of(*scope);
        }
        let held = match known.get(&key) {
            Some(held) => *held,
            None => {
                let Some((number, generation)) = side.backend_ids.allocate() else {
                    new.into_iter()
                        .for_each(|id: BackendId| side.backend_ids.release(id.0));
                    return Err(PlanError::NoBackendId {
                        limit: limits::BACKENDS,
                    });
                };
                new.push(BackendId(number));
                Held {
                    id: BackendId(number),
                    generation,
                    flags: 0,
                    weight: backend.weight,
                }
            }
        };
        let put = |flags| {
            let value = Backend::new(held.generation, flags, id, key.0, key.1);
            FamilyChange::PutBackend(held.id, value.weighing(backend.weight))
        };
        if flags & !held.flags != 0 || backend.weight != held.weight {
            own_steps.push(step(Phase::PutBackends, put(flags | held.flags)));
        }
        if held.flags & !flags != 0 {
            own_steps.push(step(Phase::TakeBackends, put(flags)));
        }
        wanted.insert(key);
        let member = Member {
            addr,
            port: key.1,
            weight: backend.weight,
        };
        for scope in scopes.iter().filter(|scope| backend.is_in(**scope)) {
            match scope {
                Scope::Cluster => in_cluster.push((held.id, member)),
                Scope::Local => in_local.push((held.id, member)),
            }
        }
    }
    plan.has_udp_change |= port.key.protocol == Protocol::Udp;
    for (key, held) in known.iter().filter(|(key, _)| !wanted.contains(key)) {
        let dead = Backend::new(held.generation, 0, id, key.0, key.1);
        own_steps.push(step(
            Phase::TakeBackends,
            FamilyChange::PutBackend(held.id, dead),
        ));
    }

    let state = side.port(id);
    let mut new_blocks = Vec::new();
    let mut block = |selected: Vec<(BackendId, Member<A>)>| -> Result<SlotRange, PlanError> {
        let content = content_of(port, &selected);
        if content.is_empty() {
            return Ok(SlotRange::default());
        }
        if let Some((range, _)) = state.blocks.iter().find(|(_, held)| *held == content) {
            return Ok(*range);
        }
        let count = content.len() as u32;
        let range = blocks.allocate(count).ok_or(PlanError::NoSlots {
            wanted: count,
            free: blocks.free_slots(),
        })?;
        state.blocks.push((range, content.clone()));
        new_blocks.push(range);
        own_steps.push(Step {
            phase: Phase::PutSlots,
            family,
            service,
            change: Change::PutSlots {
                base: range.base,
                backends: content,
            },
        });
        Ok(range)
    };
    let ranges = block(in_cluster).and_then(|cluster| Ok((cluster, block(in_local)?)));
    let (cluster, local) = match ranges {
        Ok(ranges) => ranges,
        Err(error) => {
            for id in new {
                side.backend_ids.release(id.0);
            }
            let state = side.port(id);
            for range in new_blocks {
                state.blocks.retain(|(held, _)| *held != range);
                blocks.release(range);
            }
            return Err(error);
        }
    };
    plan.new_blocks
        .extend(new_blocks.into_iter().map(|range| (family, id, range)));

    let state = side.port(id);
    let source_ranges: BTreeSet<SourcePrefix<A>> = port
        .source_ranges
        .iter()
        .filter_map(|range| {
            Some(SourcePrefix::new(
                id,
                A::from_ip(range.network())?,
                range.prefix(),
            ))
        })
        .collect();
    for range in source_ranges.difference(&state.source_ranges) {
        let change = FamilyChange::PutSourceRange(*range);
        own_steps.push(step(Phase::PutSourceRanges, change));
    }
    for range in state.source_ranges.difference(&source_ranges) {
        let change = FamilyChange::DeleteSourceRange(*range);
        own_steps.push(step(Phase::DeleteSourceRanges, change));
    }

    let of_scope = |scope| match scope {
        Scope::Cluster => cluster,
        Scope::Local => local,
    };
    let mut keys = HashSet::with_capacity(port.frontends.len());
    for wanted in &port.frontends {
        let Some(addr) = A::from_ip(wanted.address) else {
            continue;
        };
        let number = Be16::from_host(wanted.port);
        let key = FrontendKey::new(addr, number, proto(port.key.protocol));
        let frontend = Frontend {
            service: id,
            flags: flags_of(port, wanted, local.count == 0) | port.algorithm.flags(),
            slots: of_scope(wanted.internal),
            external: of_scope(wanted.external),
            affinity_secs: port.affinity_secs,
            key_check: key.check(),
        };
        keys.insert(key);
        if state.frontends.get(&key) != Some(&frontend) {
            own_steps.push(step(
                Phase::PutFrontends,
                FamilyChange::PutFrontend(key, frontend),
            ));
        }
    }
    for key in state.frontends.keys().filter(|key| !keys.contains(key)) {
        own_steps.push(step(
            Phase::DeleteFrontends,
            FamilyChange::DeleteFrontend(*key),
        ));
    }
    let mut owners = keys.iter().filter_map(|key| side.owners.get(key));
    plan.has_moved |= owners.any(|owner| *owner != id);
    plan.new_backends
        .extend(new.into_iter().map(|id| (family, id)));
    steps.extend(own_steps);
    Ok(())
}

/// What a block of these backends holds.
fn content_of<A: PlannedAddr>(port: &Port, selected: &[(BackendId, Member<A>)]) -> Vec<BackendId> {
    let members: Vec<Member<A>> = selected.iter().map(|(_, member)| *member).collect();
    slots::fill(port.algorithm, &members)
        .into_iter()
        .filter_map(|place| selected.get(place))
        .map(|(id, _)| *id)
        .collect()
}

fn flag_of(scope: Scope) -> u32 {
    match scope {
        Scope::Cluster => BackendFlags::CLUSTER,
        Scope::Local => BackendFlags::LOCAL,
    }
}

/// [`FrontendFlags`] of a frontend.
fn flags_of(port: &Port, frontend: &PortFrontend, nobody_is_local: bool) -> u32 {
    let uses_local = frontend.internal == Scope::Local || frontend.external == Scope::Local;
    [
        (
            uses_local && nobody_is_local && port.has_endpoints,
            FrontendFlags::DROP_WHEN_EMPTY,
        ),
        (
            frontend.kind != FrontendKind::Cluster,
            FrontendFlags::EXTERNAL,
        ),
        (frontend.internal == Scope::Local, FrontendFlags::LOCAL),
        (
            frontend.external == Scope::Local,
            FrontendFlags::EXTERNAL_LOCAL,
        ),
        (
            frontend.is_balancers && !port.source_ranges.is_empty(),
            FrontendFlags::SOURCE_RANGES,
        ),
        (
            frontend.kind != FrontendKind::Cluster && frontend.external == Scope::Cluster,
            port.forwarding.flags(),
        ),
    ]
    .into_iter()
    .filter(|(is_set, _)| *is_set)
    .fold(0, |flags, (_, flag)| flags | flag)
}

pub(super) fn take_all<A: PlannedAddr>(
    state: &PortState<A>,
    steps: &mut Vec<Step>,
    service: usize,
    family: Family,
) {
    for key in state.frontends.keys() {
        let change = A::change(FamilyChange::DeleteFrontend(*key));
        steps.push(Step {
            phase: Phase::DeleteFrontends,
            family,
            service,
            change,
        });
    }
    for range in &state.source_ranges {
        steps.push(Step {
            phase: Phase::DeleteSourceRanges,
            family,
            service,
            change: A::change(FamilyChange::DeleteSourceRange(*range)),
        });
    }
    for ((addr, port), held) in &state.backends {
        let dead = Backend::new(held.generation, 0, state.id, *addr, *port);
        let change = A::change(FamilyChange::PutBackend(held.id, dead));
        steps.push(Step {
            phase: Phase::TakeBackends,
            family,
            service,
            change,
        });
    }
}

/// Drops deletions of frontends that the same plan gives to another port, and plans addresses:
/// there before their first frontend, gone after their last.
pub(super) fn plan_addresses<A: PlannedAddr>(
    side: &Side<A>,
    steps: &mut Vec<Step>,
    nodes: &HashSet<IpAddr>,
    sweeps: bool,
    all: bool,
) {
    let family = family_of::<A>();
    let view = |change: &Change| -> Option<FamilyChange<A>> { A::own(change) };
    let puts: HashSet<FrontendKey<A>> = steps
        .iter()
        .filter_map(|step| match view(&step.change)? {
            FamilyChange::PutFrontend(key, _) => Some(key),
            _ => None,
        })
        .collect();
    steps.retain(|step| match view(&step.change) {
        Some(FamilyChange::DeleteFrontend(key)) => !puts.contains(&key),
        _ => true,
    });
    // How addresses will be used, and on whose account.
    let mut uses: HashMap<A, (Uses, usize)> = HashMap::new();
    let held = |key: &FrontendKey<A>| -> Uses {
        let port = side.owners.get(key).and_then(|id| side.ports.get(id));
        let frontend = port.and_then(|port| port.frontends.get(key));
        frontend.map_or(Uses::default(), |frontend| Uses::of(frontend.flags))
    };
    for step in steps.iter() {
        let (key, new) = match view(&step.change) {
            Some(FamilyChange::PutFrontend(key, frontend)) => (key, Uses::of(frontend.flags)),
            Some(FamilyChange::DeleteFrontend(key)) => (key, Uses::default()),
            _ => continue,
        };
        let before = || {
            (
                side.uses.get(&key.addr).copied().unwrap_or_default(),
                step.service,
            )
        };
        let entry = uses.entry(key.addr).or_insert_with(before);
        entry.0 = entry.0.plus(new).minus(held(&key));
    }
    let put = |addr: A, kind, service| Step {
        phase: Phase::PutAddresses,
        family,
        service,
        change: A::change(FamilyChange::PutAddress(addr, Address { kind })),
    };
    let delete = |addr: A, service| Step {
        phase: Phase::DeleteAddresses,
        family,
        service,
        change: A::change(FamilyChange::DeleteAddress(addr)),
    };
    if all {
        // What an earlier agent left may lack addresses that nothing else touches, and an address
        // may be the node's no longer before its frontends were taken away.
        for (addr, now) in &side.uses {
            uses.entry(*addr).or_insert((*now, usize::MAX));
        }
    }
    for (addr, (after, service)) in &uses {
        let is_node = nodes.contains(&addr.into_ip());
        let kind = side.addresses.get(addr).map(|address| address.kind);
        let wanted = after.kind().map(|kind| {
            if addr.into_ip().is_loopback() {
                AddressKind::LOOPBACK
            } else {
                kind
            }
        });
        match wanted {
            _ if is_node => {}
            Some(wanted) if kind != Some(wanted) => steps.push(put(*addr, wanted, *service)),
            None if kind.is_some() => steps.push(delete(*addr, *service)),
            _ => {}
        }
    }
    for addr in &side.idle {
        let is_held = side.addresses.contains_key(addr);
        if is_held && !uses.contains_key(addr) && !nodes.contains(&addr.into_ip()) {
            steps.push(delete(*addr, usize::MAX));
        }
    }
    if !all {
        return;
    }
    for addr in nodes.iter().filter_map(|ip| A::from_ip(*ip)) {
        if side.addresses.get(&addr).map(|address| address.kind) != Some(AddressKind::NODE) {
            steps.push(put(addr, AddressKind::NODE, usize::MAX));
        }
    }
    let is_stale = |addr: &A, address: &Address| {
        let is_node = nodes.contains(&addr.into_ip());
        let is_used =
            side.uses.contains_key(addr) || uses.contains_key(addr) || side.idle.contains(addr);
        !is_node && !is_used && (sweeps || address.kind == AddressKind::NODE)
    };
    for (addr, _) in side
        .addresses
        .iter()
        .filter(|(addr, address)| is_stale(addr, address))
    {
        steps.push(delete(*addr, usize::MAX));
    }
}
