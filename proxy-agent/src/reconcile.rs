//! Makes the kernel hold what the world wants, service by service.
//!
//! Level-triggered and safe to stop anywhere: each step plans from the account of what the kernel
//! holds. A service that can't be programmed is reported and tried again, later each time, and
//! never keeps another one waiting.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
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

/// A service that waits for another try.
#[derive(Clone, Debug)]
struct Retry {
    wait: Duration,
    due: Duration,
    reason: String,
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
}

/// Drives a dataplane.
#[derive(Debug)]
pub struct Reconciler<D> {
    /// The maps.
    pub dataplane: D,
    /// What is wanted.
    pub world: World,
    planner: Planner,
    retries: HashMap<ObjectName, Retry>,
    /// What was said of services that do not get every frontend that they want.
    conflicts: HashMap<ObjectName, String>,
    has_swept: bool,
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
            planner,
            retries: HashMap::new(),
            conflicts: HashMap::new(),
            has_swept: is_clean,
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
        let mut names: BTreeSet<ObjectName> = self.world.take_dirty().into_iter().collect();
        self.tell_conflicts(&names);
        names.extend(self.due(now));
        self.planner
            .set_node_addresses(self.world.node_addresses().iter().copied());
        let sweeps = !self.has_swept && self.world.sizes().0 > 0 && !self.world.is_doubtful();
        let mut is_pending = match self.pending {
            Some(due) => due <= now,
            None => self.planner.has_new_node_addresses(),
        };
        while !names.is_empty() || sweeps && !self.has_swept || is_pending {
            outcome.services += names.len();
            is_pending = false;
            self.pending = None;
            let (rest, writes, is_udp) = self.write(names, sweeps, now);
            outcome.writes += writes;
            outcome.has_udp_change |= is_udp;
            let is_stuck = rest.is_none();
            names = rest.unwrap_or_default();
            if is_stuck {
                break;
            }
        }
        outcome
    }

    /// Writes what `names` need. Returns which of them are still to be written, `None` if a write
    /// that belongs to no service failed, how many writes were made, and whether UDP backends
    /// changed.
    fn write(
        &mut self,
        names: BTreeSet<ObjectName>,
        sweeps: bool,
        now: Duration,
    ) -> (Option<BTreeSet<ObjectName>>, usize, bool) {
        let services = names
            .iter()
            .map(|name| (name.clone(), self.world.ports(name)))
            .collect();
        let mut plan = self.planner.plan(services, sweeps, now);
        let failed: BTreeSet<ObjectName> =
            plan.failures.iter().map(|(name, _)| name.clone()).collect();
        for (name, error) in std::mem::take(&mut plan.failures) {
            self.postpone(name, error.to_string(), now);
        }
        let (applied, mut rest) = match self.dataplane.apply(&plan.changes) {
            Ok(()) => {
                self.has_swept |= sweeps;
                (plan.changes.len(), Some(BTreeSet::new()))
            }
            Err(error) => {
                let mut rest: BTreeSet<ObjectName> = plan
                    .services_from(error.applied)
                    .into_iter()
                    .cloned()
                    .collect();
                let rest = match plan.service_of(error.applied).cloned() {
                    Some(name) => {
                        rest.remove(&name);
                        self.postpone(name, error.source.to_string(), now);
                        Some(rest)
                    }
                    None => {
                        tracing::warn!("{}; trying again", error.source);
                        self.pending = Some(now + FIRST_WAIT);
                        rest.into_iter().for_each(|name| {
                            self.postpone(name, error.source.to_string(), now);
                        });
                        None
                    }
                };
                (error.applied, rest)
            }
        };
        self.planner.finish(&plan, applied, now);
        for name in &names {
            let is_written = !failed.contains(name)
                && !rest.as_ref().is_some_and(|rest| rest.contains(name))
                && self.retries.get(name).is_none_or(|retry| retry.due <= now);
            if is_written && self.retries.remove(name).is_some() {
                tracing::info!("service {name} is programmed at last");
            }
        }
        if let Some(rest) = &mut rest {
            rest.retain(|name| !failed.contains(name));
        }
        (rest, applied, plan.has_udp_change)
    }

    /// Says which of these services do not get what they want, and which do again.
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
                count => format!("{first} (and {count} more of its frontends)"),
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

    fn postpone(&mut self, name: ObjectName, reason: String, now: Duration) {
        let wait = self
            .retries
            .get(&name)
            .map_or(FIRST_WAIT, |retry| (retry.wait * 2).min(LONGEST_WAIT));
        if self
            .retries
            .get(&name)
            .is_none_or(|retry| retry.reason != reason)
        {
            tracing::warn!("service {name} can't be programmed: {reason}; trying again");
        }
        self.retries.insert(
            name,
            Retry {
                wait,
                due: now + wait,
                reason,
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

    /// Services that can't be programmed for now, with the reason.
    pub fn errors(&self) -> BTreeMap<ObjectName, String> {
        self.retries
            .iter()
            .map(|(name, retry)| (name.clone(), retry.reason.clone()))
            .collect()
    }

    /// Whether the kernel holds everything that is wanted and nothing else.
    pub fn is_settled(&self) -> bool {
        let is_known = self.world.is_synced() && !self.world.is_dirty();
        is_known && self.has_swept && self.retries.is_empty()
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
