//! From objects to map entries, through the agent's own code and the kernel's own maps.

use std::{
    fmt::{Display, Formatter},
    net::Ipv4Addr,
    str::FromStr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use aya::maps::{HashMap, Map};
use penstock_agent::{
    api::Decoder,
    dataplane::{bpf::Bpf, pins::Pins},
    model::{
        object::{Event, Kind, Object},
        world::World,
    },
    reconcile::Reconciler,
    watch::manifests,
};
use penstock_common::{Be16, Frontend, FrontendKey, Proto, V4, limits};
use penstock_testbed::{Agent, Source, Testbed};
use serde_json::{Value, json};

use crate::{cluster, figures, machine};

/// How long a single change may take before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(10);

/// A cluster's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// How many services there are.
    pub services: usize,
    /// How many endpoints each has.
    pub endpoints: usize,
}

impl Shape {
    /// Few services with many endpoints, and many with one.
    pub const ALL: [Self; 2] = [
        Self {
            services: 5_000,
            endpoints: 50,
        },
        Self {
            services: 44_000,
            endpoints: 1,
        },
    ];
}

impl Display for Shape {
    fn fmt(&self, formatter: &mut Formatter) -> std::fmt::Result {
        write!(formatter, "{}x{}", self.services, self.endpoints)
    }
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shape = text.split_once('x').and_then(|(services, endpoints)| {
            let (services, endpoints) = (services.parse().ok()?, endpoints.parse().ok()?);
            (services > 0 && endpoints > 0).then_some(Self {
                services,
                endpoints,
            })
        });
        shape.ok_or_else(|| format!("{text} is no shape, such as 5000x50"))
    }
}

/// Measures programming everything, and then single endpoints, for each shape.
pub fn measure(shapes: &[Shape], changes: usize) -> Result<Value> {
    let measure = |shape: &Shape| -> Result<Value> {
        let Shape {
            services,
            endpoints,
        } = *shape;
        Ok(json!({
            "agent": agent(services, endpoints, changes)?,
            "in_process": in_process(services, endpoints, changes)?,
        }))
    };
    shapes.iter().map(measure).collect()
}

/// The agent as it is: from its start until it says that all is programmed, then from a file's
/// replacement to the frontend's new value in the kernel.
fn agent(services: usize, endpoints: usize, changes: usize) -> Result<Value> {
    let mut testbed = Testbed::new()?;
    let node = testbed.node()?;
    cluster::write(&node.manifests, services - 1, endpoints)?;
    let hot = services - 1;
    node.manifest("hot-service.json", &cluster::service(hot).to_string())?;
    node.manifest(
        "hot-slice.json",
        &cluster::slice(hot, endpoints, None).to_string(),
    )?;
    let started = Instant::now();
    let agent = Agent::start(&node, &Source::Manifests, &["--log-level", "info"])?;
    let all = started.elapsed();
    let processor = machine::processor_seconds(agent.pid());
    let memory = machine::memory(agent.pid(), "VmRSS");
    let peak = machine::memory(agent.pid(), "VmHWM");
    println!(
        "{services} services with {} endpoints: {:.2} s from the agent's start to the last map entry, \
         {processor:.2} s of a processor, {memory} MiB resident, {peak} MiB at most",
        services * endpoints,
        all.as_secs_f64(),
    );

    let pinned = Pins::at(&node.bpffs).map("FRONTENDS4")?;
    let frontends: HashMap<_, FrontendKey<V4>, Frontend> =
        HashMap::try_from(Map::HashMap(pinned)).context("map FRONTENDS4")?;
    let ip: Ipv4Addr = cluster::service_ip(hot).parse().context("an address")?;
    let key = FrontendKey::new(ip.into(), Be16::from_host(80), Proto::TCP);
    let mut times = Vec::with_capacity(changes);
    for number in 0..changes {
        // Every change has to be one: where there is one endpoint, it comes and goes.
        let unready = if endpoints > 1 {
            Some(number % endpoints)
        } else {
            number.is_multiple_of(2).then_some(0)
        };
        let text = cluster::slice(hot, endpoints, unready).to_string();
        let before = frontends.get(&key, 0).context("the frontend")?;
        let began = Instant::now();
        node.manifest("hot-slice.json", &text)?;
        while frontends.get(&key, 0).context("the frontend")? == before {
            anyhow::ensure!(began.elapsed() < PATIENCE, "a change was not heeded");
            std::thread::yield_now();
        }
        times.push(began.elapsed().as_nanos() as u64);
    }
    let changing = machine::processor_seconds(agent.pid()) - processor;
    println!(
        "one endpoint's change among them, from its file's replacement to the kernel: p50 {:.0} us, \
         p99 {:.0} us of {changes}, {changing:.2} s of a processor for all",
        micros(&times, 50),
        micros(&times, 99)
    );
    Ok(json!({
        "services": services, "endpoints": services * endpoints,
        "all_seconds": all.as_secs_f64(),
        "processor_seconds": processor,
        "resident_mib": memory, "peak_mib": peak,
        "change_nanos": times,
        "change_processor_seconds": changing,
    }))
}

