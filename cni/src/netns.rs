//! Work inside a container's network namespace, on a thread of its own: a thread that changed its
//! namespace is never used for anything else.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::{
    sched::{CloneFlags, setns},
    sys::statfs::{FsType, fstatfs},
};

use crate::error::Failure;

/// What the kernel's file system of namespaces is known by (NSFS_MAGIC).
const NAMESPACES: FsType = FsType(0x6e73_6673);

/// An open network namespace, which stays as long as this does.
#[derive(Debug)]
pub struct Netns {
    file: File,
    path: PathBuf,
}

impl Netns {
    /// Opens the namespace; `None` if it is gone, and at most its mount point is left.
    pub fn open(path: &Path) -> Result<Option<Self>, Failure> {
        let failure = || Failure::io(format!("opening the network namespace {}", path.display()));
        let file = match File::open(path) {
            Ok(file) => file,
            // The latter where the path leads through a process that has ended.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc_errno::ENOENT | libc_errno::ESRCH)
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(failure()(error)),
        };
        let found = fstatfs(&file).map_err(|error| failure()(error.into()))?;
        Ok((found.filesystem_type() == NAMESPACES).then(|| Self {
            file,
            path: path.to_owned(),
        }))
    }

    /// The namespace's descriptor.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is the one that the plugin runs in.
    pub fn is_own(&self) -> Result<bool, Failure> {
        const OWN: &str = "/proc/self/ns/net";
        let failure = || Failure::io(format!("comparing {} with {OWN}", self.path.display()));
        let own = fs::metadata(OWN).map_err(failure())?;
        let this = self.file.metadata().map_err(failure())?;
        Ok((own.dev(), own.ino()) == (this.dev(), this.ino()))
    }

    /// Runs `work` inside.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> Result<T, Failure> {
        let enter = || {
            setns(&self.file, CloneFlags::CLONE_NEWNET)?;
            work()
        };
        let result = std::thread::scope(|scope| scope.spawn(enter).join());
        let result = result.map_err(|_| {
            Failure::Internal(format!("a thread in {} panicked", self.path.display()))
        })?;
        result.map_err(Failure::io(format!(
            "working in the network namespace {}",
            self.path.display()
        )))
    }

    /// Makes an interface inside use IPv6 without asking anybody: no duplicate address detection,
    /// whose delay pods would wait for, and no router solicitations, for there is one router.
    pub fn quiet_ipv6(&self, ifname: &str) -> Result<(), Failure> {
        let folder = Path::new("/proc/sys/net/ipv6/conf").join(ifname);
        self.run(move || {
            for (file, value) in [
                ("disable_ipv6", "0"),
                ("accept_dad", "0"),
                ("accept_ra", "0"),
            ] {
                let path = folder.join(file);
                // Most are so already, and the kernel makes who writes wait for its lock on all
                // links by trying again and again.
                if fs::read_to_string(&path).is_ok_and(|old| old.trim_end() == value) {
                    continue;
                }
                fs::write(&path, value).map_err(|error| {
                    io::Error::new(error.kind(), format!("writing {}: {error}", path.display()))
                })?;
            }
            Ok(())
        })
    }
}

/// The errors that mean that a namespace is gone.
mod libc_errno {
    use nix::errno::Errno;

    pub(super) const ENOENT: i32 = Errno::ENOENT as i32;
    pub(super) const ESRCH: i32 = Errno::ESRCH as i32;
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn what_is_gone_is_told_from_what_is_there() {
        assert!(
            Netns::open(Path::new("/run/netns/nobody-made-this"))
                .unwrap()
                .is_none()
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(Netns::open(file.path()).unwrap().is_none());
        let own = Netns::open(Path::new("/proc/self/ns/net"))
            .unwrap()
            .unwrap();
        assert!(own.is_own().unwrap());
        assert_eq!(Netns::open(&file.path().join("x")).unwrap_err().code(), 5);
    }
}
