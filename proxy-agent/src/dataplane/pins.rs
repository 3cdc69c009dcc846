//! Where maps and links are pinned, and whether what is pinned there is ours to use.
//!
//! Invariant: a map is adopted only if its kind, sizes, capacity and flags are what the programs
//! expect, of which the flow table's capacity is what the first agent made it; the path holds the ABI version, so another version's maps are never even met.

use std::{
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{MapData, MapError},
    programs::ProgramError,
};
use nix::fcntl::{Flock, FlockArg};
use penstock_common::ABI_VERSION;

use super::{OBJECT, sizes};
use crate::words::chain;

/// A folder of pins.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
}

/// Pins or programs are not usable.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The folder can't be made or read.
    #[error(
        "{operation} {path}: {source}; is a bpffs mounted there (mount -t bpf bpf /sys/fs/bpf)?"
    )]
    Folder {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A folder is no bpffs.
    #[error("{path} is not on a bpffs; mount one (mount -t bpf bpf /sys/fs/bpf) or pass --bpffs")]
    NotBpffs {
        /// The folder.
        path: PathBuf,
    },
    /// Somebody else writes these maps.
    #[error(
        "another agent uses {path}; stop it, or give each network namespace's agent a --bpffs of \
         its own"
    )]
    Busy {
        /// The folder.
        path: PathBuf,
    },
    /// A pinned map can't be opened.
    #[error("opening the pinned map {path}: {}{}", chain(source), hint(source))]
    Map {
        /// The pin.
        path: PathBuf,
        /// Why not.
        #[source]
        source: MapError,
    },
    /// A pinned map is not what the programs expect.
    #[error(
        "the pinned map {path} has {found}, and this version wants {wanted}; stop the agent that \
         uses it and run `penstock cleanup`, which interrupts translated connections"
    )]
    Foreign {
        /// The pin.
        path: PathBuf,
        /// Its definition.
        found: Box<Definition>,
        /// The programs' definition.
        wanted: Box<Definition>,
    },
    /// The embedded object can't be loaded.
    #[error("loading the kernel programs: {source}; {}", advice(source))]
    Load {
        /// Why not.
        #[source]
        source: Box<aya::EbpfError>,
    },
    /// The kernel refuses a program.
    #[error("loading the kernel program {program}: {reason}")]
    Program {
        /// Its name.
        program: String,
        /// The end of what the verifier said.
        reason: String,
    },
    /// The object has no such program or map.
    #[error("the kernel object has no {name}: this build is broken")]
    Missing {
        /// Its name.
        name: &'static str,
    },
}

/// Whether an error was the kernel's of this kind at first.
fn is_for(error: &(dyn std::error::Error + 'static), kind: io::ErrorKind) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let io = error.downcast_ref::<io::Error>();
        if io.is_some_and(|error| error.kind() == kind) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// What to do about an error that is for want of rights.
fn hint(error: &MapError) -> &'static str {
    if is_for(error, io::ErrorKind::PermissionDenied) {
        "; run this as root"
    } else {
        ""
    }
}

/// What to do about programs and maps that can't be loaded.
fn advice(error: &aya::EbpfError) -> &'static str {
    if is_for(error, io::ErrorKind::OutOfMemory) {
        "there is no memory for a flow table of this size (--conntrack-max-per-core, --conntrack-min)"
    } else {
        "Penstock needs Linux 5.15 or newer and root"
    }
}

/// What a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Definition {
    /// BPF_MAP_TYPE_*.
    pub kind: u32,
    /// Bytes of a key.
    pub key: u32,
    /// Bytes of a value.
    pub value: u32,
    /// Capacity.
    pub entries: u32,
    /// BPF_F_*.
    pub flags: u32,
}

impl std::fmt::Display for Definition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            kind,
            key,
            value,
            entries,
            flags,
        } = self;
        write!(
            f,
            "type {kind}, {key}+{value} bytes, {entries} entries, flags {flags:#x}"
        )
    }
}

/// The magic number of a bpffs (include/uapi/linux/magic.h).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

