//! Ways to a ClusterIP beside each other: none at all, Penstock's two, kube-proxy's.
//!
//! Every contender has a node of its own with a client and a server, and the same services, whose
//! one endpoint is that server.

pub mod ipvs;
pub mod kube_proxy;
pub mod later;
pub mod nftables;
pub mod objects;
pub mod program;

use std::{
    fmt::{Display, Formatter},
    net::IpAddr,
    rc::Rc,
};

use anyhow::{Context, Result};
use clap::ValueEnum;
use penstock_testbed::{Agent, Host, Node, Pod, Process, ProxyMode, Source, Testbed, patiently};

use crate::{
    contender::{Contender, Counts, PORT, Witness, serve},
    family::Family,
    load::Workload,
    results::Keeper,
    turns::{self, Effort, Trial},
};
use kube_proxy::KubeProxy;
use objects::{Kind, SERVICE_PORT, Services};
use program::Program;

/// What is measured over TCP.
const TCP: [Trial; 8] = [
    Trial::together(Workload::Connect),
    Trial::closed(Workload::Connect),
    Trial::open(Workload::Connect, 1_000),
    Trial::together(Workload::Wrk),
    Trial::together(Workload::TcpRr),
    Trial::closed(Workload::TcpRr),
    Trial::closed(Workload::Stream),
    Trial::streams(8),
];
/// What is measured over UDP, and where only services lead that have a UDP port.
const UDP: [Trial; 6] = [
    Trial::together(Workload::UdpRr),
    Trial::together(Workload::UdpSendto),
    Trial::together(Workload::UdpPackets),
    Trial::closed(Workload::UdpRr),
    Trial::closed(Workload::UdpSendto),
    Trial::together(Workload::Iperf),
];

/// The names of all trials.
pub fn names() -> Vec<String> {
    TCP.iter().chain(&UDP).map(Trial::name).collect()
}

/// [`Way::Socket`]'s name.
pub const AT_SOCKET: &str = "Penstock, at the socket";
/// [`Way::Network`]'s.
pub const OWN_NETWORK: &str = "Penstock, at the socket, its own network";

/// The services that are asked, one a protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    tcp: IpAddr,
    udp: IpAddr,
}

impl Places {
    /// The one that has a UDP port, and a TCP port like all.
    pub const fn udp(&self) -> IpAddr {
        self.udp
    }
}

/// How a contender reaches services.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Way {
    /// Not at all: it asks the pod, on a node without any of the others.
    Direct,
    /// Not at all: it asks the pod, on a node of Penstock's.
    Pod,
    /// Penstock, where the socket connects.
    Socket,
    /// The same where the pods' network is Penstock's too, and not the kernel's routes.
    Network,
    /// Penstock, packet by packet.
    Packet,
    /// kube-proxy in iptables mode.
    Iptables,
    /// The rules of an older kube-proxy's iptables mode as later versions write them.
    #[value(name = "iptables-1.22")]
    Iptables122,
    /// kube-proxy in ipvs mode, where the kernel has IPVS.
    Ipvs,
    /// kube-proxy in nftables mode, where it has that; else the rules that it would write.
    Nftables,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Direct,
        Self::Pod,
        Self::Socket,
        Self::Network,
        Self::Packet,
        Self::Iptables,
        Self::Iptables122,
        Self::Ipvs,
        Self::Nftables,
    ];

    /// How many services it is measured with at most: rules beyond take minutes to write, and a connection
    /// through them milliseconds.
    const fn most(self) -> usize {
        match self {
            Self::Direct | Self::Pod | Self::Socket | Self::Network | Self::Packet => usize::MAX,
            Self::Iptables | Self::Iptables122 | Self::Ipvs | Self::Nftables => 10_000,
        }
    }

    /// Its name, in tables and everywhere, with this kube-proxy.
    pub fn name(self, kube_proxy: Option<&Program>) -> &'static str {
        match self {
            Self::Direct => "no service, the pod's address",
            Self::Pod => "Penstock, the pod's address",
            Self::Socket => AT_SOCKET,
            Self::Network => OWN_NETWORK,
            Self::Packet => "Penstock, packet by packet",
            Self::Iptables => "kube-proxy, iptables",
            Self::Iptables122 => "kube-proxy's rules, iptables of 1.22",
            Self::Ipvs => "kube-proxy, ipvs",
            Self::Nftables => nftables::name(kube_proxy),
        }
    }

    /// Which of kube-proxy's modes this is, if it is one.
    const fn mode(self) -> Option<ProxyMode> {
        match self {
            Self::Direct | Self::Pod | Self::Socket | Self::Network | Self::Packet => None,
            Self::Iptables | Self::Iptables122 => Some(ProxyMode::Iptables),
            Self::Ipvs => Some(ProxyMode::Ipvs),
            Self::Nftables => Some(ProxyMode::Nftables),
        }
    }
}

