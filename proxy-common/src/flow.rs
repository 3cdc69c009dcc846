//! Flows that are translated packet by packet: one record a flow, found from either direction.
//!
//! Invariant: `Flow::state` decides who owns a record. It leaves `FREE` and enters `RECLAIMING`
//! only by compare-and-exchange, in a program or in the agent (which maps the array), so a record
//! has one owner while it changes hands. An index entry may outlive its record for a moment: a
//! reader compares the record with the packet before it uses it.

use crate::{
    net::{Addr, Be16, Proto, V4, V6, mixed, place},
    plain::map_types,
    service::{BackendId, ServiceId},
};

/// Index into `FLOWS4` or `FLOWS6`.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowId(pub u32);

/// A packet of a flow as one of the flow's two ends sends it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey<A> {
    /// Source address.
    pub src: A,
    /// Destination address.
    pub dst: A,
    /// Source port.
    pub src_port: Be16,
    /// Destination port.
    pub dst_port: Be16,
    /// The protocol.
    pub proto: Proto,
    /// [`FlowKey::REQUEST`] or [`FlowKey::REPLY`].
    pub direction: u8,
    pad: [u8; 2],
}

impl<A: Addr> FlowKey<A> {
    /// From the client to the service's address.
    pub const REQUEST: u8 = 0;
    /// From the backend to the client, or to the address that stands for it.
    pub const REPLY: u8 = 1;

    /// A key without stray bits.
    #[inline(always)]
    pub const fn new(direction: u8, proto: Proto, src: (A, Be16), dst: (A, Be16)) -> Self {
        Self {
            src: src.0,
            dst: dst.0,
            src_port: src.1,
            dst_port: dst.1,
            proto,
            direction,
            pad: [0; 2],
        }
    }

    /// Of a reply's key: where ports are of the address that the backend answers to.
    #[inline(always)]
    pub fn port_place(&self) -> PortPlace {
        let hash = mixed(mixed(seed(self.proto, self.src_port), self.src), self.dst);
        PortPlace {
            base: place(hash, crate::limits::PORT_CHUNKS),
            check: hash as u32,
        }
    }

    /// Of a reply's key: who sends it.
    #[inline(always)]
    pub fn responder(&self) -> Responder {
        Responder::new(self.proto, self.src, self.src_port)
    }
}

/// Index into `RESPONDERS`: one end of flows, which replies to the other.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Responder(pub u32);

impl Responder {
    /// Where the flows are counted of which this is an end, with those of others that share the element.
    ///
    /// Neighbouring ports have neighbouring elements: a client takes its ports for one destination in order
    /// (Linux, `__inet_hash_connect`), and what is asked of each one lies in the cache line that the last
    /// one brought. Elements anywhere cost each new connection a look at memory.
    #[inline(always)]
    pub fn new<A: Addr>(proto: Proto, addr: A, port: Be16) -> Self {
        let all = crate::limits::RESPONDERS;
        let first = place(mixed(u64::from(proto.0), addr), all);
        Self((first + u32::from(port.to_host())) % all)
    }
}

/// What a hash of an end begins with.
#[inline(always)]
fn seed(proto: Proto, port: Be16) -> u64 {
    u64::from(port.raw()) << 8 | u64::from(proto.0)
}

/// Source ports of a flow, from and to and both of them included.
pub type PortRange = (u16, u16);

/// Source ports of flows to which this node gives an address of its own: below those that the kernel
/// gives to sockets (32,768 to 60,999 by default) and those of node ports (30,000 to 32,767), so
/// that no flow meets another's.
pub const MASQUERADE_PORTS: PortRange = (1_024, 29_999);
/// Source ports for a second flow of one client port to one backend, and for pods that reach
/// themselves: above the range that the kernel gives to sockets by default (ip_local_port_range), so
/// that no socket has one.
pub const REMAPPED_PORTS: PortRange = (61_000, 65_535);

/// An element of `PORT_CHUNKS`: what is known of 64 neighbouring source ports towards one
/// destination, or towards several that share the element.
///
/// Whoever finds all of them taken notes for whom, and how many flows had given one back before it
/// looked; while no other has, nobody looks again.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortChunk {
    /// How many flows gave a port back. Only ever changed atomically.
    pub ended: u64,
    /// [`PortPlace::check`] of whose ports were all taken (upper half) when the lower half of `ended`
    /// was this (lower half). Written whole.
    pub full: u64,
}

impl PortChunk {
    /// How many neighbouring ports are one chunk.
    pub const PORTS: u32 = 64;

    /// What [`Self::full`] is when all ports of a destination are taken.
    #[inline(always)]
    pub const fn when_full(check: u32, ended: u64) -> u64 {
        (check as u64) << 32 | ended as u32 as u64
    }
}

/// Where a destination's port is in `PORT_CHUNKS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortPlace {
    /// The index of the element of the destination's port 0.
    base: u32,
    /// Tells destinations of one element apart. Two that agree in this too are taken for one, which
    /// matters only to a destination that has no free port among those tried by chance.
    pub check: u32,
}

