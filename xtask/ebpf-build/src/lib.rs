//! Builds a crate's programs for the kernel, for the build script of whoever loads them.
//!
//! They need a compiler with the standard library's source and bpf-linker; `cargo xtask setup`
//! installs what is missing. Two compilers will do: Debian's rustc-web with rust-web-src, and a
//! rustup nightly with rust-src.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";
const DEBIAN_SOURCE: &str = "/usr/lib/rustlib/src/rust/library/core/Cargo.toml";
const SETUP: &str = "run `cargo xtask setup`, or install a nightly toolchain with `rustup \
    toolchain install nightly --component rust-src` and `cargo install bpf-linker`";

/// Builds the binary `package` of the package of that name in the workspace, which is one folder above
/// the package whose build script calls this, and leaves it at `$OUT_DIR/{package}`. It is built anew
/// when one of `inputs`, paths below the workspace's folder, changes. `ready`, an environment variable,
/// names a ready-made object instead.
pub fn build(package: &str, inputs: &[&str], ready: &str) -> Result<(), String> {
    let object = PathBuf::from(variable("OUT_DIR")?).join(package);
    println!("cargo::rerun-if-env-changed={ready}");
    if let Some(ready) = env::var_os(ready) {
        let ready = PathBuf::from(ready);
        println!("cargo::rerun-if-changed={}", ready.display());
        return copy(&ready, &object);
    }
    // What cargo says now, not what it said as the script was compiled: a copy of a target directory
    // would build the programs of the checkout that it comes from.
    let root = Path::new(&variable("CARGO_MANIFEST_DIR")?).join("..");
    for input in inputs.iter().chain(&["Cargo.toml", "Cargo.lock"]) {
        println!("cargo::rerun-if-changed={}", root.join(input).display());
    }
    let target = target_dir(&object)?.join("ebpf");
    let built = compile(&root, package, &target)?;
    copy(&built, &object)?;
    strip(&object);
    Ok(())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|_| format!("cargo did not set {name}"))
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    fs::copy(from, to)
        .map(drop)
        .map_err(|error| format!("copying {} to {}: {error}", from.display(), to.display()))
}

/// The directory of this build's profiles: the nested build keeps its files beside ours, in a
/// directory of its own, since cargo holds a lock on ours.
fn target_dir(object: &Path) -> Result<PathBuf, String> {
    // TARGET/PROFILE/build/PACKAGE/out/OBJECT
    object
        .ancestors()
        .nth(5)
        .map(Path::to_path_buf)
        .ok_or_else(|| format!("{} is in no target directory", object.display()))
}

/// A compiler for the BPF target, as a command that takes cargo's arguments.
fn cargo() -> Result<Command, String> {
    let mut cargo = compiler()?;
    // What cargo tells a build script about the host's build is not for the nested one: its
    // compiler, for one, would be used in place of the nightly's.
    let own: Vec<_> = cargo.get_envs().map(|(name, _)| name.to_owned()).collect();
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let is_cargos = text.starts_with("CARGO") && text != "CARGO_HOME";
        let is_rustcs = text.starts_with("RUSTC") || text.starts_with("RUSTDOC");
        if (is_cargos || is_rustcs || text == "RUSTFLAGS") && !own.contains(&name) {
            cargo.env_remove(name);
        }
    }
    Ok(cargo)
}

fn compiler() -> Result<Command, String> {
    let has_debian = Path::new(DEBIAN_RUSTC).exists() && Path::new(DEBIAN_SOURCE).exists();
    if has_debian {
        let mut cargo = Command::new(DEBIAN_CARGO);
        cargo.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1");
        return Ok(cargo);
    }
    let nightly = Command::new("rustup")
        .args(["run", "nightly", "rustc", "--print", "sysroot"])
        .output()
        .ok()
        .filter(|output| output.status.success())
        .and_then(|output| String::from_utf8(output.stdout).ok())
        .is_some_and(|sysroot| {
            Path::new(sysroot.trim())
                .join("lib/rustlib/src/rust/library")
                .exists()
        });
    if nightly {
        let mut cargo = Command::new("rustup");
        cargo.args(["run", "nightly", "cargo"]);
        return Ok(cargo);
    }
    Err(format!(
        "no compiler with the standard library's source: {SETUP}"
    ))
}

fn compile(root: &Path, package: &str, target: &Path) -> Result<PathBuf, String> {
    let tools = root.join("target/tools/bin");
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths(std::iter::once(tools).chain(env::split_paths(&path)))
        .map_err(|error| format!("PATH: {error}"))?;
    if !env::split_paths(&path).any(|directory| directory.join("bpf-linker").exists()) {
        return Err(format!("no bpf-linker: {SETUP}"));
    }
    let mut cargo = cargo()?;
    let status = cargo
        .args(["build", "--quiet", "--package", package, "--bin", package])
        .args([
            "--profile",
            "ebpf",
            "--target",
            "bpfel-unknown-none",
            "-Z",
            "build-std=core",
        ])
        .arg("--target-dir")
        .arg(target)
        .current_dir(root)
        .env("PATH", path)
        .env(
            "RUSTFLAGS",
            "-C debuginfo=2 -C link-arg=--btf -C target-cpu=v3",
        )
        .env_remove("RUSTUP_TOOLCHAIN")
        .status()
        .map_err(|error| format!("starting cargo: {error}"))?;
    if !status.success() {
        return Err(format!(
            "cargo ended with {status}; its messages stand above"
        ));
    }
    Ok(target.join("bpfel-unknown-none/ebpf").join(package))
}

/// Takes DWARF out, which the kernel does not read; BTF stays. Without a tool the object is larger
/// and loads slower, which is all.
fn strip(object: &Path) {
    for tool in ["llvm-strip", "/usr/lib/llvm-22/bin/llvm-strip"] {
        let done = Command::new(tool).arg("--strip-debug").arg(object).status();
        if done.is_ok_and(|status| status.success()) {
            return;
        }
    }
}
