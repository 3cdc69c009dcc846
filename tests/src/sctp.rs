//! SCTP (RFC 9260) as far as a proxy sees it, by raw sockets: not every kernel has a module for it.

use std::{
    fs::File,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
    thread,
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, connect,
            recvfrom, sendto, setsockopt, socket, sockopt,
        },
        time::{TimeVal, TimeValLike},
    },
};

use crate::host::Host;

/// Types of a packet's first chunk (RFC 9260, 3.2).
pub mod chunk {
    /// Payload.
    pub const DATA: u8 = 0;
    /// Asks for an association.
    pub const INIT: u8 = 1;
    /// Agrees.
    pub const INIT_ACK: u8 = 2;
    /// Acknowledges payload.
    pub const SACK: u8 = 3;
    /// Breaks it off.
    pub const ABORT: u8 = 6;
    /// Ends it.
    pub const SHUTDOWN: u8 = 7;
    /// Agrees to that.
    pub const SHUTDOWN_ACK: u8 = 8;
    /// Shows that it was asked.
    pub const COOKIE_ECHO: u8 = 10;
    /// Begins it.
    pub const COOKIE_ACK: u8 = 11;
    /// It is over.
    pub const SHUTDOWN_COMPLETE: u8 = 14;
}

/// How long a packet may take.
const PATIENCE: i64 = 2_000;
/// The common header's length, and a chunk's.
const HEADERS: usize = 16;

/// What a packet's checksum is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// As it has to be.
    Right,
    /// Zero: an interface's to complete.
    LeftOpen,
    /// Anything else.
    Wrong,
}

/// A packet that has arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SctpPacket {
    /// Who seems to have sent it.
    pub from: SocketAddr,
    /// The type of its first chunk.
    pub chunk: u8,
    /// What follows the chunk's header.
    pub payload: Vec<u8>,
    /// Whether its checksum is right.
    pub checksum: Checksum,
}

/// One end of associations: a port of a host's, in one family.
pub struct SctpEnd {
    socket: OwnedFd,
    /// Its address and port.
    pub own: SocketAddr,
}

/// CRC32c (RFC 9260, appendix A), bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut sum = u32::MAX;
    for byte in bytes {
        sum ^= u32::from(*byte);
        for _ in 0..8 {
            sum = (sum >> 1) ^ if sum & 1 == 0 { 0 } else { 0x82f6_3b78 };
        }
    }
    !sum
}

impl SctpEnd {
    /// A port of a host's.
    pub fn new(host: &Host, is_v4: bool, port: u16) -> Result<Self> {
        let ip = if is_v4 { host.ip4 } else { host.ip6 };
        let path = &host.place.namespace;
        let namespace = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        let family = if is_v4 {
            AddressFamily::Inet
        } else {
            AddressFamily::Inet6
        };
        let open = move || -> Result<OwnedFd> {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            let flags = SockFlag::SOCK_CLOEXEC;
            let socket = socket(family, SockType::Raw, flags, SockProtocol::Sctp)?;
            setsockopt(
                &socket,
                sockopt::ReceiveTimeout,
                &TimeVal::milliseconds(PATIENCE),
            )?;
            Ok(socket)
        };
        let opened = thread::scope(|scope| scope.spawn(open).join());
        let socket = opened.map_err(|_| anyhow::anyhow!("opening a socket panicked"))??;
        Ok(Self {
            socket,
            own: SocketAddr::new(ip, port),
        })
    }

    /// Sends a packet with one chunk. With a checksum that is left open it is as sockets of the
    /// kernel's send it by interfaces that complete it.
    pub fn send(
        &self,
        to: SocketAddr,
        chunk: u8,
        payload: &[u8],
        is_left_open: bool,
    ) -> Result<()> {
        let mut packet = Vec::with_capacity(HEADERS + payload.len());
        packet.extend(self.own.port().to_be_bytes());
        packet.extend(to.port().to_be_bytes());
        packet.extend([0xa5, 0x5a, 1, 2, 0, 0, 0, 0, chunk, 0]);
        packet.extend(((4 + payload.len()) as u16).to_be_bytes());
        packet.extend(payload);
        if !is_left_open {
            let checksum = crc32c(&packet).to_le_bytes();
            packet.splice(8..12, checksum);
        }
        let to = storage(to.ip());
        let sent = sendto(self.socket.as_raw_fd(), &packet, &to, MsgFlags::empty())?;
        ensure!(sent == packet.len(), "{sent} bytes of {}", packet.len());
        Ok(())
    }

    /// Takes errors about packets to an address for errors of this socket.
    pub fn connect(&self, to: IpAddr) -> Result<()> {
        Ok(connect(self.socket.as_raw_fd(), &storage(to))?)
    }

    /// The next packet for this port; none where none comes in time.
    pub fn receive(&self) -> Result<Option<SctpPacket>> {
        let mut buffer = [0; 65_536];
        loop {
            let (length, from) =
                match recvfrom::<SockaddrStorage>(self.socket.as_raw_fd(), &mut buffer) {
                    Err(Errno::EAGAIN) => return Ok(None),
                    received => received?,
                };
            let ip: IpAddr = match from {
                Some(from) if self.own.is_ipv4() => from.as_sockaddr_in().map(|ip| ip.ip().into()),
                Some(from) => from.as_sockaddr_in6().map(|ip| ip.ip().into()),
                None => None,
            }
            .context("a packet without a sender")?;
            let received = buffer.get(..length).unwrap_or_default();
            // IPv4's raw sockets show the IP header.
            let words = received.first().map_or(0, |first| first & 15);
            let skip = if self.own.is_ipv4() {
                usize::from(words) * 4
            } else {
                0
            };
            let packet = received.get(skip..).unwrap_or_default();
            let (Some(header), Some(payload)) =
                (packet.first_chunk::<HEADERS>(), packet.get(HEADERS..))
            else {
                continue;
            };
            let [s0, s1, d0, d1, _, _, _, _, c0, c1, c2, c3, chunk, ..] = *header;
            if u16::from_be_bytes([d0, d1]) != self.own.port() {
                continue;
            }
            let stored = u32::from_le_bytes([c0, c1, c2, c3]);
            let mut zeroed = packet.to_vec();
            zeroed.splice(8..12, [0; 4]);
            let checksum = match stored {
                0 => Checksum::LeftOpen,
                stored if stored == crc32c(&zeroed) => Checksum::Right,
                _ => Checksum::Wrong,
            };
            return Ok(Some(SctpPacket {
                from: SocketAddr::new(ip, u16::from_be_bytes([s0, s1])),
                chunk,
                payload: payload.to_vec(),
                checksum,
            }));
        }
    }

    /// Sends a packet to an address, by which it has to reach the other end as it was; whom that
    /// end takes for its sender.
    pub fn reaches(
        &self,
        to: SocketAddr,
        other: &Self,
        chunk: u8,
        payload: &[u8],
        checksum: Checksum,
    ) -> Result<SocketAddr> {
        self.send(to, chunk, payload, checksum == Checksum::LeftOpen)?;
        let received = other.receive()?;
        let received = received.with_context(|| format!("chunk {chunk} to {to} is lost"))?;
        ensure!(
            received
                == SctpPacket {
                    chunk,
                    payload: payload.to_vec(),
                    checksum,
                    from: received.from
                },
            "{chunk} of {} bytes to {to}: {received:?}",
            payload.len()
        );
        Ok(received.from)
    }
}

fn storage(ip: IpAddr) -> SockaddrStorage {
    SockaddrStorage::from(SocketAddr::new(ip, 0))
}
