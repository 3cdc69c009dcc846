//! One address family's half of the planner: what the kernel holds for each port.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use penstock_common::{
    Addr, Address, AddressKind, Backend, BackendId, Be16, Frontend, FrontendFlags, FrontendKey,
    ServiceId, SlotRange, SourcePrefix, V4, V6, limits,
};

use super::ids::Ids;
use crate::dataplane::{Change, FamilyChange};

/// An address type that the planner can plan for.
pub(super) trait PlannedAddr: Addr + Ord + std::hash::Hash {
    /// This family's address, if it is of this family.
    fn from_ip(ip: IpAddr) -> Option<Self>;
    /// The other way.
    fn into_ip(self) -> IpAddr;
    /// A change of this family's maps.
    fn change(change: FamilyChange<Self>) -> Change;
    /// The other way, if it is this family's.
    fn own(change: &Change) -> Option<FamilyChange<Self>>;
}

impl PlannedAddr for V4 {
    fn from_ip(ip: IpAddr) -> Option<Self> {
        match ip {
            IpAddr::V4(ip) => Some(ip.into()),
            IpAddr::V6(_) => None,
        }
    }
    fn into_ip(self) -> IpAddr {
        IpAddr::V4(self.into())
    }
    fn change(change: FamilyChange<Self>) -> Change {
        Change::V4(change)
    }
    fn own(change: &Change) -> Option<FamilyChange<Self>> {
        match change {
            Change::V4(change) => Some(*change),
            _ => None,
        }
    }
}

impl PlannedAddr for V6 {
    fn from_ip(ip: IpAddr) -> Option<Self> {
        match ip {
            IpAddr::V6(ip) => Some(ip.into()),
            IpAddr::V4(_) => None,
        }
    }
    fn into_ip(self) -> IpAddr {
        IpAddr::V6(self.into())
    }
    fn change(change: FamilyChange<Self>) -> Change {
        Change::V6(change)
    }
    fn own(change: &Change) -> Option<FamilyChange<Self>> {
        match change {
            Change::V6(change) => Some(*change),
            _ => None,
        }
    }
}

/// A backend that the kernel holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) id: BackendId,
    pub(super) generation: u32,
    pub(super) flags: u32,
    /// At least 1.
    pub(super) weight: u16,
}

/// What the kernel holds for one port.
#[derive(Clone, Debug, Default)]
pub(super) struct PortState<A: Ord> {
    pub(super) id: ServiceId,
    pub(super) frontends: BTreeMap<FrontendKey<A>, Frontend>,
    pub(super) backends: BTreeMap<(A, Be16), Held>,
    /// Blocks that are this port's, with what their slots hold.
    pub(super) blocks: Vec<(SlotRange, Vec<BackendId>)>,
    /// Clients of load balancers' addresses that may come.
    pub(super) source_ranges: BTreeSet<SourcePrefix<A>>,
}

/// How many frontends an address has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Uses {
    /// Those of services' own addresses, where other ports are refused.
    pub(super) own: i64,
    /// The others.
    pub(super) external: i64,
}

impl Uses {
    /// One frontend with these flags.
    pub(super) fn of(flags: u32) -> Self {
        let external = i64::from(flags & FrontendFlags::EXTERNAL != 0);
        Self {
            own: 1 - external,
            external,
        }
    }

    pub(super) fn plus(self, other: Self) -> Self {
        Self {
            own: self.own + other.own,
            external: self.external + other.external,
        }
    }

    pub(super) fn minus(self, other: Self) -> Self {
        Self {
            own: self.own - other.own,
            external: self.external - other.external,
        }
    }

    /// What the address is because of them.
    pub(super) fn kind(self) -> Option<u32> {
        if self.own > 0 {
            Some(AddressKind::SERVICE)
        } else if self.external > 0 {
            Some(AddressKind::EXTERNAL)
        } else {
            None
        }
    }
}

/// One family's maps as the kernel holds them.
#[derive(Debug)]
pub(super) struct Side<A: Ord> {
    /// Ports by service id.
    pub(super) ports: HashMap<ServiceId, PortState<A>>,
    /// Who has a frontend.
    pub(super) owners: HashMap<FrontendKey<A>, ServiceId>,
    pub(super) addresses: HashMap<A, Address>,
    pub(super) uses: HashMap<A, Uses>,
    /// Services' addresses without a frontend: to be removed.
    pub(super) idle: BTreeSet<A>,
    pub(super) backend_ids: Ids,
    /// Ports that choose backends by their loads, or did once.
    pub(super) by_load: BTreeSet<ServiceId>,
}

impl<A: PlannedAddr> Side<A> {
    pub(super) fn new() -> Self {
        Self {
            ports: HashMap::new(),
            owners: HashMap::new(),
            addresses: HashMap::new(),
            uses: HashMap::new(),
            idle: BTreeSet::new(),
            backend_ids: Ids::new(0, limits::BACKENDS),
            by_load: BTreeSet::new(),
        }
    }

