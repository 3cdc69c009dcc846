//! What a pod sends to somebody outside who had dialled it before from the port that it goes to: an answer, which
//! keeps the pod's address, or the beginning of something of the pod's own, which gets the node's.

use std::net::IpAddr;

use penstock_common::{Config, Counter, Endpoint as PodEndpoint, NetworkFlags};
use penstock_testbed::{Node, Testbed};

use crate::{
    frame::{self, SCTP, Spec, TCP},
    ip,
    kernel::Kernel,
    model::{Hook, Model, NEXT, REDIRECT},
    plain,
    xdp::{CLIENTS, LOOPBACK, NODES, describe, ends, inside, lay_out},
};

const PODS: [&str; 2] = ["10.244.1.6", "fd00:244:1::6"];

/// A segment of TCP with these flags, or of SCTP with that first chunk.
fn segment(proto: u8, from: (IpAddr, u16), to: (IpAddr, u16), tcp_flags: u8) -> Vec<u8> {
    let mut frame = frame::build(&Spec {
        tcp_flags,
        ..plain(from, to, proto, vec![7; 8])
    });
    frame[..6].copy_from_slice(&LOOPBACK.1);
    frame
}

/// The first segment of a connection, and the one that answers it.
const OPENINGS: [(u8, u8, u8); 2] = [(TCP, 2, 0x12), (SCTP, 1, 2)];

/// Who handed the pod what the client sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// This node's programs.
    Programs,
    /// The kernel.
    Kernel,
}

fn begins(kernel: &mut Kernel, by: By) {
    let is_handed = by == By::Programs;
    let port = if is_handed { 40_000 } else { 40_001 };
    for half in [0, 1] {
        let (pod, client) = ((ip(PODS[half]), 8_080), (ip(CLIENTS[half][0]), port));
        for (proto, opening, answer) in OPENINGS {
            let what = format!("{by:?}, protocol {proto}, {}", pod.0);
            let question = segment(proto, client, pod, opening);
            let (verdict, _) = match by {
                By::Programs => kernel.run_classifier("from_uplink", &question),
                By::Kernel => kernel.run(Hook::ToPod, &question),
            };
            assert_eq!(verdict, if is_handed { REDIRECT } else { NEXT }, "{what}");
            // An answer goes by the way that the question came, as it is.
            let answered = segment(proto, pod, client, answer);
            let (verdict, out) = kernel.run(Hook::FromPod, &answered);
            assert_eq!(verdict, if is_handed { REDIRECT } else { NEXT }, "{what}");
            assert_eq!(ends(&out), Some((proto, pod, client)), "{what}");
            let created = kernel.count(Counter::FlowCreated);
            // What the pod begins is the node's.
            let begun = segment(proto, pod, client, opening);
            let (verdict, out) = kernel.run(Hook::FromPod, &begun);
            assert_eq!(verdict, REDIRECT, "{what}");
            let (_, source, to) = ends(&out).expect("a transport");
            assert_eq!((source.0, to), (ip(NODES[half]), client), "{what}");
            assert_eq!(kernel.count(Counter::FlowCreated), created + 1, "{what}");
        }
    }
}

fn begin(node: &Node) {
    let mut model = Model::default();
    model.nodes = NODES.map(ip).into();
    let Some(mut kernel) = Kernel::without_programs("answers", &model) else {
        return;
    };
    lay_out(node);
    describe(&mut kernel, node);
    for name in ["from_uplink", "from_pod", "to_pod"] {
        kernel.load_classifier(name);
    }
    let pod = PodEndpoint {
        ifindex: LOOPBACK.0,
        ..PodEndpoint::default()
    };
    for text in PODS {
        kernel.put_endpoint(ip(text), pod);
    }
    let config: Config = kernel.array("CONFIG").get(&0, 0).expect("CONFIG");
    let config = Config {
        network: NetworkFlags::FORWARD | NetworkFlags::MASQUERADE,
        ..config
    };
    kernel.array("CONFIG").set(0, config, 0).expect("CONFIG");
    for by in [By::Programs, By::Kernel] {
        begins(&mut kernel, by);
    }
}

#[test]
fn a_pod_that_begins_a_connection_is_not_taken_for_one_that_answers() {
    let Some(()) = penstock_testbed::require_kernel() else {
        return;
    };
    let mut testbed = Testbed::new().expect("a testbed");
    let node = testbed.node().expect("a node");
    inside(&node, || begin(&node));
}
