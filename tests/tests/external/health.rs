//! What load balancers ask a node about a service.

use anyhow::{Result, ensure};
use penstock_testbed::{Host, Service, eventually, require_kernel};
use serde_json::json;

use crate::stage::{Pods, Stage};

/// Status, the header with the weight, and the body.
fn check(from: &Host, at: &str) -> Result<(String, String, serde_json::Value)> {
    let arguments = ["--silent", "--include", "--max-time", "5", at];
    let text = from.run("curl", &arguments)?;
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let mut lines = head.lines();
    let code = lines.next().unwrap_or_default().to_owned();
    let weight = lines.find_map(|line| line.strip_prefix("x-load-balancing-endpoint-weight: "));
    let weight = weight.unwrap_or_default().to_owned();
    Ok((code, weight, serde_json::from_str(body)?))
}

#[test]
fn load_balancers_learn_whether_a_node_has_endpoints() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::new(Pods::Routed)?;
    let [here, there] = &stage.servers;
    let checked = |web: Service| {
        web.set("externalTrafficPolicy", "Local")
            .set("healthCheckNodePort", 32_123)
    };
    let node = &stage.nodes[0].host;
    let urls = [
        format!("http://{}:32123/healthz", node.ip4),
        format!("http://[{}]:32123/", node.ip6),
    ];
    let says = |code: &str, endpoints: usize| -> Result<()> {
        for url in &urls {
            eventually("the check says so", || {
                let (line, weight, body) = check(&stage.client, url)?;
                ensure!(line.contains(code), "{line}, {body}");
                ensure!(weight == endpoints.to_string(), "{weight}");
                let expected = json!({
                    "service": { "namespace": "default", "name": "web" },
                    "localEndpoints": endpoints,
                    "serviceProxyHealthy": true,
                });
                ensure!(body == expected, "{body}");
                Ok(())
            })?;
        }
        Ok(())
    };
    stage.web(&[here, there], checked)?;
    says("200", 1)?;
    stage.web(&[there], checked)?;
    says("503", 0)?;
    // A policy of Cluster asks no such question.
    stage.web(&[there], |web| web.set("healthCheckNodePort", 32_123))?;
    eventually("nobody answers any more", || {
        ensure!(check(&stage.client, &urls[0]).is_err(), "somebody answers");
        Ok(())
    })
}
