//! Makes the kernel hold what the world wants, service by service.
//!
//! Level-triggered and safe to stop anywhere: each step plans from the account of what the kernel
//! holds. A service that can't be programmed is reported and tried again, later each time, and
//! never keeps another one waiting.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    time::Duration,
};

use crate::{
    dataplane::{Dataplane, MapError},
    model::{object::ObjectName, world::World},
    plan::planner::{Planner, PortView, Watched},
};

/// The wait before a failed service is tried again, the first time; doubled each time.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// How many services are planned and written at once: what planning takes of memory does not grow
/// with the cluster, and a write that fails holds up few.
const PORTION: usize = 1_024;

/// A service that waits for another try.
#[derive(Clone, Debug)]
struct Retry {
    wait: Duration,
    due: Duration,
    reason: String,
    /// Since when it could have been written: it fits, and the kernel refuses.
    refused_since: Option<Duration>,
}

/// Why a service is not programmed.
struct Obstacle {
    reason: String,
    /// Whether there is no room for it, rather than that the kernel refuses what would fit.
    is_full: bool,
}

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// How many map elements or ranges were written.
    pub writes: usize,
    /// How many services were looked at.
    pub services: usize,
    /// Whether UDP sockets may be connected to backends that are gone.
    pub has_udp_change: bool,
    /// Whether a frontend has gone from one port to another, and flows there with it.
    pub has_moved: bool,
}

/// What became of a portion.
#[derive(Debug, Default)]
struct Written {
    /// How many writes were made.
    count: usize,
    /// Whether UDP backends changed.
    has_udp_change: bool,
    /// Whether frontends changed hands.
    has_moved: bool,
    /// Services that are still to be written.
    rest: BTreeSet<ObjectName>,
    /// Why a write failed that belongs to no service.
    stuck: Option<String>,
}

/// Drives a dataplane.
#[derive(Debug)]
pub struct Reconciler<D> {
    /// The maps.
    pub dataplane: D,
    /// What is wanted.
    pub world: World,
    /// How many services are planned and written at once, one at least.
    pub portion: usize,
    planner: Planner,
    retries: HashMap<ObjectName, Retry>,
    /// What was said of services that do not get every frontend that they want.
    conflicts: HashMap<ObjectName, String>,
    has_swept: bool,
    /// Services that were not asked for because a write before them failed that belongs to no service,
    /// and why it did: until they are, nobody knows what is nobody's.
    unasked: (Vec<ObjectName>, String),
    /// Since when writes are refused that belong to no service.
    stuck_since: Option<Duration>,
    /// When to try writes again that belong to no service.
    pending: Option<Duration>,
}

impl<D: Dataplane> Reconciler<D> {
    /// Begins with what the kernel holds.
    pub fn new(mut dataplane: D, world: World) -> Result<Self, MapError> {
        let observed = dataplane.observe()?;
        let planner = Planner::adopt(&observed);
        // Where nobody left anything nothing is to be swept.
        let is_clean = observed.is_empty();
        Ok(Self {
            dataplane,
            world,
            portion: PORTION,
            planner,
            retries: HashMap::new(),
            conflicts: HashMap::new(),
            has_swept: is_clean,
            unasked: Default::default(),
            stuck_since: None,
            pending: None,
        })
    }

