//! What an attachment's links are called: names and addresses that follow from its key alone, so
//! that whoever knows the key can find and remove them, whatever else was lost.

use crate::state::{AttachmentKey, Mac, Pod};

/// The beginning of each host end's name.
const PREFIX: &str = "pn";
/// How many hexadecimal digits come after it: a name has room for 15 characters.
const DIGITS: usize = 13;
/// The longest alias that the kernel keeps.
const ALIAS_LIMIT: usize = 255;

/// FNV-1a: stable between releases, which the standard library's hashes are not.
fn hash(parts: &[&str]) -> u64 {
    let octets = parts.iter().flat_map(|part| part.bytes());
    octets.fold(0xcbf2_9ce4_8422_2325, |hash, octet| {
        (hash ^ u64::from(octet)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The name of the interface's end on the host.
pub fn interface(key: &AttachmentKey) -> String {
    let hash = hash(&[&key.container, "/", &key.ifname]);
    format!("{PREFIX}{:0DIGITS$x}", hash & ((1 << (4 * DIGITS)) - 1))
}

/// Whether an interface is called like one of ours.
pub fn is_interface(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|digits| {
        digits.len() == DIGITS
            && digits
                .bytes()
                .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// A locally administered unicast address.
fn mac(key: &AttachmentKey, end: &str) -> Mac {
    let [_, _, _, b, c, d, e, f] =
        hash(&[end, "/", &key.container, "/", &key.ifname]).to_be_bytes();
    Mac([0x02, b, c, d, e, f])
}

/// The address of the end in the container.
pub fn container_mac(key: &AttachmentKey) -> Mac {
    mac(key, "container")
}

/// The address of the end on the host.
pub fn host_mac(key: &AttachmentKey) -> Mac {
    mac(key, "host")
}

/// How every alias of a network's begins: what makes a link ours.
pub fn alias_prefix(network: &str) -> String {
    format!("penstock:{network}:")
}

/// The host end's alias, by which a person knows whose it is.
pub fn alias(network: &str, key: &AttachmentKey, pod: Option<&Pod>) -> String {
    let mut alias = alias_prefix(network);
    match pod {
        Some(pod) => alias.extend([pod.namespace.as_str(), "/", pod.name.as_str()]),
        None => alias.extend([key.container.as_str(), "/", key.ifname.as_str()]),
    }
    let end = (0..=ALIAS_LIMIT.min(alias.len()))
        .rev()
        .find(|end| alias.is_char_boundary(*end));
    alias.truncate(end.unwrap_or(0));
    alias
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(container: &str, ifname: &str) -> AttachmentKey {
        AttachmentKey {
            container: container.to_owned(),
            ifname: ifname.to_owned(),
        }
    }

    #[test]
    fn names_never_change_between_releases() {
        let key = key("abc", "eth0");
        assert_eq!(hash(&["a"]), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(interface(&key), "pna69de51a688dd");
        assert_eq!(container_mac(&key).to_string(), "02:6f:20:d1:f9:8d");
        assert_eq!(host_mac(&key).to_string(), "02:5c:ec:09:50:2c");
    }

    proptest! {
        #[test]
        fn names_fit(container in "\\PC{1,300}", ifname in "\\PC{1,15}") {
            let key = key(&container, &ifname);
            prop_assert_eq!(interface(&key).len(), 15);
            prop_assert!(is_interface(&interface(&key)));
            prop_assert_ne!(container_mac(&key), host_mac(&key));
            prop_assert!(alias("net", &key, None).len() <= ALIAS_LIMIT);
        }
    }
}
