//! All that differs between IPv4 and IPv6 headers.

use penstock_common::{Addr, NetworkFlags, Plain, Proto, V4, V6, Vtep};

use crate::{checksum, packet::Packet};

/// The Ethernet header's length.
pub const ETHERNET: usize = 14;
/// Where the sender stands in it, in bytes.
pub const ETHERNET_SOURCE: usize = 6;

/// Where the network header ends, and what follows.
#[derive(Clone, Copy)]
pub struct Network {
    /// The offset of the transport header, at most [`MAX_TRANSPORT`].
    pub transport: usize,
    /// The transport protocol.
    pub proto: Proto,
    /// The length from the transport header to the packet's end, as the header says.
    pub transport_length: u16,
    /// The fragment, where this is one.
    pub fragment: Fragment,
}

/// "Congestion experienced" (RFC 3168, 5).
pub(crate) const CONGESTED: u8 = 3;

/// What part of a datagram this is.
#[derive(Clone, Copy)]
pub struct Fragment {
    /// Not the datagram's first part: no ports here.
    pub is_later: bool,
    /// A part at all.
    pub is_part: bool,
    /// The datagram's identification.
    pub id: u32,
}

impl Fragment {
    /// A whole datagram.
    pub const NONE: Self = Self {
        is_later: false,
        is_part: false,
        id: 0,
    };
}

/// Transport headers beyond this offset are not looked for.
///
/// What it leaves for IPv6's extensions is a multiple of 8, as their lengths are: Linux 7.2's
/// verifier takes another bound for reachable in one place and not in the next.
pub const MAX_TRANSPORT: usize = 254;

/// What follows an IPv6 header that is followed by extension headers.
#[derive(Clone, Copy)]
struct Extensions {
    /// Their length in bytes, a multiple of 8; 0 where they are cut off, too long or too many.
    length: usize,
    /// The transport protocol.
    proto: Proto,
    /// The fragment, where this is one.
    fragment: Fragment,
}

impl Extensions {
    const LATER: u64 = 1 << 8;
    const PART: u64 = 1 << 9;
    const PROTO: u32 = 16;
    const ID: u32 = 32;

    #[inline(always)]
    fn to_bits(self) -> u64 {
        let Fragment {
            is_later,
            is_part,
            id,
        } = self.fragment;
        let later = if is_later { Self::LATER } else { 0 };
        let part = if is_part { Self::PART } else { 0 };
        // In units of 8 bytes it fits into 5 bits.
        (self.length as u64 >> 3)
            | later
            | part
            | u64::from(self.proto.0) << Self::PROTO
            | u64::from(id) << Self::ID
    }

    #[inline(always)]
    fn from_bits(bits: u64) -> Self {
        Self {
            length: ((bits & 0x1f) << 3) as usize,
            proto: Proto((bits >> Self::PROTO) as u8),
            fragment: Fragment {
                is_later: bits & Self::LATER != 0,
                is_part: bits & Self::PART != 0,
                id: (bits >> Self::ID) as u32,
            },
        }
    }
}

/// Whether a next header's number is an extension's that is walked: hop-by-hop 0, routing 43,
/// fragment 44, destination options 60 (RFC 8200, 4).
#[inline(always)]
fn is_extension(next: u8) -> bool {
    matches!(next, 0 | 43 | 44 | 60)
}

/// Walks the extension headers of the IPv6 header at `at`, as bits that [`V6`]'s [`Family::network`]
/// understands: one number, so that this can be a function that the kernel checks once.
#[inline(always)]
pub fn extensions(packet: &impl Packet, at: usize) -> u64 {
    /// Extension headers that are walked; the kernel itself takes any number.
    const MOST: usize = 4;
    let mut walked = Extensions {
        length: 0,
        proto: Proto(0),
        fragment: Fragment::NONE,
    };
    let Some(mut next) = packet.load::<u8>(at + 6) else {
        return 0;
    };
    let mut steps = 0;
    while steps < MOST && is_extension(next) {
        let Some(header) = packet.load::<[u8; 4]>(at + V6::HEADER + walked.length) else {
            return 0;
        };
        let [following, length, high, low] = header;
        let mut size = 8;
        if next == 44 {
            let Some(id) = packet.load(at + V6::HEADER + walked.length + 4) else {
                return 0;
            };
            let offset = u16::from_be_bytes([high, low]);
            walked.fragment = Fragment {
                is_later: offset & 0xfff8 != 0,
                is_part: offset & 0xfff9 != 0,
                id,
            };
        } else {
            size += usize::from(length) << 3;
        }
        walked.length += size;
        if walked.length > MAX_TRANSPORT - ETHERNET - 2 * V6::HEADER - 8 {
            return 0;
        }
        next = following;
        steps += 1;
        if walked.fragment.is_later {
            break;
        }
    }
    walked.proto = Proto(next);
    walked.to_bits()
}

