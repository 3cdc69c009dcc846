//! `prevResult`: what the plugins before this one in a chain made. It is passed on as it came,
//! whatever fields it has; only its shape is checked.

use serde_json::{Map, Value};

use crate::{error::Failure, version::Version};

/// A result of other plugins.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Previous {
    whole: Map<String, Value>,
}

impl Previous {
    /// The configuration's `prevResult`, if it has one.
    pub fn parse(config: &Value) -> Result<Option<Self>, Failure> {
        let whole = match config.get("prevResult") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Object(whole)) => whole.clone(),
            Some(_) => return Err(Failure::config("prevResult", "is not an object; write {…}")),
        };
        for (key, wanted) in [
            ("interfaces", "name"),
            ("ips", "address"),
            ("routes", "dst"),
        ] {
            let path = format!("prevResult.{key}");
            let list = match whole.get(key) {
                None | Some(Value::Null) => continue,
                Some(Value::Array(list)) => list,
                Some(_) => return Err(Failure::config(path, "is not a list; write […]")),
            };
            for (index, entry) in list.iter().enumerate() {
                if !entry.get(wanted).is_some_and(Value::is_string) {
                    return Err(Failure::config(
                        format!("{path}[{index}].{wanted}"),
                        "is missing or not a string",
                    ));
                }
            }
        }
        if !matches!(
            whole.get("dns"),
            None | Some(Value::Null | Value::Object(_))
        ) {
            return Err(Failure::config(
                "prevResult.dns",
                "is not an object; write {…}",
            ));
        }
        Ok(Some(Self { whole }))
    }

    /// A list of the result's.
    pub fn list(&self, key: &str) -> &[Value] {
        self.whole
            .get(key)
            .and_then(Value::as_array)
            .map_or(&[], Vec::as_slice)
    }

    /// All of it, with its addresses written as `version` has them.
    pub fn into_object(mut self, version: Version) -> Map<String, Value> {
        if let Some(Value::Array(ips)) = self.whole.get_mut("ips") {
            for ip in ips.iter_mut().filter_map(Value::as_object_mut) {
                say_family(ip, version);
            }
        }
        self.whole
    }
}

/// Adds or removes an address' `version`, which it has before 1.0.0 only.
pub fn say_family(ip: &mut Map<String, Value>, version: Version) {
    if version >= Version::V1_0_0 {
        ip.remove("version");
        return;
    }
    let address = ip
        .get("address")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let family = if address.contains(':') { "6" } else { "4" };
    ip.insert("version".to_owned(), family.into());
}
