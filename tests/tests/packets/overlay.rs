//! Packets between pods of two nodes: which way they go, for how long that is remembered, and what
//! comes out of a tunnel.

use std::net::IpAddr;

use anyhow::ensure;
use penstock_common::{
    Addr, AddressKind, Be16, Config, Counter, Endpoint as PodEndpoint, NetworkFlags, OVERLAY_MAC,
    OVERLAY_PEER_MAC, Proto, Responder, Route, RouteKind, Uplink, V4, V6,
};
use penstock_testbed::eventually;

use crate::{
    frame::{self, Spec, TCP, UDP},
    ip,
    kernel::Kernel,
    model::{Hook, Model, NEXT, REDIRECT},
};

/// Frames of test runs come in by the loopback interface.
const LOOPBACK: u32 = 1;
pub const NODES: [&str; 2] = ["172.31.0.11", "fd00:31::b"];
/// The node that the other pods are on, and one that has none.
pub const PEERS: [&str; 2] = ["172.31.0.12", "fd00:31::c"];
pub const STRANGERS: [&str; 2] = ["172.31.0.13", "fd00:31::d"];
const PODS: [&str; 2] = ["10.244.1.5", "fd00:244:1::5"];
pub const REMOTES: [&str; 2] = ["10.244.2.7", "fd00:244:2::7"];
pub const RANGES: [(&str, u32); 2] = [("10.244.2.0", 24), ("fd00:244:2::", 64)];
const MAC: [u8; 6] = [2, 1, 1, 1, 1, 1];
const HOST_MAC: [u8; 6] = [2, 1, 1, 1, 1, 2];
pub const VNI: u32 = 7;
pub const PORT: u16 = 8_472;

/// A node with one pod, behind the interface that all test runs come in by, and one peer whose tunnels
/// end at its address of a family.
fn node(underlay: usize) -> Option<Kernel> {
    let mut kernel = Kernel::without_programs("overlay", &Model::default())?;
    for name in ["from_pod", "from_uplink"] {
        kernel.load_classifier(name);
    }
    let pod = PodEndpoint {
        ifindex: LOOPBACK,
        flags: 0,
        mac: MAC,
        host_mac: HOST_MAC,
    };
    for family in [0, 1] {
        kernel.put_endpoint(ip(PODS[family]), pod);
        kernel.route(range(family), Some(route(underlay)));
    }
    let [IpAddr::V4(node4), IpAddr::V6(node6)] = NODES.map(ip) else {
        panic!("one of each family");
    };
    let config = Config {
        node4: node4.into(),
        node6: node6.into(),
        network: NetworkFlags::FORWARD,
        overlay_ifindex: LOOPBACK,
        overlay_mtu: 1_450,
        overlay_vni: VNI,
        overlay_port: Be16::from_host(PORT),
        ..Config::default()
    };
    kernel.array("CONFIG").set(0, config, 0).expect("CONFIG");
    let uplink = Uplink {
        addr4: node4.into(),
        addr6: node6.into(),
    };
    kernel.put("UPLINKS", LOOPBACK, uplink);
    Some(kernel)
}

fn range(family: usize) -> (IpAddr, u32) {
    let (text, bits) = RANGES[family];
    (ip(text), bits)
}

/// Through the tunnel to the peer's address of a family.
pub fn route(underlay: usize) -> Route {
    let mut route = Route {
        kind: RouteKind::OVERLAY,
        ..Route::default()
    };
    match ip(PEERS[underlay]) {
        IpAddr::V4(ip) => route.underlay4 = V4::from(ip),
        IpAddr::V6(ip) => route.underlay6 = V6::from(ip),
    }
    route
}

fn spec(src: &str, dst: &str, proto: u8) -> Spec {
    Spec {
        src: (ip(src), 40_000),
        dst: (ip(dst), 8_080),
        proto,
        tcp_flags: 0x10,
        payload: b"payload of any length".to_vec(),
        options: 0,
        fragment: None,
        without_checksum: false,
    }
}

/// Writes when tables changed, as the agent does.
fn note_change(kernel: &mut Kernel, number: u64) {
    kernel.array("CHANGED").set(0, number, 0).expect("CHANGED");
}

/// Where the next packet from the pod to the other node's goes: whether into the tunnel.
fn is_tunnelled(kernel: &mut Kernel, family: usize) -> bool {
    let frame = frame::build(&spec(PODS[family], REMOTES[family], TCP));
    let before = kernel.count(Counter::OverlaySent);
    let (verdict, out) = kernel.run(Hook::FromPod, &frame);
    let is_sent = kernel.count(Counter::OverlaySent) > before;
    assert_eq!(verdict, if is_sent { REDIRECT } else { NEXT });
    if is_sent {
        assert_eq!(out[..6], OVERLAY_MAC);
        assert_eq!(out[6..12], OVERLAY_PEER_MAC);
    } else {
        assert_eq!(out, frame);
    }
    is_sent
}

