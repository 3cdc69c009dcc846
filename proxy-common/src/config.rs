//! What the agent tells the programs about this node; it may change while they run.

use crate::{
    net::{V4, V6},
    plain::map_types,
};

/// After how many idle seconds a flow is forgotten. Defaults are kube-proxy's and the kernel's.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP, seen in one direction only.
    pub tcp_syn_secs: u32,
    /// TCP, established.
    pub tcp_established_secs: u32,
    /// TCP, after a FIN or RST.
    pub tcp_closing_secs: u32,
    /// UDP, seen in one direction only.
    pub udp_secs: u32,
    /// UDP, seen in both directions.
    pub udp_stream_secs: u32,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            tcp_syn_secs: 60,
            tcp_established_secs: 86_400,
            tcp_closing_secs: 120,
            udp_secs: 30,
            udp_stream_secs: 120,
        }
    }
}

/// The one element of `CONFIG`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// This node's IPv4 address, unspecified if it has none.
    pub node4: V4,
    /// This node's IPv6 address, unspecified if it has none.
    pub node6: V6,
    /// When flows are forgotten.
    pub timeouts: Timeouts,
    /// How many entries `EXCLUDED_CGROUPS` has: with none, nobody looks.
    pub excluded_cgroups: u32,
}

map_types! { Timeouts = 20, Config = 44 }
