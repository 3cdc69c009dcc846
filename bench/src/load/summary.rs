//! What a client saw.

use serde::{Deserialize, Serialize};

use crate::figures;

/// All that a client sent and got, what came before it was measured included: what counters on its way have to
/// have seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sent {
    /// TCP connections, or UDP sockets.
    pub connections: u64,
    /// Requests, datagrams or frames.
    pub requests: u64,
    /// Answers that came.
    pub answers: u64,
    /// Octets of streams.
    pub octets: u64,
}

/// What a client saw.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Requests answered, packets that came through, or connections of streams.
    pub count: u64,
    /// How long that took.
    pub seconds: f64,
    /// Requests answered or packets a second; 0 for streams.
    pub per_second: f64,
    /// Bits that arrived a second; 0 for requests.
    pub bits_per_second: f64,
    /// Datagrams that nobody answered, packets that did not come through.
    pub lost: u64,
    /// Nanoseconds from when a request began, or was due, to its answer.
    pub p50: u64,
    /// The same.
    pub p90: u64,
    /// The same.
    pub p99: u64,
    /// The same, of a thousand.
    pub p999: u64,
    /// The longest.
    pub longest: u64,
    /// All of its traffic.
    #[serde(default)]
    pub sent: Sent,
}

impl Summary {
    /// Of requests' times in nanoseconds.
    pub fn of_requests(mut times: Vec<u64>, seconds: f64, lost: u64) -> Self {
        times.sort_unstable();
        let at = |permille| figures::permille(&times, permille);
        Self {
            count: times.len() as u64,
            seconds,
            per_second: times.len() as f64 / seconds,
            bits_per_second: 0.0,
            lost,
            p50: at(500),
            p90: at(900),
            p99: at(990),
            p999: at(999),
            longest: times.last().copied().unwrap_or_default(),
            sent: Sent::default(),
        }
    }

    /// Of packets that came through, beside those that didn't.
    pub fn of_packets(count: u64, seconds: f64, lost: u64) -> Self {
        Self {
            count,
            seconds,
            per_second: count as f64 / seconds,
            lost,
            ..Self::default()
        }
    }

    /// Of streams.
    pub fn of_streams(connections: usize, octets: u64, seconds: f64) -> Self {
        Self {
            count: connections as u64,
            seconds,
            bits_per_second: octets as f64 * 8.0 / seconds,
            ..Self::default()
        }
    }

    /// The same, with all of its traffic.
    #[must_use]
    pub const fn with(self, sent: Sent) -> Self {
        Self { sent, ..self }
    }
}
