//! The result of ADD, in the version that was asked for: what plugins before this one made, then
//! what it made itself.

use std::path::Path;

use cni_plugin::{
    macaddr::MacAddr,
    reply::{Dns, Interface, Ip, Route},
};
use ipnetwork_of_cni_plugin::IpNetwork;
use macaddr::MacAddr6;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::{
    error::Failure,
    link::gateway,
    previous::{Previous, say_family},
    state::{Attachment, Mac},
    version::Version,
};

/// What ADD made.
#[derive(Clone, Copy, Debug)]
pub struct Made<'a> {
    /// As the state has it.
    pub attachment: &'a Attachment,
    /// Where the container is.
    pub netns: &'a Path,
    /// What both ends carry at most.
    pub mtu: u32,
}

fn to_value(part: impl Serialize) -> Result<Value, Failure> {
    serde_json::to_value(part).map_err(|error| Failure::Internal(error.to_string()))
}

fn network(ip: std::net::IpAddr, prefix: u8) -> Result<IpNetwork, Failure> {
    IpNetwork::new(ip, prefix).map_err(|error| Failure::Internal(error.to_string()))
}

/// An end of the link.
fn interface(
    name: &str,
    mac: Mac,
    sandbox: &Path,
    mtu: u32,
    version: Version,
) -> Result<Value, Failure> {
    let mut value = to_value(Interface {
        name: name.to_owned(),
        mac: Some(MacAddr(MacAddr6::from(mac.0))),
        sandbox: sandbox.to_owned(),
    })?;
    if let Some(object) = value.as_object_mut() {
        // As everybody else writes it, and as this plugin's own state has it.
        object.insert("mac".to_owned(), mac.to_string().into());
        if version >= Version::V1_1_0 {
            object.insert("mtu".to_owned(), mtu.into());
        }
    }
    Ok(value)
}

/// An address, and the default route of its family.
fn address(
    ip: std::net::IpAddr,
    interface: usize,
    version: Version,
) -> Result<(Value, Value), Failure> {
    let gateway = gateway(ip);
    let mut address = to_value(Ip {
        address: network(ip, if ip.is_ipv4() { 32 } else { 128 })?,
        gateway: Some(gateway),
        interface: Some(interface),
    })?;
    if let Some(object) = address.as_object_mut() {
        say_family(object, version);
    }
    let route = to_value(Route {
        dst: network(crate::link::unspecified(ip), 0)?,
        gw: Some(gateway),
    })?;
    Ok((address, route))
}

/// The result.
pub fn build(
    version: Version,
    previous: Option<Previous>,
    dns: Option<&Value>,
    made: &Made,
) -> Result<Value, Failure> {
    let mut result = previous.map_or_else(Map::new, |previous| previous.into_object(version));
    let mut interfaces = take_list(&mut result, "interfaces");
    let mut ips = take_list(&mut result, "ips");
    let mut routes = take_list(&mut result, "routes");
    let Made {
        attachment,
        netns,
        mtu,
    } = *made;
    interfaces.push(interface(
        &attachment.interface,
        attachment.host_mac,
        Path::new(""),
        mtu,
        version,
    )?);
    // An index, so that it counts what other plugins made.
    let own = interfaces.len();
    interfaces.push(interface(
        &attachment.key.ifname,
        attachment.mac,
        netns,
        mtu,
        version,
    )?);
    for ip in &attachment.ips {
        let (ip, route) = address(*ip, own, version)?;
        ips.push(ip);
        routes.push(route);
    }
    let says_nothing = |value: &Value| value.as_object().is_none_or(Map::is_empty);
    if result.get("dns").is_none_or(says_nothing) {
        let dns = dns.cloned().map_or_else(|| to_value(Dns::default()), Ok)?;
        result.insert("dns".to_owned(), dns);
    }
    result.insert("cniVersion".to_owned(), json!(version.as_str()));
    result.insert("interfaces".to_owned(), interfaces.into());
    result.insert("ips".to_owned(), ips.into());
    result.insert("routes".to_owned(), routes.into());
    Ok(result.into())
}

fn take_list(result: &mut Map<String, Value>, key: &str) -> Vec<Value> {
    match result.remove(key) {
        Some(Value::Array(list)) => list,
        _ => Vec::new(),
    }
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]
mod tests {
    use super::*;
    use crate::state::AttachmentKey;

    fn built(version: Version, config: &Value) -> Value {
        let attachment = Attachment {
            key: AttachmentKey {
                container: "abc".to_owned(),
                ifname: "eth0".to_owned(),
            },
            interface: "pn0123456789abc".to_owned(),
            mac: Mac([2, 0, 0, 0, 0, 0xab]),
            host_mac: Mac([2, 0, 0, 0, 0, 1]),
            ips: vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            pod: None,
            host_ports: Vec::new(),
            bandwidth: None,
        };
        let made = Made {
            attachment: &attachment,
            netns: Path::new("/run/netns/abc"),
            mtu: 1_450,
        };
        let previous = Previous::parse(config).unwrap();
        build(version, previous, config.get("dns"), &made).unwrap()
    }

    #[test]
    fn each_version_has_its_own_fields() {
        let latest = built(Version::V1_1_0, &json!({}));
        assert_eq!(
            latest,
            json!({
                "cniVersion": "1.1.0",
                "interfaces": [
                    {"name": "pn0123456789abc", "mac": "02:00:00:00:00:01", "sandbox": "", "mtu": 1_450},
                    {"name": "eth0", "mac": "02:00:00:00:00:ab", "sandbox": "/run/netns/abc", "mtu": 1_450},
                ],
                "ips": [
                    {"address": "10.0.0.2/32", "gateway": "169.254.1.1", "interface": 1},
                    {"address": "fd00::2/128", "gateway": "fe80::1", "interface": 1},
                ],
                "routes": [
                    {"dst": "0.0.0.0/0", "gw": "169.254.1.1"},
                    {"dst": "::/0", "gw": "fe80::1"},
                ],
                "dns": {},
            })
        );
        assert!(
            built(Version::V1_0_0, &json!({}))["interfaces"][0]
                .get("mtu")
                .is_none()
        );
        let old = built(Version::V0_4_0, &json!({}));
        assert_eq!(
            (&old["ips"][0]["version"], &old["ips"][1]["version"]),
            (&json!("4"), &json!("6"))
        );
    }

    #[test]
    fn what_others_made_comes_first_and_whole() {
        let previous = json!({
            "cniVersion": "0.4.0",
            "interfaces": [{"name": "net1", "pciID": "0000:00:1f.6"}],
            "ips": [{"address": "192.0.2.7/24", "interface": 0, "version": "4"}],
            "routes": [{"dst": "192.0.2.0/24", "priority": 7}],
            "dns": {"domain": "first"},
            "custom": [1, 2],
        });
        let config = json!({"prevResult": previous, "dns": {"domain": "second"}});
        let result = built(Version::V1_1_0, &config);
        assert_eq!(result["interfaces"][0], previous["interfaces"][0]);
        assert_eq!(
            result["ips"][0],
            json!({"address": "192.0.2.7/24", "interface": 0})
        );
        assert_eq!(result["ips"][1]["interface"], 2);
        assert_eq!(result["routes"][0], previous["routes"][0]);
        assert_eq!(result["dns"], json!({"domain": "first"}));
        assert_eq!(result["custom"], json!([1, 2]));
        let empty =
            json!({"prevResult": {"interfaces": null, "dns": {}}, "dns": {"domain": "own"}});
        assert_eq!(
            built(Version::V1_0_0, &empty)["dns"],
            json!({"domain": "own"})
        );
    }
}
