//! Endpoints that change while connections come in: each lands on the old set or the new one.
//!
//! The changes are made by the agent's own world, planner and reconciler in this process, so that
//! it is known to the nanosecond which sets a connection may have met.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result};
use penstock_agent::{
    api::Decoder,
    attach::cgroup,
    dataplane::{Dataplane, bpf::Bpf, pins::Pins},
    model::{
        object::{Event, Kind, Object},
        world::World,
    },
    reconcile::Reconciler,
};
use penstock_common::limits;
use penstock_testbed::{Host, Process, Service, Testbed, require_kernel};
use serde_json::{Value, json};

const CHANGES: usize = 10_000;
const SERVICES: u8 = 3;
const BACKENDS: u8 = 24;
const PORT: u16 = 8_080;

/// Numbers that look random and are the same in every run (xorshift, Marsaglia 2003).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Some of the backends, at least one, in any order.
    fn set(&mut self) -> Vec<u8> {
        let bits = self.roll();
        let first = (self.roll() % u64::from(BACKENDS)) as u8;
        let some = (0..BACKENDS).filter(|number| bits >> number & 3 == 3);
        std::iter::once(first)
            .chain(some.filter(|number| *number != first))
            .collect()
    }
}

fn backend(number: u8, is_v4: bool) -> IpAddr {
    let text = if is_v4 {
        format!("10.99.0.{}", number + 1)
    } else {
        format!("fd00:99::{}", number + 1)
    };
    text.parse().expect("an address")
}

fn frontend(service: u8, is_v4: bool) -> SocketAddr {
    let text = if is_v4 {
        format!("10.96.0.{}", 10 + service)
    } else {
        format!("fd00:96::{:x}", 10 + service)
    };
    SocketAddr::new(text.parse().expect("an address"), 80)
}

fn slice(service: u8, is_v4: bool, set: &[u8]) -> Value {
    let endpoints: Vec<Value> = set
        .iter()
        .map(|number| json!({ "addresses": [backend(*number, is_v4).to_string()], "conditions": { "ready": true } }))
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("s{service}-{is_v4}"), "namespace": "default",
            "labels": { "kubernetes.io/service-name": format!("s{service}") },
        },
        "addressType": if is_v4 { "IPv4" } else { "IPv6" },
        "ports": [{ "name": "tcp", "port": PORT, "protocol": "TCP" }],
        "endpoints": endpoints,
    })
}

/// A set of a service's family and the first and last moment at which a connection may meet it.
struct Era {
    set: BTreeSet<IpAddr>,
    from: i64,
    until: i64,
}

fn nanos() -> i64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).expect("a clock");
    now.tv_sec() * 1_000_000_000 + now.tv_nsec()
}

fn object(kind: Kind, value: &Value, decoder: &mut Decoder) -> Object {
    let decoded = decoder
        .json(kind, &value.to_string(), "test")
        .expect("valid");
    match decoded.into_event() {
        Some(Event::Applied(object)) => object,
        other => panic!("{other:?}"),
    }
}

/// A place with all backends' addresses, and a server on them.
fn serving(testbed: &mut Testbed) -> Result<(Host, std::path::PathBuf, Process)> {
    let node = testbed.node()?;
    let pod = testbed.pod(&node)?;
    for number in 0..BACKENDS {
        for is_v4 in [true, false] {
            let address = format!(
                "{}/{}",
                backend(number, is_v4),
                if is_v4 { 32 } else { 128 }
            );
            pod.host
                .run("ip", &["addr", "add", &address, "dev", "lo"])?;
        }
    }
    let server = pod.host.serve(PORT)?;
    Ok((pod.host, node.cgroup, server))
}

/// The backends of each frontend, from the maps' canonical text.
fn served(text: &str) -> Result<BTreeMap<SocketAddr, BTreeSet<IpAddr>>> {
    let mut served: BTreeMap<SocketAddr, BTreeSet<IpAddr>> = BTreeMap::new();
    let mut current = None;
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["address", _, "service"] => {}
            ["frontend", ip, port, "TCP"] => {
                let key = SocketAddr::new(ip.parse()?, port.parse()?);
                current = Some(served.entry(key).or_default());
            }
            ["backend", ip, _] => {
                let set = current.as_mut().context("a frontend above")?;
                assert!(set.insert(ip.parse()?), "{line} twice");
            }
            _ => anyhow::bail!("{line} is not expected"),
        }
    }
    Ok(served)
}

