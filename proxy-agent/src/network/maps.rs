//! `ROUTES`, `ENDPOINTS` and what else the network needs as they should be: what differs is written, and nothing else.

use std::{
    collections::{BTreeMap, HashMap as Known},
    hash::Hash,
    net::IpAddr,
};

use aya::{
    Pod,
    maps::{
        HashMap, Map, MapData, MapError,
        lpm_trie::{Key, LpmTrie},
    },
};
use ipnetwork::IpNetwork;
use penstock_common::{Addr, Endpoint, Route, RouteKind, Uplink, V4, V6, Vtep, XdpUplink};

use super::plan::{Hop, Plan};
use crate::dataplane::{
    changed::Changed,
    pins::{PinError, Pins},
};

/// A map could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum MapsError {
    /// It is not there.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// The kernel refused.
    #[error("map {map}: {source}")]
    Map {
        /// Which.
        map: &'static str,
        /// Why not.
        #[source]
        source: MapError,
    },
}

fn failed(map: &'static str) -> impl FnOnce(MapError) -> MapsError {
    move |source| MapsError::Map { map, source }
}

/// What a map and its mirror have in common.
trait Writes<K, V> {
    fn put(&mut self, key: &K, value: V) -> Result<(), MapError>;
    fn take(&mut self, key: &K) -> Result<(), MapError>;
}

impl<K: Pod, V: Pod> Writes<K, V> for HashMap<MapData, K, V> {
    fn put(&mut self, key: &K, value: V) -> Result<(), MapError> {
        self.insert(key, value, 0)
    }

    fn take(&mut self, key: &K) -> Result<(), MapError> {
        self.remove(key)
    }
}

/// An LPM trie by prefix length and address.
struct Trie<K: Pod>(LpmTrie<MapData, K, Route>);

impl<K: Pod> Writes<(u32, K), Route> for Trie<K> {
    fn put(&mut self, (bits, addr): &(u32, K), route: Route) -> Result<(), MapError> {
        self.0.insert(&Key::new(*bits, *addr), route, 0)
    }

    fn take(&mut self, (bits, addr): &(u32, K)) -> Result<(), MapError> {
        self.0.remove(&Key::new(*bits, *addr))
    }
}

/// A map of the kernel's and what it is known to hold.
struct Mirror<K, V, M> {
    name: &'static str,
    map: M,
    known: Known<K, V>,
}

impl<K: Eq + Hash + Copy, V: PartialEq + Copy, M: Writes<K, V>> Mirror<K, V, M> {
    /// Writes what differs: what is new before what is gone, so that nothing is missed meanwhile.
    fn set(&mut self, wanted: &Known<K, V>) -> Result<usize, MapsError> {
        let mut writes = 0;
        for (key, value) in wanted {
            if self.known.get(key) != Some(value) {
                self.map.put(key, *value).map_err(failed(self.name))?;
                self.known.insert(*key, *value);
                writes += 1;
            }
        }
        let gone: Vec<K> = self
            .known
            .keys()
            .filter(|key| !wanted.contains_key(key))
            .copied()
            .collect();
        for key in gone {
            match self.map.take(&key) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(failed(self.name)(error)),
            }
            self.known.remove(&key);
            writes += 1;
        }
        Ok(writes)
    }
}

type EndpointMirror<K> = Mirror<K, Endpoint, HashMap<MapData, K, Endpoint>>;
type RouteMirror<K> = Mirror<(u32, K), Route, Trie<K>>;

impl<K: Pod + Eq + Hash, V: Pod> Mirror<K, V, HashMap<MapData, K, V>> {
    /// A pinned hash map, with what is in it.
    fn open(pins: &Pins, name: &'static str) -> Result<Self, MapsError> {
        let map = HashMap::try_from(Map::HashMap(pins.map(name)?)).map_err(failed(name))?;
        let known = map.iter().collect::<Result<_, _>>().map_err(failed(name))?;
        Ok(Self { name, map, known })
    }
}

