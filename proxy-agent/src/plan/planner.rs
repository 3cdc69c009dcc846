//! Plans writes per service, and keeps an exact account of what the kernel holds.
//!
//! The account changes only by [`Planner::finish`], with what was really written, so that a plan
//! made after any failure starts from what is there and not from what was meant to be there.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use penstock_common::{
    Addr, BackendId, Be16, Frontend, FrontendKey, Proto, ServiceId, SlotRange, V4, V6, limits,
};

use super::{
    blocks::Blocks,
    ids::Serial,
    side::{PlannedAddr, PortState, Side},
    writes::{Plan, Step, plan_addresses, plan_port, proto, take_all},
};
use crate::{
    dataplane::{Change, FamilyChange, FamilyState, MapState},
    model::{
        object::{Family, ObjectName, Protocol},
        port::{Port, PortKey},
    },
};

/// How long a block or an id rests before it is given out anew: far longer than any program run
/// that may still hold it.
pub const GRACE: Duration = Duration::from_secs(1);

/// A port whose backends are chosen by their loads.
#[derive(Clone, Debug, Default)]
pub struct Watched {
    /// Its family.
    pub is_v4: bool,
    /// Whether TCP sockets are connected to it.
    pub is_tcp: bool,
    /// Its frontends.
    pub frontends: Vec<SocketAddr>,
    /// Its backends, each with its id and the id's generation.
    pub backends: Vec<(SocketAddr, (BackendId, u32))>,
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
    service_ids: Serial,
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
            service_ids: Serial::after(highest(observed)),
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
        let observed = port.frontends.iter().find_map(|frontend| {
            let (ip, number) = (&frontend.address, &frontend.port);
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
            None => {
                let (v4, v6) = (&self.v4.ports, &self.v6.ports);
                let is_used = |id| [v4.contains_key(&id), v6.contains_key(&id)].contains(&true);
                ServiceId(self.service_ids.next(|id| is_used(ServiceId(id))))
            }
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
            self.forget_gone(name);
        }
        if applied == plan.changes.len() {
            self.has_new_node_addresses = false;
        }
        let (v4, v6) = (&self.v4, &self.v6);
        self.unclaimed
            .retain(|id| v4.ports.contains_key(id) || v6.ports.contains_key(id));
    }

    /// Drops ports of a service of which the kernel holds nothing and nobody wants anything.
    fn forget_gone(&mut self, name: &ObjectName) {
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

    /// How many frontends, addresses and backends each family has.
    pub fn sizes(&self) -> [[usize; 3]; 2] {
        fn of<A: Ord>(side: &Side<A>) -> [usize; 3] {
            let backends = side.backend_ids.used();
            [side.owners.len(), side.addresses.len(), backends]
        }
        [of(&self.v4), of(&self.v6)]
    }

    /// Every port that the kernel holds whose backends are chosen by their loads.
    pub fn by_load(&mut self) -> Vec<Watched> {
        let v4 = self.v4.ports_by_load().map(watched);
        let all: Vec<Watched> = v4.collect();
        let v6 = self.v6.ports_by_load().map(watched);
        all.into_iter().chain(v6).collect()
    }

    /// Whether the kernel holds this frontend of a port.
    pub fn holds(&self, key: &PortKey, ip: IpAddr, port: u16) -> bool {
        let id = self.ids.get(key).copied();
        let owner = match key.family {
            Family::V4 => owner(&self.v4, ip, port, key.protocol),
            Family::V6 => owner(&self.v6, ip, port, key.protocol),
        };
        id.is_some() && id == owner
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

fn watched<A: PlannedAddr>(state: &PortState<A>) -> Watched {
    let frontends = state.frontends.keys();
    let at = |addr: A, port: Be16| SocketAddr::new(addr.into_ip(), port.to_host());
    Watched {
        is_v4: size_of::<A>() == size_of::<V4>(),
        is_tcp: frontends.clone().any(|key| key.proto == Proto::TCP),
        frontends: frontends.map(|key| at(key.addr, key.port)).collect(),
        backends: state
            .backends
            .iter()
            .filter(|(_, held)| held.flags != 0)
            .map(|((addr, port), held)| (at(*addr, *port), (held.id, held.generation)))
            .collect(),
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

fn adopt_blocks<A: PlannedAddr>(side: &mut Side<A>, blocks: &mut Blocks, observed: &MapState) {
    for state in side.ports.values_mut() {
        let frontends = state.frontends.values();
        let mut ranges: Vec<SlotRange> = frontends
            .flat_map(|frontend| [frontend.slots, frontend.external])
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

fn drop_block<A: PlannedAddr>(side: &mut Side<A>, id: ServiceId, range: SlotRange) {
    if let Some(state) = side.ports.get_mut(&id) {
        state.blocks.retain(|(held, _)| *held != range);
    }
}

/// The highest id of a service port that anything in the kernel names, backends that are gone
/// included.
fn highest(observed: &MapState) -> u32 {
    fn of<A: Addr + Ord>(family: &FamilyState<A>) -> u32 {
        let frontends = family.frontends.values().map(|frontend| frontend.service.0);
        let backends = family.backends.values().map(|backend| backend.service.0);
        let ranges = family.source_ranges.iter();
        let ranges = ranges.map(|range| range.range.service.0);
        frontends.chain(backends).chain(ranges).max().unwrap_or(0)
    }
    of(&observed.v4).max(of(&observed.v6))
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
        let is_used = frontends
            .values()
            .any(|frontend| frontend.slots == *range || frontend.external == *range);
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
    if state.frontends.is_empty()
        && state.backends.is_empty()
        && state.blocks.is_empty()
        && state.source_ranges.is_empty()
    {
        side.ports.remove(&id);
    }
}
