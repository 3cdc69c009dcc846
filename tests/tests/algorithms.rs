//! How connections are spread over backends, end to end.
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
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use penstock_agent::dataplane::{Dataplane, bpf::Bpf, pins::Pins};
use penstock_common::{Algorithm, BackendId, Load, V4, V6, client_hash, slot_at};
use penstock_testbed::{
    Agent, Host, PROTOCOLS, Pod, Process, Scene, Service, Slice, Source, eventually, frontends,
    list, require_kernel, text,
};
use serde_json::Value;

/// By how much more than others each backend is asked under [`Algorithm::Weighted`].
const WEIGHTS: [u16; 4] = [1, 2, 5, 0];

/// Two nodes with an agent each, four backends of one service, a client on each node.
struct Stage {
    scene: Scene,
    agents: Vec<Agent>,
    clients: [Pod; 2],
    /// In the order of their addresses.
    backends: Vec<Pod>,
    _serving: Vec<Process>,
}

impl Stage {
    fn new() -> Result<Self> {
        let mut scene = Scene::new()?;
        let [here, there] = scene.nodes.clone();
        let [near, far] = scene.servers.clone();
        let others = [scene.testbed.pod(&here)?, scene.testbed.pod(&here)?];
        let client = scene.testbed.pod(&there)?;
        let serving: Result<Vec<Process>> = others.iter().map(|pod| pod.host.serve(8080)).collect();
        let serving = serving?;
        let mut backends = vec![near, far];
        backends.extend(others);
        backends.sort_by_key(|pod| pod.host.ip4);
        let mut stage = Self {
            clients: [scene.client.clone(), client],
            scene,
            agents: Vec::new(),
            backends,
            _serving: serving,
        };
        stage.write(Algorithm::Random, false)?;
        for (node, pods) in [(here, 4), (there, 2)] {
            let agent = Agent::start(&node, &Source::Manifests, &[])?;
            agent.wait_for_pods(pods)?;
            stage.agents.push(agent);
        }
        Ok(stage)
    }

    fn write(&self, algorithm: Algorithm, is_sticky: bool) -> Result<()> {
        let mut service = Service::new("web", 10)
            .port("tcp", 80, "TCP")
            .port("udp", 80, "UDP");
        if algorithm != Algorithm::default() {
            service = service.annotation("penstock.io/algorithm", algorithm.label());
        }
        if is_sticky {
            service = service.set("sessionAffinity", "ClientIP");
        }
        let mut items = vec![service.json()];
        for is_v4 in [true, false] {
            let mut slice = Slice::new("web", is_v4)
                .port("tcp", 8080, "TCP")
                .port("udp", 8080, "UDP");
            let mut weights = Vec::new();
            for (pod, weight) in self.backends.iter().zip(WEIGHTS) {
                slice = slice.pod(pod);
                // Both ways to write it; what is not said is 1.
                match (weight, is_v4) {
                    (1, _) => {}
                    (_, true) => weights.push(format!("\"{}\": {weight}", pod.host.ip4)),
                    (_, false) => weights.push(format!("{}={weight}", pod.host.ip6)),
                }
            }
            let weights = if is_v4 {
                format!("{{{}}}", weights.join(", "))
            } else {
                weights.join(",")
            };
            let slice = slice.annotation("penstock.io/weights", &weights);
            items.push(slice.json());
        }
        for node in &self.scene.nodes {
            node.manifest("web.json", &list(&items))?;
        }
        Ok(())
    }

    /// Changes the algorithm, and waits until all agents have done so.
    fn set(&self, algorithm: Algorithm, is_sticky: bool) -> Result<()> {
        self.write(algorithm, is_sticky)?;
        let is_done = |port: &Value| {
            let has_affinity = port["affinity_secs"].as_u64().is_some_and(|secs| secs > 0);
            port["algorithm"] == algorithm.label() && has_affinity == is_sticky
        };
        for agent in &self.agents {
            eventually("every port has the algorithm", || {
                let ports = agent.show("services")?;
                let ports = ports.as_array().context("a list")?;
                ensure!(
                    ports.len() == 4 && ports.iter().all(is_done),
                    "{ports:?}\n{}",
                    agent.log()
                );
                Ok(())
            })?;
        }
        Ok(())
    }

