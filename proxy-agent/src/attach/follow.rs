//! Follows the node's interfaces and addresses: hooks on interfaces that match, namespaces behind
//! them known, and the addresses that no service may have because they are this node's.
//!
//! Driven by rtnetlink's groups of links and addresses; after an overrun, and once in a while,
//! everything is listed anew, so that a missed message costs time and nothing else. An interface that
//! can't be attached is reported and tried again, and does not keep the others waiting.

mod namespaces;
mod pods;
mod wiring;

pub use namespaces::Behind;
pub use wiring::{WireRequest, Wiring};

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    net::IpAddr,
    os::fd::AsFd,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use aya::maps::MapData;
use futures::{StreamExt, TryStreamExt, channel::mpsc::UnboundedReceiver};
use glob::Pattern;
use penstock_cni::{
    error,
    state::{Attachment, AttachmentKey},
};
use penstock_common::{Netns, NetnsFlags};
use rtnetlink::{
    Handle, MulticastGroup, new_multicast_connection,
    packet_core::NetlinkMessage,
    packet_route::{
        RouteNetlinkMessage as Message,
        link::{InfoKind, LinkAttribute, LinkInfo, LinkLayerType},
    },
    sys::SocketAddr,
};
use tokio::sync::watch;

use super::{
    held,
    interface::{PacketHooks, Role},
    netns,
    xdp::{Facts, Mode},
};
use crate::{
    dataplane::{batch, pins::Pins},
    network::{self, MapsError, Uplinks, XdpUplinks},
};

/// How long to let messages gather before looking: a pod's link comes with several.
const SETTLE: Duration = Duration::from_millis(5);
/// The same where the plugin is ours: it asks for its pods once they are complete.
const SETTLE_WIRED: Duration = Duration::from_millis(20);
/// How soon to look again while a namespace has no address yet, or an interface failed.
const RETRY: Duration = Duration::from_millis(100);
/// How often to look without any message.
const IDLE: Duration = Duration::from_secs(30);
/// How often XDP is tried on an interface in a row: a link of another mode's takes its time to go. From
/// then on it is tried when there is another reason to look.
const XDP_ATTEMPTS: u32 = 20;
/// After this many looks an interface's namespace is no longer expected to show an address, nor an
/// attachment without an interface to get one or to be forgotten.
const PATIENCE: u32 = 100;

/// What is known of one followed interface.
#[derive(Clone, Debug, Default)]
pub struct Followed {
    /// Its name.
    pub name: String,
    /// Whether both hooks are on it.
    pub is_attached: bool,
    /// Why not.
    pub error: Option<String>,
    /// Whether that may pass by itself.
    pub is_passing: bool,
    /// What is behind it.
    pub role: Option<Role>,
    /// The namespace behind it.
    pub behind: Behind,
    /// How XDP meets what comes from the outside, if it does.
    pub xdp: Option<Mode>,
    /// Why it does not, where it should.
    pub xdp_error: Option<String>,
    xdp_attempts: u32,
}

/// What the follower tells others.
#[derive(Debug, Default)]
pub struct Status {
    /// Followed interfaces by index.
    pub interfaces: BTreeMap<u32, Followed>,
    /// This node's pods as the CNI plugin remembers them, and the index of each one's interface.
    pub attachments: Vec<(Attachment, Option<u32>)>,
    /// Those whose interface is gone, and since when, as far as this agent has seen.
    pub gone: HashMap<AttachmentKey, Instant>,
    /// Interfaces to the outside whose packets have no Ethernet header, which is where the programs begin
    /// to read.
    pub unserved: Vec<String>,
    /// What of that can't be read, or can't be told the programs.
    pub problems: Vec<String>,
}

/// Addresses whose namespaces opted out of socket translation.
pub type Excluded = Arc<Mutex<OptedOut>>;

/// Pods that want their sockets left alone.
#[derive(Clone, Debug, Default)]
pub struct OptedOut {
    /// Their addresses.
    pub ips: HashSet<IpAddr>,
    /// Whether these are all: until then, what an earlier agent knew holds too.
    pub are_all: bool,
}

