//! What there is to know about this node's pods.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use penstock_cni::state::Attachment;
use serde::{Deserialize, Serialize};

use crate::{attach::follow, model::world::World, network::pods, words::harmless};

/// A pod that the CNI plugin gave a network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pod {
    /// namespace/name, or the container's id where the runtime did not say.
    pub name: String,
    /// The interface's name in the container.
    pub ifname: String,
    /// The host end of its interface.
    pub interface: String,
    /// Its addresses.
    pub addresses: Vec<String>,
    /// Whether the kernel's maps name it.
    pub wired: bool,
    /// The container's id, by which its runtime calls the plugin.
    #[serde(default)]
    pub container: String,
    /// For how long its interface has been gone, in seconds, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gone_secs: Option<u64>,
    /// Ports of the node that it asked for.
    #[serde(default)]
    pub host_ports: Vec<HostPort>,
    /// Those that it does not get, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
    /// How fast it may be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
}

/// A port of the node that leads to a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPort {
    /// At which address; all of them without.
    pub host_ip: Option<IpAddr>,
    /// The node's port.
    pub host_port: u16,
    /// The pod's port.
    pub pod_port: u16,
    /// TCP, UDP or SCTP.
    pub protocol: String,
}

/// Limits of bandwidth, in bits per second; 0 for none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// To the pod.
    pub ingress_rate: u64,
    /// How many bits may come at once.
    pub ingress_burst: u64,
    /// From the pod.
    pub egress_rate: u64,
    /// How many bits may come at once.
    pub egress_burst: u64,
}

/// This node's pods.
pub(super) fn of(world: &World, interfaces: &follow::Status) -> Vec<Pod> {
    let attachments = interfaces.attachments.iter();
    attachments
        .map(|(attachment, index)| {
            let gone = interfaces.gone.get(&attachment.key);
            let refusals = world.refusals(&pods::sandbox(&attachment.key));
            let refusals = refusals.map_or_else(Vec::new, |(_, refusals)| refusals);
            Pod {
                wired: index.is_some(),
                gone_secs: gone.map(|since| since.elapsed().as_secs()),
                problems: refusals
                    .iter()
                    .map(|refusal| harmless(&refusal.to_string()))
                    .collect(),
                ..Pod::from(attachment)
            }
        })
        .collect()
}

/// What a pod is called: by its name, if the runtime said it, or else by its container's id.
fn name(attachment: &Attachment) -> String {
    attachment.pod.as_ref().map_or_else(
        || attachment.key.container.clone(),
        |pod| format!("{}/{}", pod.namespace, pod.name),
    )
}

impl From<&Attachment> for Pod {
    fn from(attachment: &Attachment) -> Self {
        let limits = attachment.bandwidth.map(|limits| Limits {
            ingress_rate: limits.ingress_rate,
            ingress_burst: limits.ingress_burst,
            egress_rate: limits.egress_rate,
            egress_burst: limits.egress_burst,
        });
        let host_ports = attachment.host_ports.iter().map(|port| HostPort {
            host_ip: port.host_ip,
            host_port: port.host_port,
            pod_port: port.container_port,
            protocol: port.protocol.to_ascii_uppercase(),
        });
        Self {
            name: name(attachment),
            ifname: attachment.key.ifname.clone(),
            interface: attachment.interface.clone(),
            addresses: attachment.ips.iter().map(ToString::to_string).collect(),
            wired: false,
            container: attachment.key.container.clone(),
            gone_secs: None,
            host_ports: host_ports.collect(),
            problems: Vec::new(),
            limits,
        }
    }
}

/// For how long an interface may be gone before its pod's end counts as lost: kubelet looks once a
/// minute for sandboxes that ended, and has the plugin told of them.
const LOST_AFTER: Duration = Duration::from_secs(300);

/// Says so where pods that ended have never been deleted.
pub fn lost(interfaces: &follow::Status, now: Instant) -> Option<String> {
    let attachments = interfaces.attachments.iter();
    let lost: Vec<String> = attachments
        .filter(|(attachment, _)| {
            let gone = interfaces.gone.get(&attachment.key);
            gone.is_some_and(|since| now.saturating_duration_since(*since) >= LOST_AFTER)
        })
        .map(|(attachment, _)| harmless(&name(attachment)))
        .collect();
    let (first, others) = lost.split_first()?;
    let others = match others.len() {
        0 => String::new(),
        count => format!(" and {count} more"),
    };
    Some(format!(
        "the interface of pod {first}{others} has been gone for more than {} minutes, and no runtime has \
         deleted it (DEL, GC): its addresses are kept for it; `penstock pods` names all of these",
        LOST_AFTER.as_secs() / 60
    ))
}

#[cfg(test)]
mod tests {
    use penstock_cni::state::{AttachmentKey, Mac};

    use super::*;

    #[test]
    fn pods_that_nobody_deletes_are_told_once_that_is_certain() {
        let attachment = |container: &str| Attachment {
            key: AttachmentKey {
                container: container.to_owned(),
                ifname: "eth0".to_owned(),
            },
            interface: String::new(),
            mac: Mac([2; 6]),
            host_mac: Mac([2; 6]),
            ips: Vec::new(),
            pod: None,
            host_ports: Vec::new(),
            bandwidth: None,
        };
        let since = Instant::now();
        let mut status = follow::Status::default();
        for container in ["a", "b", "c"] {
            status.attachments.push((attachment(container), None));
        }
        assert_eq!(lost(&status, since + 2 * LOST_AFTER), None);
        status.gone.insert(attachment("b").key, since);
        let soon = since + LOST_AFTER - Duration::from_secs(1);
        assert_eq!(lost(&status, soon), None);
        let told = lost(&status, since + LOST_AFTER).unwrap();
        assert!(
            told.starts_with("the interface of pod b has been"),
            "{told}"
        );
        status.gone.insert(attachment("c").key, since);
        let told = lost(&status, since + LOST_AFTER).unwrap();
        assert!(told.contains("b and 1 more"), "{told}");
    }
}
