//! The CNI plugin as one static program: it is copied to hosts, whose libraries are anybody's.

use std::{fs, process::Command};

use anyhow::{Context, Result, ensure};

use crate::run::{cargo, in_root, root};

const PLUGIN: &str = "penstock-cni";

/// Builds it with optimisation, and puts it where other programs are.
pub fn build() -> Result<()> {
    let target = host()?;
    // With a target of its own, build scripts and macros are not meant by these flags: a macro is
    // a library that the compiler loads, and can't be static.
    in_root(
        cargo("build")
            .args(["--release", "--package", PLUGIN, "--bin", PLUGIN])
            .args(["--target", &target])
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            .env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo"),
    )?;
    let folder = root().join("target");
    let built = folder.join(&target).join("release").join(PLUGIN);
    let to = folder.join("release").join(PLUGIN);
    let new = to.with_extension("new");
    fs::copy(&built, &new)
        .with_context(|| format!("copying {} to {}", built.display(), new.display()))?;
    fs::rename(&new, &to).with_context(|| format!("replacing {}", to.display()))
}

/// The target that the compiler builds for by itself.
fn host() -> Result<String> {
    let output = Command::new("rustc")
        .arg("-vV")
        .output()
        .context("starting rustc")?;
    ensure!(
        output.status.success(),
        "rustc -vV ended with {}",
        output.status
    );
    let text = String::from_utf8(output.stdout).context("rustc's version is no text")?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned)
        .with_context(|| format!("rustc -vV names no host: {text}"))
}
