//! The kube-proxy program that is compared: where it is, and what of it can be compared here.

use std::path::PathBuf;

use penstock_testbed::{ProxyMode, ProxyProgram};

use super::{ipvs, nftables};

/// A kube-proxy, and an API server to tell it of services.
#[derive(Clone, Debug)]
pub struct Program {
    /// The folder with etcd, kube-apiserver and kubectl.
    pub assets: PathBuf,
    /// kube-proxy.
    pub proxy: ProxyProgram,
}

/// Where kube-proxy is: in KUBEBUILDER_ASSETS, else in $PATH.
pub fn find() -> Option<PathBuf> {
    let assets = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = assets.into_iter().chain(std::env::split_paths(&path));
    folders
        .map(|folder| folder.join("kube-proxy"))
        .find(|path| path.exists())
}

/// Why there is none to be compared, where there is none.
const MISSING: &str = "there is no kube-proxy that says its version: it is to be in KUBEBUILDER_ASSETS or $PATH, and etcd, kube-apiserver \
    and kubectl in KUBEBUILDER_ASSETS";

/// The program, if it is there and all that it needs.
pub fn found() -> Option<Program> {
    let assets = PathBuf::from(std::env::var_os("KUBEBUILDER_ASSETS")?);
    let is_there = |program| assets.join(program).exists();
    let proxy = ProxyProgram::at(find()?).ok()?;
    let has_all = ["etcd", "kube-apiserver", "kubectl"]
        .into_iter()
        .all(is_there);
    has_all.then_some(Program { assets, proxy })
}

/// The same, with a word about which one it is.
pub fn introduced() -> Option<Program> {
    let found = found();
    if let Some(program) = &found {
        let nftables = if program.proxy.has_nftables() {
            "its own nftables mode"
        } else {
            "no nftables mode, whose rules are written for it"
        };
        let (version, path) = (&program.proxy.version, program.proxy.path.display());
        println!("kube-proxy: {version}, {path}, {nftables}");
    }
    found
}

/// Why a mode of kube-proxy's can't be compared here, if it can't.
pub fn missing(mode: ProxyMode, kube_proxy: Option<&Program>) -> Option<String> {
    let without = || kube_proxy.is_none().then(|| MISSING.to_owned());
    match mode {
        ProxyMode::Iptables => without(),
        ProxyMode::Ipvs => without().or_else(ipvs::missing),
        // Its rules are written where there is no kube-proxy.
        ProxyMode::Nftables => nftables::missing(),
    }
}