impl Display for Way {
    fn fmt(&self, formatter: &mut Formatter) -> std::fmt::Result {
        let value = self.to_possible_value();
        formatter.write_str(value.as_ref().map_or("", |value| value.get_name()))
    }
}

/// A contender's node.
pub struct Lane {
    way: Way,
    name: &'static str,
    node: Node,
    client: Host,
    /// The node's end of its link.
    client_interface: String,
    server: Pod,
    serving: Rc<Process>,
    agent: Option<Rc<Agent>>,
    kube_proxy: Option<KubeProxy>,
    /// Which services come first and last, where rules stay that nobody keeps.
    places: Option<[Places; 2]>,
}

impl Lane {
    /// A node without any service.
    pub fn new(testbed: &mut Testbed, way: Way) -> Result<Self> {
        let (node, agent, [client, server]) = match way {
            Way::Network => {
                let node = testbed.network_node()?;
                node.knows(&[&node])?;
                // Without tunnels, so that its pods have the others' MTU.
                let options = ["--log-level", "info", "--routing", "native"];
                let agent = Agent::start_network(&node, &Source::Manifests, &options)?;
                let pods = [testbed.network_pod(&node)?, testbed.network_pod(&node)?];
                (node, Some(Rc::new(agent)), pods)
            }
            _ => {
                let node = testbed.node()?;
                let pods = [testbed.pod(&node)?, testbed.pod(&node)?];
                (node, None, pods)
            }
        };
        let client_interface = client.interface;
        let client = match way {
            Way::Packet => client.host.without_socket_hooks(),
            _ => client.host,
        };
        // A client's timestamps begin elsewhere for each service (RFC 7323, 5.4 allows it). Two services
        // of one server would have some of its connections taken for old ones of the other's.
        client.run("sysctl", &["-qw", "net.ipv4.tcp_timestamps=2"])?;
        Ok(Self {
            way,
            name: way.name(None),
            serving: serve(&server.host)?,
            node,
            client,
            client_interface,
            server,
            agent,
            kube_proxy: None,
            places: None,
        })
    }

    /// Programs so many services.
    pub fn program(
        &mut self,
        testbed: &mut Testbed,
        kube_proxy: Option<&Program>,
        count: usize,
    ) -> Result<()> {
        self.name = self.way.name(kube_proxy);
        let services = Services {
            count,
            kind: Kind::ClusterIp,
            family: Family::V4,
            server: &self.server.host,
        };
        match self.way {
            Way::Direct => return Ok(()),
            Way::Network => return services.write(&self.node.manifests),
            Way::Pod | Way::Socket | Way::Packet => {
                services.write(&self.node.manifests)?;
                let agent = Agent::start(&self.node, &Source::Manifests, &["--log-level", "info"])?;
                agent.wait_for_pods(2)?;
                self.agent = Some(Rc::new(agent));
                return Ok(());
            }
            Way::Nftables if !nftables::is_own(kube_proxy) => {
                return nftables::load(&services, &self.node, testbed.folder());
            }
            Way::Iptables | Way::Iptables122 | Way::Ipvs | Way::Nftables => {}
        }
        let mode = self.way.mode().context("this is no mode of kube-proxy's")?;
        let program = kube_proxy.context("there is no kube-proxy")?;
        let mut proxy = KubeProxy::start(testbed, program, &self.node, &services, mode)?;
        if self.way == Way::Iptables122 {
            let rules = proxy.all_rules()?;
            // It would write its own anew.
            drop(proxy);
            return self.take_over(testbed, kube_proxy, &rules);
        }
        self.kube_proxy = Some(proxy);
        Ok(())
    }

