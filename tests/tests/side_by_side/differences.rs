//! Where Penstock differs from kube-proxy 1.20 on purpose: docs/differences.md, as rules.
//!
//! Each rule turns what kube-proxy does into what Penstock is to do instead. Whatever no rule
//! mentions has to be the same.

use crate::{
    cases::{Address, Case, Client, ECHO},
    outcome::{Failure, Origin, Outcome},
    service::{Kind, Ranges, Role, Service, State},
};

/// A difference, by its heading in docs/differences.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Difference {
    UndefinedPort,
    LoopbackV6,
    Terminating,
    InternalPolicy,
    HostExternal,
    PodsElsewhere,
    ClosedFirst,
    HostLearns,
    PodsAddress,
    SameNode,
    Itself,
    PrimaryAddresses,
}

impl Difference {
    pub const ALL: [Self; 12] = [
        Self::UndefinedPort,
        Self::LoopbackV6,
        Self::Terminating,
        Self::InternalPolicy,
        Self::HostExternal,
        Self::PodsElsewhere,
        Self::ClosedFirst,
        Self::HostLearns,
        Self::PodsAddress,
        Self::SameNode,
        Self::Itself,
        Self::PrimaryAddresses,
    ];

    pub fn heading(self) -> &'static str {
        match self {
            Self::UndefinedPort => "An undefined port of a cluster address is refused",
            Self::PrimaryAddresses => "Node ports are at the node's first addresses",
            Self::LoopbackV6 => "Node ports are at ::1 too",
            Self::Terminating => "Endpoints that terminate serve where none is ready",
            Self::InternalPolicy => "internalTrafficPolicy is heeded",
            Self::HostExternal => "Processes of a node reach external addresses",
            Self::PodsElsewhere => "A pod of another node is outside at a node port",
            Self::ClosedFirst => "Who may not come is not answered where nobody serves either",
            Self::HostLearns => "Processes of a node learn at once that nobody answers",
            Self::PodsAddress => "Pods keep their address at external addresses",
            Self::SameNode => "Backends of the same node see the client",
            Self::Itself => "A pod that reaches itself at the socket is asked by itself",
        }
    }

    /// Whether the same endpoints answer, and see somebody else.
    pub fn is_of_origin(self) -> bool {
        matches!(self, Self::PodsAddress | Self::SameNode | Self::Itself)
    }

    /// What this difference makes of an outcome; `None` where it has no bearing.
    fn applied(self, case: &Case, service: &Service, theirs: &Outcome) -> Option<Outcome> {
        match self {
            Self::UndefinedPort => {
                let is_it = case.port.is_none() && case.address == Address::Cluster;
                (is_it && !service.is_others).then(|| failed(Failure::Refused))
            }
            // Nobody listens there; who did not connect the socket is not told.
            Self::PrimaryAddresses => {
                let failure = if case.protocol == "udp" {
                    Failure::Silence
                } else {
                    Failure::Refused
                };
                (case.address == Address::SecondNode).then(|| failed(failure))
            }
            Self::LoopbackV6 => {
                let is_it = case.address == Address::Loopback && !case.is_v4;
                (is_it && is_served(service)).then(|| anybody(case, service))
            }
            Self::Terminating => terminating(case, service),
            Self::InternalPolicy => {
                let is_it = case.address == Address::Cluster && case.port.is_some();
                (is_it && service.internal_local).then(|| local(case, service))
            }
            Self::HostExternal => {
                let is_it = case.client == Client::Host && case.address == Address::External;
                let is_silent = *theirs == failed(Failure::Silence);
                (is_it && is_silent && case.port.is_some() && is_served(service))
                    .then(|| anybody(case, service))
            }
            Self::PodsElsewhere => {
                let is_it = case.client == Client::Elsewhere;
                (is_it && service.external_local).then(|| local(case, service))
            }
            Self::ClosedFirst => {
                let is_it = case.port.is_some() && is_closed(case, service);
                (is_it && theirs.answers.is_empty()).then(|| failed(Failure::Silence))
            }
            Self::HostLearns => host_learns(case, service),
            Self::PodsAddress => {
                let is_it = case.client.is_pod_here();
                is_it.then(|| seen(theirs, |role| Some(role) != case.client.role()))
            }
            Self::SameNode => {
                let is_it = matches!(case.client, Client::Elsewhere | Client::Outside);
                is_it.then(|| seen(theirs, Role::is_here))
            }
            Self::Itself => {
                let is_it = case.client == Client::Server;
                is_it.then(|| seen(theirs, |role| Some(role) == case.client.role()))
            }
        }
    }
}

/// Affinity is a client's for a port of a service, by whichever address: where the client may not have
/// the same endpoints at all of them, one address's choice replaces another's.
pub const AFFINITY: &str = "Affinity is one for all addresses of a service";

/// Whether a client may have different endpoints at different addresses of a service.
pub fn is_affinity_shared(case: &Case, service: &Service) -> bool {
    let is_outside = matches!(case.client, Client::Outside | Client::Elsewhere);
    service.internal_local != (service.external_local && is_outside)
}

