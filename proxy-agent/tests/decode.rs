//! Whatever a source delivers, decoding ends in objects or in reasons, never in a panic.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

use std::time::Duration;

use penstock_agent::{
    api::{Decoded, Decoder},
    model::object::{Kind, Object},
};
use penstock_common::{Algorithm, Forwarding};
use proptest::prelude::*;

const GOOD: &str = r#"apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, creationTimestamp: "2024-01-01T00:00:00Z"}
spec:
  type: ClusterIP
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, "fd00:96::10"]
  ports: [{name: http, port: 80, targetPort: web}, {name: dns, port: 53, protocol: UDP}]
  sessionAffinity: ClientIP
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints:
- addresses: [10.244.0.5]
  conditions: {ready: true, serving: null, terminating: false}
  nodeName: a
  hints: {forZones: [{name: z1}]}
"#;

fn objects(text: &str) -> Vec<Object> {
    let decoded = Decoder::default().manifest(text, false, "test.yaml");
    let objects = decoded.into_iter().filter_map(|result| match result {
        Ok(Decoded::Object(object)) => Some(object),
        _ => None,
    });
    objects.collect()
}

#[test]
fn good_documents_are_understood() {
    let found = objects(GOOD);
    let [Object::Service(service), Object::EndpointSlice(slice)] = found.as_slice() else {
        panic!("{found:?}");
    };
    assert_eq!(service.name.to_string(), "shop/web");
    assert_eq!(service.cluster_ips.len(), 2);
    assert_eq!(service.affinity_secs, Some(10_800));
    assert_eq!(service.created_secs, 1_704_067_200);
    assert!(slice.endpoints[0].ready && slice.endpoints[0].serving);
    assert_eq!(slice.service, service.name);
}

/// The example with annotations for the service and for the endpoint slice.
fn annotated(service: &str, slice: &str) -> String {
    let namespace = "namespace: shop, ";
    let (head, tail) = GOOD.split_once("---").expect("two documents");
    let with = |text: &str, annotation: &str| {
        text.replacen(
            namespace,
            &format!("{namespace}annotations: {{{annotation}}}, "),
            1,
        )
    };
    format!("{}---{}", with(head, service), with(tail, slice))
}

