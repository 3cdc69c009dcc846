//! Addresses, ports and protocols as they lie in packets.
//!
//! Invariant: a value of these types is in network byte order; a bare integer is in host order.

use core::fmt;

use crate::plain::{Plain, map_types};

/// A port or another 16-bit field in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Be16(u16);

impl Be16 {
    /// Converts a host order value.
    #[inline(always)]
    pub const fn from_host(value: u16) -> Self {
        Self(value.to_be())
    }

    /// The value in host order.
    #[inline(always)]
    pub const fn to_host(self) -> u16 {
        u16::from_be(self.0)
    }

    /// The bits as they lie in memory, for checksums and hashes.
    #[inline(always)]
    pub const fn raw(self) -> u16 {
        self.0
    }

    /// Takes bits that lie in memory in network order, such as a socket context's port.
    #[inline(always)]
    pub const fn from_raw(raw: u16) -> Self {
        Self(raw)
    }
}

impl fmt::Debug for Be16 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Be16 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.to_host())
    }
}

/// An IPv4 address in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
#[cfg_attr(target_arch = "bpf", derive(Debug))]
pub struct V4(u32);

/// An IPv6 address in network byte order, as four words.
#[repr(transparent)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
#[cfg_attr(target_arch = "bpf", derive(Debug))]
pub struct V6([u32; 4]);

/// What both address families have in common.
pub trait Addr: Plain + Eq + Default {
    /// The address as 32-bit words in network order, unused words zero. For checksums and hashes.
    fn words(&self) -> [u32; 4];
    /// An address that no client has, for the network namespace with this cookie.
    ///
    /// It identifies a client whose own address is not known: inside 0.0.0.0/8 or `::/64`.
    fn from_cookie(cookie: u64) -> Self;
    /// Its last 64 bits as they lie in memory; an IPv4 address is the second half.
    fn suffix(&self) -> [u32; 2];
    /// The address that begins as this one and ends in a suffix.
    fn with_suffix(self, suffix: [u32; 2]) -> Self;
    /// The IPv6 form: an IPv4 address is mapped into `::ffff:0:0/96` (RFC 4291, 2.5.5.2).
    fn mapped(&self) -> V6;

    /// Whether it is 0.0.0.0 or `::`.
    #[inline(always)]
    fn is_unspecified(&self) -> bool {
        self.words() == [0; 4]
    }
}

/// A hash of `seed` and an address, to be used with [`place`].
#[inline(always)]
pub(crate) fn mixed<A: Addr>(seed: u64, addr: A) -> u64 {
    /// 2^64 divided by the golden ratio (Knuth, The Art of Computer Programming, 6.4).
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    let [a, b, c, d] = addr.words();
    let mut hash = seed;
    for half in [
        u64::from(a) << 32 | u64::from(b),
        u64::from(c) << 32 | u64::from(d),
    ] {
        hash = (hash ^ half).wrapping_mul(FACTOR);
        // A product's lower bits know nothing of its factors' upper ones, where addresses' last octets are.
        hash ^= hash >> 32;
    }
    hash
}

/// One of so many places: by a hash's uppermost bits, the only ones that depend on everything.
#[inline(always)]
pub(crate) const fn place(hash: u64, places: u32) -> u32 {
    (((hash >> 32) * places as u64) >> 32) as u32
}

impl V4 {
    /// From four octets, first octet first.
    pub const fn from_octets(octets: [u8; 4]) -> Self {
        Self(u32::from_ne_bytes(octets))
    }

    /// The four octets, first octet first.
    pub const fn octets(self) -> [u8; 4] {
        self.0.to_ne_bytes()
    }

    /// The bits as they lie in memory.
    #[inline(always)]
    pub const fn raw(self) -> u32 {
        self.0
    }

    /// Takes bits that lie in memory in network order.
    #[inline(always)]
    pub const fn from_raw(raw: u32) -> Self {
        Self(raw)
    }
}

