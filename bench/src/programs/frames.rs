//! Frames that the programs get.

use std::net::IpAddr;

use super::{ACK, LOOPBACK};

/// A TCP segment without data. Its checksum is nobody's: programs change it, and don't look.
pub(super) fn frame(src: (IpAddr, u16), dst: (IpAddr, u16), flags: u8) -> Vec<u8> {
    let mut frame = LOOPBACK.1.to_vec();
    frame.extend([2, 0, 0, 0, 0, 5]);
    match (src.0, dst.0) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            frame.extend([0x08, 0x00, 0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0x12, 0x34]);
            frame.extend(from.octets());
            frame.extend(to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, 6, 64]);
            frame.extend(from.octets());
            frame.extend(to.octets());
        }
        // Not of one family: no packet.
        _ => {}
    }
    frame.extend(src.1.to_be_bytes());
    frame.extend(dst.1.to_be_bytes());
    frame.extend([
        0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0x10, 0, 0x56, 0x78, 0, 0,
    ]);
    frame
}

/// What a backend answers to a translated frame.
pub(super) fn answer(translated: &[u8], is_v4: bool) -> Option<Vec<u8>> {
    let (at, ports) = if is_v4 { (26, 34) } else { (22, 54) };
    let address = |at: usize| -> Option<IpAddr> {
        Some(if is_v4 {
            let octets: [u8; 4] = translated.get(at..at + 4)?.try_into().ok()?;
            octets.into()
        } else {
            let octets: [u8; 16] = translated.get(at..at + 16)?.try_into().ok()?;
            octets.into()
        })
    };
    let port = |at: usize| -> Option<u16> {
        Some(u16::from_be_bytes(
            translated.get(at..at + 2)?.try_into().ok()?,
        ))
    };
    let length = if is_v4 { 4 } else { 16 };
    let src = (address(at)?, port(ports)?);
    let dst = (address(at + length)?, port(ports + 2)?);
    Some(frame(dst, src, ACK))
}
