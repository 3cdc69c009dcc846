//! Objects as they are written, with the fields that Penstock reads and no others.

use std::collections::HashMap;

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::unique;

/// Takes an explicit `null` for an absent field.
fn nullable<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Any object. Fields of kinds that are not ours are not looked into.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(super) struct Raw {
    #[serde(default)]
    pub(super) api_version: Option<String>,
    #[serde(default)]
    pub(super) kind: Option<String>,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) metadata: Metadata,
    #[serde(default, deserialize_with = "unique::value")]
    pub(super) spec: Option<Value>,
    #[serde(default, deserialize_with = "unique::value")]
    pub(super) status: Option<Value>,
    #[serde(default)]
    pub(super) items: Option<Vec<Raw>>,
    // EndpointSlice has these at its top.
    #[serde(default)]
    pub(super) address_type: Option<String>,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) endpoints: Vec<Endpoint>,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) ports: Vec<EndpointPort>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(super) struct Metadata {
    #[serde(default)]
    pub(super) name: Option<String>,
    #[serde(default)]
    pub(super) namespace: Option<String>,
    #[serde(default)]
    pub(super) uid: Option<String>,
    #[serde(default)]
    pub(super) creation_timestamp: Option<String>,
    #[serde(default)]
    pub(super) deletion_timestamp: Option<String>,
    #[serde(default, deserialize_with = "unique::texts")]
    pub(super) labels: HashMap<String, String>,
    /// Those that Penstock knows.
    #[serde(default, deserialize_with = "unique::known_texts")]
    pub(super) annotations: HashMap<String, String>,
}

impl Metadata {
    pub(super) fn label(&self, name: &str) -> Option<&str> {
        self.labels.get(name).map(String::as_str)
    }

    pub(super) fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.get(name).map(String::as_str)
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an endpoint")]
pub(super) struct Endpoint {
    #[serde(default, deserialize_with = "nullable")]
    pub(super) addresses: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) conditions: Conditions,
    #[serde(default)]
    pub(super) node_name: Option<String>,
    #[serde(default)]
    pub(super) hints: Option<Hints>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(expecting = "conditions")]
pub(super) struct Conditions {
    #[serde(default)]
    pub(super) ready: Option<bool>,
    #[serde(default)]
    pub(super) serving: Option<bool>,
    #[serde(default)]
    pub(super) terminating: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "hints")]
pub(super) struct Hints {
    #[serde(default, deserialize_with = "nullable")]
    pub(super) for_zones: Vec<Hint>,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) for_nodes: Vec<Hint>,
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "a hint")]
pub(super) struct Hint {
    pub(super) name: String,
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "a port")]
pub(super) struct EndpointPort {
    #[serde(default)]
    pub(super) name: Option<String>,
    #[serde(default)]
    pub(super) protocol: Option<String>,
    #[serde(default)]
    pub(super) port: Option<i64>,
}

/// A Service's `spec`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "a Service's spec")]
pub(super) struct ServiceSpec {
    #[serde(rename = "type", default)]
    pub(super) kind: Option<String>,
    #[serde(rename = "clusterIP", default)]
    pub(super) cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs", default, deserialize_with = "nullable")]
    pub(super) cluster_ips: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) ports: Vec<ServicePort>,
    #[serde(default)]
    pub(super) session_affinity: Option<String>,
    #[serde(default)]
    pub(super) session_affinity_config: Option<SessionAffinityConfig>,
    #[serde(default)]
    pub(super) internal_traffic_policy: Option<String>,
    #[serde(default)]
    pub(super) external_traffic_policy: Option<String>,
    #[serde(rename = "externalIPs", default, deserialize_with = "nullable")]
    pub(super) external_ips: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) load_balancer_source_ranges: Vec<String>,
    #[serde(default)]
    pub(super) health_check_node_port: Option<i64>,
}

/// A Service's `status`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServiceStatus {
    #[serde(default, deserialize_with = "nullable")]
    pub(super) load_balancer: LoadBalancer,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct LoadBalancer {
    #[serde(default, deserialize_with = "nullable")]
    pub(super) ingress: Vec<Ingress>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Ingress {
    #[serde(default)]
    pub(super) ip: Option<String>,
    #[serde(default)]
    pub(super) ip_mode: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "a port")]
pub(super) struct ServicePort {
    #[serde(default)]
    pub(super) name: Option<String>,
    #[serde(default)]
    pub(super) protocol: Option<String>,
    pub(super) port: i64,
    #[serde(default)]
    pub(super) node_port: Option<i64>,
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "a configuration")]
pub(super) struct SessionAffinityConfig {
    #[serde(rename = "clientIP", default)]
    pub(super) client_ip: Option<ClientIpConfig>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "a configuration")]
pub(super) struct ClientIpConfig {
    #[serde(default)]
    pub(super) timeout_seconds: Option<i64>,
}
