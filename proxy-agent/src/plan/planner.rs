//! Plans writes per service, and keeps an exact account of what the kernel holds.
//!
//! The account changes only by [`Planner::finish`], with what was really written, so that a plan
//! made after any failure starts from what is there and not from what was meant to be there.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    time::Duration,
};

use penstock_common::{
    Address, AddressKind, Backend, BackendFlags, BackendId, Be16, Frontend, FrontendFlags,
    FrontendKey, Proto, ServiceId, SlotRange, V4, V6, limits,
};

use super::{
    blocks::Blocks,
    ids::Ids,
    side::{Held, PlannedAddr, PortState, Side},
};
use crate::{
    dataplane::{Change, FamilyChange, MapState},
    model::{
        object::{Family, ObjectName, Protocol},
        port::{OnEmpty, Port, PortKey},
    },
};

/// How long a block or an id rests before it is given out anew: far longer than any program run
/// that may still hold it.
pub const GRACE: Duration = Duration::from_secs(1);

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
enum Phase {
    PutBackends,
    PutSlots,
    PutAddresses,
    PutFrontends,
    DeleteFrontends,
    DeleteAddresses,
    TakeBackends,
}

/// One write and whose it is.
#[derive(Clone, Debug)]
struct Step {
    phase: Phase,
    family: Family,
    service: usize,
    change: Change,
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
    services: Vec<ObjectName>,
    owners: Vec<usize>,
    touched: Vec<(Family, ServiceId)>,
    new_backends: HashSet<(Family, BackendId)>,
    new_blocks: Vec<(Family, ServiceId, SlotRange)>,
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

/// A port as the command line shows it.
#[derive(Clone, Debug)]
pub struct PortView {
    /// Which port.
    pub key: PortKey,
    /// Its id.
    pub id: ServiceId,
    /// Frontends and what the kernel holds for them.
    pub frontends: Vec<(IpAddr, u16, Frontend)>,
    /// Backends: address, port, id, generation, flags.
    pub backends: Vec<(IpAddr, u16, BackendId, u32, u32)>,
}

/// Plans, and keeps the account.
#[derive(Debug)]
pub struct Planner {
    v4: Side<V4>,
    v6: Side<V6>,
    blocks: Blocks,
    service_ids: Ids,
    ids: HashMap<PortKey, ServiceId>,
    ports: HashMap<ObjectName, Vec<PortKey>>,
    /// Services that the kernel holds and nobody has asked for yet.
    unclaimed: HashSet<ServiceId>,
    node_addresses: HashSet<IpAddr>,
    /// Whether the kernel may hold others.
    has_new_node_addresses: bool,
}

impl Planner {
    /// Begins with what the kernel holds.
    pub fn adopt(observed: &MapState) -> Self {
        let mut planner = Self {
            v4: Side::new(),
            v6: Side::new(),
            blocks: Blocks::new(limits::SLOTS),
            service_ids: Ids::new(1, u32::MAX),
            ids: HashMap::new(),
            ports: HashMap::new(),
            unclaimed: HashSet::new(),
            node_addresses: HashSet::new(),
            has_new_node_addresses: false,
        };
        planner.v4.adopt(&observed.v4);
        planner.v6.adopt(&observed.v6);
        let blocks = &mut planner.blocks;
        adopt_blocks(&mut planner.v4, blocks, observed);
        adopt_blocks(&mut planner.v6, blocks, observed);
        let mut ids: Vec<ServiceId> = planner
            .v4
            .ports
            .keys()
            .chain(planner.v6.ports.keys())
            .copied()
            .collect();
        ids.sort_unstable();
        for id in ids {
            planner.service_ids.restore(id.0, 0, true);
            planner.unclaimed.insert(id);
        }
        planner
    }

    /// Sets the addresses that are this node's own.
    pub fn set_node_addresses(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        let addresses = addresses.into_iter().collect();
        self.has_new_node_addresses |= addresses != self.node_addresses;
        self.node_addresses = addresses;
    }

    /// Whether the kernel may hold other node addresses than it should.
    pub fn has_new_node_addresses(&self) -> bool {
        self.has_new_node_addresses
    }

