//! A frame in the kernel's hands.

use penstock_common::{Plain, Vtep};

use crate::checksum::Delta;

/// The kernel refused to change a packet.
#[derive(Clone, Copy, Debug)]
pub struct Refused;

/// Which change of a transport checksum the kernel must be told about.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Covers {
    /// The pseudo header: also part of a checksum that the kernel has yet to complete.
    PseudoHeader,
    /// The segment itself: a checksum that the kernel has yet to complete takes it up by itself.
    Segment,
}

/// How a changed transport checksum treats zero.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Zero {
    /// As any other number.
    Plain,
    /// Zero means "none", stays zero and never arises (UDP; RFC 768).
    MeansNone,
}

/// A frame. Offsets count from its first byte.
pub trait Packet {
    /// The value at `at`, or `None` beyond the end of the frame.
    fn load<T: Plain>(&self, at: usize) -> Option<T>;

    /// Replaces the value at `at`.
    fn store<T: Plain>(&mut self, at: usize, value: &T) -> Result<(), Refused>;

    /// Replaces an address that no header checksum covers (IPv6).
    fn store_uncovered<T: Plain>(&mut self, at: usize, value: &T) -> Result<(), Refused>;

    /// Changes an IPv4 header's checksum at `at`.
    fn change_header_checksum(&mut self, at: usize, delta: Delta) -> Result<(), Refused>;

    /// Changes a transport checksum at `at`.
    fn change_checksum(
        &mut self,
        at: usize,
        delta: Delta,
        covers: Covers,
        zero: Zero,
    ) -> Result<(), Refused>;

    /// [`crate::family::extensions`], by a function of its own, so that the kernel checks it once.
    fn extensions(&self, at: usize) -> u64;

    /// [`crate::sctp::change`], by a function of its own, so that the kernel checks it once.
    fn checksum_change(&self, difference: u32, length: u32) -> u32;

    /// The index of the interface at whose hook the frame is.
    fn ifindex(&self) -> u32;

    /// Whether the frame is another host's: a bridge shows everybody what it has no place for.
    fn is_for_another_host(&self) -> bool;

    /// Whether the frame, or every segment that it will be cut into, fits into `mtu` bytes without
    /// the Ethernet header; an interface with this MTU says so where it is not obvious.
    fn fits(&self, ifindex: u32, mtu: u32) -> bool;

    /// The same by the MTU of the interface alone.
    #[inline(always)]
    fn fits_link(&self, _ifindex: u32) -> bool {
        true
    }

    /// Whether the frame is several that were joined, or are yet to be cut apart.
    fn is_joined(&self) -> bool;

    /// Whether the frame came with the tag of a VLAN, which is no longer among its bytes.
    fn is_tagged(&self) -> bool;

    /// Takes a tag away that names no VLAN but a priority (IEEE 802.1Q, 6.9): nobody else looks at it,
    /// and it would go on with the frame.
    fn forget_priority(&mut self);

    /// Makes as many first bytes readable, if the frame has them.
    fn reach(&mut self, length: usize);

    /// Takes a tunnel's headers away, which are this many bytes after the Ethernet header, from around
    /// a packet of this type. Nothing is changed where that is refused.
    fn unwrap(&mut self, length: usize, ethertype: u16) -> Result<(), Refused>;

    /// The frame's length.
    fn length(&self) -> usize;

    /// Takes as many bytes away from the frame's beginning, or has it begin earlier if there are fewer
    /// than none. What was taken away comes back as it was.
    fn shift(&mut self, by: i32) -> Result<(), Refused>;

    /// Puts a packet of this type into the tunnel that leads to its destination
    /// ([`crate::xdp::overlay`]), by functions of their own.
    fn enclose(&mut self, ethertype: u16) -> Result<(), Refused>;

    /// Makes the frame `length` bytes long.
    fn resize(&mut self, length: u32) -> Result<(), Refused>;

    /// Where a frame that came through a tunnel was sent from.
    #[inline(always)]
    fn tunnel_source(&self) -> Option<Vtep> {
        None
    }

    /// The network identifier of the tunnel that a frame came through (RFC 7348, 5).
    #[inline(always)]
    fn tunnel_network(&self) -> Option<u32> {
        None
    }

    /// Takes the frame for this host's, whatever its Ethernet address says.
    fn take_in(&mut self) -> Result<(), Refused>;
}