    /// Loads what a kube-proxy has written for this node, as later versions would write it.
    fn take_over(
        &mut self,
        testbed: &Testbed,
        kube_proxy: Option<&Program>,
        rules: &str,
    ) -> Result<()> {
        self.name = self.way.name(kube_proxy);
        let rules = later::rewritten(rules)?;
        self.places = Some(kube_proxy::places(&rules)?);
        later::load(&rules, &self.node, testbed.folder())
    }

    /// What its kube-proxy has written, for the endpoint of another node; nothing, if it has none in iptables mode.
    fn rules_for(&mut self, server: IpAddr) -> Option<Result<String>> {
        let is_written = self.way == Way::Iptables;
        let proxy = self.kube_proxy.as_mut().filter(|_| is_written)?;
        let rules = proxy.all_rules();
        Some(rules.map(|rules| later::redirected(&rules, self.server.host.ip4, server)))
    }

    /// What tells that traffic to services took this way.
    fn witnesses(&self) -> Vec<Witness> {
        let node = self.node.host.clone();
        // On its own network Penstock puts packets into pods from the other side: they never leave by the node's ends.
        let (requests, replies) = match self.way {
            Way::Network => (Counts::Strays, Counts::Strays),
            _ => (Counts::Requests, Counts::Replies),
        };
        let arrives = Witness::interface(&node, &self.server.interface, requests);
        // A pod's node puts what is for the client into its interface.
        let returns = Witness::interface(&node, &self.client_interface, replies);
        let ours = |counters: &'static [&'static str], counts| {
            self.agent.as_ref().map(|agent| {
                let agent = agent.clone();
                Witness::new(&counters.join(" and "), counts, move || {
                    counters.iter().map(|counter| agent.count(counter)).sum()
                })
            })
        };
        const AT_SOCKETS: &[&str] = &["socket_connect", "socket_datagram"];
        const REQUESTS: &[&str] = &["packet_request"];
        const REPLIES: &[&str] = &["packet_reply"];
        let mut all = vec![arrives, returns];
        match self.way {
            Way::Direct => {}
            Way::Pod => {
                all.extend(ours(AT_SOCKETS, Counts::Never));
                all.extend(ours(REQUESTS, Counts::Never));
                all.extend(ours(REPLIES, Counts::Never));
            }
            Way::Socket | Way::Network => {
                if self.way == Way::Network {
                    all.extend(ours(&["delivered"], Counts::BothWays));
                }
                all.extend(ours(AT_SOCKETS, Counts::Connections));
                all.extend(ours(REQUESTS, Counts::Never));
                all.extend(ours(REPLIES, Counts::Never));
            }
            Way::Packet => {
                all.extend(ours(AT_SOCKETS, Counts::Never));
                all.extend(ours(REQUESTS, Counts::Requests));
                all.extend(ours(REPLIES, Counts::Replies));
            }
            Way::Iptables | Way::Iptables122 => {
                all.push(kube_proxy::witness(&node, Family::V4));
            }
            Way::Ipvs => all.extend(ipvs::witnesses(&node)),
            Way::Nftables if self.kube_proxy.is_some() => {
                all.push(nftables::watched(&node, Family::V4));
            }
            Way::Nftables => all.push(nftables::witness(&node, Family::V4)),
        }
        all
    }

    /// The client that asks a service.
    pub fn contender(&self, name: &str, service: IpAddr) -> Contender {
        let target = match self.way {
            Way::Direct | Way::Pod => (self.server.host.ip4, PORT),
            _ => (service, SERVICE_PORT),
        };
        Contender::new(
            name,
            &self.client,
            target.into(),
            &self.serving,
            self.witnesses(),
        )
    }
}

/// What measures so many services alone, by some ways.
pub fn command(count: usize, ways: &[Way]) -> String {
    let named = Effort::naming(ways, &Way::ALL);
    format!("services --services {count}{named}")
}

