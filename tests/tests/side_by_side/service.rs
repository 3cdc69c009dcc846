//! Services that are alike on either node: who serves them is said in roles, not names.

use penstock_testbed::Random;

/// Who may serve, seen from the node that is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// A pod of the same node.
    Here(usize),
    /// A pod of the other node.
    There(usize),
    /// The node itself, as a pod in its network would.
    HostHere,
    /// The other node.
    HostThere,
}

impl Role {
    pub const ALL: [Self; 6] = [
        Self::Here(0),
        Self::Here(1),
        Self::There(0),
        Self::There(1),
        Self::HostHere,
        Self::HostThere,
    ];

    /// Whether it is on the node that is asked.
    pub fn is_here(self) -> bool {
        matches!(self, Self::Here(_) | Self::HostHere)
    }
}

/// An endpoint's conditions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Ready,
    /// No conditions are given, which means ready.
    Unsaid,
    NotReady,
    /// Terminating, and serving still.
    Leaving,
    /// Terminating, and serving no more.
    Gone,
}

impl State {
    pub fn is_ready(self) -> bool {
        matches!(self, Self::Ready | Self::Unsaid)
    }
}

/// What kind of a service it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    ClusterIp,
    NodePort,
    LoadBalancer,
    ExternalName,
    /// Without an address of its own.
    Headless,
}

/// The families that a service has addresses of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Families {
    Both,
    V4,
    V6,
}

impl Families {
    pub fn has(self, is_v4: bool) -> bool {
        self == Self::Both || (self == Self::V4) == is_v4
    }
}

/// A port of a service.
#[derive(Clone, Debug)]
pub struct Port {
    pub number: u16,
    pub target: u16,
    pub is_tcp: bool,
}

/// Whom load balancers' addresses are open for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ranges {
    Everybody,
    /// The client outside alone.
    Client,
    Pods,
    /// The nodes' network, which the client is on too.
    Nodes,
    Nobody,
}

/// A service and its endpoints.
#[derive(Clone, Debug)]
pub struct Service {
    pub number: usize,
    pub kind: Kind,
    pub families: Families,
    pub ports: Vec<Port>,
    pub endpoints: Vec<(Role, State)>,
    pub external_local: bool,
    pub internal_local: bool,
    pub external_ips: bool,
    pub affinity: bool,
    /// For how long a client may be away that has it.
    pub timeout_secs: u32,
    pub ranges: Ranges,
    pub publish_not_ready: bool,
    /// Somebody else's, by its label.
    pub is_others: bool,
}

impl Service {
    fn new(kind: Kind, endpoints: &[(Role, State)]) -> Self {
        Self {
            number: 0,
            kind,
            families: Families::Both,
            ports: both(80, 8080),
            endpoints: endpoints.to_vec(),
            external_local: false,
            internal_local: false,
            external_ips: false,
            affinity: false,
            timeout_secs: 10_800,
            ranges: Ranges::Everybody,
            publish_not_ready: false,
            is_others: false,
        }
    }

    pub fn ready(kind: Kind, roles: &[Role]) -> Self {
        let endpoints: Vec<_> = roles.iter().map(|role| (*role, State::Ready)).collect();
        Self::new(kind, &endpoints)
    }

    /// Whether an API server lets it become another one: a first address stays.
    pub fn can_become(&self, other: &Self) -> bool {
        let of = |wanted: Kind| self.kind == wanted || other.kind == wanted;
        let first = |service: &Self| service.families.has(true);
        !of(Kind::Headless) && !of(Kind::ExternalName) && first(self) == first(other)
    }

    /// Whether nobody listens at its endpoints.
    pub fn is_deaf(&self) -> bool {
        self.ports.iter().all(|port| port.target == CLOSED)
    }

    /// Whether it has ports at the nodes' addresses.
    pub fn has_node_ports(&self) -> bool {
        matches!(self.kind, Kind::NodePort | Kind::LoadBalancer)
    }

    /// One line about it.
    pub fn text(&self) -> String {
        let mut text = format!("s{} {:?}", self.number, self.kind);
        let flags = [
            (self.external_local, "external Local"),
            (self.internal_local, "internal Local"),
            (self.external_ips, "externalIPs"),
            (self.affinity, "affinity"),
            (self.publish_not_ready, "publishNotReadyAddresses"),
            (self.is_others, "service-proxy-name"),
        ];
        for (_, flag) in flags.iter().filter(|(is_set, _)| *is_set) {
            text += &format!(", {flag}");
        }
        if self.families != Families::Both {
            text += &format!(", {:?} only", self.families);
        }
        if self.ranges != Ranges::Everybody {
            text += &format!(", for {:?}", self.ranges);
        }
        text + &format!(", endpoints {:?}", self.endpoints)
    }
}

/// Where nobody listens.
const CLOSED: u16 = 7_070;

/// A port of TCP and UDP.
fn both(number: u16, target: u16) -> Vec<Port> {
    [true, false]
        .map(|is_tcp| Port {
            number,
            target,
            is_tcp,
        })
        .into()
}

