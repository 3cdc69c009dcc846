//! Connects UDP sockets anew whose backend is gone, or whose frontend is another service's, without their
//! owners noticing.
//!
//! A connected UDP socket was translated once, when it connected. When its backend goes, the agent
//! takes a duplicate of the socket from the process that has it (pidfd_getfd, Linux 5.6) and
//! connects it to the service's address again: the socket's own cgroup's hook runs and picks a
//! live backend. The source port stays, and so does the socket.
#![expect(unsafe_code, reason = "pidfd_getfd has no safe wrapper here")]

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::Mutex,
};

use aya::maps::{Array, HashMap, Map, MapData};
use nix::sys::socket::{SockaddrStorage, connect, getpeername, getsockname, getsockopt, sockopt};
use penstock_common::{
    Addr, Backend, BackendFlags, ConnectedUdp, FrontendKey, SockEndpoint, V4, V6,
};

use crate::{
    attach::follow::lock,
    dataplane::{
        batch,
        pins::{PinError, Pins},
    },
    flows::owners::{Asked, Owners},
};

/// Linux 3.12 (include/uapi/asm-generic/socket.h).
const SO_COOKIE: libc::c_int = 57;

/// Of the kernel's uapi/linux/bpf.h: replace an element, and make none.
const BPF_EXIST: u64 = 2;

/// What a pass over the connected sockets did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Sockets that have a live backend now.
    pub moved: usize,
    /// Entries whose socket is gone or no longer connected to the service.
    pub forgotten: usize,
    /// Sockets that could not be connected anew: their service has no backend.
    pub waiting: usize,
    /// Sockets that could not be reached.
    pub failed: usize,
}

/// Looks after connected UDP sockets.
pub struct Resteer {
    sockets: Mutex<HashMap<MapData, u64, ConnectedUdp>>,
    /// The same map, for reading all of it at once.
    all_sockets: MapData,
    backends4: Array<MapData, Backend<V4>>,
    backends6: Array<MapData, Backend<V6>>,
    owners4: Owners<V4>,
    owners6: Owners<V6>,
}

/// Who has what sockets are connected to, of each family.
struct Asking<'a>(Asked<'a, V4>, Asked<'a, V6>);

impl Resteer {
    /// Opens the pinned maps.
    pub fn open(pins: &Pins) -> Result<Self, PinError> {
        let broken = |name| move |_| PinError::Missing { name };
        Ok(Self {
            sockets: HashMap::try_from(Map::HashMap(pins.map("CONNECTED_UDP")?))
                .map(Mutex::new)
                .map_err(broken("CONNECTED_UDP"))?,
            all_sockets: pins.map("CONNECTED_UDP")?,
            backends4: Array::try_from(Map::Array(pins.map("BACKENDS4")?))
                .map_err(broken("BACKENDS4"))?,
            backends6: Array::try_from(Map::Array(pins.map("BACKENDS6")?))
                .map_err(broken("BACKENDS6"))?,
            owners4: Owners::open(pins, ["FRONTENDS4", "BACKENDS4"])?,
            owners6: Owners::open(pins, ["FRONTENDS6", "BACKENDS6"])?,
        })
    }

    /// Connects every socket anew whose backend is gone, or whose frontend is another service's.
    pub fn pass(&self) -> io::Result<Report> {
        let mut report = Report::default();
        let entries = batch::lookup_all::<u64, ConnectedUdp>(self.sockets_fd(), 4_096)?;
        let mut asking = Asking(self.owners4.ask(), self.owners6.ask());
        let mut stale: Vec<(u64, ConnectedUdp)> = entries
            .into_iter()
            .filter(|(_, socket)| !self.is_right(socket, &mut asking))
            .collect();
        // The process that connected a socket nearly always still has it.
        stale.retain(|(cookie, socket)| {
            if socket.pid == 0 {
                return true;
            }
            match duplicate_of(socket.pid, *cookie) {
                Some(fd) => {
                    self.reconnect(*cookie, socket, socket.pid, &fd, &mut report);
                    false
                }
                None => true,
            }
        });
        if !stale.is_empty() {
            self.search(stale, &mut report);
        }
        Ok(report)
    }