#[test]
fn every_connection_lands_on_the_old_set_or_the_new_one() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut testbed = Testbed::new()?;
    let (host, cgroup, _server) = serving(&mut testbed)?;
    let pins = Pins::create(&Path::new("/sys/fs/bpf").join(format!("{}-churn", testbed.prefix())))?;
    let mut programs = pins.load(true, false, limits::FLOWS)?;
    cgroup::attach(&mut programs, &pins, &cgroup)?;
    let mut reconciler = Reconciler::new(Bpf::open(&pins)?, World::new("here"))?;

    let mut decoder = Decoder::default();
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let mut eras: BTreeMap<SocketAddr, Vec<Era>> = BTreeMap::new();
    let (mut services, mut slices) = (Vec::new(), Vec::new());
    for service in 0..SERVICES {
        let manifest = Service::new(&format!("s{service}"), 10 + service).port("tcp", 80, "TCP");
        services.push(object(Kind::Service, &manifest.json(), &mut decoder));
        for is_v4 in [true, false] {
            let set = dice.set();
            let value = slice(service, is_v4, &set);
            slices.push(object(Kind::EndpointSlice, &value, &mut decoder));
            let era = Era {
                set: set.iter().map(|number| backend(*number, is_v4)).collect(),
                from: 0,
                until: i64::MAX,
            };
            eras.insert(frontend(service, is_v4), vec![era]);
        }
    }
    for (kind, objects) in [
        (Kind::Service, services),
        (Kind::EndpointSlice, slices),
        (Kind::Node, Vec::new()),
        (Kind::Pod, Vec::new()),
    ] {
        reconciler
            .world
            .apply(Event::Listed(kind, objects, Vec::new()))
            .expect("listed");
    }
    reconciler.step(Duration::from_nanos(nanos() as u64));
    assert!(reconciler.is_settled(), "{:?}", reconciler.errors());

    let targets: Vec<String> = eras.keys().map(ToString::to_string).collect();
    let mut arguments = vec!["trail", "--for-ms", "600000"];
    arguments.extend(targets.iter().map(String::as_str));
    let mut trails = [host.traffic(&arguments)?, host.traffic(&arguments)?];
    let changes_are_over = std::sync::atomic::AtomicI64::new(i64::MAX);
    let connections = std::thread::scope(|scope| -> Result<Vec<Value>> {
        let readers: Vec<_> = trails
            .iter_mut()
            .map(|trail| {
                let over = &changes_are_over;
                scope.spawn(move || -> Result<Vec<Value>> {
                    let mut lines = Vec::new();
                    loop {
                        let line: Value = serde_json::from_str(&trail.line()?)?;
                        let began = line["began"].as_i64().context("a time")?;
                        lines.push(line);
                        if began > over.load(std::sync::atomic::Ordering::SeqCst) {
                            return Ok(lines);
                        }
                    }
                })
            })
            .collect();
        for _ in 0..CHANGES {
            let service = (dice.roll() % u64::from(SERVICES)) as u8;
            let is_v4 = dice.roll().is_multiple_of(2);
            let set = dice.set();
            let value = slice(service, is_v4, &set);
            let applied = Event::Applied(object(Kind::EndpointSlice, &value, &mut decoder));
            let from = nanos();
            reconciler.world.apply(applied).expect("applied");
            reconciler.step(Duration::from_nanos(from as u64));
            let until = nanos();
            assert!(reconciler.errors().is_empty(), "{:?}", reconciler.errors());
            let eras = eras.get_mut(&frontend(service, is_v4)).expect("known");
            eras.last_mut().expect("one era").until = until;
            eras.push(Era {
                set: set.iter().map(|number| backend(*number, is_v4)).collect(),
                from,
                until: i64::MAX,
            });
        }
        changes_are_over.store(nanos(), std::sync::atomic::Ordering::SeqCst);
        let mut connections = Vec::new();
        for reader in readers {
            connections.extend(reader.join().expect("a reader panicked")?);
        }
        Ok(connections)
    })?;

    assert!(
        connections.len() > 1_000,
        "{} connections only",
        connections.len()
    );
    for connection in &connections {
        assert_eq!(connection["failed"], Value::Null, "{connection}");
        let to: SocketAddr = connection["to"].as_str().context("to")?.parse()?;
        let reached: SocketAddr = connection["reached"].as_str().context("reached")?.parse()?;
        let (began, ended) = (
            connection["began"].as_i64().context("began")?,
            connection["ended"].as_i64().context("ended")?,
        );
        let is_right = eras[&to]
            .iter()
            .filter(|era| era.from <= ended && era.until >= began)
            .any(|era| era.set.contains(&reached.ip()));
        assert!(is_right, "{connection} met no set of its time");
    }

    // What is in the kernel now is what the objects say, as one clean start would have written it.
    let state = reconciler.dataplane.observe()?;
    assert_eq!(state.problems(), Vec::<String>::new());
    assert_eq!(state.leaks(), Vec::<String>::new());
    let wanted: BTreeMap<SocketAddr, BTreeSet<IpAddr>> = eras
        .iter()
        .map(|(to, eras)| (*to, eras.last().expect("one era").set.clone()))
        .collect();
    assert_eq!(served(&state.canonical())?, wanted);
    let selected: usize = eras
        .values()
        .map(|eras| eras.last().expect("one").set.len())
        .sum();
    let (backends, slots) = reconciler.used();
    assert_eq!(
        (backends, slots as usize),
        (selected, selected),
        "of backends and slots"
    );
    Ok(())
}
