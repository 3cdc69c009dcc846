//! Frames as bytes: builds them, and takes them apart in the plainest way that works.

use std::net::IpAddr;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;

/// Types of an SCTP packet's chunks (RFC 9260, 3.2).
pub const CHUNKS: [u8; 10] = [1, 1, 2, 10, 11, 0, 3, 6, 7, 8];

/// What to build.
#[derive(Clone, Debug)]
pub struct Spec {
    pub src: (IpAddr, u16),
    pub dst: (IpAddr, u16),
    pub proto: u8,
    /// Of SCTP the first chunk's type.
    pub tcp_flags: u8,
    pub payload: Vec<u8>,
    /// IPv4 option words or IPv6 destination option headers.
    pub options: usize,
    /// Identification, offset in 8-byte units, more fragments.
    pub fragment: Option<(u32, u16, bool)>,
    /// A checksum of zero: none (UDP), or one that an interface is to complete (SCTP).
    pub without_checksum: bool,
}

pub fn icmp_number(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 1 } else { 58 }
}

pub fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// The one's complement sum of some bytes.
pub fn sum(bytes: &[u8]) -> u64 {
    bytes
        .chunks(2)
        .map(|pair| {
            u64::from(u16::from_be_bytes([
                pair[0],
                pair.get(1).copied().unwrap_or(0),
            ]))
        })
        .sum()
}

pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn pseudo(src: IpAddr, dst: IpAddr, proto: u8, length: usize) -> u64 {
    sum(&octets(src)) + sum(&octets(dst)) + u64::from(proto) + length as u64
}

/// Ethernet and IP around a transport segment.
pub fn wrap(src: IpAddr, dst: IpAddr, proto: u8, spec: &Spec, segment: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x02, 0, 0, 0, 0, 0x0d, 0x02, 0, 0, 0, 0, 0x05];
    if src.is_ipv4() {
        frame.extend([0x08, 0x00]);
        let words = spec.options.min(10);
        let total = 20 + 4 * words + segment.len();
        let (id, offset, more) = spec.fragment.unwrap_or((0x77, 0, false));
        let mut header = vec![0x40 | (5 + words as u8), 0];
        header.extend((total as u16).to_be_bytes());
        header.extend((id as u16).to_be_bytes());
        header.extend((offset | u16::from(more) << 13).to_be_bytes());
        header.extend([64, proto, 0, 0]);
        header.extend(octets(src));
        header.extend(octets(dst));
        header.extend(std::iter::repeat_n(1, 4 * words));
        let checksum = !fold(sum(&header));
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
        frame.extend(header);
    } else {
        frame.extend([0x86, 0xdd]);
        let mut chain: Vec<u8> = Vec::new();
        let mut kinds: Vec<u8> = vec![60; spec.options.min(2)];
        if spec.fragment.is_some() {
            kinds.push(44);
        }
        kinds.push(proto);
        for pair in kinds.windows(2) {
            if pair[0] == 60 {
                chain.extend([pair[1], 0, 1, 4, 0, 0, 0, 0]);
            } else {
                let (id, offset, more) = spec.fragment.unwrap_or_default();
                chain.extend([pair[1], 0]);
                chain.extend((offset << 3 | u16::from(more)).to_be_bytes());
                chain.extend(id.to_be_bytes());
            }
        }
        frame.extend([0x60, 0, 0, 0]);
        frame.extend(((chain.len() + segment.len()) as u16).to_be_bytes());
        frame.extend([kinds[0], 64]);
        frame.extend(octets(src));
        frame.extend(octets(dst));
        frame.extend(chain);
    }
    frame.extend(segment);
    frame
}

/// CRC32c (RFC 9260, appendix A), bit by bit.
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut sum = u32::MAX;
    for byte in bytes {
        sum ^= u32::from(*byte);
        for _ in 0..8 {
            sum = (sum >> 1) ^ if sum & 1 == 0 { 0 } else { 0x82f6_3b78 };
        }
    }
    !sum
}

