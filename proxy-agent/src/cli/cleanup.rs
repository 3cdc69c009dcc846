//! `penstock cleanup`: takes everything out of the kernel again.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};

use super::CleanupArgs;
use crate::{attach::interface, ipc};

/// Removes all pins under the bpffs folder; a program that nothing refers to is gone with them.
pub(super) async fn run(args: &CleanupArgs) -> Result<()> {
    let place = &args.place;
    let running = ipc::fetch(&place.run_dir).await.unwrap_or_default();
    if let Some(agent) = running
        && !args.force
    {
        bail!(
            "the agent of node {} (process {}) is running and would put everything back; stop it \
             first, or pass --force",
            agent.node,
            agent.pid
        );
    }
    let filters = interface::remove_filters();
    let pins = remove(&place.bpffs)?;
    if pins + filters == 0 {
        println!("nothing to remove under {}", place.bpffs.display());
    } else {
        println!(
            "removed {pins} pins under {} and {filters} filters",
            place.bpffs.display()
        );
    }
    Ok(())
}

/// Removes a folder and what is in it; how many files there were.
fn remove(folder: &Path) -> Result<usize> {
    if !folder.exists() {
        return Ok(0);
    }
    let mut removed = 0;
    let read = || format!("reading {}", folder.display());
    for entry in fs::read_dir(folder).with_context(read)? {
        let path = entry.with_context(read)?.path();
        if path.is_dir() {
            removed += remove(&path)?;
        } else {
            fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
            removed += 1;
        }
    }
    fs::remove_dir(folder).with_context(|| format!("removing {}", folder.display()))?;
    Ok(removed)
}