    /// Takes in what the kernel was seen to hold. Blocks are the caller's business.
    pub(super) fn adopt(&mut self, observed: &crate::dataplane::FamilyState<A>) {
        self.addresses = observed
            .addresses
            .iter()
            .map(|(addr, kind)| (*addr, *kind))
            .collect();
        for (key, frontend) in &observed.frontends {
            self.note_algorithm(frontend);
            let port = self.port(frontend.service);
            port.frontends.insert(*key, *frontend);
            self.owners.insert(*key, frontend.service);
            self.use_address(key.addr, Uses::of(frontend.flags), Uses::default());
        }
        for range in &observed.source_ranges {
            self.port(range.range.service).source_ranges.insert(*range);
        }
        for (id, backend) in &observed.backends {
            let mut is_used = backend.flags != 0;
            if is_used {
                let held = Held {
                    id: *id,
                    generation: backend.generation,
                    flags: backend.flags,
                    weight: backend.weight() as u16,
                };
                let key = (backend.addr, backend.port);
                // Two ids for one backend can only come from elsewhere; one of them stays.
                is_used = self
                    .port(backend.service)
                    .backends
                    .insert(key, held)
                    .is_none();
            }
            self.backend_ids.restore(id.0, backend.generation, is_used);
        }
    }

    pub(super) fn port(&mut self, id: ServiceId) -> &mut PortState<A> {
        self.ports.entry(id).or_insert_with(|| PortState {
            id,
            frontends: BTreeMap::new(),
            backends: BTreeMap::new(),
            blocks: Vec::new(),
            source_ranges: BTreeSet::new(),
        })
    }

    /// Notes that a change was made.
    pub(super) fn commit(&mut self, change: &FamilyChange<A>) {
        match *change {
            FamilyChange::PutBackend(id, backend) => self.commit_backend(id, &backend),
            FamilyChange::PutFrontend(key, frontend) => {
                self.note_algorithm(&frontend);
                let new = Uses::of(frontend.flags);
                let old = self.take_frontend(&key).unwrap_or_default();
                self.use_address(key.addr, new, old);
                self.owners.insert(key, frontend.service);
                self.port(frontend.service).frontends.insert(key, frontend);
            }
            FamilyChange::DeleteFrontend(key) => {
                if let Some(old) = self.take_frontend(&key) {
                    self.use_address(key.addr, Uses::default(), old);
                }
            }
            FamilyChange::PutSourceRange(range) => {
                self.port(range.range.service).source_ranges.insert(range);
            }
            FamilyChange::DeleteSourceRange(range) => {
                self.port(range.range.service).source_ranges.remove(&range);
            }
            FamilyChange::PutAddress(addr, kind) => {
                self.addresses.insert(addr, kind);
                if !self.uses.contains_key(&addr) {
                    self.idle.insert(addr);
                }
            }
            FamilyChange::DeleteAddress(addr) => {
                self.addresses.remove(&addr);
                self.idle.remove(&addr);
            }
        }
    }

    fn note_algorithm(&mut self, frontend: &Frontend) {
        if frontend.flags & FrontendFlags::BY_LOAD != 0 {
            self.by_load.insert(frontend.service);
        }
    }

    /// Ports that choose backends by their loads.
    pub(super) fn ports_by_load(&mut self) -> impl Iterator<Item = &PortState<A>> {
        let ports = &self.ports;
        self.by_load.retain(|id| {
            let mut frontends = ports.get(id).into_iter().flat_map(|port| &port.frontends);
            frontends.any(|(_, frontend)| frontend.flags & FrontendFlags::BY_LOAD != 0)
        });
        self.by_load.iter().filter_map(|id| ports.get(id))
    }

    /// Takes a frontend out of its port; how its address was used by it.
    fn take_frontend(&mut self, key: &FrontendKey<A>) -> Option<Uses> {
        let owner = self.owners.remove(key)?;
        let old = self.port(owner).frontends.remove(key)?;
        Some(Uses::of(old.flags))
    }

    fn use_address(&mut self, addr: A, new: Uses, old: Uses) {
        let uses = self.uses.entry(addr).or_default();
        *uses = uses.plus(new).minus(old);
        if *uses == Uses::default() {
            self.uses.remove(&addr);
            self.idle.insert(addr);
        } else {
            self.idle.remove(&addr);
        }
    }

    fn commit_backend(&mut self, id: BackendId, backend: &Backend<A>) {
        let key = (backend.addr, backend.port);
        let backends = &mut self.port(backend.service).backends;
        if backend.flags == 0 {
            // Kept, without flags, until the planner retires its id.
            if let Some(held) = backends.get_mut(&key) {
                held.flags = 0;
            }
            return;
        }
        let held = Held {
            id,
            generation: backend.generation,
            flags: backend.flags,
            weight: backend.weight() as u16,
        };
        backends.insert(key, held);
    }
}