/// An address family.
pub trait Family: Copy + 'static {
    /// Its addresses.
    type Addr: Addr;
    /// The loopback address.
    const LOOPBACK: Self::Addr;
    /// Its number in Ethernet frames, host order.
    const ETHERTYPE: u16;
    /// The offset of the source address; the destination's follows.
    const ADDRS: usize;
    /// The offset of the header's checksum.
    const HEADER_CHECKSUM: Option<usize>;
    /// The length of a header without options.
    const HEADER: usize;
    /// Its ICMP.
    const ICMP: Proto;
    /// The offset of the 16 bits that hold the hop limit.
    const HOPS: usize;

    /// The hop limit in the bits at [`Self::HOPS`].
    fn hops(word: u16) -> u8;

    /// These bits with one hop less.
    fn with_one_hop_less(word: u16) -> u16;

    /// Whether flows can be handed over to other nodes ([`NetworkFlags`]).
    const HANDOVER: u32;

    /// A tunnel's end of this address.
    fn vtep(addr: Self::Addr) -> Vtep;

    /// The ICMP types of an echo request and its reply.
    const ECHO: [u8; 2];

    /// Whether an address is a group's.
    fn is_multicast(addr: Self::Addr) -> bool;

    /// Walks the header at `at`, or `None` where it is cut off or makes no sense.
    fn network(packet: &impl Packet, at: usize) -> Option<Network>;

    /// What routers have marked the packet with whose header is at `at` (RFC 3168, 5).
    fn ecn(packet: &impl Packet, at: usize) -> Option<u8>;

    /// What follows the header at `at` of a whole packet without options or extensions, as nearly all
    /// are: told without walking.
    fn plain(packet: &impl Packet, at: usize) -> Option<Proto>;

    /// How long is what follows the header at `at` of such a packet.
    fn payload(packet: &impl Packet, at: usize) -> Option<u16>;

    /// This family's of a pair of addresses.
    fn of(v4: V4, v6: V6) -> Self::Addr;

    /// A header of its own making as it lies in memory.
    type Header: Plain + AsRef<[u32]>;
    /// "Port unreachable": type and code.
    const PORT_UNREACHABLE: [u8; 2];

    /// "Too long for the way": type and code.
    const TOO_LONG: [u8; 2];

    /// "Time exceeded in transit": type and code.
    const EXPIRED: [u8; 2];

    /// Whether routers may split the packet whose header is at `at`.
    fn may_be_split(packet: &impl Packet, at: usize) -> bool;

    /// A header without options, its checksum done.
    fn header(src: Self::Addr, dst: Self::Addr, proto: Proto, payload: u16) -> Self::Header;

    /// The header at `at` as an ICMP error quotes it: without options or extensions, followed at
    /// once by `proto`'s header.
    fn quoted_header(packet: &impl Packet, at: usize, proto: Proto) -> Option<Self::Header>;

    /// Whether an ICMP type is an error's, which quotes a packet.
    fn is_icmp_error(icmp_type: u8) -> bool;
}

/// What only IPv4 headers of this node's own making can have.
pub(crate) trait Splittable: Family {
    /// A header that [`Family::header`] made, as one of a packet that routers may split, with an
    /// identification (RFC 6864, 4) and marks for routers.
    fn splittable(header: Self::Header, marks: u8, id: u16) -> Self::Header;
}

impl Splittable for V4 {
    #[inline(always)]
    fn splittable(header: [u32; 5], marks: u8, id: u16) -> [u32; 5] {
        let [old_first, old_second, third, src, dst] = header;
        let [version, _, high, low] = old_first.to_ne_bytes();
        let first = u32::from_ne_bytes([version, marks, high, low]);
        let [a, b] = id.to_ne_bytes();
        let second = u32::from_ne_bytes([a, b, 0, 0]);
        let delta = checksum::Delta::default()
            .word(old_first, first)
            .word(old_second, second);
        let [ttl, proto, c, d] = third.to_ne_bytes();
        let [c, d] = delta.apply(u16::from_ne_bytes([c, d])).to_ne_bytes();
        [
            first,
            second,
            u32::from_ne_bytes([ttl, proto, c, d]),
            src,
            dst,
        ]
    }
}

impl Family for V4 {
    type Addr = Self;
    const LOOPBACK: Self = Self::from_octets([127, 0, 0, 1]);
    const ETHERTYPE: u16 = 0x0800;
    const ADDRS: usize = 12;
    const HEADER_CHECKSUM: Option<usize> = Some(10);
    const HEADER: usize = 20;
    const ICMP: Proto = Proto::ICMP;
    // Time to live, then the protocol.
    const HOPS: usize = 8;
    const HANDOVER: u32 = NetworkFlags::HANDOVER4;
    // RFC 792.
    const ECHO: [u8; 2] = [8, 0];
    type Header = [u32; 5];
    const PORT_UNREACHABLE: [u8; 2] = [3, 3];
    const TOO_LONG: [u8; 2] = [3, 4];
    const EXPIRED: [u8; 2] = [11, 0];