    /// The places of the backends that answer `count` questions, one after the other.
    fn ask(&self, from: &Host, protocol: &str, to: SocketAddr, count: usize) -> Result<Vec<usize>> {
        let place = || {
            let name = from.who_answers(protocol, &to.to_string())?;
            let mut names = self.backends.iter().map(|pod| &pod.host.name);
            names
                .position(|other| *other == name)
                .with_context(|| format!("{name} is no backend"))
        };
        (0..count).map(|_| place()).collect()
    }

    /// What the kernel of each node holds for the service, without what is each node's own.
    fn tables(&self) -> Result<Vec<String>> {
        let nodes = self.scene.nodes.iter();
        nodes
            .map(|node| {
                let state = Bpf::open(&Pins::at(&node.bpffs))?.observe()?;
                let text = state.canonical();
                let lines = text.lines().filter(|line| !line.starts_with("address "));
                Ok(lines.collect::<Vec<_>>().join("\n"))
            })
            .collect()
    }
}

/// A pod's sockets and its packets.
fn ways(pod: &Pod) -> [Host; 2] {
    [pod.host.clone(), pod.host.without_socket_hooks()]
}

#[test]
fn turns_go_round_and_affinity_comes_before_them() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::new()?;
    stage.set(Algorithm::RoundRobin, false)?;
    for from in ways(&stage.clients[0]) {
        for to in frontends(10, 80) {
            for protocol in PROTOCOLS {
                let asked = stage.ask(&from, protocol, to, 9)?;
                let turns: Vec<usize> = (0..9).map(|turn| (asked[0] + turn) % 4).collect();
                assert_eq!(asked, turns, "{protocol} {to} from {}", from.name);
            }
        }
    }
    stage.set(Algorithm::RoundRobin, true)?;
    for to in frontends(10, 80) {
        let mut asked = BTreeSet::new();
        for from in ways(&stage.clients[0]) {
            asked.extend(stage.ask(&from, "tcp", to, 5)?);
        }
        assert_eq!(asked.len(), 1, "{to}: a bound client stays");
    }
    Ok(())
}

#[test]
fn a_client_gets_the_same_backend_on_every_way() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut stage = Stage::new()?;
    for algorithm in [Algorithm::SourceHash, Algorithm::Maglev] {
        stage.set(algorithm, false)?;
        let mut chosen = BTreeMap::new();
        for client in &stage.clients {
            for to in frontends(10, 80) {
                let mut asked = BTreeSet::new();
                for from in ways(client) {
                    for protocol in PROTOCOLS {
                        asked.extend(stage.ask(&from, protocol, to, 3)?);
                    }
                }
                let name = &client.host.name;
                let [place] = asked.iter().copied().collect::<Vec<_>>()[..] else {
                    panic!("{algorithm:?} {to} from {name}: {asked:?}");
                };
                if algorithm == Algorithm::SourceHash {
                    let ip = if to.is_ipv4() {
                        client.host.ip4
                    } else {
                        client.host.ip6
                    };
                    let hash = match ip {
                        IpAddr::V4(ip) => client_hash(&V4::from(ip)),
                        IpAddr::V6(ip) => client_hash(&V6::from(ip)),
                    };
                    assert_eq!(place, slot_at(hash, 4) as usize, "{to} from {name}");
                }
                chosen.insert((name.clone(), to), place);
            }
        }
        let tables = stage.tables()?;
        let first = format!("frontend 10.96.0.10 80 TCP {}\n", algorithm.label());
        assert!(tables[0].contains(&first), "{}", tables[0]);
        assert_eq!(tables[0], tables[1], "the nodes agree");
        // So does a node that begins anew, with other ids.
        let agent = &mut stage.agents[1];
        agent.kill();
        let said = agent.node().penstock("cleanup", &[])?;
        assert_eq!(said.code, 0, "{said:?}");
        agent.restart()?;
        agent.wait_for_pods(2)?;
        let tables = stage.tables()?;
        assert_eq!(tables[0], tables[1], "the nodes still agree");
        let client = &stage.clients[1];
        for to in frontends(10, 80) {
            let known = chosen[&(client.host.name.clone(), to)];
            assert_eq!(stage.ask(&client.host, "tcp", to, 2)?, [known, known]);
        }
    }
    Ok(())
}