    /// Plans what makes the kernel serve `services`, each with all its ports.
    ///
    /// With `sweeps`, what nobody has asked for is removed too: only once everything is known.
    pub fn plan(
        &mut self,
        services: Vec<(ObjectName, Vec<Port>)>,
        sweeps: bool,
        now: Duration,
    ) -> Plan {
        self.blocks.settle(now, GRACE);
        self.service_ids.settle(now, GRACE);
        self.v4.backend_ids.settle(now, GRACE);
        self.v6.backend_ids.settle(now, GRACE);

        let mut plan = Plan::default();
        let mut steps = Vec::new();
        for (name, ports) in services {
            let index = plan.services.len();
            plan.services.push(name.clone());
            self.plan_service(&mut plan, &mut steps, index, &name, &ports);
        }
        if sweeps {
            for id in self.unclaimed.clone() {
                self.plan_removal(&mut plan, &mut steps, usize::MAX, id, Protocol::Udp);
            }
        }
        let all = sweeps || self.has_new_node_addresses;
        plan_addresses(&self.v4, &mut steps, &self.node_addresses, sweeps, all);
        plan_addresses(&self.v6, &mut steps, &self.node_addresses, sweeps, all);
        steps.sort_by_key(|step| (step.phase, step.family));
        plan.owners = steps.iter().map(|step| step.service).collect();
        plan.changes = steps.into_iter().map(|step| step.change).collect();
        plan
    }

    fn plan_service(
        &mut self,
        plan: &mut Plan,
        steps: &mut Vec<Step>,
        index: usize,
        name: &ObjectName,
        ports: &[Port],
    ) {
        let mut keys = Vec::with_capacity(ports.len());
        for port in ports {
            let id = self.id_of(port);
            keys.push(port.key.clone());
            let planned = match port.key.family {
                Family::V4 => {
                    plan_port(&mut self.v4, &mut self.blocks, plan, steps, index, id, port)
                }
                Family::V6 => {
                    plan_port(&mut self.v6, &mut self.blocks, plan, steps, index, id, port)
                }
            };
            plan.touched.push((port.key.family, id));
            if let Err(error) = planned {
                plan.failures.push((name.clone(), error));
            }
        }
        let old = self
            .ports
            .insert(name.clone(), keys.clone())
            .unwrap_or_default();
        for key in old.into_iter().filter(|key| !keys.contains(key)) {
            if let Some(id) = self.ids.get(&key).copied() {
                self.plan_removal(plan, steps, index, id, key.protocol);
                // Known until it is gone, so that a failed removal is planned again.
                if let Some(keys) = self.ports.get_mut(name) {
                    keys.push(key);
                }
            }
        }
    }

    /// The id of a port: its own, that of an earlier agent's service at the same frontend, or a
    /// new one.
    fn id_of(&mut self, port: &Port) -> ServiceId {
        if let Some(id) = self.ids.get(&port.key) {
            return *id;
        }
        let observed = port.frontends.iter().find_map(|(ip, number)| {
            let owner = match port.key.family {
                Family::V4 => owner(&self.v4, *ip, *number, port.key.protocol),
                Family::V6 => owner(&self.v6, *ip, *number, port.key.protocol),
            };
            owner.filter(|id| self.unclaimed.contains(id))
        });
        let id = match observed {
            Some(id) => {
                self.unclaimed.remove(&id);
                id
            }
            // There are as many ids as a word has values.
            None => ServiceId(self.service_ids.allocate().map_or(u32::MAX, |(id, _)| id)),
        };
        self.ids.insert(port.key.clone(), id);
        id
    }

    fn plan_removal(
        &mut self,
        plan: &mut Plan,
        steps: &mut Vec<Step>,
        index: usize,
        id: ServiceId,
        protocol: Protocol,
    ) {
        plan.has_udp_change |= protocol == Protocol::Udp;
        if let Some(state) = self.v4.ports.get(&id) {
            take_all(state, steps, index, Family::V4);
            plan.touched.push((Family::V4, id));
        }
        if let Some(state) = self.v6.ports.get(&id) {
            take_all(state, steps, index, Family::V6);
            plan.touched.push((Family::V6, id));
        }
    }

    /// Enters into the account that the first `applied` changes of `plan` were made, at `now`.
    pub fn finish(&mut self, plan: &Plan, applied: usize, now: Duration) {
        for (number, change) in plan.changes.iter().enumerate() {
            match change {
                Change::V4(change) if number < applied => self.v4.commit(change),
                Change::V6(change) if number < applied => self.v6.commit(change),
                Change::V4(FamilyChange::PutBackend(id, _))
                    if plan.new_backends.contains(&(Family::V4, *id)) =>
                {
                    self.v4.backend_ids.release(id.0);
                }
                Change::V6(FamilyChange::PutBackend(id, _))
                    if plan.new_backends.contains(&(Family::V6, *id)) =>
                {
                    self.v6.backend_ids.release(id.0);
                }
                _ => {}
            }
        }
        let written: HashSet<u32> = plan
            .changes
            .iter()
            .take(applied)
            .filter_map(|change| match change {
                Change::PutSlots { base, .. } => Some(*base),
                _ => None,
            })
            .collect();
        for (family, id, range) in &plan.new_blocks {
            if !written.contains(&range.base) {
                match family {
                    Family::V4 => drop_block(&mut self.v4, *id, *range),
                    Family::V6 => drop_block(&mut self.v6, *id, *range),
                }
                self.blocks.release(*range);
            }
        }
        for (family, id) in &plan.touched {
            match family {
                Family::V4 => retire_unused(&mut self.v4, &mut self.blocks, *id, now),
                Family::V6 => retire_unused(&mut self.v6, &mut self.blocks, *id, now),
            }
        }
        for name in &plan.services {
            self.forget_gone(name, now);
        }
        if applied == plan.changes.len() {
            self.has_new_node_addresses = false;
        }
        let (v4, v6, ids) = (&self.v4, &self.v6, &mut self.service_ids);
        self.unclaimed.retain(|id| {
            let is_held = v4.ports.contains_key(id) || v6.ports.contains_key(id);
            if !is_held {
                ids.retire(id.0, now);
            }
            is_held
        });
    }

