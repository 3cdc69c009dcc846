//! What the programs that send and count packets share with who loads them, and their arithmetic.
//!
//! Frames are of IPv4, 64 octets long, and end in [`MARK`], by which those that come out of a node are
//! told from all else. A flow's number says its source address and port; the rest is the same for all.
#![cfg_attr(target_arch = "bpf", no_std)]

/// Words of eight octets that the longest frame has.
pub const WORDS: usize = 11;
/// Of how many frames that came out one is kept and noted: a power of two.
pub const NOTED: u64 = 256;
/// How many of them are kept at most, the last ones: a power of two.
pub const SAMPLES: u32 = 64;
/// What every frame ends with, but for zeros. It looks like nothing else here.
pub const MARK: [u8; 8] = *b"penstock";

/// Where fields are in a frame of a family, of IPv4 without options and IPv6 without extension headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The frame's length in octets, without the four of its check sequence: what Ethernet carries at least and
    /// has room for all fields, in whole words.
    pub length: usize,
    /// The length of IP's header.
    pub ip_header: usize,
    /// The length of an address.
    pub address: usize,
    /// The protocol.
    pub protocol: usize,
    /// The time to live.
    pub ttl: usize,
    /// The source address.
    pub source: usize,
    /// The destination address.
    pub destination: usize,
    /// The source port, which is where the header of TCP or UDP begins.
    pub source_port: usize,
    /// Where [`MARK`] begins.
    pub mark: usize,
}

impl Layout {
    /// IPv4's.
    pub const V4: Self = Self {
        length: 64,
        ip_header: 20,
        address: 4,
        protocol: 23,
        ttl: 22,
        source: 26,
        destination: 30,
        source_port: 34,
        mark: 54,
    };
    /// IPv6's.
    pub const V6: Self = Self {
        length: 88,
        ip_header: 40,
        address: 16,
        protocol: 20,
        ttl: 21,
        source: 22,
        destination: 38,
        source_port: 54,
        mark: 74,
    };

    /// A family's.
    #[inline(always)]
    pub const fn of(is_v6: bool) -> Self {
        if is_v6 { Self::V6 } else { Self::V4 }
    }

    /// The destination port.
    #[inline(always)]
    pub const fn destination_port(&self) -> usize {
        self.source_port + 2
    }

    /// UDP's checksum.
    #[inline(always)]
    pub const fn udp_checksum(&self) -> usize {
        self.source_port + 6
    }

    /// TCP's checksum.
    #[inline(always)]
    pub const fn tcp_checksum(&self) -> usize {
        self.source_port + 16
    }

    /// Words of four octets that an address has.
    #[inline(always)]
    pub const fn address_words(&self) -> usize {
        self.address / 4
    }
}

/// Where fields begin whatever the family, or of IPv4 alone.
pub mod at {
    /// The type in the Ethernet header.
    pub const ETHERTYPE: usize = 12;
    /// The checksum of IPv4's header.
    pub const HEADER_CHECKSUM: usize = 24;
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
    /// source port and the checksums are written for each flow.
    pub frame: [u64; WORDS],
    /// The sum of what the checksum of IPv4's header covers, in words of two octets, most significant first.
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
    /// The source address, as it lies in memory; of IPv4 the first word.
    pub source: [[u8; 4]; 4],
    /// Which of its bits count.
    pub mask: [[u8; 4]; 4],
    /// The destination address.
    pub destination: [[u8; 4]; 4],
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
    /// The checksum of IPv4's header.
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
    /// Whether a frame with these fields is as it should be, of addresses so many words long.
    #[inline(always)]
    pub fn is_met_by(&self, other: &Self, words: usize) -> bool {
        let word = |address: &[[u8; 4]; 4], index: usize| {
            address
                .get(index)
                .map_or(0, |octets| u32::from_ne_bytes(*octets))
        };
        let mut is_met = u16::from_ne_bytes(other.port) == u16::from_ne_bytes(self.port)
            && other.protocol == self.protocol
            && other.ttl == self.ttl;
        for index in 0..words {
            let source = word(&other.source, index) & word(&self.mask, index);
            is_met &= source == word(&self.source, index);
            is_met &= word(&other.destination, index) == word(&self.destination, index);
        }
        is_met
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
        frame: [0; WORDS],
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
    fn layouts_are_of_whole_words_and_have_room_for_all_fields() {
        for layout in [Layout::V4, Layout::V6] {
            assert_eq!(layout.length % 8, 0);
            assert!(layout.length <= WORDS * 8);
            assert_eq!(layout.destination, layout.source + layout.address);
            assert_eq!(layout.source_port, layout.destination + layout.address);
            assert!(layout.tcp_checksum() + 4 <= layout.mark);
            assert!(layout.mark + MARK.len() <= layout.length);
        }
    }

    #[test]
    fn a_frame_that_differs_in_one_field_is_wrong() {
        let first = |word| [word, [0; 4], [0; 4], [0; 4]];
        let expected = Expected {
            source: first([198, 18, 0, 0]),
            mask: first([255, 255, 0, 0]),
            destination: first([10, 244, 2, 1]),
            port: [0x1f, 0x90],
            protocol: UDP,
            ttl: 63,
        };
        let right = Expected {
            source: first([198, 18, 3, 7]),
            ..expected
        };
        assert!(expected.is_met_by(&right, 1));
        let last = [[0; 4], [0; 4], [0; 4], [0, 0, 0, 1]];
        for (wrong, words) in [
            (
                Expected {
                    source: first([198, 19, 3, 7]),
                    ..right
                },
                1,
            ),
            (
                Expected {
                    destination: first([10, 244, 2, 2]),
                    ..right
                },
                1,
            ),
            (
                Expected {
                    port: [0x90, 0x1f],
                    ..right
                },
                1,
            ),
            (
                Expected {
                    protocol: TCP,
                    ..right
                },
                1,
            ),
            (Expected { ttl: 64, ..right }, 1),
            (
                Expected {
                    destination: last,
                    ..right
                },
                4,
            ),
        ] {
            assert!(!expected.is_met_by(&wrong, words), "{wrong:?}");
        }
        let longer = Expected {
            destination: [expected.destination[0], [0; 4], [0; 4], [0, 0, 0, 1]],
            ..right
        };
        assert!(expected.is_met_by(&longer, 1) && !expected.is_met_by(&longer, 4));
    }
}