    #[inline(always)]
    fn may_be_split(packet: &impl Packet, at: usize) -> bool {
        // RFC 791, 3.1: "don't fragment".
        let offset: Option<u16> = packet.load(at + 6);
        offset.is_some_and(|offset| u16::from_be(offset) & 0x4000 == 0)
    }

    #[inline(always)]
    fn header(src: Self, dst: Self, proto: Proto, payload: u16) -> [u32; 5] {
        // Version 4, 20 bytes; don't fragment, for which the identification may be 0 (RFC 6864).
        let [high, low] = (payload + 20).to_be_bytes();
        let first = u32::from_ne_bytes([0x45, 0, high, low]);
        let second = u32::from_ne_bytes([0, 0, 0x40, 0]);
        let third = u32::from_ne_bytes([64, proto.0, 0, 0]);
        let sum = u64::from(first) + u64::from(second) + u64::from(third);
        let [a, b] = (!checksum::fold(sum + checksum::sum_addr(src) + checksum::sum_addr(dst)))
            .to_ne_bytes();
        let third = third | u32::from_ne_bytes([0, 0, a, b]);
        [first, second, third, src.raw(), dst.raw()]
    }

    #[inline(always)]
    fn quoted_header(packet: &impl Packet, at: usize, _: Proto) -> Option<[u32; 5]> {
        let [first, second, third, src, dst]: [u32; 5] = packet.load(at)?;
        let first = (first & u32::from_ne_bytes([0xf0, 0xff, 0xff, 0xff]))
            | u32::from_ne_bytes([5, 0, 0, 0]);
        let third = third & u32::from_ne_bytes([0xff, 0xff, 0, 0]);
        let words = [first, second, third, src, dst];
        let mut sum = 0;
        for word in words {
            sum += u64::from(word);
        }
        let [a, b] = (!checksum::fold(sum)).to_ne_bytes();
        let third = third | u32::from_ne_bytes([0, 0, a, b]);
        let header = [first, second, third, src, dst];
        Some(header)
    }

    #[inline(always)]
    fn network(packet: &impl Packet, at: usize) -> Option<Network> {
        // RFC 791, 3.1: version and header length, total length, identification, flags and offset.
        let version_ihl: u8 = packet.load(at)?;
        let ihl = usize::from(version_ihl & 0x0f) << 2;
        if version_ihl >> 4 != 4 || ihl < Self::HEADER {
            return None;
        }
        let total = u16::from_be(packet.load(at + 2)?);
        let id: u16 = packet.load(at + 4)?;
        let offset = u16::from_be(packet.load(at + 6)?);
        Some(Network {
            transport: at + ihl,
            proto: packet.load(at + 9)?,
            transport_length: total.checked_sub(ihl as u16)?,
            fragment: Fragment {
                is_later: offset & 0x1fff != 0,
                is_part: offset & 0x3fff != 0,
                id: u32::from(id),
            },
        })
    }

    #[inline(always)]
    fn ecn(packet: &impl Packet, at: usize) -> Option<u8> {
        let [_, service] = packet.load::<u16>(at)?.to_ne_bytes();
        Some(service & 3)
    }

    #[inline(always)]
    fn plain(packet: &impl Packet, at: usize) -> Option<Proto> {
        let version_ihl: u8 = packet.load(at)?;
        let offset = u16::from_be(packet.load(at + 6)?);
        if version_ihl != 0x45 || offset & 0x3fff != 0 {
            return None;
        }
        packet.load(at + 9)
    }

    #[inline(always)]
    fn payload(packet: &impl Packet, at: usize) -> Option<u16> {
        let total = u16::from_be(packet.load(at + 2)?);
        total.checked_sub(Self::HEADER as u16)
    }

    #[inline(always)]
    fn hops(word: u16) -> u8 {
        let [hops, _] = word.to_ne_bytes();
        hops
    }

    #[inline(always)]
    fn with_one_hop_less(word: u16) -> u16 {
        let [hops, proto] = word.to_ne_bytes();
        u16::from_ne_bytes([hops.wrapping_sub(1), proto])
    }

    #[inline(always)]
    fn is_multicast(addr: V4) -> bool {
        // RFC 5771; the limited broadcast address is nobody's own either.
        let [first, ..] = addr.octets();
        first >= 224
    }

    #[inline(always)]
    fn vtep(v4: V4) -> Vtep {
        Vtep {
            v4,
            ..Vtep::default()
        }
    }

    #[inline(always)]
    fn of(v4: V4, _: V6) -> V4 {
        v4
    }

