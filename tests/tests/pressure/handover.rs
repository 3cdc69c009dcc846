//! Flows that are handed over to their backend's node: what such a frame looks like, and which of them
//! give way.

use penstock_common::{Addr, Be16, Counter, Forwarding, Handover, Timeouts, V4, V6, limits};

use crate::node::{Family, Node, REDIRECT, SHOT, TCP, UDP, ends, error, frame, tcp};

/// The frame that is to come of one from a client.
fn handed_over(frame: &[u8], kind: u8, backend: std::net::IpAddr, port: u16) -> Vec<u8> {
    let suffix = match backend {
        std::net::IpAddr::V4(ip) => V4::from(ip).suffix(),
        std::net::IpAddr::V6(ip) => V6::from(ip).suffix(),
    };
    let port = Be16::from_host(port);
    let (to, from) = Handover { kind, suffix, port }.macs();
    let mut wanted = frame.to_vec();
    wanted[..6].copy_from_slice(&to);
    wanted[6..12].copy_from_slice(&from);
    // One hop less, and of IPv4 its header's checksum, which no hop adds 0x100 to (RFC 1141).
    if frame[12] == 0x08 {
        wanted[22] -= 1;
        wanted[24] = wanted[24].wrapping_add(1);
    } else {
        wanted[21] -= 1;
    }
    wanted
}

#[test]
fn a_frame_that_is_handed_over_is_as_it_came_but_for_its_ethernet_addresses() {
    for (forwarding, kind) in [
        (Forwarding::Tunnel, Handover::TUNNEL),
        (Forwarding::Dsr, Handover::DSR),
    ] {
        let name = format!("over-{}", forwarding.label());
        let Some(node) = Node::forwarding(&name, 2, forwarding) else {
            return;
        };
        for family in [Family::V4, Family::V6] {
            for (proto, number) in [(TCP, 0), (UDP, 1)] {
                let client = family.client(7);
                // What begins the flow, and what goes on in it.
                for flags in [tcp::SYN, tcp::ACK] {
                    let came = frame(client, family.frontend(number), proto, flags);
                    let mut output = vec![0; came.len()];
                    let verdict = node.uplink().run(&came, &mut output);
                    let (backend, port) = family.backend(number);
                    let wanted = handed_over(&came, kind, backend, port);
                    assert_eq!(verdict, REDIRECT, "{forwarding:?} {family:?} {proto}");
                    assert_eq!(output, wanted, "{forwarding:?} {family:?} {proto}");
                }
            }
        }
        assert_eq!(node.count(Counter::HandedOver), 8);
        assert_eq!(node.count(Counter::FlowCreated), 4);
    }
}

#[test]
fn an_error_about_a_reply_is_handed_over_as_the_flow_is() {
    for (forwarding, kind) in [
        (Forwarding::Tunnel, Handover::TUNNEL),
        (Forwarding::Dsr, Handover::DSR),
    ] {
        let name = format!("error-{}", forwarding.label());
        let Some(node) = Node::forwarding(&name, 2, forwarding) else {
            return;
        };
        for family in [Family::V4, Family::V6] {
            for (proto, number) in [(TCP, 0), (UDP, 1)] {
                let (client, frontend) = (family.client(7), family.frontend(number));
                let opened = node.uplink().pass(client, frontend, proto, tcp::SYN);
                assert!(opened.is_some(), "{forwarding:?} {family:?} {proto}");
                let reply = frame(frontend, client, proto, tcp::SYN | tcp::ACK);
                for (speaker, _) in [client, family.client(8)] {
                    let came = error(speaker, &reply);
                    let mut output = vec![0; came.len()];
                    let verdict = node.uplink().run(&came, &mut output);
                    let (backend, port) = family.backend(number);
                    let wanted = handed_over(&came, kind, backend, port);
                    assert_eq!(verdict, REDIRECT, "{forwarding:?} {family:?} {proto}");
                    assert_eq!(output, wanted, "{forwarding:?} {family:?} {proto}");
                }
            }
        }
        // Each flow's first packet, and two errors.
        assert_eq!(node.count(Counter::HandedOver), 4 + 8);
        assert_eq!(node.count(Counter::FlowCreated), 4);
        // What they quote is the backend's node's to translate.
        assert_eq!(node.count(Counter::IcmpError), 0);
    }
}

#[test]
fn a_frame_that_no_tunnel_brought_is_not_believed() {
    let Some(node) = Node::forwarding("forged", 1, Forwarding::Dsr) else {
        return;
    };
    for family in [Family::V4, Family::V6] {
        let came = frame(family.client(7), family.frontend(0), TCP, tcp::SYN);
        for kind in [Handover::TUNNEL, Handover::DSR, Handover::BACK] {
            let (backend, port) = family.backend(0);
            let forged = handed_over(&came, kind, backend, port);
            let mut output = vec![0; forged.len()];
            assert_eq!(node.overlay().run(&forged, &mut output), SHOT);
            assert_eq!(ends(&output), ends(&came));
        }
    }
    assert_eq!(node.count(Counter::HandoverForged), 6);
    assert_eq!(node.count(Counter::FlowCreated), 0);
    // Without these Ethernet addresses the same is a request as any other; but what came by the overlay
    // is not handed over.
    let came = frame(Family::V4.client(7), Family::V4.frontend(0), TCP, tcp::SYN);
    let mut output = vec![0; came.len()];
    assert_eq!(node.overlay().run(&came, &mut output), -1);
    assert_eq!(node.count(Counter::FlowCreated), 1);
}

#[test]
fn flows_whose_replies_are_not_seen_stay_until_they_are_idle_and_a_record_is_wanted() {
    for (forwarding, gives_way) in [(Forwarding::Dsr, true), (Forwarding::Tunnel, false)] {
        let name = format!("one-way-{}", forwarding.label());
        let Some(mut node) = Node::forwarding(&name, 1, forwarding) else {
            return;
        };
        let never = Timeouts {
            tcp_closing_secs: 100_000,
            ..Timeouts::default()
        };
        node.configure(never);
        let family = Family::V4;
        let pass = |node: &Node, client, flags| {
            let frame = frame(family.client(client), family.frontend(0), TCP, flags);
            node.uplink().run(&frame, &mut vec![0; frame.len()])
        };
        for client in 0..limits::FLOWS {
            assert_eq!(pass(&node, client, tcp::SYN), REDIRECT);
            // Which establishes it, if the answer to its opening can't be seen.
            assert_eq!(pass(&node, client, tcp::ACK), REDIRECT);
        }
        assert_eq!(node.count(Counter::FlowEvicted), 0);
        let next = limits::FLOWS;
        if !gives_way {
            // Nobody has answered here, though this node would have seen it.
            assert_eq!(pass(&node, next, tcp::SYN), REDIRECT);
            assert_eq!(node.count(Counter::FlowEvicted), 1);
            continue;
        }
        assert_eq!(pass(&node, next, tcp::SYN), SHOT);
        assert_eq!(node.count(Counter::FlowTableFull), 1);
        node.configure(Timeouts {
            tcp_closing_secs: 0,
            ..never
        });
        assert_eq!(pass(&node, next, tcp::SYN), REDIRECT);
        assert_eq!(node.count(Counter::FlowEvicted), 1);
    }
}
