//! What Prometheus is told: every metric's name is here.
//!
//! Numbers that the agent or the kernel has anyway are read when asked; only how long changes take is
//! kept. Where kube-proxy has the same metric, it has kube-proxy's name.

use std::{
    sync::atomic::AtomicU64,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aya::maps::{Map, PerCpuArray};
use penstock_common::Counter as Event;
use prometheus_client::{
    encoding::text,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use crate::{
    dataplane::pins::{PinError, Pins},
    model::object::{self, Kind},
    process::Process,
    usage::Fill,
};

/// The family of addresses, as kube-proxy calls it.
type FamilyLabel = [(&'static str, &'static str); 1];
/// A number that may have a fraction.
type Real = Gauge<f64, AtomicU64>;

/// Times, by family.
type Times = Family<FamilyLabel, Histogram, fn() -> Histogram>;

/// How changes reach the kernel. Both families' are written together, and where kube-proxy tells of each by
/// itself both are told the same.
#[derive(Clone, Debug)]
pub struct Syncs {
    durations: Times,
    /// When all that had changed was written last, in seconds since 1970.
    last: Family<FamilyLabel, Real>,
    /// When something was to be written last, in seconds since 1970.
    queued: Family<FamilyLabel, Real>,
    services: Changes,
    endpoints: Changes,
    /// From what made endpoints change until that was written.
    programming: Times,
}

/// Changes of one kind of objects.
#[derive(Clone, Debug, Default)]
struct Changes {
    seen: Counter,
    /// Those that were not written yet.
    pending: Gauge,
}

impl Default for Syncs {
    fn default() -> Self {
        Self {
            durations: Family::new_with_constructor(sync_times),
            last: Family::default(),
            queued: Family::default(),
            services: Changes::default(),
            endpoints: Changes::default(),
            programming: Family::new_with_constructor(programming_times),
        }
    }
}

/// A family as kube-proxy labels it.
fn label(family: object::Family) -> FamilyLabel {
    [("ip_family", family.label())]
}

/// Both families as labels.
fn labels() -> [FamilyLabel; 2] {
    [object::Family::V4, object::Family::V6].map(label)
}

/// kube-proxy's buckets: from a millisecond to 16 seconds.
fn sync_times() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 15))
}

/// kube-proxy's buckets: they get wider up to five minutes, so that queries over nodes of both fit.
fn programming_times() -> Histogram {
    let steps = |first: u32, step: u32, count: u32| {
        (0..count).map(move |number| f64::from(first + step * number))
    };
    let buckets = [0.25, 0.5].into_iter();
    let buckets = buckets.chain(steps(1, 1, 59)).chain(steps(60, 5, 12));
    Histogram::new(buckets.chain(steps(120, 30, 7)))
}

/// Seconds since 1970.
fn now() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs_f64()
}

