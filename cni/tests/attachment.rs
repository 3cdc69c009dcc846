//! One container after the other: what ADD makes, DEL takes away and CHECK sees, and what is left
//! when something goes wrong in between. Needs root.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test fails by panicking, and its names are sentences"
)]

mod bed;

use std::{
    fs,
    net::{TcpListener, TcpStream, UdpSocket},
    path::Path,
    time::Duration,
};

use bed::{Bed, Mood, VERSIONS, check_result, inside, key, list, sh};
use penstock_cni::agent::{Answer, Request};
use serde_json::{Value, json};

#[test]
fn results_are_the_specifications_in_every_version() {
    let Some(mut bed) = Bed::new() else { return };
    for version in VERSIONS {
        let id = format!("c{}", version.replace('.', "-"));
        let netns = bed.container(&id);
        let dns = json!({"nameservers": ["10.96.0.10"], "search": ["svc.cluster.local"]});
        let add = bed
            .call("ADD", &id)
            .with("cniVersion", json!(version))
            .with("dns", dns.clone());
        let result = bed.run(&add).success();
        check_result(version, &result);
        assert_eq!(result["dns"], dns);
        let interfaces = result["interfaces"].as_array().unwrap();
        assert_eq!(interfaces.len(), 2);
        assert_eq!(interfaces[1]["name"], "eth0");
        assert_eq!(interfaces[1]["sandbox"], format!("/run/netns/{netns}"));
        assert_eq!(result["ips"][0]["interface"], 1);
        assert_eq!(result["ips"].as_array().unwrap().len(), 2);
        assert_eq!(interfaces[0].get("mtu").is_some(), version == "1.1.0");
        let del = bed.call("DEL", &id).with("cniVersion", json!(version));
        assert_eq!(bed.run(&del).success(), Value::Null);
    }
    bed.assert_clean();
}

#[test]
fn a_container_reaches_its_node_at_once_and_nothing_is_asked() {
    let Some(mut bed) = Bed::new() else { return };
    let netns = bed.container("a");
    let node = bed.node();
    for text in [
        "addr add 192.0.2.1/32 dev lo",
        "addr add 2001:db8::1/128 dev lo nodad",
    ] {
        let arguments: Vec<&str> = ["-n", &node].into_iter().chain(text.split(' ')).collect();
        sh("ip", &arguments);
    }
    let result = bed.add("a").success();
    let interface = result["interfaces"][0]["name"].as_str().unwrap();
    // At once: no address that anybody uses is tentative.
    let addresses = list("ip", &netns, &["addr", "show", "dev", "eth0"]);
    let infos = addresses[0]["addr_info"].as_array().unwrap();
    for info in infos.iter().filter(|info| info["scope"] == "global") {
        assert!(info.get("tentative").is_none(), "{info}");
    }
    assert_eq!(infos[0]["local"], "10.244.7.2");
    assert_eq!(infos[0]["prefixlen"], 32);
    assert!(
        infos
            .iter()
            .any(|info| info["local"] == "fd00:244:7::2" && info["prefixlen"] == 128)
    );
    assert_eq!(addresses[0]["mtu"], 1_450);
    for (from, to, target) in [
        (&netns, &node, "192.0.2.1:0"),
        (&netns, &node, "[2001:db8::1]:0"),
        (&node, &netns, "10.244.7.2:0"),
        (&node, &netns, "[fd00:244:7::2]:0"),
    ] {
        let listener = inside(to, || TcpListener::bind(target).unwrap());
        let address = listener.local_addr().unwrap();
        // Had anybody to be asked first, it would be a second at least.
        let limit = Duration::from_millis(500);
        inside(from, || {
            TcpStream::connect_timeout(&address, limit).unwrap()
        });
    }
    let host = &list("ip", &node, &["addr", "show", "dev", interface])[0];
    assert_eq!(host["ifalias"], "penstock:pods:default/pod-a");
    assert_eq!(
        host["addr_info"],
        json!([]),
        "the host end has no address of its own"
    );
    assert_eq!(host["mtu"], 1_450);
    // Permanent neighbours only, so nobody was asked for anything.
    for (namespace, dev, count) in [(&node, interface, 2), (&netns, "eth0", 2)] {
        let neighbours = list("ip", namespace, &["neigh", "show", "dev", dev]);
        assert_eq!(neighbours.len(), count, "{neighbours:?}");
        for neighbour in neighbours {
            assert_eq!(neighbour["state"], json!(["PERMANENT"]), "{neighbour}");
        }
    }
    let request = Request::Wire {
        network: "pods".to_owned(),
        attachment: key("a"),
        netns: Some(Path::new("/run/netns").join(&netns)),
    };
    assert_eq!(bed.agent().heard(), [request]);
    bed.check("a", &result).success();
    bed.del("a").success();
    assert!(bed.links().is_empty());
}

