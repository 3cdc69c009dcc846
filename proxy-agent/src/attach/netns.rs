//! The network namespaces behind pods' interfaces: their cookies and addresses.
//!
//! Socket hooks know a namespace's cookie; session affinity goes by address. Namespaces are found
//! by what container runtimes and `ip netns` leave in /run/netns, and by processes.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::PathBuf,
};

use futures::StreamExt;
use nix::sched::{CloneFlags, setns};
use rtnetlink::packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    nsid::{NsidAttribute, NsidMessage},
};

use super::syscall;
use crate::model::object::Family;

/// What a namespace has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its cookie (SO_NETNS_COOKIE).
    pub cookie: u64,
    /// Its first global addresses, if it has any.
    pub addr4: Option<Ipv4Addr>,
    /// See `addr4`.
    pub addr6: Option<Ipv6Addr>,
}

/// The calling thread's namespace.
pub fn own() -> io::Result<Identity> {
    let mut identity = Identity {
        cookie: syscall::netns_cookie()?,
        addr4: None,
        addr6: None,
    };
    for interface in nix::ifaddrs::getifaddrs()? {
        let Some(address) = interface.address else {
            continue;
        };
        if let Some(address) = address.as_sockaddr_in() {
            let ip = address.ip();
            if !ip.is_loopback() && !ip.is_link_local() && identity.addr4.is_none() {
                identity.addr4 = Some(ip);
            }
        } else if let Some(address) = address.as_sockaddr_in6() {
            let ip = address.ip();
            if !ip.is_loopback() && !ip.is_unicast_link_local() && identity.addr6.is_none() {
                identity.addr6 = Some(ip);
            }
        }
    }
    Ok(identity)
}

/// All addresses of the calling thread's namespace that other hosts may know it by, with their
/// interfaces' names, in the kernel's order, but those last that new connections should not have.
pub fn own_addresses() -> io::Result<Vec<(String, IpAddr)>> {
    // Not there without IPv6.
    let listed = fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default();
    let deprecated = deprecated(&listed);
    let addresses = nix::ifaddrs::getifaddrs()?.filter_map(|interface| {
        let address = interface.address?;
        let ip = address
            .as_sockaddr_in()
            .map(|address| IpAddr::V4(address.ip()))
            .or_else(|| {
                address
                    .as_sockaddr_in6()
                    .map(|address| IpAddr::V6(address.ip()))
            })?;
        let is_local = match ip {
            IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local(),
            IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local(),
        };
        (!is_local).then_some((interface.interface_name, ip))
    });
    let mut addresses: Vec<(String, IpAddr)> = addresses.collect();
    addresses.sort_by_key(|(_, ip)| deprecated.contains(ip));
    Ok(addresses)
}

/// The deprecated addresses among those that the kernel lists: address, index, length of the prefix,
/// scope, flags, all hexadecimal, and the interface's name.
fn deprecated(listed: &str) -> HashSet<IpAddr> {
    /// include/uapi/linux/if_addr.h
    const IFA_F_DEPRECATED: u32 = 0x20;
    let address = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let address = u128::from_str_radix(words.next()?, 16).ok()?;
        let flags = u32::from_str_radix(words.nth(3)?, 16).ok()?;
        (flags & IFA_F_DEPRECATED != 0).then(|| Ipv6Addr::from_bits(address).into())
    };
    listed.lines().filter_map(address).collect()
}

/// The address of a family that stands for this node: the first that its object names; without
/// one the last choice for as long as the node has it, whatever addresses come and go beside it.
pub fn choose(
    family: Family,
    named: &[IpAddr],
    detected: &[IpAddr],
    last: &[IpAddr],
) -> Option<IpAddr> {
    let is_kept = |ip: &&IpAddr| last.contains(ip);
    let kept = detected.iter().filter(is_kept);
    let mut all = named.iter().chain(kept).chain(detected);
    all.find(|ip| Family::of(**ip) == family).copied()
}

/// Looks into a namespace, on a thread of its own that ends with it.
pub fn identify(namespace: File) -> io::Result<Identity> {
    std::thread::Builder::new()
        .name("netns".to_owned())
        .spawn(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET)?;
            own()
        })?
        .join()
        .unwrap_or_else(|_| {
            Err(io::Error::other(
                "the thread that entered the namespace died",
            ))
        })
}

/// Where namespaces are that this namespace knows by an id (IFLA_LINK_NETNSID), as far as it was
/// asked: to ask the kernel about each of them for each new pod would take longer the more there are.
#[derive(Debug, Default)]
pub struct Namespaces {
    /// Ids by device and inode. A file that is gone may have given its inode to another, so what is
    /// remembered is only where to look first.
    ids: HashMap<(u64, u64), i32>,
    /// Files to look at before any others.
    hints: Vec<PathBuf>,
}