/// What Penstock is to do where kube-proxy does this, and why that is something else.
pub fn expected(case: &Case, service: &Service, theirs: &Outcome) -> (Outcome, Vec<Difference>) {
    let mut outcome = theirs.clone();
    let mut used = Vec::new();
    if case.protocol == ECHO {
        // Addresses without a port are nobody's business.
        return (outcome, used);
    }
    for difference in Difference::ALL {
        if let Some(new) = difference.applied(case, service, &outcome)
            && new != outcome
        {
            outcome = new;
            used.push(difference);
        }
    }
    (outcome, used)
}

fn failed(failure: Failure) -> Outcome {
    Outcome {
        failures: [failure].into(),
        ..Outcome::default()
    }
}

/// The same, but some backends see the client where they saw its node.
fn seen(outcome: &Outcome, is_concerned: impl Fn(Role) -> bool) -> Outcome {
    let answers = outcome.answers.iter().cloned().map(|(role, origin)| {
        if origin == Origin::Node && is_concerned(role) {
            (role, Origin::Client)
        } else {
            (role, origin)
        }
    });
    Outcome {
        answers: answers.collect(),
        ..outcome.clone()
    }
}

/// Whether a service proxy serves it at all.
fn is_served(service: &Service) -> bool {
    !service.is_others && !matches!(service.kind, Kind::Headless | Kind::ExternalName)
}

/// KEP-1669: ready endpoints, or those that terminate and still serve, of all or of this node.
fn chosen(service: &Service, is_local: bool) -> Vec<Role> {
    let all = service
        .endpoints
        .iter()
        .filter(|(role, _)| !is_local || role.is_here());
    let with = |wanted: fn(State) -> bool| -> Vec<Role> {
        let roles = all.clone().filter(|(_, state)| wanted(*state));
        roles.map(|(role, _)| *role).collect()
    };
    let ready = with(State::is_ready);
    if ready.is_empty() {
        with(|state| state == State::Leaving)
    } else {
        ready
    }
}

/// How kube-proxy would show these to a client.
fn answers(case: &Case, roles: Vec<Role>) -> Outcome {
    let origin = |role| match case.client {
        Client::Outside | Client::Elsewhere => Origin::Node,
        _ if Some(role) == case.client.role() => Origin::Node,
        _ => Origin::Client,
    };
    let answers = roles.into_iter().map(|role| (role, origin(role)));
    Outcome {
        answers: answers.collect(),
        ..Outcome::default()
    }
}

fn anybody(case: &Case, service: &Service) -> Outcome {
    let roles = chosen(service, false);
    if roles.is_empty() || service.is_deaf() {
        return failed(refusal(case));
    }
    answers(case, roles)
}

fn local(case: &Case, service: &Service) -> Outcome {
    if chosen(service, false).is_empty() {
        return failed(refusal(case));
    }
    let roles = chosen(service, true);
    if roles.is_empty() {
        return failed(Failure::Silence);
    }
    if service.is_deaf() {
        return failed(refusal(case));
    }
    answers(case, roles)
}

/// What a refusal looks like: a socket that is not connected does not hear of it.
fn refusal(case: &Case) -> Failure {
    if case.protocol == "udp" {
        Failure::Silence
    } else {
        Failure::Refused
    }
}

/// Whether a load balancer's address is closed for a client.
fn is_closed(case: &Case, service: &Service) -> bool {
    let is_open = match service.ranges {
        Ranges::Everybody => true,
        Ranges::Client => case.client == Client::Outside,
        Ranges::Pods => case.client.is_pod_here(),
        Ranges::Nodes => matches!(case.client, Client::Outside | Client::Host),
        Ranges::Nobody => false,
    };
    case.address == Address::Balancer && !is_open
}

fn terminating(case: &Case, service: &Service) -> Option<Outcome> {
    let is_outside = matches!(case.client, Client::Outside | Client::Elsewhere);
    let is_local = match case.address {
        Address::Cluster => service.internal_local,
        _ => service.external_local && is_outside,
    };
    let scope = chosen(service, is_local);
    let is_leaving = |role: &Role| service.endpoints.contains(&(*role, State::Leaving));
    let is_it = case.port.is_some()
        && is_served(service)
        && !is_closed(case, service)
        && scope.iter().any(is_leaving);
    is_it.then(|| {
        let outcome = answers(case, scope);
        // Under a Local policy a client keeps its address.
        if is_local && case.address != Address::Cluster {
            seen(&outcome, |_| true)
        } else {
            outcome
        }
    })
}

/// A process of the node has no packets that could be dropped or answered on their way.
fn host_learns(case: &Case, service: &Service) -> Option<Outcome> {
    if case.client != Client::Host || case.port.is_none() || !is_served(service) {
        return None;
    }
    let is_empty = chosen(service, false).is_empty();
    let is_local = case.address == Address::Cluster && service.internal_local;
    if is_closed(case, service) || !is_empty && is_local && chosen(service, true).is_empty() {
        return Some(failed(Failure::Other("host unreachable".to_owned())));
    }
    is_empty.then(|| failed(Failure::Refused))
}