#[test]
fn add_again_changes_nothing_and_del_again_succeeds() {
    let Some(mut bed) = Bed::new() else { return };
    let netns = bed.container("a");
    let first = bed.add("a").success();
    let index = list("ip", &netns, &["link", "show", "dev", "eth0"])[0]["ifindex"].clone();
    assert_eq!(bed.add("a").success(), first);
    assert_eq!(
        list("ip", &netns, &["link", "show", "dev", "eth0"])[0]["ifindex"],
        index
    );
    // What was damaged is made anew, with the same addresses.
    sh("ip", &["-n", &netns, "route", "del", "default"]);
    bed.check("a", &first).fails(102, "default route");
    assert_eq!(bed.add("a").success(), first);
    bed.check("a", &first).success();
    // So is what is in another namespace.
    bed.end(&netns);
    bed.container("a");
    assert_eq!(bed.add("a").success(), first);
    for _ in 0..3 {
        bed.del("a").success();
    }
    bed.assert_clean();
    // And of containers that never were, of networks that never were.
    bed.del("b").success();
    bed.run(&bed.call("DEL", "b").with("name", json!("other")))
        .success();
    let nowhere = bed
        .call("DEL", "b")
        .with("stateDir", json!("/nonexistent/dir"));
    bed.run(&nowhere.variable("CNI_NETNS", "")).success();
}

#[test]
fn del_needs_neither_namespace_nor_agent() {
    let Some(mut bed) = Bed::new() else { return };
    let netns = bed.container("a");
    bed.add("a").success();
    bed.agent = None;
    fs::remove_dir_all(bed.run_dir()).unwrap();
    bed.end(&netns);
    bed.del("a").success();
    bed.assert_clean();
    // An unmounted namespace leaves a file.
    let rest = bed.state_dir().join("pods.new");
    fs::write(&rest, "").unwrap();
    let path = rest.to_str().unwrap();
    bed.run(&bed.call("DEL", "a").variable("CNI_NETNS", path))
        .success();
    bed.run(&bed.call("ADD", "a").variable("CNI_NETNS", path))
        .fails(11, "network.json");
}

#[test]
fn a_namespace_that_is_gone_is_an_unknown_container() {
    let Some(bed) = Bed::new() else { return };
    bed.add("a").fails(3, "is gone");
    let host = bed
        .call("ADD", "a")
        .variable("CNI_NETNS", &format!("/run/netns/{}", bed.node()));
    bed.run(&host).fails(4, "namespace of the host");
    assert!(bed.state().attachments.is_empty());
}

#[test]
fn a_link_that_was_renamed_is_removed_from_inside() {
    let Some(mut bed) = Bed::new() else { return };
    bed.container("a");
    let result = bed.add("a").success();
    let interface = result["interfaces"][0]["name"].as_str().unwrap();
    let node = bed.node();
    sh("ip", &["-n", &node, "link", "set", interface, "down"]);
    sh(
        "ip",
        &["-n", &node, "link", "set", interface, "name", "renamed"],
    );
    bed.check("a", &result).fails(102, interface);
    bed.del("a").success();
    bed.assert_clean();
}

