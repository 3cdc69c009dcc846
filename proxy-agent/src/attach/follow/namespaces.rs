//! The namespaces behind interfaces: who they are, and what `NETNS` says of them.
//!
//! Pods' own interfaces are followed, and have hooks. Of those behind other interfaces only the addresses are
//! known, since they are served at their sockets alone.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use penstock_common::{Netns, NetnsFlags, V4, V6};
use rtnetlink::Handle;

use super::{Follower, PATIENCE, Present, lock};
use crate::{
    attach::netns::{self, Identity},
    dataplane::batch,
};

/// The wait before a namespace is looked into once more that has shown an address of one family, the first
/// time; three times as long each time.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The longest wait: what has no address of a family then is expected to get none.
const LONGEST_WAIT: Duration = Duration::from_secs(27);

/// Which families addresses are of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Families {
    v4: bool,
    v6: bool,
}

impl Families {
    /// Of these addresses.
    fn of<'a>(addresses: impl Iterator<Item = &'a IpAddr> + Clone) -> Self {
        Self {
            v4: addresses.clone().any(IpAddr::is_ipv4),
            v6: addresses.clone().any(IpAddr::is_ipv6),
        }
    }
}

/// What is known of the namespace behind an interface, and when it is looked for again.
#[derive(Clone, Debug, Default)]
pub struct Behind {
    /// Who it is.
    pub identity: Option<Identity>,
    looks: u32,
    wait: Duration,
    again: Option<Instant>,
}

impl Behind {
    fn has_address(&self) -> bool {
        let identity = self.identity.as_ref();
        identity.is_some_and(|identity| identity.addr4.is_some() || identity.addr6.is_some())
    }

    /// Whether it has no address of a family that the node has.
    fn lacks_any(&self, families: Families) -> bool {
        self.identity.as_ref().is_none_or(|identity| {
            families.v4 && identity.addr4.is_none() || families.v6 && identity.addr6.is_none()
        })
    }

    /// Whether it is looked for in quick succession: a pod that is about to get its first address.
    fn is_awaited(&self, is_pod: bool) -> bool {
        is_pod && !self.has_address() && self.looks < PATIENCE
    }

    /// When to look, if ever.
    fn due(&self, is_pod: bool, families: Families, now: Instant) -> Option<Instant> {
        if self.looks == 0 || self.is_awaited(is_pod) {
            return Some(now);
        }
        self.again.filter(|_| self.lacks_any(families))
    }

    /// Notes what a look has shown. Somebody may have come between a pod's addresses.
    fn note(&mut self, identity: Option<Identity>, is_pod: bool, now: Instant) {
        self.looks = self.looks.saturating_add(1);
        self.identity = identity.or(self.identity.take());
        if !self.is_awaited(is_pod) {
            self.wait = (self.wait * 3).max(FIRST_WAIT);
            self.again = (self.wait <= LONGEST_WAIT).then(|| now + self.wait);
        }
    }
}

impl Follower {
    /// Which families this node has addresses of.
    fn families(&self) -> Families {
        Families::of(self.addresses.iter().map(|(_, ip)| ip))
    }

    /// Drops what is known of namespaces behind other interfaces that are gone.
    pub(super) fn forget_strangers(&mut self, strangers: &BTreeMap<u32, i32>) {
        self.strangers
            .retain(|index, (namespace, _)| strangers.get(index) == Some(namespace));
        for (index, namespace) in strangers {
            let unknown = || (*namespace, Behind::default());
            self.strangers.entry(*index).or_insert_with(unknown);
        }
    }

    /// Looks into namespaces that are not known well enough; whether no pod is still to get its first
    /// address.
    pub(super) async fn identify_new(&mut self, handle: &Handle, present: &Present) -> bool {
        let (families, now) = (self.families(), Instant::now());
        let is_due = |behind: &Behind, is_pod| {
            behind
                .due(is_pod, families, now)
                .is_some_and(|due| due <= now)
        };
        let mut wanted: Vec<(u32, i32)> = {
            let status = lock(&self.status);
            let pods = present.iter();
            pods.filter_map(|(index, link)| Some((*index, link.namespace?)))
                .filter(|(index, _)| {
                    let followed = status.interfaces.get(index);
                    followed.is_some_and(|followed| is_due(&followed.behind, true))
                })
                .collect()
        };
        let strangers = self.strangers.iter();
        let strangers = strangers.filter(|(_, (_, behind))| is_due(behind, false));
        wanted.extend(strangers.map(|(index, (namespace, _))| (*index, *namespace)));
        if wanted.is_empty() {
            return true;
        }
        let ids = wanted.iter().map(|(_, id)| *id).collect();
        let namespaces = self.files.find(handle, &ids).await;
        let mut is_settled = true;
        for (index, id) in wanted {
            let identity = namespaces
                .get(&id)
                .and_then(|path| File::open(path).ok())
                .and_then(|file| netns::identify(file).ok());
            if let Some((_, behind)) = self.strangers.get_mut(&index) {
                behind.note(identity, false, now);
            } else if let Some(followed) = lock(&self.status).interfaces.get_mut(&index) {
                followed.behind.note(identity, true, now);
                is_settled &= followed.behind.has_address();
            }
        }
        is_settled
    }

    /// When a namespace is to be looked into that no message will speak of.
    pub(super) fn next_look(&self) -> Option<Instant> {
        let (families, now) = (self.families(), Instant::now());
        let status = lock(&self.status);
        let followed = status.interfaces.values();
        let pods = followed.filter_map(|followed| followed.behind.due(true, families, now));
        let others = self.strangers.values();
        let others = others.filter_map(|(_, behind)| behind.due(false, families, now));
        // Those that were never found have no time, and are looked for whenever there is a look.
        pods.chain(others).filter(|due| *due > now).min()
    }