impl V6 {
    /// From sixteen octets, first octet first.
    pub const fn from_octets(o: [u8; 16]) -> Self {
        Self([
            u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
            u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
            u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
            u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
        ])
    }

    /// The sixteen octets, first octet first.
    pub const fn octets(self) -> [u8; 16] {
        let [a, b, c, d] = self.0;
        let (a, b, c, d) = (
            a.to_ne_bytes(),
            b.to_ne_bytes(),
            c.to_ne_bytes(),
            d.to_ne_bytes(),
        );
        [
            a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1],
            d[2], d[3],
        ]
    }

    /// The four words as they lie in memory.
    #[inline(always)]
    pub const fn raw(self) -> [u32; 4] {
        self.0
    }

    /// Takes words that lie in memory in network order.
    #[inline(always)]
    pub const fn from_raw(raw: [u32; 4]) -> Self {
        Self(raw)
    }

    /// The IPv4 address inside `::ffff:0:0/96`, if it is one.
    #[inline(always)]
    pub const fn to_mapped_v4(self) -> Option<V4> {
        match self.0 {
            [0, 0, prefix, address] if prefix == 0xffff_u32.to_be() => Some(V4(address)),
            _ => None,
        }
    }
}

impl Addr for V4 {
    #[inline(always)]
    fn words(&self) -> [u32; 4] {
        [self.0, 0, 0, 0]
    }

    #[inline(always)]
    fn suffix(&self) -> [u32; 2] {
        [0, self.0]
    }

    #[inline(always)]
    fn with_suffix(self, [_, end]: [u32; 2]) -> Self {
        Self(end)
    }

    #[inline(always)]
    fn from_cookie(cookie: u64) -> Self {
        Self((cookie as u32 & 0x00ff_ffff).to_be())
    }

    #[inline(always)]
    fn mapped(&self) -> V6 {
        V6([0, 0, 0xffff_u32.to_be(), self.0])
    }
}

impl Addr for V6 {
    #[inline(always)]
    fn words(&self) -> [u32; 4] {
        self.0
    }

    #[inline(always)]
    fn suffix(&self) -> [u32; 2] {
        let [_, _, c, d] = self.0;
        [c, d]
    }

    #[inline(always)]
    fn with_suffix(self, [c, d]: [u32; 2]) -> Self {
        let [a, b, ..] = self.0;
        Self([a, b, c, d])
    }

    #[inline(always)]
    fn from_cookie(cookie: u64) -> Self {
        Self([
            0,
            0,
            ((cookie >> 32) as u32).to_be(),
            (cookie as u32).to_be(),
        ])
    }

    #[inline(always)]
    fn mapped(&self) -> V6 {
        *self
    }
}

#[cfg(not(target_arch = "bpf"))]
mod std_addresses {
    use std::{
        fmt,
        net::{Ipv4Addr, Ipv6Addr},
    };

    use super::{V4, V6};

    impl From<Ipv4Addr> for V4 {
        fn from(address: Ipv4Addr) -> Self {
            Self::from_octets(address.octets())
        }
    }
    impl From<V4> for Ipv4Addr {
        fn from(address: V4) -> Self {
            address.octets().into()
        }
    }
    impl From<Ipv6Addr> for V6 {
        fn from(address: Ipv6Addr) -> Self {
            Self::from_octets(address.octets())
        }
    }
    impl From<V6> for Ipv6Addr {
        fn from(address: V6) -> Self {
            address.octets().into()
        }
    }

    macro_rules! shown_as {
        ($ours:ty, $std:ty) => {
            impl fmt::Display for $ours {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    fmt::Display::fmt(&<$std>::from(*self), f)
                }
            }
            impl fmt::Debug for $ours {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    fmt::Display::fmt(self, f)
                }
            }
            impl Ord for $ours {
                fn cmp(&self, other: &Self) -> std::cmp::Ordering {
                    self.octets().cmp(&other.octets())
                }
            }
            impl PartialOrd for $ours {
                fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
                    Some(self.cmp(other))
                }
            }
        };
    }
    shown_as!(V4, Ipv4Addr);
    shown_as!(V6, Ipv6Addr);
}