/// What is followed: links come and go, and so do queueing disciplines there and this node's addresses.
const GROUPS: [MulticastGroup; 4] = [
    MulticastGroup::Link,
    MulticastGroup::Tc,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
];

/// An interface to follow.
struct Link {
    name: String,
    namespace: Option<i32>,
    /// The index of its other end, there.
    other_end: Option<u32>,
    /// Whether what leaves has to queue.
    is_shaped: bool,
    role: Role,
    facts: Facts,
}

impl Link {
    /// Queueing disciplines of links that have none, and of those that are down.
    const NONE: [&str; 2] = ["noqueue", "noop"];
}

/// Interfaces by index.
type Present = BTreeMap<u32, Link>;

/// The next question; never, where there is no network.
async fn next(wiring: &mut Option<Wiring>) -> WireRequest {
    if let Some(wiring) = wiring
        && let Some(request) = wiring.requests.recv().await
    {
        return request;
    }
    std::future::pending().await
}

/// Until a pod's end of its link is other than it was.
async fn changed_in_pods(changed: Option<impl Future<Output = ()>>) {
    match changed {
        Some(changed) => changed.await,
        None => std::future::pending().await,
    }
}

/// The next message that may be a reason to look.
async fn told(messages: &mut UnboundedReceiver<(NetlinkMessage<Message>, SocketAddr)>) -> bool {
    while let Some((message, _)) = messages.next().await {
        if !held::is_of_filters(&message) {
            return true;
        }
    }
    false
}

/// Interfaces by what is behind them.
#[derive(Clone, Debug)]
pub struct Names {
    /// Pods.
    pub pods: Vec<Pattern>,
    /// The outside, if they have an address too.
    pub uplinks: Vec<Pattern>,
}

/// Follows interfaces.
pub struct Follower {
    hooks: PacketHooks,
    names: Names,
    uplinks: Uplinks,
    xdp_uplinks: XdpUplinks,
    /// This node's addresses by interface, as last seen.
    addresses: Vec<(String, IpAddr)>,
    namespaces: MapData,
    node_addresses: Arc<Mutex<Vec<IpAddr>>>,
    excluded: Excluded,
    own_addresses: watch::Sender<Vec<IpAddr>>,
    known: HashMap<u64, Netns>,
    /// What is behind interfaces that nobody follows: their namespaces' ids, and what is known of them.
    strangers: BTreeMap<u32, (i32, Behind)>,
    /// Namespaces that opted out by what an earlier agent knew, until all that do are known.
    inherited: HashSet<u64>,
    files: netns::Namespaces,
    wiring: Option<Wiring>,
    /// Why `ENDPOINTS` could not be written when last tried, and whether that may pass.
    unwritten: Option<(String, bool)>,
    /// How many looks an attachment without an interface still gets.
    patience: u32,
    /// Shared with the command line.
    pub status: Arc<Mutex<Status>>,
}

impl Follower {
    /// A follower that has not looked yet; it tells `own_addresses` which addresses this node has.
    pub fn new(
        hooks: PacketHooks,
        names: Names,
        pins: &Pins,
        node_addresses: Arc<Mutex<Vec<IpAddr>>>,
        excluded: Excluded,
        own_addresses: watch::Sender<Vec<IpAddr>>,
        wiring: Option<Wiring>,
    ) -> Result<Self, MapsError> {
        let namespaces = pins.map("NETNS")?;
        // What an earlier agent wrote counts. Where it can't be read, all of it is written anew.
        let known = batch::lookup_all::<u64, Netns>(namespaces.fd().as_fd(), 1_024);
        let known: HashMap<u64, Netns> = known.unwrap_or_default().into_iter().collect();
        let opted_out = known
            .iter()
            .filter(|(_, netns)| netns.flags & NetnsFlags::EXCLUDED != 0);
        let inherited = opted_out.map(|(cookie, _)| *cookie).collect();
        Ok(Self {
            hooks,
            names,
            uplinks: Uplinks::open(pins)?,
            xdp_uplinks: XdpUplinks::open(pins)?,
            addresses: Vec::new(),
            namespaces,
            node_addresses,
            excluded,
            own_addresses,
            known,
            strangers: BTreeMap::new(),
            inherited,
            files: netns::Namespaces::default(),
            wiring,
            unwritten: None,
            patience: 0,
            status: Arc::default(),
        })
    }