impl Syncs {
    /// Notes that a source spoke of so many objects of a kind.
    pub fn changed(&self, kind: Kind, count: usize) {
        let changes = match kind {
            Kind::Service => &self.services,
            Kind::EndpointSlice => &self.endpoints,
            Kind::Node | Kind::Pod => return,
        };
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        changes.seen.inc_by(count);
        changes
            .pending
            .inc_by(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Notes that there is something to be written.
    pub fn queued(&self) {
        let now = now();
        for family in labels() {
            self.queued.get_or_create(&family).set(now);
        }
    }

    /// Notes that it was tried to write all that was to be, and for how many services that failed.
    pub fn done(&self, took: Duration, failed: usize) {
        self.nothing_pends(failed);
        let now = now();
        for family in labels() {
            let durations = self.durations.get_or_create(&family);
            durations.observe(took.as_secs_f64());
            if failed == 0 {
                self.last.get_or_create(&family).set(now);
            }
        }
    }

    /// When all that had changed was written last, if ever.
    pub fn written(&self) -> Option<jiff::Timestamp> {
        let last = self.last.get(&label(object::Family::V4))?.get();
        let last = Duration::try_from_secs_f64(last).ok()?;
        let last = jiff::Timestamp::new(i64::try_from(last.as_secs()).ok()?, 0).ok()?;
        (last > jiff::Timestamp::UNIX_EPOCH).then_some(last)
    }

    /// Notes that all that is wanted was compared with what is written, and for how many services that
    /// can't be.
    pub fn nothing_pends(&self, failed: usize) {
        self.endpoints.pending.set(0);
        let failed = i64::try_from(failed).unwrap_or(i64::MAX);
        self.services.pending.set(failed);
    }

    /// Notes that a change of endpoints is written that began at some moment, in time since 1970.
    pub fn programmed(&self, family: object::Family, began: Duration) {
        // Whoever wrote down when may have a clock that is ahead.
        let took = (now() - began.as_secs_f64()).max(0.0);
        let programming = self.programming.get_or_create(&label(family));
        programming.observe(took);
    }

    fn register(&self, registry: &mut Registry) {
        registry.register(
            "kubeproxy_sync_proxy_rules_duration_seconds",
            "How long it took to write what events changed",
            self.durations.clone(),
        );
        registry.register(
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
            "When all that had changed was written last",
            self.last.clone(),
        );
        registry.register(
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
            "When something was to be written last",
            self.queued.clone(),
        );
        registry.register(
            "kubeproxy_network_programming_duration_seconds",
            "From what made endpoints change until that was written",
            self.programming.clone(),
        );
        registry.register(
            "kubeproxy_sync_proxy_rules_service_changes",
            "How often services were told of",
            self.services.seen.clone(),
        );
        registry.register(
            "kubeproxy_sync_proxy_rules_service_changes_pending",
            "Services that were told of and are not written",
            self.services.pending.clone(),
        );
        registry.register(
            "kubeproxy_sync_proxy_rules_endpoint_changes",
            "How often endpoint slices were told of",
            self.endpoints.seen.clone(),
        );
        registry.register(
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
            "Endpoint slices that were told of since anything was written",
            self.endpoints.pending.clone(),
        );
    }
}

/// What the agent knows of itself.
#[derive(Clone, Debug, Default)]
pub struct Vitals {
    /// Every first list has arrived.
    pub is_synced: bool,
    /// Changes that could have been written wait for too long.
    pub is_late: bool,
    /// The kernel holds all that is wanted and nothing else.
    pub is_settled: bool,
    /// Whether load balancers should send this node anything: it is not about to be removed.
    pub is_node_eligible: bool,
    /// Services, endpoint slices and endpoints.
    pub sizes: (usize, usize, usize),
    /// How many problems there are.
    pub problems: usize,
    /// How full tables are.
    pub tables: Vec<Fill>,
    /// How long changes took.
    pub syncs: Syncs,
    /// How many ports of services have endpoints on other nodes only, and a policy that leaves these out: for
    /// clients inside and outside, of each family.
    pub lonely: Vec<(object::Family, [usize; 2])>,
}

/// How often each health check was answered how, by path and status code.
pub type Answers = Family<[(&'static str, String); 1], Counter>;

/// One label.
type Labels = [(&'static str, String); 1];

/// The sums of the programs' counters.
fn events(pins: &Pins) -> Result<Vec<(Event, u64)>, PinError> {
    let map = Map::PerCpuArray(pins.map("COUNTERS")?);
    let broken = |_| PinError::Missing { name: "COUNTERS" };
    let map: PerCpuArray<_, u64> = PerCpuArray::try_from(map).map_err(broken)?;
    let all = Event::ALL.iter();
    all.map(|event| {
        let values = map.get(&(*event as u32), 0).map_err(broken)?;
        Ok((*event, values.iter().sum()))
    })
    .collect()
}

/// All metrics in the text format of OpenMetrics 1.0.
pub fn text(
    pins: &Pins,
    vitals: &Vitals,
    healthz: &Answers,
    livez: &Answers,
) -> Result<String, MetricsError> {
    let mut registry = Registry::default();
    let (done, dropped) = (Family::<Labels, Counter>::default(), Family::default());
    for (event, count) in events(pins)? {
        let (family, label): (&Family<Labels, Counter>, _) = if event.is_drop() {
            (&dropped, "reason")
        } else {
            (&done, "event")
        };
        let labels = [(label, event.label().to_owned())];
        family.get_or_create(&labels).inc_by(count);
    }
    registry.register(
        "penstock_events",
        "What the programs did, by what they did",
        done,
    );
    registry.register(
        "penstock_drops",
        "Packets, datagrams and connections that did not go through, by reason",
        dropped,
    );
    let (used, capacity) = (Family::<Labels, Gauge>::default(), Family::default());
    for fill in &vitals.tables {
        let labels = [("table", fill.table.clone())];
        let number = |count| i64::try_from(count).unwrap_or(i64::MAX);
        used.get_or_create(&labels).set(number(fill.used));
        let capacity: &Family<Labels, Gauge> = &capacity;
        capacity.get_or_create(&labels).set(number(fill.limit));
    }
    registry.register(
        "penstock_table_entries",
        "How many entries the kernel's tables have",
        used,
    );
    registry.register(
        "penstock_table_capacity",
        "How many entries the kernel's tables may have",
        capacity,
    );
    let (services, slices, endpoints) = vitals.sizes;
    for (name, help, value) in [
        ("penstock_services", "Services", services),
        ("penstock_endpoint_slices", "Endpoint slices", slices),
        ("penstock_endpoints", "Endpoints", endpoints),
        (
            "penstock_problems",
            "Problems that `penstock status` tells",
            vitals.problems,
        ),
        (
            "penstock_synced",
            "1 once every first list has arrived",
            usize::from(vitals.is_synced),
        ),
        (
            "penstock_settled",
            "1 if the kernel holds all that is wanted and nothing else",
            usize::from(vitals.is_settled),
        ),
    ] {
        let gauge = Gauge::<i64>::default();
        gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        registry.register(name, help, gauge);
    }
    let version = Family::<Labels, Gauge>::default();
    let labels = [("version", env!("CARGO_PKG_VERSION").to_owned())];
    version.get_or_create(&labels).set(1);
    registry.register("penstock_build_info", "The agent's version", version);
    vitals.syncs.register(&mut registry);
    register_lonely(&mut registry, vitals);
    if let Some(process) = Process::look() {
        process.register(&mut registry);
    }
    registry.register(
        "kubeproxy_proxy_healthz",
        "Answers of /healthz",
        healthz.clone(),
    );
    registry.register("kubeproxy_proxy_livez", "Answers of /livez", livez.clone());
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

/// Policies that nobody on this node can serve, as kube-proxy counts them.
fn register_lonely(registry: &mut Registry, vitals: &Vitals) {
    let lonely = Family::<[(&str, &str); 2], Gauge>::default();
    for (family, counts) in &vitals.lonely {
        for (policy, count) in ["internal", "external"].into_iter().zip(counts) {
            let labels = [("ip_family", family.label()), ("traffic_policy", policy)];
            let count = i64::try_from(*count).unwrap_or(i64::MAX);
            lonely.get_or_create(&labels).set(count);
        }
    }
    registry.register(
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
        "Services' ports with a Local policy, and endpoints on other nodes only",
        lonely,
    );
}

/// Metrics can't be had.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The programs' counters can't be read.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// They can't be written as text.
    #[error("writing metrics: {0}")]
    Encode(#[from] std::fmt::Error),
}
