//! Cgroups whose sockets are left alone: by pattern, and those of pods that asked for it.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use aya::maps::MapData;
use glob::Pattern;
use penstock_common::limits;

use crate::dataplane::{
    batch,
    pins::{PinError, Pins},
};

/// Keeps `EXCLUDED_CGROUPS` as it should be.
pub struct Exclusions {
    map: MapData,
    root: PathBuf,
    patterns: Vec<Pattern>,
    pods: Vec<Arc<str>>,
    /// What an earlier agent wrote, until it is known which pods opted out.
    inherited: HashSet<u64>,
    written: HashMap<u64, u8>,
}

impl Exclusions {
    /// Takes over what an earlier agent wrote.
    pub fn open(pins: &Pins, root: &Path, patterns: Vec<Pattern>) -> Result<Self, PinError> {
        let map = pins.map("EXCLUDED_CGROUPS")?;
        let written = batch::lookup_all::<u64, u8>(map.fd().as_fd(), 1_024).unwrap_or_default();
        Ok(Self {
            map,
            root: root.to_path_buf(),
            patterns,
            pods: Vec::new(),
            inherited: written.iter().map(|(id, _)| *id).collect(),
            written: written.into_iter().collect(),
        })
    }

    /// The uids of pods that opted out, and whether these are all.
    pub fn set_pods(&mut self, uids: Vec<Arc<str>>, are_all: bool) {
        self.pods = uids.into_iter().filter(|uid| !uid.is_empty()).collect();
        if are_all {
            self.inherited.clear();
        }
    }

    /// How many cgroups are excluded.
    pub fn count(&self) -> u32 {
        self.written.len() as u32
    }

    /// Looks for excluded cgroups; whether there are others than before.
    pub fn look(&mut self) -> io::Result<bool> {
        let mut found = HashSet::new();
        if !self.patterns.is_empty() || !self.pods.is_empty() {
            self.search(&self.root, limits::CGROUP_DEPTH, &mut found);
        }
        let wanted = found.union(&self.inherited).map(|id| (*id, 1)).collect();
        let writes = batch::settle(self.map.fd().as_fd(), &mut self.written, &wanted)?;
        Ok(writes > 0)
    }

    fn search(&self, folder: &Path, depth: u32, found: &mut HashSet<u64>) {
        let Some(depth) = depth.checked_sub(1) else {
            return;
        };
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if !metadata.is_dir() {
                continue;
            }
            if self.matches(&path) {
                found.insert(metadata.ino());
            } else {
                self.search(&path, depth, found);
            }
        }
    }

    fn matches(&self, path: &Path) -> bool {
        let Ok(relative) = path.strip_prefix(&self.root) else {
            return false;
        };
        if self
            .patterns
            .iter()
            .any(|pattern| pattern.matches_path(relative))
        {
            return true;
        }
        // Kubelet calls a pod's cgroup "pod<uid>", or with the systemd driver
        // "kubepods-…-pod<uid with underscores>.slice".
        let name = relative.file_name().unwrap_or_default().to_string_lossy();
        self.pods.iter().any(|uid| {
            let underscored = uid.replace('-', "_");
            let is_pod = |uid: &str| {
                name.split_once(uid).is_some_and(|(before, after)| {
                    before.ends_with("pod") && (after.is_empty() || after == ".slice")
                })
            };
            is_pod(uid) || is_pod(&underscored)
        })
    }
}
