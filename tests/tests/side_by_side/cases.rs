//! What is asked: by whom, at which address of a service, and how.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use penstock_testbed::{Host, PROTOCOLS};

use crate::{
    objects::{Object, UNDEFINED},
    service::{Kind, Role, Service},
    side::Side,
};

/// An ICMP echo, which is for an address and no port of it.
pub const ECHO: &str = "icmp";

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Client {
    /// A pod that no service leads to.
    Pod,
    /// The same, whose packets are translated one by one.
    PodByPackets,
    /// A pod that may be a backend itself.
    Server,
    /// The same, whose packets are translated one by one.
    ServerByPackets,
    /// A process of the node.
    Host,
    /// A pod of a node that is not compared.
    Elsewhere,
    /// A host that is no node.
    Outside,
}

impl Client {
    pub const ALL: [Self; 7] = [
        Self::Pod,
        Self::PodByPackets,
        Self::Server,
        Self::ServerByPackets,
        Self::Host,
        Self::Elsewhere,
        Self::Outside,
    ];

    /// Where it runs.
    pub fn host(self, side: &Side) -> Host {
        match self {
            Self::Pod => side.guests[0].host.clone(),
            Self::PodByPackets => side.guests[1].host.without_socket_hooks(),
            Self::Server => side.here[0].host.clone(),
            Self::ServerByPackets => side.here[1].host.without_socket_hooks(),
            Self::Host => side.node.host.clone(),
            Self::Elsewhere => side.elsewhere.host.clone(),
            Self::Outside => side.outside.clone(),
        }
    }

    /// Whether it is a pod of the node that is asked.
    pub fn is_pod_here(self) -> bool {
        matches!(
            self,
            Self::Pod | Self::PodByPackets | Self::Server | Self::ServerByPackets
        )
    }

    /// Who it is, where it may be a backend.
    pub fn role(self) -> Option<Role> {
        match self {
            Self::Server => Some(Role::Here(0)),
            Self::ServerByPackets => Some(Role::Here(1)),
            _ => None,
        }
    }
}

/// Which of a service's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Address {
    Cluster,
    External,
    Balancer,
    /// The node port at the node's address.
    Node,
    /// The node port at the node's other address.
    SecondNode,
    /// The node port at the loopback address.
    Loopback,
}

impl Address {
    const ALL: [Self; 6] = [
        Self::Cluster,
        Self::External,
        Self::Balancer,
        Self::Node,
        Self::SecondNode,
        Self::Loopback,
    ];

    /// Whether it is a port of the node's.
    pub fn is_node_port(self) -> bool {
        matches!(self, Self::Node | Self::SecondNode | Self::Loopback)
    }

    fn is_of(self, service: &Service) -> bool {
        match self {
            Self::Cluster => !matches!(service.kind, Kind::ExternalName | Kind::Headless),
            Self::External => service.external_ips,
            Self::Balancer => service.kind == Kind::LoadBalancer,
            Self::Node | Self::SecondNode | Self::Loopback => service.has_node_ports(),
        }
    }

    fn is_for(self, client: Client) -> bool {
        match client {
            // Its own node would serve the other addresses.
            Client::Elsewhere => matches!(self, Self::Node | Self::SecondNode),
            // A pod's loopback address is its own.
            Client::Host => true,
            _ => self != Self::Loopback,
        }
    }
}

/// One question, as it is put on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Which service.
    pub service: usize,
    pub client: Client,
    pub address: Address,
    pub is_v4: bool,
    /// Which of its ports; `None` for one that it does not have.
    pub port: Option<usize>,
    pub protocol: &'static str,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.is_v4 { 4 } else { 6 };
        let client = format!("{:?}", self.client);
        let address = format!("{:?}", self.address);
        let port = match self.port {
            Some(index) => format!("port {index}"),
            None => "undefined".to_owned(),
        };
        write!(
            f,
            "{client:15} {address:10} v{family} {port:9} {:13}",
            self.protocol
        )
    }
}

impl Case {
    /// What is dialled on one side.
    pub fn to(&self, service: &Service, side: &Side) -> SocketAddr {
        let object = Object { service, side };
        let node = &side.node.host;
        let [second4, second6] = side.second;
        let of = |v4: IpAddr, v6: IpAddr| if self.is_v4 { v4 } else { v6 };
        let ip = match self.address {
            Address::Cluster => object.cluster_ip(self.is_v4),
            Address::External => object.external_ip(self.is_v4),
            Address::Balancer => object.balancer_ip(self.is_v4),
            Address::Node => of(node.ip4, node.ip6),
            Address::SecondNode => of(second4, second6),
            Address::Loopback => of(Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()),
        };
        let port = match self.port {
            Some(index) if self.address.is_node_port() => object.node_port(index),
            Some(index) => service.ports[index].number,
            None => UNDEFINED,
        };
        SocketAddr::new(ip, port)
    }
}

/// All questions about services.
pub fn cases(services: &[Service]) -> Vec<Case> {
    let mut all = Vec::new();
    for service in services {
        for client in Client::ALL {
            for address in Address::ALL {
                if !address.is_of(service) || !address.is_for(client) {
                    continue;
                }
                let families = [true, false].into_iter();
                for is_v4 in families.filter(|is_v4| service.families.has(*is_v4)) {
                    all.extend(of_address(service, client, address, is_v4));
                }
            }
        }
    }
    all
}

fn of_address(service: &Service, client: Client, address: Address, is_v4: bool) -> Vec<Case> {
    let mut all = Vec::new();
    let mut add = |port: Option<usize>, protocol| {
        all.push(Case {
            service: service.number,
            client,
            address,
            is_v4,
            port,
            protocol,
        });
    };
    for (index, port) in service.ports.iter().enumerate() {
        for protocol in PROTOCOLS {
            if port.is_tcp == (protocol == "tcp") {
                add(Some(index), protocol);
            }
        }
    }
    // Silence takes long: a few services are enough to learn of it.
    if service.number.is_multiple_of(5) {
        if !address.is_node_port() {
            add(None, "tcp");
            add(None, "udp-connected");
        }
        if address != Address::Loopback {
            add(None, ECHO);
        }
    }
    all
}
