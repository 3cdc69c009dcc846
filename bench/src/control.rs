//! From objects to map entries, through the agent's own code and the kernel's own maps.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
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
use penstock_testbed::Testbed;
use serde_json::{Value, json};

use crate::{cluster, figures};

/// Measures programming everything, and then single endpoints.
pub fn measure(services: usize, endpoints: usize, changes: usize) -> Result<Value> {
    // The testbed makes sure of a bpffs and removes the pins, whatever happens.
    let testbed = Testbed::new()?;
    let folder = testbed.folder().join("cluster");
    std::fs::create_dir_all(&folder).context("making a folder")?;
    cluster::write(&folder, services, endpoints)?;
    let bpffs = std::path::Path::new("/sys/fs/bpf").join(format!("{}-bench", testbed.prefix()));
    let pins = Pins::create(&bpffs)?;
    let _programs = pins.load(true, false)?;
    let mut reconciler = Reconciler::new(Bpf::open(&pins)?, World::new("node1"))?;

    let started = Instant::now();
    let (events, rejections) =
        manifests::read_once(&folder, "node1").context("reading manifests")?;
    anyhow::ensure!(rejections.is_empty(), "{rejections:?}");
    let read = started.elapsed();
    list(&mut reconciler.world, events)?;
    let outcome = reconciler.step(Duration::from_secs(1));
    let all = started.elapsed();
    anyhow::ensure!(reconciler.is_settled(), "{:?}", reconciler.errors());
    let (memory, peak) = (figures::memory("VmRSS"), figures::memory("VmHWM"));
    println!(
        "{services} services with {} endpoints: {:.2} s from the first file to the last map entry \
         ({:.2} s of it reading), {} writes, {memory} MiB resident, {peak} MiB at most",
        services * endpoints,
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
    let micros = |percent| figures::percentile(&times, percent) as f64 / 1_000.0;
    println!(
        "one endpoint's change among them, from the event's text to the maps: p50 {:.0} us, p99 {:.0} us \
         of {changes}",
        micros(50),
        micros(99)
    );
    Ok(json!({
        "services": services, "endpoints": services * endpoints,
        "all_seconds": all.as_secs_f64(), "reading_seconds": read.as_secs_f64(),
        "resident_mib": memory, "peak_mib": peak,
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
