//! Which program runs where: cgroup hooks on the node's cgroup, packet hooks on interfaces of pods and
//! to the outside.
//!
//! Invariant: a link is pinned before anyone relies on it and replaced in place by the next agent
//! (BPF_LINK_UPDATE), so that no packet and no connection meets a gap.

pub mod cgroup;
pub mod exclude;
pub mod follow;
pub mod held;
pub mod inspect;
pub mod interface;
pub mod netns;
pub mod peers;
pub mod routes;
mod syscall;
pub mod xdp;

pub(crate) use syscall::{end_with_readers, socket_option};

use std::{io, path::PathBuf};

use aya::programs::ProgramError;

use crate::words::chain;

/// A program can't be put where it belongs.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The cgroup can't be opened.
    #[error("opening the cgroup {path}: {source}; pass the cgroup2 root or a cgroup in --cgroup")]
    OpenCgroup {
        /// The folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The folder is no cgroup.
    #[error("{path} is not on a cgroup2 file system; mount one (mount -t cgroup2 none DIR)")]
    NotCgroup2 {
        /// The folder.
        path: PathBuf,
    },
    /// Attaching failed.
    #[error("attaching {program} to {target}: {}", chain(&**source))]
    Attach {
        /// The program.
        program: String,
        /// The cgroup or interface.
        target: String,
        /// Why not.
        #[source]
        source: Box<ProgramError>,
    },
    /// Replacing the program of a pinned link failed.
    #[error("replacing the program behind the pinned link {path}: {source}")]
    Replace {
        /// The pin.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Pinning or reading a pinned link failed.
    #[error("the pinned link {path}: {source}")]
    Pin {
        /// The pin.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Loading a program failed.
    #[error(transparent)]
    Load(#[from] crate::dataplane::pins::PinError),
}
