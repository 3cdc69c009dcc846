//! What is counted for flows, backends and services.
//!
//! A flow's packets are counted beside its record, each direction in a cache line of its own: the
//! two are often seen by different CPUs. Whoever ends a flow takes its counts, which leaves zeros for
//! the record's next flow, and adds them to its backend's. A backend's counts are those of one life
//! of its id, so that they begin at zero without the agent's doing.

use crate::{
    hop::Hop,
    plain::map_types,
    service::{BackendId, ServiceId},
};

/// What went one way.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Packets as the hooks see them: what is segmented later, or was joined before, is one.
    pub packets: u64,
    /// Their bytes, IP headers included.
    pub bytes: u64,
}

impl Traffic {
    /// Both together.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            packets: self.packets.wrapping_add(other.packets),
            bytes: self.bytes.wrapping_add(other.bytes),
        }
    }
}

/// A flow's packets so far.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowCounts {
    /// From the client.
    pub request: Traffic,
    /// The timestamp (RFC 7323) of the client's FIN, 0 without one: here, since it is the same
    /// direction's cache line.
    pub last_stamp: u32,
    pad: u32,
    /// Where they went: here for the same reason, since XDP asks for it whenever it counts.
    pub request_hop: Hop,
    pad_between: u64,
    /// From the backend.
    pub reply: Traffic,
    /// Where they went.
    pub reply_hop: Hop,
    pad_after: [u64; 2],
}

impl FlowCounts {
    /// Counts of a flow.
    pub const fn new(request: Traffic, reply: Traffic) -> Self {
        Self {
            request,
            last_stamp: 0,
            pad: 0,
            request_hop: Hop::NONE,
            pad_between: 0,
            reply,
            reply_hop: Hop::NONE,
            pad_after: [0; 2],
        }
    }

    /// Both together.
    #[must_use]
    pub const fn plus(self, other: &Self) -> Self {
        Self::new(
            self.request.plus(other.request),
            self.reply.plus(other.reply),
        )
    }
}

/// Connections and flows that a backend was given, in the present life of its id or, until the next
/// one is given its first, in the last. Whoever begins a life moves what was counted of the one before
/// into `BACKEND_COUNTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connections {
    /// The id's generation.
    pub generation: u32,
    /// The service port.
    pub service: ServiceId,
    /// How many.
    pub count: u64,
}

/// How many connections a backend had when the agent last counted those that were there, and how many
/// it had been given until then: what it was given since counts as there, too, until the agent looks
/// again. Only backends of services with the algorithm `least-connections` are counted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// The id's generation.
    pub generation: u32,
    /// Flows and connected sockets.
    pub live: u32,
    /// [`Connections::count`] at that time.
    pub given: u64,
}

impl Load {
    /// How many connections a backend has, by what it was given in the present life of its id.
    #[inline(always)]
    pub fn now(seen: Option<Self>, generation: u32, given: u64) -> u32 {
        let all = match seen {
            Some(seen) if seen.generation == generation => {
                u64::from(seen.live) + given.saturating_sub(seen.given)
            }
            // Nobody has looked yet.
            _ => given,
        };
        if all > u64::from(u32::MAX) {
            u32::MAX
        } else {
            all as u32
        }
    }

    /// Whether the second of two backends, each with its connections and its weight, has fewer for its
    /// weight than the first.
    #[inline(always)]
    pub const fn is_second_lighter(first: (u32, u32), second: (u32, u32)) -> bool {
        (second.0 as u64) * (first.1 as u64) < (first.0 as u64) * (second.1 as u64)
    }
}

/// One life of a backend's id, as one of those see it who add to its counts.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendLife {
    /// The backend's id.
    pub backend: BackendId,
    /// The id's generation.
    pub generation: u32,
    /// [`BackendLife::PROGRAMS`] or [`BackendLife::AGENT`], which can't add to one number together.
    pub author: u32,
}

impl BackendLife {
    /// What programs counted.
    pub const PROGRAMS: u32 = 0;
    /// What the agent counted: flows that it ended.
    pub const AGENT: u32 = 1;
}

/// What went to a backend and came back, as far as it is over.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendCounts {
    /// The service port.
    pub service: ServiceId,
    pad: u32,
    /// Connections and flows that it was given, once another life of its id has begun.
    pub connections: u64,
    /// What flows that have ended brought it.
    pub request: Traffic,
    /// What it answered in them.
    pub reply: Traffic,
}

impl BackendCounts {
    /// Nothing yet.
    pub const fn new(service: ServiceId) -> Self {
        let none = Traffic {
            packets: 0,
            bytes: 0,
        };
        Self {
            service,
            pad: 0,
            connections: 0,
            request: none,
            reply: none,
        }
    }

    /// Both together; the service is `self`'s.
    #[must_use]
    pub const fn plus(self, other: &Self) -> Self {
        Self {
            connections: self.connections.wrapping_add(other.connections),
            request: self.request.plus(other.request),
            reply: self.reply.plus(other.reply),
            ..self
        }
    }

    /// With the packets of a flow that has ended.
    #[must_use]
    pub const fn with(self, flow: &FlowCounts) -> Self {
        Self {
            request: self.request.plus(flow.request),
            reply: self.reply.plus(flow.reply),
            ..self
        }
    }
}

map_types! {
    Traffic = 16, FlowCounts = 128, Connections = 16, Load = 16, BackendLife = 12, BackendCounts = 48,
}

#[cfg(test)]
mod tests {
    use super::Load;

    #[test]
    fn a_load_is_what_was_seen_and_what_came_since() {
        let seen = |generation, live, given| {
            Some(Load {
                generation,
                live,
                given,
            })
        };
        for (seen, given, load) in [
            (None, 0, 0),
            (None, 7, 7),
            (seen(3, 5, 100), 100, 5),
            (seen(3, 5, 100), 104, 9),
            // Read one after the other, these may seem to go back.
            (seen(3, 5, 100), 99, 5),
            // Another life's.
            (seen(2, 5, 100), 4, 4),
            (seen(3, u32::MAX, 0), u64::MAX / 2, u32::MAX),
        ] {
            assert_eq!(Load::now(seen, 3, given), load, "{seen:?} {given}");
        }
    }

    #[test]
    fn loads_are_compared_by_weight() {
        let lighter = Load::is_second_lighter;
        assert!(lighter((2, 1), (1, 1)));
        // The first stays where nothing speaks against it.
        assert!(!lighter((1, 1), (1, 1)) && !lighter((0, 5), (0, 1)));
        assert!(lighter((4, 1), (9, 3)) && !lighter((3, 1), (9, 3)));
        let most = (u32::MAX, 65_535);
        assert!(!lighter(most, most) && lighter((u32::MAX, 65_534), most));
    }
}
