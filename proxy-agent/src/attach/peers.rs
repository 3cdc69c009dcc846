//! Ethernet addresses of pods' ends of their links, which plugins later in a chain, and pods themselves,
//! may change after they were wired.
//!
//! They are asked for once, and again when another namespace's links are told to have changed. Who they
//! are told of is only where to look: what a namespace says of itself may be forged, what the kernel
//! answers of a link's other end is not.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    net::IpAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::{StreamExt, TryStreamExt};
use penstock_cni::{link, netlink::Netlink, netns::Netns, state::Mac};
use rtnetlink::{
    Handle, MulticastGroup, new_multicast_connection,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage as Message,
        link::{LinkAttribute, LinkMessage},
        neighbour::NeighbourState,
    },
    sys::AsyncSocket,
};
use tokio::sync::Notify;

use super::{follow::lock, netns::Namespaces};

/// How soon to listen again after the connection ended.
const RETRY: Duration = Duration::from_secs(1);

/// Where a link's other end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The id of its namespace here.
    pub namespace: i32,
    /// Its index there.
    pub index: u32,
}

/// A pod's link, as it was made.
#[derive(Clone, Debug)]
pub struct Made {
    /// Where the pod's end is.
    pub peer: Place,
    /// The address that it was given.
    pub mac: Mac,
    /// The host end's, which the pod sends to.
    pub host_mac: Mac,
    /// Whom the host reaches by it.
    pub ips: Vec<IpAddr>,
}

/// What is known, by the index of the host end.
#[derive(Debug, Default)]
struct Known {
    macs: HashMap<u32, Mac>,
    /// What the host sends to them by, where that was set here.
    neighbours: HashMap<u32, Mac>,
    /// The one that is being asked for, unless it changed meanwhile.
    asked: Option<u32>,
}

/// Pods' ends.
#[derive(Debug, Default)]
pub struct Peers {
    known: Arc<Mutex<Known>>,
    changed: Arc<Notify>,
    has_looked: bool,
}

impl Peers {
    /// Listens for changes for as long as the agent runs.
    pub fn listen(&self) {
        let (known, changed) = (self.known.clone(), self.changed.clone());
        tokio::spawn(async move {
            loop {
                if let Err(error) = listen(&known, &changed).await {
                    tracing::warn!("listening for links in pods: {error}; trying again");
                }
                forget_all(&known, &changed);
                tokio::time::sleep(RETRY).await;
            }
        });
    }

    /// Until one is other than it was.
    pub fn changed(&self) -> impl Future<Output = ()> + 'static {
        let changed = self.changed.clone();
        async move { changed.notified().await }
    }

    /// Asks for those that are not known; whether all are.
    pub async fn look(
        &mut self,
        handle: &Handle,
        files: &mut Namespaces,
        links: &BTreeMap<u32, Made>,
    ) -> bool {
        let unknown: Vec<u32> = {
            let mut known = lock(&self.known);
            known.macs.retain(|index, _| links.contains_key(index));
            known
                .neighbours
                .retain(|index, _| links.contains_key(index));
            let is_unknown = |index: &&u32| !known.macs.contains_key(*index);
            links.keys().filter(is_unknown).copied().collect()
        };
        let mut are_all = true;
        for index in unknown {
            let Some(made) = links.get(&index) else {
                continue;
            };
            lock(&self.known).asked = Some(index);
            let mac = match ask(handle, index, made.peer).await {
                Ok(Some(mac)) => mac,
                // It is not what it was a moment ago: it goes, or goes elsewhere.
                Ok(None) => continue,
                Err(error) => {
                    tracing::debug!("asking for the other end of link {index}: {error}");
                    continue;
                }
            };
            let before = {
                let mut known = lock(&self.known);
                if known.asked.take() != Some(index) {
                    are_all = false;
                    continue;
                }
                known.macs.insert(index, mac);
                known.neighbours.get(&index).copied()
            };
            // An earlier agent may have followed it to another one.
            let before = before.or(self.has_looked.then_some(made.mac));
            if before == Some(mac) {
                continue;
            }
            let mut set = set_neighbours(handle, index, &made.ips, mac).await;
            if set.is_ok() && mac != made.mac {
                set = restore_gateways(handle, files, made).await;
            }
            let mut known = lock(&self.known);
            match set {
                Ok(()) => drop(known.neighbours.insert(index, mac)),
                Err(error) => {
                    tracing::warn!(
                        "following the Ethernet address of a pod at link {index}: {error}; trying again"
                    );
                    known.macs.remove(&index);
                    are_all = false;
                }
            }
        }
        self.has_looked = true;
        are_all
    }

    /// All that are known.
    pub fn macs(&self) -> HashMap<u32, Mac> {
        lock(&self.known).macs.clone()
    }

    /// The one of the link with this host end, if it is known.
    pub fn mac(&self, index: u32) -> Option<Mac> {
        lock(&self.known).macs.get(&index).copied()
    }

    /// Asks for all of them again with the next look.
    pub fn forget(&self) {
        lock(&self.known).macs.clear();
    }
}

