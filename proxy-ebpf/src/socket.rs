//! Translation at the socket: a service's address is replaced when a socket connects, or for each
//! datagram of an unconnected one, so that packets need none.
//!
//! Invariant: what an application sees is the service's address, as peer and as source; a UDP
//! socket is either remembered, so that the agent can connect it anew when its backend goes, or
//! chooses a live backend for each datagram.

use penstock_common::{
    Addr, AddressKind, BackendFlags, Be16, ConnectedUdp, Counter, Datagram, DatagramKey, Frontend,
    FrontendKey, Netns, NetnsFlags, Proto, SockEndpoint, SocketPeer,
};

use crate::{
    env::Maps,
    family::Family,
    select::{self, Chosen, Origin},
};

/// What the system call does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Goes on, to whatever address the context holds by now.
    Proceed,
    /// Fails with this error number.
    Fail(i32),
}

/// Connection refused.
const ECONNREFUSED: i32 = 111;
/// No route to host: what was to be dropped, where no packet hook is there to drop it.
const EHOSTUNREACH: i32 = 113;

/// A socket in a system call, and what is remembered of sockets.
pub trait Socket {
    /// Its protocol.
    fn proto(&self) -> Proto;
    /// The port that the system call names.
    fn port(&self) -> Be16;
    /// Puts another address and port into the system call; IPv4 in mapped form.
    fn redirect(&mut self, to: &SockEndpoint);
    /// Its cookie.
    fn cookie(&self) -> u64;
    /// Its network namespace's cookie.
    fn netns_cookie(&self) -> u64;
    /// What is known of its network namespace.
    fn netns(&self, cookie: u64) -> Netns;
    /// Whether the calling process's cgroup opted out.
    fn is_excluded(&self) -> bool;
    /// The calling process.
    fn pid(&self) -> u32;
    /// What it was connected to; the default value for one that sends datagrams to services.
    fn peer(&self) -> Option<SocketPeer>;
    /// Remembers what it is connected to.
    fn set_peer(&self, peer: &SocketPeer);
    /// Forgets its peer and, for UDP, its place among the connected sockets.
    fn forget(&self);
    /// Remembers a connected UDP socket; false where there is no room.
    fn track(&self, connected: &ConnectedUdp) -> bool;
    /// The backend of a pair of socket and service.
    fn datagram(&self, key: &DatagramKey) -> Option<Datagram>;
    /// Remembers the backend of a pair of socket and service.
    fn set_datagram(&self, key: &DatagramKey, datagram: &Datagram);
    /// The service whose backend answers a socket.
    fn datagram_peer(&self, key: &DatagramKey) -> Option<SockEndpoint>;
    /// Remembers the service whose backend answers a socket.
    fn set_datagram_peer(&self, key: &DatagramKey, frontend: &SockEndpoint);
}

/// A frontend that a socket dials, and who dials.
struct Dialled<A> {
    endpoint: SockEndpoint,
    frontend: Frontend,
    netns: Netns,
    client: A,
}

/// What a system call's address turned out to be.
enum Target<A> {
    /// Nothing of ours.
    Other,
    /// A service's address at a port that it does not have.
    Undefined(Netns),
    /// A frontend.
    Frontend(Dialled<A>),
}

