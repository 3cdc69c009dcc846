//! CHECK, with a real agent: what connects a pod is in the kernel, or it is said what is not.

use anyhow::{Context, Result};
use aya::maps::{HashMap, Map};
use penstock_agent::dataplane::pins::Pins;
use penstock_common::{Be16, Endpoint, Frontend, FrontendKey, Proto, V4};
use penstock_testbed::{PluginError, eventually, require_kernel};
use serde_json::json;

use crate::net::Net;

#[test]
fn check_finds_what_the_kernel_has_lost() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut net = Net::new(&[])?;
    let ports = json!([{ "hostPort": 9001, "containerPort": 8080, "protocol": "tcp" }]);
    let (container, pod, result) = net.container(0, json!({ "portMappings": ports }))?;
    let interface = result["interfaces"][0]["name"]
        .as_str()
        .context("no interface")?;
    let node = net.nodes[0].host.clone();
    let plugin = net.nodes[0].plugin()?;
    let check = || plugin.check(&container, &result);
    let fails = |code: u64, words: &str| -> Result<()> {
        let error = check().err().context("it is as it was")?;
        let error = error.downcast::<PluginError>()?;
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains(words), "{error}");
        Ok(())
    };
    check()?;
    // Both hooks.
    node.run("tc", &["qdisc", "del", "dev", interface, "clsact"])?;
    fails(102, "from_pod")?;
    eventually("the agent has put them back", check)?;
    node.run("tc", &["filter", "del", "dev", interface, "egress"])?;
    fails(102, "to_pod")?;
    eventually("the agent has put it back", check)?;
    // What the agent takes for written it writes again once it is started again.
    let mut agents = std::mem::take(&mut net.agents);
    let pins = Pins::at(&net.nodes[0].bpffs);
    let key = V4::from(match pod.ip4 {
        std::net::IpAddr::V4(ip) => ip,
        std::net::IpAddr::V6(ip) => anyhow::bail!("{ip}"),
    });
    let mut endpoints: HashMap<_, V4, Endpoint> =
        Map::HashMap(pins.map("ENDPOINTS4")?).try_into()?;
    let endpoint = endpoints.get(&key, 0)?;
    let elsewhere = Endpoint {
        ifindex: endpoint.ifindex + 1,
        ..endpoint
    };
    endpoints.insert(key, elsewhere, 0)?;
    fails(102, "another interface")?;
    let forged = Endpoint {
        mac: [2, 0, 0, 0, 0, 1],
        ..endpoint
    };
    endpoints.insert(key, forged, 0)?;
    fails(102, "other Ethernet addresses")?;
    endpoints.remove(&key)?;
    fails(102, "has nothing of")?;
    agents[0].kill();
    fails(11, "agent.sock")?;
    agents[0].restart()?;
    eventually("the new agent has written it", check)?;
    let frontend = FrontendKey::new(
        V4::from(match node.ip4 {
            std::net::IpAddr::V4(ip) => ip,
            std::net::IpAddr::V6(ip) => anyhow::bail!("{ip}"),
        }),
        Be16::from_host(9001),
        Proto::TCP,
    );
    let mut frontends: HashMap<_, FrontendKey<V4>, Frontend> =
        Map::HashMap(pins.map("FRONTENDS4")?).try_into()?;
    frontends.remove(&frontend)?;
    fails(102, "from port 9001")?;
    net.agents = agents;
    plugin.del(&container)?;
    fails(102, "does not know")
}
