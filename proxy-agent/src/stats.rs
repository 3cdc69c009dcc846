//! What backends and services did: what programs and agent counted, added up.
//!
//! Invariant: each number in the kernel has one author. The agent alone removes a backend's counts,
//! once the backend is gone and no flow refers to it, and adds them to its service's before.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
};

use aya::maps::{Array, HashMap as BpfMap, Map, MapData};
use penstock_common::{
    Addr, Backend, BackendCounts, BackendFlags, BackendId, BackendLife, ConnectedUdp, Connections,
    Flow, FlowCounts, Plain, ServiceId, SockEndpoint, TcpPeer, V4, V6,
};
use serde::{Deserialize, Serialize};

use crate::{
    dataplane::{batch, pins::Pins},
    flows::{self, FlowsError, Table},
};

/// A backend's id and its generation.
pub type Life = (BackendId, u32);

/// What flows that have ended brought their backends, and of which service these are.
pub(crate) type Ended = HashMap<Life, (ServiceId, FlowCounts)>;

/// What went to a backend, or to all backends of a service port in one family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Connections that it was given, at sockets and packet by packet.
    pub connections: u64,
    /// Flows that are translated packet by packet and not about to end.
    pub flows: u64,
    /// TCP sockets that are connected to it, as far as they have a place in `TCP_PEERS`.
    pub tcp_sockets: u64,
    /// Connected UDP sockets.
    pub udp_sockets: u64,
    /// Packets that it got, of those that are translated one by one.
    pub request_packets: u64,
    /// Their bytes, IP headers included.
    pub request_bytes: u64,
    /// Packets that it answered with.
    pub reply_packets: u64,
    /// Their bytes.
    pub reply_bytes: u64,
}

impl Stats {
    fn add_counts(&mut self, counts: &BackendCounts) {
        self.connections += counts.connections;
        self.add_flows(&FlowCounts::new(counts.request, counts.reply));
    }

    fn add_flows(&mut self, counts: &FlowCounts) {
        self.request_packets += counts.request.packets;
        self.request_bytes += counts.request.bytes;
        self.reply_packets += counts.reply.packets;
        self.reply_bytes += counts.reply.bytes;
    }
}

/// What the kernel's maps say at one moment.
#[derive(Clone, Debug, Default)]
pub struct Statistics {
    v4: HashMap<Life, Stats>,
    v6: HashMap<Life, Stats>,
    services: HashMap<ServiceId, Stats>,
    /// Connected TCP sockets by frontend and backend.
    tcp: HashMap<SocketAddr, HashMap<SocketAddr, u64>>,
}

/// Elements that are read at once.
const CHUNK: usize = 4_096;
/// The same of a table that has hundreds of thousands.
const MANY: usize = 65_536;

const COUNTS: [&str; 2] = ["BACKEND_COUNTS4", "BACKEND_COUNTS6"];

fn unread(map: &'static str) -> impl Fn(std::io::Error) -> FlowsError {
    move |source| FlowsError::Read { map, source }
}

/// All counts of a family's backends.
fn all_counts(
    pins: &Pins,
    map: &'static str,
) -> Result<Vec<(BackendLife, BackendCounts)>, FlowsError> {
    let data = pins.map(map)?;
    batch::lookup_all(data.fd().as_fd(), CHUNK).map_err(unread(map))
}

impl Statistics {
    /// Reads them.
    pub fn read(pins: &Pins) -> Result<Self, FlowsError> {
        let mut all = Self::default();
        let [v4, v6] = COUNTS;
        let flows4 = Table::<V4>::open(pins, ["FLOWS4", "FLOW_COUNTS4"])?;
        let flows6 = Table::<V6>::open(pins, ["FLOWS6", "FLOW_COUNTS6"])?;
        let services = &mut all.services;
        // Flows first: one that ends meanwhile is then counted twice rather than not at all.
        all.v4 = family(&flows4, &all_counts(pins, v4)?, services);
        all.v6 = family(&flows6, &all_counts(pins, v6)?, services);
        read_connections(pins, "CONNECTIONS4", &mut all.v4, services)?;
        read_connections(pins, "CONNECTIONS6", &mut all.v6, services)?;
        all.read_services(pins)?;
        all.read_sockets(pins)?;
        all.read_tcp_sockets(pins)?;
        Ok(all)
    }