/// Looks up what `socket` dials.
#[inline(always)]
fn target<F: Family, M: Maps<F>>(socket: &impl Socket, maps: &M, addr: F::Addr) -> Target<F::Addr> {
    let proto = socket.proto();
    // Nowhere is here, as the kernel takes it too (ip_route_output_key_hash_rcu, tcp_v6_connect).
    let addr = if addr.is_unspecified() {
        F::LOOPBACK
    } else {
        addr
    };
    let Some(address) = maps.address(&addr) else {
        return Target::Other;
    };
    if !matches!(proto, Proto::TCP | Proto::UDP) {
        return Target::Other;
    }
    let cookie = socket.netns_cookie();
    let netns = socket.netns(cookie);
    if netns.flags & NetnsFlags::EXCLUDED != 0 || socket.is_excluded() {
        return Target::Other;
    }
    if address.kind == AddressKind::LOOPBACK && netns.flags & NetnsFlags::HOST == 0 {
        return Target::Other;
    }
    let Some(frontend) = maps.frontend(&FrontendKey::new(addr, socket.port(), proto)) else {
        return match address.kind {
            AddressKind::SERVICE => Target::Undefined(netns),
            _ => Target::Other,
        };
    };
    let known = F::of(netns.addr4, netns.addr6);
    let client = if known.is_unspecified() {
        F::Addr::from_cookie(cookie)
    } else {
        known
    };
    let endpoint = SockEndpoint::new(addr.mapped(), socket.port(), proto);
    Target::Frontend(Dialled {
        endpoint,
        frontend,
        netns,
        client,
    })
}

/// `connect(2)`.
#[inline(always)]
pub fn connect<F: Family, M: Maps<F>>(
    socket: &mut impl Socket,
    maps: &M,
    addr: F::Addr,
) -> Outcome {
    let dialled = match target::<F, M>(socket, maps, addr) {
        Target::Other => {
            socket.forget();
            return Outcome::Proceed;
        }
        Target::Undefined(netns) => {
            socket.forget();
            return refuse::<F, M>(socket, maps, &netns, Counter::UndefinedPort);
        }
        Target::Frontend(dialled) => dialled,
    };
    match select::backend(maps, &dialled.frontend, Origin::Cluster, dialled.client) {
        Ok(chosen) => connect_to::<F, M>(socket, maps, &dialled, &chosen),
        Err(reason) => {
            socket.forget();
            if socket.proto() == Proto::UDP {
                // Endpoints may come while the socket lives.
                socket.track(&ConnectedUdp {
                    frontend: dialled.endpoint,
                    service: dialled.frontend.service,
                    backend: ConnectedUdp::NO_BACKEND,
                    generation: 0,
                    pid: socket.pid(),
                });
                // Lets a later connect elsewhere find out that there is something to forget.
                socket.set_peer(&SocketPeer::default());
            }
            refuse::<F, M>(socket, maps, &dialled.netns, reason)
        }
    }
}

/// Connects a socket to its backend.
#[inline(always)]
fn connect_to<F: Family, M: Maps<F>>(
    socket: &mut impl Socket,
    maps: &M,
    dialled: &Dialled<F::Addr>,
    chosen: &Chosen<F::Addr>,
) -> Outcome {
    let backend = SockEndpoint::new(
        chosen.backend.addr.mapped(),
        chosen.backend.port,
        dialled.endpoint.proto,
    );
    if dialled.endpoint.proto == Proto::UDP {
        let is_tracked = socket.track(&ConnectedUdp {
            frontend: dialled.endpoint,
            service: dialled.frontend.service,
            backend: chosen.id,
            generation: chosen.backend.generation,
            pid: socket.pid(),
        });
        if !is_tracked {
            maps.count(Counter::ConnectedUdpUntracked);
            if dialled.netns.flags & NetnsFlags::HAS_POD_HOOK != 0 {
                socket.forget();
                return Outcome::Proceed;
            }
        }
    }
    // Atomic, so that it waits for all that was written before: the peer's place comes from memory.
    maps.count_connection(chosen.id, chosen.backend.generation, chosen.backend.service);
    socket.set_peer(&SocketPeer {
        frontend: dialled.endpoint,
        backend,
    });
    socket.redirect(&backend);
    maps.count(Counter::SocketConnect);
    Outcome::Proceed
}

