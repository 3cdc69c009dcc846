//! The agent: takes hold of the kernel, then lets events move the world and the world the maps.

mod background;
mod state;

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use aya::maps::{Array, Map};
use glob::Pattern;
use penstock_common::{NetworkFlags, limits};
use tokio::sync::mpsc;

use crate::{
    attach::{
        cgroup::{self, Fate},
        exclude::Exclusions,
        follow::{Follower, Names, Wiring},
        held::{Agreement, Holder},
        interface::{PacketHooks, Role},
        netns,
        peers::Peers,
        routes, xdp,
    },
    dataplane::{bpf::Bpf, changed::Changed, pins::Pins},
    flows::Lifetimes,
    health, ipc, loads,
    metrics::Syncs,
    model::{node_ports::NodePorts, world::World},
    monitor,
    network::{self, pods::Pods},
    reconcile::Reconciler,
    signals::Signals,
    traces,
    usage::{Counted, Pressure},
    watch::{self, Scope},
};

use background::{changed, source, steer_udp, sweep_flows, told};
use state::{Agent, Shared};

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
    /// Where packets from the outside are met first.
    pub xdp: xdp::Choice,
    /// At which addresses of this node its ports are services'.
    pub node_ports: NodePorts,
    /// Cgroups, below `cgroup`, whose sockets are left alone.
    pub exclude_cgroups: Vec<Pattern>,
    /// The pod network, where pods are Penstock's to connect.
    pub network: Option<network::Options>,
    /// Where metrics and health checks are served.
    pub monitor: monitor::Addresses,
    /// For how long flows may be idle.
    pub lifetimes: Lifetimes,
    /// For how many flows of each family the table is to be made; nothing where it may be as it is.
    pub flows: Option<u32>,
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

/// Says so if the flow table is not as large as it is to be.
fn other_size(made: Option<u32>, wanted: Option<u32>) -> Vec<String> {
    let sizes = made.zip(wanted).into_iter();
    let others = sizes.filter(|(made, wanted)| made != wanted);
    others
        .map(|(made, wanted)| {
            format!(
                "the flow table is for {made} flows a family, as an earlier agent made it, and not for \
                 {wanted}: another size takes a restart of the node, or `penstock cleanup`, which \
                 interrupts translated connections"
            )
        })
        .collect()
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
    let flows = options.flows.unwrap_or(limits::FLOWS);
    let mut ebpf = pins.load(version >= (6, 1), options.is_tracing, flows)?;
    let notes = other_size(pins.flows()?, options.flows);
    for note in &notes {
        tracing::warn!("{note}");
    }
    if options.is_tracing {
        traces::forward(&mut ebpf);
    }
    let attached = cgroup::attach(&mut ebpf, &pins, &options.cgroup)?;
    let mut roles = vec![Role::Pod, Role::Uplink];
    roles.extend(options.network.is_some().then_some(Role::Overlay));
    let has_tcx = version >= (6, 6);
    let hooks = PacketHooks::load(ebpf, pins.clone(), has_tcx, options.xdp, &roles)?;
    if options.xdp != xdp::Choice::Off {
        tokio::spawn(routes::watch(Changed::open(&pins)?));
    }
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
    let (but_for_host_ports, mut wired) = mpsc::channel(64);
    let mut network_state = None;
    let mut wiring = None;
    let mut has_translators = false;
    let config: Array<_, penstock_common::Config> =
        Array::try_from(Map::Array(pins.map("CONFIG")?)).context("map CONFIG")?;
    // What the node's object said to an earlier agent, for as long as nobody says anything else.
    let before = config.get(&0, 0).unwrap_or_default();
    let are_some_held = before.network & NetworkFlags::HELD != 0;
    let agreement = Arc::new(Agreement::new(are_some_held));
    if let Some(options_of_network) = options.network {
        let places = &options_of_network.places;
        has_translators = places.has_translators();
        if !has_tcx
            && places
                .chain
                .iter()
                .any(|plugin| plugin.name() == "bandwidth")
        {
            tracing::warn!(
                "before Linux 6.6 the plugin bandwidth can't limit what pods send where Penstock's hooks \
                 are: it fails for pods that ask for that. Leave the capability bandwidth to penstock-cni"
            );
        }
        wiring = Some(Wiring {
            pods: Pods::new(&places.state_dir),
            endpoints: network::Endpoints::open(&pins)?,
            pins: pins.clone(),
            host_ports: host_ports_told,
            requests: wire_requests,
            but_for_host_ports,
            is_chained: places.has_others(),
            holder: Holder::new(network::Held::open(&pins)?),
            agreement: agreement.clone(),
            peers: Peers::default(),
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
    let unmonitored = monitor::Problems::default();
    monitor::run(options.monitor, &pins, queries_sender.clone(), &unmonitored);
    tokio::spawn(ipc::serve(listener, queries_sender));
    let counted = Counted::default();
    let sweep = sweep_flows(&pins, options.lifetimes, counted.clone())?;
    let steer = steer_udp(&pins)?;

    let (by_load, watched) = tokio::sync::watch::channel(Arc::default());
    tokio::spawn(loads::run(pins.clone(), watched));
    let (health_checks, checks) = tokio::sync::watch::channel(Arc::default());
    let unchecked = health::Problems::default();
    let waiting = health::Waiting::default();
    tokio::spawn(health::run(checks, waiting.clone(), unchecked.clone()));
    let mut world = World::new(&options.node_name);
    world.set_node_addresses(detected);
    world.set_node_ports(options.node_ports);
    if network_state.is_some() {
        world.await_host_ports();
    }
    let chosen: [IpAddr; 2] = [
        Ipv4Addr::from(before.node4).into(),
        Ipv6Addr::from(before.node6).into(),
    ];
    let mut agent = Agent {
        reconciler: Reconciler::new(Bpf::open(&pins)?, world)?,
        pins: pins.clone(),
        status,
        interfaces,
        shared,
        configured: penstock_common::Config::default(),
        changed: Changed::open(&pins)?,
        config,
        lifetimes: options.lifetimes,
        counted,
        pressure: Pressure::default(),
        attached,
        has_cgroup: true,
        exclusions: Exclusions::open(&pins, &options.cgroup, options.exclude_cgroups)?,
        node_name: options.node_name,
        known,
        network: network_state,
        agreement: agreement.clone(),
        has_translators,
        wires,
        steer,
        sweep,
        by_load,
        has_news: false,
        health_checks,
        waiting,
        unchecked,
        unmonitored,
        syncs: Syncs::default(),
        started: Instant::now(),
        notes,
        started_since_1970: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default(),
        triggers: Vec::new(),
        was_settled: false,
        was_synced: false,
        chosen: chosen
            .into_iter()
            .filter(|ip| !ip.is_unspecified())
            .collect(),
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
            () = agreement.asked() => agent.update_node(),
            Some(ports) = told(&mut host_ports) => {
                agent.reconciler.world.set_host_ports(ports);
                agent.step();
            }
            Ok(()) = addresses_seen.changed() => {
                agent.take_addresses(&mut addresses_seen);
                agent.step();
            }
            Some(request) = wired.recv() => {
                // What was told before it was asked counts.
                if addresses_seen.has_changed().unwrap_or(false) {
                    agent.take_addresses(&mut addresses_seen);
                }
                if let Some(ports) = host_ports.borrow_and_update().clone() {
                    agent.reconciler.world.set_host_ports(ports);
                }
                agent.step();
                agent.answer_of_host_ports(request);
            }
            () = tokio::time::sleep(wait) => agent.step(),
            _ = cgroups.tick() => {
                agent.look_for_cgroups();
                agent.tell_loads();
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