#[test]
fn check_sees_what_changed() {
    let Some(mut bed) = Bed::new() else { return };
    let netns = bed.container("a");
    let result = bed.add("a").success();
    let interface = result["interfaces"][0]["name"].as_str().unwrap().to_owned();
    let node = bed.node();
    let mut other = result.clone();
    other["ips"][0]["address"] = json!("10.244.7.99/32");
    bed.check("a", &other).fails(102, "prevResult.ips");
    other = result.clone();
    other["interfaces"][0]["mac"] = json!("02:00:00:00:00:00");
    bed.check("a", &other).fails(102, "prevResult.interfaces");
    other = result.clone();
    other["interfaces"][1]["mac"] = json!("02:00:00:00:00:00");
    bed.check("a", &other)
        .fails(102, "another Ethernet address");
    other["interfaces"][1]["mac"] = json!("none");
    bed.check("a", &other).fails(102, "prevResult.interfaces");
    bed.run(&bed.call("CHECK", "a")).fails(7, "prevResult");
    bed.check("b", &result).fails(102, "does not know");
    type Damage<'a> = (&'a str, &'a [&'a str], &'a str);
    let damages: [Damage; 6] = [
        (
            &netns,
            &["addr", "del", "10.244.7.2/32", "dev", "eth0"],
            "the address 10.244.7.2",
        ),
        (
            &netns,
            &["-6", "route", "del", "default"],
            "default route through fe80::1",
        ),
        (
            &netns,
            &["neigh", "del", "169.254.1.1", "dev", "eth0"],
            "neighbour 169.254.1.1",
        ),
        (
            &node,
            &["neigh", "del", "10.244.7.2", "dev", &interface],
            "neighbour 10.244.7.2",
        ),
        (
            &node,
            &["route", "del", "10.244.7.2/32"],
            "does not route 10.244.7.2",
        ),
        (&netns, &["link", "set", "eth0", "down"], "eth0 is down"),
    ];
    for (namespace, damage, words) in damages {
        bed.check("a", &result).success();
        sh("ip", &[&["-n", namespace], damage].concat());
        bed.check("a", &result).fails(102, words);
        assert_eq!(bed.add("a").success(), result, "it is repaired");
    }
    bed.del("a").success();
    bed.check("a", &result).fails(102, "does not know");
}

#[test]
fn check_takes_the_ethernet_address_that_a_later_plugin_gave() {
    let Some(mut bed) = Bed::new() else { return };
    let netns = bed.container("a");
    let mut result = bed.add("a").success();
    let interface = result["interfaces"][0]["name"].as_str().unwrap().to_owned();
    let host_mac = result["interfaces"][0]["mac"].as_str().unwrap().to_owned();
    let node = bed.node();
    const MAC: &str = "02:11:22:33:44:55";
    sh("ip", &["-n", &netns, "link", "set", "eth0", "address", MAC]);
    result["interfaces"][1]["mac"] = json!(MAC);
    bed.check("a", &result).fails(102, "neighbour");
    // What the agent does.
    let gateways = [(&netns, "eth0", host_mac.as_str())];
    let gateways = gateways.map(|(at, link, mac)| (at, link, mac, ["169.254.1.1", "fe80::1"]));
    let ips = [0, 1].map(|index: usize| {
        let address = result["ips"][index]["address"].as_str().unwrap();
        address.split('/').next().unwrap().to_owned()
    });
    let pods = [(
        &node,
        interface.as_str(),
        MAC,
        [ips[0].as_str(), ips[1].as_str()],
    )];
    for (at, link, mac, whom) in gateways.into_iter().chain(pods) {
        for ip in whom {
            let neighbour = ["neigh", "replace", ip, "lladdr", mac, "dev", link];
            sh("ip", &[&["-n", at], &neighbour[..]].concat());
        }
    }
    bed.check("a", &result).success();
    bed.del("a").success();
    bed.assert_clean();
}