/// A TCP, UDP or SCTP frame with right checksums.
pub fn build(spec: &Spec) -> Vec<u8> {
    let (src, dst) = (spec.src.0, spec.dst.0);
    let mut segment = Vec::new();
    let is_later = spec.fragment.is_some_and(|(_, offset, _)| offset != 0);
    if !is_later {
        segment.extend(spec.src.1.to_be_bytes());
        segment.extend(spec.dst.1.to_be_bytes());
        if spec.proto == SCTP {
            segment.extend([0xa5, 0x5a, 1, 2, 0, 0, 0, 0]);
            segment.extend([spec.tcp_flags, 3]);
            segment.extend(((4 + spec.payload.len()) as u16).to_be_bytes());
            segment.extend(&spec.payload);
            if !spec.without_checksum {
                let checksum = crc32c(&segment);
                segment[8..12].copy_from_slice(&checksum.to_le_bytes());
            }
            return wrap(src, dst, spec.proto, spec, &segment);
        }
        let at = if spec.proto == TCP {
            segment.extend([
                1,
                2,
                3,
                4,
                5,
                6,
                7,
                8,
                0x50,
                spec.tcp_flags,
                0x10,
                0,
                0,
                0,
                0,
                0,
            ]);
            16
        } else {
            segment.extend(((8 + spec.payload.len()) as u16).to_be_bytes());
            segment.extend([0, 0]);
            6
        };
        segment.extend(&spec.payload);
        if !(spec.proto == UDP && spec.without_checksum) {
            let total = pseudo(src, dst, spec.proto, segment.len()) + sum(&segment);
            let checksum = match !fold(total) {
                0 if spec.proto == UDP => 0xffff,
                checksum => checksum,
            };
            segment[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        }
    } else {
        segment.extend(&spec.payload);
    }
    wrap(src, dst, spec.proto, spec, &segment)
}

/// An ICMP error from `src` to `dst` that quotes the network packet `quoted`.
pub fn icmp_error(src: IpAddr, dst: IpAddr, spec: &Spec, quoted: &[u8]) -> Vec<u8> {
    let (icmp_type, code) = if src.is_ipv4() { (3, 4) } else { (2, 0) };
    let mut message = vec![icmp_type, code, 0, 0, 0, 0, 5, 0x78];
    message.extend(quoted);
    let proto = icmp_number(src);
    let extra = if src.is_ipv4() {
        0
    } else {
        pseudo(src, dst, proto, message.len())
    };
    let checksum = !fold(sum(&message) + extra);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    wrap(src, dst, proto, spec, &message)
}

/// A network header taken apart.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub proto: u8,
    /// Where the transport header begins.
    pub transport: usize,
    /// Transport length as the header says.
    pub length: usize,
    pub id: u32,
    pub is_part: bool,
    pub is_later: bool,
}

