//! SCTP (RFC 9260): what a packet's first chunk says about its association, and a checksum that
//! changes with the ports without a look at the payload.
//!
//! The checksum is a CRC32c over the whole packet, and no pseudo header. A CRC is linear: changing
//! some bits changes it by the CRC of the change alone, which is that of the two ports followed by as
//! many zeros as the packet has bytes after them; and zeros multiply by a power of x (RFC 9260,
//! appendix A; Koopman, DSN 2002).

use crate::{
    packet::{Packet, Refused},
    parse::tcp,
};

/// The common header's length.
pub const HEADER: usize = 12;
/// The same with a chunk's.
pub const LEAST: usize = HEADER + 4;
/// Where the checksum lies in it.
const CHECKSUM: usize = 8;

/// A chunk's types (RFC 9260, 3.2).
mod chunk {
    pub(super) const INIT: usize = 1;
    pub(super) const INIT_ACK: usize = 2;
    pub(super) const ABORT: usize = 6;
    pub(super) const SHUTDOWN: usize = 7;
    pub(super) const SHUTDOWN_ACK: usize = 8;
}

/// What a packet's first chunk is to its association, in the flags by which a TCP segment would say
/// it to its connection. A chunk that begins or ends an association is alone in its packet, or first.
#[inline(always)]
pub fn flags(chunk: u8) -> u8 {
    // A table: of branches the verifier would follow each to the packet's end.
    FLAGS.get(usize::from(chunk)).copied().unwrap_or(tcp::ACK)
}

static FLAGS: [u8; 256] = {
    let mut flags = [tcp::ACK; 256];
    flags[chunk::INIT] = tcp::SYN;
    flags[chunk::INIT_ACK] = tcp::SYN | tcp::ACK;
    flags[chunk::ABORT] = tcp::RST;
    flags[chunk::SHUTDOWN] = tcp::FIN | tcp::ACK;
    flags[chunk::SHUTDOWN_ACK] = tcp::FIN | tcp::ACK;
    flags
};

/// The polynomial of CRC32c without its highest power, the lowest power in the highest bit.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// x to the power of 0.
const ONE: u32 = 1 << 31;

/// The product of two polynomials modulo CRC32c's.
#[inline(always)]
const fn product(a: u32, b: u32) -> u32 {
    let (mut sum, mut power) = (0, b);
    let mut bit = 0;
    while bit < 32 {
        // Without a branch: the verifier would follow each of them.
        sum ^= power & (((a >> (31 - bit)) & 1).wrapping_neg());
        power = (power >> 1) ^ (POLYNOMIAL & (power & 1).wrapping_neg());
        bit += 1;
    }
    sum
}

/// Powers of x for 0 to 255 times `bytes` bytes of zeros.
const fn powers(bytes: u32) -> [u32; 256] {
    let mut step = ONE;
    let mut bit = 0;
    while bit < 8 * bytes {
        step = product(step, ONE >> 1);
        bit += 1;
    }
    let mut powers = [ONE; 256];
    let mut next = ONE;
    let mut rest: &mut [u32] = &mut powers;
    while let Some((first, others)) = rest.split_first_mut() {
        *first = next;
        next = product(next, step);
        rest = others;
    }
    powers
}

/// For the low and for the high byte of a length.
static POWERS: [[u32; 256]; 2] = [powers(1), powers(256)];

/// What a checksum changes by, if this change is made to the first four bytes of `length`. Both as
/// numbers whose first byte in the packet is the lowest.
#[inline(always)]
pub fn change(difference: u32, length: u32) -> u32 {
    let [low, high] = &POWERS;
    let low = low.get((length & 0xff) as usize).copied().unwrap_or(ONE);
    let high = high
        .get((length >> 8 & 0xff) as usize)
        .copied()
        .unwrap_or(ONE);
    product(product(low, high), difference)
}

/// Replaces both ports of the packet whose header is at `at`, of `length` bytes, and its checksum.
///
/// A sender that leaves the checksum to an interface leaves zero there, and whoever completes it
/// takes it for zero: it stays.
#[inline(always)]
pub fn store_ports(
    packet: &mut impl Packet,
    at: usize,
    length: u16,
    new: u32,
) -> Result<(), Refused> {
    let old: u32 = packet.load(at).ok_or(Refused)?;
    let checksum: u32 = packet.load(at + CHECKSUM).ok_or(Refused)?;
    if old == new {
        return Ok(());
    }
    // What an interface has summed up over the whole packet is to know of both changes.
    packet.store_uncovered(at, &new)?;
    if checksum == 0 {
        return Ok(());
    }
    let changed =
        u32::from_le(checksum) ^ packet.checksum_change(u32::from_le(old ^ new), length.into());
    packet.store_uncovered(at + CHECKSUM, &changed.to_le())
}

/// Whether the checksum of the packet whose header is at `at` is its interface's to complete.
#[inline(always)]
pub fn is_left_open(packet: &impl Packet, at: usize) -> Result<bool, Refused> {
    let checksum: u32 = packet.load(at + CHECKSUM).ok_or(Refused)?;
    Ok(checksum == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CRC32c, bit by bit.
    fn crc(bytes: &[u8]) -> u32 {
        let mut sum = u32::MAX;
        for byte in bytes {
            sum ^= u32::from(*byte);
            for _ in 0..8 {
                sum = (sum >> 1) ^ (POLYNOMIAL & (sum & 1).wrapping_neg());
            }
        }
        !sum
    }

    #[test]
    fn it_is_crc32c() {
        // RFC 3720, B.4.
        assert_eq!(crc(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn a_changed_checksum_equals_a_recomputed_one() {
        let mut state = 0x1234_5678_9abc_def0_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let lengths = (12..600).chain([1_452, 9_000, 32_768, 65_280, 65_515]);
        for length in lengths {
            let mut bytes: Vec<u8> = (0..length).map(|_| next() as u8).collect();
            let before = crc(&bytes);
            let old = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            for new in [next() as u32, old ^ 1, old ^ 1 << 31] {
                bytes[..4].copy_from_slice(&new.to_le_bytes());
                let after = before ^ change(old ^ new, length as u32);
                assert_eq!(after, crc(&bytes), "{length} bytes");
            }
        }
    }
}