/// `sendmsg(2)` of an unconnected UDP socket.
#[inline(always)]
pub fn send<F: Family, M: Maps<F>>(socket: &mut impl Socket, maps: &M, addr: F::Addr) -> Outcome {
    let dialled = match target::<F, M>(socket, maps, addr) {
        Target::Other => return Outcome::Proceed,
        Target::Undefined(netns) => {
            return refuse::<F, M>(socket, maps, &netns, Counter::UndefinedPort);
        }
        Target::Frontend(dialled) => dialled,
    };
    let cookie = socket.cookie();
    let key = DatagramKey::new(cookie, dialled.endpoint);
    let now = maps.now_secs();
    let kept = socket.datagram(&key).and_then(|datagram| {
        let idle = now.wrapping_sub(datagram.used_secs);
        let backend = maps.backend(datagram.backend)?;
        let is_same = backend.is(datagram.generation, BackendFlags::LIVE)
            && backend.service == dialled.frontend.service;
        (is_same && idle < maps.config().timeouts.udp_stream_secs).then_some((
            Chosen {
                id: datagram.backend,
                backend,
            },
            idle == 0,
        ))
    });
    let (chosen, is_fresh) = match kept {
        Some(kept) => kept,
        None => match select::backend(maps, &dialled.frontend, Origin::Cluster, dialled.client) {
            Ok(chosen) => {
                maps.count_connection(chosen.id, chosen.backend.generation, chosen.backend.service);
                (chosen, false)
            }
            Err(reason) => return refuse::<F, M>(socket, maps, &dialled.netns, reason),
        },
    };
    if !is_fresh {
        socket.set_datagram(
            &key,
            &Datagram {
                backend: chosen.id,
                generation: chosen.backend.generation,
                used_secs: now,
            },
        );
    }
    let backend = SockEndpoint::new(
        chosen.backend.addr.mapped(),
        chosen.backend.port,
        Proto::UDP,
    );
    let peer_key = DatagramKey::new(cookie, backend);
    if socket.datagram_peer(&peer_key) != Some(dialled.endpoint) {
        socket.set_datagram_peer(&peer_key, &dialled.endpoint);
    }
    if socket.peer().is_none() {
        socket.set_peer(&SocketPeer::default());
    }
    socket.redirect(&backend);
    maps.count(Counter::SocketDatagram);
    Outcome::Proceed
}

/// `recvmsg(2)` of a UDP socket: the sender is shown as the service.
#[inline(always)]
pub fn receive(socket: &mut impl Socket, from: SockEndpoint) {
    let Some(peer) = socket.peer() else { return };
    if peer.backend == from {
        socket.redirect(&peer.frontend);
    } else if let Some(frontend) = socket.datagram_peer(&DatagramKey::new(socket.cookie(), from)) {
        socket.redirect(&frontend);
    }
}

/// `getpeername(2)`: the peer is shown as the service.
#[inline(always)]
pub fn peer_name(socket: &mut impl Socket, name: SockEndpoint) {
    if let Some(peer) = socket.peer()
        && peer.backend == name
    {
        socket.redirect(&peer.frontend);
    }
}

/// Fails a system call, or leaves the refusal to the pod hook where that can do it as kube-proxy
/// does: an ICMP error that a UDP socket meets later, or silence. Where nobody knows the client's address,
/// whether it may come is left to who sees its packets: a pod hook that is there before its pod is known,
/// else the balancer that has the address.
#[inline(always)]
fn refuse<F: Family, M: Maps<F>>(
    socket: &impl Socket,
    maps: &M,
    netns: &Netns,
    reason: Counter,
) -> Outcome {
    let has_pod_hook = netns.flags & NetnsFlags::HAS_POD_HOOK != 0;
    let is_silent = matches!(reason, Counter::NoLocalEndpoints | Counter::SourceRefused);
    let is_known = !F::of(netns.addr4, netns.addr6).is_unspecified();
    if has_pod_hook && (socket.proto() == Proto::UDP || is_silent)
        || reason == Counter::SourceRefused && !is_known
    {
        return Outcome::Proceed;
    }
    maps.count(reason);
    maps.trace(reason, socket.proto(), socket.port().to_host());
    match reason {
        Counter::NoEndpoints | Counter::UndefinedPort => Outcome::Fail(ECONNREFUSED),
        _ => Outcome::Fail(EHOSTUNREACH),
    }
}
