//! Frames as somebody made them, sent by an interface.
#![expect(
    unsafe_code,
    reason = "no library here makes a link's address for a socket"
)]

use std::{
    fs::File,
    mem::size_of,
    os::fd::{AsRawFd, OwnedFd},
    thread,
};

use anyhow::{Context, Result, ensure};
use nix::{
    net::if_::if_nametoindex,
    sched::{CloneFlags, setns},
    sys::socket::{
        AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrLike, sendto, socket,
    },
};

use serde_json::Value;

use crate::host::Host;

impl Host {
    /// The Ethernet address of an interface of its own.
    pub fn ethernet(&self, interface: &str) -> Result<Vec<u8>> {
        let text = self.run("ip", &["-j", "link", "show", interface])?;
        let links: Value = serde_json::from_str(&text)?;
        let address = links.pointer("/0/address").and_then(Value::as_str);
        let octets = address.with_context(|| text.clone())?.split(':');
        octets
            .map(|octet| Ok(u8::from_str_radix(octet, 16)?))
            .collect()
    }

    /// Sends a frame by an interface of its own, from its Ethernet header on.
    pub fn send_frame(&self, interface: &str, frame: &[u8]) -> Result<()> {
        let path = &self.place.namespace;
        let namespace = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        let open = move || -> Result<(OwnedFd, u32)> {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            let flags = SockFlag::SOCK_CLOEXEC;
            let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)?;
            Ok((socket, if_nametoindex(interface)?))
        };
        let opened = thread::scope(|scope| scope.spawn(open).join());
        let (socket, index) =
            opened.map_err(|_| anyhow::anyhow!("opening a socket panicked"))??;
        let sent = sendto(socket.as_raw_fd(), frame, &link(index)?, MsgFlags::empty())?;
        ensure!(sent == frame.len(), "{sent} of {} octets", frame.len());
        Ok(())
    }
}

/// An interface, for a socket of packets. The frame says all else.
fn link(index: u32) -> Result<LinkAddr> {
    let address = libc::sockaddr_ll {
        sll_family: u16::try_from(libc::AF_PACKET)?,
        sll_protocol: 0,
        sll_ifindex: i32::try_from(index)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = u32::try_from(size_of::<libc::sockaddr_ll>())?;
    // SAFETY: the pointer is to an address of that family and length, which is copied.
    let link = unsafe { LinkAddr::from_raw(std::ptr::from_ref(&address).cast(), Some(length)) };
    link.context("a link's address")
}
