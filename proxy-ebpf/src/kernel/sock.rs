//! [`Socket`] for the contexts of the cgroup hooks.
#![expect(unsafe_code, reason = "contexts and socket storage are kernel memory")]

use core::{
    intrinsics::{AtomicOrdering, atomic_cxchg},
    ptr::{addr_of, addr_of_mut},
};

use aya_ebpf::{
    Global,
    bindings::bpf_sock_addr,
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_pid_tgid, bpf_get_netns_cookie,
        bpf_get_socket_cookie, bpf_set_retval, bpf_sk_storage_delete,
    },
    programs::{SockAddrContext, SockContext},
};
use penstock_common::{
    Be16, ConnectedUdp, Counter, Datagram, DatagramKey, Netns, Proto, SockEndpoint, SocketPeer,
    TcpPeer, V4, V6, limits,
};
use penstock_ebpf::{env::Env, socket::Socket};

use super::{env::Kernel, maps::*};

/// 1 where the kernel lets these hooks choose an error number and name the calling process
/// (Linux 6.1); set by the agent before it loads.
#[unsafe(no_mangle)]
pub(crate) static HAS_SET_RETVAL: Global<u8> = Global::new(0);

/// A socket in an IPv4 or IPv6 hook.
pub(crate) struct HookSocket<'a> {
    context: &'a SockAddrContext,
    is_v6: bool,
}

impl<'a> HookSocket<'a> {
    /// The socket of an IPv4 hook.
    #[inline(always)]
    pub(crate) fn v4(context: &'a SockAddrContext) -> Self {
        Self {
            context,
            is_v6: false,
        }
    }

    /// The socket of an IPv6 hook, which may talk IPv4.
    #[inline(always)]
    pub(crate) fn v6(context: &'a SockAddrContext) -> Self {
        Self {
            context,
            is_v6: true,
        }
    }

    #[inline(always)]
    fn raw(&self) -> *mut bpf_sock_addr {
        self.context.sock_addr
    }

    /// The address that the system call names, in an IPv4 hook.
    #[inline(always)]
    pub(crate) fn addr4(&self) -> V4 {
        // SAFETY: a field of the program's own context.
        V4::from_raw(unsafe { addr_of!((*self.raw()).user_ip4).read_volatile() })
    }

    /// The address that the system call names, in an IPv6 hook.
    #[inline(always)]
    pub(crate) fn addr6(&self) -> V6 {
        let word = |index| {
            // SAFETY: as above; the kernel wants the words read one by one, which volatile keeps.
            unsafe {
                addr_of!((*self.raw()).user_ip6)
                    .cast::<u32>()
                    .add(index)
                    .read_volatile()
            }
        };
        V6::from_raw([word(0), word(1), word(2), word(3)])
    }

    /// The named address and port.
    #[inline(always)]
    pub(crate) fn named(&self) -> SockEndpoint {
        let addr = if self.is_v6 {
            self.addr6()
        } else {
            penstock_common::Addr::mapped(&self.addr4())
        };
        SockEndpoint::new(addr, self.port(), self.proto())
    }

    /// Makes the system call fail with an error number, or with EPERM before Linux 6.1.
    #[inline(always)]
    pub(crate) fn fail(&self, errno: i32) -> i32 {
        if HAS_SET_RETVAL.load() != 0 {
            // SAFETY: the helper takes a plain number.
            unsafe { bpf_set_retval(-errno) };
        }
        0
    }
}

/// The place in `TCP_PEERS` of the socket with a cookie.
#[inline(always)]
fn place(cookie: u64) -> Option<*mut TcpPeer> {
    TCP_PEERS.get_ptr_mut(cookie as u32 % limits::TCP_PEERS)
}

/// Gives a place from one cookie to another, if that one has it.
#[inline(always)]
fn pass_on(place: *mut TcpPeer, from: u64, to: u64) -> bool {
    // SAFETY: a mapped element's first field, an aligned word that everybody changes atomically.
    unsafe {
        atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(
            addr_of_mut!((*place).cookie),
            from,
            to,
        )
        .1
    }
}

