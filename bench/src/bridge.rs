//! The reference bridge plugin with host-local addresses, configured as flannel configures it.

use std::path::Path;

use anyhow::Result;
use penstock_testbed::{Node, Plugin};
use serde_json::{Value, json};

/// It, on a node. What it gave to whom it keeps in `state_dir`.
pub fn plugin(node: &Node, ranges: &[&str], mtu: u32, state_dir: &Path) -> Result<Plugin> {
    let ranges: Vec<Value> = ranges
        .iter()
        .map(|range| json!([{ "subnet": range }]))
        .collect();
    let network = json!({
        "cniVersion": "1.0.0",
        "name": "bridged",
        "type": "bridge",
        "bridge": "cni0",
        "isDefaultGateway": true,
        "hairpinMode": true,
        "ipMasq": false,
        "mtu": mtu,
        "ipam": { "type": "host-local", "ranges": ranges, "dataDir": state_dir },
    });
    let network = network.as_object().cloned().unwrap_or_default();
    Plugin::reference(node, network)
}
