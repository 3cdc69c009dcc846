//! What the agent's pure code takes by itself, without a kernel: `cargo bench -p penstock-bench`.
#![allow(
    missing_docs,
    clippy::expect_used,
    clippy::panic,
    reason = "criterion's macros; a benchmark fails by panicking"
)]

#[expect(dead_code, reason = "the other half writes files")]
#[path = "../src/cluster.rs"]
mod cluster;

use std::{hint::black_box, time::Duration};

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use penstock_agent::{
    api::Decoder,
    dataplane::memory::Memory,
    model::{
        object::{Event, Kind, Object},
        world::World,
    },
    plan::{
        blocks::Blocks,
        ids::Ids,
        slots::{self, Member},
    },
    reconcile::Reconciler,
};
use penstock_common::{Algorithm, Be16, V4, limits};
use serde_json::Value;

/// The cluster's size.
const SERVICES: usize = 5_000;
const ENDPOINTS: usize = 50;
/// Time between one change and the next; blocks and ids rest for a second.
const BETWEEN: Duration = Duration::from_millis(10);

fn event(decoder: &mut Decoder, kind: Kind, object: &Value) -> Event {
    let decoded = decoder.json(kind, &object.to_string(), "bench");
    let event = decoded.ok().and_then(|decoded| decoded.into_event());
    event.expect("a made-up object can be decoded")
}

fn objects(decoder: &mut Decoder, kind: Kind, make: impl Fn(usize) -> Value) -> Vec<Object> {
    let events = (0..SERVICES).map(|number| event(decoder, kind, &make(number)));
    let object = |event| match event {
        Event::Applied(object) => Some(object),
        _ => None,
    };
    events.filter_map(object).collect()
}

/// The whole cluster, as its sources list it.
fn lists() -> Vec<Event> {
    let mut decoder = Decoder::default();
    let services = objects(&mut decoder, Kind::Service, cluster::service);
    let slices = objects(&mut decoder, Kind::EndpointSlice, |number| {
        cluster::slice(number, ENDPOINTS, None)
    });
    let mut lists = vec![
        Event::Listed(Kind::Service, services, Vec::new()),
        Event::Listed(Kind::EndpointSlice, slices, Vec::new()),
    ];
    let others = Kind::ALL
        .into_iter()
        .filter(|kind| !matches!(kind, Kind::Service | Kind::EndpointSlice));
    lists.extend(others.map(|kind| Event::Listed(kind, Vec::new(), Vec::new())));
    lists
}

/// Hands events to a reconciler and lets it do what follows; how many writes that took.
fn step(
    reconciler: &mut Reconciler<Memory>,
    events: impl IntoIterator<Item = Event>,
    now: Duration,
) -> usize {
    for event in events {
        assert!(reconciler.world.apply(event).is_ok(), "an event is refused");
    }
    reconciler.step(now).writes
}

fn empty() -> Reconciler<Memory> {
    Reconciler::new(Memory::default(), World::new("node1")).expect("memory can be read")
}

/// From decoded objects to writes: everything at once, and one endpoint among it all.
fn planning(criterion: &mut Criterion) {
    let name = format!("{SERVICES} services with {ENDPOINTS} endpoints each");
    let mut group = criterion.benchmark_group(&name);
    group.sample_size(10);
    group.bench_function("everything, from nothing", |bencher| {
        bencher.iter_batched(
            || (empty(), lists()),
            |(mut reconciler, lists)| {
                let writes = step(&mut reconciler, lists, BETWEEN);
                assert!(writes > SERVICES * ENDPOINTS, "{writes} writes");
                reconciler
            },
            BatchSize::PerIteration,
        );
    });
    group.finish();

    let mut reconciler = empty();
    let mut now = BETWEEN;
    step(&mut reconciler, lists(), now);
    assert!(reconciler.is_settled(), "{:?}", reconciler.errors());
    let mut decoder = Decoder::default();
    let mut number = 0;
    let mut group = criterion.benchmark_group(&name);
    group.bench_function("one endpoint's change", |bencher| {
        bencher.iter_batched(
            || {
                number += 1;
                // Services take turns, and each time another of their endpoints is not ready.
                let unready = number / SERVICES % ENDPOINTS;
                let slice = cluster::slice(number * 7_919 % SERVICES, ENDPOINTS, Some(unready));
                event(&mut decoder, Kind::EndpointSlice, &slice)
            },
            |event| {
                now += BETWEEN;
                let writes = step(&mut reconciler, [event], now);
                assert!(writes > 0, "the change changed nothing");
            },
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

/// Maglev's tables.
fn maglev(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("Maglev's table");
    for count in [5_u16, 50, 500, 5_000] {
        let members: Vec<Member<V4>> = (0..count)
            .map(|number| {
                let [high, low] = number.to_be_bytes();
                Member {
                    addr: std::net::Ipv4Addr::new(10, 244, high, low).into(),
                    port: Be16::from_host(8_080),
                    weight: 1,
                }
            })
            .collect();
        let id = BenchmarkId::new("endpoints", count);
        group.bench_with_input(id, &members, |bencher, members| {
            bencher.iter(|| slots::fill(Algorithm::Maglev, black_box(members)));
        });
    }
    group.finish();
}

/// A block and an id, given out and taken back where most are in use and the free ones lie scattered.
fn allocators(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("allocators, nine of ten used");
    let mut blocks = Blocks::new(limits::SLOTS);
    let count = ENDPOINTS as u32;
    let taken: Vec<_> = std::iter::from_fn(|| blocks.allocate(count)).collect();
    for range in taken.into_iter().step_by(10) {
        blocks.release(range);
    }
    group.bench_function("a block of 50 slots", |bencher| {
        bencher.iter(|| {
            let range = blocks.allocate(black_box(count)).expect("a tenth is free");
            blocks.release(range);
            range
        });
    });

    let mut ids = Ids::new(1, limits::BACKENDS);
    let taken: Vec<_> = std::iter::from_fn(|| ids.allocate()).collect();
    for (id, _) in taken.into_iter().step_by(10) {
        ids.release(id);
    }
    let mut now = Duration::ZERO;
    group.bench_function("an id, after its rest", |bencher| {
        bencher.iter(|| {
            now += BETWEEN;
            ids.settle(now, Duration::from_secs(1));
            let (id, generation) = ids.allocate().expect("a tenth is free");
            ids.retire(id, now);
            generation
        });
    });
    group.finish();
}

criterion_group!(benches, planning, maglev, allocators);
criterion_main!(benches);