fn routes<K: Pod + Eq + Hash>(
    pins: &Pins,
    name: &'static str,
) -> Result<RouteMirror<K>, MapsError> {
    let map: LpmTrie<MapData, K, Route> =
        LpmTrie::try_from(Map::LpmTrie(pins.map(name)?)).map_err(failed(name))?;
    let mut known = Known::new();
    for entry in map.iter() {
        let (key, route) = entry.map_err(failed(name))?;
        known.insert((key.prefix_len(), key.data()), route);
    }
    let map = Trie(map);
    Ok(Mirror { name, map, known })
}

/// `ENDPOINTS4` and `ENDPOINTS6`.
pub struct Endpoints {
    changed: Changed,
    v4: EndpointMirror<V4>,
    v6: EndpointMirror<V6>,
}

impl Endpoints {
    /// The pinned maps, with what is in them.
    pub fn open(pins: &Pins) -> Result<Self, MapsError> {
        Ok(Self {
            changed: Changed::open(pins)?,
            v4: Mirror::open(pins, "ENDPOINTS4")?,
            v6: Mirror::open(pins, "ENDPOINTS6")?,
        })
    }

    /// Makes the maps hold these; how many writes it took.
    pub fn set(
        &mut self,
        wanted: impl Iterator<Item = (IpAddr, Endpoint)>,
    ) -> Result<usize, MapsError> {
        let (mut v4, mut v6) = (Known::new(), Known::new());
        for (ip, endpoint) in wanted {
            match ip {
                IpAddr::V4(ip) => drop(v4.insert(V4::from(ip), endpoint)),
                IpAddr::V6(ip) => drop(v6.insert(V6::from(ip), endpoint)),
            }
        }
        written(&self.changed, || Ok(self.v4.set(&v4)? + self.v6.set(&v6)?))
    }
}

/// What a write gives, of which the programs are told unless nothing had to be written.
fn written(
    changed: &Changed,
    write: impl FnOnce() -> Result<usize, MapsError>,
) -> Result<usize, MapsError> {
    let result = write();
    if !matches!(result, Ok(0)) {
        changed.note();
    }
    result
}

/// `ROUTES4` and `ROUTES6`.
pub struct Routes {
    changed: Changed,
    v4: RouteMirror<V4>,
    v6: RouteMirror<V6>,
}

impl Routes {
    /// The pinned maps, with what is in them.
    pub fn open(pins: &Pins) -> Result<Self, MapsError> {
        Ok(Self {
            changed: Changed::open(pins)?,
            v4: routes(pins, "ROUTES4")?,
            v6: routes(pins, "ROUTES6")?,
        })
    }

    /// Makes the maps hold these; how many writes it took.
    pub fn set(&mut self, wanted: &BTreeMap<IpNetwork, Route>) -> Result<usize, MapsError> {
        let (mut v4, mut v6) = (Known::new(), Known::new());
        for (range, route) in wanted {
            let bits = u32::from(range.prefix());
            match range.network() {
                IpAddr::V4(ip) => drop(v4.insert((bits, V4::from(ip)), *route)),
                IpAddr::V6(ip) => drop(v6.insert((bits, V6::from(ip)), *route)),
            }
        }
        written(&self.changed, || Ok(self.v4.set(&v4)? + self.v6.set(&v6)?))
    }
}

/// `VTEPS`.
pub struct Vteps(Mirror<Vtep, u32, HashMap<MapData, Vtep, u32>>);

impl Vteps {
    /// The pinned map, with what is in it.
    pub fn open(pins: &Pins) -> Result<Self, MapsError> {
        Mirror::open(pins, "VTEPS").map(Self)
    }

    /// Makes the map hold these addresses of other nodes.
    pub fn set(&mut self, wanted: impl Iterator<Item = IpAddr>) -> Result<usize, MapsError> {
        let vteps = wanted.map(|ip| match ip {
            IpAddr::V4(ip) => Vtep {
                v4: V4::from(ip),
                ..Vtep::default()
            },
            IpAddr::V6(ip) => Vtep {
                v6: V6::from(ip),
                ..Vtep::default()
            },
        });
        self.0.set(&vteps.map(|vtep| (vtep, 1)).collect())
    }
}

/// `UPLINKS`.
pub struct Uplinks {
    changed: Changed,
    mirror: Mirror<u32, Uplink, HashMap<MapData, u32, Uplink>>,
}

