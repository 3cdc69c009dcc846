//! What a machine that runs the tests is booted with: the testbed's modules and tools, our binaries, and
//! an init that runs the tests.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Binaries, Group};
use crate::emulation::{
    fetch::Image,
    tree::{MOUNTS, NETWORK_MODULES, NETWORK_TOOLS, Tree},
};

/// Where the tests look for programs: a folder that cargo's would be.
const PROGRAMS: &str = "target/debug";

/// Builds the initrd.
pub fn build(image: &Image, binaries: &Binaries, tests: &[Group]) -> Result<PathBuf> {
    // A new folder each time: nothing of an earlier build is booted.
    let folder = tempfile::tempdir_in(&image.folder).context("making a folder")?;
    let tree = Tree::new(folder.path())?;
    tree.tools(NETWORK_TOOLS)?;
    let programs = [
        ("penstock", &binaries.agent),
        ("penstock-traffic", &binaries.traffic),
    ];
    let tests_of = binaries.tests.iter().map(|(name, path)| (*name, path));
    for (name, binary) in programs.into_iter().chain(tests_of) {
        tree.stripped(Path::new(binary), &format!("{PROGRAMS}/{name}"))?;
    }
    let modules = tree.modules(image, NETWORK_MODULES)?;
    tree.init(&init(&modules, tests))?;
    let initrd = image.folder.join("initrd");
    tree.pack(&initrd)?;
    Ok(initrd)
}

/// What runs first: the tests, one process each, reported on the second serial line.
fn init(modules: &str, tests: &[Group]) -> String {
    let tests: Vec<String> = tests
        .iter()
        .flat_map(|(group, names)| names.iter().map(move |name| format!("{group}:{name}")))
        .collect();
    let tests = tests.join(" ");
    // The tests' own numbers are for a machine that is not emulated. In CI what can't run fails.
    format!(
        "#!/bin/sh\n\
         export PATH=/bin:/sbin:/usr/sbin PENSTOCK_PATIENCE=120 PENSTOCK_KILLS=3 CI=1 RUST_BACKTRACE=0\n\
         {MOUNTS}\
         {modules}\
         ip link set lo up\n\
         echo \"@@up\"\n\
         for each in {tests}; do\n\
         test=${{each#*:}}\n\
         began=$(cut -d' ' -f1 /proc/uptime)\n\
         if /{PROGRAMS}/${{each%%:*}} --exact $test --include-ignored --test-threads 1 --nocapture\n\
         then verdict=pass; else verdict=fail; fi\n\
         echo \"@@$verdict $test $began $(cut -d' ' -f1 /proc/uptime)\"\n\
         done\n\
         echo \"@@end\"\n\
         reboot -f\n"
    )
}