    /// Whether there is an interface whose namespace may yet be found.
    fn is_looking(&self, present: &Present) -> bool {
        let status = lock(&self.status);
        let pods = present
            .iter()
            .filter(|(_, link)| link.namespace.is_some())
            .filter_map(|(index, _)| status.interfaces.get(index));
        let mut pods = pods.map(|followed| (&followed.behind, true));
        let mut others = self.strangers.values().map(|(_, behind)| (behind, false));
        let may_be_found = |(behind, is_pod): (&Behind, bool)| {
            let is_sought =
                behind.looks == 0 || behind.is_awaited(is_pod) || behind.again.is_some();
            behind.identity.is_none() && is_sought
        };
        pods.any(may_be_found) || others.any(may_be_found)
    }

    /// Makes `NETNS` say what is known: pods' namespaces and the host's own.
    pub(super) fn write_namespaces(&mut self, present: &Present) {
        let mut wanted = HashMap::new();
        let excluded = lock(&self.excluded).clone();
        if excluded.are_all {
            self.inherited.clear();
        }
        let status = lock(&self.status);
        let others = self.strangers.values().map(|(_, behind)| (behind, 0));
        // Later, since what has a hook is to be known by it.
        let pods = status.interfaces.values().map(|followed| {
            let hook = NetnsFlags::HAS_POD_HOOK * u32::from(followed.is_attached);
            (&followed.behind, hook)
        });
        for (behind, flags) in others.chain(pods) {
            let Some(identity) = &behind.identity else {
                continue;
            };
            let is_excluded = [
                identity.addr4.map(IpAddr::V4),
                identity.addr6.map(IpAddr::V6),
            ]
            .into_iter()
            .flatten()
            .any(|address| excluded.ips.contains(&address))
                || self.inherited.contains(&identity.cookie);
            let flags = flags | (NetnsFlags::EXCLUDED * u32::from(is_excluded));
            wanted.insert(
                identity.cookie,
                entry(flags, identity.addr4, identity.addr6),
            );
        }
        drop(status);
        if let Ok(host) = netns::own() {
            let addresses = lock(&self.node_addresses);
            let addr4 = addresses.iter().find_map(|address| match address {
                IpAddr::V4(ip) => Some(*ip),
                IpAddr::V6(_) => None,
            });
            let addr6 = addresses.iter().find_map(|address| match address {
                IpAddr::V6(ip) => Some(*ip),
                IpAddr::V4(_) => None,
            });
            wanted.insert(
                host.cookie,
                entry(NetnsFlags::HOST, addr4.or(host.addr4), addr6.or(host.addr6)),
            );
        }
        if self.is_looking(present) {
            // What is known may be of an interface that is yet to be identified.
            for (cookie, netns) in &self.known {
                wanted.entry(*cookie).or_insert(*netns);
            }
        }
        let map = self.namespaces.fd().as_fd();
        if let Err(error) = batch::settle(map, &mut self.known, &wanted) {
            tracing::warn!("writing map NETNS: {error}; affinity goes by namespace until then");
        }
    }
}

fn entry(flags: u32, addr4: Option<Ipv4Addr>, addr6: Option<Ipv6Addr>) -> Netns {
    Netns {
        flags,
        addr4: addr4.map(V4::from).unwrap_or_default(),
        addr6: addr6.map(V6::from).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: Families = Families { v4: true, v6: true };

    fn with(addr4: bool, addr6: bool) -> Option<Identity> {
        Some(Identity {
            cookie: 7,
            addr4: addr4.then_some(Ipv4Addr::new(10, 244, 0, 5)),
            addr6: addr6.then_some(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 5)),
        })
    }

    #[test]
    fn a_pod_with_one_address_is_looked_into_again() {
        let now = Instant::now();
        let mut pod = Behind::default();
        assert_eq!(pod.due(true, BOTH, now), Some(now));
        pod.note(with(false, false), true, now);
        assert_eq!(
            pod.due(true, BOTH, now),
            Some(now),
            "it waits for its first"
        );
        pod.note(with(true, false), true, now);
        let again = now + FIRST_WAIT;
        assert_eq!(pod.due(true, BOTH, now), Some(again));
        let only4 = Families {
            v4: true,
            v6: false,
        };
        assert_eq!(pod.due(true, only4, now), None, "it will get no other");
        pod.note(with(true, true), true, again);
        assert_eq!(pod.due(true, BOTH, again), None);
        assert!(
            pod.identity
                .is_some_and(|identity| identity.addr6.is_some())
        );
    }

    #[test]
    fn what_shows_no_other_address_is_left_in_peace_in_the_end() {
        let mut now = Instant::now();
        for is_pod in [true, false] {
            let mut behind = Behind::default();
            let mut looks = 0;
            while let Some(due) = behind.due(is_pod, BOTH, now) {
                now = due;
                behind.note(with(true, false), is_pod, now);
                looks += 1;
                assert!(looks < 10, "{behind:?}");
            }
            assert!(looks > 2, "{behind:?}");
        }
    }

    #[test]
    fn only_pods_are_looked_for_in_quick_succession() {
        let now = Instant::now();
        let mut other = Behind::default();
        other.note(None, false, now);
        assert_eq!(other.due(false, BOTH, now), Some(now + FIRST_WAIT));
        let mut pod = Behind::default();
        for _ in 0..PATIENCE {
            assert_eq!(pod.due(true, BOTH, now), Some(now));
            pod.note(None, true, now);
        }
        assert_ne!(pod.due(true, BOTH, now), Some(now));
    }
}