#[test]
fn without_an_agent_it_is_to_be_tried_again_and_nothing_stays() {
    let Some(mut bed) = Bed::new() else { return };
    bed.container("a");
    let status = bed.call("STATUS", "a");
    bed.run(&status).success();
    let says = |text: &str| text.to_owned();
    for (mood, code, words) in [
        (
            Mood::Says(Answer::NotYet(says("loading maps"))),
            11,
            "loading maps",
        ),
        (
            Mood::Says(Answer::Failed(says("map full"))),
            104,
            "map full",
        ),
        (Mood::Babbles("what?\n"), 6, "different releases"),
        (Mood::Babbles("{\"notYet"), 11, "closed without an answer"),
        (Mood::HangsUp, 11, "closed without an answer"),
        (Mood::IsSilent, 11, "did not answer within 10 s"),
    ] {
        bed.agent().set(mood.clone());
        bed.add("a").fails(code, words);
        bed.assert_clean();
        bed.run(&status).fails(50, words);
    }
    bed.agent = None;
    bed.add("a").fails(11, "agent.sock");
    bed.run(&status).fails(50, "agent.sock");
    bed.assert_clean();
    fs::write(bed.run_dir().join("network.json"), "{").unwrap();
    bed.add("a").fails(6, "network.json");
    bed.run(&status).fails(50, "network.json");
    fs::remove_file(bed.run_dir().join("network.json")).unwrap();
    bed.add("a").fails(11, "network.json");
    bed.run(&status).fails(50, "network.json");
}

#[test]
fn a_node_may_have_one_family_and_containers_none_by_default() {
    for (range, ip) in [
        ("fd00:244:7::/64", "fd00:244:7::2/128"),
        ("10.244.7.0/24", "10.244.7.2/32"),
    ] {
        let Some(mut bed) = Bed::with(&[range]) else {
            return;
        };
        let netns = bed.container("a");
        let off = "net.ipv6.conf.default.disable_ipv6=1";
        sh("ip", &["netns", "exec", &netns, "sysctl", "-qw", off]);
        let result = bed.add("a").success();
        check_result("1.1.0", &result);
        let ips = result["ips"].as_array().unwrap();
        assert_eq!((ips.len(), &ips[0]["address"]), (1, &json!(ip)));
        bed.check("a", &result).success();
        bed.del("a").success();
        bed.assert_clean();
    }
}

#[test]
fn a_second_default_route_is_refused_and_nothing_of_it_stays() {
    let Some(mut bed) = Bed::new() else { return };
    let netns = bed.container("a");
    let result = bed.add("a").success();
    bed.run(&bed.call("ADD", "a").variable("CNI_IFNAME", "net1"))
        .fails(101, "default route");
    assert_eq!(bed.links().len(), 1);
    assert_eq!(bed.state().attachments.len(), 1);
    assert_eq!(list("ip", &netns, &["link"]).len(), 2);
    bed.check("a", &result).success();
}

#[test]
fn an_existing_interface_is_not_touched() {
    let Some(mut bed) = Bed::new() else { return };
    let netns = bed.container("a");
    sh(
        "ip",
        &[
            "-n", &netns, "link", "add", "eth0", "type", "veth", "peer", "name", "other",
        ],
    );
    bed.add("a").fails(101, "eth0");
    bed.assert_clean();
    bed.del("a").success();
    assert_eq!(
        list("ip", &netns, &["link", "show", "dev", "eth0"]).len(),
        1
    );
}

#[test]
fn addresses_run_out_and_rest() {
    let Some(mut bed) = Bed::with(&["10.244.7.0/30"]) else {
        return;
    };
    for id in ["a", "b"] {
        bed.container(id);
    }
    bed.add("a").success();
    bed.add("b").fails(100, "10.244.7.0/30");
    bed.del("a").success();
    bed.add("b").fails(11, "10 s");
    // As if it had been long ago.
    let mut state = bed.state();
    state.released[0].at_ms -= 10_000;
    fs::write(bed.state_path(), serde_json::to_vec(&state).unwrap()).unwrap();
    bed.add("b").success();
    let ask = bed.call("ADD", "a").variable("CNI_ARGS", "IP=10.244.8.3");
    bed.run(&ask).fails(103, "10.244.8.3");
}

