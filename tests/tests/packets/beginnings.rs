//! Packets that begin something where something was before: a client's port whose backend is gone, an
//! identification that comes around.

use penstock_common::{
    Backend, BackendFlags, Be16, Counter, FlowState, FragmentKey, FragmentPorts, Proto, V4,
};

use crate::{
    CLIENTS, frame,
    frame::{Spec, TCP, UDP},
    ip,
    kernel::Kernel,
    model,
    model::{Hook, NEXT, SHOT, service_id},
    plain,
};

#[test]
fn a_connection_that_begins_anew_finds_a_backend_that_lives() {
    let model = model();
    let Some(mut kernel) = Kernel::load(&model) else {
        return;
    };
    // One of two backends of a service that spreads by the client's address: which one is no chance.
    let index = model
        .services
        .iter()
        .position(|service| service.frontend == (ip("10.96.0.2"), 80) && service.proto == TCP)
        .expect("the service");
    let before = model.services.iter().take(index);
    let first: usize = before.map(|service| service.backends.len()).sum();
    let (client, frontend) = ((ip(CLIENTS[0]), 4_000), (ip("10.96.0.2"), 80));
    let segment = |src, dst, tcp_flags| {
        frame::build(&Spec {
            tcp_flags,
            ..plain(src, dst, TCP, vec![])
        })
    };
    let (syn, ack) = (2, 0x10);
    let receiver = |out: &[u8]| {
        let header = frame::header(out, 14, true).expect("IP");
        let (source, port) = frame::ports(out, header.transport).expect("ports");
        ((header.dst, port), (header.src, source))
    };
    let (_, out) = kernel.run(Hook::FromPod, &segment(client, frontend, syn));
    let (backend, source) = receiver(&out);
    kernel.run(Hook::ToPod, &segment(backend, source, syn | ack));
    assert_eq!(kernel.only_flow().0, FlowState::ESTABLISHED);
    // While it lives, that is a segment sent once more.
    let (_, out) = kernel.run(Hook::FromPod, &segment(client, frontend, syn));
    assert_eq!(receiver(&out), (backend, source));
    // Another pod has its place.
    let place = model.services[index]
        .backends
        .iter()
        .position(|one| *one == backend)
        .expect("a backend of the service's");
    let successor = Backend::new(
        2,
        BackendFlags::LIVE | BackendFlags::SELECTED,
        service_id(index),
        V4::from_octets([10, 244, 2, 99]),
        Be16::from_host(8_080),
    );
    let id = (first + place) as u32;
    kernel
        .array("BACKENDS4")
        .set(id, successor, 0)
        .expect("BACKENDS4");
    // What goes on ends by itself, and what begins is the successor's.
    let (_, out) = kernel.run(Hook::FromPod, &segment(client, frontend, ack));
    assert_eq!(receiver(&out).0, backend);
    let (verdict, out) = kernel.run(Hook::FromPod, &segment(client, frontend, syn));
    assert_eq!(verdict, NEXT);
    assert_eq!(receiver(&out).0, (ip("10.244.2.99"), 8_080));
    assert_eq!(kernel.only_flow().0, FlowState::EMBRYONIC);
}

#[test]
fn a_part_of_a_datagram_is_not_taken_for_an_older_ones() {
    let model = model();
    let Some(mut kernel) = Kernel::load(&model) else {
        return;
    };
    let (client, frontend) = ((ip(CLIENTS[0]), 4_000), (ip("10.96.0.1"), 80));
    let part = |offset: u16, more: bool| {
        frame::build(&Spec {
            fragment: Some((77, offset, more)),
            ..plain(client, frontend, UDP, vec![7; 64])
        })
    };
    assert_eq!(kernel.run(Hook::FromPod, &part(0, true)).0, NEXT);
    assert_eq!(kernel.run(Hook::FromPod, &part(9, false)).0, NEXT);
    let key = FragmentKey::new(
        V4::from_octets([10, 244, 1, 5]),
        V4::from_octets([10, 96, 0, 1]),
        u32::from(77_u16.to_be()),
        Proto::UDP,
    );
    let ports: FragmentPorts = kernel.get("FRAGMENTS4", &key).expect("its ports");
    assert_eq!(ports.dst_port, Be16::from_host(80));
    // As if it had come earlier.
    for (age, verdict) in [(10, NEXT), (33, SHOT)] {
        let seen_secs = ports.seen_secs.wrapping_sub(age);
        kernel.put("FRAGMENTS4", key, FragmentPorts { seen_secs, ..ports });
        assert_eq!(
            kernel.run(Hook::FromPod, &part(9, false)).0,
            verdict,
            "{age} s"
        );
    }
    assert_eq!(kernel.count(Counter::FragmentUnmatched), 1);
}
