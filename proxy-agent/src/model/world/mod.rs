//! What the sources said, and which services each saying touched.
//!
//! Invariant: the cost of a change depends on the services that it touches, never on how many
//! there are; and nothing that a source said by mistake removes anything: an empty list where
//! there were services is refused.

mod claims;
mod host_ports;
mod served;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use penstock_common::Forwarding;

use super::{
    node_ports::NodePorts,
    object::{
        EndpointSlice, Event, ExcludedPod, Family, Kind, Node, Object, ObjectName, Rejection,
        Service, TrafficPolicy,
    },
};
use claims::{Claim, Claimed, claim_of, claims};
use host_ports::HostPorts;

/// What made a service's endpoints change.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Trigger {
    /// The service.
    pub service: ObjectName,
    /// The family of its endpoints that changed.
    pub family: Family,
    /// When that was, in time since 1970.
    pub since_1970: Duration,
}

/// What the sources said.
#[derive(Debug)]
pub struct World {
    node_name: Arc<str>,
    nodes: BTreeMap<Arc<str>, Node>,
    detected: Vec<IpAddr>,
    node_addresses: BTreeSet<IpAddr>,
    services: HashMap<ObjectName, Service>,
    slices: HashMap<ObjectName, EndpointSlice>,
    slices_of: HashMap<ObjectName, BTreeSet<ObjectName>>,
    claims: HashMap<Claimed, BTreeSet<Claim>>,
    node_ports: NodePorts,
    /// Where that is.
    node_port_ips: BTreeSet<IpAddr>,
    /// Services that load balancers ask this node about.
    checked: BTreeSet<ObjectName>,
    /// Services whose way for clients outside to backends of other nodes is not the usual one.
    forwarded: BTreeSet<ObjectName>,
    /// Services with a policy that leaves their endpoints of other nodes out.
    local: BTreeSet<ObjectName>,
    /// Services with node ports.
    node_port_services: BTreeSet<ObjectName>,
    /// Services of which something can't be used.
    odd_services: BTreeSet<ObjectName>,
    /// Nodes likewise.
    odd_nodes: BTreeSet<Arc<str>>,
    /// What pods of this node asked for.
    host_ports: HostPorts,
    excluded: BTreeMap<ObjectName, ExcludedPod>,
    listed: HashSet<Kind>,
    dirty: BTreeSet<ObjectName>,
    triggers: Vec<Trigger>,
    is_doubtful: bool,
    /// Whether pods' host ports are yet to be heard of.
    awaits_host_ports: bool,
}

impl World {
    /// A world of which nothing is known but the name of this node.
    pub fn new(node_name: &str) -> Self {
        Self {
            node_name: node_name.into(),
            nodes: BTreeMap::new(),
            detected: Vec::new(),
            node_addresses: BTreeSet::new(),
            services: HashMap::new(),
            slices: HashMap::new(),
            slices_of: HashMap::new(),
            claims: HashMap::new(),
            node_ports: NodePorts::default(),
            node_port_ips: BTreeSet::new(),
            checked: BTreeSet::new(),
            forwarded: BTreeSet::new(),
            local: BTreeSet::new(),
            node_port_services: BTreeSet::new(),
            odd_services: BTreeSet::new(),
            odd_nodes: BTreeSet::new(),
            host_ports: HostPorts::default(),
            excluded: BTreeMap::new(),
            listed: HashSet::new(),
            dirty: BTreeSet::new(),
            triggers: Vec::new(),
            is_doubtful: false,
            awaits_host_ports: false,
        }
    }

    /// Takes in what a source says. The error says what is not believed; everything else is.
    pub fn apply(&mut self, event: Event) -> Result<(), Rejection> {
        match event {
            Event::Listed(kind, objects, kept) => return self.replace(kind, objects, kept),
            Event::Applied(object) => self.put(object),
            Event::Deleted(kind, name) => self.remove(kind, &name),
            Event::Doubt(is_doubtful) => self.is_doubtful = is_doubtful,
            Event::Rejected(rejection) => return Err(rejection),
        }
        Ok(())
    }

