//! Host ends of pods at which somebody else's queueing discipline has to see what the pod sends.
//!
//! The programs leave to the kernel what such a pod sends, with this node's address where it goes to
//! the outside, which the kernel takes from another interface only if it is told to. Hence an order: the
//! programs drop what pods forge before the kernel accepts it, and it accepts it before they rely on
//! that.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs, io,
    sync::atomic::{AtomicBool, Ordering},
};

use futures::TryStreamExt;
use penstock_cni::link;
use rtnetlink::{
    Handle,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage as Message,
        address::{AddressAttribute, AddressMessage, AddressScope},
        tc::{TcAttribute, TcHandle},
    },
};
use tokio::sync::Notify;

use crate::network::{Held, MapsError};

/// The queueing discipline that filters of what comes in are on. Of clsact there are our own.
const INGRESS: &str = "ingress";

/// What the follower of interfaces and whoever writes `CONFIG` tell each other.
#[derive(Debug, Default)]
pub struct Agreement {
    are_some: AtomicBool,
    is_known: AtomicBool,
    asked: Notify,
}

impl Agreement {
    /// What an earlier agent had told the programs.
    pub fn new(is_known: bool) -> Self {
        Self {
            are_some: is_known.into(),
            is_known: is_known.into(),
            asked: Notify::new(),
        }
    }

    /// Says whether there are such pods; whether the programs know that.
    fn say(&self, are_some: bool) -> bool {
        if self.are_some.swap(are_some, Ordering::SeqCst) != are_some {
            self.asked.notify_one();
        }
        self.is_known.load(Ordering::SeqCst) == are_some
    }

    /// Until something else is to be told the programs.
    pub async fn asked(&self) {
        self.asked.notified().await;
    }

    /// Whether the programs are to be told that there are such pods.
    pub fn are_some(&self) -> bool {
        self.are_some.load(Ordering::SeqCst)
    }

    /// Says what the programs were told.
    pub fn tell(&self, is_known: bool) {
        self.is_known.store(is_known, Ordering::SeqCst);
    }
}

/// Whether a message says that something other than links and addresses may be as it was: filters,
/// which our own hooks are too.
pub fn is_of_filters(message: &NetlinkMessage<Message>) -> bool {
    use Message::{
        DelTrafficChain, DelTrafficClass, DelTrafficFilter, NewTrafficChain, NewTrafficClass,
        NewTrafficFilter,
    };
    matches!(
        message.payload,
        NetlinkPayload::InnerMessage(
            NewTrafficFilter(_)
                | DelTrafficFilter(_)
                | NewTrafficClass(_)
                | DelTrafficClass(_)
                | NewTrafficChain(_)
                | DelTrafficChain(_)
        )
    )
}

/// The interfaces at which somebody filters what comes in by a queueing discipline that is not ours.
pub async fn filtered(handle: &Handle) -> Result<HashSet<u32>, rtnetlink::Error> {
    let mut found = HashSet::new();
    let mut queues = handle.qdisc().get().execute();
    while let Some(queue) = queues.try_next().await? {
        let kind = queue
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                TcAttribute::Kind(kind) => Some(kind.as_str()),
                _ => None,
            });
        if queue.header.parent == TcHandle::INGRESS && kind == Some(INGRESS) {
            found.extend(u32::try_from(queue.header.index));
        }
    }
    Ok(found)
}

/// Such interfaces, by index, with their names.
pub type Interfaces = BTreeMap<u32, String>;

/// `HELD`, and how the kernel is set for it.
pub struct Holder {
    map: Held,
    /// What the map names.
    held: BTreeSet<u32>,
    /// Where this agent has set the kernel.
    accepted: BTreeSet<u32>,
}

impl Holder {
    /// What an earlier agent held is held.
    pub fn new(map: Held) -> Self {
        Self {
            held: map.interfaces().collect(),
            map,
            accepted: BTreeSet::new(),
        }
    }

    /// Makes `HELD` name these interfaces; of all that are there, `name_of` knows the names. Why not, where that
    /// failed.
    pub async fn hold<'a>(
        &mut self,
        handle: &Handle,
        wanted: &Interfaces,
        agreement: &Agreement,
        name_of: impl Fn(u32) -> Option<&'a str>,
    ) -> Result<(), String> {
        if !wanted.is_empty() && !agreement.say(true) {
            // Whoever tells the programs wakes the follower afterwards.
            return Ok(());
        }
        let mut problems = Vec::new();
        self.accepted.retain(|index| wanted.contains_key(index));
        for (index, name) in wanted {
            if self.accepted.contains(index) {
                continue;
            }
            match accept(handle, *index, name).await {
                Ok(()) => drop(self.accepted.insert(*index)),
                Err(error) => problems.push(format!(
                    "letting packets with this node's address in by {name}: {error}; what its pod sends \
                     passes the queueing discipline there by"
                )),
            }
        }
        self.map
            .set(self.accepted.iter().copied())
            .map_err(|error: MapsError| error.to_string())?;
        for index in self.held.difference(&self.accepted) {
            if let Some(name) = name_of(*index)
                && let Err(error) = refuse(handle, *index, name).await
            {
                tracing::warn!("setting {name} as it was: {error}");
            }
        }
        self.held.clone_from(&self.accepted);
        if wanted.is_empty() {
            agreement.say(false);
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(problems.join("; "))
        }
    }
}

/// An interface's setting of IPv4.
fn setting(interface: &str, name: &str) -> String {
    format!("/proc/sys/net/ipv4/conf/{interface}/{name}")
}

/// Lets the kernel take IPv4 packets with one of its own addresses from an interface. IPv6 has no such
/// check.
async fn accept(handle: &Handle, index: u32, interface: &str) -> io::Result<()> {
    fs::write(setting(interface, "accept_local"), "1")?;
    // The larger of the two holds (Documentation/networking/ip-sysctl.rst).
    let filter = |name| fs::read_to_string(setting(name, "rp_filter"));
    let is_filtered =
        |value: io::Result<String>| value.is_ok_and(|value| !matches!(value.trim(), "" | "0"));
    if !is_filtered(filter("all")) && !is_filtered(filter(interface)) {
        return Ok(());
    }
    // The way back to this node's own address is never by that interface. If it need not be, any way will
    // do, but only where the interface has an address (`no_addr` in the kernel's net/ipv4/fib_frontend.c).
    fs::write(setting(interface, "rp_filter"), "2")?;
    let message = address(index);
    let mut request = handle.address().add(index, link::GATEWAY4, 32).replace();
    *request.message_mut() = message;
    request.execute().await.map_err(io::Error::other)
}

/// The address that the pod sends to. Its scope keeps the kernel from speaking with it to anybody.
fn address(index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.index = index;
    message.header.prefix_len = 32;
    message.header.scope = AddressScope::Host;
    message.attributes = vec![
        AddressAttribute::Local(link::GATEWAY4),
        AddressAttribute::Address(link::GATEWAY4),
    ];
    message
}

/// Undoes [`accept`].
async fn refuse(handle: &Handle, index: u32, interface: &str) -> io::Result<()> {
    for name in ["accept_local", "rp_filter"] {
        let usual = fs::read_to_string(setting("default", name))?;
        fs::write(setting(interface, name), usual.trim())?;
    }
    // There is none where reverse paths are not filtered.
    let _ = handle.address().del(address(index)).execute().await;
    Ok(())
}
