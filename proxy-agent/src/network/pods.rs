//! This node's pods as the CNI plugin left them on disk: read, never written.

use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    num::NonZeroU16,
    path::{Path, PathBuf},
    sync::Arc,
};

use penstock_cni::{
    error::Failure,
    state::{self, Attachment, AttachmentKey},
};
use penstock_common::{Endpoint, EndpointFlags};

use crate::model::{
    object::{ObjectName, Protocol},
    port::{HostPort, PodPorts},
};

/// What is seen of an attachment's interface: whoever is next in a chain of plugins changes it.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// The index of the host end.
    pub index: u32,
    /// Whether what leaves there for the pod has to queue.
    pub is_shaped: bool,
    /// The Ethernet address of the pod's end, if it is known.
    pub mac: Option<[u8; 6]>,
}

/// The states of all networks.
#[derive(Debug)]
pub struct Pods {
    folder: PathBuf,
    /// By its file, what a network's state says: in octets, since a file system's clock is too coarse to
    /// tell two changes apart, and in attachments.
    files: BTreeMap<PathBuf, (Vec<u8>, Vec<Attachment>)>,
    /// What can't be read, and why.
    problems: BTreeMap<PathBuf, Failure>,
}

impl Pods {
    /// States that have not been read.
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_path_buf(),
            files: BTreeMap::new(),
            problems: BTreeMap::new(),
        }
    }

    /// Reads what changed. A file that can't be read keeps what was known of it.
    pub fn read(&mut self) -> io::Result<()> {
        let mut present = Vec::new();
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            // No pod has ever been here.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|end| end == "json") {
                present.push(path);
            }
        }
        self.files.retain(|path, _| present.contains(path));
        self.problems.retain(|path, _| present.contains(path));
        for path in present {
            let text = match fs::read(&path) {
                Ok(text) => text,
                // The network was removed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    let what = format!("reading {}", path.display());
                    self.reject(path, Failure::io(what)(error));
                    continue;
                }
            };
            if self.files.get(&path).is_some_and(|(old, _)| *old == text) {
                self.problems.remove(&path);
                continue;
            }
            match state::attachments(&path, &text) {
                Ok(attachments) => {
                    self.problems.remove(&path);
                    self.files.insert(path, (text, attachments));
                }
                Err(failure) => self.reject(path, failure),
            }
        }
        Ok(())
    }

    fn reject(&mut self, path: PathBuf, failure: Failure) {
        let text = failure.to_string();
        let known = self.problems.get(&path).map(ToString::to_string);
        if known.as_ref() != Some(&text) {
            tracing::warn!("{text}");
        }
        self.problems.insert(path, failure);
    }

    /// What can't be read, and why.
    pub fn problems(&self) -> impl Iterator<Item = &Failure> {
        self.problems.values()
    }

    /// Why a network's state can't be read.
    pub fn problem_of(&self, network: &str) -> Option<&Failure> {
        self.problems
            .get(&state::State::path(&self.folder, network))
    }

    /// All attachments.
    pub fn attachments(&self) -> impl Iterator<Item = &Attachment> {
        self.files.values().flat_map(|(_, attachments)| attachments)
    }

    /// The ports of this node that pods ask for, those first that came first. A pod whose interface is
    /// gone is out of reach for ever, and needs none, whoever is yet to delete it.
    pub fn host_ports(&self, is_there: impl Fn(&str) -> bool) -> Vec<PodPorts> {
        let asking = self
            .attachments()
            .filter(|attachment| !attachment.host_ports.is_empty())
            .filter(|attachment| is_there(&attachment.interface));
        asking
            .map(|attachment| PodPorts {
                pod: pod(attachment),
                sandbox: sandbox(&attachment.key),
                ports: host_ports(attachment).collect(),
            })
            .collect()
    }

    /// The addresses of attachments whose interface is there, by its name.
    pub fn endpoints<'a>(
        &'a self,
        link_of: impl Fn(&str) -> Option<Link> + 'a,
    ) -> impl Iterator<Item = (IpAddr, Endpoint)> + 'a {
        self.attachments().flat_map(move |attachment| {
            let is_limited = attachment
                .bandwidth
                .is_some_and(|limits| limits.ingress_rate > 0);
            let endpoint = link_of(&attachment.interface).map(|link| Endpoint {
                ifindex: link.index,
                flags: if is_limited || link.is_shaped {
                    EndpointFlags::SHAPED
                } else {
                    0
                },
                mac: link.mac.unwrap_or(attachment.mac.0),
                host_mac: attachment.host_mac.0,
            });
            let ips = attachment.ips.iter().copied();
            ips.filter_map(move |ip| Some((ip, endpoint?)))
        })
    }
}

/// What tells an attachment's interface from others.
pub fn sandbox(key: &AttachmentKey) -> Arc<str> {
    format!("{}/{}", key.container, key.ifname).into()
}

/// What a pod with host ports is called among services.
fn pod(attachment: &Attachment) -> ObjectName {
    attachment.pod.as_ref().map_or_else(
        || ObjectName::new("", attachment.key.container.as_str()),
        |pod| ObjectName::new(pod.namespace.as_str(), format!("pod/{}", pod.name)),
    )
}

/// The ports of this node that an attachment asks for.
fn host_ports(attachment: &Attachment) -> impl Iterator<Item = HostPort> + '_ {
    attachment.host_ports.iter().filter_map(|asked| {
        let protocol = match asked.protocol.to_ascii_lowercase().as_str() {
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            _ => Protocol::Tcp,
        };
        // The unspecified address means every one of its family, as for a socket.
        let is_wanted = |ip: &&IpAddr| {
            let asked = asked.host_ip;
            asked.is_none_or(|asked| asked.is_ipv4() == ip.is_ipv4())
        };
        Some(HostPort {
            ip: asked.host_ip.filter(|ip| !ip.is_unspecified()),
            port: NonZeroU16::new(asked.host_port)?,
            protocol,
            pod_ips: attachment.ips.iter().filter(is_wanted).copied().collect(),
            pod_port: NonZeroU16::new(asked.container_port)?,
        })
    })
}
