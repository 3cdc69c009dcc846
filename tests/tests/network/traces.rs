//! What a node has of pods: in the kernel, on disk, in the agent's mind.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use aya::maps::{HashMap, Map};
use penstock_agent::dataplane::pins::Pins;
use penstock_common::{Endpoint, Netns, V4, V6};
use penstock_testbed::Node;
use serde_json::Value;

/// Every trace that a pod leaves while it is there, in words. `bpffs` and `state` are where those
/// folders of the node's are found from here.
pub fn traces(
    node: &Node,
    bpffs: &std::path::Path,
    state: &std::path::Path,
) -> Result<BTreeSet<String>> {
    let mut traces = BTreeSet::new();
    let list = |arguments: &[&str]| -> Result<Vec<Value>> {
        let text = node.host.run("ip", &[&["-j"], arguments].concat())?;
        if text.trim().is_empty() {
            return Ok(Vec::new());
        }
        serde_json::from_str(&text).with_context(|| text.clone())
    };
    let of_pod = |name: &Value| name.as_str().is_some_and(|name| name.starts_with("pn"));
    let mut others = BTreeSet::new();
    for link in list(&["link"])? {
        if of_pod(&link["ifname"]) {
            traces.insert(format!("link {}", link["ifname"]));
        } else {
            others.insert(format!("if{}", link["ifindex"]));
        }
    }
    for kind in ["route", "neigh"] {
        for family in ["-4", "-6"] {
            for entry in list(&[family, kind])? {
                // Link-local ones come and go with the link, and by themselves.
                let is_link_local = entry["dst"]
                    .as_str()
                    .is_some_and(|ip| ip.starts_with("fe80"));
                if of_pod(&entry["dev"]) && !is_link_local {
                    traces.insert(format!("{kind} {} {}", entry["dst"], entry["dev"]));
                }
            }
        }
    }
    let pins = Pins::at(bpffs);
    for name in pins.links() {
        let interface = name.split('_').next().unwrap_or_default();
        if interface.starts_with("if") && !others.contains(interface) {
            traces.insert(format!("pin {name}"));
        }
    }
    let endpoints: HashMap<_, V4, Endpoint> = Map::HashMap(pins.map("ENDPOINTS4")?).try_into()?;
    for ip in endpoints.keys() {
        traces.insert(format!("endpoint {}", ip?));
    }
    let endpoints: HashMap<_, V6, Endpoint> = Map::HashMap(pins.map("ENDPOINTS6")?).try_into()?;
    for ip in endpoints.keys() {
        traces.insert(format!("endpoint {}", ip?));
    }
    let namespaces: HashMap<_, u64, Netns> = Map::HashMap(pins.map("NETNS")?).try_into()?;
    for cookie in namespaces.keys() {
        traces.insert(format!("namespace {}", cookie?));
    }
    for attachment in penstock_cni::state::read(&state.join("penstock.json")).unwrap_or_default() {
        traces.insert(format!("attachment {}", attachment.interface));
        traces.extend(attachment.ips.iter().map(|ip| format!("address {ip}")));
    }
    Ok(traces)
}
