//! The socket hooks, on one cgroup and all below it.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    programs::{
        CgroupAttachMode, CgroupSock, CgroupSockAddr, Program, ProgramError, ProgramFd,
        links::FdLink,
    },
};

use super::{AttachError, syscall};
use crate::dataplane::pins::{Pins, refused};

/// The socket hooks' names.
pub const HOOKS: [&str; 9] = [
    "connect4",
    "connect6",
    "sendmsg4",
    "sendmsg6",
    "recvmsg4",
    "recvmsg6",
    "getpeername4",
    "getpeername6",
    "sock_release",
];

/// The magic number of cgroup2 (include/uapi/linux/magic.h).
const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;

/// The cgroup that the hooks are on.
#[derive(Clone, Debug)]
pub struct Attached {
    path: PathBuf,
    id: u64,
}

/// What became of a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is there.
    Kept,
    /// It was removed, and the hooks with it.
    Removed,
    /// Another one has its name.
    Replaced,
}

impl Attached {
    /// What to say of its removal.
    pub fn loss(&self) -> String {
        format!(
            "the cgroup {} was removed; no socket is translated until it is there again",
            self.path.display()
        )
    }

    /// What became of it.
    pub fn fate(&self) -> Fate {
        match std::fs::metadata(&self.path) {
            Ok(metadata) if metadata.ino() == self.id => Fate::Kept,
            Ok(_) => Fate::Replaced,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Fate::Removed,
            // What can't be told is left alone.
            Err(_) => Fate::Kept,
        }
    }
}

/// Puts all socket hooks on the cgroup `path`, replacing those of an earlier agent in place.
pub fn attach(ebpf: &mut Ebpf, pins: &Pins, path: &Path) -> Result<Attached, AttachError> {
    let open = |source| AttachError::OpenCgroup {
        path: path.to_path_buf(),
        source,
    };
    let cgroup = File::open(path).map_err(open)?;
    let is_cgroup2 = nix::sys::statfs::fstatfs(&cgroup)
        .is_ok_and(|stat| stat.filesystem_type().0 == CGROUP2_SUPER_MAGIC);
    if !is_cgroup2 {
        return Err(AttachError::NotCgroup2 {
            path: path.to_path_buf(),
        });
    }
    // A cgroup's id is its folder's inode number.
    let id = cgroup.metadata().map_err(open)?.ino();
    for name in HOOKS {
        hook(ebpf, pins, name, &cgroup, id, path)?;
    }
    Ok(Attached {
        path: path.to_path_buf(),
        id,
    })
}

fn hook(
    ebpf: &mut Ebpf,
    pins: &Pins,
    name: &'static str,
    cgroup: &File,
    id: u64,
    path: &Path,
) -> Result<(), AttachError> {
    let missing = crate::dataplane::pins::PinError::Missing { name };
    let program = ebpf.program_mut(name).ok_or(missing)?;
    let fd = load(program).map_err(|error| refused(name, &error))?;
    let pin = pins.link(name);
    if pin.exists() {
        match replace(&pin, &fd, id) {
            Ok(true) => return Ok(()),
            // The link was on another cgroup, or its cgroup is gone.
            Ok(false) => {}
            Err(source) => tracing::warn!("replacing {}: {source}", pin.display()),
        }
        std::fs::remove_file(&pin).map_err(|source| AttachError::Replace {
            path: pin.clone(),
            source,
        })?;
    }
    let link = attach_new(program, cgroup).map_err(|source| AttachError::Attach {
        program: name.to_owned(),
        target: path.display().to_string(),
        source: Box::new(source),
    })?;
    link.pin(&pin).map(drop).map_err(|source| AttachError::Pin {
        path: pin,
        source: Box::new(source),
    })
}

/// Whether the link was on this cgroup and has the new program now.
fn replace(pin: &Path, program: &ProgramFd, id: u64) -> io::Result<bool> {
    let link = syscall::open_pin(pin)?;
    if syscall::cgroup_of_link(link.as_fd())? != id {
        return Ok(false);
    }
    syscall::update_link(link.as_fd(), program.as_fd())?;
    Ok(true)
}

fn load(program: &mut Program) -> Result<ProgramFd, ProgramError> {
    match program {
        Program::CgroupSockAddr(program) => {
            program.load()?;
            program.fd()?.try_clone().map_err(ProgramError::IOError)
        }
        Program::CgroupSock(program) => {
            program.load()?;
            program.fd()?.try_clone().map_err(ProgramError::IOError)
        }
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

fn attach_new(program: &mut Program, cgroup: &File) -> Result<FdLink, ProgramError> {
    // A bpf_link is shared with other programs whatever the mode says; the kernel refuses flags.
    let mode = CgroupAttachMode::Single;
    let unexpected = |_| ProgramError::UnexpectedProgramType;
    match program {
        Program::CgroupSockAddr(program) => {
            let program: &mut CgroupSockAddr = program;
            let id = program.attach(cgroup, mode)?;
            program.take_link(id)?.try_into().map_err(unexpected)
        }
        Program::CgroupSock(program) => {
            let program: &mut CgroupSock = program;
            let id = program.attach(cgroup, mode)?;
            program.take_link(id)?.try_into().map_err(unexpected)
        }
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_was_removed_and_made_anew_is_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::create_dir(&path).unwrap();
        let id = std::fs::metadata(&path).unwrap().ino();
        let attached = Attached {
            path: path.clone(),
            id,
        };
        assert_eq!(attached.fate(), Fate::Kept);
        // Both exist at once, so that the new one's number is another.
        let other = folder.path().join("b");
        std::fs::create_dir(&other).unwrap();
        std::fs::remove_dir(&path).unwrap();
        assert_eq!(attached.fate(), Fate::Removed);
        std::fs::rename(&other, &path).unwrap();
        assert_eq!(attached.fate(), Fate::Replaced);
    }
}
