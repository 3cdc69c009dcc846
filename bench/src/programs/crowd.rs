//! More flows to one node port than caches hold, all of them known.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use penstock_testbed::{Pod, Service, Slice};
use serde_json::Value;

use super::{
    ACK, Kind, SYN, Subject, Turn, check,
    frames::{answer, frame},
    loaded::{Programs, Run},
    worked,
};

/// Flows of one client's, where there are many.
const PER_CLIENT: usize = 100;
/// How often a turn of many flows is tried.
const ATTEMPTS: usize = 4;
/// Ports of the service that has many flows: one backend has a source port of the node's for 28,976 of each.
const PORTS: usize = 8;
/// Their first node port.
const FIRST_PORT: u16 = 30_100;
/// Flows that are all known at once.
pub(super) struct Crowd {
    pub(super) program: &'static str,
    pub(super) is_v4: bool,
    verdict: i32,
    pub(super) known: Vec<Vec<u8>>,
    replies: Vec<Vec<u8>>,
}

/// A service with several ports, for many flows to one backend.
pub(super) fn service(backend: &Pod) -> Vec<Value> {
    let numbers = || 0..PORTS as u16;
    let service = numbers().fold(Service::new("crowd", 11), |service, number| {
        service.port(&format!("p{number}"), 80 + number, "TCP")
    });
    let slices = [true, false].map(|is_v4| {
        let slice = Slice::new("crowd", is_v4).pod(backend);
        let slice = numbers().fold(slice, |slice, number| {
            slice.port(&format!("p{number}"), 8_100 + number, "TCP")
        });
        slice.json()
    });
    let service = service.balanced(FIRST_PORT, &[]).json();
    std::iter::once(service).chain(slices).collect()
}

impl Crowd {
    /// Begins so many flows; those are kept that the program serves.
    pub(super) fn gather(
        programs: &mut Programs,
        subject: &Subject,
        is_v4: bool,
        flows: usize,
    ) -> Result<Self> {
        let net = subject.crowd.context("nobody comes from elsewhere")?;
        let requests =
            |flags| (0..flows).map(move |index| crowds(subject, net, is_v4, index, flags));
        let first: Vec<_> = requests(SYN).collect();
        let translated = programs.translate(subject, &first)?;
        let mut crowd = Self {
            program: subject.request,
            is_v4,
            verdict: subject.verdict,
            known: Vec::new(),
            replies: Vec::new(),
        };
        let begun: Vec<_> = requests(ACK).collect();
        for (index, _, frame) in translated {
            crowd.known.extend(begun.get(index).cloned());
            let reply = answer(&frame, is_v4).context("a translated packet")?;
            crowd.replies.push(reply);
        }
        check(crowd.program, Kind::ManyKnown, (crowd.known.len(), flows))?;
        // Not in the order in which they began, which memory and caches may like.
        for frames in [&mut crowd.known, &mut crowd.replies] {
            *frames = scattered(frames);
        }
        Ok(crowd)
    }

    /// Has each flow be as known as it can be. What the first of a flow and direction finds out, the others need not
    /// ask; and XDP leaves the first in sixteen seconds to TC, whose hook says when that was.
    fn warm(&self, programs: &mut Programs, frames: &[Vec<u8>]) -> Result<()> {
        let runs = programs.run_all(self.program, frames)?;
        let left = runs.iter().zip(frames);
        let left = left.filter(|(run, _)| run.verdict != self.verdict || !run.is_changed);
        let left: Vec<_> = left.map(|(_, frame)| frame.clone()).collect();
        if left.is_empty() {
            return Ok(());
        }
        programs.run_all("from_uplink", &left)?;
        programs.run_all(self.program, &left).map(drop)
    }

    /// One packet of each flow, and one reply.
    pub(super) fn turn(&self, programs: &mut Programs) -> Result<Turn> {
        let times = |runs: Vec<Run>| runs.iter().map(|run| run.nanos).collect();
        let empty = times(programs.run_empty(self.program, &self.known)?);
        let mut done = vec![(self.program, Kind::ManyEmpty, empty)];
        if self.program == "xdp_uplink" {
            let looked = times(programs.look(self.known.len())?);
            done.push((self.program, Kind::ManyLooked, looked));
        }
        for (kind, frames) in [
            (Kind::ManyKnown, &self.known),
            (Kind::ManyReply, &self.replies),
        ] {
            // The seconds of which XDP leaves the first packet to TC may begin in between.
            let mut attempts = 0;
            let turn = loop {
                self.warm(programs, frames)?;
                let runs = programs.run_all(self.program, frames)?;
                let worked = worked(self.program, kind, self.verdict, &runs);
                attempts += 1;
                if worked.is_ok() || attempts == ATTEMPTS {
                    break worked?;
                }
            };
            done.push(turn);
        }
        Ok(done)
    }
}

/// The packet of one of many flows.
fn crowds(subject: &Subject, net: u8, is_v4: bool, index: usize, flags: u8) -> Vec<u8> {
    let (client, port) = (1 + index / PER_CLIENT, 2_000 + index % PER_CLIENT);
    let (high, low) = ((client >> 8) as u8, client as u8);
    let (client, service): (IpAddr, IpAddr) = if is_v4 {
        let client = Ipv4Addr::new(198, 18 + net, high, low);
        (client.into(), subject.service.0.into())
    } else {
        let client = Ipv6Addr::new(0x2001, 2, net.into(), 0, 0, 0, 0, client as u16);
        (client.into(), subject.service.1.into())
    };
    let to = FIRST_PORT + (index % PORTS) as u16;
    frame((client, port as u16), (service, to), flags)
}

/// The same in another order, which is always the same.
pub(super) fn scattered(frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
    // A prime that is longer than any list has no divisor in common with its length.
    const STEP: usize = 2_147_483_647;
    let order = (0..frames.len()).map(|index| index * STEP % frames.len());
    order
        .filter_map(|index| frames.get(index).cloned())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{super::XDP_REDIRECT, *};

    #[test]
    fn many_flows_are_all_different_and_none_gets_lost_by_scattering() {
        let subject = Subject {
            request: "xdp_uplink",
            reply: "xdp_uplink",
            verdict: XDP_REDIRECT,
            clients: (Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST),
            service: (Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST),
            port: 80,
            crowd: Some(1),
        };
        for is_v4 in [true, false] {
            let frames = (0..100_000).map(|index| crowds(&subject, 1, is_v4, index, ACK));
            let frames: Vec<_> = frames.collect();
            let all: BTreeSet<_> = frames.iter().collect();
            assert_eq!(all.len(), frames.len());
            let scattered = scattered(&frames);
            assert_eq!(scattered.iter().collect::<BTreeSet<_>>(), all);
            assert_ne!(
                scattered.first().zip(scattered.get(1)),
                frames.first().zip(frames.get(1))
            );
        }
    }
}