#[test]
fn a_way_is_remembered_until_a_table_changes() {
    for family in [0, 1] {
        let Some(mut kernel) = node(0) else {
            return;
        };
        note_change(&mut kernel, 1);
        assert!(is_tunnelled(&mut kernel, family));
        // Nobody says so: what was decided holds, but not for long.
        kernel.route(range(family), None);
        assert!(is_tunnelled(&mut kernel, family), "it is remembered");
        let forgotten = eventually("the way is forgotten", || {
            ensure!(!is_tunnelled(&mut kernel, family));
            Ok(())
        });
        forgotten.expect("within seconds");
        // Where it goes otherwise is remembered too, and said to have changed.
        kernel.route(range(family), Some(route(0)));
        note_change(&mut kernel, 2);
        assert!(is_tunnelled(&mut kernel, family));
        kernel.route(range(family), None);
        note_change(&mut kernel, 3);
        assert!(!is_tunnelled(&mut kernel, family));
        // The address becomes a service's, of which this port is none.
        kernel.route(range(family), Some(route(0)));
        note_change(&mut kernel, 4);
        assert!(is_tunnelled(&mut kernel, family));
        kernel.put_address(ip(REMOTES[family]), AddressKind::SERVICE);
        note_change(&mut kernel, 5);
        let frame = frame::build(&spec(PODS[family], REMOTES[family], TCP));
        let (verdict, _) = kernel.run(Hook::FromPod, &frame);
        assert_eq!(verdict, REDIRECT, "refused, to whom it came from");
        assert_eq!(kernel.count(Counter::UndefinedPort), 1);
    }
}

#[test]
fn only_a_pods_own_packets_enter_the_overlay() {
    for family in [0, 1] {
        let Some(mut kernel) = node(0) else {
            return;
        };
        assert!(is_tunnelled(&mut kernel, family));
        let forged = ["10.244.1.6", "fd00:244:1::6"][family];
        for _ in 0..2 {
            let frame = frame::build(&spec(forged, REMOTES[family], UDP));
            assert_eq!(kernel.run(Hook::FromPod, &frame), (NEXT, frame));
        }
    }
}

/// A tunnel's packet to this node.
pub struct Tunnel {
    pub from: &'static str,
    pub vni: u32,
    pub checksum: u16,
    pub fragment: Option<(u32, u16, bool)>,
    pub options: usize,
    /// Where the frame inside goes.
    pub mac: [u8; 6],
    /// What routers have marked it with (RFC 3168).
    pub ecn: u8,
}

impl Tunnel {
    pub fn to(from: &'static str) -> Self {
        Self {
            from,
            vni: VNI,
            checksum: 0,
            fragment: None,
            options: 0,
            mac: OVERLAY_MAC,
            ecn: 0,
        }
    }

    /// Around a frame (RFC 7348, 5).
    pub fn wrap(&self, inner: &[u8]) -> Vec<u8> {
        let family = usize::from(ip(self.from).is_ipv6());
        let mut segment = Vec::new();
        segment.extend(50_000_u16.to_be_bytes());
        segment.extend(PORT.to_be_bytes());
        segment.extend((16 + inner.len() as u16).to_be_bytes());
        segment.extend(self.checksum.to_be_bytes());
        segment.extend([8, 0, 0, 0]);
        segment.extend((self.vni << 8).to_be_bytes());
        segment.extend(self.mac);
        segment.extend(&inner[6..]);
        let outer = Spec {
            fragment: self.fragment,
            options: self.options,
            ..spec(self.from, NODES[family], UDP)
        };
        let (src, dst) = (outer.src.0, outer.dst.0);
        let mut frame = frame::wrap(src, dst, UDP, &outer, &segment);
        // The loopback device's Ethernet address.
        frame[..6].fill(0);
        frame[15] |= if family == 0 { self.ecn } else { self.ecn << 4 };
        frame
    }
}

/// What a pod gets of a frame of another node's pod.
fn in_pod(inner: &[u8]) -> Vec<u8> {
    let mut frame = inner.to_vec();
    frame[..6].copy_from_slice(&MAC);
    frame[6..12].copy_from_slice(&HOST_MAC);
    if frame::family(inner) == Some(true) {
        frame[22] -= 1;
        frame[24..26].fill(0);
        let checksum = !frame::fold(frame::sum(&frame[14..34]));
        frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    } else {
        frame[21] -= 1;
    }
    frame
}

/// Whether the kernel can take a tunnel of the other family away (`BPF_F_ADJ_ROOM_DECAP_L3_IPV4`).
fn unwraps_other_family() -> bool {
    let release = nix::sys::utsname::uname()
        .expect("uname")
        .release()
        .to_owned();
    let release = release.to_str().expect("a text");
    let mut numbers = release
        .split('.')
        .map(|part| part.parse::<u32>().expect(release));
    (numbers.next(), numbers.next()) >= (Some(6), Some(3))
}