impl PortPlace {
    /// The index of the element that a port belongs to: chunks follow by steps of the destination's
    /// own, around the end. With one step for all, two destinations that begin near each other would
    /// share nearly all elements, and each search would undo the other's.
    #[inline(always)]
    pub const fn index(self, port: u16) -> u32 {
        // Odd steps around a power of two come back only after all elements.
        const { assert!(crate::limits::PORT_CHUNKS.is_power_of_two()) };
        let chunk = port as u32 / PortChunk::PORTS;
        self.base.wrapping_add(chunk.wrapping_mul(self.check | 1)) % crate::limits::PORT_CHUNKS
    }
}

/// After how many idle seconds an established SCTP association is over, whose ends send heartbeats
/// every 30 seconds (RFC 9260, 16); the kernel's own (nf_conntrack_sctp_timeout_established).
pub const SCTP_ESTABLISHED_SECS: u32 = 210;

/// Values of [`Flow::state`].
pub struct FlowState;

impl FlowState {
    /// Nobody's.
    pub const FREE: u32 = 0;
    /// Being written by the program that claimed it.
    pub const CLAIMED: u32 = 1;
    /// Seen in one direction only.
    pub const EMBRYONIC: u32 = 2;
    /// Seen in both directions.
    pub const ESTABLISHED: u32 = 3;
    /// Both ends have sent a FIN, or one a RST.
    pub const CLOSING: u32 = 4;
    /// Being removed by whoever put it here.
    pub const RECLAIMING: u32 = 5;
}

/// Bits of [`Flow::flags`].
pub struct FlowFlags;

impl FlowFlags {
    /// Client and backend are the same pod: the source is translated too, and packets turn around
    /// at the pod's own interface.
    pub const HAIRPIN: u16 = 1;
    /// From a pod to the outside: frontend and backend are the same, the source is this node's.
    pub const MASQUERADE: u16 = 2;
    /// From the outside: packets of this flow go on as they are, without the kernel's routing where
    /// their source is this node's.
    pub const EXTERNAL: u16 = 4;
    /// Handed over to the backend's node, as packets came ([`crate::Handover`]). Replies come back
    /// here.
    pub const TUNNEL: u16 = 32;
    /// Handed over likewise; replies are not seen here.
    pub const DSR: u16 = 64;
    /// Either of the two.
    pub const HANDED_OVER: u16 = Self::TUNNEL | Self::DSR;
    /// Another node handed it over, and gets the replies: `FLOW_VTEPS` says which.
    pub const GOES_BACK: u16 = 128;
    /// It has its source port from a flow that was over: what comes late is that one's.
    pub const SUCCESSOR: u16 = 8;
}

/// Bits of [`Flow::fins`]: who has sent a FIN in a flow while it was established, which is who was
/// first in one that is closing.
pub struct Fins;

impl Fins {
    /// The client.
    pub const CLIENT: u8 = 1;
    /// The backend.
    pub const BACKEND: u8 = 2;
    /// The backend has nothing to remember: the client has broken the connection off or, having ended
    /// it first, has acknowledged the backend's FIN.
    pub const OVER: u8 = 4;
}

/// A flow from a client through a service to a backend.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow<A> {
    /// [`FlowState`].
    pub state: u32,
    /// When a packet was last seen, in seconds since boot.
    pub seen_secs: u32,
    /// The service port.
    pub service: ServiceId,
    /// The backend's id.
    pub backend_id: BackendId,
    /// The backend's generation.
    pub backend_generation: u32,
    /// Who opened the flow.
    pub client: A,
    /// Whom the client addressed.
    pub frontend: A,
    /// Who answers.
    pub backend: A,
    /// Who the backend believes the client is.
    pub source: A,
    /// The client's port.
    pub client_port: Be16,
    /// The frontend's port.
    pub frontend_port: Be16,
    /// The backend's port.
    pub backend_port: Be16,
    /// The port of `source`.
    pub source_port: Be16,
    /// [`FlowFlags`].
    pub flags: u16,
    /// The protocol.
    pub proto: Proto,
    /// [`Fins`].
    pub fins: u8,
}

impl<A: Addr> Flow<A> {
    /// What the client sends.
    #[inline(always)]
    pub fn request_key(&self) -> FlowKey<A> {
        FlowKey::new(
            FlowKey::<A>::REQUEST,
            self.proto,
            (self.client, self.client_port),
            (self.frontend, self.frontend_port),
        )
    }

    /// What the backend sends.
    #[inline(always)]
    pub fn reply_key(&self) -> FlowKey<A> {
        FlowKey::new(
            FlowKey::<A>::REPLY,
            self.proto,
            (self.backend, self.backend_port),
            (self.source, self.source_port),
        )
    }
}

