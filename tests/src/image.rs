//! Container images of this workspace's own programs, in the form that `docker save` writes.
//!
//! A program brings the libraries that it was linked with, so it need not be built for this.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::agent::binary;

/// Serves and asks, as in every other test.
pub(crate) const TRAFFIC: &str = "penstock.test/traffic:1";
/// What holds a pod's namespaces.
pub(crate) const PAUSE: &str = "penstock.test/pause:1";

/// Writes both images, which share their one layer, to a file in `folder`.
pub(crate) fn write(folder: &Path) -> Result<PathBuf> {
    let program = binary("penstock-traffic")?;
    let layer = layer(&program).with_context(|| format!("packing {}", program.display()))?;
    let digest = Sha256::digest(&layer);
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let path = folder.join("images.tar");
    let file = File::create(&path).with_context(|| format!("making {}", path.display()))?;
    let mut archive = tar::Builder::new(file);
    let mut manifest = Vec::new();
    add(&mut archive, "layer.tar", 0o644, &layer)?;
    for (file, name, command) in [
        ("traffic.json", TRAFFIC, &["/penstock-traffic"][..]),
        ("pause.json", PAUSE, &["/penstock-traffic", "pause"]),
    ] {
        let config = config(command, &digest).to_string();
        add(&mut archive, file, 0o644, config.as_bytes())?;
        manifest.push(json!({ "Config": file, "RepoTags": [name], "Layers": ["layer.tar"] }));
    }
    let manifest = Value::from(manifest).to_string();
    add(&mut archive, "manifest.json", 0o644, manifest.as_bytes())?;
    archive.into_inner().context("finishing an archive")?;
    Ok(path)
}

/// An image's configuration.
fn config(command: &[&str], layer: &str) -> Value {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    json!({
        "architecture": architecture,
        "os": "linux",
        // The first process of a pid namespace sleeps through all other signals.
        "config": { "Entrypoint": command, "StopSignal": "SIGKILL" },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{layer}")] },
    })
}

/// The program and its libraries.
fn layer(program: &Path) -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    let text = fs::read(program).context("reading the program")?;
    add(&mut archive, "penstock-traffic", 0o755, &text)?;
    for library in libraries(program)? {
        let text = fs::read(&library).with_context(|| format!("reading {library}"))?;
        add(&mut archive, library.trim_start_matches('/'), 0o755, &text)?;
    }
    archive.into_inner().context("finishing a layer")
}

/// What a program is linked with, the loader included; nothing if it is linked statically.
fn libraries(program: &Path) -> Result<Vec<String>> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("starting ldd (package libc-bin)")?;
    let text = String::from_utf8_lossy(&output.stdout);
    // "libc.so.6 => /lib/libc.so.6 (0x..)", and "/lib64/ld-linux.so.2 (0x..)" for the loader.
    let paths = text.lines().flat_map(|line| line.split_whitespace());
    Ok(paths
        .filter(|word| word.starts_with('/') && !word.ends_with(':'))
        .map(str::to_owned)
        .collect())
}

fn add(
    archive: &mut tar::Builder<impl Write>,
    path: &str,
    mode: u32,
    content: &[u8],
) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_size(content.len() as u64);
    archive
        .append_data(&mut header, path, content)
        .with_context(|| format!("packing {path}"))
}