    /// Whether every kind has been listed, so that what is absent is known to be absent.
    pub fn is_synced(&self) -> bool {
        !self.awaits_host_ports && Kind::ALL.iter().all(|kind| self.listed.contains(kind))
    }

    /// Waits for [`Self::set_host_ports`] before anything that is absent counts as absent.
    pub fn await_host_ports(&mut self) {
        self.awaits_host_ports = true;
    }

    /// Whether there may be more than what was listed.
    pub fn is_doubtful(&self) -> bool {
        self.is_doubtful
    }

    /// Which kinds have not been listed.
    pub fn awaited(&self) -> Vec<Kind> {
        Kind::ALL
            .into_iter()
            .filter(|kind| !self.listed.contains(kind))
            .collect()
    }

    /// Whether services changed that nobody has taken.
    pub fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// The services that changed since the last call, in order.
    pub fn take_dirty(&mut self) -> Vec<ObjectName> {
        std::mem::take(&mut self.dirty).into_iter().collect()
    }

    /// What made endpoints change since the last call.
    pub fn take_triggers(&mut self) -> Vec<Trigger> {
        std::mem::take(&mut self.triggers)
    }

    /// How many services, endpoint slices and endpoints there are.
    pub fn sizes(&self) -> (usize, usize, usize) {
        let endpoints = self
            .slices
            .values()
            .map(|slice| slice.endpoints.len())
            .sum();
        (self.services.len(), self.slices.len(), endpoints)
    }

    /// Whether there is such a service, or such a pod with host ports.
    pub fn has(&self, name: &ObjectName) -> bool {
        self.services.contains_key(name) || self.host_ports.has(name)
    }

    /// The services' names.
    pub fn services(&self) -> impl Iterator<Item = &ObjectName> {
        self.services.keys()
    }

    /// This node's object.
    pub fn node(&self) -> Option<&Node> {
        self.nodes.get(&self.node_name)
    }

    /// All nodes that a source spoke of.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// What of nodes' objects can't be used.
    pub fn left_out_of_nodes(&self) -> impl Iterator<Item = String> {
        let odd = self.odd_nodes.iter();
        let odd = odd.filter_map(|name| self.nodes.get(name));
        odd.flat_map(|node| {
            let reasons = node.left_out.iter();
            reasons.map(|reason| format!("Node {}: {reason}", node.name))
        })
    }

    /// Pods on this node that opted out of socket translation.
    pub fn excluded(&self) -> impl Iterator<Item = &ExcludedPod> {
        self.excluded.values()
    }

    /// The addresses that this node is known to have, which no service may claim.
    pub fn node_addresses(&self) -> &BTreeSet<IpAddr> {
        &self.node_addresses
    }

    /// Sets the addresses that this node has besides those in its object.
    pub fn set_node_addresses(&mut self, detected: Vec<IpAddr>) {
        self.detected = detected;
        self.update_node_addresses();
    }

    /// Sets at which addresses of this node its ports are services'.
    pub fn set_node_ports(&mut self, policy: NodePorts) {
        if policy.loopback != self.node_ports.loopback {
            self.dirty.extend(self.host_ports.names().cloned());
        }
        self.node_ports = policy;
        self.update_node_port_ips();
    }

    fn update_node_port_ips(&mut self) {
        let own = self.node().map(|node| node.internal_ips.as_slice());
        let all: Vec<IpAddr> = own
            .unwrap_or_default()
            .iter()
            .chain(&self.detected)
            .copied()
            .collect();
        let ips = self.node_ports.addresses(&all);
        if ips != self.node_port_ips {
            self.node_port_ips = ips;
            self.dirty.extend(self.node_port_services.iter().cloned());
            self.dirty.extend(self.host_ports.names().cloned());
        }
    }

