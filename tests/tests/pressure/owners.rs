//! Flows whose frontend becomes another service's, and which of them go there with it.

use penstock_agent::flows::{Lifetimes, Sweeper};
use penstock_common::Counter;

use crate::{
    answer,
    node::{End, Family, Node, TCP, UDP, tcp},
    open,
};

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// What a client of a frontend sends by, and whether it was answered.
const FLOWS: [(u8, bool); 4] = [(UDP, false), (UDP, true), (TCP, false), (TCP, true)];

fn client(family: Family, number: usize) -> End {
    family.client(1 + number as u32)
}

/// A node with flows of each kind to the first of two services, and its sweeper.
fn with_flows(name: &str) -> Option<(Node, Sweeper)> {
    let node = Node::new(name, 2)?;
    for family in FAMILIES {
        for (number, (proto, is_answered)) in FLOWS.into_iter().enumerate() {
            let client = client(family, number);
            let port = open(node.uplink(), family, client, 0, proto).expect("a port is free");
            if is_answered {
                answer(node.uplink(), family, client, 0, proto, port);
            }
        }
    }
    let sweeper = node.sweeper(Lifetimes::default());
    Some((node, sweeper))
}

/// Which of the flows the backend of `number` gets the next packets of, in the order of [`FLOWS`].
fn reached(node: &Node, family: Family, number: u16) -> [bool; 4] {
    std::array::from_fn(|at| {
        let (proto, is_answered) = FLOWS[at];
        // What was not agreed to is begun again and again.
        let flags = if is_answered { tcp::ACK } else { tcp::SYN };
        let client = client(family, at);
        let passed = node.uplink().pass(client, family.frontend(0), proto, flags);
        passed.is_some_and(|(_, to)| to == family.backend(number))
    })
}

#[test]
fn flows_go_with_their_frontend_but_for_connections() {
    let Some((mut node, mut sweeper)) = with_flows("moved") else {
        return;
    };
    assert_eq!(sweeper.sweep().swept, 0, "nothing has changed hands");
    for family in FAMILIES {
        node.share(family, 0, 1);
    }
    let live = sweeper.sweep();
    assert_eq!((live.moved, live.swept), (6, 6));
    assert_eq!((live.v4, live.v6), (1, 1), "what was agreed to stays");
    node.assert_responders_are_counted();
    for family in FAMILIES {
        assert_eq!(
            reached(&node, family, 1),
            [true, true, true, false],
            "{family:?}"
        );
        assert!(reached(&node, family, 0)[3], "{family:?}");
    }
    assert_eq!(
        sweeper.sweep().swept,
        0,
        "those that began anew are the new owner's"
    );
}

#[test]
fn flows_stay_whose_backend_serves_the_next_service_too() {
    let Some((mut node, mut sweeper)) = with_flows("kept") else {
        return;
    };
    for family in FAMILIES {
        node.share(family, 0, 1);
        node.serve_too(family, 1, 0);
    }
    assert_eq!(sweeper.sweep().swept, 0);
    for family in FAMILIES {
        assert_eq!(reached(&node, family, 0), [true; 4], "{family:?}");
    }
    // Until it does no more.
    for family in FAMILIES {
        node.serve_no_more(family);
    }
    assert_eq!(sweeper.sweep().moved, 6);
}

#[test]
fn flows_stay_whose_frontend_is_nobodys() {
    let Some((mut node, mut sweeper)) = with_flows("given-up") else {
        return;
    };
    for family in FAMILIES {
        node.give_up(family, 0);
    }
    assert_eq!(sweeper.sweep().swept, 0);
    for family in FAMILIES {
        assert_eq!(reached(&node, family, 0), [true; 4], "{family:?}");
    }
    assert_eq!(node.count(Counter::FlowCreated), 8);
}