    /// Adds what backends did that are gone.
    fn read_services(&mut self, pins: &Pins) -> Result<(), FlowsError> {
        let map = "SERVICE_COUNTS";
        let data = pins.map(map)?;
        let gone: Vec<(ServiceId, BackendCounts)> =
            batch::lookup_all(data.fd().as_fd(), CHUNK).map_err(unread(map))?;
        for (service, counts) in gone {
            self.services
                .entry(service)
                .or_default()
                .add_counts(&counts);
        }
        Ok(())
    }

    /// Adds connected UDP sockets.
    fn read_sockets(&mut self, pins: &Pins) -> Result<(), FlowsError> {
        let map = "CONNECTED_UDP";
        let data = pins.map(map)?;
        let sockets: Vec<(u64, ConnectedUdp)> =
            batch::lookup_all(data.fd().as_fd(), CHUNK).map_err(unread(map))?;
        for (_, socket) in sockets {
            if socket.backend == ConnectedUdp::NO_BACKEND {
                continue;
            }
            let is_v4 = socket.frontend.addr.to_mapped_v4().is_some();
            let backends = if is_v4 { &mut self.v4 } else { &mut self.v6 };
            let life = (socket.backend, socket.generation);
            backends.entry(life).or_default().udp_sockets += 1;
            self.services.entry(socket.service).or_default().udp_sockets += 1;
        }
        Ok(())
    }

    /// Adds connected TCP sockets.
    fn read_tcp_sockets(&mut self, pins: &Pins) -> Result<(), FlowsError> {
        let map = "TCP_PEERS";
        let data = pins.map(map)?;
        let places: Vec<(u32, TcpPeer)> =
            batch::lookup_all(data.fd().as_fd(), CHUNK).map_err(unread(map))?;
        for (_, place) in places.iter().filter(|(_, place)| place.cookie != 0) {
            let backends = self.tcp.entry(address(&place.peer.frontend)).or_default();
            *backends.entry(address(&place.peer.backend)).or_default() += 1;
        }
        Ok(())
    }

    /// TCP sockets that are connected to a backend through one of its frontends; to any where none
    /// is named.
    pub fn tcp_sockets(&self, frontends: &[SocketAddr], backend: Option<SocketAddr>) -> u64 {
        let backends = frontends.iter().filter_map(|at| self.tcp.get(at));
        let counts = backends.map(|backends| match backend {
            Some(backend) => backends.get(&backend).copied().unwrap_or_default(),
            None => backends.values().sum(),
        });
        counts.sum()
    }

    /// A backend's.
    pub fn backend(&self, is_v4: bool, life: Life) -> Stats {
        let backends = if is_v4 { &self.v4 } else { &self.v6 };
        backends.get(&life).copied().unwrap_or_default()
    }

    /// A service port's in one family: of all backends that it has and had.
    pub fn service(&self, id: ServiceId) -> Stats {
        self.services.get(&id).copied().unwrap_or_default()
    }
}

/// Adds what backends were given in the last lives of their ids.
fn read_connections(
    pins: &Pins,
    map: &'static str,
    backends: &mut HashMap<Life, Stats>,
    services: &mut HashMap<ServiceId, Stats>,
) -> Result<(), FlowsError> {
    let data = pins.map(map)?;
    let all: Vec<(u32, Connections)> =
        batch::lookup_all(data.fd().as_fd(), MANY).map_err(unread(map))?;
    for (id, given) in all.iter().filter(|(_, given)| given.count > 0) {
        let life = (BackendId(*id), given.generation);
        backends.entry(life).or_default().connections += given.count;
        services.entry(given.service).or_default().connections += given.count;
    }
    Ok(())
}

/// An address as sockets name it.
pub(crate) fn address(endpoint: &SockEndpoint) -> SocketAddr {
    let ip = match endpoint.addr.to_mapped_v4() {
        Some(ip) => IpAddr::V4(ip.into()),
        None => IpAddr::V6(endpoint.addr.into()),
    };
    SocketAddr::new(ip, endpoint.port.to_host())
}

fn family<A: Addr>(
    table: &Table<A>,
    counts: &[(BackendLife, BackendCounts)],
    services: &mut HashMap<ServiceId, Stats>,
) -> HashMap<Life, Stats>
where
    Flow<A>: Plain,
{
    let mut backends: HashMap<Life, Stats> = HashMap::new();
    for (life, running) in flows::running(table) {
        for stats in [
            backends.entry(life).or_default(),
            services.entry(running.service).or_default(),
        ] {
            stats.flows += running.flows;
            stats.add_flows(&running.counts);
        }
    }
    for (life, counts) in counts {
        let key = (life.backend, life.generation);
        backends.entry(key).or_default().add_counts(counts);
        services
            .entry(counts.service)
            .or_default()
            .add_counts(counts);
    }
    backends
}