/// All fragments of one datagram (RFC 791, 3.2; RFC 8200, 4.5).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Fragment<A> {
    /// Source address.
    pub src: A,
    /// Destination address.
    pub dst: A,
    /// The identification field, as it lies in the packet; IPv4's 16 bits in the low half.
    pub id: u32,
    /// The protocol.
    pub proto: Proto,
    pad: [u8; 3],
}

impl<A: Addr> Fragment<A> {
    /// A key without stray bits.
    #[inline(always)]
    pub const fn new(src: A, dst: A, id: u32, proto: Proto) -> Self {
        Self {
            src,
            dst,
            id,
            proto,
            pad: [0; 3],
        }
    }
}

/// The ports that only a datagram's first fragment carries.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentPorts {
    /// Source port.
    pub src_port: Be16,
    /// Destination port.
    pub dst_port: Be16,
    /// When it came, in seconds since boot: identifications come around.
    pub seen_secs: u32,
}

impl FragmentPorts {
    /// For how many seconds later fragments are waited for, as the kernel does (ipfrag_time).
    pub const LASTS_SECS: u32 = 30;
}

/// When, and by what way, somebody outside last sent something to a pod.
///
/// Twice the seconds since boot, and the way.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dialled(u32);

impl Dialled {
    /// This node's programs handed it to the pod.
    pub const PAST_KERNEL: u32 = 0;
    /// It came through the kernel's stack, where others may have translated it.
    pub const BY_KERNEL: u32 = 1;

    /// It was at this time, in seconds since boot, by this way.
    #[inline(always)]
    pub const fn new(secs: u32, way: u32) -> Self {
        Self(secs << 1 | way & 1)
    }

    /// [`Dialled::PAST_KERNEL`] or [`Dialled::BY_KERNEL`].
    #[inline(always)]
    pub const fn way(self) -> u32 {
        self.0 & 1
    }

    /// How long ago it was, in seconds.
    #[inline(always)]
    pub const fn age(self, now_secs: u32) -> u32 {
        (now_secs << 1).wrapping_sub(self.0 & !1) >> 1
    }
}

map_types! {
    Dialled = 4, PortChunk = 16, FlowId = 4, FlowKey<V4> = 16, FlowKey<V6> = 40, Flow<V4> = 48, Flow<V6> = 96,
    Fragment<V4> = 16, Fragment<V6> = 40, FragmentPorts = 8,
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// The elements of the ports to which this node gives an address of its own.
    fn elements(place: PortPlace) -> HashSet<u32> {
        let (low, high) = MASQUERADE_PORTS;
        (low..=high).map(|port| place.index(port)).collect()
    }

    #[test]
    fn responders_share_elements_by_chance_alone() {
        let pod = |number: u32| {
            let [.., high, low] = number.to_be_bytes();
            V4::from_octets([10, 244, high, low])
        };
        let port = |number: u32| Be16::from_host(number as u16);
        // All ports of one, and one port of as many pods, by TCP and UDP.
        let of_one = (0..65_536).map(|number| Responder::new(Proto::TCP, pod(7), port(number)));
        assert_eq!(of_one.collect::<HashSet<_>>().len(), 65_536);
        let of_many = (0..2_048).flat_map(|number| {
            [Proto::TCP, Proto::UDP].map(|proto| Responder::new(proto, pod(number), port(53)))
        });
        let distinct = of_many.collect::<HashSet<_>>().len();
        // By chance some 3,970 of 4,096 are the only one in theirs, or the first.
        assert!(distinct > 3_800, "{distinct}");
    }

    #[test]
    fn what_is_asked_of_a_clients_next_connections_is_read_with_the_last_ones() {
        /// Elements in a cache line of 64 bytes.
        const LINE: u32 = 8;
        let client = V6::from_octets([0xfd, 0, 0x10, 0x24, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 9]);
        let ports = (0..1_000_u16).map(|number| 32_768 + 2 * number);
        let lines =
            ports.map(|port| Responder::new(Proto::TCP, client, Be16::from_host(port)).0 / LINE);
        let lines: HashSet<u32> = lines.collect();
        assert!(lines.len() <= 251, "{}", lines.len());
    }

    #[test]
    fn no_two_destinations_of_a_subnet_share_many_elements() {
        let own = V4::from_octets([10, 244, 1, 0]);
        let places = (0..200).map(|number| {
            let backend = V4::from_octets([10, 244, 2, number]);
            let port = Be16::from_host(8_080);
            let from = (backend, port);
            let to = (own, Be16::from_host(1_024));
            let reply = FlowKey::new(FlowKey::<V4>::REPLY, Proto::TCP, from, to);
            elements(reply.port_place())
        });
        let places: Vec<HashSet<u32>> = places.collect();
        let chunks = (MASQUERADE_PORTS.1 / 64 - MASQUERADE_PORTS.0 / 64 + 1) as usize;
        for (number, place) in places.iter().enumerate() {
            // No port's chunk is taken for another's.
            assert_eq!(place.len(), chunks);
            for other in places.iter().take(number) {
                let shared = place.intersection(other).count();
                assert!(shared < chunks / 4, "{shared} of {chunks}");
            }
        }
    }
}
