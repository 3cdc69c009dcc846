//! Who wants to be dialled at what.

use std::{collections::BTreeSet, net::IpAddr, num::NonZeroU16};

use crate::model::{
    object::{Family, ObjectName, Protocol, Service},
    port::HostPort,
};

/// What clients dial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Claimed {
    /// The address; `None` for node ports, which are the same port of several.
    pub(super) ip: Option<IpAddr>,
    pub(super) port: u16,
    pub(super) protocol: Protocol,
}

/// A service that wants a frontend; the least one gets it: the older, then the first by name. Pods come
/// after all services, as the rules of hostPorts do after kube-proxy's.
pub(super) type Claim = (i64, ObjectName);

/// A service's claim.
pub(super) fn claim_of(service: &Service) -> Claim {
    (service.created_secs.min(POD - 1), service.name.clone())
}

/// A pod's claim.
pub(super) fn claim_of_pod(pod: &ObjectName) -> Claim {
    (POD, pod.clone())
}

/// How old a pod counts as, which no service does.
const POD: i64 = i64::MAX;

/// What a pod's host port is dialled at.
pub(super) fn claimed(port: &HostPort) -> Claimed {
    Claimed {
        ip: port.ip,
        port: port.port.get(),
        protocol: port.protocol,
    }
}

/// Everything that a service wants to be dialled at.
pub(super) fn claims(service: &Service) -> impl Iterator<Item = Claimed> + '_ {
    let families: Vec<Family> = service
        .cluster_ips
        .iter()
        .map(|ip| Family::of(*ip))
        .collect();
    let ips: BTreeSet<IpAddr> = service
        .cluster_ips
        .iter()
        .chain(&service.balancer_ips)
        .chain(&service.external_ips)
        .copied()
        .filter(|ip| families.contains(&Family::of(*ip)))
        .collect();
    service.ports.iter().flat_map(move |port| {
        let claim = |ip, number: NonZeroU16| Claimed {
            ip,
            port: number.get(),
            protocol: port.protocol,
        };
        let node_port = port.node_port.map(|number| claim(None, number));
        let ips: Vec<Claimed> = ips.iter().map(|ip| claim(Some(*ip), port.port)).collect();
        ips.into_iter().chain(node_port)
    })
}
