//! What can be sent.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// What is sent.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// Connects, asks, is answered, is closed: a connection for each request.
    Connect,
    /// Asks again and again over one TCP connection.
    TcpRr,
    /// Asks again and again over one UDP socket that is connected.
    UdpRr,
    /// Asks again and again over one UDP socket that is not connected.
    UdpSendto,
    /// Sends datagrams over one connected UDP socket, many for each answer.
    UdpPackets,
    /// Sends as much as goes over TCP connections.
    Stream,
    /// wrk: a request over HTTP for each connection.
    Wrk,
    /// wrk: requests over HTTP by connections that stay.
    WrkKept,
    /// iperf3: sends as much as goes over one TCP connection.
    Iperf,
}

impl Workload {
    /// Its name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connect => "TCP connect, request, close",
            Self::TcpRr => "TCP request and response",
            Self::UdpRr => "UDP request and response, connected socket",
            Self::UdpSendto => "UDP request and response, unconnected socket",
            Self::UdpPackets => "UDP datagrams, 32 for each answer",
            Self::Stream => "TCP stream",
            Self::Wrk => "short HTTP by wrk, 8 connections",
            Self::WrkKept => "HTTP by wrk, 8 connections that stay",
            Self::Iperf => "TCP stream by iperf3",
        }
    }

    /// Its name on the command line.
    pub const fn argument(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::TcpRr => "tcp-rr",
            Self::UdpRr => "udp-rr",
            Self::UdpSendto => "udp-sendto",
            Self::UdpPackets => "udp-packets",
            Self::Stream => "stream",
            Self::Wrk => "wrk",
            Self::WrkKept => "wrk-kept",
            Self::Iperf => "iperf",
        }
    }

    /// The program of others that it needs.
    pub const fn program(self) -> Option<&'static str> {
        match self {
            Self::Wrk | Self::WrkKept => Some("wrk"),
            Self::Iperf => Some("iperf3"),
            _ => None,
        }
    }
}

/// When the next request begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// When the last one is answered ("closed loop"): how fast it goes.
    Closed,
    /// When it is due, at so many a second ("open loop"). What waits for an answer that is late
    /// counts its waiting, so that a stall is not one bad sample but as many as it delayed
    /// ("coordinated omission").
    Open(u32),
}