    fn update_node_addresses(&mut self) {
        let own = self
            .node()
            .into_iter()
            .flat_map(|node| node.internal_ips.iter().copied());
        let addresses: BTreeSet<IpAddr> = self.detected.iter().copied().chain(own).collect();
        self.update_node_port_ips();
        if addresses == self.node_addresses {
            return;
        }
        for address in addresses.symmetric_difference(&self.node_addresses) {
            let concerned = self
                .claims
                .iter()
                .filter(|(claimed, _)| claimed.ip == Some(*address));
            self.dirty
                .extend(concerned.flat_map(|(_, claims)| claims.iter().map(|c| c.1.clone())));
        }
        self.dirty.extend(self.host_ports.names().cloned());
        self.node_addresses = addresses;
    }

    fn slices_of(&self, service: &ObjectName) -> impl Iterator<Item = &EndpointSlice> {
        self.slices_of
            .get(service)
            .into_iter()
            .flatten()
            .filter_map(|name| self.slices.get(name))
    }

    fn replace(
        &mut self,
        kind: Kind,
        objects: Vec<Object>,
        kept: Vec<ObjectName>,
    ) -> Result<(), Rejection> {
        let held: Vec<ObjectName> = match kind {
            Kind::Service => self.services.keys().cloned().collect(),
            Kind::EndpointSlice => self.slices.keys().cloned().collect(),
            Kind::Node => self
                .nodes
                .keys()
                .map(|name| ObjectName::new("", name.clone()))
                .collect(),
            Kind::Pod => self.excluded.keys().cloned().collect(),
        };
        let matters = matches!(kind, Kind::Service | Kind::EndpointSlice | Kind::Node);
        if matters && objects.is_empty() && kept.is_empty() && !held.is_empty() {
            return Err(Rejection {
                kind: kind.to_string(),
                object: "the whole list".to_owned(),
                origin: String::new(),
                reason: format!(
                    "the source lists none where there were {}; everything stays as it was (to \
                     remove everything run `penstock cleanup`)",
                    held.len()
                ),
            });
        }
        let named: HashSet<ObjectName> = objects.iter().map(Object::name).chain(kept).collect();
        for name in held.iter().filter(|name| !named.contains(name)) {
            self.remove(kind, name);
        }
        for object in objects {
            self.put(object);
        }
        self.listed.insert(kind);
        Ok(())
    }

    fn put(&mut self, object: Object) {
        match object {
            Object::Service(service) => self.put_service(service),
            Object::EndpointSlice(slice) => self.put_slice(slice),
            Object::Node(node) => self.put_node(&node.name.clone(), Some(node)),
            Object::Pod(pod) => {
                self.excluded.insert(pod.name.clone(), pod);
            }
        }
    }

    fn remove(&mut self, kind: Kind, name: &ObjectName) {
        match kind {
            Kind::Service => {
                if let Some(service) = self.services.remove(name) {
                    self.unclaim(&service);
                    self.dirty.insert(name.clone());
                }
            }
            Kind::EndpointSlice => {
                if let Some(slice) = self.slices.remove(name) {
                    // What it said of its last change says nothing of its end.
                    self.triggers.retain(|one| one.service != slice.service);
                    self.unlink(&slice);
                }
            }
            Kind::Node => {
                self.put_node(&name.name, None);
            }
            Kind::Pod => {
                self.excluded.remove(name);
            }
        }
    }

    fn put_service(&mut self, service: Service) {
        if self.services.get(&service.name) == Some(&service) {
            return;
        }
        if let Some(old) = self.services.remove(&service.name) {
            self.unclaim(&old);
        }
        for claimed in claims(&service) {
            self.claim(claimed, claim_of(&service));
        }
        let policies = [service.internal_policy, service.external_policy];
        if policies.contains(&TrafficPolicy::Local) {
            self.local.insert(service.name.clone());
        }
        if service.ports.iter().any(|port| port.node_port.is_some()) {
            self.node_port_services.insert(service.name.clone());
        }
        if !service.left_out.is_empty() {
            self.odd_services.insert(service.name.clone());
        }
        if service.health_check_port.is_some() && service.external_policy == TrafficPolicy::Local {
            self.checked.insert(service.name.clone());
        }
        let is_outside = service.ports.iter().any(|port| port.node_port.is_some())
            || !service.external_ips.is_empty()
            || !service.balancer_ips.is_empty();
        if service.forwarding != Forwarding::default()
            && service.external_policy == TrafficPolicy::Cluster
            && is_outside
        {
            self.forwarded.insert(service.name.clone());
        }
        self.dirty.insert(service.name.clone());
        self.services.insert(service.name.clone(), service);
    }

