//! Many at once, and killed anywhere: nothing may leak. Needs root.
//!
//! PENSTOCK_KILLS says how many calls are killed; 1,000 unless it is set.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test fails by panicking, and its names are sentences"
)]

mod bed;

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use bed::{Bed, PLUGIN, Said, check_result, key, list, sh};
use penstock_cni::names;
use serde_json::{Value, json};

/// Numbers that look random, the same for the same seed (xorshift).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Whether a container has an interface of ours.
fn has_interface(namespace: &str) -> bool {
    let links = list("ip", namespace, &["link"]);
    links.iter().any(|link| link["ifname"] == "eth0")
}

/// The node's links, its state and its containers agree.
#[track_caller]
fn assert_nothing_unknown(bed: &Bed) {
    let state = bed.state();
    let known: HashSet<&String> = state
        .attachments
        .iter()
        .map(|found| &found.interface)
        .collect();
    let unknown: Vec<String> = bed
        .links()
        .into_iter()
        .filter(|name| !known.contains(name))
        .collect();
    assert_eq!(unknown, Vec::<String>::new(), "links that no state names");
}

#[test]
fn killed_anywhere_it_leaks_nothing() {
    // More addresses than can be resting at a time.
    let Some(mut bed) = Bed::with(&["10.240.0.0/16", "fd00:240::/64"]) else {
        return;
    };
    let kills = std::env::var("PENSTOCK_KILLS")
        .ok()
        .and_then(|text| text.parse().ok());
    let kills: u32 = kills.unwrap_or(1_000);
    let seed = u64::from(std::process::id()) << 20 | 1;
    println!("seed {seed}");
    let mut numbers = Numbers(seed);
    let ids: Vec<String> = (0..8).map(|number| format!("c{number}")).collect();
    let namespaces: Vec<String> = ids.iter().map(|id| bed.container(id)).collect();
    // How long a call takes that is not killed.
    let (mut adding, mut deleting) = (Duration::MAX, Duration::MAX);
    for id in &ids {
        let start = Instant::now();
        bed.add(id).success();
        let added = Instant::now();
        bed.del(id).success();
        adding = adding.min(added - start);
        deleting = deleting.min(added.elapsed());
    }
    let mut ended = 0;
    for round in 0..kills {
        let id = &ids[numbers.below(ids.len() as u64) as usize];
        let (command, typical) = if numbers.below(5) < 3 {
            ("ADD", adding)
        } else {
            ("DEL", deleting)
        };
        let mut child = bed.start(PLUGIN, &bed.call(command, id));
        let limit = typical.as_micros() as u64;
        std::thread::sleep(Duration::from_micros(numbers.below(limit)));
        let _ = child.kill();
        let output = child.wait_with_output().unwrap();
        if output.status.success() {
            ended += 1;
            let said: Result<Value, _> = serde_json::from_slice(&output.stdout);
            assert_eq!(said.is_ok(), command == "ADD");
        }
        // What is there belongs to somebody, at any time, and goes on working.
        if round % 50 == 0 {
            assert_nothing_unknown(&bed);
            check_result("1.1.0", &bed.add(id).success());
        }
    }
    println!(
        "{kills} calls, ADD {adding:?}, DEL {deleting:?}; {ended} ended before they were killed"
    );
    assert!(
        ended < kills * 3 / 4,
        "too late to kill: {ended} of {kills} had ended"
    );
    for id in &ids {
        bed.del(id).success();
    }
    bed.assert_clean();
    for namespace in &namespaces {
        assert!(!has_interface(namespace), "{namespace}");
    }
    // And every address is there to be had again.
    let mut state = bed.state();
    state
        .released
        .iter_mut()
        .for_each(|released| released.at_ms -= 10_000);
    let ranges = ["10.240.0.0/16".parse().unwrap()];
    state
        .reserve(
            &key("x"),
            &ranges,
            Default::default(),
            penstock_cni::store::now(),
        )
        .unwrap();
    assert!(state.released.is_empty());
}

