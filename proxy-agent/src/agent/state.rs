//! What the agent knows, and what it does about each thing that happens.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::{Arc, Mutex, mpsc::SyncSender},
    time::{Duration, Instant},
};

use aya::maps::Array;
use penstock_cni::agent::Answer;
use penstock_common::{Be16, Config, NetworkFlags, V4, V6};
use tokio::sync::{Notify, mpsc};

use crate::{
    api,
    attach::{
        cgroup::Attached,
        exclude::Exclusions,
        follow::{self, WireRequest, lock},
        held::Agreement,
        inspect, netns,
    },
    dataplane::{bpf::Bpf, changed::Changed, pins::Pins},
    flows::Lifetimes,
    health,
    ipc::Query,
    metrics::{Syncs, Vitals},
    model::{
        object::{Event, Family, Kind, ObjectName},
        port::Refusal,
        world::Trigger,
    },
    monitor,
    network::{self, pods},
    plan::{self, planner::Watched},
    ports,
    reconcile::Reconciler,
    report::{self, Report},
    usage::{self, Counted, Fill, Pressure},
    watch,
};

/// What tasks share.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) node_addresses: Arc<Mutex<Vec<IpAddr>>>,
    pub(super) excluded: follow::Excluded,
    pub(super) changed: Arc<Notify>,
}

