//! What this node should serve for one port of a service, in one address family.

use std::{fmt, net::IpAddr, sync::Arc};

use super::object::{Family, ObjectName, Protocol};

/// A port of a service in one family: the unit that has an id, backends and clients' affinity.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortKey {
    /// The service.
    pub service: ObjectName,
    /// The port's name, empty for an unnamed one.
    pub port: Arc<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// The family.
    pub family: Family,
}

impl fmt::Display for PortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.service)?;
        if !self.port.is_empty() {
            write!(f, ":{}", self.port)?;
        }
        let family = if self.family == Family::V4 {
            "IPv4"
        } else {
            "IPv6"
        };
        write!(
            f,
            " {} {family}",
            format!("{:?}", self.protocol).to_uppercase()
        )
    }
}

impl fmt::Debug for PortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a client gets where no endpoint may serve it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnEmpty {
    /// A refusal: there is no endpoint anywhere.
    Reject,
    /// Silence: there are endpoints, but a Local policy leaves none on this node.
    Drop,
}

impl OnEmpty {
    /// What a client meets.
    pub fn words(self) -> &'static str {
        match self {
            Self::Reject => "rejected: no endpoint",
            Self::Drop => "dropped: no endpoint on this node",
        }
    }
}

/// Somebody who serves a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortBackend {
    /// Its address.
    pub address: IpAddr,
    /// Its port, host order.
    pub port: u16,
    /// Whether new connections may go there; without, only UDP flows that are there may stay.
    pub is_selected: bool,
}

/// What this node should serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Which port of which service.
    pub key: PortKey,
    /// Addresses and ports that clients dial, sorted.
    pub frontends: Vec<(IpAddr, u16)>,
    /// Seconds of session affinity, 0 without.
    pub affinity_secs: u32,
    /// What happens where no backend is selected.
    pub on_empty: OnEmpty,
    /// Live backends, sorted by address and port, each once.
    pub backends: Vec<PortBackend>,
}
