//! `penstock cleanup`: takes everything out of the kernel again.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};

use super::{CleanupArgs, Place};
use crate::{
    attach::interface,
    dataplane::pins::{PinError, Pins},
    ipc,
};

/// Removes all pins under the bpffs folder; a program that nothing refers to is gone with them.
pub(super) async fn run(args: &CleanupArgs) -> Result<()> {
    let place = &args.place;
    if !args.force {
        refuse_beside_an_agent(place).await?;
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