#[test]
fn what_the_runtime_wants_is_in_the_state() {
    let Some(mut bed) = Bed::new() else { return };
    let netns = bed.container("a");
    let runtime = json!({
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"}],
        "bandwidth": {"ingressRate": 80_000_000, "ingressBurst": 8_000_000,
                      "egressRate": 40_000_000, "egressBurst": 4_000_000},
        "ips": ["fd00:244:7::77/64"],
    });
    let add = bed
        .call("ADD", "a")
        .with("runtimeConfig", runtime)
        .with("mtu", json!(1_400));
    let add = add.variable(
        "CNI_ARGS",
        "IP=10.244.7.77;K8S_POD_NAMESPACE=x;K8S_POD_NAME=y;K8S_POD_UID=u",
    );
    let result = bed.run(&add).success();
    assert_eq!(result["interfaces"][1]["mtu"], 1_400);
    let state = bed.state();
    let attachment = state.attachment(&key("a")).unwrap();
    assert_eq!(attachment.ips[0].to_string(), "10.244.7.77");
    assert_eq!(attachment.ips[1].to_string(), "fd00:244:7::77");
    assert_eq!(attachment.host_ports[0].host_port, 8_080);
    assert_eq!(attachment.pod.as_ref().unwrap().uid.as_deref(), Some("u"));
    let interface = &attachment.interface;
    for (namespace, dev, rate, burst) in [
        (&bed.node(), interface.as_str(), 10_000_000, 1_000_000),
        (&netns, "eth0", 5_000_000, 500_000),
    ] {
        let qdiscs = list("tc", namespace, &["qdisc", "show", "dev", dev]);
        let tbf = qdiscs
            .iter()
            .find(|qdisc| qdisc["kind"] == "tbf")
            .expect("a tbf");
        assert_eq!(tbf["options"]["rate"], rate, "{tbf}");
        // Like "1000000b/1"; kept as a time, hence not to the byte.
        let text = tbf["options"]["burst"].as_str().unwrap();
        let got: u32 = text.split('b').next().unwrap().parse().unwrap();
        assert!(got.abs_diff(burst) < 100, "{tbf}");
    }
    bed.check("a", &result).success();
    sh("tc", &["-n", &netns, "qdisc", "del", "dev", "eth0", "root"]);
    bed.check("a", &result).fails(102, "eth0 is not limited");
    let small = json!({"bandwidth": {"ingressRate": 8_000, "ingressBurst": 8_000}});
    bed.run(&bed.call("ADD", "a").with("runtimeConfig", small))
        .fails(7, "ingressBurst");
    bed.del("a").success();
    bed.assert_clean();
}

#[test]
fn a_rate_is_kept() {
    let Some(mut bed) = Bed::new() else { return };
    let netns = bed.container("a");
    let node = bed.node();
    sh(
        "ip",
        &["-n", &node, "addr", "add", "192.0.2.1/32", "dev", "lo"],
    );
    // 20 packets of 1,000 bytes at once through a bucket of 2,000: two, and as many as are let
    // wait for 25 ms, which are none at 10,000 bytes per second, or one for a bucket's worth.
    let runtime = json!({"bandwidth": {"egressRate": 80_000, "egressBurst": 16_000}});
    bed.run(&bed.call("ADD", "a").with("runtimeConfig", runtime))
        .success();
    let server = inside(&node, || UdpSocket::bind("192.0.2.1:0").unwrap());
    let address = server.local_addr().unwrap();
    let client = inside(&netns, || UdpSocket::bind("10.244.7.2:0").unwrap());
    for _ in 0..20 {
        // A full queue may be told.
        let _ = client.send_to(&[0; 958], address);
    }
    server
        .set_read_timeout(Some(Duration::from_millis(700)))
        .unwrap();
    let mut received = 0;
    while server.recv(&mut [0; 1_500]).is_ok() {
        received += 1;
    }
    assert!((2..=6).contains(&received), "{received}");
}

#[test]
fn a_spoilt_state_is_never_replaced() {
    let Some(mut bed) = Bed::new() else { return };
    bed.container("a");
    let result = bed.add("a").success();
    fs::write(bed.state_path(), "{\"version\": 1").unwrap();
    for said in [bed.add("a"), bed.del("a"), bed.check("a", &result)] {
        said.fails(6, "put a copy back");
    }
    let gc = bed
        .call("GC", "")
        .with("cni.dev/valid-attachments", json!([]));
    bed.run(&gc).fails(6, "put a copy back");
    bed.run(&bed.call("STATUS", ""))
        .fails(50, "put a copy back");
    assert_eq!(
        fs::read_to_string(bed.state_path()).unwrap(),
        "{\"version\": 1"
    );
}
