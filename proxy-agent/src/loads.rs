//! How many connections the backends have that are chosen by it (`least-connections`): what the
//! kernel's tables hold, counted anew every second.
//!
//! Invariant: nothing is kept from one count to the next, so that no number drifts, whatever ended
//! without a word. What a backend is given after a count the programs add by themselves, from what
//! they count anyway (`penstock_common::Load`).

use std::{
    collections::{HashMap as Map, HashSet},
    net::SocketAddr,
    os::fd::AsFd,
    sync::Arc,
    time::Duration,
};

use aya::maps::{Array, HashMap, Map as AnyMap, MapData};
use penstock_common::{
    Addr, BackendId, ConnectedUdp, Connections, Flow, FlowState, Load, Plain, TcpPeer, V4, V6,
};
use tokio::sync::watch;

use crate::{
    dataplane::{batch, pins::Pins},
    flows::{FlowsError, Table},
    plan::planner::Watched,
    stats::{Life, address},
};

/// How often connections are counted.
const COUNT: Duration = Duration::from_secs(1);
/// Elements that are read at once.
const CHUNK: usize = 65_536;

/// Counts connections for as long as `watched` is sent.
pub async fn run(pins: Pins, mut watched: watch::Receiver<Arc<Vec<Watched>>>) {
    let mut counter = match Counter::open(&pins) {
        Ok(counter) => counter,
        Err(error) => return tracing::warn!("counting connections: {error}"),
    };
    let mut ticks = tokio::time::interval(COUNT);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut has_counted = true;
    loop {
        tokio::select! {
            sent = watched.changed() => if sent.is_err() { return },
            _ = ticks.tick() => {}
        }
        let ports = watched.borrow_and_update().clone();
        // Once more after the last one is gone.
        if ports.is_empty() && !has_counted {
            continue;
        }
        has_counted = !ports.is_empty();
        let counted = tokio::task::spawn_blocking(move || {
            let result = counter.count(&ports);
            (counter, result)
        });
        let result;
        (counter, result) = match counted.await {
            Ok(counted) => counted,
            Err(error) => return tracing::warn!("counting connections: {error}"),
        };
        if let Err(error) = result {
            tracing::warn!("counting connections: {error}");
        }
    }
}

/// A family's maps.
struct Side<A> {
    flows: Table<A>,
    connections: Array<MapData, Connections>,
    loads: HashMap<MapData, BackendId, Load>,
}

/// What there is, by backend.
type Counts = Map<Life, u32>;