    #[inline(always)]
    fn is_icmp_error(icmp_type: u8) -> bool {
        // RFC 792: destination unreachable, source quench, time exceeded, parameter problem.
        matches!(icmp_type, 3 | 4 | 11 | 12)
    }
}

impl Family for V6 {
    type Addr = Self;
    const LOOPBACK: Self = Self::from_octets([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    const ETHERTYPE: u16 = 0x86dd;
    const ADDRS: usize = 8;
    const HEADER_CHECKSUM: Option<usize> = None;
    const HEADER: usize = 40;
    const ICMP: Proto = Proto::ICMPV6;
    // Next header, then the hop limit.
    const HOPS: usize = 6;
    const HANDOVER: u32 = NetworkFlags::HANDOVER6;
    // RFC 4443, 4.
    const ECHO: [u8; 2] = [128, 129];
    type Header = [u32; 10];
    const PORT_UNREACHABLE: [u8; 2] = [1, 4];
    const TOO_LONG: [u8; 2] = [2, 0];
    const EXPIRED: [u8; 2] = [3, 0];

    #[inline(always)]
    fn may_be_split(_: &impl Packet, _: usize) -> bool {
        // RFC 8200, 4.5: only their senders split them.
        false
    }

    #[inline(always)]
    fn header(src: Self, dst: Self, proto: Proto, payload: u16) -> [u32; 10] {
        let [high, low] = payload.to_be_bytes();
        let [a, b, c, d] = src.raw();
        let [e, f, g, h] = dst.raw();
        let first = u32::from_ne_bytes([0x60, 0, 0, 0]);
        [
            first,
            u32::from_ne_bytes([high, low, proto.0, 64]),
            a,
            b,
            c,
            d,
            e,
            f,
            g,
            h,
        ]
    }

    #[inline(always)]
    fn quoted_header(packet: &impl Packet, at: usize, proto: Proto) -> Option<[u32; 10]> {
        let mut header: [u32; 10] = packet.load(at)?;
        let [_, second, ..] = &mut header;
        *second = (*second & u32::from_ne_bytes([0xff, 0xff, 0, 0xff]))
            | u32::from_ne_bytes([0, 0, proto.0, 0]);
        Some(header)
    }

    #[inline(always)]
    fn network(packet: &impl Packet, at: usize) -> Option<Network> {
        let version: u8 = packet.load(at)?;
        if version >> 4 != 6 {
            return None;
        }
        let payload = u16::from_be(packet.load(at + 4)?);
        let next: u8 = packet.load(at + 6)?;
        let mut extensions = 0;
        let mut header = Network {
            transport: at + Self::HEADER,
            proto: Proto(next),
            transport_length: payload,
            fragment: Fragment::NONE,
        };
        if is_extension(next) {
            let walked = Extensions::from_bits(packet.extensions(at));
            if walked.length == 0 {
                return None;
            }
            extensions = walked.length;
            header.transport += extensions;
            header.proto = walked.proto;
            header.fragment = walked.fragment;
        }
        header.transport_length = payload.checked_sub(extensions as u16)?;
        Some(header)
    }

    #[inline(always)]
    fn ecn(packet: &impl Packet, at: usize) -> Option<u8> {
        // Between the version and the flow label.
        let [_, class] = packet.load::<u16>(at)?.to_ne_bytes();
        Some(class >> 4 & 3)
    }

    #[inline(always)]
    fn plain(packet: &impl Packet, at: usize) -> Option<Proto> {
        let version: u8 = packet.load(at)?;
        let next: u8 = packet.load(at + 6)?;
        (version >> 4 == 6 && !is_extension(next)).then_some(Proto(next))
    }

    #[inline(always)]
    fn payload(packet: &impl Packet, at: usize) -> Option<u16> {
        packet.load(at + 4).map(u16::from_be)
    }

    #[inline(always)]
    fn hops(word: u16) -> u8 {
        let [_, hops] = word.to_ne_bytes();
        hops
    }

    #[inline(always)]
    fn with_one_hop_less(word: u16) -> u16 {
        let [next, hops] = word.to_ne_bytes();
        u16::from_ne_bytes([next, hops.wrapping_sub(1)])
    }

    #[inline(always)]
    fn is_multicast(addr: V6) -> bool {
        // RFC 4291, 2.7.
        let [first, ..] = addr.raw();
        first.to_ne_bytes()[0] == 0xff
    }

    #[inline(always)]
    fn vtep(v6: V6) -> Vtep {
        Vtep {
            v6,
            ..Vtep::default()
        }
    }

    #[inline(always)]
    fn of(_: V4, v6: V6) -> V6 {
        v6
    }

    #[inline(always)]
    fn is_icmp_error(icmp_type: u8) -> bool {
        // RFC 4443, 2.1: errors have the high-order bit clear.
        icmp_type < 128
    }
}
