//! `penstock cleanup`: takes everything out of the kernel again, and the network from the runtime.

use std::{fs, io, path::Path};

use anyhow::{Context, Result, bail};
use penstock_cni::{network::FILE, state};

use super::{CleanupArgs, Place};
use crate::{
    attach::interface,
    dataplane::pins::{PinError, Pins},
    ipc,
    network::{self, install::Installed},
};

/// Pods that are named; more are counted.
const NAMED: usize = 5;

/// Removes all pins under the bpffs folder; a program that nothing refers to is gone with them. Then what
/// connects nodes, and what tells the runtime that pods can be connected.
pub(super) async fn run(args: &CleanupArgs) -> Result<()> {
    let place = &args.place;
    require_bpffs(&place.bpffs)?;
    let configuration = args.cni_conf_dir.join(&args.cni_conf_name);
    let installed = Installed::find(&configuration, &place.run_dir)?;
    let described = place.run_dir.join(FILE);
    let has_network = installed.is_some() || described.exists();
    if !args.force {
        refuse_beside_an_agent(place).await?;
        match &installed {
            Some(installed) => refuse_beside_pods(installed)?,
            None if has_network => bail!(
                "{} says that an agent had a network for pods, and {} is not its configuration: say where \
                 that is (--cni-conf-dir, --cni-conf-name), so that no pod loses its network, or pass --force",
                described.display(),
                configuration.display()
            ),
            None => {}
        }
    }
    let mut removed = Vec::new();
    // First of all: what comes after it takes pods' network away, and no more are to be added.
    if let Some(installed) = &installed {
        installed.withdraw()?;
        removed.push(installed.path().display().to_string());
    }
    match fs::remove_file(&described) {
        Ok(()) => removed.push(described.display().to_string()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => {
            return Err(error).with_context(|| format!("removing {}", described.display()));
        }
    }
    let filters = interface::remove_filters();
    let pins = remove_pins(&place.bpffs)?;
    // The overlay of an agent with another run directory is not this one's to remove.
    let kernel = if has_network || args.force {
        network::remove().await?
    } else {
        network::Removed::default()
    };
    if pins > 0 {
        removed.push(format!("{pins} pins under {}", place.bpffs.display()));
    }
    for (count, what) in [(filters, "filters"), (kernel.routes, "routes")] {
        if count > 0 {
            removed.push(format!("{count} {what}"));
        }
    }
    if kernel.device {
        removed.push(format!("the device {}", network::DEVICE));
    }
    if removed.is_empty() {
        println!("nothing to remove under {}", place.bpffs.display());
    } else {
        println!("removed {}", removed.join(", "));
    }
    Ok(())
}

/// What a running agent does about a cleanup.
const UNDONE: &str = "would put everything back within a second";

/// Fails if an agent is running.
async fn refuse_beside_an_agent(place: &Place) -> Result<()> {
    if let Some(agent) = ipc::report(&place.run_dir).await? {
        bail!(
            "the agent of node {} (process {}) is running and {UNDONE}; stop it first, or pass \
             --force",
            agent.node,
            agent.pid
        );
    }
    // One may be there that another run directory leads to.
    for version in fs::read_dir(&place.bpffs).into_iter().flatten().flatten() {
        let path = version.path();
        if matches!(
            Pins::within(path.clone()).lock(),
            Err(PinError::Busy { .. })
        ) {
            bail!(
                "an agent uses {} and {UNDONE}; it does not answer at {}: stop it first, pass its \
                 --run-dir, or pass --force",
                path.display(),
                place.run_dir.display()
            );
        }
    }
    Ok(())
}

/// Fails if the network has pods: they would reach nobody, and the runtime could not end them.
fn refuse_beside_pods(installed: &Installed) -> Result<()> {
    let path = installed.state();
    let pods = match path.exists() {
        true => state::read(&path).with_context(
            || "finding out who is on the network; pass --force to take it away from whoever is",
        )?,
        false => return Ok(()),
    };
    if pods.is_empty() {
        return Ok(());
    }
    let names = pods.iter().take(NAMED).map(|pod| match &pod.pod {
        Some(name) => format!("{}/{}", name.namespace, name.name),
        None => pod.key.container.clone(),
    });
    let names: Vec<String> = names.collect();
    let more = pods.len().saturating_sub(NAMED);
    let and = if more > 0 {
        format!(" and {more} more")
    } else {
        String::new()
    };
    bail!(
        "pods of this node are on the network that would go: {}{and}; drain the node first (all but \
         pods with hostNetwork have to end), or pass --force",
        names.join(", ")
    );
}

/// Fails if a folder is there and can't have pins.
fn require_bpffs(folder: &Path) -> Result<()> {
    /// Of the kernel's uapi/linux/magic.h.
    const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
    if !folder.exists() {
        return Ok(());
    }
    let kind = nix::sys::statfs::statfs(folder)
        .with_context(|| format!("looking at {}", folder.display()))?;
    if kind.filesystem_type().0 as u64 & 0xffff_ffff != BPF_FS_MAGIC {
        bail!(
            "{} is on no bpffs, so that no pins can be there: is --bpffs what the agent had?",
            folder.display()
        );
    }
    Ok(())
}

/// Removes the pins of all versions in a folder of the agent's, and the folder if nothing else is in it; how
/// many pins there were.
fn remove_pins(folder: &Path) -> Result<usize> {
    if !folder.exists() {
        return Ok(0);
    }
    let about = || format!("looking at {}", folder.display());
    let mut removed = 0;
    for entry in fs::read_dir(folder).with_context(about)? {
        let entry = entry.with_context(about)?;
        if Pins::is_version(&entry.file_name()) {
            removed += remove(&entry.path())?;
        }
    }
    // Somebody else's pins stay, and with them the folder.
    let _ = fs::remove_dir(folder);
    Ok(removed)
}

/// Removes a folder and what is in it, and nothing that links there lead to; how many files there were.
fn remove(folder: &Path) -> Result<usize> {
    let mut removed = 0;
    let read = || format!("reading {}", folder.display());
    for entry in fs::read_dir(folder).with_context(read)? {
        let entry = entry.with_context(read)?;
        let path = entry.path();
        if entry.file_type().with_context(read)?.is_dir() {
            removed += remove(&path)?;
        } else {
            fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
            removed += 1;
        }
    }
    fs::remove_dir(folder).with_context(|| format!("removing {}", folder.display()))?;
    Ok(removed)
}
