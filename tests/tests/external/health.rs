//! What load balancers ask a node about a service.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    time::Instant,
};

use anyhow::{Result, ensure};
use penstock_agent::{dataplane::pins::Pins, health::HEALTH_TIMEOUT};
use penstock_testbed::{
    Host, Pod, Service, Slice, eventually, freeze, list, patiently, require_kernel,
};
use serde_json::json;

use crate::stage::{BALANCER, Pods, Stage, ask, refusal};
use Served::{Both, Checks, Neither};

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

/// A service that load balancers ask about.
fn checked(web: Service) -> Service {
    web.set("externalTrafficPolicy", "Local")
        .set("healthCheckNodePort", 32_123)
}

#[test]
fn load_balancers_learn_whether_a_node_has_endpoints() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::new(Pods::Routed)?;
    let [here, there] = &stage.servers;
    let node = &stage.nodes[0].host;
    // A server for each family, and not both, is what a socket would be by itself.
    node.run("sysctl", &["-qw", "net.ipv6.bindv6only=1"])?;
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

/// Makes "web" with one pod that terminates and still serves.
fn leaving(stage: &Stage, pod: &Pod) -> Result<()> {
    let service = Service::new("web", 10)
        .port("tcp", 80, "TCP")
        .balanced(30_080, &BALANCER);
    let mut items = vec![checked(service).json()];
    for mut slice in Slice::both("web", 8080, &[pod]) {
        let conditions = json!({ "ready": false, "serving": true, "terminating": true });
        slice["endpoints"][0]["conditions"] = conditions;
        items.push(slice);
    }
    stage.nodes[0].manifest("web.json", &list(&items))
}

#[test]
fn a_node_whose_endpoints_only_terminate_serves_and_is_left_out() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::new(Pods::Routed)?;
    let [here, _] = &stage.servers;
    let node = &stage.nodes[0].host;
    let url = format!("http://{}:32123/healthz", node.ip4);
    stage.web(&[here], checked)?;
    eventually("the node is good", || {
        let (line, ..) = check(&stage.client, &url)?;
        ensure!(line.contains("200"), "{line}");
        Ok(())
    })?;
    leaving(&stage, here)?;
    eventually("the node is left out", || {
        let (line, weight, body) = check(&stage.client, &url)?;
        ensure!(line.contains("503") && weight == "0", "{line} {weight}");
        ensure!(body["localEndpoints"] == 0, "{body}");
        ensure!(body["serviceProxyHealthy"] == true, "{body}");
        Ok(())
    })?;
    let answer = ask(&stage.client, "tcp", (node.ip4, 30_080).into())?;
    assert_eq!(answer.server, here.host.name);
    Ok(())
}

#[test]
fn node_ports_and_health_checks_are_where_they_were_restricted_to() -> Result<()> {
    // By default the one are at the first addresses alone, and the other at all.
    are_at(&[], [Both, Checks])?;
    are_at(&["--nodeport-addresses", "all"], [Both, Both])?;
    let ranges = "172.31.0.0/24,fd00:31::/64";
    are_at(&["--nodeport-addresses", ranges], [Both, Neither])?;
    let ranges = "172.31.5.0/24,fd00:31:5::/64";
    are_at(&["--nodeport-addresses", ranges], [Neither, Both])
}

/// What is at an address.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Served {
    Both,
    Checks,
    Neither,
}

