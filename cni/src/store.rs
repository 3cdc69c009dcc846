//! The network's state on disk, for whoever changes it: a lock, and a file that is replaced as a
//! whole and only once it is safely written.
//!
//! Four files a network: NAME.json, NAME.lock, NAME.reserve and, while it is written, NAME.new. The lock
//! is a file of its own because the state's own file is another after each change. The reserve is room
//! that nobody else can take: an attachment is entered only where there is as much of it as a state
//! without that attachment needs, so that it can be taken away on a full disk too.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::mpsc,
    time::{Duration, SystemTime},
};

use nix::{errno::Errno, fcntl::posix_fallocate};

use crate::{
    error::Failure,
    ledger::Now,
    state::{SUFFIX, State, this_boot},
};

/// How long others may hold a lock: far longer than any of them needs, unless a disk hangs.
const LOCKED_FOR: Duration = Duration::from_secs(10);
/// In what pieces a reserve is made: file systems' blocks are not larger, as a rule.
const PIECE: u64 = 4_096;
/// The unit of what a file takes on its disk (stat(2)).
const BLOCK: u64 = 512;

/// A network's state while nobody else can change it.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    network: String,
    /// What the file says, or would say if there were one, but for what an earlier boot left.
    state: State,
    /// Held until this is dropped, or the process ends however.
    _lock: File,
    /// The folder's, for who gives out addresses: no two networks may give out the same.
    _addresses: Option<File>,
}

/// The time, as the state has it.
pub fn now() -> Now {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(Now::MAX)
    })
}

/// Waits for a lock, and not for ever: whoever waits for this plugin does not either.
fn lock(file: File, path: &Path, limit: Duration) -> Result<File, Failure> {
    let failure = || Failure::io(format!("locking {}", path.display()));
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(error)) => return Err(failure()(error)),
    }
    let (sender, locked) = mpsc::channel();
    // It may wait for longer than this process lives.
    std::thread::spawn(move || {
        let result = file.lock().map(|()| file);
        let _ = sender.send(result);
    });
    match locked.recv_timeout(limit) {
        Ok(result) => result.map_err(failure()),
        Err(_) => Err(Failure::TryAgain(format!(
            "another call of the plugin has had the lock {} for {} s",
            path.display(),
            limit.as_secs()
        ))),
    }
}

/// The names of the networks that have a state in `folder`.
pub fn networks(folder: &Path) -> Result<Vec<String>, Failure> {
    let failure = || Failure::io(format!("listing {} (stateDir)", folder.display()));
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failure()(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(failure())?.file_name();
        let name = name.to_str().and_then(|name| name.strip_suffix(SUFFIX));
        names.extend(name.map(str::to_owned));
    }
    names.sort_unstable();
    Ok(names)
}

/// The states of all networks but one, without what is of an earlier boot.
pub fn others(folder: &Path, network: &str) -> Result<Vec<State>, Failure> {
    let mut states = Vec::new();
    for other in networks(folder)?.iter().filter(|other| *other != network) {
        if let Some(mut state) = State::read(&State::path(folder, other))? {
            if let Some(boot) = this_boot() {
                state.enter_boot(&boot);
            }
            // Its file says whose it is.
            state.network.clone_from(other);
            states.push(state);
        }
    }
    Ok(states)
}

impl Store {
    /// Waits for the locks and reads the state, making the folder if need be: for whoever gives out
    /// addresses.
    pub fn open(folder: &Path, network: &str) -> Result<Self, Failure> {
        fs::create_dir_all(folder).map_err(Failure::io(format!(
            "making the folder {} (stateDir)",
            folder.display()
        )))?;
        let opened = File::open(folder).map_err(Failure::io(format!(
            "opening the folder {} (stateDir)",
            folder.display()
        )))?;
        let addresses = lock(opened, folder, LOCKED_FOR)?;
        let mut store = Self::open_existing(folder, network)?.ok_or_else(|| Failure::Io {
            what: format!("locking the state in {}", folder.display()),
            source: io::ErrorKind::NotFound.into(),
        })?;
        store._addresses = Some(addresses);
        Ok(store)
    }