#[test]
fn many_at_once_have_an_address_each() {
    let Some(mut bed) = Bed::new() else { return };
    let ids: Vec<String> = (0..32).map(|number| format!("c{number}")).collect();
    for id in &ids {
        bed.container(id);
    }
    let all = |command: &str| -> Vec<Said> {
        let start = |id: &String| {
            let (bed, call) = (&bed, bed.call(command, id));
            move || bed.run(&call)
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = ids.iter().map(|id| scope.spawn(start(id))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        })
    };
    let start = Instant::now();
    let results: Vec<Value> = all("ADD").into_iter().map(Said::success).collect();
    println!("32 at once: {:?}", start.elapsed());
    let addresses = |result: &Value| -> Vec<String> {
        let ips = result["ips"].as_array().unwrap().iter();
        ips.map(|ip| ip["address"].as_str().unwrap().to_owned())
            .collect()
    };
    let distinct: HashSet<String> = results.iter().flat_map(addresses).collect();
    assert_eq!(distinct.len(), 64);
    assert_eq!(bed.links().len(), 32);
    assert_eq!(bed.agent().heard().len(), 32);
    for (id, result) in ids.iter().zip(&results) {
        bed.check(id, result).success();
    }
    for said in all("DEL") {
        said.success();
    }
    bed.assert_clean();
}

#[test]
fn an_add_and_a_del_of_the_same_leave_all_or_nothing() {
    let Some(mut bed) = Bed::with(&["10.240.0.0/16"]) else {
        return;
    };
    let namespace = bed.container("a");
    let mut numbers = Numbers(7);
    for _ in 0..60 {
        let add = bed.start(PLUGIN, &bed.call("ADD", "a"));
        std::thread::sleep(Duration::from_micros(numbers.below(12_000)));
        bed.del("a").success();
        let said = Said::of(add.wait_with_output().unwrap());
        let added = said.is_success;
        if !added {
            said.fails(11, "");
        }
        let is_known = bed.state().attachment(&key("a")).is_some();
        assert_eq!(bed.links().len(), usize::from(is_known));
        assert_eq!(has_interface(&namespace), is_known);
        assert!(added || !is_known, "an ADD that failed left something");
        bed.del("a").success();
    }
    bed.assert_clean();
}

#[test]
fn gc_takes_all_that_is_not_valid_and_nothing_of_others() {
    let Some(mut bed) = Bed::new() else { return };
    let ids = ["a", "b", "c"];
    let namespaces = ids.map(|id| bed.container(id));
    let results = ids.map(|id| bed.add(id).success());
    bed.end(&namespaces[2]);
    let node = bed.node();
    for (number, name, alias) in [
        (1, "pn0123456789abc", "penstock:pods:default/gone"),
        (2, "pn0123456789abd", "penstock:podsandmore:default/other"),
        (3, "pn0123456789abe", "somebody else's"),
        (4, "named", "penstock:pods:default/named"),
    ] {
        let peer = format!("peer{number}");
        sh(
            "ip",
            &[
                "-n", &node, "link", "add", "name", name, "type", "veth", "peer", "name", &peer,
            ],
        );
        sh("ip", &["-n", &node, "link", "set", name, "alias", alias]);
    }
    let valid =
        json!([{"containerID": "a", "ifname": "eth0"}, {"containerID": "z", "ifname": "eth0"}]);
    let gc = bed
        .call("GC", "")
        .with("cni.dev/valid-attachments", valid.clone());
    for _ in 0..2 {
        assert_eq!(bed.run(&gc).success(), Value::Null);
        let mut links = bed.links();
        links.sort();
        let mut expected = vec![
            names::interface(&key("a")),
            "named".to_owned(),
            "peer2".to_owned(),
            "peer3".to_owned(),
            "peer4".to_owned(),
            "pn0123456789abd".to_owned(),
            "pn0123456789abe".to_owned(),
        ];
        expected.sort();
        assert_eq!(links, expected);
        assert_eq!(bed.state().attachments.len(), 1);
        assert_eq!(bed.state().released.len(), 4);
    }
    bed.check("a", &results[0]).success();
    assert!(!has_interface(&namespaces[1]));
    // Another network's GC leaves this one's alone.
    let other = bed.call("GC", "").with("name", json!("other"));
    bed.run(&other.with("cni.dev/valid-attachments", json!([])))
        .success();
    bed.check("a", &results[0]).success();
    // A runtime in Go that has no attachments says null.
    let own = bed.call("GC", "");
    bed.run(&own.with("cni.dev/valid-attachments", json!(null)))
        .success();
    assert!(bed.state().attachments.is_empty());
}
