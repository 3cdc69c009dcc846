//! Random histories, interrupted at any write, end where one clean start ends.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

use std::{collections::BTreeMap, net::IpAddr, num::NonZeroU16, sync::Arc, time::Duration};

use penstock_agent::{
    dataplane::{Dataplane, faulty::Faulty, memory::Memory},
    model::{
        node_ports::NodePorts,
        object::{
            Endpoint, EndpointPort, EndpointSlice, Event, Family, Kind, Node, Object, ObjectName,
            Protocol, Service, ServicePort, TrafficPolicy,
        },
        port::{HostPort, PodPorts},
        world::World,
    },
    reconcile::Reconciler,
};
use penstock_common::{Algorithm, Forwarding};
use proptest::prelude::*;

/// One thing that happens.
#[derive(Clone, Debug)]
enum Step {
    Service {
        name: u8,
        ip: u8,
        ports: u8,
        created: u8,
        local: bool,
        affinity: bool,
        algorithm: u8,
        outside: Outside,
    },
    Slice {
        name: u8,
        service: u8,
        v6: bool,
        endpoints: Vec<(u8, u8)>,
        /// Added to each endpoint's number in the slice, modulo 4.
        weights: u8,
        port: u8,
    },
    /// Pods with these host ports.
    HostPorts(Vec<(u8, u8)>),
    /// Node ports are served at other addresses.
    NodePorts(u8, bool),
    DeleteService(u8),
    DeleteSlice(u8),
    Zone(u8),
    /// This node has these services' addresses, one a bit.
    Addresses(u8),
    /// A list that holds everything again.
    Relist,
    /// The next writes fail.
    Fail {
        after: u8,
        times: u8,
    },
    /// The agent dies after so many more writes, and another one starts.
    Crash {
        after: u8,
    },
}

/// How a service is reached from outside.
#[derive(Clone, Debug, Default)]
struct Outside {
    local: bool,
    node_port: bool,
    external_ip: Option<u8>,
    balancer_ip: Option<u8>,
    ranges: u8,
}

