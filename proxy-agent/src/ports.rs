//! Which of this node's ports are the kernel's to give to sockets, and whether flows' are among them.
//!
//! A flow that gets an address of this node's takes its port from a range of its own, so that the reply to a
//! socket of the node is never taken for a flow's. That holds as long as the kernel takes sockets' ports from
//! elsewhere.

use std::{fs, ops::RangeInclusive};

use penstock_common::{MASQUERADE_PORTS, REMAPPED_PORTS};

const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// What is wrong with the kernel's settings, if something is. They are those of the agent's network
/// namespace, and hold for both families.
pub fn overlap() -> Option<String> {
    let range = fs::read_to_string(RANGE).ok()?;
    let reserved = fs::read_to_string(RESERVED).unwrap_or_default();
    overlap_of(&range, &reserved)
}

fn overlap_of(range: &str, reserved: &str) -> Option<String> {
    let mut bounds = range.split_whitespace().map(str::parse);
    let (Some(Ok(low)), Some(Ok(high))) = (bounds.next(), bounds.next()) else {
        return None;
    };
    let given: RangeInclusive<u16> = low..=high;
    let reserved: Vec<RangeInclusive<u16>> = reserved.split(',').filter_map(ports).collect();
    let is_given =
        |port: &u16| given.contains(port) && !reserved.iter().any(|range| range.contains(port));
    let of_flows = [MASQUERADE_PORTS, REMAPPED_PORTS];
    let taken: Vec<String> = of_flows
        .into_iter()
        .filter(|(low, high)| (*low..=*high).any(|port| is_given(&port)))
        .map(|(low, high)| format!("{low}-{high}"))
        .collect();
    let taken = taken.join(",");
    (!taken.is_empty()).then(|| {
        format!(
            "net.ipv4.ip_local_port_range is {low} to {high}: the kernel gives sockets of this node ports that \
             flows get too, and now and then one of their connections fails; set \
             net.ipv4.ip_local_reserved_ports={taken}, or the range to 32768 to 60999"
        )
    })
}

/// One port, or from one to another.
fn ports(text: &str) -> Option<RangeInclusive<u16>> {
    let (low, high) = text
        .trim()
        .split_once('-')
        .unwrap_or((text.trim(), text.trim()));
    Some(low.parse().ok()?..=high.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_own_range_is_beside_flows() {
        for (range, reserved) in [
            ("32768\t60999\n", "\n"),
            ("30000 60999", ""),
            ("1024 65535", "1024-29999,61000-65535"),
            ("1024 65535", "61000-65535,80,1000-29999\n"),
            ("", ""),
        ] {
            assert_eq!(
                overlap_of(range, reserved),
                None,
                "{range} without {reserved}"
            );
        }
    }

    #[test]
    fn a_range_that_was_widened_is_told_with_what_to_do() {
        for (range, reserved, remedy) in [
            ("1024 65535", "", "=1024-29999,61000-65535,"),
            ("1024\t60999\n", "\n", "=1024-29999,"),
            ("15000 65000", "61000-65535", "=1024-29999,"),
            ("32768 61000", "8080", "=61000-65535,"),
        ] {
            let told = overlap_of(range, reserved).expect(range);
            assert!(told.contains(remedy), "{told}");
        }
    }
}
