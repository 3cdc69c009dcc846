//! Packs programs as container images, for releases (`cargo xtask image`) and for tests.
//!
//! An archive is an OCI image layout that docker's older form describes as well, so that
//! `ctr images import`, `docker load`, `podman load` and `skopeo copy` take it. Files have no time and
//! no owner but root: the same programs make the same image.

mod archive;
pub mod release;

use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

pub use archive::write;

/// An image can't be packed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file that is to be packed can't be read.
    #[error("reading {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The archive can't be written.
    #[error("packing {path}: {source}")]
    Pack {
        /// What was to be packed.
        path: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// Bytes and their name in a layout.
pub(crate) struct Blob {
    content: Vec<u8>,
    digest: String,
}

impl Blob {
    fn new(content: Vec<u8>) -> Self {
        let digest = Sha256::digest(&content);
        let digest = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Self { content, digest }
    }
}

/// The files of an image. Images may share them.
pub struct Layer(Blob);

/// A [`Layer`] in the making.
pub struct LayerBuilder(tar::Builder<Vec<u8>>);

impl Default for LayerBuilder {
    fn default() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }
}

impl LayerBuilder {
    /// Adds a program; `path` is where it is in the image.
    pub fn program(mut self, path: &str, from: &Path) -> Result<Self, ImageError> {
        let content = std::fs::read(from).map_err(|source| ImageError::Read {
            path: from.to_path_buf(),
            source,
        })?;
        let path = path.trim_start_matches('/');
        archive::add(&mut self.0, path, 0o755, &content)?;
        Ok(self)
    }

    /// All that were added.
    pub fn finish(self) -> Result<Layer, ImageError> {
        let content = self.0.into_inner().map_err(|source| ImageError::Pack {
            path: "a layer".to_owned(),
            source,
        })?;
        Ok(Layer(Blob::new(content)))
    }
}

/// What is started, and how.
#[derive(Clone, Debug, Default)]
pub struct Image<'a> {
    /// Registry, name and tag.
    pub name: &'a str,
    /// The program, and arguments that come before those of a container.
    pub entrypoint: &'a [&'a str],
    /// Where programs are looked for by name alone.
    pub path: Option<&'a str>,
    /// What ends it; SIGTERM if nothing is said.
    pub stop_signal: Option<&'a str>,
    /// What is to be known about it (`org.opencontainers.image.*`).
    pub labels: &'a [(&'a str, &'a str)],
}