    /// Does what is to be done at `now`, a time since some fixed moment.
    ///
    /// Nothing is written before every first list has arrived, and what an earlier agent left is
    /// not removed while the list of services is empty (that is rather a mistake of the source) or
    /// may not be all there is.
    pub fn step(&mut self, now: Duration) -> Outcome {
        let mut outcome = Outcome::default();
        if !self.world.is_synced() {
            return outcome;
        }
        let dirty: BTreeSet<ObjectName> = self.world.take_dirty().into_iter().collect();
        self.tell_conflicts(&dirty);
        let (unasked, _) = std::mem::take(&mut self.unasked);
        let names = dirty.into_iter().chain(self.due(now)).chain(unasked);
        let mut waiting = self.in_order(names);
        self.planner
            .set_node_addresses(self.world.node_addresses().iter().copied());
        let sweeps = !self.has_swept && self.world.sizes().0 > 0 && !self.world.is_doubtful();
        let mut is_pending = match self.pending {
            Some(due) => due <= now,
            None => self.planner.has_new_node_addresses(),
        };
        while !waiting.is_empty() || sweeps && !self.has_swept || is_pending {
            let portion = waiting.len().min(self.portion.max(1));
            let names: BTreeSet<ObjectName> = waiting.drain(..portion).collect();
            outcome.services += names.len();
            is_pending = false;
            self.pending = None;
            // What nobody asks for is known once everybody has been asked.
            let sweeps = sweeps && waiting.is_empty();
            let written = self.write(names, sweeps, now);
            outcome.writes += written.count;
            outcome.has_udp_change |= written.has_udp_change;
            outcome.has_moved |= written.has_moved;
            // Before services that are gone, as they were.
            for name in written.rest.into_iter().rev() {
                waiting.push_front(name);
            }
            if let Some(reason) = written.stuck {
                tracing::warn!("{reason}; trying again");
                self.pending = Some(now + FIRST_WAIT);
                self.stuck_since.get_or_insert(now);
                self.unasked = (waiting.into(), reason);
                break;
            }
            self.stuck_since = None;
        }
        outcome
    }

    /// Services in the order of being written, those that are gone last: another may want a frontend
    /// of theirs, which then changes hands without having been away.
    fn in_order(&self, names: impl Iterator<Item = ObjectName>) -> VecDeque<ObjectName> {
        let mut names: Vec<ObjectName> = names.collect();
        names.sort_unstable();
        names.dedup();
        names.sort_by_cached_key(|name| !self.world.has(name));
        names.into()
    }

    /// Writes what `names` need.
    fn write(&mut self, names: BTreeSet<ObjectName>, sweeps: bool, now: Duration) -> Written {
        let services = names
            .iter()
            .map(|name| (name.clone(), self.world.ports(name)))
            .collect();
        let mut plan = self.planner.plan(services, sweeps, now);
        let failed: BTreeSet<ObjectName> =
            plan.failures.iter().map(|(name, _)| name.clone()).collect();
        for (name, error) in std::mem::take(&mut plan.failures) {
            let obstacle = Obstacle {
                reason: error.to_string(),
                is_full: true,
            };
            self.postpone(name, obstacle, now);
        }
        let mut written = Written {
            has_udp_change: plan.has_udp_change,
            has_moved: plan.has_moved,
            ..Written::default()
        };
        match self.dataplane.apply(&plan.changes) {
            Ok(()) => {
                self.has_swept |= sweeps;
                written.count = plan.changes.len();
            }
            Err(error) => {
                written.count = error.applied;
                let rest = plan.services_from(error.applied).into_iter();
                written.rest = rest
                    .filter(|name| !failed.contains(*name))
                    .cloned()
                    .collect();
                let obstacle = Obstacle {
                    reason: error.source.to_string(),
                    is_full: error.source.is_full(),
                };
                match plan.service_of(error.applied).cloned() {
                    Some(name) => {
                        written.rest.remove(&name);
                        self.postpone(name, obstacle, now);
                    }
                    None => written.stuck = Some(obstacle.reason),
                }
            }
        }
        self.planner.finish(&plan, written.count, now);
        for name in &names {
            let is_written = !failed.contains(name)
                && !written.rest.contains(name)
                && self.retries.get(name).is_none_or(|retry| retry.due <= now);
            if is_written && self.retries.remove(name).is_some() {
                tracing::info!("service {name} is programmed at last");
            }
        }
        written
    }

    /// Says which of these services do not get all that they want, and which do again.
    fn tell_conflicts(&mut self, names: &BTreeSet<ObjectName>) {
        for name in names {
            let conflicts = self.world.conflicts_of(name);
            let Some((first, others)) = conflicts.split_first() else {
                if self.conflicts.remove(name).is_some() {
                    tracing::info!("service {name} gets every frontend that it wants again");
                }
                continue;
            };
            let text = match others.len() {
                0 => first.to_string(),
                count => format!("{first} (and {count} more like this)"),
            };
            if self.conflicts.get(name) != Some(&text) {
                tracing::warn!("{text}");
                self.conflicts.insert(name.clone(), text);
            }
        }
    }

