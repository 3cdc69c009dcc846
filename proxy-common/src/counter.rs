//! What the programs count: one per-CPU counter a verdict, and a reason for every drop.

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal, $class:ident;)*) => {
        /// Index into `COUNTERS`.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Counter {
            $($(#[doc = $doc])+ $name,)*
        }

        impl Counter {
            /// All of them, in the order of their indices.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The name that operators see, in metrics and on the command line.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label),* }
            }

            /// What it counts, in a sentence.
            pub const fn explanation(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+).trim_ascii()),* }
            }

            /// Whether each count is a packet, datagram or connection that did not go through.
            pub const fn is_drop(self) -> bool {
                match self { $(Self::$name => class::$class),* }
            }
        }
    };
}

mod class {
    pub(super) const COUNT: bool = false;
    pub(super) const DROP: bool = true;
}

counters! {
    /// Sockets connected to a backend.
    SocketConnect = "socket_connect", COUNT;
    /// Datagrams of unconnected sockets sent to a backend.
    SocketDatagram = "socket_datagram", COUNT;
    /// Sockets that show their backend's address as their peer's, the kernel having had no storage for
    /// the service's.
    PeerForgotten = "socket_peer_forgotten", COUNT;
    /// Packets to a service translated at a pod.
    PacketRequest = "packet_request", COUNT;
    /// Packets from the outside to a service, translated.
    ExternalRequest = "external_request", COUNT;
    /// Replies to the outside, translated back.
    ExternalReply = "external_reply", COUNT;
    /// Packets from the outside that XDP translated and sent on; each is counted as what it is, too.
    ExternalXdp = "external_xdp", COUNT;
    /// Packets from the outside sent as they came to the node of their backend.
    HandedOver = "handed_over", COUNT;
    /// Replies sent back through the overlay to the node that their clients speak to.
    HandedBack = "handed_back", COUNT;
    /// Replies translated back at a pod.
    PacketReply = "packet_reply", COUNT;
    /// ICMP errors translated together with the packet that they quote.
    IcmpError = "icmp_error", COUNT;
    /// Flows that got a record.
    FlowCreated = "flow_created", COUNT;
    /// Embryonic, closing or expired flows that gave their record, or their source port, to a new flow.
    FlowEvicted = "flow_evicted", COUNT;
    /// Packets put straight into a pod of this node.
    Delivered = "delivered", COUNT;
    /// Packets sent to another node through the overlay.
    OverlaySent = "overlay_sent", COUNT;
    /// Packets of pods sent to the outside with this node's address.
    Masqueraded = "masqueraded", COUNT;
    /// UDP sockets that were connected but could not be remembered, the table being full.
    ConnectedUdpUntracked = "connected_udp_untracked", COUNT;

    /// Rejected: the service has no endpoint.
    NoEndpoints = "no_endpoints", DROP;
    /// Dropped: a Local traffic policy, and no endpoint on this node.
    NoLocalEndpoints = "no_local_endpoints", DROP;
    /// Dropped: the client is in none of the service's `loadBalancerSourceRanges`.
    SourceRefused = "source_refused", DROP;
    /// Rejected: the service's address has no such port.
    UndefinedPort = "undefined_port", DROP;
    /// Rejected, but without an answer: a reset, or more than 1,000 ICMP errors within this second.
    RejectUnanswered = "reject_unanswered", DROP;
    /// Dropped: a packet to a service that ends before its headers do.
    Truncated = "truncated", DROP;
    /// Dropped: a fragment to a service whose first fragment was not seen.
    FragmentUnmatched = "fragment_unmatched", DROP;
    /// Dropped: no flow record is free, and those looked at are all of established flows.
    FlowTableFull = "flow_table_full", DROP;
    /// Dropped: the flow of a packet was gone, or had left its port to another, before the packet
    /// went on in it.
    FlowRace = "flow_race", DROP;
    /// Dropped: a pod reached itself, and this node's address in that family is not known.
    HairpinNoAddress = "hairpin_no_address", DROP;
    /// Dropped: a pod's packet to the outside, by an interface on which this node has no address of
    /// that family.
    MasqueradeNoAddress = "masquerade_no_address", DROP;
    /// Dropped: a packet from the outside for another node, to whose network this node has no
    /// address.
    SourceNoAddress = "source_no_address", DROP;
    /// Dropped: a packet from the outside that does not fit the way to its backend.
    TooLong = "too_long", DROP;
    /// Dropped: flows that stay have every source port towards this backend or address outside.
    NoSourcePort = "no_source_port", DROP;
    /// Dropped: a slot named a backend that does not exist; the agent repairs this.
    BackendMissing = "backend_missing", DROP;
    /// Dropped: a packet in the overlay to an address that is on no other node.
    OverlayNoRoute = "overlay_no_route", DROP;
    /// Dropped: a packet in the overlay that claims to be handed over, from an address that is no
    /// node's.
    HandoverForged = "handover_forged", DROP;
    /// Dropped: a packet that another node handed over, of no flow or for no pod of this node.
    HandoverUnknown = "handover_unknown", DROP;
    /// Dropped: a packet of a pod that would look as if a node sent it through the overlay, or one that
    /// came through a tunnel of another network.
    TunnelForged = "tunnel_forged", DROP;
    /// Dropped: a packet of a pod that has this node's address for its source. The kernel drops these by
    /// itself where no pod is held.
    SourceForged = "source_forged", DROP;
    /// Dropped without an answer: a packet at the end of its life, to or from a backend of another node.
    HopLimit = "hop_limit", DROP;
    /// Dropped: the kernel refused to change the packet, or it is the first fragment of an SCTP packet,
    /// whose checksum covers all of them.
    RewriteFailed = "rewrite_failed", DROP;
}

const _: () = assert!(Counter::ALL.len() <= crate::limits::COUNTERS as usize);

#[cfg(test)]
mod tests {
    use super::Counter;

    #[test]
    fn every_counter_lies_at_its_index() {
        for (index, counter) in Counter::ALL.iter().enumerate() {
            assert_eq!(*counter as usize, index);
        }
    }
}
