//! What the sources said, and which services each saying touched.
//!
//! Invariant: the cost of a change depends on the services that it touches, never on how many
//! there are; and nothing that a source said by mistake removes anything: an empty list where
//! there were services is refused.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use super::{
    endpoints::{self, Place},
    object::{
        EndpointSlice, Event, ExcludedPod, Family, Kind, Node, Object, ObjectName, Protocol,
        Rejection, Service,
    },
    port::{Port, PortKey},
};

/// What clients dial.
type Frontend = (IpAddr, u16, Protocol);

/// A service that wants a frontend; the least one gets it: the older, then the first by name.
type Claim = (i64, ObjectName);

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
    claims: HashMap<Frontend, BTreeSet<Claim>>,
    excluded: BTreeMap<ObjectName, ExcludedPod>,
    listed: HashSet<Kind>,
    dirty: BTreeSet<ObjectName>,
    is_doubtful: bool,
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
            excluded: BTreeMap::new(),
            listed: HashSet::new(),
            dirty: BTreeSet::new(),
            is_doubtful: false,
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
        Kind::ALL.iter().all(|kind| self.listed.contains(kind))
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

    /// The services that changed since the last call, in order.
    pub fn take_dirty(&mut self) -> Vec<ObjectName> {
        std::mem::take(&mut self.dirty).into_iter().collect()
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

    fn update_node_addresses(&mut self) {
        let own = self
            .node()
            .into_iter()
            .flat_map(|node| node.internal_ips.iter().copied());
        let addresses: BTreeSet<IpAddr> = self.detected.iter().copied().chain(own).collect();
        if addresses == self.node_addresses {
            return;
        }
        for address in addresses.symmetric_difference(&self.node_addresses) {
            let concerned = self.claims.iter().filter(|((ip, ..), _)| ip == address);
            self.dirty
                .extend(concerned.flat_map(|(_, claims)| claims.iter().map(|c| c.1.clone())));
        }
        self.node_addresses = addresses;
    }

    /// What this node should serve for a service; nothing for one that is gone.
    pub fn ports(&self, name: &ObjectName) -> Vec<Port> {
        let Some(service) = self.services.get(name) else {
            return Vec::new();
        };
        let mut ports = Vec::with_capacity(service.ports.len() * service.cluster_ips.len());
        for port in &service.ports {
            for family in [Family::V4, Family::V6] {
                let frontends: Vec<(IpAddr, u16)> = service
                    .cluster_ips
                    .iter()
                    .filter(|ip| Family::of(**ip) == family)
                    .map(|ip| (*ip, port.port.get()))
                    .filter(|(ip, number)| {
                        self.refusal(name, (*ip, *number, port.protocol)).is_none()
                    })
                    .collect();
                if frontends.is_empty() {
                    continue;
                }
                let (backends, on_empty) = endpoints::choose(
                    self.slices_of(name),
                    family,
                    (&port.name, port.protocol),
                    service.internal_policy,
                    Place::of(&self.node_name, self.node()),
                );
                ports.push(Port {
                    key: PortKey {
                        service: name.clone(),
                        port: port.name.clone(),
                        protocol: port.protocol,
                        family,
                    },
                    frontends,
                    affinity_secs: service.affinity_secs.unwrap_or(0),
                    on_empty,
                    backends,
                });
            }
        }
        ports
    }

    /// Every frontend that a service wants and does not get, with the reason.
    pub fn conflicts(&self) -> Vec<Rejection> {
        let mut conflicts: Vec<Rejection> = self
            .claims
            .iter()
            .flat_map(|(frontend, claims)| claims.iter().map(move |claim| (frontend, claim)))
            .filter_map(|(frontend, (_, name))| self.conflict(name, *frontend))
            .collect();
        conflicts.sort_by(|a, b| (&a.object, &a.reason).cmp(&(&b.object, &b.reason)));
        conflicts
    }

    /// The frontends that one service wants and does not get.
    pub fn conflicts_of(&self, name: &ObjectName) -> Vec<Rejection> {
        let service = self.services.get(name);
        let wanted = service.into_iter().flat_map(frontends);
        wanted
            .filter_map(|frontend| self.conflict(name, frontend))
            .collect()
    }

    fn conflict(&self, name: &ObjectName, frontend: Frontend) -> Option<Rejection> {
        let (ip, port, protocol) = frontend;
        let reason = self.refusal(name, frontend)?;
        Some(Rejection {
            kind: "Service".to_owned(),
            object: name.to_string(),
            origin: String::new(),
            reason: format!("{protocol} port {port} of {ip} {reason}"),
        })
    }

    /// Why a service does not get a frontend that it claims.
    fn refusal(&self, name: &ObjectName, frontend: Frontend) -> Option<String> {
        if self.node_addresses.contains(&frontend.0) {
            return Some("is this node's own address; a service can't have it".to_owned());
        }
        let (_, owner) = self.claims.get(&frontend)?.first()?;
        (owner != name).then(|| format!("belongs to the older service {owner}"))
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
        for frontend in frontends(&service) {
            let claims = self.claims.entry(frontend).or_default();
            claims.insert((service.created_secs, service.name.clone()));
            // Who owned it may no longer do so.
            self.dirty
                .extend(claims.iter().take(2).map(|claim| claim.1.clone()));
        }
        self.dirty.insert(service.name.clone());
        self.services.insert(service.name.clone(), service);
    }

    fn unclaim(&mut self, service: &Service) {
        for frontend in frontends(service) {
            if let Some(claims) = self.claims.get_mut(&frontend) {
                claims.remove(&(service.created_secs, service.name.clone()));
                self.dirty
                    .extend(claims.first().map(|claim| claim.1.clone()));
                if claims.is_empty() {
                    self.claims.remove(&frontend);
                }
            }
        }
    }

    fn put_slice(&mut self, slice: EndpointSlice) {
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

/// Everything that a service wants to be dialled at.
fn frontends(service: &Service) -> impl Iterator<Item = Frontend> + '_ {
    service.ports.iter().flat_map(|port| {
        service
            .cluster_ips
            .iter()
            .map(|ip| (*ip, port.port.get(), port.protocol))
    })
}
