//! What nodes and their kernels hold, pods or none: it has to be the same before and after them.

use std::collections::BTreeSet;

use anyhow::Result;
use penstock_agent::dataplane::{Dataplane, bpf::Bpf, pins::Pins};
use penstock_testbed::{Agent, Node};

use crate::traces::traces;

/// Every trace that pods leave on these nodes, and what else their maps hold: services and flows.
pub fn remains(nodes: &[Node], agents: &[Agent]) -> Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    for (node, agent) in nodes.iter().zip(agents) {
        let name = node.name();
        let mut found = traces(node, &node.bpffs, &node.cni_state_dir())?;
        let maps = Bpf::open(&Pins::at(&node.bpffs))?.observe()?;
        found.extend(maps.canonical().lines().map(str::to_owned));
        let flows = agent.show("conntrack")?;
        for flow in flows.as_array().into_iter().flatten() {
            let ends = ["client", "frontend", "backend"].map(|end| flow[end].to_string());
            found.insert(format!("flow {}", ends.join(" ")));
        }
        for family in ["-4", "-6"] {
            let routes = node
                .host
                .run("ip", &[family, "route", "show", "table", "all"])?;
            let lasting = routes.lines().filter(|route| !route.contains("fe80:"));
            // How long one of a router's lasts changes by itself.
            let lasting = lasting.filter(|route| !route.contains("expires"));
            found.extend(lasting.map(|route| format!("{family} {route}")));
        }
        all.extend(found.into_iter().map(|trace| format!("{name}: {trace}")));
    }
    Ok(all)
}
