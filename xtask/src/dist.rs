//! What is shipped, in a folder where no plain `cargo build` replaces anything: the agent and the CNI
//! plugin, and a container image of both. They are static programs: the plugin is copied to hosts, whose
//! libraries are anybody's, and the image has none.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use penstock_image::{LayerBuilder, release};

use crate::run::{cargo, in_root, root};

const AGENT: &str = "penstock";
const AGENT_PACKAGE: &str = "penstock-agent";
const PLUGIN: &str = "penstock-cni";
/// The image's archive.
const ARCHIVE: &str = "penstock-image.tar";

/// Puts both programs into `target/dist`, built with optimisation.
pub fn collect() -> Result<Vec<PathBuf>> {
    build(&[(AGENT_PACKAGE, AGENT), (PLUGIN, PLUGIN)])
}

/// Puts the plugin there alone.
pub fn plugin() -> Result<()> {
    build(&[(PLUGIN, PLUGIN)]).map(drop)
}

/// Puts programs of these packages there.
fn build(wanted: &[(&str, &str)]) -> Result<Vec<PathBuf>> {
    let target = host()?;
    // With a target of its own, build scripts and macros are not meant by these flags: a macro is
    // a library that the compiler loads, and can't be static.
    in_root(
        cargo("build")
            .arg("--release")
            .args(
                wanted
                    .iter()
                    .flat_map(|(package, program)| ["--package", package, "--bin", program]),
            )
            .args(["--target", &target])
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            .env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo"),
    )?;
    let built = root().join("target").join(&target).join("release");
    let folder = folder()?;
    let mut programs = Vec::new();
    for (_, name) in wanted {
        let program = built.join(name);
        ensure!(
            is_static(&program)?,
            "{} needs a loader; it has to run on any host",
            program.display()
        );
        let to = put(&program, &folder)?;
        eprintln!("{}", to.display());
        programs.push(to);
    }
    Ok(programs)
}

/// Packs both as an image called `name`.
pub fn image(name: &str) -> Result<()> {
    // A name without its host means another registry to each tool, and one without a tag another time.
    let (host, rest) = name.split_once('/').unwrap_or_default();
    let has_tag = rest
        .rsplit_once(':')
        .is_some_and(|(_, tag)| !tag.is_empty());
    ensure!(
        !host.is_empty() && has_tag && !rest.contains('@'),
        "{name} is no whole name of an image; write one like {}",
        release::NAME
    );
    let mut layer = LayerBuilder::default();
    for program in collect()? {
        let inside = Path::new(release::FOLDER).join(program.file_name().unwrap_or_default());
        let inside = inside.to_str().context("a program's name is text")?;
        layer = layer.program(inside, &program)?;
    }
    let archive = folder()?.join(ARCHIVE);
    let new = archive.with_extension("new");
    penstock_image::write(&new, &layer.finish()?, &[release::image(name)])?;
    fs::rename(&new, &archive).with_context(|| format!("replacing {}", archive.display()))?;
    eprintln!("{}: {name}", archive.display());
    Ok(())
}

/// Where it all is put.
fn folder() -> Result<PathBuf> {
    let folder = root().join("target/dist");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    Ok(folder)
}

/// Copies a program into a folder whole: it may be running there.
fn put(program: &Path, folder: &Path) -> Result<PathBuf> {
    let name = program.file_name().context("a program has a name")?;
    let to = folder.join(name);
    let new = to.with_extension("new");
    fs::copy(program, &new)
        .with_context(|| format!("copying {} to {}", program.display(), new.display()))?;
    fs::rename(&new, &to).with_context(|| format!("replacing {}", to.display()))?;
    Ok(to)
}

/// Whether a program needs no loader, and so no library: none of its ELF segments names one.
fn is_static(program: &Path) -> Result<bool> {
    /// What a loader's name is in (elf(5), PT_INTERP).
    const INTERPRETER: u32 = 3;
    let content = fs::read(program).with_context(|| format!("reading {}", program.display()))?;
    let bytes = |at: usize, count: usize| {
        let found = content.get(at..at.saturating_add(count));
        found.with_context(|| format!("{} is no program", program.display()))
    };
    ensure!(
        bytes(0, 6)? == b"\x7fELF\x02\x01",
        "{} is no program of 64 bits, little-endian",
        program.display()
    );
    let number = |at, count| -> Result<usize> {
        let bytes = bytes(at, count)?.iter().rev();
        Ok(bytes.fold(0, |number, byte| number << 8 | usize::from(*byte)))
    };
    // e_phoff, e_phentsize and e_phnum.
    let (first, size, count) = (number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?);
    for index in 0..count {
        if number(first + index * size, 4)? == INTERPRETER as usize {
            return Ok(false);
        }
    }
    Ok(true)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_with_a_loader_is_told_from_one_without() {
        let own = std::env::current_exe().unwrap();
        assert!(!is_static(&own).unwrap(), "a test is linked dynamically");
        // The same without the name of its loader.
        let mut content = fs::read(&own).unwrap();
        let number = |content: &[u8], at: usize| usize::from(content[at]);
        let (first, size) = (number(&content, 0x20), number(&content, 0x36));
        for index in 0..number(&content, 0x38) {
            let at = first + index * size;
            if content[at..at + 4] == [3, 0, 0, 0] {
                content[at] = 0;
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let other = folder.path().join("other");
        fs::write(&other, content).unwrap();
        assert!(is_static(&other).unwrap());
        fs::write(&other, "#!/bin/sh").unwrap();
        assert!(is_static(&other).is_err());
    }
}