    /// Follows until the task is cancelled; `changed` wakes it when exclusions or addresses did.
    pub async fn run(mut self, changed: Arc<tokio::sync::Notify>) {
        if let Some(wiring) = &self.wiring {
            wiring.peers.listen();
        }
        loop {
            if let Err(error) = self.follow(&changed).await {
                tracing::warn!("following interfaces: {error}; beginning anew");
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn follow(&mut self, changed: &tokio::sync::Notify) -> io::Result<()> {
        let (connection, handle, mut messages) = new_multicast_connection(&GROUPS)?;
        let connection = tokio::spawn(connection);
        if let Some(wiring) = &self.wiring {
            wiring.peers.forget();
        }
        let mut asked = Vec::new();
        let result = loop {
            let hints = asked.iter();
            let hints = hints.filter_map(|request: &WireRequest| request.netns.clone());
            self.files.hint(hints);
            let is_settled = match self.look(&handle).await {
                Ok(is_settled) => is_settled,
                Err(error) => break Err(io::Error::other(error)),
            };
            for request in asked.drain(..) {
                self.answer(&handle, request).await;
            }
            let pause = self.pause(is_settled);
            let settle = if self.wiring.is_some() {
                SETTLE_WIRED
            } else {
                SETTLE
            };
            let in_pods = self.wiring.as_ref().map(|wiring| wiring.peers.changed());
            tokio::select! {
                is_told = told(&mut messages) => {
                    if !is_told {
                        break Err(io::Error::other("the netlink connection ended"));
                    }
                    // Who asks for a pod does not wait for that.
                    tokio::select! {
                        () = tokio::time::sleep(settle) => {}
                        request = next(&mut self.wiring) => asked.push(request),
                    }
                    while futures::FutureExt::now_or_never(messages.next()).flatten().is_some() {}
                }
                () = changed.notified() => {}
                () = changed_in_pods(in_pods) => {}
                request = next(&mut self.wiring) => asked.push(request),
                () = tokio::time::sleep(pause) => {
                    if let Some(wiring) = self.wiring.as_ref().filter(|_| pause == IDLE) {
                        wiring.peers.forget();
                    }
                }
            }
            // One look does for all who ask at once.
            if let Some(wiring) = &mut self.wiring {
                asked.extend(std::iter::from_fn(|| wiring.requests.try_recv().ok()));
            }
        };
        connection.abort();
        result
    }

    /// For how long there is nothing to be done without a message.
    fn pause(&self, is_settled: bool) -> Duration {
        if !is_settled {
            return RETRY;
        }
        let next = self.next_look();
        next.map_or(IDLE, |next| {
            next.saturating_duration_since(Instant::now())
                .clamp(RETRY, IDLE)
        })
    }

    /// Tells which addresses this node has, if they are others than before.
    fn tell_addresses(&mut self) {
        match netns::own_addresses() {
            Ok(addresses) => self.addresses = addresses,
            Err(error) => tracing::warn!("reading this node's addresses: {error}"),
        }
        let ips: Vec<IpAddr> = self.addresses.iter().map(|(_, ip)| *ip).collect();
        self.own_addresses.send_if_modified(|known| {
            let is_new = *known != ips;
            *known = ips;
            is_new
        });
    }

    /// Makes `UPLINKS` say which addresses this node has at its interfaces to the outside.
    fn write_uplinks(&mut self, present: &Present) -> bool {
        let uplinks = present.iter().filter(|(_, link)| link.role == Role::Uplink);
        let addresses = &self.addresses;
        let uplinks = uplinks.map(|(index, link)| {
            let ips = addresses.iter().filter(move |(on, _)| *on == link.name);
            (*index, ips.map(|(_, ip)| *ip))
        });
        match self.uplinks.set(uplinks) {
            Ok(_) => true,
            Err(error) => {
                tracing::warn!("{error}; trying again");
                false
            }
        }
    }

    /// Makes `XDP_UPLINKS` name the interfaces to the outside that have XDP, so that it serves there
    /// and sends to them.
    fn write_xdp_uplinks(&mut self, present: &Present) -> bool {
        let status = lock(&self.status);
        let uplinks = present.iter().filter_map(|(index, link)| {
            let followed = status.interfaces.get(index)?;
            let has_xdp = link.role == Role::Uplink && followed.xdp.is_some();
            Some((*index, link.facts.mac.filter(|_| has_xdp)?))
        });
        match self.xdp_uplinks.set(uplinks) {
            Ok(_) => true,
            Err(error) => {
                tracing::warn!("{error}; clients outside are served at TC until then");
                false
            }
        }
    }

    /// Looks at all interfaces; whether nothing is left to wait for.
    async fn look(&mut self, handle: &Handle) -> Result<bool, rtnetlink::Error> {
        self.tell_addresses();
        let mut present: Present = BTreeMap::new();
        let mut carriers = HashSet::new();
        let mut strangers = BTreeMap::new();
        let mut unserved = Vec::new();
        let mut links = handle.link().get().execute();
        while let Some(link) = links.try_next().await? {
            let mut name = None;
            let mut namespace = None;
            let mut below = None;
            let mut kind = None;
            let mut mac = None;
            let mut is_shaped = false;
            for attribute in &link.attributes {
                match attribute {
                    LinkAttribute::IfName(text) => name = Some(text.clone()),
                    LinkAttribute::LinkNetNsId(id) => namespace = Some(*id),
                    LinkAttribute::Link(index) => below = Some(*index),
                    LinkAttribute::Qdisc(kind) => is_shaped = !Link::NONE.contains(&kind.as_str()),
                    LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(&**bytes).ok(),
                    LinkAttribute::LinkInfo(infos) => {
                        kind = infos.iter().find_map(|info| match info {
                            LinkInfo::Kind(kind) => Some(kind.clone()),
                            _ => None,
                        });
                    }
                    _ => {}
                }
            }
            if kind == Some(InfoKind::Vlan) && namespace.is_none() {
                carriers.extend(below);
            }
            let role = name.as_deref().and_then(|name| self.role(name));
            if role.is_none() {
                strangers.extend(namespace.map(|namespace| (link.header.index, namespace)));
            }
            if let (Some(name), Some(role)) = (name, role) {
                let layer = link.header.link_layer_type;
                let is_ethernet = layer == LinkLayerType::Ether;
                if role == Role::Uplink && !is_ethernet && layer != LinkLayerType::Loopback {
                    unserved.push(name);
                    continue;
                }
                let facts = Facts {
                    mac: mac.filter(|_| is_ethernet),
                    is_veth: kind == Some(InfoKind::Veth),
                    has_vlans: false,
                };
                let link_seen = Link {
                    name,
                    namespace,
                    other_end: below.filter(|_| namespace.is_some()),
                    is_shaped,
                    role,
                    facts,
                };
                present.insert(link.header.index, link_seen);
            }
        }
        lock(&self.status).unserved = unserved;
        for (index, link) in &mut present {
            link.facts.has_vlans = carriers.contains(index);
        }
        // Before the program leaves an interface, nobody sends there any more. What an earlier agent
        // wrote holds until its programs are replaced.
        if !lock(&self.status).interfaces.is_empty() {
            self.write_xdp_uplinks(&present);
        }
        self.forget_absent(&present);
        self.forget_strangers(&strangers);
        let mut is_settled = self.attach_new(&present);
        is_settled &= self.attach_xdp(&present);
        is_settled &= self.write_xdp_uplinks(&present);
        is_settled &= self.identify_new(handle, &present).await;
        self.write_namespaces(&present);
        if self.wiring.is_some() {
            is_settled &= self.read_pods();
            is_settled &= self.follow_pods(handle, &present).await?;
            is_settled &= self.write_endpoints(&present);
        }
        is_settled &= self.write_uplinks(&present);
        Ok(is_settled)
    }

    /// What is behind an interface of this name, if it is ours to follow.
    fn role(&self, name: &str) -> Option<Role> {
        let is_of = |patterns: &[Pattern]| patterns.iter().any(|pattern| pattern.matches(name));
        if self.wiring.is_some() && name == network::DEVICE {
            return Some(Role::Overlay);
        }
        // A bridge of pods has an address too. The host ends of pods that this agent connects have
        // none, so that nothing else can look like one of them.
        let is_pod = is_of(&self.names.pods);
        let has_address = self.addresses.iter().any(|(on, _)| on == name);
        let is_uplink = has_address && is_of(&self.names.uplinks) && name != network::DEVICE;
        if is_uplink && (self.wiring.is_some() || !is_pod) {
            return Some(Role::Uplink);
        }
        is_pod.then_some(Role::Pod)
    }

    /// Drops what is known of interfaces that are gone or renamed.
    fn forget_absent(&mut self, present: &Present) {
        let mut status = lock(&self.status);
        let pinned = self.hooks.pinned();
        for index in pinned
            .into_iter()
            .chain(status.interfaces.keys().copied().collect::<Vec<_>>())
        {
            if !present.contains_key(&index) {
                self.hooks.detach(None, index);
                if let Some(gone) = status.interfaces.remove(&index) {
                    tracing::info!("interface {} is gone", gone.name);
                }
            }
        }
        for (index, Link { name, role, .. }) in present {
            if status
                .interfaces
                .get(index)
                .is_some_and(|followed| followed.name != *name || followed.role != Some(*role))
            {
                status.interfaces.remove(index);
            }
        }
    }

    fn attach_new(&mut self, present: &Present) -> bool {
        let mut is_settled = true;
        for (index, Link { name, role, .. }) in present {
            let mut followed = lock(&self.status)
                .interfaces
                .get(index)
                .cloned()
                .unwrap_or_default();
            if followed.is_attached {
                continue;
            }
            // Nobody else has hooks on links of our own plugin's.
            let is_alone = self
                .wiring
                .as_ref()
                .is_some_and(|wiring| !wiring.is_chained);
            let quickly = is_alone && penstock_cni::names::is_interface(name);
            let result = self.hooks.attach(*role, name, *index, quickly);
            if *role != Role::Uplink {
                // It may have been one.
                self.hooks.detach_xdp(*index);
            }
            followed.role = Some(*role);
            followed.name.clone_from(name);
            followed.is_attached = result.is_ok();
            match result {
                Ok(()) => {
                    followed.error = None;
                    tracing::info!("packet hooks are on interface {name}");
                }
                Err(error) => {
                    is_settled = false;
                    let text = error.to_string();
                    if followed.error.as_ref() != Some(&text) {
                        tracing::warn!("{text}; trying again");
                    }
                    followed.error = Some(text);
                    followed.is_passing = error::chain_passes(&error);
                }
            }
            lock(&self.status).interfaces.insert(*index, followed);
        }
        is_settled
    }

    /// Puts XDP on interfaces to the outside, and takes it off others; whether there is nothing to be
    /// tried again soon.
    fn attach_xdp(&mut self, present: &Present) -> bool {
        let mut is_settled = true;
        for (index, link) in present {
            let Some(mut followed) = lock(&self.status).interfaces.get(index).cloned() else {
                continue;
            };
            if link.role != Role::Uplink {
                continue;
            }
            if link.facts.has_vlans {
                followed.xdp = None;
            }
            if !self.hooks.xdp().is_wanted() {
                followed.xdp_error = self.hooks.xdp().problem().map(str::to_owned);
            } else if followed.xdp.is_none() {
                let result = self.hooks.attach_xdp(&link.name, *index, link.facts);
                if !matches!(result, Ok(Some(_))) {
                    // An earlier agent's.
                    self.hooks.detach_xdp(*index);
                }
                let error = result.as_ref().err().map(ToString::to_string);
                if let Ok(Some(mode)) = result {
                    tracing::info!("XDP is on interface {}, {}", link.name, mode.label());
                    followed.xdp = Some(mode);
                } else if followed.xdp_error != error
                    && let Some(error) = &error
                {
                    tracing::warn!("{error}; clients outside are served at TC there");
                }
                followed.xdp_attempts += 1;
                is_settled &= error.is_none() || followed.xdp_attempts >= XDP_ATTEMPTS;
                followed.xdp_error = error;
            }
            lock(&self.status).interfaces.insert(*index, followed);
        }
        is_settled
    }
}

/// A lock whose holder can't have left anything half done.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