impl Namespaces {
    /// Says where the next search should begin.
    pub fn hint(&mut self, paths: impl Iterator<Item = PathBuf>) {
        self.hints.clear();
        self.hints.extend(paths);
    }

    /// Looks for these ids.
    pub async fn find(
        &mut self,
        handle: &rtnetlink::Handle,
        wanted: &HashSet<i32>,
    ) -> HashMap<i32, PathBuf> {
        let mut found = HashMap::new();
        let mut present = HashSet::new();
        let mut others = Vec::new();
        let hints = std::mem::take(&mut self.hints);
        for path in hints.into_iter().chain(candidates()) {
            if found.len() == wanted.len() {
                // What was not come to is no reason to forget it.
                return found;
            }
            let Ok(metadata) = fs::metadata(&path) else {
                continue;
            };
            let file = (metadata.dev(), metadata.ino());
            if !present.insert(file) {
                continue;
            }
            match self.ids.get(&file) {
                Some(id) if !wanted.contains(id) => others.push((path, file)),
                _ => self.ask(handle, path, file, wanted, &mut found).await,
            }
        }
        for (path, file) in others {
            if found.len() == wanted.len() {
                break;
            }
            self.ask(handle, path, file, wanted, &mut found).await;
        }
        self.ids.retain(|file, _| present.contains(file));
        found
    }

    async fn ask(
        &mut self,
        handle: &rtnetlink::Handle,
        path: PathBuf,
        file: (u64, u64),
        wanted: &HashSet<i32>,
        found: &mut HashMap<i32, PathBuf>,
    ) {
        let Ok(namespace) = File::open(&path) else {
            return;
        };
        match id_of(handle, &namespace).await {
            Some(id) => {
                self.ids.insert(file, id);
                if wanted.contains(&id) {
                    found.entry(id).or_insert(path);
                }
            }
            // It may get one yet.
            None => drop(self.ids.remove(&file)),
        }
    }
}

/// Files that may be network namespaces: bind mounts first, since they outlive processes. Each
/// folder is only read when it is come to.
fn candidates() -> impl Iterator<Item = PathBuf> {
    let entries = |folder| fs::read_dir(folder).into_iter().flatten().flatten();
    let mounts = ["/run/netns", "/var/run/netns"].into_iter();
    let mounts = mounts.flat_map(entries).map(|entry| entry.path());
    let processes = std::iter::once("/proc").flat_map(entries);
    let processes = processes
        .filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok())
        .map(|entry| entry.path().join("ns/net"));
    mounts.chain(processes)
}

/// The id of an open namespace, if this one has given it one.
async fn id_of(handle: &rtnetlink::Handle, namespace: &File) -> Option<i32> {
    let mut request = NsidMessage::default();
    request
        .attributes
        .push(NsidAttribute::Fd(namespace.as_raw_fd() as u32));
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::GetNsId(request));
    message.header.flags = NLM_F_REQUEST;
    let mut handle = handle.clone();
    let mut answers = handle.request(message).ok()?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNsId(answer)) = answer.payload {
            return answer
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    NsidAttribute::Id(id) if *id >= 0 => Some(*id),
                    _ => None,
                });
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_comes_does_not_become_the_nodes() {
        let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
        let (own, other) = (ip("172.18.0.2"), ip("10.96.0.1"));
        let first = choose(Family::V4, &[], &[own], &[]);
        assert_eq!(first, Some(own));
        assert_eq!(choose(Family::V4, &[], &[other, own], &[own]), Some(own));
        // What is gone is not kept, and what the Node object says comes first.
        assert_eq!(choose(Family::V4, &[], &[other], &[own]), Some(other));
        assert_eq!(
            choose(Family::V4, &[own], &[other, own], &[other]),
            Some(own)
        );
        assert_eq!(choose(Family::V6, &[own], &[other], &[own]), None);
    }
    #[test]
    fn deprecated_addresses_are_known_by_their_flags() {
        let listed = "\
            fd000031000000000000000000000101 02 40 00 a2     eth0\n\
            fd000031000000000000000000000011 02 40 00 82     eth0\n\
            00000000000000000000000000000001 01 80 10 80       lo\n";
        let expected = "fd00:31::101".parse().unwrap();
        assert_eq!(deprecated(listed), HashSet::from([expected]));
        assert!(deprecated("").is_empty());
    }
}