#[test]
fn what_comes_through_a_tunnel_goes_into_its_pod() {
    for underlay in [0, 1] {
        let Some(mut kernel) = node(underlay) else {
            return;
        };
        let mut delivered = 0;
        for (family, proto) in [(0, TCP), (0, UDP), (1, TCP), (1, UDP)] {
            let inner = frame::build(&spec(REMOTES[family], PODS[family], proto));
            let frame = Tunnel::to(PEERS[underlay]).wrap(&inner);
            // The second by what was noted of the first.
            for _ in 0..2 {
                let got = kernel.run_classifier("from_uplink", &frame);
                if family == underlay || unwraps_other_family() {
                    let expected = (REDIRECT, in_pod(&inner));
                    assert_eq!(got, expected, "{family} in {underlay}");
                    delivered += 1;
                } else {
                    assert_eq!(got, (NEXT, frame.clone()), "{family} in {underlay}");
                }
            }
        }
        assert_eq!(kernel.count(Counter::Delivered), delivered);
    }
}

#[test]
fn tunnels_end_at_the_interface_with_the_nodes_address() {
    for underlay in [0, 1] {
        let Some(mut kernel) = node(underlay) else {
            return;
        };
        let inner = frame::build(&spec(REMOTES[underlay], PODS[underlay], TCP));
        let frame = Tunnel::to(PEERS[underlay]).wrap(&inner);
        let run = |kernel: &mut Kernel| kernel.run_classifier("from_uplink", &frame);
        assert_eq!(run(&mut kernel).0, REDIRECT);
        kernel.put("UPLINKS", LOOPBACK, Uplink::default());
        note_change(&mut kernel, 1);
        assert_eq!(run(&mut kernel), (NEXT, frame.clone()));
    }
}

#[test]
fn what_is_unusual_is_left_in_its_tunnel() {
    for underlay in [0, 1] {
        let Some(mut kernel) = node(underlay) else {
            return;
        };
        let peer = || Tunnel::to(PEERS[underlay]);
        let mut delivered = 0;
        for family in [0, 1] {
            let plain = spec(REMOTES[family], PODS[family], TCP);
            let inner = frame::build(&plain);
            let mut last_hop = inner.clone();
            last_hop[if family == 0 { 22 } else { 21 }] = 1;
            let nobody = ["10.244.1.77", "fd00:244:1::77"][family];
            let outside = ["192.0.2.9", "2001:db8::9"][family];
            let build = |spec: Spec| frame::build(&spec);
            let cases = [
                (
                    "another node's",
                    Tunnel::to(STRANGERS[underlay]).wrap(&inner),
                ),
                (
                    "a checksum",
                    Tunnel {
                        checksum: 0x1234,
                        ..peer()
                    }
                    .wrap(&inner),
                ),
                ("congestion", Tunnel { ecn: 3, ..peer() }.wrap(&inner)),
                (
                    "handed over",
                    Tunnel {
                        mac: [6, 0, 0, 0, 0, 1],
                        ..peer()
                    }
                    .wrap(&inner),
                ),
                (
                    "another network",
                    Tunnel {
                        vni: VNI + 1,
                        ..peer()
                    }
                    .wrap(&inner),
                ),
                (
                    "a part",
                    Tunnel {
                        fragment: Some((9, 0, true)),
                        ..peer()
                    }
                    .wrap(&inner),
                ),
                (
                    "options",
                    Tunnel {
                        options: 1,
                        ..peer()
                    }
                    .wrap(&inner),
                ),
                ("the last hop", peer().wrap(&last_hop)),
                (
                    "no pod",
                    peer().wrap(&build(spec(REMOTES[family], nobody, TCP))),
                ),
                (
                    "no node's source",
                    peer().wrap(&build(spec(outside, PODS[family], TCP))),
                ),
                (
                    "cut off",
                    peer().wrap(&inner[..inner.len() - plain.payload.len() - 20]),
                ),
                (
                    "no IP",
                    peer().wrap(&[&inner[..12], &[8, 6], &inner[14..]].concat()),
                ),
                (
                    "a part inside",
                    peer().wrap(&build(Spec {
                        fragment: Some((9, 0, true)),
                        ..plain.clone()
                    })),
                ),
            ];
            for (what, frame) in cases {
                let got = kernel.run_classifier("from_uplink", &frame);
                assert_eq!(got, (NEXT, frame), "{what}: {family} in {underlay}");
            }
            // A translated request went to this sender: what it sends may be the reply.
            let responder = match ip(REMOTES[family]) {
                IpAddr::V4(ip) => responder(V4::from(ip)),
                IpAddr::V6(ip) => responder(V6::from(ip)),
            };
            let frame = peer().wrap(&inner);
            kernel
                .array("RESPONDERS")
                .set(responder, 1_u64, 0)
                .expect("RESPONDERS");
            let got = kernel.run_classifier("from_uplink", &frame);
            assert_eq!(
                got,
                (NEXT, frame.clone()),
                "a reply: {family} in {underlay}"
            );
            kernel
                .array("RESPONDERS")
                .set(responder, 0_u64, 0)
                .expect("RESPONDERS");
            if family == underlay || unwraps_other_family() {
                let (verdict, _) = kernel.run_classifier("from_uplink", &frame);
                assert_eq!(verdict, REDIRECT);
                delivered += 1;
            }
        }
        assert_eq!(kernel.count(Counter::Delivered), delivered);
    }
}

fn responder<A: Addr>(addr: A) -> u32 {
    let port = Be16::from_host(40_000);
    Responder::new(Proto::TCP, addr, port).0
}