fn micros(times: &[u64], percent: usize) -> f64 {
    figures::percentile(times, percent) as f64 / 1_000.0
}

/// The agent's code in this process, where it can be seen from inside.
fn in_process(services: usize, endpoints: usize, changes: usize) -> Result<Value> {
    // The testbed makes sure of a bpffs and removes the pins, whatever happens.
    let testbed = Testbed::new()?;
    let folder = testbed.folder().join("cluster");
    std::fs::create_dir_all(&folder).context("making a folder")?;
    cluster::write(&folder, services, endpoints)?;
    let bpffs = std::path::Path::new("/sys/fs/bpf").join(format!("{}-bench", testbed.prefix()));
    let pins = Pins::create(&bpffs)?;
    let _programs = pins.load(true, false, limits::FLOWS)?;
    let mut reconciler = Reconciler::new(Bpf::open(&pins)?, World::new("node1"))?;

    let started = Instant::now();
    let (events, rejections) = manifests::read_once(&folder).context("reading manifests")?;
    anyhow::ensure!(rejections.is_empty(), "{rejections:?}");
    let read = started.elapsed();
    list(&mut reconciler.world, events)?;
    let outcome = reconciler.step(Duration::from_secs(1));
    let all = started.elapsed();
    anyhow::ensure!(reconciler.is_settled(), "{:?}", reconciler.errors());
    println!(
        "in this process: {:.2} s from the first file to the last map entry ({:.2} s of it reading), \
         {} writes",
        all.as_secs_f64(),
        read.as_secs_f64(),
        outcome.writes
    );

    let mut decoder = Decoder::default();
    let mut times = Vec::with_capacity(changes);
    for number in 0..changes {
        let service = number * 7_919 % services;
        let text = cluster::slice(service, endpoints, Some(number % endpoints)).to_string();
        let began = Instant::now();
        let decoded = decoder
            .json(Kind::EndpointSlice, &text, "bench")
            .map_err(|rejection| anyhow::anyhow!("{rejection:?}"))?;
        let event = decoded.into_event().context("an object")?;
        reconciler
            .world
            .apply(event)
            .map_err(|rejection| anyhow::anyhow!("{rejection:?}"))?;
        let outcome = reconciler.step(Duration::from_secs(2) + started.elapsed());
        times.push(began.elapsed().as_nanos() as u64);
        anyhow::ensure!(outcome.writes > 0, "the change changed nothing");
    }
    println!(
        "in this process: one endpoint's change, from the event's text to the maps: p50 {:.0} us, p99 {:.0} us \
         of {changes}",
        micros(&times, 50),
        micros(&times, 99)
    );
    Ok(json!({
        "services": services, "endpoints": services * endpoints,
        "all_seconds": all.as_secs_f64(), "reading_seconds": read.as_secs_f64(),
        "change_nanos": times,
    }))
}

/// Hands everything to the world as one list a kind, as a source does.
fn list(world: &mut World, events: Vec<Event>) -> Result<()> {
    let mut objects: Vec<Object> = Vec::with_capacity(events.len());
    for event in events {
        if let Event::Applied(object) = event {
            objects.push(object);
        }
    }
    for kind in Kind::ALL {
        let (listed, rest) = objects
            .into_iter()
            .partition(|object| object.kind() == kind);
        objects = rest;
        world
            .apply(Event::Listed(kind, listed, Vec::new()))
            .map_err(|rejection| anyhow::anyhow!("{rejection:?}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_read_as_they_are_written() {
        for shape in Shape::ALL {
            assert_eq!(shape.to_string().parse(), Ok(shape));
        }
        for wrong in ["", "5000", "0x1", "1x0", "1x2x3", "x"] {
            assert!(wrong.parse::<Shape>().is_err(), "{wrong}");
        }
    }
}
