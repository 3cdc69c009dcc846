//! Debian's kernels under QEMU's emulation, so neither KVM nor a spare machine is needed: fetched,
//! given an initrd with nothing that they don't need, and watched.

pub mod emulator;
pub mod fetch;
pub mod modules;
pub mod tree;

use std::process::Command;

use anyhow::{Context, Result, bail};

/// A kernel that is known here.
pub struct Kernel {
    /// What it is called on the command line.
    pub name: &'static str,
    /// The Debian suite whose cloud kernel it is.
    suite: &'static str,
}

/// The oldest that Debian supports (filters of a clsact qdisc, `bpf_set_retval` just there), the
/// long-term one with TCX, and whatever is newest.
pub const KERNELS: &[Kernel] = &[
    Kernel {
        name: "6.1",
        suite: "bookworm",
    },
    Kernel {
        name: "6.12",
        suite: "trixie",
    },
    Kernel {
        name: "newest",
        suite: "sid",
    },
];

impl Kernel {
    /// The kernel of that name.
    pub fn named(name: &str) -> Result<&'static Self> {
        let known: Vec<&str> = KERNELS.iter().map(|kernel| kernel.name).collect();
        KERNELS
            .iter()
            .find(|kernel| kernel.name == name)
            .with_context(|| format!("no kernel {name} is known; there are {}", known.join(", ")))
    }

    /// Its files; fetched if they are not there.
    pub fn image(&self) -> Result<fetch::Image> {
        fetch::kernel(self.name, self.suite)
    }
}

/// Refuses machines whose binaries would not run in an emulated one.
pub fn require_architecture() -> Result<()> {
    if std::env::consts::ARCH != "x86_64" {
        bail!("the kernels are emulated for x86-64, and only its binaries are at hand here");
    }
    Ok(())
}

/// Runs a command to its end; what it printed.
pub fn output_of(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("starting {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?} ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_kernel_is_named() {
        let error = Kernel::named("2.4").err().map(|error| error.to_string());
        assert!(error.is_some_and(|error| error.contains("2.4")));
        assert!(
            KERNELS
                .iter()
                .all(|kernel| Kernel::named(kernel.name).is_ok())
        );
    }
}