#[test]
fn weights_are_shares() -> Result<()> {
    const CONNECTIONS: usize = 800;
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::new()?;
    stage.set(Algorithm::Weighted, false)?;
    let total: u16 = WEIGHTS.iter().sum();
    for from in ways(&stage.clients[0]) {
        for to in frontends(10, 80) {
            let mut trail = from.traffic(&["trail", &to.to_string(), "--for-ms", "600000"])?;
            let mut counts: BTreeMap<IpAddr, usize> = BTreeMap::new();
            for _ in 0..CONNECTIONS {
                let line: Value = serde_json::from_str(&trail.line()?)?;
                let reached: SocketAddr = text(&line, "reached").parse().context("an answer")?;
                *counts.entry(reached.ip()).or_default() += 1;
            }
            for (pod, weight) in stage.backends.iter().zip(WEIGHTS) {
                let ip = if to.is_ipv4() {
                    pod.host.ip4
                } else {
                    pod.host.ip6
                };
                let count = counts.get(&ip).copied().unwrap_or_default() as f64;
                let share = f64::from(weight) / f64::from(total);
                let mean = CONNECTIONS as f64 * share;
                // One run in a hundred thousand goes farther.
                let bound = 5.0 * (mean * (1.0 - share)).sqrt();
                assert!((count - mean).abs() <= bound, "{to} {ip}: {counts:?}");
            }
        }
    }
    let ports = stage.agents[0].show("services")?;
    let resting = |port: &Value| {
        let backends = port["backends"].as_array().into_iter().flatten();
        backends
            .filter(|backend| backend["state"] == "resting")
            .count()
    };
    let ports = ports.as_array().context("a list")?;
    assert!(ports.iter().all(|port| resting(port) == 1), "{ports:?}");
    let said = stage.agents[0].node().penstock("services", &[])?;
    assert!(
        said.output.contains("ALGORITHM") && said.output.contains("weighted"),
        "{}",
        said.output
    );
    stage.set(Algorithm::Random, false)?;
    let said = stage.agents[0].node().penstock("services", &[])?;
    assert!(!said.output.contains("ALGORITHM"), "{}", said.output);
    Ok(())
}

#[test]
fn a_change_of_the_algorithm_loses_no_connection() -> Result<()> {
    const INTERVAL_MS: u64 = 50;
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::new()?;
    let interval = INTERVAL_MS.to_string();
    let mut open = Vec::new();
    for from in ways(&stage.clients[0]) {
        for to in frontends(10, 80) {
            let to = to.to_string();
            for _ in 0..4 {
                open.push(from.traffic(&["hold", &to, "--interval-ms", &interval])?);
            }
            for protocol in ["udp", "udp-connected"] {
                let options = ["--interval-ms", &interval, "--timeout-ms", "5000"];
                open.push(from.traffic(&[&["keep", protocol, &to][..], &options].concat())?);
            }
        }
    }
    let firsts: Result<Vec<Value>> = open
        .iter_mut()
        .map(|process| Ok(serde_json::from_str(&process.line()?)?))
        .collect();
    let firsts = firsts?;
    let names: BTreeSet<&str> = stage
        .backends
        .iter()
        .map(|pod| pod.host.name.as_str())
        .collect();
    for first in &firsts {
        assert!(names.contains(text(first, "server")), "{first}");
    }
    let started = Instant::now();
    let mut read = 0;
    for algorithm in Algorithm::ALL.into_iter().rev().chain([Algorithm::Maglev]) {
        stage.set(algorithm, false)?;
        // Nobody has asked more often so far than once an interval: what is read beyond that was
        // asked after the change.
        let asked = started.elapsed().as_millis() / u128::from(INTERVAL_MS) + 2;
        while read < asked {
            for (process, first) in open.iter_mut().zip(&firsts) {
                let answer: Value = serde_json::from_str(&process.line()?)?;
                for field in ["server", "source", "peer"] {
                    assert_eq!(answer[field], first[field], "{algorithm:?}: {answer}");
                }
            }
            read += 1;
        }
    }
    Ok(())
}

/// Connections through a service that are held open, by who answers.
#[derive(Default)]
struct Held(BTreeMap<String, Vec<Process>>);

impl Held {
    /// Opens some more, by each of these ways in turns.
    fn open(&mut self, ways: &[Host], to: SocketAddr, count: usize) -> Result<()> {
        for number in 0..count {
            let from = &ways[number % ways.len()];
            let mut process = from.traffic(&["hold", &to.to_string(), "--interval-ms", "1000"])?;
            let answer: Value = serde_json::from_str(&process.line()?)?;
            let server = text(&answer, "server").to_owned();
            self.0.entry(server).or_default().push(process);
        }
        Ok(())
    }

    fn counts(&self) -> BTreeMap<&str, usize> {
        let held = self.0.iter();
        held.map(|(name, held)| (name.as_str(), held.len()))
            .collect()
    }
}

