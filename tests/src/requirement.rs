//! What a test needs of its machine: said aloud when it is missing, and an error in CI.

use std::path::Path;

/// `None`, after saying so, unless this process may load programs and pin maps.
#[must_use]
pub fn require_kernel() -> Option<()> {
    if !nix::unistd::geteuid().is_root() {
        return missing("root, to load programs");
    }
    if !Path::new("/sys/fs/bpf").exists() {
        return missing("a kernel with bpffs");
    }
    Some(())
}

/// Says what is missing; in CI nothing may be.
fn missing(what: &str) -> Option<()> {
    #[expect(clippy::panic, reason = "in CI a test that can't run is a failure")]
    if std::env::var_os("CI").is_some() {
        panic!("this test needs {what}");
    }
    eprintln!("SKIPPED: this test needs {what}");
    None
}
