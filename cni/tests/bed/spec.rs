//! What SPEC.md says about the shape of results and errors, each version's own.

use std::net::IpAddr;

use serde_json::{Map, Value};

pub const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

#[track_caller]
fn object(value: &Value) -> &Map<String, Value> {
    value
        .as_object()
        .unwrap_or_else(|| panic!("no object: {value}"))
}

#[track_caller]
fn only(value: &Value, required: &[&str], optional: &[&str]) {
    let object = object(value);
    for key in required {
        assert!(object.contains_key(*key), "{key} is missing: {value}");
    }
    for key in object.keys() {
        let is_known = required.contains(&key.as_str()) || optional.contains(&key.as_str());
        assert!(is_known, "{key} is not in the specification: {value}");
    }
}

#[track_caller]
fn text(value: &Value) -> &str {
    value
        .as_str()
        .unwrap_or_else(|| panic!("no string: {value}"))
}

#[track_caller]
fn cidr(value: &Value) -> IpAddr {
    let (ip, prefix) = text(value).split_once('/').unwrap();
    let ip: IpAddr = ip.parse().unwrap();
    let prefix: u8 = prefix.parse().unwrap();
    assert!(prefix <= if ip.is_ipv4() { 32 } else { 128 });
    ip
}

#[track_caller]
fn mac(value: &Value) {
    let parts: Vec<&str> = text(value).split(':').collect();
    assert_eq!(parts.len(), 6, "{value}");
    for part in parts {
        assert!(
            part.len() == 2 && u8::from_str_radix(part, 16).is_ok(),
            "{value}"
        );
    }
}

/// Asserts that a result is one of `version`.
#[track_caller]
pub fn check_result(version: &str, result: &Value) {
    only(
        result,
        &["cniVersion", "interfaces", "ips"],
        &["routes", "dns"],
    );
    assert_eq!(result["cniVersion"], version);
    let is_latest = version == "1.1.0";
    let has_family = version.starts_with("0.");
    let interfaces = result["interfaces"].as_array().unwrap();
    for interface in interfaces {
        let optional: &[&str] = if is_latest {
            &["mac", "sandbox", "mtu", "socketPath", "pciID"]
        } else {
            &["mac", "sandbox"]
        };
        only(interface, &["name"], optional);
        assert!(!text(&interface["name"]).is_empty());
        if let Some(value) = interface.get("mac") {
            mac(value);
        }
        if let Some(value) = interface.get("sandbox") {
            text(value);
        }
        if let Some(value) = interface.get("mtu") {
            assert!(value.is_u64());
        }
    }
    for ip in result["ips"].as_array().unwrap() {
        let (required, optional): (&[&str], &[&str]) = if has_family {
            (&["version", "address"], &["gateway", "interface"])
        } else {
            (&["address"], &["gateway", "interface"])
        };
        only(ip, required, optional);
        let address = cidr(&ip["address"]);
        if has_family {
            assert_eq!(ip["version"], if address.is_ipv4() { "4" } else { "6" });
        }
        if let Some(gateway) = ip.get("gateway") {
            let gateway: IpAddr = text(gateway).parse().unwrap();
            assert_eq!(gateway.is_ipv4(), address.is_ipv4());
        }
        if let Some(index) = ip.get("interface") {
            let index = index.as_u64().unwrap() as usize;
            assert!(index < interfaces.len(), "{ip} of {}", interfaces.len());
        }
    }
    for route in result
        .get("routes")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        let optional: &[&str] = if is_latest {
            &["gw", "mtu", "advmss", "priority", "table", "scope"]
        } else {
            &["gw"]
        };
        only(route, &["dst"], optional);
        let destination = cidr(&route["dst"]);
        if let Some(gateway) = route.get("gw") {
            let gateway: IpAddr = text(gateway).parse().unwrap();
            assert_eq!(gateway.is_ipv4(), destination.is_ipv4());
        }
    }
    if let Some(dns) = result.get("dns") {
        only(dns, &[], &["nameservers", "domain", "search", "options"]);
    }
}

/// Asserts that a value is an error.
#[track_caller]
pub fn check_error(error: &Value) {
    only(error, &["cniVersion", "code", "msg"], &["details"]);
    assert!(VERSIONS.contains(&text(&error["cniVersion"])));
    assert!(
        error["code"].as_u64().is_some_and(|code| code > 0),
        "{error}"
    );
    assert!(!text(&error["msg"]).is_empty());
    assert!(!text(&error["details"]).is_empty());
}