    fn sockets_fd(&self) -> BorrowedFd<'_> {
        self.all_sockets.fd().as_fd()
    }

    /// Whether a socket's backend is there.
    fn is_live(&self, socket: &ConnectedUdp) -> bool {
        match socket.frontend.addr.to_mapped_v4() {
            Some(_) => backend_of(&self.backends4, socket).is_some(),
            None => backend_of(&self.backends6, socket).is_some(),
        }
    }

    /// Whether a socket has a backend that is there, of whoever has its frontend.
    fn is_right(&self, socket: &ConnectedUdp, Asking(v4, v6): &mut Asking<'_>) -> bool {
        let SockEndpoint {
            addr, port, proto, ..
        } = socket.frontend;
        let service = socket.service;
        match addr.to_mapped_v4() {
            Some(addr) => backend_of(&self.backends4, socket).is_some_and(|backend| {
                let frontend = FrontendKey::new(addr, port, proto);
                !v4.is_anothers(frontend, service, (backend.addr, backend.port))
            }),
            None => backend_of(&self.backends6, socket).is_some_and(|backend| {
                let frontend = FrontendKey::new(addr, port, proto);
                !v6.is_anothers(frontend, service, (backend.addr, backend.port))
            }),
        }
    }

    /// Finds sockets in whatever process has them.
    fn search(&self, mut wanted: Vec<(u64, ConnectedUdp)>, report: &mut Report) {
        let mut was_denied = false;
        for pid in processes() {
            if wanted.is_empty() {
                return;
            }
            let Some(pidfd) = open_process(pid) else {
                continue;
            };
            for number in sockets_of(pid) {
                let fd = match take(&pidfd, number) {
                    Ok(fd) => fd,
                    Err(error) => {
                        was_denied |= error.raw_os_error() == Some(libc::EPERM);
                        continue;
                    }
                };
                let Some(cookie) = cookie(&fd) else { continue };
                if let Some(at) = wanted.iter().position(|(wanted, _)| *wanted == cookie) {
                    let (cookie, socket) = wanted.swap_remove(at);
                    self.reconnect(cookie, &socket, pid, &fd, report);
                }
            }
        }
        if was_denied {
            report.failed += wanted.len();
            return;
        }
        // Nobody has them: they were closed while no hook was there to see it.
        let gone: Vec<u64> = wanted.into_iter().map(|(cookie, _)| cookie).collect();
        report.forgotten += gone.len();
        if let Err(stopped) = batch::delete(self.sockets_fd(), &gone) {
            tracing::warn!("forgetting closed UDP sockets: {}", stopped.source);
        }
    }

    /// Connects a socket anew that a process has.
    fn reconnect(
        &self,
        cookie: u64,
        socket: &ConnectedUdp,
        owner: u32,
        fd: &OwnedFd,
        report: &mut Report,
    ) {
        let peer: Option<SockaddrStorage> = getpeername(fd.as_raw_fd()).ok();
        let own: Option<SockaddrStorage> = getsockname(fd.as_raw_fd()).ok();
        let is_v6 = own.is_some_and(|own| own.as_sockaddr_in6().is_some());
        let frontend = address(&socket.frontend, is_v6);
        // No name shows what a refused one dialled; one that was connected elsewhere since is not listed.
        let was_refused = socket.backend == ConnectedUdp::NO_BACKEND
            && socket.generation == ConnectedUdp::REFUSED;
        let is_unchanged = peer.as_ref().and_then(peer_of).is_some_and(|peer| {
            // A socket without a backend kept the service's address itself.
            was_refused
                || peer == address(&socket.frontend, true)
                || peer == address(&socket.frontend, false)
        });
        if !is_unchanged {
            // Disconnected, or connected elsewhere, since.
            report.forgotten += 1;
            let _ = batch::delete(self.sockets_fd(), &[cookie]);
            return;
        }
        match connect(fd.as_raw_fd(), &SockaddrStorage::from(frontend)) {
            Ok(()) => match self.give_back(cookie, owner, false) {
                Some(now) if self.is_live(&now) => report.moved += 1,
                _ => report.waiting += 1,
            },
            Err(nix::errno::Errno::ECONNREFUSED | nix::errno::Errno::EHOSTUNREACH) => {
                self.give_back(cookie, owner, true);
                report.waiting += 1;
            }
            Err(error) => {
                report.failed += 1;
                tracing::warn!("connecting a UDP socket to {frontend} anew: {error}");
            }
        }
    }
}

