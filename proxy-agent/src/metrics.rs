//! What Prometheus is told: every metric's name is here.
//!
//! Numbers that the agent or the kernel has anyway are read when asked; only how long changes take is
//! kept. Where kube-proxy has the same metric, it has kube-proxy's name.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

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
    usage::Fill,
};

/// How long changes took to reach the kernel.
#[derive(Clone, Debug)]
pub struct Syncs {
    durations: Histogram,
    /// When the last one was done, in seconds since 1970.
    last: Gauge<f64, std::sync::atomic::AtomicU64>,
}

impl Default for Syncs {
    fn default() -> Self {
        Self {
            // kube-proxy's buckets: from a millisecond to 16 seconds.
            durations: Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            last: Gauge::default(),
        }
    }
}

impl Syncs {
    /// Notes that all that was to be written was, or was tried.
    pub fn done(&self, took: Duration) {
        self.durations.observe(took.as_secs_f64());
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        self.last.set(now.unwrap_or_default().as_secs_f64());
    }
}

/// What the agent knows of itself.
#[derive(Clone, Debug, Default)]
pub struct Vitals {
    /// Every first list has arrived.
    pub is_synced: bool,
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
    registry.register(
        "kubeproxy_sync_proxy_rules_duration_seconds",
        "How long it took to write what events changed",
        vitals.syncs.durations.clone(),
    );
    registry.register(
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
        "When something was last written",
        vitals.syncs.last.clone(),
    );
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
