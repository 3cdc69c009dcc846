//! This node's pods as the CNI plugin left them on disk: read, never written.

use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use penstock_cni::state::{self, Attachment};
use penstock_common::{Endpoint, EndpointFlags};

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
