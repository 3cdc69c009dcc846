//! Container images of this workspace's own programs.
//!
//! A program brings the libraries that it was linked with, so it need not be built for this.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use penstock_image::{Image, LayerBuilder, release};

use crate::{agent::binary, process};

/// Serves and asks, as in every other test.
pub(crate) const TRAFFIC: &str = "penstock.test/traffic:1";
/// What holds a pod's namespaces.
pub(crate) const PAUSE: &str = "penstock.test/pause:1";

/// Writes the images that all pods need, which share their one layer, to a file in `folder`.
pub(crate) fn write(folder: &Path) -> Result<PathBuf> {
    let image = |name, entrypoint| Image {
        name,
        entrypoint,
        // The first process of a pid namespace sleeps through all other signals.
        stop_signal: Some("SIGKILL"),
        ..Image::default()
    };
    let images = [
        image(TRAFFIC, &["/penstock-traffic"]),
        image(PAUSE, &["/penstock-traffic", "pause"]),
    ];
    let path = folder.join("images.tar");
    pack(&path, "/", &[binary("penstock-traffic")?], &images)?;
    Ok(path)
}

/// Writes the image of the agent, as nodes run it, to a file in `folder`.
pub(crate) fn write_release(folder: &Path) -> Result<PathBuf> {
    let path = folder.join("release.tar");
    let mut programs = Vec::new();
    for name in ["penstock", "penstock-cni"] {
        // Most of an unoptimised program is about its source.
        let (whole, stripped) = (binary(name)?, folder.join(name));
        let mut strip = Command::new("strip");
        strip.arg("-o").arg(&stripped).arg(whole);
        process::run(strip)?;
        programs.push(stripped);
    }
    pack(
        &path,
        release::FOLDER,
        &programs,
        &[release::image(release::NAME)],
    )?;
    Ok(path)
}

/// Writes images of programs in a folder of theirs, and of what these are linked with.
fn pack(path: &Path, folder: &str, programs: &[PathBuf], images: &[Image<'_>]) -> Result<()> {
    let mut layer = LayerBuilder::default();
    let mut needed: Vec<String> = Vec::new();
    for program in programs {
        needed.extend(libraries(program)?);
        let name = program.file_name().context("a program has no name")?;
        let inside = Path::new(folder).join(name);
        layer = layer.program(inside.to_str().context("a path is no text")?, program)?;
    }
    needed.sort();
    needed.dedup();
    for library in needed {
        layer = layer.program(&library, Path::new(&library))?;
    }
    penstock_image::write(path, &layer.finish()?, images)
        .with_context(|| format!("writing {}", path.display()))
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
