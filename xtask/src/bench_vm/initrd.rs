//! What a machine that runs the benchmark is booted with: what every contender needs of the kernel and
//! of other programs, and an init that runs it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{ASSETS, Binaries, PROGRAMS};
use crate::emulation::{
    fetch::{self, Image},
    tree::{MOUNTS, NETWORK_MODULES, NETWORK_TOOLS, Tree},
};

/// What kube-proxy's modes and Penstock's network are made of. Nothing is there to load what its rules ask for, so all of it is
/// said; some of it is in `nf_tables` since Linux 6.2 and is no module there.
const MODULES: &[&str] = &[
    // What Penstock's own network is made of.
    "vxlan",
    // IPVS, the schedulers without which kube-proxy refuses it (CanUseIPVSProxier), and the interface that
    // holds services' addresses.
    "ip_vs",
    "ip_vs_rr",
    "ip_vs_wrr",
    "ip_vs_sh",
    "dummy",
    "ip_set_bitmap_port",
    "ip_set_hash_ip",
    "ip_set_hash_ipport",
    "ip_set_hash_ipportip",
    "ip_set_hash_ipportnet",
    "xt_set",
    // The rules of iptables, which are those of nftables with the former's matches and targets.
    "nft_compat",
    "xt_addrtype",
    "xt_comment",
    "xt_conntrack",
    "xt_mark",
    "xt_MASQUERADE",
    "xt_multiport",
    "xt_nat",
    "xt_physdev",
    "xt_recent",
    "xt_statistic",
    "xt_tcpudp",
    "ipt_REJECT",
    "ip6t_REJECT",
    // The rules of nftables.
    "nft_chain_nat",
    "nft_ct",
    "nft_masq",
    "nft_nat",
    "nft_numgen",
    "nft_objref",
    "nft_reject_inet",
    "nft_reject_ipv4",
    "nft_reject_ipv6",
    "nf_conntrack_netlink",
];

/// What contenders and the API server's keys are made with.
const TOOLS: &[&str] = &[
    "/usr/sbin/iptables",
    "/usr/sbin/iptables-save",
    "/usr/sbin/iptables-restore",
    "/usr/sbin/ip6tables",
    "/usr/sbin/ip6tables-save",
    "/usr/sbin/ip6tables-restore",
    "/usr/sbin/ipset",
    "/usr/sbin/nft",
    "/usr/bin/openssl",
];
/// Where iptables finds what it knows of matches and targets.
const EXTENSIONS: &str = "/usr/lib/x86_64-linux-gnu/xtables";
/// Without which openssl makes no certificate, and ipset knows no protocol by its name.
const FILES: &[&str] = &["/usr/lib/ssl/openssl.cnf", "/etc/protocols"];

/// Builds the initrd.
pub fn build(
    image: &Image,
    binaries: &Binaries,
    environment: &[(&str, String)],
    benchmark: &[&str],
) -> Result<PathBuf> {
    // A new folder each time: nothing of an earlier build is booted.
    let folder = tempfile::tempdir_in(&image.folder).context("making a folder")?;
    let tree = Tree::new(folder.path())?;
    tree.tools(NETWORK_TOOLS)?;
    tree.tools(TOOLS)?;
    for extension in fetch::entries(Path::new(EXTENSIONS)) {
        tree.copy(&extension, &below(&extension))?;
    }
    for file in FILES {
        tree.copy(Path::new(file), &below(Path::new(file)))?;
    }
    // A folder that cargo's would be, where programs of this workspace look for each other.
    let programs = format!("target/{}", binaries.profile);
    for (_, program) in PROGRAMS {
        tree.stripped(&binaries.path(program), &format!("{programs}/{program}"))?;
    }
    for program in ASSETS {
        tree.program(&binaries.assets.join(program), &format!("assets/{program}"))?;
    }
    let modules = tree.modules(image, &[NETWORK_MODULES, MODULES].concat())?;
    tree.init(&init(&modules, environment, &programs, benchmark))?;
    let initrd = image.folder.join("initrd");
    tree.pack(&initrd)?;
    Ok(initrd)
}

/// The same place in a tree.
fn below(path: &Path) -> String {
    path.to_string_lossy().trim_start_matches('/').to_owned()
}

/// What runs first: the benchmark, whose results are a line of the report.
fn init(
    modules: &str,
    environment: &[(&str, String)],
    programs: &str,
    benchmark: &[&str],
) -> String {
    let environment: String = environment
        .iter()
        .map(|(name, value)| format!("export {name}={}\n", quoted(value)))
        .collect();
    let benchmark: Vec<String> = benchmark.iter().map(|word| quoted(word)).collect();
    let benchmark = benchmark.join(" ");
    format!(
        "#!/bin/sh\n\
         export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/tmp\n\
         export KUBEBUILDER_ASSETS=/assets PENSTOCK_PATIENCE=60 RUST_BACKTRACE=0\n\
         {environment}\
         {MOUNTS}\
         {modules}\
         ip link set lo up\n\
         echo \"@@up\"\n\
         if [ -e /proc/net/ip_vs ]; then\n\
         /{programs}/penstock-bench --results /results --name vm {benchmark}\n\
         echo \"@@status $?\"\n\
         echo \"@@results $(cat /results/vm.json)\"\n\
         else echo \"this kernel has no IPVS\"; fi\n\
         echo \"@@end\"\n\
         reboot -f\n"
    )
}

/// A word as a shell takes it for one.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_gives_the_benchmark_its_words_back() {
        let words = [
            "services",
            "--only",
            "one processor",
            "it's $HOME \\ \"so\"",
        ];
        let init = init("", &[("ABOUT", "a 'b'".to_owned())], "bin", &words);
        let line = init
            .lines()
            .find(|line| line.contains("penstock-bench"))
            .unwrap();
        let (_, arguments) = line.split_once("--name vm ").unwrap();
        let export = init.lines().find(|line| line.contains("ABOUT")).unwrap();
        let script = format!("{export}\nprintf '%s\\n' \"$ABOUT\" {arguments}");
        let output = std::process::Command::new("sh")
            .args(["-c", &script])
            .output()
            .unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let expected = [&["a 'b'"], &words[..]].concat();
        assert_eq!(said.lines().collect::<Vec<_>>(), expected);
    }
}