    fn unclaim(&mut self, service: &Service) {
        for claimed in claims(service) {
            self.unclaim_one(claimed, claim_of(service));
        }
        self.node_port_services.remove(&service.name);
        self.odd_services.remove(&service.name);
        self.checked.remove(&service.name);
        self.local.remove(&service.name);
        self.forwarded.remove(&service.name);
    }

    fn claim(&mut self, claimed: Claimed, claim: Claim) {
        let claims = self.claims.entry(claimed).or_default();
        claims.insert(claim);
        // Who owned it may no longer do so.
        self.dirty
            .extend(claims.iter().take(2).map(|claim| claim.1.clone()));
        self.touch_node_port(claimed);
    }

    fn unclaim_one(&mut self, claimed: Claimed, claim: Claim) {
        if let Some(claims) = self.claims.get_mut(&claimed) {
            claims.remove(&claim);
            self.dirty
                .extend(claims.first().map(|claim| claim.1.clone()));
            if claims.is_empty() {
                self.claims.remove(&claimed);
            }
        }
        self.touch_node_port(claimed);
    }

    /// Marks who has the same port of every address: one address with a port of its own is not
    /// among them.
    fn touch_node_port(&mut self, claimed: Claimed) {
        let any = Claimed {
            ip: None,
            ..claimed
        };
        if claimed.ip.is_some()
            && let Some((_, owner)) = self.claims.get(&any).and_then(BTreeSet::first)
        {
            self.dirty.insert(owner.clone());
        }
        if claimed.ip.is_none() {
            let pods = self.host_ports.with(claimed.port, claimed.protocol);
            self.dirty.extend(pods.cloned());
        }
    }

    fn put_slice(&mut self, mut slice: EndpointSlice) {
        // Two that differ in this alone are the same.
        let triggered = slice.triggered.take();
        if self.slices.get(&slice.name) == Some(&slice) {
            return;
        }
        if let Some(old) = self.slices.remove(&slice.name) {
            self.unlink(&old);
        }
        self.slices_of
            .entry(slice.service.clone())
            .or_default()
            .insert(slice.name.clone());
        self.touch(&slice.service.clone());
        if let (Some(since_1970), true) = (triggered, self.services.contains_key(&slice.service)) {
            self.triggers.push(Trigger {
                service: slice.service.clone(),
                family: slice.family,
                since_1970,
            });
        }
        self.slices.insert(slice.name.clone(), slice);
    }

    fn unlink(&mut self, slice: &EndpointSlice) {
        if let Some(names) = self.slices_of.get_mut(&slice.service) {
            names.remove(&slice.name);
            if names.is_empty() {
                self.slices_of.remove(&slice.service);
            }
        }
        self.touch(&slice.service.clone());
    }

    /// Marks a service, if there is one; endpoint slices of none wait for it.
    fn touch(&mut self, service: &ObjectName) {
        if self.services.contains_key(service) {
            self.dirty.insert(service.clone());
        }
    }

    fn put_node(&mut self, name: &Arc<str>, node: Option<Node>) {
        let zone = self.node().and_then(|node| node.zone.clone());
        if node.as_ref().is_some_and(|node| !node.left_out.is_empty()) {
            self.odd_nodes.insert(name.clone());
        } else {
            self.odd_nodes.remove(name);
        }
        match node {
            Some(node) => self.nodes.insert(name.clone(), node),
            None => self.nodes.remove(name),
        };
        if *name != self.node_name {
            return;
        }
        if zone != self.node().and_then(|node| node.zone.clone()) {
            self.dirty.extend(self.services.keys().cloned());
        }
        self.update_node_addresses();
    }
}