impl Pins {
    /// The pins of this version under `bpffs`; made if they are not there.
    pub fn create(bpffs: &Path) -> Result<Self, PinError> {
        let pins = Self::at(bpffs);
        let folder = |operation, path: &Path| {
            let path = path.to_path_buf();
            move |source| PinError::Folder {
                operation,
                path,
                source,
            }
        };
        let links = pins.root.join("links");
        // The nearest folder that is there tells the file system, before anything is made in it.
        let there = links.ancestors().find(|path| path.exists());
        let is_bpffs = there
            .and_then(|path| nix::sys::statfs::statfs(path).ok())
            .is_some_and(|stat| stat.filesystem_type().0 == BPF_FS_MAGIC);
        if !is_bpffs {
            return Err(PinError::NotBpffs { path: pins.root });
        }
        fs::create_dir_all(&links).map_err(folder("creating", &links))?;
        Ok(pins)
    }

    /// The pins of this version under `bpffs`, whether they are there or not.
    pub fn at(bpffs: &Path) -> Self {
        Self {
            root: bpffs.join(format!("v{ABI_VERSION}")),
        }
    }

    /// Whether a name is that of some version's folder.
    pub fn is_version(name: &OsStr) -> bool {
        let number = name.to_str().and_then(|name| name.strip_prefix('v'));
        number.is_some_and(|number| number.parse::<u32>().is_ok())
    }

    /// The pins in a folder, of whatever version.
    pub fn within(root: PathBuf) -> Self {
        Self { root }
    }

    /// Whether there is anything of this version.
    pub fn is_there(&self) -> io::Result<bool> {
        self.root.try_exists()
    }

    /// Keeps other agents off these pins for as long as the result lives.
    pub fn lock(&self) -> Result<Flock<fs::File>, PinError> {
        let path = self.root.clone();
        let file = fs::File::open(&path).map_err(|source| PinError::Folder {
            operation: "opening",
            path: path.clone(),
            source,
        })?;
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| PinError::Busy { path })
    }

    /// Everything that is pinned, but for interfaces' links, which come and go.
    pub fn list(&self) -> Vec<PathBuf> {
        let names = |folder: &Path| -> Vec<PathBuf> {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            entries.map(|entry| entry.path()).collect()
        };
        let links = names(&self.root.join("links"));
        let is_interface = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("if")
        };
        let links = links.into_iter().filter(|path| !is_interface(path));
        names(&self.root).into_iter().chain(links).collect()
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the link of this name is pinned.
    pub fn link(&self, name: &str) -> PathBuf {
        self.root.join("links").join(name)
    }

    /// All pinned links' names.
    pub fn links(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.root.join("links")) else {
            return Vec::new();
        };
        entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect()
    }

    /// A pinned map.
    pub fn map(&self, name: &str) -> Result<MapData, PinError> {
        let path = self.root.join(name);
        MapData::from_pin(&path).map_err(|source| PinError::Map { path, source })
    }

    /// For how many flows of each family the pinned table was made, if it is there.
    pub fn flows(&self) -> Result<Option<u32>, PinError> {
        // An earlier agent may have ended before it had made all of them.
        for name in sizes::maps() {
            if let Some(found) = self.definition(name)? {
                return Ok(Some(sizes::flows(name, found.entries)));
            }
        }
        Ok(None)
    }

    /// Loads the embedded object: maps are adopted where they are pinned and made where not, those of
    /// the flow table for so many flows of each family. One that is pinned keeps its size, since all
    /// that is in it would be lost ([`Self::flows`]).
    ///
    /// Programs are not loaded into the kernel yet.
    pub fn load(
        &self,
        has_set_retval: bool,
        is_tracing: bool,
        flows: u32,
    ) -> Result<Ebpf, PinError> {
        let pinned = self.flows()?;
        let flows = pinned.unwrap_or(flows);
        for (name, wanted) in definitions()? {
            let entries = sizes::entries(&name, flows).unwrap_or(wanted.entries);
            self.check(&name, Definition { entries, ..wanted })?;
        }
        let traced = if is_tracing { 4_u8 } else { 0 };
        let sizes = sizes::Sizes::new(flows);
        let mut loader = EbpfLoader::new();
        sizes.tell(&mut loader);
        loader
            .default_map_pin_directory(&self.root)
            .map_pin_path("SOCKETS", self.root.join("SOCKETS"))
            .override_global("HAS_SET_RETVAL", &u8::from(has_set_retval), true)
            .override_global("AYA_LOG_LEVEL", &traced, false)
            .load(OBJECT)
            .map_err(|source| {
                if pinned.is_none() {
                    // Nobody uses what was made of it, and the next one may choose a smaller one.
                    for name in sizes::maps() {
                        let _ = fs::remove_file(self.root.join(name));
                    }
                }
                PinError::Load {
                    source: Box::new(source),
                }
            })
    }

    /// What a pinned map is, if there is one.
    fn definition(&self, name: &str) -> Result<Option<Definition>, PinError> {
        let path = self.root.join(name);
        if !path.exists() {
            return Ok(None);
        }
        let map = |source| PinError::Map {
            path: path.clone(),
            source,
        };
        let info = MapData::from_pin(&path).map_err(map)?.info().map_err(map)?;
        Ok(Some(Definition {
            kind: info.map_type().map_err(map)? as u32,
            key: info.key_size(),
            value: info.value_size(),
            entries: info.max_entries(),
            flags: info.map_flags(),
        }))
    }

    /// Compares a pinned map, if there is one, with its definition.
    fn check(&self, name: &str, wanted: Definition) -> Result<(), PinError> {
        match self.definition(name)? {
            Some(found) if found != wanted => Err(PinError::Foreign {
                path: self.root.join(name),
                found: Box::new(found),
                wanted: Box::new(wanted),
            }),
            _ => Ok(()),
        }
    }
}

