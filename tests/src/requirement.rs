//! What a test needs of its machine: said aloud when it is missing, and an error in CI.

use std::path::{Path, PathBuf};

/// `None`, after saying so, unless this process may load programs and pin maps.
#[must_use]
pub fn require_kernel() -> Option<()> {
    if !nix::unistd::geteuid().is_root() {
        return missing("root, to load programs and make network namespaces");
    }
    if !Path::new("/sys/fs/bpf").exists() {
        return missing("a kernel with bpffs");
    }
    Some(())
}

/// `None`, after saying so, unless interfaces can have VLANs as well.
#[must_use]
pub fn require_vlans() -> Option<()> {
    require_kernel()?;
    // It is where the module is there, or has been built in.
    if Path::new("/proc/net/vlan").exists() {
        return Some(());
    }
    missing("a kernel with VLANs (modprobe 8021q)")
}

/// Where etcd and kube-apiserver are; `None`, after saying so, if that is not known.
#[must_use]
pub fn require_api_server() -> Option<PathBuf> {
    require_kernel()?;
    let assets = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    match assets.filter(|assets| assets.join("kube-apiserver").exists()) {
        Some(assets) => Some(assets),
        None => missing("KUBEBUILDER_ASSETS, a folder with etcd and kube-apiserver"),
    }
}

/// Where etcd, kube-apiserver and kube-proxy are, and iptables is installed; `None`, after saying so,
/// if not.
#[must_use]
pub fn require_kube_proxy() -> Option<PathBuf> {
    let assets = require_api_server()?;
    if !assets.join("kube-proxy").exists() {
        return missing("kube-proxy in KUBEBUILDER_ASSETS");
    }
    if !Path::new("/usr/sbin/iptables").exists() {
        return missing("/usr/sbin/iptables (package iptables)");
    }
    Some(assets)
}

/// Where etcd, kube-apiserver and kubelet are, and containerd is installed with its plugins; `None`,
/// after saying so, if not.
#[must_use]
pub fn require_kubelet() -> Option<PathBuf> {
    let assets = require_api_server()?;
    if !assets.join("kubelet").exists() {
        return missing("kubelet in KUBEBUILDER_ASSETS");
    }
    let installed = [
        ("/usr/bin/containerd", "containerd"),
        ("/usr/sbin/runc", "runc"),
        ("/usr/lib/cni/bridge", "containernetworking-plugins"),
    ];
    for (file, package) in installed {
        if !Path::new(file).exists() {
            return missing(&format!("{file} (package {package})"));
        }
    }
    Some(assets)
}

/// Says what is missing; in CI nothing may be.
fn missing<T>(what: &str) -> Option<T> {
    #[expect(clippy::panic, reason = "in CI a test that can't run is a failure")]
    if std::env::var_os("CI").is_some() {
        panic!("this test needs {what}");
    }
    eprintln!("SKIPPED: this test needs {what}");
    None
}
