//! Packets of a pod whose host end has somebody else's ingress queueing discipline: translated, and then
//! the kernel's.

use penstock_common::{Algorithm, Config, Counter, Endpoint as PodEndpoint, NetworkFlags};

use crate::{
    frame::{self, Spec, TCP, UDP},
    ip,
    kernel::Kernel,
    model::{Hook, Model, NEXT, REDIRECT, SHOT, Service},
    overlay::{NODES, RANGES, REMOTES, route},
};

/// Frames of test runs come in by the loopback interface.
const LOOPBACK: u32 = 1;
const PODS: [&str; 2] = ["10.244.1.5", "fd00:244:1::5"];
/// Behind another interface of this node.
const NEIGHBOURS: [&str; 2] = ["10.244.1.6", "fd00:244:1::6"];
const SERVICES: [&str; 2] = ["10.96.0.1", "fd00:96::1"];
const OUTSIDE: [&str; 2] = ["192.0.2.9", "2001:db8::9"];
const PORT: u16 = 8_080;

/// A node with two pods, of which the one behind the loopback interface is held if that is so, and another
/// node's pod that is a service's backend.
fn node(flags: u32, is_held: bool) -> Option<Kernel> {
    let mut model = Model::default();
    model.nodes = NODES.map(ip).into();
    for family in [0, 1] {
        let frontend = (ip(SERVICES[family]), 80);
        model.service_addrs.insert(frontend.0);
        for proto in [TCP, UDP] {
            model.services.push(Service {
                frontend,
                proto,
                backends: vec![(ip(REMOTES[family]), PORT)],
                drops_when_empty: false,
                has_affinity: false,
                algorithm: Algorithm::Random,
            });
        }
    }
    let mut kernel = Kernel::without_programs("held", &model)?;
    kernel.load_classifier("from_pod");
    for family in [0, 1] {
        for (pod, ifindex) in [(PODS[family], LOOPBACK), (NEIGHBOURS[family], 77)] {
            let endpoint = PodEndpoint {
                ifindex,
                flags: 0,
                mac: [2, 1, 1, 1, 1, 1],
                host_mac: [2, 1, 1, 1, 1, 2],
            };
            kernel.put_endpoint(ip(pod), endpoint);
        }
        let (range, bits) = RANGES[family];
        kernel.route((ip(range), bits), Some(route(0)));
    }
    let config: Config = kernel.array("CONFIG").get(&0, 0).expect("CONFIG");
    let config = Config {
        network: NetworkFlags::FORWARD | flags,
        overlay_ifindex: LOOPBACK,
        overlay_mtu: 1_450,
        ..config
    };
    kernel.array("CONFIG").set(0, config, 0).expect("CONFIG");
    if is_held {
        kernel.put("HELD", LOOPBACK, 1_u32);
    }
    Some(kernel)
}

fn packet(src: &str, dst: (&str, u16), proto: u8) -> Vec<u8> {
    frame::build(&Spec {
        src: (ip(src), 40_000),
        dst: (ip(dst.0), dst.1),
        proto,
        tcp_flags: 2,
        payload: b"payload".to_vec(),
        options: 0,
        fragment: None,
        without_checksum: false,
    })
}

#[test]
fn what_a_held_pod_sends_is_the_kernels() {
    for (flags, is_held) in [
        (NetworkFlags::HELD, true),
        (NetworkFlags::HELD, false),
        (0, true),
    ] {
        let Some(mut kernel) = node(flags, is_held) else {
            return;
        };
        let is_kernels = flags != 0 && is_held;
        for family in [0, 1] {
            for dst in [NEIGHBOURS[family], REMOTES[family]] {
                for proto in [TCP, UDP] {
                    let input = packet(PODS[family], (dst, PORT), proto);
                    // The second time by what was noted of the first.
                    for _ in 0..2 {
                        let (verdict, output) = kernel.run(Hook::FromPod, &input);
                        if is_kernels {
                            assert_eq!((verdict, output), (NEXT, input.clone()), "{dst}");
                        } else {
                            assert_eq!(verdict, REDIRECT, "{dst}");
                        }
                    }
                }
            }
        }
        let sent = kernel.count(Counter::OverlaySent) + kernel.count(Counter::Delivered);
        assert_eq!(sent, if is_kernels { 0 } else { 16 });
    }
}

#[test]
fn what_a_held_pod_sends_to_services_is_translated() {
    let Some(mut kernel) = node(NetworkFlags::HELD | NetworkFlags::MASQUERADE, true) else {
        return;
    };
    for family in [0, 1] {
        for proto in [TCP, UDP] {
            let input = packet(PODS[family], (SERVICES[family], 80), proto);
            let expected = packet(PODS[family], (REMOTES[family], PORT), proto);
            // The first begins the flow.
            for _ in 0..2 {
                assert_eq!(kernel.run(Hook::FromPod, &input), (NEXT, expected.clone()));
            }
        }
    }
    assert_eq!(kernel.count(Counter::FlowCreated), 4);
    assert_eq!(kernel.count(Counter::PacketRequest), 8);
}

#[test]
fn nobody_else_has_the_nodes_address() {
    for flags in [NetworkFlags::HELD, 0] {
        let Some(mut kernel) = node(flags, true) else {
            return;
        };
        let mut forged = 0;
        for family in [0, 1] {
            let [remote, service, outside] = [REMOTES[family], SERVICES[family], OUTSIDE[family]];
            for dst in [remote, outside, NODES[family], service] {
                let input = packet(NODES[family], (dst, 80), UDP);
                let (verdict, output) = kernel.run(Hook::FromPod, &input);
                if flags == 0 {
                    assert_ne!(verdict, SHOT, "{dst}");
                } else {
                    assert_eq!((verdict, output), (SHOT, input), "{dst}");
                    forged += 1;
                }
            }
        }
        assert_eq!(kernel.count(Counter::SourceForged), forged);
    }
}