    /// Waits for the lock and reads the state; `None` if there is no folder, hence no state.
    pub fn open_existing(folder: &Path, network: &str) -> Result<Option<Self>, Failure> {
        let path = folder.join(format!("{network}.lock"));
        let Some(opened) = open_lock(&path, &State::path(folder, network))? else {
            return Ok(None);
        };
        let lock = lock(opened, &path, LOCKED_FOR)?;
        let state = State::read(&State::path(folder, network))?;
        let mut state = state.unwrap_or_else(|| State::new(network));
        // Without it nothing is known to be of an earlier boot.
        if let Some(boot) = this_boot() {
            state.enter_boot(&boot);
        }
        Ok(Some(Self {
            folder: folder.to_owned(),
            network: network.to_owned(),
            state,
            _lock: lock,
            _addresses: None,
        }))
    }

    /// What the state says.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Changes the state. What `change` returns comes back once the change is on disk; if it
    /// fails, or can't be written, nothing was changed.
    pub fn change<T>(
        &mut self,
        change: impl FnOnce(&mut State) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut state = self.state.clone();
        let result = change(&mut state)?;
        if state != self.state {
            self.write(&state)?;
            self.state = state;
        }
        Ok(result)
    }

    fn file(&self, end: &str) -> PathBuf {
        self.folder.join(format!("{}{end}", self.network))
    }

    fn write(&self, state: &State) -> Result<(), Failure> {
        let path = State::path(&self.folder, &self.network);
        self.replace(state, &path).map_err(|source| Failure::Io {
            what: format!("writing {}", path.display()),
            source,
        })
    }

    fn replace(&self, state: &State, path: &Path) -> io::Result<()> {
        let mut text = serde_json::to_vec(state)?;
        text.push(b'\n');
        let new = self.file(NEW);
        // One that was killed may have had the reserve in its hands.
        if !self.file(RESERVE).exists() && new.exists() {
            fs::rename(&new, self.file(RESERVE))?;
        }
        let has_grown = state.attachments.len() > self.state.attachments.len();
        if has_grown {
            self.set_aside(text.len())?;
        }
        let mut written = fill(&new, &text, Room::New);
        if written.is_err() {
            // A half of a file helps nobody, and on a full disk its room is needed.
            let _ = fs::remove_file(&new);
        }
        if !has_grown && written.as_ref().is_err_and(is_full) {
            written = fs::rename(self.file(RESERVE), &new)
                .and_then(|()| fill(&new, &text, Room::Reserved))
                .or(written);
        }
        written?;
        fs::rename(&new, path)?;
        // The room of the former file is free. If somebody else was faster, an address can be given back
        // as soon as there is room again.
        let _ = self.set_aside(text.len());
        Ok(())
    }

    /// Makes sure that there is room for a state of `length` octets, however full the disk may become.
    fn set_aside(&self, length: usize) -> io::Result<()> {
        let size = (length as u64 / PIECE + 2) * PIECE;
        let path = self.file(RESERVE);
        if fs::metadata(&path).is_ok_and(|found| found.blocks() * BLOCK >= size) {
            return Ok(());
        }
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)?;
        posix_fallocate(&file, 0, size.cast_signed())?;
        Ok(())
    }
}

/// The ends of file names.
const NEW: &str = ".new";
const RESERVE: &str = ".reserve";

/// Where a file's octets are to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Room {
    /// Wherever there is some.
    New,
    /// Where the file is already.
    Reserved,
}

fn fill(path: &Path, text: &[u8], room: Room) -> io::Result<()> {
    let is_new = room == Room::New;
    let mut file = File::options()
        .create(is_new)
        .truncate(is_new)
        .write(true)
        .open(path)?;
    file.write_all(text)?;
    file.set_len(text.len() as u64)?;
    // Whatever happens to the machine, the file is whole. Whether it is this one or the one before does
    // not matter then: it is of an earlier boot, and whoever it names is gone. So the folder need not be
    // synced.
    file.sync_data()
}

/// Whether it was for want of room.
fn is_full(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::ENOSPC | Errno::EDQUOT))
}