fn outside() -> impl Strategy<Value = Outside> {
    let ip = || proptest::option::of(0..4u8);
    (any::<bool>(), any::<bool>(), ip(), ip(), 0..3u8).prop_map(
        |(local, node_port, external_ip, balancer_ip, ranges)| Outside {
            local,
            node_port,
            external_ip,
            balancer_ip,
            ranges,
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    let endpoints = proptest::collection::vec((0..12u8, 0..32u8), 0..6);
    prop_oneof![
        4 => (0..5u8, 0..6u8, 1..3u8, 0..3u8, any::<bool>(), any::<bool>(), 0..8u8, outside()).prop_map(
            |(name, ip, ports, created, local, affinity, algorithm, outside)| Step::Service {
                name, ip, ports, created, local, affinity, algorithm, outside
            }
        ),
        1 => proptest::collection::vec((0..3u8, 0..3u8), 0..3).prop_map(Step::HostPorts),
        1 => (0..3u8, any::<bool>()).prop_map(|(which, loopback)| Step::NodePorts(which, loopback)),
        6 => (0..8u8, 0..5u8, any::<bool>(), endpoints, 0..4u8, 0..3u8).prop_map(
            |(name, service, v6, endpoints, weights, port)| Step::Slice {
                name, service, v6, endpoints, weights, port
            }
        ),
        2 => (0..5u8).prop_map(Step::DeleteService),
        2 => (0..8u8).prop_map(Step::DeleteSlice),
        1 => (0..3u8).prop_map(Step::Zone),
        2 => (0..16u8).prop_map(Step::Addresses),
        1 => Just(Step::Relist),
        2 => (0..12u8, 1..3u8).prop_map(|(after, times)| Step::Fail { after, times }),
        2 => (0..12u8).prop_map(|after| Step::Crash { after }),
    ]
}

fn name(kind: &str, number: u8) -> ObjectName {
    ObjectName::new("default", format!("{kind}{number}"))
}

fn port_of(number: u8) -> (Arc<str>, Protocol, NonZeroU16) {
    let protocol = if number == 0 {
        Protocol::Tcp
    } else {
        Protocol::Udp
    };
    (
        format!("p{number}").into(),
        protocol,
        NonZeroU16::MIN.saturating_add(79 + u16::from(number)),
    )
}

fn policy(is_local: bool) -> TrafficPolicy {
    if is_local {
        TrafficPolicy::Local
    } else {
        TrafficPolicy::Cluster
    }
}

fn ips(host: Option<u8>, network: &str) -> Vec<IpAddr> {
    let ip = |host| format!("{network}{host}").parse().expect("an address");
    host.map(ip).into_iter().collect()
}

/// What no source says.
#[derive(Clone, Debug, Default)]
struct Local {
    host_ports: Vec<PodPorts>,
    node_ports: NodePorts,
}

impl Local {
    fn change(&mut self, step: &Step) {
        let ip = |text: &str| -> IpAddr { text.parse().expect("an address") };
        match step {
            Step::HostPorts(ports) => {
                let pods = ports.iter().enumerate().map(|(sandbox, (pod, port))| {
                    let port = HostPort {
                        ip: (port % 2 == 1).then(|| ip("172.18.0.2")),
                        port: NonZeroU16::MIN.saturating_add(30_079 + u16::from(*port)),
                        protocol: Protocol::Tcp,
                        pod_ips: vec![ip(&format!("10.244.9.{pod}")), ip("fd00:244:9::1")],
                        pod_port: NonZeroU16::MIN,
                    };
                    PodPorts {
                        pod: name("pod", *pod),
                        sandbox: format!("sandbox{sandbox}").into(),
                        ports: vec![port],
                    }
                });
                self.host_ports = pods.collect();
            }
            Step::NodePorts(which, loopback) => {
                self.node_ports = NodePorts {
                    which: ["primary", "10.0.0.0/8", "172.18.0.0/16"][usize::from(*which)]
                        .parse()
                        .expect("addresses"),
                    loopback: *loopback,
                };
            }
            _ => {}
        }
    }

    fn tell(&self, world: &mut World) {
        world.set_host_ports(self.host_ports.clone());
        world.set_node_ports(self.node_ports.clone());
    }
}

fn object(step: &Step) -> Option<Object> {
    Some(match step {
        Step::Service {
            name: number,
            ip,
            ports,
            created,
            local,
            affinity,
            algorithm,
            outside,
        } => Object::Service(Service {
            name: name("web", *number),
            created_secs: i64::from(*created),
            cluster_ips: vec![
                format!("10.96.0.{ip}").parse().expect("an address"),
                format!("fd00:96::{number}").parse().expect("an address"),
            ],
            ports: (0..*ports)
                .map(|port| {
                    let (name, protocol, port) = port_of(port);
                    ServicePort {
                        name,
                        protocol,
                        port,
                        node_port: outside
                            .node_port
                            .then(|| port.saturating_add(30_000 + u16::from(number % 2))),
                    }
                })
                .collect(),
            affinity_secs: affinity.then_some(60),
            // The default more often than others.
            algorithm: Algorithm::ALL
                .get(usize::from(*algorithm))
                .copied()
                .unwrap_or_default(),
            forwarding: Forwarding::ALL
                .get(usize::from(*algorithm) % 4)
                .copied()
                .unwrap_or_default(),
            internal_policy: policy(*local),
            external_policy: policy(outside.local),
            // 172.18.0.2 is the node's own.
            external_ips: ips(outside.external_ip, "172.18.0."),
            balancer_ips: ips(outside.balancer_ip, "192.0.2."),
            source_ranges: (0..outside.ranges)
                .map(|range| format!("10.{range}.0.0/16").parse().expect("a range"))
                .collect(),
            health_check_port: None,
            left_out: Vec::new(),
        }),
        Step::Slice {
            name: number,
            service,
            v6,
            endpoints,
            weights,
            port,
        } => {
            let address = |host: u8| -> IpAddr {
                let text = if *v6 {
                    format!("fd00:244::{host}")
                } else {
                    format!("10.244.0.{host}")
                };
                text.parse().expect("an address")
            };
            let number_of = |port: u8| port_of(port).2.saturating_add(8_000);
            Object::EndpointSlice(EndpointSlice {
                name: name("slice", *number),
                service: name("web", *service),
                family: if *v6 { Family::V6 } else { Family::V4 },
                ports: (0..*port)
                    .map(|port| {
                        let (name, protocol, _) = port_of(port);
                        EndpointPort {
                            name,
                            protocol,
                            port: number_of(port),
                        }
                    })
                    .collect(),
                endpoints: endpoints
                    .iter()
                    .zip(*weights..)
                    .map(|((host, bits), weight)| Endpoint {
                        address: address(*host),
                        ready: bits & 1 != 0,
                        serving: bits & 3 != 0,
                        terminating: bits & 4 != 0,
                        weight: u16::from(weight % 4),
                        node: Some(if bits & 8 != 0 { "here" } else { "there" }.into()),
                        for_zones: if bits & 16 != 0 {
                            Box::new(["z0".into()])
                        } else {
                            Box::new([])
                        },
                        for_nodes: Box::new([]),
                    })
                    .collect(),
                triggered: None,
            })
        }
        Step::Zone(zone) => Object::Node(Node {
            pod_cidrs: Vec::new(),
            is_leaving: false,
            name: "here".into(),
            zone: (*zone > 0).then(|| format!("z{}", zone - 1).into()),
            internal_ips: vec!["172.18.0.2".parse().expect("an address")],
            left_out: Vec::new(),
        }),
        _ => return None,
    })
}

/// The objects as they are after some steps.
#[derive(Clone, Default)]
struct Truth(BTreeMap<(Kind, ObjectName), Object>, Vec<IpAddr>);

/// The addresses that a step gives the node.
fn addresses(bits: u8) -> Vec<IpAddr> {
    let all = ["10.96.0.0", "10.96.0.1", "fd00:96::0", "192.0.2.1"];
    let given = all
        .iter()
        .enumerate()
        .filter(|(bit, _)| bits >> bit & 1 != 0);
    given
        .map(|(_, ip)| ip.parse().expect("an address"))
        .collect()
}

impl Truth {
    fn events(&self) -> Vec<Event> {
        Kind::ALL
            .into_iter()
            .map(|kind| {
                let objects = self.0.iter().filter(|((of, _), _)| *of == kind);
                Event::Listed(
                    kind,
                    objects.map(|(_, object)| object.clone()).collect(),
                    Vec::new(),
                )
            })
            .collect()
    }
}

fn start<D: Dataplane>(dataplane: D, truth: &Truth, local: &Local) -> Reconciler<D> {
    let mut reconciler =
        Reconciler::new(dataplane, World::new("here")).expect("memory can be read");
    // As thousands of services would be: in several portions.
    reconciler.portion = 2;
    reconciler.world.set_node_addresses(truth.1.clone());
    for event in truth.events() {
        reconciler
            .world
            .apply(event)
            .expect("nothing was known before");
    }
    local.tell(&mut reconciler.world);
    reconciler
}

/// Steps until nothing is left to do.
fn settle<D: Dataplane>(reconciler: &mut Reconciler<D>, now: &mut Duration) {
    for _ in 0..100 {
        reconciler.step(*now);
        match reconciler.next_due() {
            Some(due) => *now = due.max(*now + Duration::from_millis(1)),
            None => return,
        }
    }
    panic!("never settles: {:?}", reconciler.errors());
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_history_ends_as_one_clean_start(steps in proptest::collection::vec(step(), 1..40)) {
        let mut truth = Truth::default();
        let mut local = Local::default();
        let mut now = Duration::from_secs(1);
        let mut reconciler = start(Faulty::default(), &truth, &local);
        for step in &steps {
            now += Duration::from_millis(700);
            let event = match step {
                Step::DeleteService(number) => {
                    let name = name("web", *number);
                    truth.0.remove(&(Kind::Service, name.clone()));
                    Some(Event::Deleted(Kind::Service, name))
                }
                Step::DeleteSlice(number) => {
                    let name = name("slice", *number);
                    truth.0.remove(&(Kind::EndpointSlice, name.clone()));
                    Some(Event::Deleted(Kind::EndpointSlice, name))
                }
                Step::Addresses(bits) => {
                    truth.1 = addresses(*bits);
                    reconciler.world.set_node_addresses(truth.1.clone());
                    None
                }
                Step::Relist => {
                    for event in truth.events() {
                        // An empty list is refused, which is right, and tested elsewhere.
                        let _ = reconciler.world.apply(event);
                    }
                    None
                }
                Step::HostPorts(_) | Step::NodePorts(..) => {
                    local.change(step);
                    local.tell(&mut reconciler.world);
                    None
                }
                Step::Fail { after, times } => {
                    reconciler.dataplane.fails_after = Some(usize::from(*after));
                    reconciler.dataplane.failures = usize::from(*times);
                    None
                }
                Step::Crash { after } => {
                    let mut dataplane = std::mem::take(&mut reconciler.dataplane);
                    dataplane.fails_after = Some(usize::from(*after));
                    dataplane.failures = usize::MAX;
                    reconciler = start(dataplane, &truth, &local);
                    reconciler.step(now);
                    let mut dataplane = std::mem::take(&mut reconciler.dataplane);
                    dataplane.fails_after = None;
                    reconciler = start(dataplane, &truth, &local);
                    None
                }
                other => object(other).map(|object| {
                    truth.0.insert((object.kind(), object.name()), object.clone());
                    Event::Applied(object)
                }),
            };
            if let Some(event) = event {
                reconciler.world.apply(event).expect("a good event");
            }
            reconciler.step(now);
            prop_assert_eq!(&reconciler.dataplane.problems, &Vec::<String>::new());
        }
        reconciler.dataplane.fails_after = None;
        settle(&mut reconciler, &mut now);
        let state = reconciler.dataplane.inner.observed();
        let mut clean = start(Memory::default(), &truth, &local);
        settle(&mut clean, &mut now);
        let has_services = truth.0.keys().any(|(kind, _)| *kind == Kind::Service);
        if has_services {
            prop_assert_eq!(state.canonical(), clean.dataplane.observed().canonical());
            prop_assert_eq!(state.leaks(), Vec::<String>::new());
            prop_assert_eq!(reconciler.used(), clean.used());
        }
        prop_assert_eq!(state.problems(), Vec::<String>::new());
        // Nothing is left to do, and nothing is done.
        let before = reconciler.dataplane.inner.writes;
        reconciler.step(now);
        prop_assert_eq!(reconciler.dataplane.inner.writes, before);
    }
}

#[test]
fn an_empty_list_removes_nothing() {
    let truth = services(1..2);
    let mut reconciler = start(Memory::default(), &truth, &Local::default());
    reconciler.step(Duration::from_secs(1));
    let before = reconciler.dataplane.observed().canonical();
    assert!(
        before.contains("frontend 10.96.0.1 80 TCP reject"),
        "{before}"
    );
    reconciler
        .world
        .apply(Event::Listed(Kind::Service, Vec::new(), Vec::new()))
        .expect_err("suspicious");
    reconciler.step(Duration::from_secs(2));
    assert_eq!(reconciler.dataplane.observed().canonical(), before);
    // Neither does an agent that starts and finds nothing.
    let memory = std::mem::take(&mut reconciler.dataplane);
    let mut reconciler = start(memory, &Truth::default(), &Local::default());
    reconciler.step(Duration::from_secs(3));
    assert_eq!(reconciler.dataplane.observed().canonical(), before);
}

#[test]
fn nothing_is_settled_before_what_was_listed_is_written() {
    let world = World::new("here");
    let new = Reconciler::new(Memory::default(), world).expect("memory can be read");
    assert!(!new.is_settled(), "nothing is listed");
    let mut reconciler = start(Memory::default(), &services(0..2), &Local::default());
    assert!(!reconciler.is_settled(), "nothing is written");
    reconciler.step(Duration::from_secs(1));
    assert!(reconciler.is_settled());
}

#[test]
fn a_full_map_keeps_nobody_else_waiting() {
    let truth = services(0..4);
    let mut memory = Memory::default();
    memory.frontends = 2;
    let mut reconciler = start(memory, &truth, &Local::default());
    reconciler.step(Duration::from_secs(1));
    assert_eq!(reconciler.dataplane.state.v4.frontends.len(), 2);
    let errors = reconciler.errors();
    assert_eq!(errors.len(), 2);
    for reason in errors.values() {
        let full = "the kernel's table of 262144 IPv4 frontends is full";
        assert!(reason.starts_with(full), "{reason}");
    }
    reconciler.dataplane.frontends = 10;
    let mut now = Duration::from_secs(1);
    settle(&mut reconciler, &mut now);
    assert_eq!(reconciler.dataplane.state.v4.frontends.len(), 4);
    assert!(reconciler.is_settled());
}

#[test]
fn what_the_kernel_refuses_waits_and_what_does_not_fit_does_not() {
    let at = Duration::from_secs;
    let mut memory = Memory::default();
    memory.frontends = 2;
    let mut full = start(memory, &services(0..4), &Local::default());
    full.step(at(1));
    assert_eq!(full.errors().len(), 2);
    assert_eq!(full.refused_since(), None);

    let mut reconciler = start(Faulty::default(), &services(0..4), &Local::default());
    reconciler.dataplane.fails_after = Some(0);
    reconciler.dataplane.failures = usize::MAX;
    // Before everything was listed nothing can be written.
    assert_eq!(reconciler.refused_since(), None);
    for now in [1, 2, 40, 80] {
        reconciler.step(at(now));
        assert_eq!(reconciler.refused_since(), Some(at(1)));
    }
    // Others that are refused later do not make the first ones any younger.
    for object in services(4..5).0.into_values() {
        let event = Event::Applied(object);
        reconciler.world.apply(event).expect("a service");
    }
    reconciler.step(at(81));
    assert_eq!(reconciler.refused_since(), Some(at(1)));
    reconciler.dataplane.fails_after = None;
    let mut now = at(120);
    settle(&mut reconciler, &mut now);
    assert!(reconciler.is_settled());
    assert_eq!(reconciler.refused_since(), None);
}

#[test]
fn writes_that_are_no_services_are_refused_since_the_first_time() {
    let at = Duration::from_secs;
    let mut reconciler = start(Faulty::default(), &services(0..2), &Local::default());
    let mut now = at(1);
    settle(&mut reconciler, &mut now);
    reconciler.dataplane.fails_after = Some(0);
    reconciler.dataplane.failures = usize::MAX;
    let own: IpAddr = "172.18.0.2".parse().expect("an address");
    reconciler.world.set_node_addresses(vec![own]);
    let first = now + at(1);
    for wait in [1, 2, 100] {
        reconciler.step(now + at(wait));
        assert_eq!(reconciler.refused_since(), Some(first));
    }
    reconciler.dataplane.fails_after = None;
    now += at(200);
    settle(&mut reconciler, &mut now);
    assert_eq!(reconciler.refused_since(), None);
}

/// Services with one port each, at 10.96.0.`number`.
fn services(numbers: std::ops::Range<u8>) -> Truth {
    let mut truth = Truth::default();
    for number in numbers {
        let service = Step::Service {
            name: number,
            ip: number,
            ports: 1,
            created: 0,
            local: false,
            affinity: false,
            algorithm: u8::MAX,
            outside: Outside::default(),
        };
        let object = object(&service).expect("a service");
        truth.0.insert((object.kind(), object.name()), object);
    }
    truth
}

#[test]
fn a_frontend_that_changes_hands_is_never_away() {
    // However many writes were made by then, of one portion a service.
    for after in 0..8 {
        let mut reconciler = start(Faulty::default(), &services(0..2), &Local::default());
        reconciler.portion = 1;
        let outcome = reconciler.step(Duration::from_secs(1));
        assert!(!outcome.has_moved, "nobody had them before");
        let gone = Event::Deleted(Kind::Service, name("web", 0));
        reconciler.world.apply(gone).expect("it is known");
        let heir = Step::Service {
            name: 9,
            ip: 0,
            ports: 1,
            created: 1,
            local: false,
            affinity: false,
            algorithm: u8::MAX,
            outside: Outside::default(),
        };
        let heir = Event::Applied(object(&heir).expect("a service"));
        reconciler.world.apply(heir).expect("a service");
        reconciler.dataplane.fails_after = Some(after);
        reconciler.dataplane.failures = usize::MAX;
        let outcome = reconciler.step(Duration::from_secs(2));
        assert!(outcome.has_moved, "flows go to the heir");
        let held = reconciler.dataplane.inner.observed().canonical();
        assert!(
            held.contains("frontend 10.96.0.0 "),
            "after {after}: {held}"
        );
    }
}

#[test]
fn nobody_is_swept_before_everybody_was_asked() {
    let truth = services(0..4);
    let mut earlier = start(Faulty::default(), &truth, &Local::default());
    earlier.step(Duration::from_secs(1));
    let served = earlier.dataplane.inner.observed().canonical();
    // Another agent meets a write that fails and is no service's, in the first of several portions.
    let mut dataplane = earlier.dataplane;
    dataplane.fails_after = Some(0);
    dataplane.failures = 1;
    let mut reconciler = start(dataplane, &truth, &Local::default());
    reconciler.portion = 1;
    let own: IpAddr = "172.18.0.2".parse().expect("an address");
    reconciler.world.set_node_addresses(vec![own]);
    let mut now = Duration::from_secs(2);
    reconciler.step(now);
    assert!(!reconciler.is_settled());
    assert!(!reconciler.errors().is_empty());
    // Something else happens before it is tried again.
    let slice = Step::Slice {
        name: 1,
        service: 1,
        v6: false,
        endpoints: vec![(1, 9)],
        weights: 0,
        port: 1,
    };
    let slice = Event::Applied(object(&slice).expect("a slice"));
    reconciler.world.apply(slice).expect("a slice");
    now += Duration::from_millis(10);
    let before = reconciler.dataplane.inner.observed().canonical();
    reconciler.step(now);
    let after = reconciler.dataplane.inner.observed().canonical();
    assert_eq!(frontends(&after), frontends(&before));
    settle(&mut reconciler, &mut now);
    assert_eq!(reconciler.errors(), BTreeMap::new());
    assert!(reconciler.is_settled());
    let after = reconciler.dataplane.inner.observed().canonical();
    assert_eq!(frontends(&after), frontends(&served));
}

/// The addresses and ports that are served.
fn frontends(canonical: &str) -> Vec<&str> {
    let lines = canonical
        .lines()
        .filter(|line| line.starts_with("frontend"));
    lines.filter_map(|line| line.split(" TCP").next()).collect()
}

#[test]
fn a_load_balancer_is_not_told_of_endpoints_without_weight() {
    let truth = services(0..1);
    let Some(Object::Service(service)) = truth.0.into_values().next() else {
        panic!("there is a service");
    };
    let slice = Step::Slice {
        name: 0,
        service: 0,
        v6: false,
        // Two that are ready, and here.
        endpoints: vec![(1, 9), (2, 9)],
        weights: 0,
        port: 1,
    };
    let mut world = World::new("here");
    let slice = object(&slice).expect("a slice");
    world.apply(Event::Applied(slice)).expect("a slice");
    for (algorithm, expected) in [(Algorithm::Random, 2), (Algorithm::Weighted, 1)] {
        let checked = Service {
            algorithm,
            external_policy: TrafficPolicy::Local,
            health_check_port: NonZeroU16::new(32_000),
            ..service.clone()
        };
        let event = Event::Applied(Object::Service(checked));
        world.apply(event).expect("a service");
        let counts: Vec<usize> = world
            .health_checks()
            .into_values()
            .map(|(_, n)| n)
            .collect();
        assert_eq!(counts, [expected], "{algorithm:?}");
    }
}

/// Slice 0 of service 0, with the endpoints of those hosts on this node or another one.
fn slice(hosts: &[u8], is_here: bool, triggered: Option<Duration>) -> Event {
    let bits = if is_here { 9 } else { 1 };
    let slice = Step::Slice {
        name: 0,
        service: 0,
        v6: false,
        endpoints: hosts.iter().map(|host| (*host, bits)).collect(),
        weights: 1,
        port: 1,
    };
    let Some(Object::EndpointSlice(slice)) = object(&slice) else {
        panic!("a slice");
    };
    Event::Applied(Object::EndpointSlice(EndpointSlice { triggered, ..slice }))
}

#[test]
fn what_made_endpoints_change_is_told_once_and_only_if_they_did() {
    let truth = services(0..1);
    let mut reconciler = start(Memory::default(), &truth, &Local::default());
    let mut told = |event| {
        let world = &mut reconciler.world;
        world.apply(event).expect("a good event");
        let times: Vec<Duration> = world
            .take_triggers()
            .into_iter()
            .map(|trigger| {
                assert_eq!(
                    (trigger.service, trigger.family),
                    (name("web", 0), Family::V4)
                );
                trigger.since_1970
            })
            .collect();
        times
    };
    let at = Duration::from_secs;
    assert_eq!(told(slice(&[1], true, Some(at(5)))), [at(5)]);
    // The same endpoints, whatever is said of them.
    assert!(told(slice(&[1], true, Some(at(6)))).is_empty());
    assert_eq!(told(slice(&[1, 2], true, Some(at(7)))), [at(7)]);
    assert!(told(slice(&[1], true, None)).is_empty());
    let gone = Event::Deleted(Kind::EndpointSlice, name("slice", 0));
    assert!(told(gone).is_empty());
    // What nobody serves takes no time to be served.
    told(Event::Deleted(Kind::Service, name("web", 0)));
    assert!(told(slice(&[1], true, Some(at(8)))).is_empty());
}

#[test]
fn policies_that_nobody_here_can_serve_are_counted() {
    let truth = services(0..1);
    let Some(Object::Service(service)) = truth.0.into_values().next() else {
        panic!("there is a service");
    };
    let mut world = World::new("here");
    let ports = service.ports.len();
    let mut counts = |internal_policy, external_policy, event: Event| {
        let service = Service {
            internal_policy,
            external_policy,
            ..service.clone()
        };
        world.apply(event).expect("a slice");
        let event = Event::Applied(Object::Service(service));
        world.apply(event).expect("a service");
        let [(Family::V4, v4), (Family::V6, _)] = world.without_local_endpoints() else {
            panic!("both families");
        };
        v4
    };
    let (cluster, local) = (TrafficPolicy::Cluster, TrafficPolicy::Local);
    assert_eq!(ports, 1);
    assert_eq!(counts(local, local, slice(&[1], false, None)), [1, 1]);
    assert_eq!(counts(cluster, local, slice(&[1], false, None)), [0, 1]);
    assert_eq!(counts(cluster, cluster, slice(&[1], false, None)), [0, 0]);
    assert_eq!(counts(local, cluster, slice(&[1], true, None)), [0, 0]);
    // Without any endpoint it is not the policy that keeps clients away.
    assert_eq!(counts(local, cluster, slice(&[], true, None)), [0, 0]);
}

#[test]
fn an_address_that_an_earlier_agent_did_not_write_is_written() {
    let truth = services(0..3);
    let mut reconciler = start(Memory::default(), &truth, &Local::default());
    reconciler.step(Duration::from_secs(1));
    let whole = reconciler.dataplane.observed();
    for lost in whole.v4.addresses.keys() {
        let mut memory = reconciler.dataplane.clone();
        memory.state.v4.addresses.remove(lost);
        memory.state.v6.addresses.clear();
        let mut next = start(memory, &truth, &Local::default());
        next.step(Duration::from_secs(2));
        assert_eq!(next.dataplane.observed(), whole, "without {lost:?}");
    }
}

#[test]
fn what_could_not_be_read_keeps_what_an_earlier_agent_left() {
    let mut reconciler = start(Memory::default(), &services(0..3), &Local::default());
    reconciler.step(Duration::from_secs(1));
    let before = reconciler.dataplane.observed();
    // The next agent can read but one of them, and knows that there may be more.
    let memory = std::mem::take(&mut reconciler.dataplane);
    let mut next = start(memory, &services(0..1), &Local::default());
    let doubt = |is_doubtful| Event::Doubt(is_doubtful);
    next.world.apply(doubt(true)).expect("a good event");
    next.step(Duration::from_secs(2));
    assert_eq!(next.dataplane.observed(), before);
    assert!(next.unswept().is_some());
    // Once all can be read, what is not among it goes.
    next.world.apply(doubt(false)).expect("a good event");
    next.step(Duration::from_secs(3));
    assert_eq!(next.dataplane.observed().v4.frontends.len(), 1);
    assert_eq!(next.unswept(), None);
}

#[test]
fn a_service_is_served_while_its_address_is_not_the_nodes_own() {
    let truth = services(1..3);
    let mut reconciler = start(Memory::default(), &truth, &Local::default());
    reconciler.step(Duration::from_secs(1));
    let served = reconciler.dataplane.observed();
    assert_eq!(reconciler.world.conflicts(), Vec::new());
    let own: IpAddr = "10.96.0.1".parse().expect("an address");
    reconciler.world.set_node_addresses(vec![own]);
    reconciler.step(Duration::from_secs(2));
    let refused = reconciler.dataplane.observed().canonical();
    assert!(!refused.contains("frontend 10.96.0.1 "), "{refused}");
    assert!(refused.contains("address 10.96.0.1 node"), "{refused}");
    assert!(refused.contains("frontend 10.96.0.2 80 TCP"), "{refused}");
    assert_eq!(reconciler.world.conflicts().len(), 1);
    reconciler.world.set_node_addresses(Vec::new());
    reconciler.step(Duration::from_secs(4));
    let canonical = reconciler.dataplane.observed().canonical();
    assert_eq!(canonical, served.canonical());
    assert_eq!(reconciler.world.conflicts(), Vec::new());
}

#[test]
fn an_address_that_was_the_nodes_for_a_moment_is_the_services_again() {
    let truth = services(1..3);
    let own: IpAddr = "10.96.0.1".parse().expect("an address");
    // Wherever writing stopped while it was the node's.
    for after in 0..8 {
        let mut now = Duration::from_secs(1);
        let mut reconciler = start(Faulty::default(), &truth, &Local::default());
        settle(&mut reconciler, &mut now);
        let served = reconciler.dataplane.inner.observed().canonical();
        reconciler.dataplane.fails_after = Some(after);
        reconciler.dataplane.failures = 1;
        reconciler.world.set_node_addresses(vec![own]);
        now += Duration::from_millis(700);
        reconciler.step(now);
        reconciler.world.set_node_addresses(Vec::new());
        reconciler.dataplane.fails_after = None;
        settle(&mut reconciler, &mut now);
        let canonical = reconciler.dataplane.inner.observed().canonical();
        assert_eq!(canonical, served, "after {after} writes");
    }
}
