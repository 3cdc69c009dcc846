//! Clients outside whose backends are behind the overlay, at XDP beside the TC hooks over the same maps:
//! what is in a tunnel that XDP made is what TC gives the kernel's device, and what XDP takes out of one
//! and sends on is what TC sends when the device has unwrapped it.

use std::net::IpAddr;

use penstock_common::{
    Addr, AddressKind, Algorithm, Be16, Config, Counter, MASQUERADE_PORTS, OVERLAY_MAC,
    OVERLAY_PEER_MAC, Route, Uplink, V4,
};
use penstock_testbed::{Node, Testbed};

use crate::{
    frame::{self, Spec, TCP, UDP},
    ip,
    kernel::Kernel,
    model::{Endpoint, Model, REDIRECT, Service},
    overlay::{NODES, PEERS, PORT, RANGES, REMOTES, STRANGERS, Tunnel, VNI, route},
    xdp::{
        BACKEND_MAC, BALANCERS, CLIENTS, GATEWAY_MAC, LOOPBACK, XDP_PASS, XDP_REDIRECT, describe,
        ends, inside, lay_out, mac,
    },
};

/// A tunnel's headers between IPv4 addresses, the inner frame's Ethernet header not included.
const OUTSIDE: usize = 14 + 20 + 8 + 8;
/// Whom this node speaks as to pods of other nodes.
const OWN: [&str; 2] = ["10.244.1.1", "fd00:244:1::1"];

fn model() -> Model {
    let mut model = Model::default();
    for half in [0, 1] {
        for proto in [TCP, UDP] {
            model.services.push(Service {
                frontend: (ip(BALANCERS[half]), 80),
                proto,
                backends: vec![(ip(REMOTES[half]), 8_080)],
                drops_when_empty: false,
                has_affinity: false,
                algorithm: Algorithm::Random,
            });
        }
    }
    model
}

/// A node whose tunnels to the peer are between addresses of a family; the Ethernet address that it sends
/// from.
fn prepare(node: &Node, underlay: usize) -> Option<(Kernel, [u8; 6])> {
    let mut kernel = Kernel::without_programs("xo", &model())?;
    lay_out(node);
    for (peer, family) in PEERS.into_iter().zip(["-4", "-6"]) {
        let neighbour = [family, "neigh", "replace", peer, "lladdr", BACKEND_MAC];
        let rest = ["dev", "eth0", "nud", "permanent"];
        let arguments = [&neighbour[..], &rest].concat();
        node.host.run("ip", &arguments).expect("ip");
    }
    let own = describe(&mut kernel, node);
    let mut config: Config = kernel.array("CONFIG").get(&0, 0).expect("CONFIG");
    let [IpAddr::V4(own4), IpAddr::V6(own6)] = OWN.map(ip) else {
        panic!("one of each family");
    };
    config.overlay4 = own4.into();
    config.overlay6 = own6.into();
    config.overlay_ifindex = LOOPBACK.0;
    config.overlay_mtu = 1_450;
    config.overlay_vni = VNI;
    config.overlay_port = Be16::from_host(PORT);
    kernel.array("CONFIG").set(0, config, 0).expect("CONFIG");
    let uplink = Uplink {
        addr4: config.node4,
        addr6: config.node6,
    };
    kernel.put("UPLINKS", LOOPBACK.0, uplink);
    for half in [0, 1] {
        kernel.put_address(ip(OWN[half]), AddressKind::NODE);
        let (text, bits) = RANGES[half];
        kernel.route((ip(text), bits), Some(route(underlay)));
    }
    for name in ["from_uplink", "from_overlay"] {
        kernel.load_classifier(name);
    }
    kernel.load_xdp();
    Some((kernel, own))
}

fn spec(src: Endpoint, dst: Endpoint, proto: u8, tcp_flags: u8) -> Spec {
    Spec {
        src,
        dst,
        proto,
        tcp_flags,
        payload: b"payload of any length".to_vec(),
        options: 0,
        fragment: None,
        without_checksum: false,
    }
}

/// A frame that comes in by the interface of test runs.
fn build(spec: &Spec) -> Vec<u8> {
    let mut frame = frame::build(spec);
    frame[..6].copy_from_slice(&LOOPBACK.1);
    frame
}

fn request(half: usize, proto: u8) -> Spec {
    let (client, balancer) = (ip(CLIENTS[half][0]), ip(BALANCERS[half]));
    spec((client, 40_000), (balancer, 80), proto, 2)
}

/// Has the TC hook begin a flow; what its backend gets, as it enters the kernel's device.
fn begin(kernel: &mut Kernel, request: &Spec) -> Vec<u8> {
    let (verdict, inner) = kernel.run_classifier("from_uplink", &build(request));
    assert_eq!(verdict, REDIRECT);
    assert_eq!(inner[..6], OVERLAY_MAC);
    assert_eq!(inner[6..12], OVERLAY_PEER_MAC);
    inner
}