impl Uplinks {
    /// The pinned map, with what is in it.
    pub fn open(pins: &Pins) -> Result<Self, MapsError> {
        Ok(Self {
            changed: Changed::open(pins)?,
            mirror: Mirror::open(pins, "UPLINKS")?,
        })
    }

    /// Makes the map hold these interfaces and the addresses that this node has there.
    pub fn set(
        &mut self,
        wanted: impl Iterator<Item = (u32, impl Iterator<Item = IpAddr>)>,
    ) -> Result<usize, MapsError> {
        let uplinks = wanted.map(|(index, ips)| {
            let mut uplink = Uplink::default();
            // An interface's first address is the one that its kernel speaks with.
            for ip in ips {
                match ip {
                    IpAddr::V4(ip) if uplink.addr4.is_unspecified() => uplink.addr4 = V4::from(ip),
                    IpAddr::V6(ip) if uplink.addr6.is_unspecified() => uplink.addr6 = V6::from(ip),
                    _ => {}
                }
            }
            (index, uplink)
        });
        written(&self.changed, || self.mirror.set(&uplinks.collect()))
    }
}

/// `XDP_UPLINKS`.
pub struct XdpUplinks {
    changed: Changed,
    mirror: Mirror<u32, XdpUplink, HashMap<MapData, u32, XdpUplink>>,
}

impl XdpUplinks {
    /// The pinned map, with what is in it.
    pub fn open(pins: &Pins) -> Result<Self, MapsError> {
        Ok(Self {
            changed: Changed::open(pins)?,
            mirror: Mirror::open(pins, "XDP_UPLINKS")?,
        })
    }

    /// Makes the map hold these interfaces and their Ethernet addresses.
    pub fn set(
        &mut self,
        wanted: impl Iterator<Item = (u32, [u8; 6])>,
    ) -> Result<usize, MapsError> {
        let uplinks = wanted.map(|(index, mac)| (index, XdpUplink { mac, pad: 0 }));
        written(&self.changed, || self.mirror.set(&uplinks.collect()))
    }
}

/// `HELD`.
pub struct Held {
    changed: Changed,
    mirror: Mirror<u32, u32, HashMap<MapData, u32, u32>>,
}

impl Held {
    /// The pinned map, with what is in it.
    pub fn open(pins: &Pins) -> Result<Self, MapsError> {
        Ok(Self {
            changed: Changed::open(pins)?,
            mirror: Mirror::open(pins, "HELD")?,
        })
    }

    /// What it holds.
    pub fn interfaces(&self) -> impl Iterator<Item = u32> {
        self.mirror.known.keys().copied()
    }

    /// Makes the map hold these interfaces.
    pub fn set(&mut self, wanted: impl Iterator<Item = u32>) -> Result<usize, MapsError> {
        let wanted = wanted.map(|index| (index, 1)).collect();
        written(&self.changed, || self.mirror.set(&wanted))
    }
}

/// What `ROUTES` should hold for a plan. Nodes' ranges hold before ranges that are just not to be
/// masqueraded.
pub fn wanted(plan: &Plan, direct: &[IpNetwork]) -> BTreeMap<IpNetwork, Route> {
    let of_kind = |kind| Route {
        kind,
        ..Route::default()
    };
    let mut routes = BTreeMap::new();
    for range in direct {
        routes.insert(*range, of_kind(RouteKind::UNMASKED));
    }
    for (range, remote) in &plan.remote {
        let route = match &remote.hop {
            Hop::Via(ip) => {
                routes.insert(IpNetwork::from(*ip), of_kind(RouteKind::NODE));
                of_kind(RouteKind::DIRECT)
            }
            Hop::Tunnel(IpAddr::V4(ip)) => Route {
                underlay4: V4::from(*ip),
                ..of_kind(RouteKind::OVERLAY)
            },
            Hop::Tunnel(IpAddr::V6(ip)) => Route {
                underlay6: V6::from(*ip),
                ..of_kind(RouteKind::OVERLAY)
            },
        };
        routes.insert(*range, route);
    }
    for range in &plan.own {
        routes.insert(*range, of_kind(RouteKind::OWN));
    }
    routes
}
