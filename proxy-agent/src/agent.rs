//! The agent: takes hold of the kernel, then lets events move the world and the world the maps.

use std::{
    collections::{BTreeSet, HashSet},
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use aya::maps::{Array, Map};
use glob::Pattern;
use penstock_cni::agent::Answer;
use penstock_common::{Config, NetworkFlags, V4, V6};
use tokio::sync::{Notify, mpsc};

use crate::{
    attach::{
        cgroup::{self, Attached, Fate},
        exclude::Exclusions,
        follow::{self, Follower, Names, WireRequest, Wiring, lock},
        interface::PacketHooks,
        netns,
    },
    dataplane::{bpf::Bpf, pins::Pins},
    flows::Sweeper,
    health,
    ipc::{self, Query},
    model::{
        node_ports::NodePorts,
        object::{Event, Family, Kind, ObjectName},
        world::World,
    },
    network::{self, pods::Pods},
    reconcile::Reconciler,
    report::{self, Report},
    signals::Signals,
    traces,
    udp::Resteer,
    watch::{self, Scope},
};

/// How often flows are swept.
const SWEEP: Duration = Duration::from_secs(2);
/// How long after a change of UDP backends their sockets are looked at once more, for one that
/// was connecting meanwhile.
const SECOND_LOOK: Duration = Duration::from_millis(250);
/// How often excluded cgroups are looked for.
const LOOK_FOR_CGROUPS: Duration = Duration::from_secs(1);
/// Events that are taken in before the maps are written.
const BATCH: usize = 8_192;

/// Where objects come from.
pub enum Source {
    /// An API server.
    Kube(watch::kube::Servers),
    /// A directory.
    Manifests(PathBuf),
}

/// What the agent is told on its command line.
pub struct Options {
    /// Where objects come from.
    pub source: Source,
    /// This node's name.
    pub node_name: String,
    /// The cgroup whose sockets are translated.
    pub cgroup: PathBuf,
    /// Where maps and links are pinned.
    pub bpffs: PathBuf,
    /// Where the command line finds the agent.
    pub run_dir: PathBuf,
    /// Names of interfaces, by what is behind them.
    pub interfaces: Names,
    /// At which addresses of this node its ports are services'.
    pub node_ports: NodePorts,
    /// Cgroups, below `cgroup`, whose sockets are left alone.
    pub exclude_cgroups: Vec<Pattern>,
    /// The pod network, where pods are Penstock's to connect.
    pub network: Option<network::Options>,
    /// Whether the programs trace what they refuse.
    pub is_tracing: bool,
}

/// The running kernel's version.
fn kernel_version() -> Option<(u32, u32)> {
    let name = nix::sys::utsname::uname().ok()?;
    let mut numbers = name.release().to_str()?.split(['.', '-']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Why an agent's run ended.
#[derive(Debug)]
pub enum Ending {
    /// It was told to stop.
    Told,
    /// Somebody removed something of it from under it.
    Lost(PathBuf),
}

/// Runs until told to stop. Traffic goes on afterwards.
pub async fn run(options: Options) -> Result<Ending> {
    let mut signals = Signals::new()?;
    let listener = ipc::listen(&options.run_dir)?;
    let version = kernel_version().context("this kernel does not say its version")?;
    anyhow::ensure!(
        version >= (5, 15),
        "this is Linux {}.{}; Penstock needs 5.15 or newer",
        version.0,
        version.1
    );
    let pins = Pins::create(&options.bpffs)?;
    let _lock = pins.lock()?;
    let mut ebpf = pins.load(version >= (6, 1), options.is_tracing)?;
    if options.is_tracing {
        traces::forward(&mut ebpf);
    }
    let attached = cgroup::attach(&mut ebpf, &pins, &options.cgroup)?;
    let hooks = PacketHooks::load(ebpf, pins.clone(), version >= (6, 6))?;
    tracing::info!("socket hooks are on {}", options.cgroup.display());

    let (sender, mut events) = mpsc::channel(BATCH);
    let status = watch::Status::default();
    tokio::spawn(source(
        options.source,
        Scope {
            node_name: options.node_name.clone(),
            has_network: options.network.is_some(),
        },
        status.clone(),
        sender,
    ));

    let shared = Shared::default();
    let (known, known_to_network) = tokio::sync::watch::channel(Arc::default());
    let (wires, wire_requests) = mpsc::channel(64);
    let (host_ports_told, mut host_ports) = tokio::sync::watch::channel(None);
    let mut network_state = None;
    let mut wiring = None;
    if let Some(options_of_network) = options.network {
        wiring = Some(Wiring {
            pods: Pods::new(&options_of_network.places.state_dir),
            endpoints: network::Endpoints::open(&pins)?,
            host_ports: host_ports_told,
            requests: wire_requests,
        });
        let (network, state) = network::Network::new(
            options_of_network,
            options.node_name.clone(),
            pins.clone(),
            known_to_network,
        );
        network_state = Some(state);
        tokio::spawn(network.run());
    }
    let detected = netns::own_addresses().context("reading this node's addresses")?;
    let detected: Vec<IpAddr> = detected.into_iter().map(|(_, ip)| ip).collect();
    let (own_addresses, mut addresses_seen) = tokio::sync::watch::channel(detected.clone());
    let follower = Follower::new(
        hooks,
        options.interfaces,
        &pins,
        shared.node_addresses.clone(),
        shared.excluded.clone(),
        own_addresses,
        wiring,
    )?;
    let interfaces = follower.status.clone();
    tokio::spawn(follower.run(shared.changed.clone()));
    let (queries_sender, mut queries) = mpsc::channel(16);
    tokio::spawn(ipc::serve(listener, queries_sender));
    sweep_flows(&pins)?;
    let steer = steer_udp(&pins)?;

    let (health_checks, checks) = tokio::sync::watch::channel(Arc::default());
    let unchecked = health::Problems::default();
    tokio::spawn(health::run(checks, unchecked.clone()));
    let mut world = World::new(&options.node_name);
    world.set_node_addresses(detected);
    world.set_node_ports(options.node_ports);
    if network_state.is_some() {
        world.await_host_ports();
    }
    let mut agent = Agent {
        reconciler: Reconciler::new(Bpf::open(&pins)?, world)?,
        status,
        interfaces,
        shared,
        config: Array::try_from(Map::Array(pins.map("CONFIG")?)).context("map CONFIG")?,
        attached,
        has_cgroup: true,
        exclusions: Exclusions::open(&pins, &options.cgroup, options.exclude_cgroups)?,
        node_name: options.node_name,
        known,
        network: network_state,
        wires,
        steer,
        health_checks,
        unchecked,
        started: Instant::now(),
        was_settled: false,
        was_synced: false,
        chosen: Vec::new(),
        told: BTreeSet::new(),
        network_problem: None,
    };
    agent.update_node();
    // Sockets may have lost their backends while nobody was there.
    agent.steer.notify_one();

    let pinned = pins.list();
    let mut cgroups = tokio::time::interval(LOOK_FOR_CGROUPS);
    let mut batch = Vec::with_capacity(256);
    loop {
        let wait = agent.wait();
        tokio::select! {
            count = events.recv_many(&mut batch, BATCH) => {
                anyhow::ensure!(count > 0, "the source of objects ended");
                agent.take(batch.drain(..));
                agent.step();
            }
            Some(query) = queries.recv() => agent.answer(query),
            () = changed(&mut agent.network) => agent.update_node(),
            Some(ports) = told(&mut host_ports) => {
                agent.reconciler.world.set_host_ports(ports);
                agent.step();
            }
            Ok(()) = addresses_seen.changed() => {
                let addresses = addresses_seen.borrow_and_update().clone();
                agent.reconciler.world.set_node_addresses(addresses);
                agent.update_node();
                agent.step();
            }
            () = tokio::time::sleep(wait) => agent.step(),
            _ = cgroups.tick() => {
                agent.look_for_cgroups();
                if let Some(lost) = pinned.iter().find(|path| !path.exists()) {
                    return Ok(Ending::Lost(lost.clone()));
                }
                let fate = agent.attached.fate();
                if fate == Fate::Replaced {
                    return Ok(Ending::Lost(options.cgroup));
                }
                agent.has_cgroup = fate == Fate::Kept;
                agent.tell_problems();
            }
            () = signals.stop() => break,
        }
    }
    tracing::info!("stopping; the kernel goes on serving");
    ipc::leave(&options.run_dir);
    Ok(Ending::Told)
}

/// The ports of this node that pods ask for, whenever they are others.
async fn told(
    ports: &mut tokio::sync::watch::Receiver<Option<follow::HostPorts>>,
) -> Option<follow::HostPorts> {
    ports.changed().await.ok()?;
    ports.borrow_and_update().clone()
}

/// Waits until the network is another.
async fn changed(network: &mut Option<tokio::sync::watch::Receiver<network::State>>) {
    if let Some(network) = network
        && network.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

async fn source(source: Source, scope: Scope, status: watch::Status, events: mpsc::Sender<Event>) {
    match source {
        Source::Kube(servers) => watch::kube::run(servers, scope, status, events).await,
        Source::Manifests(directory) => {
            watch::manifests::Manifests::new(&directory, status)
                .run(events)
                .await;
        }
    }
}

/// Sweeps flows on a thread of its own.
fn sweep_flows(pins: &Pins) -> Result<()> {
    let mut sweeper = Sweeper::open(pins)?;
    std::thread::Builder::new()
        .name("flows".to_owned())
        .spawn(move || {
            sweeper.refill();
            loop {
                let (swept, live) = sweeper.sweep();
                if swept > 0 {
                    tracing::debug!("{swept} flows expired, {live} are there");
                }
                std::thread::sleep(SWEEP);
            }
        })
        .context("starting the flow sweeper")?;
    Ok(())
}

/// Looks after connected UDP sockets whenever it is notified.
fn steer_udp(pins: &Pins) -> Result<Arc<Notify>> {
    let resteer = Arc::new(Resteer::open(pins)?);
    let notify = Arc::new(Notify::new());
    let notified = notify.clone();
    tokio::spawn(async move {
        loop {
            notified.notified().await;
            pass(&resteer).await;
            tokio::time::sleep(SECOND_LOOK).await;
            pass(&resteer).await;
        }
    });
    Ok(notify)
}

async fn pass(resteer: &Arc<Resteer>) {
    let resteer = resteer.clone();
    match tokio::task::spawn_blocking(move || resteer.pass()).await {
        Ok(Ok(report)) if report != crate::udp::Report::default() => {
            tracing::debug!("connected UDP sockets: {report:?}");
            if report.failed > 0 {
                tracing::warn!(
                    "{} connected UDP sockets can't be reached and keep a dead backend; the agent \
                     needs the host's PID namespace and CAP_SYS_PTRACE",
                    report.failed
                );
            }
        }
        Ok(Err(error)) => tracing::warn!("looking after connected UDP sockets: {error}"),
        _ => {}
    }
}

/// What tasks share.
#[derive(Default)]
struct Shared {
    node_addresses: Arc<Mutex<Vec<IpAddr>>>,
    excluded: follow::Excluded,
    changed: Arc<Notify>,
}

struct Agent {
    reconciler: Reconciler<Bpf>,
    status: watch::Status,
    interfaces: Arc<Mutex<follow::Status>>,
    shared: Shared,
    config: Array<aya::maps::MapData, Config>,
    attached: Attached,
    /// Whether the cgroup that the socket hooks are on was there when last looked for.
    has_cgroup: bool,
    exclusions: Exclusions,
    node_name: String,
    known: tokio::sync::watch::Sender<Arc<network::Known>>,
    network: Option<tokio::sync::watch::Receiver<network::State>>,
    wires: mpsc::Sender<WireRequest>,
    steer: Arc<Notify>,
    health_checks: tokio::sync::watch::Sender<Arc<health::Checks>>,
    unchecked: health::Problems,
    started: Instant,
    was_settled: bool,
    was_synced: bool,
    /// The addresses that stand for this node, one a family.
    chosen: Vec<IpAddr>,
    /// Problems that the log knows.
    told: BTreeSet<String>,
    /// What was wrong with the network when last looked at.
    network_problem: Option<String>,
}

/// What an event settles, if it is believed.
enum About {
    /// An object is good or gone.
    Object(Kind, ObjectName),
    /// All objects of a kind are, but for some.
    List(Kind, Vec<ObjectName>),
    Nothing,
}

impl About {
    fn of(event: &Event) -> Self {
        match event {
            Event::Applied(object) => Self::Object(object.kind(), object.name()),
            Event::Deleted(kind, name) => Self::Object(*kind, name.clone()),
            Event::Listed(kind, _, kept) => Self::List(*kind, kept.clone()),
            Event::Rejected(_) | Event::Doubt(_) => Self::Nothing,
        }
    }
}

impl Agent {
    /// Takes events in.
    fn take(&mut self, events: impl Iterator<Item = Event>) {
        let mut touches_node = false;
        for event in events {
            let about = About::of(&event);
            if let About::Object(kind, _) | About::List(kind, _) = &about {
                touches_node |= matches!(kind, Kind::Node | Kind::Pod);
            }
            match (self.reconciler.world.apply(event), about) {
                (Err(rejection), _) => self.status.reject(&rejection),
                (Ok(()), About::Object(kind, name)) => self.status.accept(kind, &name),
                (Ok(()), About::List(kind, kept)) => self.status.accept_others(kind, &kept),
                (Ok(()), About::Nothing) => {}
            }
        }
        if touches_node {
            self.update_node();
        }
    }

    fn step(&mut self) {
        let outcome = self.reconciler.step(self.started.elapsed());
        if outcome.writes > 0 {
            tracing::debug!("{} services, {} writes", outcome.services, outcome.writes);
        }
        if outcome.has_udp_change {
            self.steer.notify_one();
        }
        if !self.was_synced && self.reconciler.world.is_synced() {
            self.was_synced = true;
            self.update_node();
        }
        self.tell_health_checks();
        if !self.was_settled && self.reconciler.is_settled() {
            self.was_settled = true;
            let (services, _, endpoints) = self.reconciler.world.sizes();
            tracing::info!("serving {services} services with {endpoints} endpoints");
        }
    }

    /// Tells the servers of health checks what to answer.
    fn tell_health_checks(&self) {
        let world = &self.reconciler.world;
        let ports = world.health_checks().into_iter();
        let checks = health::Checks {
            ports: ports
                .map(|(port, (service, local_endpoints))| {
                    let check = health::Check {
                        service,
                        local_endpoints,
                    };
                    (port, check)
                })
                .collect(),
            // One service that can't be programmed is no reason to leave all others out.
            is_proxy_healthy: world.is_synced(),
        };
        self.health_checks.send_if_modified(|known| {
            let is_new = **known != checks;
            if is_new {
                *known = Arc::new(checks);
            }
            is_new
        });
    }

    /// Until when nothing is to be done without an event.
    fn wait(&self) -> Duration {
        let due = self.reconciler.next_due();
        due.map_or(Duration::from_secs(3_600), |due| {
            due.saturating_sub(self.started.elapsed())
        })
    }

    /// Tells programs and follower who this node is and who opted out.
    fn update_node(&mut self) {
        let world = &self.reconciler.world;
        let named = world
            .node()
            .map(|node| node.internal_ips.clone())
            .unwrap_or_default();
        let detected: Vec<IpAddr> = world.node_addresses().iter().copied().collect();
        self.chosen = [Family::V4, Family::V6]
            .into_iter()
            .filter_map(|family| netns::choose(family, &named, &detected, &self.chosen))
            .collect();
        let (mut node4, mut node6) = (V4::default(), V6::default());
        for address in &self.chosen {
            match address {
                IpAddr::V4(ip) => node4 = V4::from(*ip),
                IpAddr::V6(ip) => node6 = V6::from(*ip),
            }
        }
        let addresses = self.chosen.iter().chain(&named).chain(&detected);
        let addresses = addresses.copied().collect();
        let excluded: HashSet<IpAddr> = world
            .excluded()
            .flat_map(|pod| pod.ips.iter().copied())
            .collect();
        *lock(&self.shared.node_addresses) = addresses;
        *lock(&self.shared.excluded) = excluded;
        self.exclusions
            .set_pods(world.excluded().map(|pod| pod.uid.clone()).collect());
        let excluded_cgroups = self.exclusions.count();
        let network = self
            .network
            .as_ref()
            .map(|network| network.borrow().clone());
        let network = network.unwrap_or_default();
        let config = Config {
            node4,
            node6,
            excluded_cgroups,
            ..self.network_config(&network)
        };
        let written = self.config.set(0, config, 0);
        if let Err(error) = &written {
            tracing::warn!("writing map CONFIG: {error}");
        }
        // What is known has been written when this is called, or is being tried again, which need
        // not keep a pod waiting that does not use it.
        let is_serving = network.is_ready && self.was_synced && written.is_ok();
        self.tell_network(is_serving);
        self.shared.changed.notify_one();
    }

    /// What is wrong beside objects and services.
    fn problems(&self) -> Vec<String> {
        let loss = (!self.has_cgroup).then(|| self.attached.loss());
        let unswept = self.reconciler.unswept().map(str::to_owned);
        let mut problems: Vec<String> = loss.into_iter().chain(unswept).collect();
        problems.extend(lock(&self.interfaces).problems.iter().cloned());
        problems.extend(lock(&self.unchecked).values().cloned());
        if let Some(network) = &self.network {
            problems.extend(network.borrow().rejections.iter().map(report::in_words));
        }
        problems
    }

    /// Logs problems that are new, and those that are over.
    fn tell_problems(&mut self) {
        let problems: BTreeSet<String> = self.problems().into_iter().collect();
        for new in problems.difference(&self.told) {
            tracing::warn!("{new}");
        }
        for over in self.told.difference(&problems) {
            tracing::info!("no longer a problem: {over}");
        }
        self.told = problems;
        // The network says what is wrong with it, and not when that is over.
        let state = self.network.as_ref().map(|network| network.borrow());
        let problem = state.and_then(|state| state.problem.clone());
        if let (Some(over), None) = (&self.network_problem, &problem) {
            tracing::info!("no longer a problem: network: {over}");
        }
        self.network_problem = problem;
    }

    /// The network's part of what the programs are told. Until it is ready that is what an earlier
    /// agent told them: pods' flows go on as they began.
    fn network_config(&self, network: &network::State) -> Config {
        if self.network.is_none() {
            return Config::default();
        }
        if !network.is_ready {
            // The map has had no other value than zeros where it can't be read.
            return self.config.get(&0, 0).unwrap_or_default();
        }
        let masquerade = if network.masquerades {
            NetworkFlags::MASQUERADE
        } else {
            0
        };
        let (mut overlay4, mut overlay6) = (V4::default(), V6::default());
        for address in &network.addresses {
            match address {
                IpAddr::V4(ip) => overlay4 = V4::from(*ip),
                IpAddr::V6(ip) => overlay6 = V6::from(*ip),
            }
        }
        Config {
            network: NetworkFlags::FORWARD | masquerade,
            overlay_ifindex: network.overlay_ifindex,
            overlay_mtu: network.overlay_mtu,
            overlay_vni: network.vni,
            overlay4,
            overlay6,
            ..Config::default()
        }
    }

    fn look_for_cgroups(&mut self) {
        match self.exclusions.look() {
            Ok(true) => self.update_node(),
            Ok(false) => {}
            Err(error) => tracing::warn!("excluding cgroups: {error}"),
        }
    }

    /// Tells the network who the nodes are, once that is known, and whether pods may come.
    fn tell_network(&self, is_serving: bool) {
        if self.network.is_none() || self.reconciler.world.awaited().contains(&Kind::Node) {
            return;
        }
        let known = network::Known {
            nodes: self.reconciler.world.nodes().cloned().collect(),
            is_serving,
        };
        self.known.send_if_modified(|old| {
            let is_new = **old != known;
            if is_new {
                *old = Arc::new(known);
            }
            is_new
        });
    }

    fn answer(&self, query: Query) {
        // Who asked may have gone, hence results that do not matter.
        match query {
            Query::Report(answer) => {
                let network = self
                    .network
                    .as_ref()
                    .map(|network| network.borrow().clone());
                let mut report = Report::of(
                    &self.node_name,
                    &self.reconciler,
                    &self.status,
                    &lock(&self.interfaces),
                    network.as_ref(),
                    self.started.elapsed(),
                );
                report.problems.extend(self.problems());
                let _ = answer.send(report);
            }
            Query::Ready(answer) => {
                let _ = answer.send(self.readiness());
            }
            Query::Wire(request) => match self.readiness() {
                Answer::Done => {
                    // A full queue drops the question, and the plugin tries again.
                    let _ = self.wires.try_send(request);
                }
                not_ready => {
                    let _ = request.answer.send(not_ready);
                }
            },
        }
    }

    /// Whether pods can be given a network.
    fn readiness(&self) -> Answer {
        let Some(network) = &self.network else {
            return Answer::Failed(
                "this agent does not connect pods; start it with --network".to_owned(),
            );
        };
        let network = network.borrow();
        match (&network.problem, self.known.borrow().is_serving) {
            (_, true) => Answer::Done,
            (Some(problem), false) => Answer::NotYet(problem.clone()),
            (None, false) => {
                let awaited = self.reconciler.world.awaited();
                let kinds: Vec<String> = awaited.iter().map(ToString::to_string).collect();
                Answer::NotYet(match kinds.as_slice() {
                    [] => "the kernel is being made ready".to_owned(),
                    kinds => format!("it still waits for the first list of {}", kinds.join(", ")),
                })
            }
        }
    }
}