fn ip(bytes: &[u8]) -> IpAddr {
    match <[u8; 4]>::try_from(bytes) {
        Ok(four) => IpAddr::from(four),
        Err(_) => IpAddr::from(<[u8; 16]>::try_from(bytes).expect("4 or 16 bytes")),
    }
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// Source and destination of the header at `at`, if they are there.
pub fn addrs(frame: &[u8], at: usize, is_v4: bool) -> Option<(IpAddr, IpAddr)> {
    let (offset, length) = if is_v4 { (12, 4) } else { (8, 16) };
    let src = frame.get(at + offset..at + offset + length)?;
    let dst = frame.get(at + offset + length..at + offset + 2 * length)?;
    Some((ip(src), ip(dst)))
}

/// The header at `at`.
pub fn header(frame: &[u8], at: usize, is_v4: bool) -> Option<Header> {
    let (src, dst) = addrs(frame, at, is_v4)?;
    let version = frame.get(at)? >> 4;
    if is_v4 {
        let ihl = usize::from(frame[at] & 15) * 4;
        if version != 4 || ihl < 20 {
            return None;
        }
        let total = usize::from(be16(frame, at + 2)?);
        let offset = be16(frame, at + 6)?;
        return Some(Header {
            src,
            dst,
            proto: frame[at + 9],
            transport: at + ihl,
            length: total.checked_sub(ihl)?,
            id: u32::from(be16(frame, at + 4)?),
            is_part: offset & 0x3fff != 0,
            is_later: offset & 0x1fff != 0,
        });
    }
    if version != 6 {
        return None;
    }
    let payload = usize::from(be16(frame, at + 4)?);
    let mut next = frame[at + 6];
    let mut transport = at + 40;
    let (mut id, mut is_part, mut is_later) = (0, false, false);
    for _ in 0..4 {
        if ![0, 43, 44, 60].contains(&next) {
            break;
        }
        let extension = frame.get(transport..transport + 4)?;
        let mut size = 8 + 8 * usize::from(extension[1]);
        if next == 44 {
            size = 8;
            let offset = be16(extension, 2)?;
            let bytes = frame.get(transport + 4..transport + 8)?;
            id = u32::from_be_bytes(bytes.try_into().ok()?);
            is_later = offset & 0xfff8 != 0;
            is_part = is_later || offset & 1 != 0;
        }
        next = extension[0];
        transport += size;
        if transport - at - 40 > 153 {
            return None;
        }
        if is_later {
            break;
        }
    }
    let length = payload.checked_sub(transport - at - 40)?;
    Some(Header {
        src,
        dst,
        proto: next,
        transport,
        length,
        id,
        is_part,
        is_later,
    })
}

/// The ports at `at`.
pub fn ports(frame: &[u8], at: usize) -> Option<(u16, u16)> {
    Some((be16(frame, at)?, be16(frame, at + 2)?))
}

/// What is wrong with each checksum of a frame: 0 where one is right, as any multiple of 0xffff is.
///
/// Translation must leave every checksum as right or wrong as it was.
pub fn wrongs(frame: &[u8]) -> Vec<u16> {
    let mut wrongs = Vec::new();
    let mut wrong = |sum: u64| wrongs.push(fold(sum) % 0xffff);
    let Some(is_v4) = family(frame) else {
        return wrongs;
    };
    let Some(header) = header(frame, 14, is_v4) else {
        return wrongs;
    };
    if is_v4 {
        wrong(sum(&frame[14..header.transport.min(frame.len())]));
    }
    let Some(segment) = frame.get(header.transport..) else {
        return wrongs;
    };
    if header.is_later {
        return wrongs;
    }
    match header.proto {
        UDP if segment.get(6..8) == Some(&[0, 0]) => {}
        TCP | UDP | 58 => {
            wrong(sum(segment) + pseudo(header.src, header.dst, header.proto, header.length));
        }
        SCTP => {
            let mut whole = segment.to_vec();
            whole.resize(header.length, 0);
            // One that an interface is to complete stays zero.
            if let Some(field) = whole.get_mut(8..12)
                && field != [0; 4]
            {
                let stored = u32::from_le_bytes([field[0], field[1], field[2], field[3]]);
                field.fill(0);
                let wrong = stored ^ crc32c(&whole);
                wrongs.extend([wrong as u16, (wrong >> 16) as u16]);
            }
        }
        1 => {
            wrong(sum(segment));
            let length = segment
                .get(8)
                .map_or(0, |first| usize::from(first & 15) * 4);
            if let Some(inner) = segment.get(8..8 + length) {
                wrong(sum(inner));
            }
        }
        _ => {}
    }
    wrongs
}

/// The pseudo header's sum, as a sender leaves it in the checksum for its interface to complete.
pub fn pseudo_checksum(header: &Header) -> u16 {
    fold(pseudo(header.src, header.dst, header.proto, header.length))
}

/// Whether a frame is IPv4, if it is IP at all.
pub fn family(frame: &[u8]) -> Option<bool> {
    match frame.get(12..14)? {
        [0x08, 0x00] => Some(true),
        [0x86, 0xdd] => Some(false),
        _ => None,
    }
}