/// The cookie that has a place.
#[inline(always)]
fn holder(place: *mut TcpPeer) -> u64 {
    // SAFETY: as above.
    unsafe { addr_of!((*place).cookie).read_volatile() }
}

impl HookSocket<'_> {
    /// This socket's place in `TCP_PEERS`, if it is one for TCP and has it.
    #[inline(always)]
    fn own_place(&self) -> Option<(u64, *mut TcpPeer)> {
        if self.proto() != Proto::TCP {
            return None;
        }
        let cookie = self.cookie();
        let place = place(cookie)?;
        (holder(place) == cookie).then_some((cookie, place))
    }

    /// Its own storage, null where it has none.
    #[inline(always)]
    fn storage(&self) -> *mut SocketPeer {
        // SAFETY: the storage belongs to this context's socket, which lives while the program runs.
        unsafe { SOCKETS.get_ptr_mut(self.context) }
    }
}

impl Socket for HookSocket<'_> {
    #[inline(always)]
    fn proto(&self) -> Proto {
        // SAFETY: a field of the program's own context.
        Proto(unsafe { addr_of!((*self.raw()).protocol).read_volatile() } as u8)
    }

    #[inline(always)]
    fn port(&self) -> Be16 {
        // SAFETY: as above; the low half holds the port in network order.
        Be16::from_raw(unsafe { addr_of!((*self.raw()).user_port).read_volatile() } as u16)
    }

    #[inline(always)]
    fn redirect(&mut self, to: &SockEndpoint) {
        let [a, b, c, d] = to.addr.raw();
        // SAFETY: fields of the program's own context that these hooks may write; volatile, since
        // the verifier refuses stores that the compiler joined.
        unsafe {
            if self.is_v6 {
                let words = addr_of_mut!((*self.raw()).user_ip6).cast::<u32>();
                words.write_volatile(a);
                words.add(1).write_volatile(b);
                words.add(2).write_volatile(c);
                words.add(3).write_volatile(d);
            } else {
                addr_of_mut!((*self.raw()).user_ip4).write_volatile(d);
            }
            addr_of_mut!((*self.raw()).user_port).write_volatile(u32::from(to.port.raw()));
        }
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        // SAFETY: the context is the one that the kernel called this program with.
        unsafe { bpf_get_socket_cookie(self.raw().cast()) }
    }

    #[inline(always)]
    fn netns_cookie(&self) -> u64 {
        // SAFETY: as above.
        unsafe { bpf_get_netns_cookie(self.raw().cast()) }
    }

    #[inline(always)]
    fn netns(&self, cookie: u64) -> Netns {
        // SAFETY: a mapped element; the copy is volatile and any bytes are a `Netns`.
        NETNS
            .get_ptr(cookie)
            .map(|netns| unsafe { netns.read_volatile() })
            .unwrap_or_default()
    }

    #[inline(always)]
    fn is_excluded(&self) -> bool {
        if (Kernel {
            context: self.context,
        })
        .config()
        .excluded_cgroups
            == 0
        {
            return false;
        }
        let mut level = 1;
        while level <= limits::CGROUP_DEPTH {
            // SAFETY: the helper takes a plain number; 0 says that there is no such ancestor.
            let id = unsafe { bpf_get_current_ancestor_cgroup_id(level as i32) };
            if id == 0 {
                return false;
            }
            if EXCLUDED_CGROUPS.get_ptr(id).is_some() {
                return true;
            }
            level += 1;
        }
        false
    }

    #[inline(always)]
    fn pid(&self) -> u32 {
        if HAS_SET_RETVAL.load() == 0 {
            return 0;
        }
        // SAFETY: the helper takes no argument.
        let both = unsafe { bpf_get_current_pid_tgid() };
        (both >> 32) as u32
    }

    #[inline(always)]
    fn peer(&self) -> Option<SocketPeer> {
        if let Some((_, place)) = self.own_place() {
            // SAFETY: a mapped element that this socket has; the copy is volatile and any bytes are
            // a `SocketPeer`.
            return Some(unsafe { addr_of!((*place).peer).read_volatile() });
        }
        let peer = self.storage();
        // SAFETY: this socket's storage; the copy is volatile and any bytes are a `SocketPeer`.
        (!peer.is_null()).then(|| unsafe { peer.read_volatile() })
    }

    #[inline(always)]
    fn set_peer(&self, peer: &SocketPeer) {
        if self.proto() == Proto::TCP {
            let cookie = self.cookie();
            if let Some(place) = place(cookie)
                && (holder(place) == cookie || pass_on(place, 0, cookie))
            {
                // SAFETY: a mapped element that is this socket's, which system calls lock.
                unsafe { addr_of_mut!((*place).peer).write_volatile(*peer) };
                return;
            }
        }
        // SAFETY: the storage of this context's socket, as `storage` says.
        unsafe {
            let stored = SOCKETS.get_or_insert_ptr_mut(self.context, None);
            if !stored.is_null() {
                stored.write_volatile(*peer);
                return;
            }
        }
        // The application sees the backend's address: there is no memory, or, from Linux 7.2 on, the
        // processor has no cmpxchg16b.
        let kernel = Kernel {
            context: self.context,
        };
        kernel.count(Counter::PeerForgotten);
    }

    #[inline(always)]
    fn forget(&self) {
        if let Some((cookie, place)) = self.own_place() {
            pass_on(place, cookie, 0);
            return;
        }
        if self.storage().is_null() {
            return;
        }
        // SAFETY: `sk` is the context's own socket, which lives while the program runs.
        unsafe {
            let sk = (*self.raw()).__bindgen_anon_1.sk;
            bpf_sk_storage_delete((&raw const SOCKETS).cast_mut().cast(), sk.cast());
        }
        if self.proto() == Proto::UDP {
            // Absent is as good as removed.
            let _ = CONNECTED_UDP.remove(self.cookie());
        }
    }

    #[inline(always)]
    fn track(&self, connected: &ConnectedUdp) -> bool {
        CONNECTED_UDP.insert(self.cookie(), connected, 0).is_ok()
    }

    #[inline(always)]
    fn datagram(&self, key: &DatagramKey) -> Option<Datagram> {
        // SAFETY: a mapped element; the copy is volatile and any bytes are a `Datagram`.
        DATAGRAMS
            .get_ptr(key)
            .map(|datagram| unsafe { datagram.read_volatile() })
    }

    #[inline(always)]
    fn set_datagram(&self, key: &DatagramKey, datagram: &Datagram) {
        match DATAGRAMS.get_ptr_mut(key) {
            // SAFETY: a mapped element; a torn one names a backend whose generation and service
            // are compared before it is believed.
            Some(known) => unsafe { known.write_volatile(*datagram) },
            // Without room the next datagram chooses anew.
            None => {
                let _ = DATAGRAMS.insert(key, datagram, 0);
            }
        }
    }

    #[inline(always)]
    fn datagram_peer(&self, key: &DatagramKey) -> Option<SockEndpoint> {
        // SAFETY: a mapped element; the copy is volatile and any bytes are a `SockEndpoint`.
        DATAGRAM_PEERS
            .get_ptr(key)
            .map(|frontend| unsafe { frontend.read_volatile() })
    }

    #[inline(always)]
    fn set_datagram_peer(&self, key: &DatagramKey, frontend: &SockEndpoint) {
        // Without room the application sees the backend's address.
        let _ = DATAGRAM_PEERS.insert(key, frontend, 0);
    }
}

/// Forgets a socket that is gone.
///
/// The kernel's own sockets go without a word: a place that one had stays taken.
#[inline(always)]
pub(crate) fn released(context: &SockContext) {
    // SAFETY: a field of the program's own context.
    let proto = Proto(unsafe { addr_of!((*context.sock).protocol).read_volatile() } as u8);
    if !matches!(proto, Proto::TCP | Proto::UDP) {
        return;
    }
    // SAFETY: the context is the one that the kernel called this program with.
    let cookie = unsafe { bpf_get_socket_cookie(context.sock.cast()) };
    if proto == Proto::UDP {
        // Absent is as good as removed.
        let _ = CONNECTED_UDP.remove(cookie);
    } else if let Some(place) = place(cookie)
        && holder(place) == cookie
    {
        pass_on(place, cookie, 0);
    }
}
