//! What both tell load balancers about a service with a Local policy.

use anyhow::{Context, Result, ensure};
use penstock_testbed::eventually;
use serde_json::Value;

use crate::{
    objects::Object,
    service::{Kind, Role, Service, State},
    side::Side,
    stage::Stage,
};

/// The code of the answer, and how many endpoints it speaks of.
fn check(object: &Object, is_v4: bool) -> Result<(String, u64)> {
    let node = &object.side.node.host;
    let ip = if is_v4 { node.ip4 } else { node.ip6 };
    let address = std::net::SocketAddr::new(ip, object.health_port());
    let url = format!("http://{address}/healthz");
    let arguments = [
        "--silent",
        "--max-time",
        "5",
        "--write-out",
        "\n%{http_code}",
        &url,
    ];
    let text = object.side.outside.run("curl", &arguments)?;
    let (body, code) = text.rsplit_once('\n').context("no answer")?;
    let body: Value = serde_json::from_str(body).with_context(|| text.clone())?;
    let name = body.pointer("/service/name").and_then(Value::as_str);
    ensure!(name == Some(&object.name()), "{body}");
    let count = body.get("localEndpoints").and_then(Value::as_u64);
    Ok((code.to_owned(), count.context("no count")?))
}

/// Compares them.
pub fn compare(stage: &Stage, services: &[Service]) -> Result<()> {
    let mut codes = std::collections::BTreeSet::new();
    let is_checked =
        |service: &&Service| service.kind == Kind::LoadBalancer && service.external_local;
    for service in services.iter().filter(is_checked) {
        // One check for both families counts a service's first.
        let is_v4 = service.families.has(true);
        let ask = |side: &Side| {
            let object = Object { service, side };
            eventually("a check answers", || check(&object, is_v4))
        };
        let [ours, theirs] = [ask(&stage.sides[0])?, ask(&stage.sides[1])?];
        assert_eq!(ours, theirs, "{}", service.text());
        let is_ready_here = |(role, state): &&(Role, State)| role.is_here() && state.is_ready();
        let ready = service.endpoints.iter().filter(is_ready_here).count();
        assert_eq!(ours.1, ready as u64, "{}", service.text());
        codes.insert(ours.0);
    }
    assert!(codes.contains("200") && codes.contains("503"), "{codes:?}");
    Ok(())
}