/// Opens a lock, which has to be there already where nothing can be written; `None` where there is
/// neither that nor a state.
fn open_lock(path: &Path, state: &Path) -> Result<Option<File>, Failure> {
    let open = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path);
    let error = match open {
        Ok(lock) => return Ok(Some(lock)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => error,
    };
    match File::open(path) {
        Ok(lock) => Ok(Some(lock)),
        Err(_) if matches!(state.try_exists(), Ok(false)) => Ok(None),
        Err(_) => Err(Failure::io(format!("opening {}", path.display()))(error)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::{ledger::Wanted, state::AttachmentKey};

    fn key() -> AttachmentKey {
        AttachmentKey {
            container: "c1".to_owned(),
            ifname: "eth0".to_owned(),
        }
    }

    fn reserve(store: &mut Store) -> Result<crate::state::Attachment, Failure> {
        let ranges = ["10.0.0.0/24".parse().unwrap()];
        store.change(|state| state.reserve(&key(), &ranges, Wanted::default(), now()))
    }

    #[test]
    fn what_is_changed_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("deep/er");
        assert!(Store::open_existing(&missing, "net").unwrap().is_none());
        let mut store = Store::open(&missing, "net").unwrap();
        let attachment = reserve(&mut store).unwrap();
        let path = State::path(&missing, "net");
        let state = State::read(&path).unwrap().unwrap();
        assert_eq!(state.attachment(&key()), Some(&attachment));
        drop(store);
        let mut store = Store::open(&missing, "net").unwrap();
        assert_eq!(store.state(), &state);
        store
            .change(|state| Ok(state.release(&key(), true, now())))
            .unwrap();
        assert!(State::read(&path).unwrap().unwrap().attachments.is_empty());
    }

    #[test]
    fn what_an_earlier_boot_left_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), "net").unwrap();
        reserve(&mut store).unwrap();
        drop(store);
        let mut store = Store::open(folder.path(), "net").unwrap();
        assert_eq!(store.state().attachments.len(), 1, "the same boot");
        store
            .change(|state| {
                state.boot = Some("another".to_owned());
                Ok(())
            })
            .unwrap();
        drop(store);
        let path = State::path(folder.path(), "net");
        assert_eq!(crate::state::read(&path).unwrap(), [], "nor for the agent");
        let store = Store::open(folder.path(), "net").unwrap();
        assert!(store.state().attachments.is_empty());
        assert!(
            store.state().cursors.v4.is_some(),
            "others' addresses still rest the longest"
        );
    }

    #[test]
    fn a_spoilt_file_is_an_error_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = State::path(folder.path(), "net");
        let two = r#"{"version":1,"network":"net","attachments":[]"#;
        for text in [
            "",
            "{",
            "[]",
            two,
            r#"{"version":2,"network":"net","attachments":[]}"#,
        ] {
            fs::write(&path, text).unwrap();
            let error = Store::open(folder.path(), "net").unwrap_err();
            assert_eq!(error.code(), 6, "{error}");
            assert!(error.to_string().contains("put"), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn an_address_of_two_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), "net").unwrap();
        reserve(&mut store).unwrap();
        let path = State::path(folder.path(), "net");
        let mut state = store.state().clone();
        let mut twin = state.attachments.first().unwrap().clone();
        twin.key.ifname = "eth1".to_owned();
        state.attachments.push(twin);
        fs::write(&path, serde_json::to_vec(&state).unwrap()).unwrap();
        let error = State::read(&path).unwrap_err();
        assert!(error.to_string().contains("belongs to two"), "{error}");
    }

    #[test]
    fn a_lock_that_is_never_given_back_is_not_waited_for_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("net.lock");
        let open = || {
            let mut options = File::options();
            let options = options.create(true).truncate(false).write(true);
            options.open(&path).unwrap()
        };
        let limit = Duration::from_millis(100);
        let held = lock(open(), &path, limit).unwrap();
        let error = lock(open(), &path, limit).unwrap_err();
        assert_eq!(error.code(), 11, "{error}");
        // One that is given back in time is had, in whatever order that happens.
        let waiting = std::thread::spawn({
            let (file, path) = (open(), path.clone());
            move || lock(file, &path, LOCKED_FOR).map(drop)
        });
        drop(held);
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn there_is_room_aside_for_what_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), "net").unwrap();
        reserve(&mut store).unwrap();
        let length = fs::metadata(State::path(folder.path(), "net"))
            .unwrap()
            .len();
        let aside = fs::metadata(folder.path().join("net.reserve")).unwrap();
        assert!(aside.blocks() * BLOCK > length, "{aside:?}");
        let [reserve, new] = ["net.reserve", "net.new"].map(|name| folder.path().join(name));
        assert!(!new.exists());
        // What one that was killed had taken to write in is not given away.
        fs::rename(&reserve, &new).unwrap();
        store
            .change(|state| Ok(state.release(&key(), true, now())))
            .unwrap();
        assert_eq!(fs::metadata(&reserve).unwrap().ino(), aside.ino());
        assert!(!new.exists());
    }
}