/// What a backend answers to a request that it got.
fn reply(inner: &[u8]) -> Spec {
    let (proto, source, backend) = ends(inner).expect("a transport");
    let (low, high) = MASQUERADE_PORTS;
    assert!((low..=high).contains(&source.1), "{source:?}");
    spec(backend, source, proto, 0x12)
}

fn be16(frame: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

/// The headers of a tunnel to the peer (RFC 791, RFC 768, RFC 7348).
fn check_outside(sent: &[u8], own: [u8; 6], marks: u8) {
    assert_eq!(sent[..6], mac(BACKEND_MAC));
    assert_eq!(sent[6..12], own);
    assert_eq!(sent[12..14], [8, 0]);
    assert_eq!(sent[14..16], [0x45, marks]);
    assert_eq!(usize::from(be16(sent, 16)), sent.len() - 14);
    assert_eq!(sent[20..22], [0, 0], "any router may split it");
    assert_eq!(sent[22..24], [64, UDP]);
    assert_eq!(frame::fold(frame::sum(&sent[14..34])), 0xffff);
    assert_eq!(sent[26..30], frame::octets(ip(NODES[0])));
    assert_eq!(sent[30..34], frame::octets(ip(PEERS[0])));
    assert!(be16(sent, 34) >= 32_768);
    assert_eq!(be16(sent, 36), PORT);
    assert_eq!(usize::from(be16(sent, 38)), sent.len() - 34);
    assert_eq!(sent[40..42], [0, 0], "no checksum");
    assert_eq!(sent[42..46], [8, 0, 0, 0]);
    assert_eq!(sent[46..50], (VNI << 8).to_be_bytes());
}

fn there_and_back(node: &Node) {
    let Some((mut kernel, own)) = prepare(node, 0) else {
        return;
    };
    let mut sent = 0;
    for (half, proto) in [(0, TCP), (0, UDP), (1, TCP), (1, UDP)] {
        let request = request(half, proto);
        let inner = begin(&mut kernel, &request);
        let answer = reply(&inner);
        let wrapped = Tunnel::to(PEERS[0]).wrap(&frame::build(&answer));
        let (verdict, unwrapped) = kernel.run_classifier("from_overlay", &build(&answer));
        assert_eq!(verdict, REDIRECT);
        assert_eq!(
            ends(&unwrapped),
            Some((proto, request.dst, request.src)),
            "the client sees the service"
        );
        // The second by what was noted of the first.
        for _ in 0..2 {
            let (verdict, out) = kernel.run_xdp(&build(&request));
            assert_eq!(verdict, XDP_REDIRECT, "{half} {proto}");
            check_outside(&out, own, 0);
            assert_eq!(out[OUTSIDE..], inner, "{half} {proto}");

            let (verdict, out) = kernel.run_xdp(&wrapped);
            assert_eq!(verdict, XDP_REDIRECT, "{half} {proto}");
            assert_eq!(out[..6], mac(GATEWAY_MAC));
            assert_eq!(out[6..12], own);
            assert_eq!(out[12..], unwrapped[12..], "{half} {proto}");
            sent += 2;
        }
    }
    assert_eq!(kernel.count(Counter::ExternalXdp), sent);

    // What routers have marked a packet with is outside too, but for congestion (RFC 6040, 4.1).
    for (marks, outside) in [(1, 1), (2, 2), (3, 2)] {
        let mut frame = build(&request(1, UDP));
        frame[15] |= marks << 4;
        let (verdict, out) = kernel.run_xdp(&frame);
        assert_eq!(verdict, XDP_REDIRECT);
        check_outside(&out, own, outside);
        assert_eq!(out[OUTSIDE + 15] >> 4, marks);
    }
}

/// A flow that XDP meets first.
fn begun_here(node: &Node) {
    let Some((mut kernel, own)) = prepare(node, 0) else {
        return;
    };
    for half in [0, 1] {
        // One in some is left to TC.
        let mut begun = (0..64).filter_map(|port| {
            let mut request = request(half, UDP);
            request.src.1 = 41_000 + port;
            let (verdict, out) = kernel.run_xdp(&build(&request));
            (verdict == XDP_REDIRECT).then_some((request, out))
        });
        let (request, out) = begun.next().expect("one of many");
        drop(begun);
        check_outside(&out, own, 0);
        let answer = reply(&out[OUTSIDE..]);
        let (verdict, out) = kernel.run_xdp(&Tunnel::to(PEERS[0]).wrap(&frame::build(&answer)));
        assert_eq!(verdict, XDP_REDIRECT);
        assert_eq!(ends(&out), Some((UDP, request.dst, request.src)));
    }
}

fn unusual(node: &Node) {
    let Some((mut kernel, _)) = prepare(node, 0) else {
        return;
    };
    for half in [0, 1] {
        let request = request(half, TCP);
        let inner = begin(&mut kernel, &request);
        let plain = reply(&inner);
        let answer = frame::build(&plain);
        let peer = || Tunnel::to(PEERS[0]);
        let changed = |change: fn(&mut Spec)| {
            let mut spec = plain.clone();
            change(&mut spec);
            frame::build(&spec)
        };
        let tunnel = |change: fn(&mut Tunnel)| {
            let mut tunnel = peer();
            change(&mut tunnel);
            tunnel.wrap(&answer)
        };
        let mut last_hop = answer.clone();
        last_hop[if half == 0 { 22 } else { 21 }] = 1;
        let mut forged = plain.clone();
        forged.src.0 = ip(["192.0.2.9", "2001:db8::9"][half]);
        let mut elsewhere = plain.clone();
        elsewhere.dst.0 = ip(["10.244.1.77", "fd00:244:1::77"][half]);
        let mut long = request.clone();
        long.payload = vec![7; 1_420];
        let cases = [
            ("it is right", peer().wrap(&answer)),
            ("another node's", Tunnel::to(STRANGERS[0]).wrap(&answer)),
            ("a checksum", tunnel(|tunnel| tunnel.checksum = 0x1234)),
            ("congestion", tunnel(|tunnel| tunnel.ecn = 3)),
            ("handed over", tunnel(|tunnel| tunnel.mac[0] = 6)),
            ("another network", tunnel(|tunnel| tunnel.vni += 1)),
            (
                "a part",
                tunnel(|tunnel| tunnel.fragment = Some((9, 0, true))),
            ),
            ("options", tunnel(|tunnel| tunnel.options = 1)),
            ("the last hop", peer().wrap(&last_hop)),
            ("no node's source", peer().wrap(&frame::build(&forged))),
            ("not for this node", peer().wrap(&frame::build(&elsewhere))),
            (
                "another port",
                peer().wrap(&changed(|spec| spec.dst.1 ^= 1)),
            ),
            (
                "another backend",
                peer().wrap(&changed(|spec| spec.src.1 += 1)),
            ),
            (
                "a part inside",
                peer().wrap(&changed(|spec| spec.fragment = Some((9, 0, true)))),
            ),
            (
                "no IP",
                peer().wrap(&[&answer[..12], &[8, 6], &answer[14..]].concat()),
            ),
            (
                "cut off",
                peer().wrap(&answer[..answer.len() - plain.payload.len() - 8]),
            ),
            ("a tunnel in a tunnel", peer().wrap(&peer().wrap(&answer))),
            ("too long", build(&long)),
        ];
        for (what, frame) in cases {
            let (verdict, out) = kernel.run_xdp(&frame);
            if what == "it is right" {
                assert_eq!(verdict, XDP_REDIRECT, "{half}");
            } else {
                assert_eq!((verdict, out), (XDP_PASS, frame), "{what}: {half}");
            }
        }
        // A request through the overlay is not XDP's, whoever's it is.
        let mut asked = request.clone();
        asked.src.0 = ip(REMOTES[half]);
        let frame = peer().wrap(&frame::build(&asked));
        // Nor once its flow is known.
        let (verdict, _) = kernel.run_classifier("from_uplink", &build(&asked));
        assert_eq!(verdict, REDIRECT);
        for _ in 0..3 {
            assert_eq!(kernel.run_xdp(&frame), (XDP_PASS, frame.clone()));
        }
        // Nor is a tunnel that ends elsewhere.
        kernel.put("UPLINKS", LOOPBACK.0, Uplink::default());
        let frame = peer().wrap(&answer);
        assert_eq!(kernel.run_xdp(&frame), (XDP_PASS, frame));
        let uplink = Uplink {
            addr4: match ip(NODES[0]) {
                IpAddr::V4(ip) => V4::from(ip),
                IpAddr::V6(_) => V4::default(),
            },
            ..Uplink::default()
        };
        kernel.put("UPLINKS", LOOPBACK.0, uplink);
    }
    assert_eq!(kernel.count(Counter::RewriteFailed), 0);
}

/// Tunnels between IPv6 addresses need a checksum over all that is inside.
fn over_ipv6(node: &Node) {
    let Some((mut kernel, _)) = prepare(node, 1) else {
        return;
    };
    let Route { underlay4, .. } = route(1);
    assert!(underlay4.is_unspecified());
    for half in [0, 1] {
        let request = request(half, UDP);
        let inner = begin(&mut kernel, &request);
        let frame = build(&request);
        assert_eq!(kernel.run_xdp(&frame), (XDP_PASS, frame));
        let frame = Tunnel::to(PEERS[1]).wrap(&frame::build(&reply(&inner)));
        assert_eq!(kernel.run_xdp(&frame), (XDP_PASS, frame));
    }
}

#[test]
fn xdp_makes_and_unwraps_the_tunnels_that_the_kernels_device_would() {
    let Some(()) = penstock_testbed::require_kernel() else {
        return;
    };
    let mut testbed = Testbed::new().expect("a testbed");
    let node = testbed.node().expect("a node");
    for check in [there_and_back, begun_here, unusual, over_ipv6] {
        inside(&node, || check(&node));
    }
}
