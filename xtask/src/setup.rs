//! Installs what is missing, and nothing else: Debian packages, and bpf-linker into `target/tools`.
//!
//! A rustup nightly with rust-src and an installed bpf-linker are as good; then nothing is
//! installed for building.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, bail};

use crate::run::{cargo, in_root, root, succeeds};

/// What the kernel programs are built with: a file that tells that a package is there, and the
/// package. Compiler and linker must share one LLVM.
const COMPILER: &[(&str, &str)] = &[
    ("/usr/bin/rustc", "rustc-web"),
    (
        "/usr/lib/rustlib/src/rust/library/core/Cargo.toml",
        "rust-web-src",
    ),
    ("/usr/bin/cargo", "cargo-web"),
    ("/usr/bin/clippy-driver", "rust-web-clippy"),
];
/// What bpf-linker is built with.
const LINKER: &[(&str, &str)] = &[
    ("/usr/lib/llvm-22/bin/llvm-config", "llvm-22-dev"),
    ("/usr/lib/llvm-22/lib/libPolly.a", "libpolly-22-dev"),
    ("/usr/include/zlib.h", "zlib1g-dev"),
    ("/usr/include/zstd.h", "libzstd-dev"),
];
/// What tests, demo and benchmark start.
const PROGRAMS: &[(&str, &str)] = &[
    ("/usr/bin/containerd", "containerd"),
    ("/usr/lib/cni/bridge", "containernetworking-plugins"),
    ("/usr/bin/curl", "curl"),
    ("/usr/sbin/ethtool", "ethtool"),
    ("/bin/ip", "iproute2"),
    ("/usr/sbin/iptables", "iptables"),
    ("/usr/bin/nsenter", "util-linux"),
    ("/usr/bin/openssl", "openssl"),
    ("/usr/sbin/runc", "runc"),
    ("/sbin/sysctl", "procps"),
];

/// What other kernels are unpacked, packed and run with.
const EMULATION: &[(&str, &str)] = &[
    ("/usr/bin/qemu-system-x86_64", "qemu-system-x86"),
    ("/usr/bin/cpio", "cpio"),
    ("/bin/busybox", "busybox-static"),
    ("/usr/bin/xz", "xz-utils"),
    ("/usr/bin/strip", "binutils"),
];

/// What the benchmark compares with.
const CONTENDERS: &[(&str, &str)] = &[
    ("/usr/sbin/ipset", "ipset"),
    ("/usr/sbin/iptables", "iptables"),
    ("/usr/sbin/nft", "nftables"),
];

/// Load generators of others that the benchmark uses besides its own; it goes without them where they
/// can't be had.
const GENERATORS: &[(&str, &str)] = &[("/usr/bin/wrk", "wrk"), ("/usr/bin/iperf3", "iperf3")];

const LINKER_VERSION: &str = "0.13.0";

/// Everything that building and running needs.
pub fn all() -> Result<()> {
    let mut missing = packages_of(PROGRAMS);
    let has_nightly = has_nightly();
    if !has_nightly {
        missing.extend(packages_of(COMPILER));
    }
    let needs_linker = !has_linker();
    if needs_linker {
        missing.extend(packages_of(LINKER));
    }
    install(&missing)?;
    if needs_linker { linker() } else { Ok(()) }
}

/// What running other kernels needs besides.
pub fn emulation() -> Result<()> {
    install(&packages_of(EMULATION))
}

/// What the benchmark compares with, and what it measures by.
pub fn contenders() -> Result<()> {
    install(&packages_of(CONTENDERS))?;
    if let Err(error) = install(&packages_of(GENERATORS)) {
        eprintln!("setup: going on without them: {error:#}");
    }
    Ok(())
}

fn packages_of(list: &[(&str, &'static str)]) -> Vec<&'static str> {
    list.iter()
        .filter(|(file, _)| !Path::new(file).exists())
        .map(|(_, package)| *package)
        .collect()
}

fn has_nightly() -> bool {
    let source = "d=$(rustc --print sysroot)/lib/rustlib/src/rust/library; test -d \"$d\"";
    succeeds(Command::new("rustup").args(["run", "nightly", "sh", "-c", source]))
}

fn has_linker() -> bool {
    let ours = root().join("target/tools/bin/bpf-linker");
    succeeds(Command::new(ours).arg("--version"))
        || succeeds(Command::new("bpf-linker").arg("--version"))
}

fn install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    eprintln!("setup: installing Debian packages {}", packages.join(" "));
    if !succeeds(Command::new("apt-get").arg("--version")) {
        bail!(
            "this is no Debian machine; install the equivalents of {} yourself",
            packages.join(" ")
        );
    }
    let as_root = |arguments: &[&str]| {
        let is_root = succeeds(Command::new("sh").args(["-c", "test $(id -u) = 0"]));
        let mut command = Command::new(if is_root { "apt-get" } else { "sudo" });
        if !is_root {
            command.arg("apt-get");
        }
        command
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive");
        in_root(&mut command)
    };
    as_root(&["update", "-qq"]).context("refreshing the package lists")?;
    let arguments = [
        &["install", "-y", "-qq", "--no-install-recommends"],
        packages,
    ]
    .concat();
    as_root(&arguments).context("installing packages")
}

fn linker() -> Result<()> {
    eprintln!("setup: building bpf-linker {LINKER_VERSION} into target/tools (about a minute)");
    let target = root().join("target");
    in_root(
        cargo("install")
            .args(["bpf-linker", "--locked", "--version", LINKER_VERSION])
            .args(["--no-default-features", "--features", "llvm-22", "--root"])
            .arg(target.join("tools"))
            .env("CARGO_TARGET_DIR", target.join("tools-build"))
            .env("LLVM_PREFIX", "/usr/lib/llvm-22"),
    )
}

/// The file system that maps and links are pinned in.
pub fn bpffs() -> Result<()> {
    let is_mounted = std::fs::read_to_string("/proc/mounts")
        .context("reading /proc/mounts")?
        .lines()
        .any(|line| line.split(' ').nth(1) == Some("/sys/fs/bpf"));
    if is_mounted {
        return Ok(());
    }
    eprintln!("setup: mounting bpffs at /sys/fs/bpf");
    in_root(Command::new("mount").args(["-t", "bpf", "bpf", "/sys/fs/bpf"]))
}
