//! Addresses and ranges as Kubernetes reads those that older releases stored (`ParseIPSloppy` and
//! `ParseCIDRSloppy` in k8s.io/utils/net): the numbers of IPv4 are decimal, whatever zeros they begin with.

use std::{borrow::Cow, net::IpAddr};

use ipnetwork::IpNetwork;

/// An address.
pub(super) fn ip_of(text: &str) -> Option<IpAddr> {
    without_zeros(text).parse().ok()
}

/// A range.
pub(super) fn range_of(text: &str) -> Option<IpNetwork> {
    let Some((address, length)) = text.split_once('/') else {
        return text.parse().ok();
    };
    format!("{}/{length}", without_zeros(address)).parse().ok()
}

/// An IPv4 address's numbers without the zeros that they begin with; any other text as it is.
fn without_zeros(text: &str) -> Cow<'_, str> {
    let has_zeros = |number: &str| number.len() > 1 && number.starts_with('0');
    if text.contains(':') || !text.split('.').any(has_zeros) {
        return text.into();
    }
    let number = |number: &str| match number.trim_start_matches('0') {
        "" if !number.is_empty() => "0".to_owned(),
        rest => rest.to_owned(),
    };
    let numbers: Vec<String> = text.split('.').map(number).collect();
    numbers.join(".").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_decimal_whatever_zeros_they_begin_with() {
        let ip = |text: &str| ip_of(text).map(|ip| ip.to_string());
        assert_eq!(ip("010.000.00.001").as_deref(), Some("10.0.0.1"));
        assert_eq!(ip("10.0.0.1").as_deref(), Some("10.0.0.1"));
        assert_eq!(ip("2001:db8::1").as_deref(), Some("2001:db8::1"));
        for wrong in [
            "",
            ".",
            "0",
            "010.0.0",
            "010..0.1",
            "0x10.0.0.1",
            "010.0.0.0256",
            "-01.0.0.1",
        ] {
            assert_eq!(ip(wrong), None, "{wrong}");
        }
        let range = |text: &str| range_of(text).map(|range| range.to_string());
        assert_eq!(range("010.000.0.0/8").as_deref(), Some("10.0.0.0/8"));
        assert_eq!(range("2001:db8::/32").as_deref(), Some("2001:db8::/32"));
        assert_eq!(range("010.0.0.0/33"), None);
        assert_eq!(range("010.0.0.0/"), None);
    }
}
