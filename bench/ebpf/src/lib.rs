//! What the programs that send and count packets share with who loads them, and their arithmetic.
//!
//! Frames are of IPv4, 64 octets long, and end in [`MARK`], by which those that come out of a node are
//! told from all else. A flow's number says its source address and port; the rest is the same for all.
#![cfg_attr(target_arch = "bpf", no_std)]

/// A frame's length in octets, without the four of its check sequence: what Ethernet carries at least.
pub const LENGTH: usize = 64;
/// What every frame ends with, and where that begins. It looks like nothing else here.
pub const MARK: [u8; 8] = *b"penstock";
/// Where [`MARK`] begins.
pub const MARK_AT: usize = 54;
/// Where fields begin, of IPv4 without options.
pub mod at {
    /// The type in the Ethernet header.
    pub const ETHERTYPE: usize = 12;
    /// The time to live.
    pub const TTL: usize = 22;
    /// The protocol.
    pub const PROTOCOL: usize = 23;
    /// The header's checksum.
    pub const HEADER_CHECKSUM: usize = 24;
    /// The source address.
    pub const SOURCE: usize = 26;
    /// The destination address.
    pub const DESTINATION: usize = 30;
    /// The source port.
    pub const SOURCE_PORT: usize = 34;
    /// The destination port.
    pub const DESTINATION_PORT: usize = 36;
    /// UDP's checksum.
    pub const UDP_CHECKSUM: usize = 40;
    /// TCP's checksum.
    pub const TCP_CHECKSUM: usize = 50;
}
/// TCP's number among the protocols of IP.
pub const TCP: u8 = 6;
/// UDP's number among the protocols of IP.
pub const UDP: u8 = 17;
/// What counts of frames are kept, by index.
pub mod count {
    /// Sent.
    pub const SENT: u32 = 0;
    /// Came out as they should.
    pub const FORWARDED: u32 = 1;
    /// Came out otherwise.
    pub const WRONG: u32 = 2;
    /// How many counts there are.
    pub const ALL: u32 = 3;
}

/// Flows of a source address: ten bits.
const PORTS: u32 = 1 << 10;
/// The first source port.
const FIRST_PORT: u16 = 16_384;

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Plan {
    /// A frame in words as they lie in memory. Its source address ends in two octets of zero; they, the
    /// source port and both checksums are written for each flow.
    pub frame: [u64; LENGTH / 8],
    /// The sum of what the header's checksum covers, in words of two octets, most significant first.
    pub header_sum: u32,
    /// The sum of what the checksum of TCP or UDP covers.
    pub transport_sum: u32,
    /// How many flows take turns: a power of two.
    pub flows: u32,
    /// The interface that frames are sent by.
    pub interface: u32,
    /// [`TCP`] or [`UDP`].
    pub protocol: u32,
    /// Zero.
    pub pad: u32,
}

/// What has to come out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Expected {
    /// The source address.
    pub source: [u8; 4],
    /// Which of its bits count.
    pub mask: [u8; 4],
    /// The destination address.
    pub destination: [u8; 4],
    /// The destination port, most significant octet first.
    pub port: [u8; 2],
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// The time to live: one less for each router on the way.
    pub ttl: u8,
}

/// When frames came out as they should: of two of them, how many there had been before and when that was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Window {
    /// Frames before the first that was noted.
    pub first_count: u64,
    /// When it came, in nanoseconds of CLOCK_MONOTONIC; zero if there was none.
    pub first_time: u64,
    /// Frames before the last that was noted.
    pub last_count: u64,
    /// When it came.
    pub last_time: u64,
}

impl Window {
    /// Notes a frame.
    #[inline(always)]
    pub const fn note(&mut self, count: u64, time: u64) {
        if self.first_time == 0 {
            self.first_count = count;
            self.first_time = time;
        }
        self.last_count = count;
        self.last_time = time;
    }

    /// Frames between the two, and nanoseconds.
    pub const fn between(&self) -> (u64, u64) {
        (
            self.last_count - self.first_count,
            self.last_time - self.first_time,
        )
    }
}

/// What makes one flow's frame from the plan's, most significant octet first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variation {
    /// The source address's last two octets.
    pub host: [u8; 2],
    /// The source port.
    pub port: [u8; 2],
    /// The header's checksum.
    pub header_checksum: [u8; 2],
    /// The checksum of TCP or UDP.
    pub transport_checksum: [u8; 2],
}

