//! Services as objects, one for each of the two nodes that are compared.

use std::net::IpAddr;

use serde_json::{Value, json};

use crate::{
    service::{Families, Kind, Ranges, Service, State},
    side::Side,
};

/// The port that no service has.
pub const UNDEFINED: u16 = 9;

/// A service as one node's, with addresses of its own.
#[derive(Clone, Copy)]
pub struct Object<'a> {
    pub service: &'a Service,
    pub side: &'a Side,
}

impl Object<'_> {
    pub fn name(&self) -> String {
        format!("s{}-{}", self.service.number, self.side.name)
    }

    /// A number that no other has.
    fn number(&self) -> usize {
        10 + 2 * self.service.number + usize::from(!self.side.is_penstock)
    }

    pub fn cluster_ip(&self, is_v4: bool) -> IpAddr {
        self.ip(is_v4, "10.96.0.", "fd00:96::")
    }

    pub fn balancer_ip(&self, is_v4: bool) -> IpAddr {
        self.ip(is_v4, "203.0.113.", "2001:db8:203::")
    }

    pub fn external_ip(&self, is_v4: bool) -> IpAddr {
        self.ip(is_v4, "198.51.100.", "2001:db8:198::")
    }

    fn ip(&self, is_v4: bool, v4: &str, v6: &str) -> IpAddr {
        let number = self.number();
        let text = if is_v4 {
            format!("{v4}{number}")
        } else {
            format!("{v6}{number:x}")
        };
        text.parse().expect("an address")
    }

    /// The node port of its port `index`.
    pub fn node_port(&self, index: usize) -> u16 {
        (30_000 + 4 * self.number() + index) as u16
    }

    pub fn health_port(&self) -> u16 {
        (32_000 + self.number()) as u16
    }

    /// The Service.
    pub fn service(&self) -> Value {
        let service = self.service;
        let families: Vec<bool> = [true, false]
            .into_iter()
            .filter(|is_v4| service.families.has(*is_v4))
            .collect();
        let ips: Vec<IpAddr> = families
            .iter()
            .map(|is_v4| self.cluster_ip(*is_v4))
            .collect();
        let ports: Vec<Value> = self.ports(|index| service.has_node_ports().then_some(index));
        let mut spec = json!({
            "type": "ClusterIP",
            "clusterIP": ips[0],
            "clusterIPs": ips,
            "ipFamilies": families.iter().map(|is_v4| family(*is_v4)).collect::<Vec<_>>(),
            "ipFamilyPolicy": if service.families == Families::Both {
                "PreferDualStack"
            } else {
                "SingleStack"
            },
            "ports": ports,
            "publishNotReadyAddresses": service.publish_not_ready,
        });
        let mut set = |field: &str, value: Value| spec[field] = value;
        match service.kind {
            Kind::ClusterIp => {}
            Kind::NodePort => set("type", "NodePort".into()),
            Kind::LoadBalancer => set("type", "LoadBalancer".into()),
            Kind::ExternalName => {
                return self.object(json!({ "type": "ExternalName", "externalName": "a.test" }));
            }
            Kind::Headless => {
                set("clusterIP", "None".into());
                set("clusterIPs", json!(["None"]));
            }
        }
        if service.external_local {
            set("externalTrafficPolicy", "Local".into());
            if service.kind == Kind::LoadBalancer {
                set("healthCheckNodePort", self.health_port().into());
            }
        }
        if service.internal_local {
            set("internalTrafficPolicy", "Local".into());
        }
        if service.external_ips {
            set(
                "externalIPs",
                json!([self.external_ip(true), self.external_ip(false)]),
            );
        }
        if service.affinity {
            set("sessionAffinity", "ClientIP".into());
            let timeout = json!({ "timeoutSeconds": service.timeout_secs });
            set("sessionAffinityConfig", json!({ "clientIP": timeout }));
        }
        let ranges = self.side.ranges(service.ranges);
        if service.ranges != Ranges::Everybody {
            set("loadBalancerSourceRanges", json!(ranges));
        }
        self.object(spec)
    }

    fn object(&self, spec: Value) -> Value {
        let mut labels = json!({});
        if self.service.is_others {
            labels["service.kubernetes.io/service-proxy-name"] = "another".into();
        }
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": self.name(), "namespace": "default", "labels": labels },
            "spec": spec,
        })
    }

    fn ports(&self, node_port: impl Fn(usize) -> Option<usize>) -> Vec<Value> {
        let ports = self.service.ports.iter().enumerate();
        let ports = ports.map(|(index, port)| {
            let mut object = json!({
                "name": format!("p{index}"),
                "port": port.number,
                "protocol": if port.is_tcp { "TCP" } else { "UDP" },
            });
            if let Some(index) = node_port(index) {
                object["nodePort"] = self.node_port(index).into();
            }
            object
        });
        ports.collect()
    }

    /// Its status, if a load balancer's controller would set one.
    pub fn status(&self) -> Option<(String, Value)> {
        let ips = [true, false].map(|is_v4| json!({ "ip": self.balancer_ip(is_v4) }));
        let status = json!({ "loadBalancer": { "ingress": ips } });
        (self.service.kind == Kind::LoadBalancer).then(|| (self.name(), status))
    }

    /// The EndpointSlices.
    pub fn slices(&self) -> Vec<Value> {
        [true, false].map(|is_v4| self.slice(is_v4)).into()
    }

    /// Their names, as `kubectl` wants them.
    pub fn slice_names(&self) -> [String; 2] {
        [true, false].map(|is_v4| format!("endpointslice/{}", self.slice_name(is_v4)))
    }

    fn slice_name(&self, is_v4: bool) -> String {
        format!("{}-{}", self.name(), family(is_v4).to_lowercase())
    }

    fn slice(&self, is_v4: bool) -> Value {
        let ports = self.service.ports.iter().enumerate().map(|(index, port)| {
            json!({
                "name": format!("p{index}"),
                "port": port.target,
                "protocol": if port.is_tcp { "TCP" } else { "UDP" },
            })
        });
        let endpoints = self.service.endpoints.iter().map(|(role, state)| {
            let host = self.side.host(*role);
            json!({
                "addresses": [if is_v4 { host.ip4 } else { host.ip6 }],
                "conditions": conditions(*state),
                "nodeName": self.side.node_of(*role),
            })
        });
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": self.slice_name(is_v4),
                "namespace": "default",
                "labels": { "kubernetes.io/service-name": self.name() },
            },
            "addressType": family(is_v4),
            "ports": ports.collect::<Vec<_>>(),
            "endpoints": endpoints.collect::<Vec<_>>(),
        })
    }
}

fn conditions(state: State) -> Value {
    let (ready, serving, terminating) = match state {
        State::Unsaid => return json!({}),
        State::Ready => (true, true, false),
        State::NotReady => (false, false, false),
        State::Leaving => (false, true, true),
        State::Gone => (false, false, true),
    };
    json!({ "ready": ready, "serving": serving, "terminating": terminating })
}

fn family(is_v4: bool) -> &'static str {
    if is_v4 { "IPv4" } else { "IPv6" }
}
