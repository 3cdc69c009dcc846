//! What the kernel serves while no agent is there to say whose it is.

use std::{collections::BTreeMap, fmt::Display};

use penstock_common::{Addr, Algorithm, Be16, Forwarding, ServiceId};

use crate::{
    dataplane::{FamilyState, MapState},
    report::{self, Backend, Policies, Port},
};

/// Every port that the kernel serves, without the names, which it does not know.
pub(super) fn ports(state: &MapState) -> Vec<Port> {
    let v4 = family(&state.v4, "IPv4", |ip, port| format!("{ip}:{port}"));
    let v6 = family(&state.v6, "IPv6", |ip, port| format!("[{ip}]:{port}"));
    v4.into_iter().chain(v6).collect()
}

fn family<A: Addr + Ord + Display>(
    state: &FamilyState<A>,
    name: &str,
    endpoint: impl Fn(&A, Be16) -> String,
) -> Vec<Port> {
    let mut ports: BTreeMap<ServiceId, Port> = BTreeMap::new();
    let mut flags: BTreeMap<ServiceId, u32> = BTreeMap::new();
    for (key, frontend) in &state.frontends {
        let port = ports.entry(frontend.service).or_insert_with(|| Port {
            service: None,
            port: None,
            protocol: key.proto.to_string(),
            family: name.to_owned(),
            id: frontend.service.0,
            frontends: Vec::new(),
            affinity_secs: frontend.affinity_secs,
            algorithm: Algorithm::of(frontend.flags).label().to_owned(),
            forwarding: String::new(),
            forwarding_obstacle: None,
            policies: Policies::default(),
            backends: Vec::new(),
            stats: None,
        });
        port.frontends.push(endpoint(&key.addr, key.port));
        *flags.entry(frontend.service).or_default() |= frontend.flags;
    }
    for (service, port) in &mut ports {
        let flags = flags.get(service).copied().unwrap_or_default();
        port.policies = Policies::of(flags);
        port.forwarding = Forwarding::of(flags).label().to_owned();
    }
    for (id, backend) in &state.backends {
        let state = report::state(backend.flags);
        if let Some(port) = ports.get_mut(&backend.service)
            && state != report::state(0)
        {
            port.backends.push(Backend {
                address: endpoint(&backend.addr, backend.port),
                id: id.0,
                generation: backend.generation,
                state: state.to_owned(),
                stats: None,
            });
        }
    }
    ports.into_values().collect()
}
