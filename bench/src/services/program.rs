//! The kube-proxy program that is compared: where it is.

use std::path::PathBuf;

use penstock_testbed::{ProxyProgram, require_api_server};

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

/// The program, or a word about its being left out.
pub fn required() -> Option<Program> {
    let found = require_api_server().zip(find()).and_then(|(assets, path)| {
        let proxy = ProxyProgram::at(path).ok()?;
        Some(Program { assets, proxy })
    });
    if let Some(program) = &found {
        let nftables = if program.proxy.has_nftables() {
            "its own nftables mode"
        } else {
            "no nftables mode, whose rules are written for it"
        };
        let (version, path) = (&program.proxy.version, program.proxy.path.display());
        println!("kube-proxy: {version}, {path}, {nftables}");
    } else {
        println!(
            "WARNING: kube-proxy is left out: it is to be in KUBEBUILDER_ASSETS or $PATH, and etcd, \
             kube-apiserver and kubectl in KUBEBUILDER_ASSETS"
        );
    }
    found
}