/// A family's backends and their counts.
struct Kept<A>
where
    Backend<A>: aya::Pod,
{
    backends: Array<MapData, Backend<A>>,
    counts: BpfMap<MapData, BackendLife, BackendCounts>,
    /// The same map, for reading all of it at once.
    all_counts: MapData,
    /// Backends that nobody was found to want at the last look.
    doomed: HashSet<Life>,
}

impl<A: Addr> Kept<A>
where
    Backend<A>: aya::Pod,
{
    fn open(pins: &Pins, backends: &'static str, counts: &'static str) -> Result<Self, FlowsError> {
        let bad = |map| move |source| FlowsError::Map { map, source };
        Ok(Self {
            backends: Array::try_from(Map::Array(pins.map(backends)?)).map_err(bad(backends))?,
            counts: BpfMap::try_from(Map::HashMap(pins.map(counts)?)).map_err(bad(counts))?,
            all_counts: pins.map(counts)?,
            doomed: HashSet::new(),
        })
    }

    /// Adds what flows brought their backends that this agent ended.
    fn add(&mut self, ended: &Ended) {
        for ((backend, generation), (service, counts)) in ended {
            let life = BackendLife {
                backend: *backend,
                generation: *generation,
                author: BackendLife::AGENT,
            };
            let before = self.counts.get(&life, 0);
            let before = before.unwrap_or_else(|_| BackendCounts::new(*service));
            if let Err(error) = self.counts.insert(life, before.with(counts), 0) {
                tracing::debug!("counting backend {}.{generation}: {error}", backend.0);
            }
        }
    }

    /// Takes the counts of backends out that are gone for good; what they were, by service.
    fn tidy(&mut self, referred: &HashSet<Life>) -> Vec<BackendCounts> {
        let all: Vec<(BackendLife, BackendCounts)> =
            match batch::lookup_all(self.all_counts.fd().as_fd(), CHUNK) {
                Ok(all) => all,
                Err(error) => {
                    tracing::debug!("reading the counts of backends: {error}");
                    return Vec::new();
                }
            };
        let mut doomed = HashSet::new();
        let mut gone = Vec::new();
        for (key, counts) in all {
            let life = (key.backend, key.generation);
            if referred.contains(&life) || self.is_live(life) {
                continue;
            }
            // A program may have chosen it just before it went: that is over by the next look.
            if self.doomed.contains(&life) && self.counts.remove(&key).is_ok() {
                gone.push(counts);
            } else {
                doomed.insert(life);
            }
        }
        self.doomed = doomed;
        gone
    }

    fn is_live(&self, (id, generation): Life) -> bool {
        self.backends
            .get(&id.0, 0)
            .is_ok_and(|backend| backend.is(generation, BackendFlags::LIVE))
    }
}

/// Keeps the counts of backends and services.
pub(crate) struct Keeper {
    v4: Kept<V4>,
    v6: Kept<V6>,
    services: BpfMap<MapData, ServiceId, BackendCounts>,
}

impl Keeper {
    pub(crate) fn open(pins: &Pins) -> Result<Self, FlowsError> {
        let map = "SERVICE_COUNTS";
        let [v4, v6] = COUNTS;
        Ok(Self {
            v4: Kept::open(pins, "BACKENDS4", v4)?,
            v6: Kept::open(pins, "BACKENDS6", v6)?,
            services: BpfMap::try_from(Map::LruHashMap(pins.map(map)?))
                .map_err(|source| FlowsError::Map { map, source })?,
        })
    }

    /// Adds what flows brought their backends that this agent ended, by family.
    pub(crate) fn add(&mut self, [v4, v6]: [&Ended; 2]) {
        self.v4.add(v4);
        self.v6.add(v6);
    }

    /// Lets services remember what backends did that are gone; `referred` are those that flows have.
    pub(crate) fn tidy(&mut self, [v4, v6]: [&HashSet<Life>; 2]) {
        let gone = [self.v4.tidy(v4), self.v6.tidy(v6)];
        for counts in gone.iter().flatten() {
            let before = self.services.get(&counts.service, 0);
            let before = before.unwrap_or_else(|_| BackendCounts::new(counts.service));
            if let Err(error) = self.services.insert(counts.service, before.plus(counts), 0) {
                tracing::debug!("counting service port {}: {error}", counts.service.0);
            }
        }
    }
}