impl Resteer {
    /// Notes that a socket is its owner's, and not this process's, which connected it last: who has it is
    /// looked for there first when it has to move again. What is known of it by now.
    fn give_back(&self, cookie: u64, owner: u32, was_refused: bool) -> Option<ConnectedUdp> {
        let mut sockets = lock(&self.sockets);
        let mut now = sockets.get(&cookie, 0).ok()?;
        now.pid = owner;
        if was_refused && now.backend == ConnectedUdp::NO_BACKEND {
            now.generation = ConnectedUdp::REFUSED;
        }
        // Where it was closed meanwhile nothing is to be noted.
        let _ = sockets.insert(cookie, now, BPF_EXIST);
        Some(now)
    }
}

/// A socket's backend, if that is there.
fn backend_of<A: Addr>(
    backends: &Array<MapData, Backend<A>>,
    socket: &ConnectedUdp,
) -> Option<Backend<A>>
where
    Backend<A>: aya::Pod,
{
    if socket.backend == ConnectedUdp::NO_BACKEND {
        return None;
    }
    let backend = backends.get(&socket.backend.0, 0).ok()?;
    backend
        .is(socket.generation, BackendFlags::LIVE)
        .then_some(backend)
}

fn peer_of(peer: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(peer) = peer.as_sockaddr_in() {
        return Some(SocketAddr::new(IpAddr::V4(peer.ip()), peer.port()));
    }
    let peer = peer.as_sockaddr_in6()?;
    Some(SocketAddr::new(IpAddr::V6(peer.ip()), peer.port()))
}

/// A frontend as a socket of a family names it.
fn address(frontend: &SockEndpoint, is_v6: bool) -> SocketAddr {
    let ip = match frontend.addr.to_mapped_v4() {
        Some(ip) if !is_v6 => IpAddr::V4(ip.into()),
        _ => IpAddr::V6(frontend.addr.into()),
    };
    SocketAddr::new(ip, frontend.port.to_host())
}

/// All processes that this one can see.
fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// The numbers of a process's descriptors that are sockets.
fn sockets_of(pid: u32) -> Vec<i32> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten();
    entries
        .filter(|entry| {
            fs::read_link(entry.path())
                .is_ok_and(|target| target.to_string_lossy().starts_with("socket:"))
        })
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// A duplicate of the socket with this cookie in a process.
fn duplicate_of(pid: u32, wanted: u64) -> Option<OwnedFd> {
    let pidfd = open_process(pid)?;
    sockets_of(pid)
        .into_iter()
        .filter_map(|number| take(&pidfd, number).ok())
        .find(|fd| cookie(fd) == Some(wanted))
}

fn open_process(pid: u32) -> Option<OwnedFd> {
    // SAFETY: the call takes plain numbers; what it returns is a new descriptor.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        (fd >= 0).then(|| OwnedFd::from_raw_fd(fd as i32))
    }
}

fn take(process: &OwnedFd, number: i32) -> io::Result<OwnedFd> {
    // SAFETY: as above.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0);
        if fd < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(OwnedFd::from_raw_fd(fd as i32))
        }
    }
}

/// A UDP socket's cookie.
fn cookie(fd: &OwnedFd) -> Option<u64> {
    getsockopt(fd, sockopt::SockType)
        .ok()
        .filter(|kind| *kind == nix::sys::socket::SockType::Datagram)?;
    crate::attach::socket_option(fd.as_fd(), SO_COOKIE).ok()
}
