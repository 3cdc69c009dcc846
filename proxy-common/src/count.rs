//! What is counted for flows, backends and services.
//!
//! A flow's packets are counted beside its record, each direction in a cache line of its own: the
//! two are often seen by different CPUs. Whoever ends a flow takes its counts, which leaves zeros for
//! the record's next flow, and adds them to its backend's. A backend's counts are those of one life
//! of its id, so that they begin at zero without the agent's doing.

use crate::{
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
    pad: [u32; 11],
    /// From the backend.
    pub reply: Traffic,
    pad_after: [u64; 6],
}

impl FlowCounts {
    /// Counts of a flow.
    pub const fn new(request: Traffic, reply: Traffic) -> Self {
        Self {
            request,
            last_stamp: 0,
            pad: [0; 11],
            reply,
            pad_after: [0; 6],
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
    Traffic = 16, FlowCounts = 128, Connections = 16, BackendLife = 12, BackendCounts = 48,
}