/// What is at a node's first addresses, and at its second ones.
fn are_at(options: &[&str], [first, second]: [Served; 2]) -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut stage = Stage::with(Pods::Routed, options)?;
    let node = stage.nodes[0].host.clone();
    let others: [IpAddr; 2] = ["172.31.5.11".parse()?, "fd00:31:5::11".parse()?];
    for (ip, via) in others.into_iter().zip([node.ip4, node.ip6]) {
        let (length, rest): (_, &[&str]) = match ip {
            IpAddr::V4(_) => (24, &[]),
            IpAddr::V6(_) => (64, &["nodad"]),
        };
        let address = format!("{ip}/{length}");
        let add = ["addr", "add", &address, "dev", "eth0"];
        node.run("ip", &[&add[..], rest].concat())?;
        let (to, via) = (ip.to_string(), via.to_string());
        let route = ["route", "add", &to, "via", &via];
        stage.client.run("ip", &route)?;
    }
    stage.web(&[&stage.servers[0]], checked)?;
    // One that has begun with these addresses needs no time to find them.
    stage.agents[0].kill();
    stage.agents[0].restart()?;
    let first = [node.ip4, node.ip6].map(|ip| (ip, first));
    let second = others.map(|ip| (ip, second));
    let all = || first.into_iter().chain(second);
    let client = &stage.client;
    let url = |ip| format!("http://{}/", SocketAddr::new(ip, 32_123));
    let ports = [("tcp", 30_080), ("udp-connected", 30_081)];
    // What answers does so before anything that is silent could be about to.
    for (ip, _) in all().filter(|(_, served)| *served != Neither) {
        eventually("the check answers", || check(client, &url(ip)))?;
    }
    for (ip, _) in all().filter(|(_, served)| *served == Both) {
        for (protocol, port) in ports {
            let answer = ask(client, protocol, SocketAddr::new(ip, port))?;
            assert_eq!(answer.server, stage.servers[0].host.name, "{ip}");
        }
    }
    for (ip, _) in all().filter(|(_, served)| *served == Neither) {
        assert!(check(client, &url(ip)).is_err(), "{options:?}: {ip}");
    }
    for (ip, _) in all().filter(|(_, served)| *served != Both) {
        for (protocol, port) in ports {
            let failure = refusal(client, protocol, SocketAddr::new(ip, port))?;
            assert_eq!(failure, "connection refused", "{options:?}: {ip}");
        }
    }
    Ok(())
}

#[test]
fn a_health_check_whose_port_is_taken_is_a_problem_until_it_is_free() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::new(Pods::Routed)?;
    let [here, _] = &stage.servers;
    let node = &stage.nodes[0].host;
    let owner = node.serve(32_123)?;
    stage.web(&[here], checked)?;
    let agent = &stage.agents[0];
    let problem = "Service default/web: serving health checks on port 32123: ";
    eventually("the port in use is a problem", || {
        let problems = agent.status()?["problems"].to_string();
        ensure!(problems.contains(problem), "{problems}");
        Ok(())
    })?;
    // Traffic does not depend on it.
    ask(&stage.client, "tcp", (node.ip4, 30_080).into())?;
    drop(owner);
    let url = format!("http://{}:32123/", node.ip4);
    eventually("the check answers", || {
        let (line, ..) = check(&stage.client, &url)?;
        ensure!(line.contains("200"), "{line}");
        Ok(())
    })?;
    eventually("the problem is over", || {
        ensure!(agent.status()?["problems"] == json!([]));
        Ok(())
    })
}

#[test]
fn a_node_whose_kernel_refuses_changes_for_a_minute_is_left_out() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::new(Pods::Routed)?;
    let [here, there] = &stage.servers;
    let (agent, node) = (&stage.agents[0], &stage.nodes[0].host);
    stage.web(&[here], checked)?;
    let urls = ["32123/", "10256/healthz", "10256/livez"];
    let urls = urls.map(|rest| format!("http://{}:{rest}", node.ip4));
    let say = |code: &str| -> Result<()> {
        for url in &urls {
            let (line, _, body) = check(&stage.client, url)?;
            ensure!(line.contains(code), "{url}: {line}, {body}");
        }
        Ok(())
    };
    eventually("the node is good", || say("200"))?;
    freeze(
        Pins::at(&stage.nodes[0].bpffs)
            .map("FRONTENDS4")?
            .fd()
            .as_fd(),
    )?;
    let began = Instant::now();
    let mut items = vec![Service::new("new", 12).port("tcp", 80, "TCP").json()];
    items.extend(Slice::both("new", 8080, &[here, there]));
    stage.nodes[0].manifest("new.json", &list(&items))?;
    eventually("the service can't be written", || {
        let errors = agent.status()?.to_string();
        ensure!(errors.contains("FRONTENDS4"), "{errors}");
        Ok(())
    })?;
    // Until then it may be a moment's trouble.
    loop {
        let said = say("200");
        if began.elapsed() >= HEALTH_TIMEOUT {
            break;
        }
        said?;
        std::thread::sleep(HEALTH_TIMEOUT / 60);
    }
    patiently("the node is left out", || say("503"))?;
    let (_, _, body) = check(&stage.client, &urls[0])?;
    assert_eq!(
        (&body["serviceProxyHealthy"], &body["localEndpoints"]),
        (&json!(false), &json!(1))
    );
    let problems = agent.status()?["problems"].to_string();
    ensure!(
        problems.contains("the kernel has refused changes"),
        "{problems}"
    );
    // What is served is served on.
    let answer = ask(&stage.client, "tcp", (node.ip4, 30_080).into())?;
    assert_eq!(answer.server, here.host.name);
    Ok(())
}