/// Services of which each shows something, from one of them on, then as many random ones.
pub fn services(random: &mut Random, count: usize, first: usize) -> Vec<Service> {
    let mut all = chosen();
    let length = all.len();
    all.rotate_left(first % length);
    all.extend((0..count).map(|_| any(random)));
    // One without affinity follows each that has it: it tells who may answer.
    let mut numbered: Vec<Service> = Vec::new();
    for service in all {
        let has_affinity = service.affinity;
        let shadow = Service {
            affinity: false,
            ..service.clone()
        };
        numbered.push(service);
        if has_affinity {
            numbered.push(shadow);
        }
    }
    for (number, service) in numbered.iter_mut().enumerate() {
        service.number = number;
    }
    numbered
}

fn chosen() -> Vec<Service> {
    use Kind::{ClusterIp, ExternalName, Headless, LoadBalancer, NodePort};
    use Role::{Here, HostHere, HostThere, There};
    use State::{Gone, Leaving, NotReady, Ready, Unsaid};
    let all = [Here(0), Here(1), There(0), There(1)];
    let balanced = Service {
        external_ips: true,
        ..Service::ready(LoadBalancer, &all)
    };
    let local = Service {
        external_local: true,
        ..balanced.clone()
    };
    let with = |service: &Service, endpoints: &[(Role, State)]| Service {
        endpoints: endpoints.to_vec(),
        ..service.clone()
    };
    vec![
        balanced.clone(),
        with(&balanced, &[]),
        with(&balanced, &[(Here(0), NotReady), (There(0), NotReady)]),
        with(&balanced, &[(HostHere, Ready), (HostThere, Ready)]),
        // Nobody listens at the endpoints' ports: who asks learns it from them.
        Service {
            ports: both(80, CLOSED),
            ..balanced.clone()
        },
        local.clone(),
        with(&local, &[(There(0), Ready), (There(1), Ready)]),
        with(&local, &[(Here(0), NotReady), (There(1), Ready)]),
        with(&local, &[]),
        Service {
            internal_local: true,
            ..balanced.clone()
        },
        Service {
            internal_local: true,
            ..Service::ready(ClusterIp, &[There(0)])
        },
        Service {
            ranges: Ranges::Client,
            ..balanced.clone()
        },
        Service {
            ranges: Ranges::Nobody,
            ..balanced.clone()
        },
        Service {
            ranges: Ranges::Client,
            ..with(&balanced, &[])
        },
        Service {
            ranges: Ranges::Pods,
            ..local.clone()
        },
        Service {
            affinity: true,
            ..balanced.clone()
        },
        Service {
            affinity: true,
            ..local.clone()
        },
        with(&balanced, &[(Here(0), Leaving), (There(0), Leaving)]),
        with(&balanced, &[(Here(0), Leaving), (There(0), Ready)]),
        with(&local, &[(Here(0), Leaving), (There(0), Ready)]),
        with(&balanced, &[(Here(0), Gone), (There(0), Gone)]),
        Service {
            publish_not_ready: true,
            ..Service::new(ClusterIp, &[(Here(0), Unsaid), (There(1), Unsaid)])
        },
        Service {
            is_others: true,
            external_ips: true,
            ..Service::ready(NodePort, &all)
        },
        Service {
            external_ips: true,
            ..Service::ready(Headless, &all)
        },
        Service::ready(ExternalName, &all),
        Service {
            ports: [both(80, 8080), both(443, 9090)].concat(),
            families: Families::V4,
            ..Service::ready(NodePort, &[Here(1), There(0)])
        },
        Service {
            families: Families::V6,
            ..balanced
        },
    ]
}

fn any(random: &mut Random) -> Service {
    let kind = random.pick(&[
        Kind::ClusterIp,
        Kind::NodePort,
        Kind::NodePort,
        Kind::LoadBalancer,
        Kind::LoadBalancer,
        Kind::LoadBalancer,
    ]);
    let mut endpoints = Vec::new();
    for role in Role::ALL {
        if random.chance(45) {
            let state = if random.chance(65) {
                State::Ready
            } else {
                random.pick(&[State::NotReady, State::Leaving, State::Gone, State::Unsaid])
            };
            endpoints.push((role, state));
        }
    }
    let mut ports = both(80, random.pick(&[8080, 9090]));
    match random.below(4) {
        0 => ports.truncate(1),
        1 => ports = ports.split_off(1),
        2 => ports.extend(both(443, 9090)),
        _ => {}
    }
    Service {
        families: random.pick(&[Families::Both, Families::Both, Families::V4, Families::V6]),
        ports,
        external_local: kind != Kind::ClusterIp && random.chance(40),
        internal_local: random.chance(20),
        external_ips: random.chance(40),
        affinity: random.chance(15),
        ranges: if kind == Kind::LoadBalancer && random.chance(40) {
            random.pick(&[Ranges::Client, Ranges::Pods, Ranges::Nodes, Ranges::Nobody])
        } else {
            Ranges::Everybody
        },
        ..Service::new(kind, &endpoints)
    }
}