    fn due(&self, now: Duration) -> Vec<ObjectName> {
        let due = self.retries.iter().filter(|(_, retry)| retry.due <= now);
        due.map(|(name, _)| name.clone()).collect()
    }

    fn postpone(&mut self, name: ObjectName, obstacle: Obstacle, now: Duration) {
        let Obstacle { reason, is_full } = obstacle;
        let before = self.retries.get(&name);
        let wait = before.map_or(FIRST_WAIT, |retry| (retry.wait * 2).min(LONGEST_WAIT));
        let since = before.and_then(|retry| retry.refused_since);
        if before.is_none_or(|retry| retry.reason != reason) {
            tracing::warn!("service {name} can't be programmed: {reason}; trying again");
        }
        self.retries.insert(
            name,
            Retry {
                wait,
                due: now + wait,
                reason,
                refused_since: (!is_full).then(|| since.unwrap_or(now)),
            },
        );
    }

    /// When to call [`Self::step`] again without a new event.
    pub fn next_due(&self) -> Option<Duration> {
        self.retries
            .values()
            .map(|retry| retry.due)
            .chain(self.pending)
            .min()
    }

    /// Since when a change waits that the kernel refuses. What there is no room for keeps nobody else
    /// waiting, and does not count.
    pub fn refused_since(&self) -> Option<Duration> {
        let retries = self.retries.values();
        let refused = retries.filter_map(|retry| retry.refused_since);
        refused.chain(self.stuck_since).min()
    }

    /// Services that can't be programmed for now, with the reason.
    pub fn errors(&self) -> BTreeMap<ObjectName, String> {
        let (unasked, reason) = &self.unasked;
        let unasked = unasked.iter().map(|name| (name.clone(), reason.clone()));
        let retries = self.retries.iter();
        retries
            .map(|(name, retry)| (name.clone(), retry.reason.clone()))
            .chain(unasked)
            .collect()
    }

    /// Why the kernel does not hold all that is to be dialled of a service, or of a pod's host ports.
    pub fn unwritten(&self, name: &ObjectName) -> Option<String> {
        let ports = self.world.ports(name);
        let mut frontends = ports.iter().flat_map(|port| {
            let frontends = port.frontends.iter();
            frontends.map(move |frontend| (&port.key, frontend.address, frontend.port))
        });
        let is_missing = frontends.any(|(key, ip, port)| !self.planner.holds(key, ip, port));
        match self.errors().remove(name) {
            Some(reason) => Some(reason),
            None if is_missing => Some("they wait to be written".to_owned()),
            None => None,
        }
    }

    /// How many services can't be programmed for now.
    pub fn failed(&self) -> usize {
        self.retries.len() + self.unasked.0.len()
    }

    /// Whether the kernel holds everything that is wanted and nothing else.
    pub fn is_settled(&self) -> bool {
        let is_known = self.world.is_synced() && !self.world.is_dirty();
        is_known && self.has_swept && self.retries.is_empty() && self.unasked.0.is_empty()
    }

    /// Every port that the kernel holds.
    pub fn ports(&self) -> Vec<PortView> {
        self.planner.view()
    }

    /// Every port that the kernel holds whose backends are chosen by their loads.
    pub fn by_load(&mut self) -> Vec<Watched> {
        self.planner.by_load()
    }

    /// Why what an earlier agent left is not removed yet, if it is not.
    pub fn unswept(&self) -> Option<&'static str> {
        if self.has_swept || !self.world.is_synced() {
            None
        } else if self.world.is_doubtful() {
            Some(
                "something could not be read, so what an earlier agent left in the kernel stays \
                 until it can",
            )
        } else if self.world.sizes().0 == 0 {
            Some(
                "there is no service, so what an earlier agent left in the kernel stays (to remove \
                 it run `penstock cleanup`)",
            )
        } else {
            None
        }
    }

    /// How many frontends, addresses and backends each family has.
    pub fn sizes(&self) -> [[usize; 3]; 2] {
        self.planner.sizes()
    }

    /// Backends and slots in use.
    pub fn used(&self) -> (usize, u32) {
        self.planner.used()
    }
}
