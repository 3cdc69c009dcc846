//! In a chain with the usual plugins, as a runtime runs them. Needs root and Debian's package
//! containernetworking-plugins.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test fails by panicking, and its names are sentences"
)]

mod bed;

use std::path::Path;

use bed::{Bed, Call, PLUGIN, check_result, list, sh};
use serde_json::{Value, json};

const PLUGINS: &str = "/usr/lib/cni";

/// Says what is missing; in CI nothing may be.
fn require_plugins() -> Option<()> {
    if Path::new(PLUGINS).join("portmap").exists() {
        return Some(());
    }
    let needs = "this test needs the package containernetworking-plugins";
    assert!(std::env::var_os("CI").is_none(), "{needs}");
    eprintln!("SKIPPED: {needs}");
    None
}

/// A chain of plugins, each with its own configuration.
struct Chain {
    version: &'static str,
    plugins: Vec<Value>,
}

impl Chain {
    /// A plugin's call: the fields that are common, its own, and the result so far.
    fn call(&self, bed: &Bed, command: &str, own: &Value, previous: &Value) -> (String, Call) {
        let mut call = bed
            .call(command, "a")
            .with("cniVersion", json!(self.version));
        for (key, value) in own.as_object().unwrap() {
            call = call.with(key, value.clone());
        }
        if !previous.is_null() {
            call = call.with("prevResult", previous.clone());
        }
        let program = match own["type"].as_str().unwrap() {
            "penstock-cni" => PLUGIN.to_owned(),
            other => format!("{PLUGINS}/{other}"),
        };
        (program, call)
    }

    fn add(&self, bed: &Bed) -> Value {
        let mut result = Value::Null;
        for own in &self.plugins {
            let (program, call) = self.call(bed, "ADD", own, &result);
            result = bed.run_program(&program, &call).success();
            check_result(self.version, &result);
        }
        result
    }

    fn check(&self, bed: &Bed, result: &Value) {
        // Version 1.1.1 of portmap looks among IPv6's rules for IPv4's, and never finds them.
        for own in self.plugins.iter().filter(|own| own["type"] != "portmap") {
            let (program, call) = self.call(bed, "CHECK", own, result);
            bed.run_program(&program, &call).success();
        }
    }

    fn del(&self, bed: &Bed, result: &Value) {
        for own in self.plugins.iter().rev() {
            let (program, call) = self.call(bed, "DEL", own, result);
            bed.run_program(&program, &call).success();
        }
    }
}

fn portmap() -> Value {
    json!({
        "type": "portmap",
        "runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]},
    })
}

#[test]
fn others_come_after_it() {
    let Some(mut bed) = Bed::new() else { return };
    let Some(()) = require_plugins() else { return };
    for version in ["0.4.0", "1.0.0"] {
        let netns = bed.container("a");
        let chain = Chain {
            version,
            plugins: vec![
                json!({"type": "penstock-cni"}),
                portmap(),
                json!({
                    "type": "tuning", "dataDir": bed.run_dir().join("tuning"), "mtu": 1_300,
                    "sysctl": {"net.core.somaxconn": "500"},
                }),
                json!({"type": "bandwidth", "runtimeConfig": {"bandwidth": {
                    "ingressRate": 80_000_000, "ingressBurst": 8_000_000,
                    "egressRate": 80_000_000, "egressBurst": 8_000_000,
                }}}),
            ],
        };
        let result = chain.add(&bed);
        assert_eq!(result["ips"].as_array().unwrap().len(), 2);
        let link = &list("ip", &netns, &["link", "show", "dev", "eth0"])[0];
        assert_eq!(link["mtu"], 1_300);
        let interface = result["interfaces"][0]["name"].as_str().unwrap();
        let qdiscs = list("tc", &bed.node(), &["qdisc", "show", "dev", interface]);
        assert!(
            qdiscs.iter().any(|qdisc| qdisc["kind"] == "tbf"),
            "{qdiscs:?}"
        );
        let node = bed.node();
        let rules = sh(
            "ip",
            &["netns", "exec", &node, "iptables", "-t", "nat", "-S"],
        );
        assert!(rules.contains("--dport 8080"), "{rules}");
        chain.check(&bed, &result);
        chain.del(&bed, &result);
        let rules = sh(
            "ip",
            &["netns", "exec", &node, "iptables", "-t", "nat", "-S"],
        );
        assert!(!rules.contains("--dport 8080"), "{rules}");
        assert!(!bed.links().iter().any(|name| name.starts_with("pn")));
        assert!(bed.state().attachments.is_empty());
        bed.end(&netns);
    }
}

#[test]
fn it_comes_after_others() {
    let Some(mut bed) = Bed::new() else { return };
    let Some(()) = require_plugins() else { return };
    for version in ["0.3.1", "0.4.0", "1.0.0"] {
        let netns = bed.container("a");
        // One that makes an interface of its own, without a default route; then two that don't.
        let first = Chain {
            version,
            plugins: vec![json!({
                "type": "ptp",
                "ipam": {"type": "static", "addresses": [{"address": "192.0.2.7/24", "gateway": "192.0.2.1"}]},
                "dns": {"nameservers": ["192.0.2.53"]},
            })],
        };
        let (program, call) = first.call(&bed, "ADD", &first.plugins[0], &Value::Null);
        let before = bed
            .run_program(&program, &call.variable("CNI_IFNAME", "net1"))
            .success();
        let tuning = json!({"type": "tuning", "dataDir": bed.run_dir().join("tuning"),
                            "sysctl": {"net.core.somaxconn": "400"}});
        let chain = Chain {
            version,
            plugins: vec![json!({"type": "penstock-cni"}), tuning, portmap()],
        };
        let (program, call) = chain.call(&bed, "ADD", &chain.plugins[0], &before);
        let result = bed.run_program(&program, &call).success();
        check_result(version, &result);
        assert_eq!(result["dns"], before["dns"]);
        let interfaces = result["interfaces"].as_array().unwrap();
        let count = before["interfaces"].as_array().unwrap().len();
        assert_eq!(
            interfaces[..count],
            before["interfaces"].as_array().unwrap()[..]
        );
        assert_eq!(interfaces.len(), count + 2);
        let ips = result["ips"].as_array().unwrap();
        assert_eq!(ips[0], before["ips"][0]);
        assert_eq!(ips[1]["interface"], count + 1);
        let rest = Chain {
            version,
            plugins: chain.plugins[1..].to_vec(),
        };
        let mut last = result;
        for own in &rest.plugins {
            let (program, call) = rest.call(&bed, "ADD", own, &last);
            last = bed.run_program(&program, &call).success();
            check_result(version, &last);
        }
        if version != "0.3.1" {
            chain.check(&bed, &last);
        }
        chain.del(&bed, &last);
        assert!(bed.state().attachments.is_empty());
        bed.end(&netns);
    }
}