/// The definitions of the embedded object's pinned maps.
fn definitions() -> Result<Vec<(String, Definition)>, PinError> {
    let object = aya_obj::Object::parse(OBJECT).map_err(|source| PinError::Load {
        source: Box::new(source.into()),
    })?;
    Ok(object
        .maps
        .iter()
        .filter(|(name, map)| {
            map.pinning() == aya_obj::maps::PinningType::ByName || name.as_str() == "SOCKETS"
        })
        .map(|(name, map)| {
            let definition = Definition {
                kind: map.map_type(),
                key: map.key_size(),
                value: map.value_size(),
                entries: map.max_entries(),
                flags: map.map_flags(),
            };
            (name.clone(), definition)
        })
        .collect())
}

/// Puts what a program's loading failed on into few lines: the end of the verifier's log.
pub fn refused(program: &str, error: &ProgramError) -> PinError {
    let mut reason = error.to_string();
    if let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = error
    {
        let log = verifier_log.to_string();
        let tail: Vec<&str> = log.lines().rev().take(12).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        reason = format!(
            "{io_error}; the verifier's last words:\n{}",
            tail.join("\n")
        );
    }
    PinError::Program {
        program: program.to_owned(),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_made_where_no_bpffs_is() {
        let folder = tempfile::tempdir().unwrap();
        let refused = Pins::create(&folder.path().join("bpf")).map(drop);
        assert!(matches!(refused, Err(PinError::NotBpffs { .. })));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn who_has_no_memory_for_the_flow_table_is_told_what_to_choose() {
        let words = |code| {
            let error = MapError::CreateError {
                name: "FLOWS4".to_owned(),
                io_error: io::Error::from_raw_os_error(code),
            };
            let source = Box::new(aya::EbpfError::MapError(error));
            PinError::Load { source }.to_string()
        };
        assert!(words(libc::ENOMEM).contains("--conntrack-max-per-core"));
        assert!(words(libc::EPERM).contains("and root"));
    }

    #[test]
    fn only_one_has_the_lock() {
        let folder = tempfile::tempdir().unwrap();
        let pins = Pins::within(folder.path().to_path_buf());
        let lock = pins.lock().unwrap();
        assert!(matches!(pins.lock(), Err(PinError::Busy { .. })));
        drop(lock);
        pins.lock().unwrap();
    }
}