/// Measures some ways with each number of services.
pub fn measure(counts: &[usize], ways: &[Way], effort: &Effort, keeper: &mut Keeper) -> Result<()> {
    let kube_proxy = program::introduced();
    let mut wanted = ways.to_vec();
    wanted.retain(|way| effort.names(way.name(kube_proxy.as_ref())));
    let available = |way: &Way, keeper: &mut Keeper| {
        let missing = |mode| program::missing(mode, kube_proxy.as_ref());
        let is_such = *way == Way::Iptables122;
        let such = || later::missing(kube_proxy.as_ref()).filter(|_| is_such);
        let reason = way.mode().and_then(missing).or_else(such);
        keeper.has(way.name(kube_proxy.as_ref()), reason)
    };
    wanted.retain(|way| available(way, keeper));
    for count in counts {
        let mut admitted = wanted.clone();
        admitted.retain(|way| {
            let most = way.most();
            let reason = (*count > most).then(|| format!("it is measured with {most} at most"));
            let name = way.name(kube_proxy.as_ref());
            keeper.has(&format!("{name}, with {count} services"), reason)
        });
        let effort = effort.of(command(*count, ways));
        with(*count, &admitted, kube_proxy.as_ref(), &effort, keeper)?;
        keeper.write()?;
    }
    Ok(())
}

/// Which services come first and last in kube-proxy's rules, which have an order of their own; without
/// them any two services will do.
fn order(lanes: &mut [Lane], count: usize) -> Result<[Places; 2]> {
    let mut proxies = lanes
        .iter_mut()
        .filter(|lane| lane.way == Way::Iptables)
        .filter_map(|lane| lane.kube_proxy.as_mut());
    if let Some(proxy) = proxies.next() {
        return proxy.first_and_last();
    }
    let places = lanes.iter().find_map(|lane| lane.places);
    places.map_or_else(|| objects::ends(count), Ok)
}

/// Has older rules that are written as later versions would be those that kube-proxy wrote last: it orders them by
/// chance, and anew whenever it hears of a change, so that first and last would be others.
fn follow(
    lanes: &mut [Lane],
    order: &[Places; 2],
    testbed: &Testbed,
    kube_proxy: Option<&Program>,
) -> Result<()> {
    let later = |lane: &Lane| lane.way == Way::Iptables122;
    let Some(lane) = lanes.iter().find(|lane| later(lane)) else {
        return Ok(());
    };
    if lane.places == Some(*order) {
        return Ok(());
    }
    let server = lane.server.host.ip4;
    let Some(rules) = lanes.iter_mut().find_map(|lane| lane.rules_for(server)) else {
        return Ok(());
    };
    let rules = rules?;
    for lane in lanes.iter_mut().filter(|lane| later(lane)) {
        lane.take_over(testbed, kube_proxy, &rules)?;
        anyhow::ensure!(
            lane.places == Some(*order),
            "kube-proxy writes its rules in another order again and again"
        );
    }
    Ok(())
}

fn with(
    count: usize,
    ways: &[Way],
    kube_proxy: Option<&Program>,
    effort: &Effort,
    keeper: &mut Keeper,
) -> Result<()> {
    anyhow::ensure!(count > 0, "there has to be a service to be asked");
    let mut testbed = Testbed::new()?;
    let mut lanes = Vec::new();
    for way in ways {
        let mut lane = Lane::new(&mut testbed, *way)?;
        let server = lane.server.host.ip4;
        // What a kube-proxy here has written already need not be written once more.
        let written = lanes
            .iter_mut()
            .filter(|_| *way == Way::Iptables122)
            .find_map(|lane: &mut Lane| lane.rules_for(server));
        match written {
            Some(rules) => lane.take_over(&testbed, kube_proxy, &rules?)?,
            None => lane.program(&mut testbed, kube_proxy, count)?,
        }
        lanes.push(lane);
    }
    for (index, which) in ["first", "last"].into_iter().enumerate() {
        let order = order(&mut lanes, count)?;
        follow(&mut lanes, &order, &testbed, kube_proxy)?;
        let [first, last] = order;
        if effort.is_brief && index == 0 && first != last {
            continue;
        }
        let places = if index == 0 { first } else { last };
        let title = match (count, which) {
            (1, _) => "1 service".to_owned(),
            _ => format!("{count} services, the {which}"),
        };
        for (trials, ip) in [(&TCP[..], places.tcp), (&UDP[..], places.udp)] {
            let contenders: Vec<Contender> = lanes
                .iter()
                .map(|lane| lane.contender(lane.name, ip))
                .collect();
            for contender in &contenders {
                patiently("the service answers", || contender.answers())?;
            }
            turns::take(&title, &contenders, trials, effort, keeper)?;
        }
        anyhow::ensure!(
            self::order(&mut lanes, count)? == order,
            "kube-proxy has written its rules in another order meanwhile: {title} was not that"
        );
        if first == last {
            break;
        }
    }
    Ok(())
}
