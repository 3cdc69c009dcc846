//! What the agent tells the plugin about the node's network, in a file of its run directory.
//!
//! The file is replaced as a whole, so whoever reads it sees all of one version.

use std::{
    io::{self, Write},
    path::Path,
};

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::error::Failure;

/// The file's name in the run directory.
pub const FILE: &str = "network.json";

/// A node's part of the cluster's network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    /// The format's version, [`Network::VERSION`].
    pub version: u32,
    /// Ranges for this node's pods, at most one a family.
    pub pod_cidrs: Vec<IpNetwork>,
    /// What a pod's interface carries at most, in bytes, IP header included.
    pub mtu: u32,
}

impl Network {
    /// The only version of the format so far.
    pub const VERSION: u32 = 1;

    /// Reads the file in `run_dir`; `None` if the agent has not written it yet.
    pub fn read(run_dir: &Path) -> Result<Option<Self>, Failure> {
        let path = run_dir.join(FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Failure::io(format!("reading {}", path.display()))(error)),
        };
        let decode = |reason: String| Failure::Decode {
            what: path.display().to_string(),
            reason,
        };
        let network: Self =
            serde_json::from_slice(&text).map_err(|error| decode(error.to_string()))?;
        if network.version != Self::VERSION {
            return Err(decode(format!(
                "version {} is not {}; agent and plugin are of different releases",
                network.version,
                Self::VERSION
            )));
        }
        Ok(Some(network))
    }

    /// Replaces the file in `run_dir`.
    pub fn write(&self, run_dir: &Path) -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(run_dir)?;
        serde_json::to_writer(&mut file, self)?;
        file.write_all(b"\n")?;
        file.persist(run_dir.join(FILE))
            .map(drop)
            .map_err(|error| error.error)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Network::read(folder.path()).unwrap().is_none());
        let mut network = Network {
            version: Network::VERSION,
            pod_cidrs: vec!["10.244.1.0/24".parse().unwrap()],
            mtu: 1_450,
        };
        network.write(folder.path()).unwrap();
        assert_eq!(Network::read(folder.path()).unwrap(), Some(network.clone()));
        network.version = 2;
        network.write(folder.path()).unwrap();
        let error = Network::read(folder.path()).unwrap_err();
        assert!(error.to_string().contains("different releases"), "{error}");
        std::fs::write(folder.path().join(FILE), "{").unwrap();
        assert_eq!(Network::read(folder.path()).unwrap_err().code(), 6);
    }
}