fn forget_all(known: &Mutex<Known>, changed: &Notify) {
    lock(known).macs.clear();
    changed.notify_one();
}

async fn listen(known: &Mutex<Known>, changed: &Notify) -> io::Result<()> {
    let (mut connection, _handle, mut messages) =
        new_multicast_connection(&[MulticastGroup::Link])?;
    let socket = connection.socket_mut().socket_mut();
    socket.set_listen_all_namespaces(true)?;
    let connection = tokio::spawn(connection);
    forget_all(known, changed);
    while let Some((message, _)) = messages.next().await {
        hear(&message, known, changed);
    }
    connection.abort();
    Err(io::Error::other("the netlink connection ended"))
}

/// Forgets what a message may have made untrue.
fn hear(message: &NetlinkMessage<Message>, known: &Mutex<Known>, changed: &Notify) {
    match &message.payload {
        NetlinkPayload::InnerMessage(Message::NewLink(link)) => {
            let (mac, other_end) = (mac_of(link), other_end_of(link));
            let mut known = lock(known);
            let (Some(mac), Some(index)) = (mac, other_end) else {
                return;
            };
            if known.asked == Some(index) {
                known.asked = None;
            }
            if known.macs.get(&index).is_some_and(|before| *before != mac) {
                known.macs.remove(&index);
                changed.notify_one();
            }
        }
        NetlinkPayload::InnerMessage(_) => {}
        // Some were lost.
        _ => forget_all(known, changed),
    }
}

fn mac_of(link: &LinkMessage) -> Option<Mac> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Address(bytes) => <[u8; 6]>::try_from(&**bytes).ok().map(Mac),
            _ => None,
        })
}

/// The index of a link's other end, where that is.
fn other_end_of(link: &LinkMessage) -> Option<u32> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Link(index) => Some(*index),
            _ => None,
        })
}

/// The Ethernet address of a link's other end, if it is that.
async fn ask(handle: &Handle, index: u32, peer: Place) -> Result<Option<Mac>, rtnetlink::Error> {
    let mut request = handle.link().get().match_index(peer.index);
    let there = LinkAttribute::IfNetnsId(peer.namespace);
    request.message_mut().attributes.push(there);
    let mut answers = request.execute();
    let Some(link) = answers.try_next().await? else {
        return Ok(None);
    };
    Ok(mac_of(&link).filter(|_| other_end_of(&link) == Some(index)))
}

async fn set_neighbours(handle: &Handle, index: u32, ips: &[IpAddr], mac: Mac) -> io::Result<()> {
    for ip in ips {
        let neighbour = handle.neighbours().add(index, *ip).replace();
        let neighbour = neighbour.link_layer_address(&mac.0);
        let neighbour = neighbour.state(NeighbourState::Permanent);
        neighbour.execute().await.map_err(io::Error::other)?;
    }
    Ok(())
}

/// Tells a pod's end again who its gateways are: with its address it lost all its neighbours
/// (`neigh_changeaddr` in the kernel's net/core/neighbour.c), and nobody answers where it asks.
async fn restore_gateways(handle: &Handle, files: &mut Namespaces, made: &Made) -> io::Result<()> {
    let found = files
        .find(handle, &HashSet::from([made.peer.namespace]))
        .await;
    let Some(path) = found.get(&made.peer.namespace) else {
        return Err(io::Error::other(
            "its network namespace is nowhere to be found",
        ));
    };
    let Some(netns) = Netns::open(path).map_err(io::Error::other)? else {
        // It ends.
        return Ok(());
    };
    let inside = Netlink::container(&netns).map_err(io::Error::other)?;
    for ip in &made.ips {
        let added = inside.add_neighbour(made.peer.index, link::gateway(*ip), made.host_mac);
        added.await.map_err(io::Error::other)?;
    }
    Ok(())
}