#[test]
fn annotations_say_algorithms_and_weights() {
    for algorithm in Algorithm::ALL {
        let text = annotated(
            // Somebody else's may be anything.
            &format!("other: [1], penstock.io/algorithm: {}", algorithm.label()),
            "",
        );
        let found = objects(&text);
        let [Object::Service(service), Object::EndpointSlice(slice)] = found.as_slice() else {
            panic!("{found:?}");
        };
        assert_eq!(service.algorithm, algorithm);
        assert_eq!(slice.endpoints[0].weight, 1, "where nothing is said");
    }
    for (weights, weight) in [
        (r#"'{"10.244.0.5": 3, "10.244.0.6": 1}'"#, 3),
        (r#"'{"10.244.0.6": 3}'"#, 1),
        ("' 10.244.0.5=7, fd00::1 = 65535,'", 7),
        ("10.244.0.5=0", 0),
        ("''", 1),
        ("'{}'", 1),
    ] {
        let found = objects(&annotated("", &format!("penstock.io/weights: {weights}")));
        let [_, Object::EndpointSlice(slice)] = found.as_slice() else {
            panic!("{weights}: {found:?}");
        };
        assert_eq!(slice.endpoints[0].weight, weight, "{weights}");
    }
}

#[test]
fn annotations_say_how_backends_are_reached() {
    for forwarding in Forwarding::ALL {
        let annotation = format!("penstock.io/forwarding: {}", forwarding.label());
        let found = objects(&annotated(&annotation, ""));
        let [Object::Service(service), _] = found.as_slice() else {
            panic!("{found:?}");
        };
        assert_eq!(service.forwarding, forwarding);
    }
    let found = objects(&annotated("", ""));
    let [Object::Service(service), _] = found.as_slice() else {
        panic!("{found:?}");
    };
    assert_eq!(service.forwarding, Forwarding::Snat);
}

#[test]
fn an_endpoint_slice_says_when_what_it_tells_of_happened() {
    let at = |text: &str| {
        let annotation = format!("endpoints.kubernetes.io/last-change-trigger-time: {text}");
        match objects(&annotated("", &annotation)).as_slice() {
            [_, Object::EndpointSlice(slice)] => slice.triggered,
            found => panic!("{found:?}"),
        }
    };
    let second = Duration::from_secs(1_704_067_201);
    assert_eq!(at("'2024-01-01T00:00:01Z'"), Some(second));
    let precise = at("'2024-01-01T02:00:01.25+02:00'");
    assert_eq!(precise, Some(second + Duration::from_millis(250)));
    // It is somebody else's, and no reason to do without the endpoints.
    for text in ["yesterday", "''", "'1950-01-01T00:00:00Z'"] {
        assert_eq!(at(text), None, "{text}");
    }
}

#[test]
fn annotations_that_say_nothing_known_are_refused() {
    let algorithm = |name: &str| annotated(&format!("penstock.io/algorithm: {name}"), "");
    let weights = |text: &str| annotated("", &format!("penstock.io/weights: '{text}'"));
    for (text, reason) in [
        (
            algorithm("fewest"),
            "annotation penstock.io/algorithm \"fewest\" is none of random, round-robin, \
             source-hash, maglev, weighted",
        ),
        (
            annotated("penstock.io/forwarding: ipip", ""),
            "annotation penstock.io/forwarding \"ipip\" is none of snat, tunnel, dsr",
        ),
        (algorithm("''"), "penstock.io/algorithm \"\" is none of"),
        (algorithm("[random]"), "expected string"),
        (weights("10.244.0.5"), "is not address=weight"),
        (weights("pod=1"), "address \"pod\" is no IP address"),
        (
            weights("10.244.0.5=65536"),
            "no whole number from 0 to 65535",
        ),
        (weights("10.244.0.5=-1"), "no whole number"),
        (
            weights("10.244.0.5=1,10.244.0.5=2"),
            "10.244.0.5 is there twice",
        ),
        (weights(r#"{"10.244.0.5": 1.5}"#), "no whole number"),
        (weights(r#"{"10.244.0.5": 1} x"#), "can't be decoded"),
        (
            weights(r#"{"10.244.0.5": 1, "10.244.0.5": 2}"#),
            "is there twice",
        ),
    ] {
        let refused = refusals(&text, false);
        assert_eq!(refused.len(), 1, "{text}: {refused:?}");
        assert!(refused[0].contains(reason), "{reason}: {refused:?}");
    }
}

#[test]
fn the_manuals_manifest_is_understood() {
    let manual = include_str!("../../docs/operations.md");
    let (_, rest) = manual.split_once("```yaml\n").expect("a manifest");
    let (manifest, _) = rest.split_once("```").expect("its end");
    assert_eq!(refusals(manifest, false), Vec::<String>::new());
    let found = objects(manifest);
    let [Object::Service(service), Object::EndpointSlice(slice)] = found.as_slice() else {
        panic!("{found:?}");
    };
    assert_eq!(slice.service, service.name);
    assert_eq!(slice.ports[0].name, service.ports[0].name);
}

#[test]
fn a_broken_document_harms_no_other() {
    let text = format!(
        "{GOOD}---\n{{{{ broken\n---\n{}",
        GOOD.replace("web", "shop")
    );
    assert_eq!(objects(&text).len(), 4);
    let results = Decoder::default().manifest(&text, false, "test.yaml");
    let errors: Vec<_> = results.into_iter().filter_map(Result::err).collect();
    assert_eq!(errors.len(), 1);
    assert!(errors[0].origin.contains("document 3"), "{:?}", errors[0]);
}

#[test]
fn an_item_that_cant_be_decoded_harms_no_other() {
    let [service, slice]: [&str; 2] = GOOD.split("---\n").collect::<Vec<_>>().try_into().unwrap();
    let broken = slice
        .replace("web-1", "web-2")
        .replace("port: 8080", "port: http");
    let indented = |item: &str| {
        let mut lines = item.lines();
        let first = lines.next().map(|line| format!("- {line}\n"));
        let others = lines.map(|line| format!("  {line}\n"));
        first.into_iter().chain(others).collect::<String>()
    };
    let items: String = [service, &broken, slice].map(indented).concat();
    let yaml = format!("apiVersion: v1\nkind: List\nitems:\n{items}");
    let value: serde_json::Value = serde_saphyr::from_str(&yaml).expect("YAML");
    for (text, is_json) in [(yaml, false), (value.to_string(), true)] {
        assert_eq!(decoded(&text, is_json), 2, "{text}");
        let refused = refusals(&text, is_json);
        assert_eq!(refused.len(), 1, "{refused:?}");
        for part in ["EndpointSlice", "web-2", "item 1", "whole number"] {
            assert!(refused[0].contains(part), "{part}: {refused:?}");
        }
    }
    // A document that is wrong, and those around it.
    let one = |name: &str, port: &str| {
        format!(
            r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"{name}"}},
                "spec":{{"clusterIP":"10.96.0.10","ports":[{{"port":{port}}}]}}}}"#
        )
    };
    let wrong = one("b", "80").replace("\"metadata\":{", "\"endpoints\":7,\"metadata\":{");
    let text = [one("a", "80"), wrong, one("c", "80")].join("\n");
    assert_eq!(decoded(&text, true), 2);
    let refused = refusals(&text, true);
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert!(refused[0].contains("document 2"), "{refused:?}");
}

/// How many objects a manifest holds that can be used.
fn decoded(text: &str, is_json: bool) -> usize {
    let documents = Decoder::default().manifest(text, is_json, "test");
    let mut count = 0;
    for document in documents.into_iter().flatten() {
        match document {
            Decoded::List(items) => count += items.into_iter().flatten().count(),
            _ => count += 1,
        }
    }
    count
}

/// What is wrong with a document.
fn refusals(text: &str, is_json: bool) -> Vec<String> {
    let mut errors = Vec::new();
    for document in Decoder::default().manifest(text, is_json, "test") {
        match document {
            Ok(Decoded::List(items)) => errors.extend(items.into_iter().filter_map(Result::err)),
            Ok(_) => {}
            Err(rejection) => errors.push(rejection),
        }
    }
    errors.iter().map(ToString::to_string).collect()
}

fn service(spec: &str) -> String {
    format!(
        r#"{{"apiVersion": "v1", "kind": "Service", "metadata": {{"name": "a"}}, "spec": {spec}}}"#
    )
}

#[test]
fn what_is_refused_is_said_in_plain_words() {
    let cases = [
        ("\"text\"", "expected an object"),
        (
            &service(r#"{"ports": [{"port": "web"}]}"#),
            "expected a whole number",
        ),
        (&service(r#"{"ports": {}}"#), "expected a list"),
        (&service(r#"{"ports": [7]}"#), "expected a port"),
        (&service("[1]"), "expected a string"),
        (
            &service(
                r#"{"clusterIP": "10.0.0.1", "ports": [{"name": "a", "port": 1}, {"name": "b", "port": 1}]}"#,
            ),
            "two ports are TCP 1",
        ),
        (
            &service(r#"{"clusterIP": "10.0.0.2", "clusterIPs": ["10.0.0.1"]}"#),
            "is not the first of clusterIPs",
        ),
        (
            &service(r#"{"clusterIP": "10.0.0.1", "clusterIP": "10.0.0.2"}"#),
            "\"clusterIP\" is there twice",
        ),
        (
            &service(r#"{"selector": {"a": "b", "a": "c"}}"#),
            "\"a\" is there twice",
        ),
        (
            r#"{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "labels": {"x": "1", "x": "2"}}}"#,
            "\"x\" is there twice",
        ),
        (
            r#"{"apiVersion": "v1", "apiVersion": "v2", "kind": "Pod"}"#,
            "apiVersion",
        ),
        (
            r#"{"apiVersion": "v1", "kind": "Service", "metadata": 7}"#,
            "expected an object",
        ),
    ];
    for (text, reason) in cases {
        for is_json in [true, false] {
            let found = refusals(text, is_json);
            let [found] = found.as_slice() else {
                panic!("{text}: {found:?}");
            };
            let is_said = found.contains(reason) || !is_json && found.contains("duplicate");
            assert!(is_said, "{text}: {found}");
            for leak in [
                "struct", "i64", "Tcp", "sequence", "Raw", "usize", "Options",
            ] {
                assert!(!found.contains(leak), "{text}: {found}");
            }
        }
    }
}

#[test]
fn a_document_is_judged_by_its_size_and_depth() {
    // More nodes than a decoder takes by itself.
    let many = "1, ".repeat(1_000_001);
    let text = format!("apiVersion: v1\nkind: ConfigMap\ndata: [{many}]\n---\n{GOOD}");
    let decoded = Decoder::default().manifest(&text, false, "test");
    assert_eq!(decoded.len(), 3);
    assert!(decoded.iter().all(Result::is_ok), "{decoded:?}");
    // Ten lines that mean ten to the tenth power of text.
    let mut bomb =
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  a0: &a0 [x]\n".to_owned();
    for level in 1..10 {
        let aliases = format!("*a{}, ", level - 1).repeat(10);
        bomb.push_str(&format!("  a{level}: &a{level} [{aliases}]\n"));
    }
    assert_eq!(refusals(&bomb, false).len(), 1);
    let deep = format!("a: {}{}", "[".repeat(10_000), "]".repeat(10_000));
    assert_eq!(refusals(&deep, false).len(), 1);
    let deep = format!(r#"{{"a": {}{}}}"#, "[".repeat(10_000), "]".repeat(10_000));
    assert_eq!(refusals(&deep, true).len(), 1);
}

#[test]
fn a_service_with_very_many_ports_is_decoded_at_once() {
    let ports: Vec<String> = (1..=40_000)
        .map(|port| format!(r#"{{"name": "p{port}", "port": {port}}}"#))
        .collect();
    let text = service(&format!(
        r#"{{"clusterIP": "10.0.0.1", "ports": [{}]}}"#,
        ports.join(",")
    ));
    let started = std::time::Instant::now();
    let decoded = Decoder::default().manifest(&text, true, "test");
    assert!(
        matches!(decoded.as_slice(), [Ok(Decoded::Object(Object::Service(service)))] if service.ports.len() == 40_000)
    );
    // Comparing each with each takes half a minute without optimization.
    let took = started.elapsed();
    assert!(took < std::time::Duration::from_secs(3), "{took:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_text_is_survived(text in ".{0,400}", is_json in any::<bool>()) {
        for rejection in Decoder::default().manifest(&text, is_json, "x").into_iter().filter_map(Result::err) {
            prop_assert!(!rejection.reason.is_empty() && rejection.reason.len() < 1_000);
        }
    }

    #[test]
    fn mutated_manifests_are_survived(cuts in proptest::collection::vec((0usize..900, 0usize..12, "[ -~\n]{0,8}"), 1..6)) {
        let mut text = GOOD.to_owned();
        for (at, length, new) in cuts {
            let at = at.min(text.len());
            let end = (at + length).min(text.len());
            text.replace_range(at..end, &new);
        }
        for object in objects(&text) {
            if let Object::EndpointSlice(slice) = object {
                for endpoint in &slice.endpoints {
                    prop_assert!(endpoint.address.is_ipv4() == (slice.family == penstock_agent::model::object::Family::V4));
                }
            }
        }
    }

    #[test]
    fn json_of_any_kind_is_survived(text in "[\\[\\]{}\":,a-z0-9 ]{0,200}") {
        for kind in Kind::ALL {
            let _ = Decoder::default().json(kind, &text, "x");
        }
    }
}

#[test]
fn a_node_that_is_about_to_go_is_known() {
    let is_leaving = |metadata: &str, taints: &str| {
        let text = format!(
            "{{apiVersion: v1, kind: Node, metadata: {{name: a{metadata}}}, spec: {{taints: [{taints}]}}}}"
        );
        match objects(&text).as_slice() {
            [Object::Node(node)] => node.is_leaving,
            other => panic!("no node in {text}: {other:?}"),
        }
    };
    assert!(!is_leaving("", ""));
    assert!(!is_leaving("", "{key: other, effect: NoSchedule}"));
    assert!(is_leaving(
        "",
        "{key: other}, {key: ToBeDeletedByClusterAutoscaler, value: '1', effect: NoSchedule}"
    ));
    assert!(is_leaving(
        ", deletionTimestamp: '2026-01-01T00:00:00Z'",
        ""
    ));
}
