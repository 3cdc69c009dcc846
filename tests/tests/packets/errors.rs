//! ICMP errors from the outside about what a service has answered there: its backend has to learn that a client is
//! gone, or what the way to it carries.

use std::net::IpAddr;

use penstock_common::Counter;
use penstock_testbed::{Node, Testbed};

use crate::{
    frame::{self, Header, SCTP, Spec, TCP},
    ip,
    kernel::Kernel,
    model::{Endpoint, REDIRECT},
    plain,
    xdp::{
        BALANCERS, CLIENTS, LOOPBACK, NODES, OPENINGS, PODS, PROTOS, XDP_PASS, describe, ends,
        inside, lay_out, model,
    },
};

/// On the way to clients.
const ROUTERS: [&str; 2] = ["192.0.2.254", "2001:db8:c::fe"];
/// Before the number of a client behind that way, each of whom gets a backend anew.
const MANY: [&str; 2] = ["198.18.8.", "2001:db8:e::"];

/// A flow that is known.
struct Begun {
    proto: u8,
    client: Endpoint,
    frontend: Endpoint,
    /// Whom the backend answers.
    source: Endpoint,
    backend: Endpoint,
}

/// As it comes in.
fn came(mut frame: Vec<u8>) -> Vec<u8> {
    frame[0..6].copy_from_slice(&LOOPBACK.1);
    frame
}

impl Begun {
    fn new(kernel: &mut Kernel, place: usize, client: Endpoint, frontend: Endpoint) -> Self {
        let (proto, tcp_flags) = (PROTOS[place], OPENINGS[place]);
        let opening = came(frame::build(&Spec {
            tcp_flags,
            ..plain(client, frontend, proto, vec![7; 8])
        }));
        let (_, out) = kernel.run_classifier("from_uplink", &opening);
        let (_, source, backend) = ends(&out).expect("a transport");
        Self {
            proto,
            client,
            frontend,
            source,
            backend,
        }
    }

    /// The network packet that a client was sent.
    fn answer(&self) -> Vec<u8> {
        let answer = plain(self.frontend, self.client, self.proto, vec![7; 64]);
        frame::build(&answer).split_off(14)
    }

    /// Somebody did not take an answer, of which so much is quoted: its backend hears of it.
    fn report(&self, kernel: &mut Kernel, speaker: IpAddr, quoted: &[u8]) {
        let outer = plain((speaker, 0), (self.frontend.0, 0), self.proto, vec![]);
        let error = came(frame::icmp_error(speaker, self.frontend.0, &outer, quoted));
        let what = format!(
            "protocol {} of {:?} at {:?}, {} bytes by {speaker}",
            self.proto,
            self.backend,
            self.frontend,
            quoted.len()
        );
        assert!(is_right(&error), "{what}");
        assert_eq!(kernel.run_xdp(&error), (XDP_PASS, error.clone()), "{what}");
        let before = kernel.count(Counter::IcmpError);
        let (verdict, out) = kernel.run_classifier("from_uplink", &error);
        assert_eq!(verdict, REDIRECT, "{what}");
        assert_eq!(kernel.count(Counter::IcmpError), before + 1, "{what}");
        assert!(is_right(&out), "{what}: {out:02x?}");
        let is_v4 = speaker.is_ipv4();
        let outside = frame::header(&out, 14, is_v4).expect("a header");
        let addresses = (self.source.0, self.backend.0);
        assert_eq!((outside.src, outside.dst), addresses, "{what}");
        // What happened, and how much can be carried, with the checksum in between.
        let (message, quote) = (outside.transport, outside.transport + 8);
        assert_eq!(out[message..message + 2], error[message..message + 2]);
        assert_eq!(out[message + 4..quote], error[message + 4..quote]);
        let Header {
            src,
            dst,
            proto,
            transport,
            ..
        } = frame::header(&out, quote, is_v4).expect("a quote");
        let (from, to) = frame::ports(&out, transport).expect("ports");
        assert_eq!(proto, self.proto, "{what}");
        assert_eq!(
            ((src, from), (dst, to)),
            (self.backend, self.source),
            "{what}"
        );
        // The rest of it was nobody's to change.
        assert_eq!(out[transport + 4..], error[transport + 4..], "{what}");
    }
}

/// Whether all checksums of a frame are right.
fn is_right(frame: &[u8]) -> bool {
    let wrongs = frame::wrongs(frame);
    !wrongs.is_empty() && wrongs.iter().all(|wrong| *wrong == 0)
}

fn tell(node: &Node) {
    let Some(mut kernel) = Kernel::without_programs("errors", &model()) else {
        return;
    };
    lay_out(node);
    describe(&mut kernel, node);
    kernel.load_classifier("from_uplink");
    kernel.load_xdp();
    for half in [0, 1] {
        for (place, proto) in PROTOS.into_iter().enumerate() {
            let client = (ip(CLIENTS[half][0]), 40_000);
            let (node, balancer) = (ip(NODES[half]), ip(BALANCERS[half]));
            // This node speaks for the client to those backends, and the last one sees it.
            let mut flows = Vec::from(
                [(node, 30_080), (balancer, 80)]
                    .map(|frontend| Begun::new(&mut kernel, place, client, frontend)),
            );
            assert!(flows.iter().all(|flow| flow.source.0 == node));
            let mut many = 1..255;
            let own = many.find_map(|number| {
                let client = (ip(&format!("{}{number}", MANY[half])), 40_000);
                let flow = Begun::new(&mut kernel, place, client, (balancer, 82));
                (flow.backend.0 == ip(PODS[half])).then_some(flow)
            });
            let own = own.expect("one in four of them");
            assert_eq!(own.source, own.client);
            flows.push(own);
            for flow in flows {
                let answer = flow.answer();
                // As much as need be quoted of what follows the network header (RFC 792), or all.
                let least = answer.len() - 64 - header_of(proto) + 8;
                for quoted in [&answer[..least], &answer] {
                    for speaker in [ip(ROUTERS[half]), flow.client.0] {
                        flow.report(&mut kernel, speaker, quoted);
                    }
                }
            }
        }
    }
}

/// The length of what comes before the payload.
fn header_of(proto: u8) -> usize {
    match proto {
        TCP => 20,
        SCTP => 16,
        _ => 8,
    }
}

#[test]
fn backends_hear_from_outside_what_became_of_their_replies() {
    let Some(()) = penstock_testbed::require_kernel() else {
        return;
    };
    let mut testbed = Testbed::new().expect("a testbed");
    let node = testbed.node().expect("a node");
    inside(&node, || tell(&node));
}
