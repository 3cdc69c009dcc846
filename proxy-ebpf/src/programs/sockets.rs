//! The programs at sockets.

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr},
    programs::{SockAddrContext, SockContext},
};
use penstock_common::{V4, V6};
use penstock_ebpf::socket::{self, Outcome};

use crate::kernel::{env::Kernel, sock::HookSocket};

/// What a socket hook does with an outcome.
#[inline(always)]
fn allow(socket: &HookSocket<'_>, outcome: Outcome) -> i32 {
    match outcome {
        Outcome::Proceed => 1,
        Outcome::Fail(errno) => socket.fail(errno),
    }
}

/// connect(2) of an IPv4 socket.
#[cgroup_sock_addr(connect4)]
pub(crate) fn connect4(context: SockAddrContext) -> i32 {
    let mut socket = HookSocket::v4(&context);
    let addr = socket.addr4();
    let outcome = socket::connect::<V4, _>(&mut socket, &Kernel { context: &context }, addr);
    allow(&socket, outcome)
}

/// connect(2) of an IPv6 socket, to either family.
#[cgroup_sock_addr(connect6)]
pub(crate) fn connect6(context: SockAddrContext) -> i32 {
    let mut socket = HookSocket::v6(&context);
    let kernel = Kernel { context: &context };
    let addr = socket.addr6();
    let outcome = match addr.to_mapped_v4() {
        Some(addr) => socket::connect::<V4, _>(&mut socket, &kernel, addr),
        None => socket::connect::<V6, _>(&mut socket, &kernel, addr),
    };
    allow(&socket, outcome)
}

/// sendmsg(2) of an unconnected IPv4 UDP socket.
#[cgroup_sock_addr(sendmsg4)]
pub(crate) fn sendmsg4(context: SockAddrContext) -> i32 {
    let mut socket = HookSocket::v4(&context);
    let addr = socket.addr4();
    let outcome = socket::send::<V4, _>(&mut socket, &Kernel { context: &context }, addr);
    allow(&socket, outcome)
}

/// sendmsg(2) of an unconnected IPv6 UDP socket, to either family.
#[cgroup_sock_addr(sendmsg6)]
pub(crate) fn sendmsg6(context: SockAddrContext) -> i32 {
    let mut socket = HookSocket::v6(&context);
    let kernel = Kernel { context: &context };
    let addr = socket.addr6();
    let outcome = match addr.to_mapped_v4() {
        Some(addr) => socket::send::<V4, _>(&mut socket, &kernel, addr),
        None => socket::send::<V6, _>(&mut socket, &kernel, addr),
    };
    allow(&socket, outcome)
}

/// recvmsg(2) of an IPv4 UDP socket.
#[cgroup_sock_addr(recvmsg4)]
pub(crate) fn recvmsg4(context: SockAddrContext) -> i32 {
    let mut socket = HookSocket::v4(&context);
    let from = socket.named();
    socket::receive(&mut socket, from);
    1
}

/// recvmsg(2) of an IPv6 UDP socket.
#[cgroup_sock_addr(recvmsg6)]
pub(crate) fn recvmsg6(context: SockAddrContext) -> i32 {
    let mut socket = HookSocket::v6(&context);
    let from = socket.named();
    socket::receive(&mut socket, from);
    1
}

/// getpeername(2) of an IPv4 socket.
#[cgroup_sock_addr(getpeername4)]
pub(crate) fn getpeername4(context: SockAddrContext) -> i32 {
    let mut socket = HookSocket::v4(&context);
    let name = socket.named();
    socket::peer_name(&mut socket, name);
    1
}

/// getpeername(2) of an IPv6 socket.
#[cgroup_sock_addr(getpeername6)]
pub(crate) fn getpeername6(context: SockAddrContext) -> i32 {
    let mut socket = HookSocket::v6(&context);
    let name = socket.named();
    socket::peer_name(&mut socket, name);
    1
}

/// The last close of a socket.
#[cgroup_sock(sock_release)]
pub(crate) fn sock_release(context: SockContext) -> i32 {
    crate::kernel::sock::released(&context);
    1
}
