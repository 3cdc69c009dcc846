//! The capability `bandwidth` as the kernel's token bucket filter (TBF) at a link's root, with the
//! numbers of the usual `bandwidth` plugin: rates in bits per second, bursts in bits, and no packet
//! waits for more than 25 ms on top of the burst.

use rtnetlink::packet_core::DefaultNla;
use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcHandle, TcMessage, TcOption},
};

use crate::{error::Failure, netlink::Netlink};

const KIND: &str = "tbf";
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
/// The longest that a packet waits for.
const LATENCY_MS: u64 = 25;
/// An Ethernet header, which the kernel counts as well.
const HEADER: u32 = 14;

/// One direction's limit, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    rate: u64,
    burst: u32,
}

impl Limit {
    /// From bits; `None` where nothing is limited.
    pub fn from_bits(rate: u64, burst: u64) -> Option<Self> {
        (rate != 0).then(|| Self {
            rate: (rate / 8).max(1),
            burst: u32::try_from(burst / 8).unwrap_or(u32::MAX),
        })
    }

    /// A bucket that holds no whole packet would let none through.
    pub fn fits(self, mtu: u32, field: &str) -> Result<(), Failure> {
        let least = mtu + HEADER;
        if self.burst >= least {
            return Ok(());
        }
        let bits = u64::from(least) * 8;
        Err(Failure::config(
            field,
            format!("has to be {bits} bits or more, or no packet of {mtu} bytes comes through"),
        ))
    }

    /// How much may wait: what comes in 25 ms, and a burst.
    fn queue(self) -> u32 {
        let waiting = self.rate.saturating_mul(LATENCY_MS) / 1_000;
        u32::try_from(waiting.saturating_add(u64::from(self.burst))).unwrap_or(u32::MAX)
    }

    /// `struct tc_tbf_qopt` and what came after it.
    fn options(self) -> Vec<TcOption> {
        let mut parameters = Vec::with_capacity(36);
        // struct tc_ratespec, for the rate: cell_log, linklayer (1: Ethernet), overhead,
        // cell_align, mpu, rate, where all ones mean that RATE64 says it.
        parameters.extend([0, 1, 0, 0, 0, 0, 0, 0]);
        parameters.extend(u32::try_from(self.rate).unwrap_or(u32::MAX).to_ne_bytes());
        // The same for the peak rate, which is not limited.
        parameters.extend([0; 12]);
        parameters.extend(self.queue().to_ne_bytes());
        // buffer, in ticks, which BURST overrides, and mtu, which is the peak rate's.
        parameters.extend([0; 8]);
        let mut options = vec![
            DefaultNla::new(TCA_TBF_PARMS, parameters),
            DefaultNla::new(TCA_TBF_BURST, self.burst.to_ne_bytes().to_vec()),
        ];
        if self.rate >= u64::from(u32::MAX) {
            options.push(DefaultNla::new(
                TCA_TBF_RATE64,
                self.rate.to_ne_bytes().to_vec(),
            ));
        }
        options.into_iter().map(TcOption::Other).collect()
    }

    /// Limits what leaves by a link.
    pub async fn apply(self, netlink: &Netlink, index: u32) -> Result<(), Failure> {
        let mut message = TcMessage::with_index(index as i32);
        message.header.parent = TcHandle::ROOT;
        message.header.handle = TcHandle { major: 1, minor: 0 };
        message.attributes = vec![
            TcAttribute::Kind(KIND.to_owned()),
            TcAttribute::Options(self.options()),
        ];
        let what = || format!("limiting link {index} to {} bytes per second", self.rate);
        netlink
            .create(RouteNetlinkMessage::NewQueueDiscipline(message), what)
            .await
    }

    /// Whether something limits what leaves by a link.
    pub async fn is_applied(netlink: &Netlink, index: u32) -> Result<bool, Failure> {
        let request = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::with_index(index as i32));
        let answers = netlink
            .dump(request, "listing queueing disciplines")
            .await?;
        let kind = TcAttribute::Kind(KIND.to_owned());
        Ok(answers.iter().any(|answer| match answer {
            RouteNetlinkMessage::NewQueueDiscipline(found) => {
                found.header.index == index as i32 && found.attributes.contains(&kind)
            }
            _ => false,
        }))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_bandwidth_plugins() {
        assert_eq!(Limit::from_bits(0, 0), None);
        let limit = Limit::from_bits(8_000_000, 800_000).unwrap();
        assert_eq!((limit.rate, limit.burst), (1_000_000, 100_000));
        assert_eq!(limit.queue(), 125_000);
        assert!(limit.fits(1_450, "x").is_ok());
        assert_eq!(
            Limit::from_bits(8, 8)
                .unwrap()
                .fits(1_450, "x")
                .unwrap_err()
                .code(),
            7
        );
        // What containerd passes for no limit of the burst.
        let limit = Limit::from_bits(u64::MAX, u64::from(u32::MAX) * 8).unwrap();
        assert_eq!((limit.burst, limit.queue()), (u32::MAX, u32::MAX));
        assert_eq!(limit.options().len(), 3);
    }
}
