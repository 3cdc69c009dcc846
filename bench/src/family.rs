//! The two families of addresses.

use std::{
    fmt::{Display, Formatter},
    net::IpAddr,
};

use clap::ValueEnum;
use penstock_testbed::Host;

/// A family of addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Family {
    /// IPv4.
    #[default]
    #[value(name = "ipv4")]
    V4,
    /// IPv6.
    #[value(name = "ipv6")]
    V6,
}

impl Family {
    /// Both, in the order in which they are measured.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// As the API server calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    /// What titles say of it: nothing where it is the usual one.
    pub const fn said(self) -> &'static str {
        match self {
            Self::V4 => "",
            Self::V6 => " over IPv6",
        }
    }

    /// A host's address.
    pub const fn of(self, host: &Host) -> IpAddr {
        match self {
            Self::V4 => host.ip4,
            Self::V6 => host.ip6,
        }
    }
}

impl Display for Family {
    fn fmt(&self, formatter: &mut Formatter) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
        })
    }
}