#[test]
fn who_has_fewer_connections_for_its_weight_gets_the_next() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut stage = Stage::new()?;
    let [here, _] = stage.scene.nodes.clone();
    let pods = [stage.backends[0].clone(), stage.backends[1].clone()];
    let write = |weight: u16| {
        let service = Service::new("even", 20).port("tcp", 80, "TCP");
        let label = Algorithm::LeastConnections.label();
        let service = service.annotation("penstock.io/algorithm", label);
        let mut items = vec![service.json()];
        for is_v4 in [true, false] {
            let mut slice = Slice::new("even", is_v4).port("tcp", 8080, "TCP");
            for pod in &pods {
                slice = slice.pod(pod);
            }
            let ip = if is_v4 {
                pods[1].host.ip4
            } else {
                pods[1].host.ip6
            };
            let weights = format!("{ip}={weight}");
            items.push(slice.annotation("penstock.io/weights", &weights).json());
        }
        here.manifest("even.json", &list(&items))
    };
    /// What the agent has counted of all backends.
    fn counted(bpffs: &std::path::Path, map: &str) -> Result<Vec<u32>> {
        let map = aya::maps::Map::HashMap(Pins::at(bpffs).map(map)?);
        let loads: aya::maps::HashMap<_, BackendId, Load> = map.try_into()?;
        let loads: Result<Vec<_>, _> = loads.iter().collect();
        let mut live: Vec<u32> = loads?.iter().map(|(_, load)| load.live).collect();
        live.sort_unstable();
        Ok(live)
    }
    write(1)?;
    let ways = ways(&stage.clients[0]);
    let names = pods.each_ref().map(|pod| pod.host.name.as_str());
    let [first, second] = names;
    for (to, map) in frontends(20, 80).into_iter().zip(["LOADS4", "LOADS6"]) {
        eventually("the service is there", || {
            ways[0].who_answers("tcp", &to.to_string()).map(drop)
        })?;
        let settled = |live: [u32; 2]| {
            eventually("the agent counts what is there", || {
                let found = counted(&here.bpffs, map)?;
                ensure!(found == live, "{found:?}");
                Ok(())
            })
        };
        settled([0, 0])?;
        // A connection that begins while the agent counts may count twice for a second.
        let assert_even = |held: &Held, each: usize| {
            let counts = held.counts();
            let count = |name| counts.get(name).copied().unwrap_or_default();
            assert!(count(first).abs_diff(each) <= 1, "{counts:?}");
            assert_eq!(count(first) + count(second), 2 * each, "{counts:?}");
            [count(first) as u32, count(second) as u32]
        };
        let sorted = |mut live: [u32; 2]| {
            live.sort_unstable();
            live
        };
        // Sockets and packets alike; each looks at both.
        let mut held = Held::default();
        held.open(&ways, to, 16)?;
        let live = assert_even(&held, 8);
        settled(sorted(live))?;
        // One end of half of them is killed, and nobody says so.
        held.0.remove(first);
        settled([0, live[1]])?;
        held.open(&ways, to, live[0] as usize)?;
        let live = assert_even(&held, 8);
        settled(sorted(live))?;
        // While no agent is there, too; a new one counts by itself.
        stage.agents[0].kill();
        held.open(&ways, to, 4)?;
        let live = assert_even(&held, 10);
        held.0.remove(second);
        stage.agents[0].restart()?;
        stage.agents[0].wait_for_pods(4)?;
        settled([0, live[0]])?;
        held.open(&ways, to, live[1] as usize)?;
        assert_even(&held, 10);
        drop(held);
    }
    // With a weight of three, a backend gets three times as many.
    write(3)?;
    eventually("weights are there", || {
        let services = stage.agents[0].show("services")?;
        let text = stage.tables()?.remove(0);
        ensure!(text.contains("3 of 4"), "{services}\n{text}");
        Ok(())
    })?;
    for (to, map) in frontends(20, 80).into_iter().zip(["LOADS4", "LOADS6"]) {
        eventually("the agent counts none", || {
            let found = counted(&here.bpffs, map)?;
            ensure!(found == [0, 0], "{found:?}");
            Ok(())
        })?;
        let mut held = Held::default();
        held.open(&ways, to, 24)?;
        let counts = held.counts();
        // Never more than its share and the one before; that it is half of it at least fails once
        // in a hundred thousand times: it is one of two looked at every second time.
        let count = counts.get(first).copied().unwrap_or_default();
        assert!((3..=7).contains(&count), "{counts:?}");
    }
    Ok(())
}
