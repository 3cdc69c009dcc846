//! A file that takes long to open, as one on a network file system may.
#![expect(unsafe_code, reason = "no library here offers leases")]

use std::{fs::File, io, os::fd::AsRawFd, path::Path};

use anyhow::{Context, Result};

/// include/uapi/asm-generic/fcntl.h
const F_SETSIG: libc::c_int = 10;
const WRITING: libc::c_int = libc::F_WRLCK as libc::c_int;

/// Whoever opens the file waits until this is dropped, or for /proc/sys/fs/lease-break-time.
pub struct Lease(File);

impl Lease {
    /// Takes a write lease on a file that nobody has open (fcntl(2), "Leases").
    pub fn take(path: &Path) -> Result<Self> {
        let what = || format!("taking a lease on {}", path.display());
        let file = File::options().read(true).write(true).open(path);
        let file = file.with_context(what)?;
        let control = |command, argument: libc::c_int| {
            // SAFETY: both commands take a plain number, and the descriptor is open.
            match unsafe { libc::fcntl(file.as_raw_fd(), command, argument) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        };
        // Who holds a lease is signalled when somebody comes; this signal is ignored.
        control(F_SETSIG, libc::SIGURG).with_context(what)?;
        control(libc::F_SETLEASE, WRITING).with_context(what)?;
        Ok(Self(file))
    }

    /// Whether somebody waits.
    pub fn is_wanted(&self) -> bool {
        // SAFETY: takes no argument, and the descriptor is open.
        let kind = unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_GETLEASE) };
        kind != WRITING
    }
}