/// An IP protocol number.
#[repr(transparent)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Proto(pub u8);

impl Proto {
    /// Internet Control Message Protocol (RFC 792).
    pub const ICMP: Self = Self(1);
    /// Transmission Control Protocol (RFC 9293).
    pub const TCP: Self = Self(6);
    /// User Datagram Protocol (RFC 768).
    pub const UDP: Self = Self(17);
    /// ICMP for IPv6 (RFC 4443).
    pub const ICMPV6: Self = Self(58);
    /// Stream Control Transmission Protocol (RFC 9260).
    pub const SCTP: Self = Self(132);

    /// Whether its packets begin and end connections, or associations, and say so.
    #[inline(always)]
    pub const fn has_connections(self) -> bool {
        self.0 == Self::TCP.0 || self.0 == Self::SCTP.0
    }
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::ICMP => f.write_str("ICMP"),
            Self::TCP => f.write_str("TCP"),
            Self::UDP => f.write_str("UDP"),
            Self::ICMPV6 => f.write_str("ICMPv6"),
            Self::SCTP => f.write_str("SCTP"),
            Self(other) => write!(f, "protocol {other}"),
        }
    }
}

impl fmt::Debug for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

map_types! { Be16 = 2, V4 = 4, V6 = 16, Proto = 1 }

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// How many of these are in the place where most of them are, of 65,536.
    fn crowded<A: Addr>(seed: u64, addresses: impl Iterator<Item = A>) -> usize {
        let mut places: HashMap<u32, usize> = HashMap::new();
        for addr in addresses {
            *places.entry(place(mixed(seed, addr), 65_536)).or_default() += 1;
        }
        places.into_values().max().unwrap_or_default()
    }

    #[test]
    fn neighbours_are_spread_whichever_of_their_octets_differ() {
        // By chance six of 4,096 meet in one of 65,536 places not once in a million tests.
        let numbers = || (0..4_096_u32).map(u32::to_be_bytes);
        for at in 0..=2 {
            let addr = |[.., a, b]: [u8; 4]| {
                let mut octets = [10, 244, 7, 9];
                octets[at..]
                    .iter_mut()
                    .zip([a, b])
                    .for_each(|(octet, new)| *octet = new);
                V4::from_octets(octets)
            };
            for seed in [0, 6, 0x1f90_0006, 0x0090_1f06 << 8] {
                let most = crowded(seed, numbers().map(addr));
                assert!(most < 6, "octets {at} on, {seed:#x}: {most}");
            }
        }
        for at in 0..=14 {
            let addr = |[.., a, b]: [u8; 4]| {
                let mut octets = [0xfd, 0, 0x10, 0x24, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 9];
                octets[at..]
                    .iter_mut()
                    .zip([a, b])
                    .for_each(|(octet, new)| *octet = new);
                V6::from_octets(octets)
            };
            for seed in [0, 6, 0x1f90_0006] {
                let most = crowded(seed, numbers().map(addr));
                assert!(most < 6, "octets {at} on, {seed:#x}: {most}");
            }
        }
    }

    #[test]
    fn ends_are_spread_too() {
        let pods = || (0..64_u8).map(|pod| V4::from_octets([10, 244, 1, pod]));
        let others = (0..64_u8).map(|pod| V4::from_octets([10, 244, 2, pod]));
        let mut places: HashMap<u32, usize> = HashMap::new();
        for other in others {
            for pod in pods() {
                *places
                    .entry(place(mixed(mixed(7, pod), other), 512))
                    .or_default() += 1;
            }
        }
        // Eight on average; more than 30 not once in a million tests.
        let most = places.into_values().max();
        assert!(most < Some(30), "{most:?}");
    }
}
