//! This node's pods as the CNI plugin left them on disk: read, never written.

use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    num::NonZeroU16,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use penstock_cni::state::{self, Attachment};
use penstock_common::{Endpoint, EndpointFlags};

use crate::model::{
    object::{ObjectName, Protocol},
    port::HostPort,
};

/// When a file was what.
type Stamp = (SystemTime, u64, u64);

/// The states of all networks.
#[derive(Debug)]
pub struct Pods {
    folder: PathBuf,
    files: BTreeMap<PathBuf, (Stamp, Vec<Attachment>)>,
    /// What can't be read, and why.
    pub problems: BTreeMap<PathBuf, String>,
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
            let Some(stamp) = stamp(&path) else { continue };
            if self.files.get(&path).is_some_and(|(old, _)| *old == stamp) {
                continue;
            }
            match state::read(&path) {
                Ok(attachments) => {
                    self.problems.remove(&path);
                    self.files.insert(path, (stamp, attachments));
                }
                Err(error) => {
                    let text = error.to_string();
                    if self.problems.get(&path) != Some(&text) {
                        tracing::warn!("{text}");
                    }
                    self.problems.insert(path, text);
                }
            }
        }
        Ok(())
    }

    /// All attachments.
    pub fn attachments(&self) -> impl Iterator<Item = &Attachment> {
        self.files.values().flat_map(|(_, attachments)| attachments)
    }

    /// The ports of this node that pods ask for.
    pub fn host_ports(&self) -> BTreeMap<ObjectName, Vec<HostPort>> {
        let mut all: BTreeMap<ObjectName, Vec<HostPort>> = BTreeMap::new();
        for attachment in self.attachments() {
            let name = attachment.pod.as_ref().map_or_else(
                || ObjectName::new("", attachment.key.container.as_str()),
                |pod| ObjectName::new(pod.namespace.as_str(), format!("pod/{}", pod.name)),
            );
            for asked in &attachment.host_ports {
                let protocol = match asked.protocol.to_ascii_lowercase().as_str() {
                    "udp" => Protocol::Udp,
                    "sctp" => Protocol::Sctp,
                    _ => Protocol::Tcp,
                };
                let (Some(port), Some(pod_port)) = (
                    NonZeroU16::new(asked.host_port),
                    NonZeroU16::new(asked.container_port),
                ) else {
                    continue;
                };
                // The unspecified address means every one of its family, as for a socket.
                let is_wanted = |ip: &&IpAddr| {
                    let asked = asked.host_ip;
                    asked.is_none_or(|asked| asked.is_ipv4() == ip.is_ipv4())
                };
                all.entry(name.clone()).or_default().push(HostPort {
                    ip: asked.host_ip.filter(|ip| !ip.is_unspecified()),
                    port,
                    protocol,
                    pod_ips: attachment.ips.iter().filter(is_wanted).copied().collect(),
                    pod_port,
                });
            }
        }
        all
    }

    /// The addresses of attachments whose interface is there, by its name.
    pub fn endpoints<'a>(
        &'a self,
        index_of: impl Fn(&str) -> Option<u32> + 'a,
    ) -> impl Iterator<Item = (IpAddr, Endpoint)> + 'a {
        self.attachments().flat_map(move |attachment| {
            let index = index_of(&attachment.interface);
            let is_shaped = attachment
                .bandwidth
                .is_some_and(|limits| limits.ingress_rate > 0);
            let endpoint = index.map(|ifindex| Endpoint {
                ifindex,
                flags: if is_shaped { EndpointFlags::SHAPED } else { 0 },
                mac: attachment.mac.0,
                host_mac: attachment.host_mac.0,
            });
            let ips = attachment.ips.iter().copied();
            ips.filter_map(move |ip| Some((ip, endpoint?)))
        })
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.modified().ok()?, metadata.len(), metadata.ino()))
}