    /// Drops ports of a service of which the kernel holds nothing and nobody wants anything.
    fn forget_gone(&mut self, name: &ObjectName, now: Duration) {
        let Some(keys) = self.ports.get_mut(name) else {
            return;
        };
        let (v4, v6, ids) = (&self.v4, &self.v6, &mut self.ids);
        keys.retain(|key| {
            let Some(id) = ids.get(key).copied() else {
                return false;
            };
            let is_held = v4.ports.contains_key(&id) || v6.ports.contains_key(&id);
            if !is_held {
                ids.remove(key);
                self.service_ids.retire(id.0, now);
            }
            is_held
        });
        if keys.is_empty() {
            self.ports.remove(name);
        }
    }

    /// How many backends are in use, and how many slots are neither free nor resting.
    pub fn used(&self) -> (usize, u32) {
        let backends = self.v4.backend_ids.used() + self.v6.backend_ids.used();
        let free = self.blocks.free_slots() + self.blocks.retired_slots();
        (backends, limits::SLOTS - free)
    }

    /// Every port that the kernel holds, by name.
    pub fn view(&self) -> Vec<PortView> {
        let mut views: Vec<PortView> = self
            .ids
            .iter()
            .filter_map(|(key, id)| match key.family {
                Family::V4 => self.v4.ports.get(id).map(|state| view(key, state)),
                Family::V6 => self.v6.ports.get(id).map(|state| view(key, state)),
            })
            .collect();
        views.sort_by(|a, b| a.key.cmp(&b.key));
        views
    }
}

fn view<A: PlannedAddr>(key: &PortKey, state: &PortState<A>) -> PortView {
    PortView {
        key: key.clone(),
        id: state.id,
        frontends: state
            .frontends
            .iter()
            .map(|(key, frontend)| (key.addr.into_ip(), key.port.to_host(), *frontend))
            .collect(),
        backends: state
            .backends
            .iter()
            .map(|((addr, port), held)| {
                (
                    addr.into_ip(),
                    port.to_host(),
                    held.id,
                    held.generation,
                    held.flags,
                )
            })
            .collect(),
    }
}

fn owner<A: PlannedAddr>(
    side: &Side<A>,
    ip: IpAddr,
    port: u16,
    protocol: Protocol,
) -> Option<ServiceId> {
    let key = FrontendKey::new(A::from_ip(ip)?, Be16::from_host(port), proto(protocol));
    side.owners.get(&key).copied()
}

fn proto(protocol: Protocol) -> Proto {
    match protocol {
        Protocol::Tcp => Proto::TCP,
        Protocol::Udp => Proto::UDP,
        Protocol::Sctp => Proto::SCTP,
    }
}

fn family_of<A: PlannedAddr>() -> Family {
    if size_of::<A>() == 4 {
        Family::V4
    } else {
        Family::V6
    }
}

fn adopt_blocks<A: PlannedAddr>(side: &mut Side<A>, blocks: &mut Blocks, observed: &MapState) {
    for state in side.ports.values_mut() {
        let mut ranges: Vec<SlotRange> = state
            .frontends
            .values()
            .map(|frontend| frontend.slots)
            .collect();
        ranges.sort_unstable();
        ranges.dedup();
        for range in ranges.into_iter().filter(|range| range.count > 0) {
            let slots = range.base..range.base.saturating_add(range.count);
            let content: Option<Vec<BackendId>> = slots
                .map(|slot| observed.slots.get(&slot).copied())
                .collect();
            // A range that is not whole or not this port's alone is no block: the next plan
            // gives the port one, and this one is nobody's to free.
            if let Some(content) = content
                && blocks.reserve(range)
            {
                state.blocks.push((range, content));
            }
        }
    }
}

/// Plans one port; on an error nothing is kept of what was planned for it.
fn plan_port<A: PlannedAddr>(
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
    let mut content = Vec::with_capacity(port.backends.len());
    let mut own_steps = Vec::new();
    let mut new = Vec::new();
    for backend in &port.backends {
        let Some(addr) = A::from_ip(backend.address) else {
            continue;
        };
        let key = (addr, Be16::from_host(backend.port));
        let selected = if backend.is_selected {
            BackendFlags::SELECTED
        } else {
            0
        };
        let flags = BackendFlags::LIVE | selected;
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
                }
            }
        };
        let put = |flags| {
            let value = Backend::new(held.generation, flags, id, key.0, key.1);
            FamilyChange::PutBackend(held.id, value)
        };
        if flags & !held.flags != 0 {
            own_steps.push(step(Phase::PutBackends, put(flags | held.flags)));
        }
        if held.flags & !flags != 0 {
            own_steps.push(step(Phase::TakeBackends, put(flags)));
        }
        wanted.insert(key);
        if backend.is_selected {
            content.push(held.id);
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
    let is_empty = content.is_empty();
    let range = match state.blocks.iter().find(|(_, held)| *held == content) {
        _ if is_empty => SlotRange::default(),
        Some((range, _)) => *range,
        None => {
            let count = content.len() as u32;
            let Some(range) = blocks.allocate(count) else {
                new.into_iter()
                    .for_each(|id| side.backend_ids.release(id.0));
                return Err(PlanError::NoSlots {
                    wanted: count,
                    free: blocks.free_slots(),
                });
            };
            state.blocks.push((range, content.clone()));
            plan.new_blocks.push((family, id, range));
            let change = Change::PutSlots {
                base: range.base,
                backends: content,
            };
            own_steps.push(Step {
                phase: Phase::PutSlots,
                family,
                service,
                change,
            });
            range
        }
    };

    let drops = is_empty && port.on_empty == OnEmpty::Drop;
    let mut keys = HashSet::with_capacity(port.frontends.len());
    for (ip, number) in &port.frontends {
        let Some(addr) = A::from_ip(*ip) else {
            continue;
        };
        let key = FrontendKey::new(addr, Be16::from_host(*number), proto(port.key.protocol));
        let frontend = Frontend {
            service: id,
            flags: if drops {
                FrontendFlags::DROP_WHEN_EMPTY
            } else {
                0
            },
            slots: range,
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
    plan.new_backends
        .extend(new.into_iter().map(|id| (family, id)));
    steps.extend(own_steps);
    Ok(())
}

fn take_all<A: PlannedAddr>(
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
fn plan_addresses<A: PlannedAddr>(
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
    let mut uses: HashMap<A, (i64, usize)> = HashMap::new();
    for step in steps.iter() {
        match view(&step.change) {
            Some(FamilyChange::PutFrontend(key, _)) => {
                let is_new = !side.owners.contains_key(&key);
                let entry = uses.entry(key.addr).or_insert((0, step.service));
                entry.0 += i64::from(is_new);
            }
            Some(FamilyChange::DeleteFrontend(key)) => {
                uses.entry(key.addr).or_insert((0, step.service)).0 -= 1;
            }
            _ => {}
        }
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
    for (addr, (change, service)) in &uses {
        let is_node = nodes.contains(&addr.into_ip());
        let after = i64::from(side.uses.get(addr).copied().unwrap_or(0)) + change;
        let kind = side.addresses.get(addr).map(|address| address.kind);
        if after > 0 && !is_node && kind != Some(AddressKind::SERVICE) {
            steps.push(put(*addr, AddressKind::SERVICE, *service));
        } else if after <= 0 && !is_node && kind.is_some() {
            steps.push(delete(*addr, *service));
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

fn drop_block<A: PlannedAddr>(side: &mut Side<A>, id: ServiceId, range: SlotRange) {
    if let Some(state) = side.ports.get_mut(&id) {
        state.blocks.retain(|(held, _)| *held != range);
    }
}

/// Retires a port's blocks that no frontend covers and its backends that are dead; forgets a port
/// of which nothing is left.
fn retire_unused<A: PlannedAddr>(
    side: &mut Side<A>,
    blocks: &mut Blocks,
    id: ServiceId,
    now: Duration,
) {
    let Some(state) = side.ports.get_mut(&id) else {
        return;
    };
    let frontends = &state.frontends;
    state.blocks.retain(|(range, _)| {
        let is_used = frontends.values().any(|frontend| frontend.slots == *range);
        if !is_used {
            blocks.retire(*range, now);
        }
        is_used
    });
    let ids = &mut side.backend_ids;
    state.backends.retain(|_, held| {
        if held.flags == 0 {
            ids.retire(held.id.0, now);
        }
        held.flags != 0
    });
    if state.frontends.is_empty() && state.backends.is_empty() && state.blocks.is_empty() {
        side.ports.remove(&id);
    }
}
