//! The CNI plugin as it is shipped, in `target/dist`, where `cargo xtask test` puts it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use penstock_testbed::require_kernel;
use serde_json::Value;

/// The plugin, or a word about why it is not looked at.
fn require_plugin() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?;
    let plugin = root.join("target/dist/penstock-cni");
    if plugin.exists() {
        return Some(plugin);
    }
    let needs = format!(
        "{} is missing: cargo xtask build --release",
        plugin.display()
    );
    assert!(std::env::var_os("CI").is_none(), "{needs}");
    eprintln!("SKIPPED: {needs}");
    None
}

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn the_plugin_needs_nothing_of_its_host_and_starts_at_once() -> Result<()> {
    const STARTS: usize = 21;
    // A root of its own needs root's rights.
    let (Some(()), Some(plugin)) = (require_kernel(), require_plugin()) else {
        return Ok(());
    };
    let root = Folder(std::env::temp_dir().join(format!("pn{}-root", std::process::id())));
    fs::create_dir(&root.0)?;
    fs::copy(&plugin, root.0.join("penstock-cni"))?;
    let mut times = Vec::new();
    for _ in 0..STARTS {
        let started = Instant::now();
        let output = Command::new("chroot")
            .arg(&root.0)
            .arg("/penstock-cni")
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_COMMAND", "VERSION")
            .stdin(Stdio::null())
            .output()
            .context("starting chroot")?;
        times.push(started.elapsed());
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {said}", output.status);
        let answer: Value = serde_json::from_slice(&output.stdout)?;
        assert!(answer["supportedVersions"].is_array(), "{answer}");
    }
    times.sort();
    let median = times.get(STARTS / 2).copied().unwrap_or_default();
    eprintln!("started and ended in {median:?} at the median, with chroot");
    // Far more than it takes: a plugin that waits for something at its start is seen.
    assert!(median < Duration::from_millis(100), "{median:?}");
    Ok(())
}