impl<A: Addr> Side<A>
where
    Flow<A>: Plain,
{
    fn open(
        pins: &Pins,
        [flows, counts, connections, loads]: [&'static str; 4],
    ) -> Result<Self, FlowsError> {
        let bad = |map| move |source| FlowsError::Map { map, source };
        Ok(Self {
            flows: Table::open(pins, [flows, counts])?,
            connections: Array::try_from(AnyMap::Array(pins.map(connections)?))
                .map_err(bad(connections))?,
            loads: HashMap::try_from(AnyMap::HashMap(pins.map(loads)?)).map_err(bad(loads))?,
        })
    }

    /// What these backends were given so far.
    fn given(&self, lives: impl Iterator<Item = Life>) -> Map<Life, u64> {
        let given = |(id, generation): Life| {
            let seen = self.connections.get(&id.0, 0).unwrap_or_default();
            let is_own = seen.generation == generation;
            ((id, generation), if is_own { seen.count } else { 0 })
        };
        lives.map(given).collect()
    }

    /// Adds the flows that are not about to end.
    fn add_flows(&self, counts: &mut Counts) {
        for id in 0..self.flows.records() {
            let flow = self.flows.read(id);
            if matches!(flow.state, FlowState::EMBRYONIC | FlowState::ESTABLISHED)
                && flow.backend_generation != 0
            {
                let life = (flow.backend_id, flow.backend_generation);
                *counts.entry(life).or_default() += 1;
            }
        }
    }

    /// Writes what was counted, and removes what is nobody's.
    fn write(
        &mut self,
        map: &'static str,
        given: &Map<Life, u64>,
        counts: &Counts,
    ) -> Result<(), FlowsError> {
        let bad = |source| FlowsError::Map { map, source };
        let wanted: HashSet<BackendId> = given.keys().map(|(id, _)| *id).collect();
        let held: Vec<BackendId> = self.loads.keys().collect::<Result<_, _>>().map_err(bad)?;
        for id in held.iter().filter(|id| !wanted.contains(id)) {
            // Another agent's count of what is gone by now.
            let _ = self.loads.remove(id);
        }
        for ((id, generation), given) in given {
            let load = Load {
                generation: *generation,
                live: counts.get(&(*id, *generation)).copied().unwrap_or(0),
                given: *given,
            };
            self.loads.insert(id, load, 0).map_err(bad)?;
        }
        Ok(())
    }
}

struct Counter {
    v4: Side<V4>,
    v6: Side<V6>,
    tcp: MapData,
    udp: MapData,
}

const LOADS: [&str; 2] = ["LOADS4", "LOADS6"];

impl Counter {
    fn open(pins: &Pins) -> Result<Self, FlowsError> {
        let [v4, v6] = LOADS;
        Ok(Self {
            v4: Side::open(pins, ["FLOWS4", "FLOW_COUNTS4", "CONNECTIONS4", v4])?,
            v6: Side::open(pins, ["FLOWS6", "FLOW_COUNTS6", "CONNECTIONS6", v6])?,
            tcp: pins.map("TCP_PEERS")?,
            udp: pins.map("CONNECTED_UDP")?,
        })
    }

    /// Counts connections of the backends of these ports.
    fn count(&mut self, ports: &[Watched]) -> Result<(), FlowsError> {
        let lives = |is_v4| {
            let ports = ports.iter().filter(move |port| port.is_v4 == is_v4);
            ports.flat_map(|port| port.backends.iter().map(|(_, life)| *life))
        };
        // First, so that what comes meanwhile is counted twice for a while rather than not at all.
        let given = [self.v4.given(lives(true)), self.v6.given(lives(false))];
        let mut counts = [Counts::new(), Counts::new()];
        if !ports.is_empty() {
            let [v4, v6] = &mut counts;
            self.v4.add_flows(v4);
            self.v6.add_flows(v6);
            self.add_udp_sockets(&mut counts)?;
            self.add_tcp_sockets(ports, &mut counts)?;
        }
        self.v4.write(LOADS[0], &given[0], &counts[0])?;
        self.v6.write(LOADS[1], &given[1], &counts[1])
    }

    fn add_udp_sockets(&self, [v4, v6]: &mut [Counts; 2]) -> Result<(), FlowsError> {
        let sockets: Vec<(u64, ConnectedUdp)> = read(&self.udp, "CONNECTED_UDP")?;
        for (_, socket) in sockets {
            if socket.backend != ConnectedUdp::NO_BACKEND {
                let is_v4 = socket.frontend.addr.to_mapped_v4().is_some();
                let counts = if is_v4 { &mut *v4 } else { &mut *v6 };
                let life = (socket.backend, socket.generation);
                *counts.entry(life).or_default() += 1;
            }
        }
        Ok(())
    }

    fn add_tcp_sockets(
        &self,
        ports: &[Watched],
        [v4, v6]: &mut [Counts; 2],
    ) -> Result<(), FlowsError> {
        let mut frontends: Map<SocketAddr, usize> = Map::new();
        let mut backends: Map<(usize, SocketAddr), Life> = Map::new();
        let tcp = |(_, port): &(usize, &Watched)| port.is_tcp;
        for (number, port) in ports.iter().enumerate().filter(tcp) {
            frontends.extend(port.frontends.iter().map(|at| (*at, number)));
            let named = port.backends.iter();
            backends.extend(named.map(|(at, life)| ((number, *at), *life)));
        }
        let places: Vec<(u32, TcpPeer)> = read(&self.tcp, "TCP_PEERS")?;
        for (_, place) in places.iter().filter(|(_, place)| place.cookie != 0) {
            let frontend = address(&place.peer.frontend);
            let Some(number) = frontends.get(&frontend) else {
                continue;
            };
            let backend = (*number, address(&place.peer.backend));
            if let Some(life) = backends.get(&backend) {
                let counts = if frontend.is_ipv4() {
                    &mut *v4
                } else {
                    &mut *v6
                };
                *counts.entry(*life).or_default() += 1;
            }
        }
        Ok(())
    }
}

fn read<K: Plain + Default, V: Plain + Default>(
    map: &MapData,
    name: &'static str,
) -> Result<Vec<(K, V)>, FlowsError> {
    batch::lookup_all(map.fd().as_fd(), CHUNK)
        .map_err(|source| FlowsError::Read { map: name, source })
}