impl Plan {
    /// What is of this number's flow alone.
    #[inline(always)]
    pub fn variation(&self, number: u32) -> Variation {
        let flow = number & (self.flows - 1);
        let host = (flow / PORTS) as u16;
        let port = FIRST_PORT + (flow % PORTS) as u16;
        let header = self.header_sum + u32::from(host);
        let transport = self.transport_sum + u32::from(host) + u32::from(port);
        Variation {
            host: host.to_be_bytes(),
            port: port.to_be_bytes(),
            header_checksum: checksum(header).to_be_bytes(),
            transport_checksum: match checksum(transport) {
                // In UDP a zero says that there is none; in TCP both are zero (RFC 768, RFC 9293).
                0 => [0xff; 2],
                other => other.to_be_bytes(),
            },
        }
    }
}

impl Expected {
    /// Whether a frame with these fields is as it should be.
    #[inline(always)]
    pub fn is_met_by(&self, other: &Self) -> bool {
        let word = u32::from_ne_bytes;
        word(other.source) & word(self.mask) == word(self.source)
            && word(other.destination) == word(self.destination)
            && u16::from_ne_bytes(other.port) == u16::from_ne_bytes(self.port)
            && other.protocol == self.protocol
            && other.ttl == self.ttl
    }
}

/// The checksum of what has this sum (RFC 1071).
#[inline(always)]
pub const fn checksum(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "moved in and out of maps")]
mod user {
    use super::{Expected, Plan, Window};

    // SAFETY: made of integers alone, without padding, so that any bytes are one.
    unsafe impl aya::Pod for Plan {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Expected {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Window {}
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: Plan = Plan {
        frame: [0; LENGTH / 8],
        header_sum: 0x1_fff0,
        transport_sum: 0x2_3456,
        flows: 4_096,
        interface: 1,
        protocol: UDP as u32,
        pad: 0,
    };

    #[test]
    fn as_many_flows_take_turns_as_the_plan_says() {
        let of = |number| {
            let Variation { host, port, .. } = PLAN.variation(number);
            (host, port)
        };
        let all: std::collections::BTreeSet<_> = (0..PLAN.flows).map(of).collect();
        assert_eq!(all.len(), 4_096);
        assert_eq!(of(4_096), of(0));
        assert_eq!(of(1_024), ([0, 1], FIRST_PORT.to_be_bytes()));
        assert_eq!(of(4_095), ([0, 3], (FIRST_PORT + 1_023).to_be_bytes()));
    }

    #[test]
    fn the_example_of_rfc_1071_has_its_checksum() {
        assert_eq!(checksum(0x0001 + 0xf203 + 0xf4f5 + 0xf6f7), !0xddf2);
        assert_eq!(checksum(0x1_fffe), 0);
    }

    #[test]
    fn a_checksum_of_zero_is_never_sent() {
        let port = u32::from(FIRST_PORT);
        let plan = Plan {
            transport_sum: 0xffff - port,
            ..PLAN
        };
        assert_eq!(plan.variation(0).transport_checksum, [0xff; 2]);
        assert_eq!(plan.variation(1).transport_checksum, [0xff, 0xfe]);
    }

    #[test]
    fn a_window_is_from_the_first_note_to_the_last() {
        let mut window = Window::default();
        for (count, time) in [(1_024, 50), (2_048, 70), (3_072, 110)] {
            window.note(count, time);
        }
        assert_eq!(window.between(), (2_048, 60));
    }

    #[test]
    fn a_frame_that_differs_in_one_field_is_wrong() {
        let expected = Expected {
            source: [198, 18, 0, 0],
            mask: [255, 255, 0, 0],
            destination: [10, 244, 2, 1],
            port: [0x1f, 0x90],
            protocol: UDP,
            ttl: 63,
        };
        let right = Expected {
            source: [198, 18, 3, 7],
            ..expected
        };
        assert!(expected.is_met_by(&right));
        for wrong in [
            Expected {
                source: [198, 19, 3, 7],
                ..right
            },
            Expected {
                destination: [10, 244, 2, 2],
                ..right
            },
            Expected {
                port: [0x90, 0x1f],
                ..right
            },
            Expected {
                protocol: TCP,
                ..right
            },
            Expected { ttl: 64, ..right },
        ] {
            assert!(!expected.is_met_by(&wrong), "{wrong:?}");
        }
    }
}
