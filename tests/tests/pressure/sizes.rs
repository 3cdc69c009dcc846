//! Tables of other sizes than the usual one: all of a table serves, and nothing beyond it.

use std::{collections::HashSet, time::Instant};

use penstock_common::{Counter, limits};

use super::{
    PORTS, answer, assert_whole_range,
    node::{Family, Node, TCP, UDP, tcp},
    open,
};

/// Destinations beside each other.
const DESTINATIONS: u16 = 10;

#[test]
fn ten_destinations_have_ten_times_the_ports_of_one() {
    // Room for some more than all ports, so that it is ports that run out.
    let flows = u32::from(DESTINATIONS) * PORTS + 1_000;
    let Some(node) = Node::sized("tenfold", DESTINATIONS, flows) else {
        return;
    };
    let uplink = node.uplink();
    for (family, proto) in [(Family::V4, TCP), (Family::V6, UDP)] {
        let (created, refused) = (
            node.count(Counter::FlowCreated),
            node.count(Counter::NoSourcePort),
        );
        let began = Instant::now();
        let mut ports = vec![Vec::new(); usize::from(DESTINATIONS)];
        for client in 0..u32::from(DESTINATIONS) * PORTS {
            let to = (client % u32::from(DESTINATIONS)) as u16;
            let client = family.client(client);
            let port = open(uplink, family, client, to, proto).expect("a port is free");
            answer(uplink, family, client, to, proto, port);
            ports[usize::from(to)].push(port);
        }
        let all: usize = ports.iter().map(Vec::len).sum();
        eprintln!("{family:?}: {all} flows in {:?}", began.elapsed());
        for ports in &ports {
            assert_whole_range(ports);
        }
        assert_eq!(all, 10 * PORTS as usize);
        // Only now one is refused, at each of them.
        for to in 0..DESTINATIONS {
            let late = family.client(u32::from(DESTINATIONS) * PORTS + u32::from(to));
            assert_eq!(open(uplink, family, late, to, proto), None);
        }
        let refused = node.count(Counter::NoSourcePort) - refused;
        assert_eq!(refused, u64::from(DESTINATIONS));
        let created = node.count(Counter::FlowCreated) - created;
        assert_eq!(created, 10 * u64::from(PORTS));
    }
    assert_eq!(node.count(Counter::FlowTableFull), 0);
    assert_eq!(node.count(Counter::FlowEvicted), 0);
    node.assert_responders_are_counted();
}

#[test]
fn a_full_table_of_any_size_is_gone_through_to_its_last_record() {
    // Smaller and larger than the usual one, and no powers of two.
    for flows in [1_003, limits::FLOWS + 70_001] {
        let Some(node) = Node::sized(&format!("size-{flows}"), DESTINATIONS, flows) else {
            return;
        };
        let (family, uplink) = (Family::V4, node.uplink());
        let to = |client: u32| (client % u32::from(DESTINATIONS)) as u16;
        let mut established = Vec::new();
        for number in 0..flows {
            let client = family.client(number);
            let port = open(uplink, family, client, to(number), TCP).expect("an empty record");
            // Records are given in their order: the last one gives way.
            if number < flows - 1 {
                answer(uplink, family, client, to(number), TCP, port);
                established.push((client, to(number), port));
            }
        }
        // A packet looks at 1,024 records at most; the next one goes on there.
        let tries = (0..flows / 1_024 + 2).filter(|number| {
            let client = family.client(flows + number);
            let port = open(uplink, family, client, 0, TCP);
            let Some(port) = port else { return false };
            answer(uplink, family, client, 0, TCP, port);
            established.push((client, 0, port));
            true
        });
        assert_eq!(tries.count(), 1, "one record gives way, of {flows}");
        assert_eq!(node.count(Counter::FlowEvicted), 1);
        let unique: HashSet<_> = established.iter().map(|(_, to, port)| (to, port)).collect();
        assert_eq!(unique.len(), flows as usize);
        for (client, to, port) in &established {
            let passed = uplink.pass(*client, family.frontend(*to), TCP, tcp::ACK);
            let source = (family.overlay(), *port);
            assert_eq!(passed, Some((source, family.backend(*to))), "{client:?}");
        }
        node.assert_responders_are_counted();
    }
}