pub(super) struct Agent {
    pub(super) reconciler: Reconciler<Bpf>,
    /// Where the kernel's maps are.
    pub(super) pins: Pins,
    pub(super) status: watch::Status,
    pub(super) interfaces: Arc<Mutex<follow::Status>>,
    pub(super) shared: Shared,
    pub(super) config: Array<aya::maps::MapData, Config>,
    /// What was written there last.
    pub(super) configured: Config,
    pub(super) changed: Changed,
    pub(super) lifetimes: Lifetimes,
    /// How full the tables are that the programs fill.
    pub(super) counted: Counted,
    pub(super) pressure: Pressure,
    pub(super) attached: Attached,
    /// Whether the cgroup that the socket hooks are on was there when last looked for.
    pub(super) has_cgroup: bool,
    pub(super) exclusions: Exclusions,
    pub(super) node_name: String,
    pub(super) known: tokio::sync::watch::Sender<Arc<network::Known>>,
    pub(super) network: Option<tokio::sync::watch::Receiver<network::State>>,
    /// Whether the programs are to look for pods whose packets are left to the kernel.
    pub(super) agreement: Arc<Agreement>,
    /// Whether others may translate packets to pods in the kernel's stack.
    pub(super) has_translators: bool,
    pub(super) wires: mpsc::Sender<WireRequest>,
    pub(super) steer: Arc<Notify>,
    /// Has flows swept at once.
    pub(super) sweep: SyncSender<()>,
    /// Tells who counts connections for whom.
    pub(super) by_load: tokio::sync::watch::Sender<Arc<Vec<Watched>>>,
    /// Whether the maps were written since that was last told.
    pub(super) has_news: bool,
    pub(super) health_checks: tokio::sync::watch::Sender<Arc<health::Checks>>,
    pub(super) waiting: health::Waiting,
    pub(super) unchecked: health::Problems,
    pub(super) unmonitored: monitor::Problems,
    pub(super) syncs: Syncs,
    pub(super) started: Instant,
    /// What is other than it was said to be, and hurts nobody.
    pub(super) notes: Vec<String>,
    /// The same, in time since 1970.
    pub(super) started_since_1970: Duration,
    /// What made endpoints change that are not written yet.
    pub(super) triggers: Vec<Trigger>,
    pub(super) was_settled: bool,
    pub(super) was_synced: bool,
    /// The addresses that stand for this node, one a family.
    pub(super) chosen: Vec<IpAddr>,
    /// Problems that the log knows.
    pub(super) told: BTreeSet<String>,
    /// What was wrong with the network when last looked at.
    pub(super) network_problem: Option<String>,
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
    pub(super) fn of(event: &Event) -> Self {
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
    pub(super) fn take(&mut self, events: impl Iterator<Item = Event>) {
        let mut touches_node = false;
        for event in events {
            let about = About::of(&event);
            if let About::Object(kind, _) | About::List(kind, _) = &about {
                touches_node |= matches!(kind, Kind::Node | Kind::Pod);
            }
            match &event {
                Event::Listed(kind, objects, _) => self.syncs.changed(*kind, objects.len()),
                Event::Applied(object) => self.syncs.changed(object.kind(), 1),
                Event::Deleted(kind, _) => self.syncs.changed(*kind, 1),
                Event::Doubt(_) | Event::Rejected(_) => {}
            }
            match (self.reconciler.world.apply(event), about) {
                (Err(rejection), _) => self.status.reject(&rejection),
                (Ok(()), About::Object(kind, name)) => self.status.accept(kind, &name),
                (Ok(()), About::List(kind, kept)) => self.status.accept_others(kind, &kept),
                (Ok(()), About::Nothing) => {}
            }
        }
        if self.reconciler.world.is_dirty() {
            self.syncs.queued();
            if self.reconciler.world.is_synced() {
                self.waiting.begin();
            }
        }
        if touches_node {
            self.update_node();
        }
    }

    pub(super) fn step(&mut self) {
        let began = Instant::now();
        let outcome = self.reconciler.step(self.started.elapsed());
        let refused = self.reconciler.refused_since();
        self.waiting.set(refused.map(|since| self.started + since));
        if outcome.services > 0 || outcome.writes > 0 {
            self.syncs.done(began.elapsed(), self.reconciler.failed());
        } else if self.reconciler.world.is_synced() {
            // Sources also speak of what makes no difference.
            self.syncs.nothing_pends(self.reconciler.failed());
        }
        self.tell_triggers();
        if outcome.writes > 0 {
            tracing::debug!("{} services, {} writes", outcome.services, outcome.writes);
        }
        self.has_news |= outcome.writes > 0 || !self.was_settled;
        if outcome.has_udp_change {
            self.steer.notify_one();
        }
        if outcome.has_moved {
            // Where it was told already and has not begun, it will see this too.
            let _ = self.sweep.try_send(());
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

    /// Notes how long it took from what made endpoints change until that is in the kernel.
    fn tell_triggers(&mut self) {
        // What happened before this agent was there does not say how long it takes. Those before the first
        // lists are all of this kind, but for the last ones.
        let triggers = self.reconciler.world.take_triggers().into_iter();
        let new = triggers.filter(|trigger| trigger.since_1970 >= self.started_since_1970);
        self.triggers.extend(new);
        if !self.reconciler.world.is_synced() {
            return;
        }
        let waiting = self.reconciler.errors();
        let syncs = &self.syncs;
        self.triggers.retain(|trigger| {
            let is_waiting = waiting.contains_key(&trigger.service);
            if !is_waiting {
                syncs.programmed(trigger.family, trigger.since_1970);
            }
            is_waiting
        });
        // A service that can't be written may go on changing: its first change says how long it waits.
        self.triggers.sort_unstable();
        self.triggers.dedup_by(|later, first| {
            (&later.service, later.family) == (&first.service, first.family)
        });
    }

    /// Tells for which ports connections are to be counted.
    pub(super) fn tell_loads(&mut self) {
        if !std::mem::take(&mut self.has_news) {
            return;
        }
        let ports = self.reconciler.by_load();
        self.by_load.send_if_modified(|known| {
            let is_new = !ports.is_empty() || !known.is_empty();
            if is_new {
                *known = Arc::new(ports);
            }
            is_new
        });
    }

    /// Tells the servers of health checks what to answer.
    pub(super) fn tell_health_checks(&self) {
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
            addresses: world.health_addresses(),
            is_synced: world.is_synced(),
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
    pub(super) fn wait(&self) -> Duration {
        let due = self.reconciler.next_due();
        due.map_or(Duration::from_secs(3_600), |due| {
            due.saturating_sub(self.started.elapsed())
        })
    }

    /// Tells programs and follower who this node is and who opted out.
    pub(super) fn update_node(&mut self) {
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
        let are_all = self.knows_who_opted_out();
        let ips = world.excluded().flat_map(|pod| pod.ips.iter().copied());
        let opted_out = follow::OptedOut {
            ips: ips.collect(),
            are_all,
        };
        *lock(&self.shared.node_addresses) = addresses;
        *lock(&self.shared.excluded) = opted_out;
        let uids = world.excluded().map(|pod| pod.uid.clone()).collect();
        self.exclusions.set_pods(uids, are_all);
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
            timeouts: self.lifetimes.timeouts(),
            ..self.network_config(&network)
        };
        let written = self.config.set(0, config, 0);
        if config != self.configured {
            self.changed.note();
            self.configured = config;
        }
        match &written {
            Ok(()) => self
                .agreement
                .tell(config.network & NetworkFlags::HELD != 0),
            Err(error) => tracing::warn!("writing map CONFIG: {error}"),
        }
        // What is known has been written when this is called, or is being tried again, which need
        // not keep a pod waiting that does not use it.
        let is_serving = network.is_ready && self.was_synced && written.is_ok();
        self.tell_network(is_serving);
        self.shared.changed.notify_one();
    }

    /// How full the kernel's tables are.
    fn fills(&self) -> Vec<Fill> {
        let mut fills = lock(&self.counted).clone();
        let (_, slots) = self.reconciler.used();
        fills.extend(usage::services(self.reconciler.sizes(), slots));
        fills
    }

    /// What is wrong beside objects and services.
    pub(super) fn problems(&self) -> Vec<String> {
        let loss = (!self.has_cgroup).then(|| self.attached.loss());
        let unswept = self.reconciler.unswept().map(str::to_owned);
        let mut problems: Vec<String> = loss.into_iter().chain(unswept).collect();
        if self.waiting.is_late() {
            problems.push(format!(
                "the kernel has refused changes for {} seconds or longer: load balancers are told to leave \
                 this node out until they are written",
                health::HEALTH_TIMEOUT.as_secs()
            ));
        }
        problems.extend(self.pressure.problems());
        {
            let interfaces = lock(&self.interfaces);
            problems.extend(interfaces.problems.iter().cloned());
            problems.extend(report::lost(&interfaces, Instant::now()));
            problems.extend(interfaces.unserved.iter().map(|name| {
                format!(
                    "interface {name} has no Ethernet header: clients there are not served; leave it out \
                     of --uplinks if they need not be"
                )
            }));
        }
        problems.extend(lock(&self.unchecked).values().cloned());
        problems.extend(lock(&self.unmonitored).values().cloned());
        if let Some(network) = &self.network {
            problems.extend(network.borrow().rejections.iter().map(report::in_words));
        }
        problems.extend(self.unforwarded());
        problems.extend(self.reconciler.world.left_out_of_nodes());
        problems.extend(ports::overlap());
        problems
    }

    /// What keeps clients outside from being handed over.
    fn obstacles(&self) -> network::Obstacles {
        let network = self.network.as_ref().map(|network| network.borrow());
        network::Obstacles::of(network.as_deref())
    }

    /// Services whose way to backends of other nodes can't be taken.
    fn unforwarded(&self) -> impl Iterator<Item = String> {
        let obstacles = self.obstacles();
        self.reconciler.world.forwarded().filter_map(move |service| {
            let mut ips = service.cluster_ips.iter();
            let obstacle = ips.find_map(|ip| obstacles.to(ip.is_ipv4()))?;
            Some(format!(
                "service {}: {} says {}, but {obstacle}: backends there see this node's address",
                service.name,
                api::FORWARDING,
                service.forwarding.label()
            ))
        })
    }

    /// Logs problems that are new, and those that are over.
    pub(super) fn tell_problems(&mut self) {
        self.pressure.update(&self.fills());
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
    pub(super) fn network_config(&self, network: &network::State) -> Config {
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
        let handover = [
            (true, NetworkFlags::HANDOVER4),
            (false, NetworkFlags::HANDOVER6),
        ]
        .into_iter()
        .filter(|(is_v4, _)| network.has_short_ranges(*is_v4))
        .fold(0, |flags, (_, flag)| flags | flag);
        let (mut overlay4, mut overlay6) = (V4::default(), V6::default());
        for address in &network.addresses {
            match address {
                IpAddr::V4(ip) => overlay4 = V4::from(*ip),
                IpAddr::V6(ip) => overlay6 = V6::from(*ip),
            }
        }
        let others = [
            (self.agreement.are_some(), NetworkFlags::HELD),
            (self.has_translators, NetworkFlags::CHAINED),
        ];
        let others = others.into_iter().filter(|(is_so, _)| *is_so);
        let others = others.fold(0, |flags, (_, flag)| flags | flag);
        Config {
            network: NetworkFlags::FORWARD | masquerade | handover | others,
            overlay_ifindex: network.overlay_ifindex,
            overlay_mtu: network.overlay_mtu,
            overlay_vni: network.vni,
            overlay_port: Be16::from_host(network.port),
            overlay4,
            overlay6,
            ..Config::default()
        }
    }

    /// Whether no pod may have opted out that is not known.
    fn knows_who_opted_out(&self) -> bool {
        let world = &self.reconciler.world;
        !world.is_doubtful() && !world.awaited().contains(&Kind::Pod)
    }

    pub(super) fn look_for_cgroups(&mut self) {
        if self.knows_who_opted_out() != lock(&self.shared.excluded).are_all {
            self.update_node();
        }
        match self.exclusions.look() {
            Ok(true) => self.update_node(),
            Ok(false) => {}
            Err(error) => tracing::warn!("excluding cgroups: {error}"),
        }
    }

    /// Tells the network who the nodes are, once that is known, and whether pods may come.
    pub(super) fn tell_network(&self, is_serving: bool) {
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

    pub(super) fn answer(&self, query: Query) {
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
                report.notes.clone_from(&self.notes);
                report.lifetimes = self.lifetimes;
                report.tables = self.fills();
                let _ = answer.send(report);
            }
            Query::Ports(answer) => {
                let _ = answer.send((self.reconciler.ports(), self.obstacles()));
            }
            Query::Vitals(answer) => {
                let _ = answer.send(self.vitals());
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

    /// Takes in which addresses this node has.
    pub(super) fn take_addresses(&mut self, seen: &mut tokio::sync::watch::Receiver<Vec<IpAddr>>) {
        let addresses = seen.borrow_and_update().clone();
        self.reconciler.world.set_node_addresses(addresses);
        self.update_node();
    }

    /// Says whether the host ports of an attachment that is wired but for them lead to it.
    pub(super) fn answer_of_host_ports(&self, request: WireRequest) {
        let answer = self.host_ports_lead_to(&request);
        // Who asked may have gone.
        let _ = request.answer.send(answer);
    }

    fn host_ports_lead_to(&self, request: &WireRequest) -> Answer {
        let world = &self.reconciler.world;
        let Some((pod, refusals)) = world.refusals(&pods::sandbox(&request.attachment)) else {
            return Answer::NotYet("its interface was removed meanwhile".to_owned());
        };
        if !refusals.is_empty() {
            let reasons: Vec<String> = refusals.iter().map(ToString::to_string).collect();
            let reasons = reasons.join("; ");
            let are_held = refusals
                .iter()
                .all(|refusal| matches!(refusal, Refusal::Held(_)));
            return if are_held && !request.is_check {
                Answer::NotYet(reasons)
            } else {
                Answer::Failed(reasons)
            };
        }
        if let Some(reason) = self.reconciler.unwritten(pod) {
            return Answer::NotYet(format!("its host ports: {reason}"));
        }
        if request.is_check {
            for port in world.ports(pod) {
                let protocol = plan::writes::proto(port.key.protocol);
                for frontend in &port.frontends {
                    let found =
                        inspect::frontend(&self.pins, frontend.address, frontend.port, protocol);
                    if let Err(finding) = found {
                        return finding.into();
                    }
                }
            }
        }
        Answer::Done
    }

    /// How the agent is, in short.
    fn vitals(&self) -> Vitals {
        let world = &self.reconciler.world;
        let (rejections, untold) = self.status.rejections();
        let told = rejections.len() + untold + world.conflicts().len();
        Vitals {
            is_synced: world.is_synced(),
            is_late: self.waiting.is_late(),
            is_settled: self.reconciler.is_settled(),
            // As in kube-proxy, one that nobody spoke of stays.
            is_node_eligible: world.node().is_none_or(|node| !node.is_leaving),
            sizes: world.sizes(),
            problems: told + self.reconciler.errors().len() + self.problems().len(),
            tables: self.fills(),
            syncs: self.syncs.clone(),
            lonely: world.without_local_endpoints().into(),
        }
    }

    /// Whether pods can be given a network.
    pub(super) fn readiness(&self) -> Answer {
        let Some(network) = &self.network else {
            return Answer::Failed(
                "this agent does not connect pods; start it with --network".to_owned(),
            );
        };
        let network = network.borrow();
        if let Some(obstacle) = &network.obstacle {
            return Answer::NotYet(obstacle.clone());
        }
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
