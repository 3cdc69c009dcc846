//! Services, endpoint slices and pods as manifests.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::{
    image,
    testbed::{Node, Pod},
};

/// Sets an object's annotation.
fn annotate(object: &mut Value, name: &str, value: &str) {
    let metadata = object.pointer_mut("/metadata");
    if let Some(metadata) = metadata.and_then(Value::as_object_mut) {
        let annotations = metadata.entry("annotations").or_insert_with(|| json!({}));
        if let Some(annotations) = annotations.as_object_mut() {
            annotations.insert(name.to_owned(), value.into());
        }
    }
}

/// A Service in the making.
#[derive(Clone, Debug)]
pub struct Service(Value);

impl Service {
    /// A service with one address a family: 10.96.0.`number` and fd00:96::`number`.
    pub fn new(name: &str, number: u8) -> Self {
        let ips = [format!("10.96.0.{number}"), format!("fd00:96::{number:x}")];
        Self(json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": name, "namespace": "default" },
            "spec": {
                "clusterIP": format!("10.96.0.{number}"), "clusterIPs": ips, "ipFamilyPolicy": "PreferDualStack",
                "ipFamilies": ["IPv4", "IPv6"], "ports": [],
            },
        }))
    }

    /// Adds a port.
    #[must_use]
    pub fn port(self, name: &str, port: u16, protocol: &str) -> Self {
        let mut ports = self.0.pointer("/spec/ports").cloned().unwrap_or_default();
        if let Some(ports) = ports.as_array_mut() {
            ports.push(json!({ "name": name, "port": port, "protocol": protocol }));
        }
        self.set("ports", ports)
    }

    /// Makes it a load balancer's, with node ports from `first` on in the order of its ports, and
    /// the balancer's addresses.
    #[must_use]
    pub fn balanced(self, first: u16, ips: &[&str]) -> Self {
        let mut ports = self.0.pointer("/spec/ports").cloned().unwrap_or_default();
        let numbers = first..;
        for (port, number) in ports.as_array_mut().into_iter().flatten().zip(numbers) {
            if let Some(port) = port.as_object_mut() {
                port.insert("nodePort".to_owned(), number.into());
            }
        }
        let mut balanced = self.set("ports", ports).set("type", "LoadBalancer");
        let ingress: Vec<Value> = ips.iter().map(|ip| json!({ "ip": ip })).collect();
        if let Some(service) = balanced.0.as_object_mut() {
            let status = json!({ "loadBalancer": { "ingress": ingress } });
            service.insert("status".to_owned(), status);
        }
        balanced
    }

    /// Sets an annotation.
    #[must_use]
    pub fn annotation(mut self, name: &str, value: &str) -> Self {
        annotate(&mut self.0, name, value);
        self
    }

    /// Sets a field of its spec.
    #[must_use]
    pub fn set(mut self, field: &str, value: impl Into<Value>) -> Self {
        if let Some(spec) = self.0.pointer_mut("/spec").and_then(Value::as_object_mut) {
            spec.insert(field.to_owned(), value.into());
        }
        self
    }

    /// As JSON, which is YAML too.
    pub fn json(&self) -> Value {
        self.0.clone()
    }
}

/// An EndpointSlice in the making.
#[derive(Clone, Debug)]
pub struct Slice(Value);

impl Slice {
    /// An empty slice of a service.
    pub fn new(service: &str, is_v4: bool) -> Self {
        let family = if is_v4 { "IPv4" } else { "IPv6" };
        Self(json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{service}-{}", family.to_lowercase()),
                "namespace": "default",
                "labels": { "kubernetes.io/service-name": service },
            },
            "addressType": family,
            "ports": [],
            "endpoints": [],
        }))
    }

    /// Adds a port.
    #[must_use]
    pub fn port(mut self, name: &str, port: u16, protocol: &str) -> Self {
        if let Some(ports) = self.0.pointer_mut("/ports").and_then(Value::as_array_mut) {
            ports.push(json!({ "name": name, "port": port, "protocol": protocol }));
        }
        self
    }

    /// Sets an annotation.
    #[must_use]
    pub fn annotation(mut self, name: &str, value: &str) -> Self {
        annotate(&mut self.0, name, value);
        self
    }

    /// Adds a ready pod.
    #[must_use]
    pub fn pod(mut self, pod: &Pod) -> Self {
        let is_v4 = self.0.pointer("/addressType") == Some(&json!("IPv4"));
        let ip = if is_v4 { pod.host.ip4 } else { pod.host.ip6 };
        if let Some(endpoints) = self
            .0
            .pointer_mut("/endpoints")
            .and_then(Value::as_array_mut)
        {
            endpoints.push(json!({
                "addresses": [ip.to_string()],
                "conditions": { "ready": true },
                "nodeName": pod.node,
            }));
        }
        self
    }

    /// As JSON, which is YAML too.
    pub fn json(&self) -> Value {
        self.0.clone()
    }

    /// Slices of both families with TCP and UDP ports called "tcp" and "udp".
    pub fn both(service: &str, port: u16, pods: &[&Pod]) -> Vec<Value> {
        [true, false]
            .into_iter()
            .map(|is_v4| {
                let slice = Self::new(service, is_v4)
                    .port("tcp", port, "TCP")
                    .port("udp", port, "UDP");
                pods.iter().fold(slice, |slice, pod| slice.pod(pod)).json()
            })
            .collect()
    }
}

/// A pod in the making: the traffic program, which serves TCP and UDP on 8080 and says the pod's
/// name.
#[derive(Clone, Debug)]
pub struct PodObject {
    name: String,
    node: String,
    annotations: BTreeMap<String, String>,
    host_port: Option<u16>,
}

impl PodObject {
    /// A pod of a node's.
    pub fn new(name: &str, node: &Node) -> Self {
        Self {
            name: name.to_owned(),
            node: node.name(),
            annotations: BTreeMap::new(),
            host_port: None,
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sets an annotation.
    #[must_use]
    pub fn annotation(mut self, name: &str, value: &str) -> Self {
        self.annotations.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Leads a port of its node, TCP and UDP, to the one that it serves on.
    #[must_use]
    pub fn host_port(mut self, port: u16) -> Self {
        self.host_port = Some(port);
        self
    }

    /// As JSON, which is YAML too.
    pub fn json(&self) -> Value {
        let ports = ["TCP", "UDP"].map(|protocol| {
            let mut port = json!({ "containerPort": 8080, "protocol": protocol });
            if let (Some(host_port), Some(port)) = (self.host_port, port.as_object_mut()) {
                port.insert("hostPort".to_owned(), host_port.into());
            }
            port
        });
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": self.name,
                "namespace": "default",
                "annotations": self.annotations,
            },
            "spec": {
                "nodeName": self.node,
                "containers": [{
                    "name": "traffic",
                    "image": image::TRAFFIC,
                    "imagePullPolicy": "Never",
                    "args": ["serve", "--name", self.name, "--port", "8080"],
                    "ports": ports,
                    "readinessProbe": { "tcpSocket": { "port": 8080 }, "periodSeconds": 1 },
                }],
            },
        })
    }
}
