//! Manifests of made-up clusters.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Services in a file.
const PER_FILE: usize = 250;

/// The address of service `number`: 10.96.0.0/12 from .1.0 on.
pub fn service_ip(number: usize) -> String {
    let host = number + 256;
    format!(
        "10.{}.{}.{}",
        96 + (host >> 16),
        (host >> 8) & 255,
        host & 255
    )
}

fn endpoint_ip(service: usize, endpoint: usize) -> String {
    let host = service * 64 + endpoint;
    format!(
        "10.{}.{}.{}",
        128 + (host >> 16) % 64,
        (host >> 8) & 255,
        host & 255
    )
}

/// Service `number`.
pub fn service(number: usize) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": format!("s{number}"), "namespace": "bench" },
        "spec": {
            "type": "ClusterIP",
            "clusterIP": service_ip(number),
            "ports": [{ "name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080 }],
        },
    })
}

/// The slice of service `number`; endpoint `unready` is not ready.
pub fn slice(number: usize, endpoints: usize, unready: Option<usize>) -> Value {
    let endpoints: Vec<Value> = (0..endpoints)
        .map(|endpoint| {
            json!({
                "addresses": [endpoint_ip(number, endpoint)],
                "conditions": { "ready": Some(endpoint) != unready, "serving": Some(endpoint) != unready, "terminating": false },
                "nodeName": format!("node{}", endpoint % 100),
                "zone": format!("zone-{}", endpoint % 3),
                "targetRef": { "kind": "Pod", "namespace": "bench", "name": format!("s{number}-{endpoint}") },
            })
        })
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("s{number}-x"), "namespace": "bench",
            "labels": { "kubernetes.io/service-name": format!("s{number}") },
        },
        "addressType": "IPv4",
        "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
        "endpoints": endpoints,
    })
}

/// Writes services from number 0 on, with as many endpoints each.
pub fn write(folder: &Path, services: usize, endpoints: usize) -> Result<()> {
    let numbers: Vec<usize> = (0..services).collect();
    for (file, numbers) in numbers.chunks(PER_FILE).enumerate() {
        let items: Vec<Value> = numbers
            .iter()
            .flat_map(|number| [service(*number), slice(*number, endpoints, None)])
            .collect();
        let path = folder.join(format!("bulk-{file:04}.json"));
        let text = json!({ "apiVersion": "v1", "kind": "List", "items": items }).to_string();
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}
