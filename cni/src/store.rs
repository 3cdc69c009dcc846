//! The network's state on disk, for whoever changes it: a lock, and a file that is replaced as a
//! whole and only once it is safely written.
//!
//! Three files a network: NAME.json, NAME.lock and, while it is written, NAME.new. The lock is a
//! file of its own because the state's own file is another after each change.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    time::SystemTime,
};

use crate::{
    error::Failure,
    ledger::Now,
    state::{State, this_boot},
};

/// A network's state while nobody else can change it.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    network: String,
    /// What the file says, or would say if there were one, but for what an earlier boot left.
    state: State,
    /// Held until this is dropped, or the process ends however.
    _lock: File,
}

/// The time, as the state has it.
pub fn now() -> Now {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(Now::MAX)
    })
}

impl Store {
    /// Waits for the lock and reads the state, making the folder if need be.
    pub fn open(folder: &Path, network: &str) -> Result<Self, Failure> {
        fs::create_dir_all(folder).map_err(Failure::io(format!(
            "making the folder {} (stateDir)",
            folder.display()
        )))?;
        Self::open_existing(folder, network)?.ok_or_else(|| Failure::Io {
            what: format!("locking the state in {}", folder.display()),
            source: io::ErrorKind::NotFound.into(),
        })
    }

    /// Waits for the lock and reads the state; `None` if there is no folder, hence no state.
    pub fn open_existing(folder: &Path, network: &str) -> Result<Option<Self>, Failure> {
        let path = folder.join(format!("{network}.lock"));
        let open = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path);
        let lock = match open {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Failure::io(format!("opening {}", path.display()))(error)),
        };
        lock.lock()
            .map_err(Failure::io(format!("locking {}", path.display())))?;
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

    fn write(&self, state: &State) -> Result<(), Failure> {
        let path = State::path(&self.folder, &self.network);
        let new = self.folder.join(format!("{}.new", self.network));
        let result = self.replace(state, &new, &path);
        if result.is_err() {
            // A half of a file helps nobody, and on a full disk its room is needed.
            let _ = fs::remove_file(&new);
        }
        result.map_err(|source| Failure::Io {
            what: format!("writing {}", path.display()),
            source,
        })
    }

    fn replace(&self, state: &State, new: &Path, path: &Path) -> io::Result<()> {
        let mut text = serde_json::to_vec(state)?;
        text.push(b'\n');
        let mut file = File::create(new)?;
        file.write_all(&text)?;
        // Whatever happens to the machine, the file is whole. Whether it is this one or the one
        // before does not matter then: it is of an earlier boot, and whoever it names is gone. So
        // the folder need not be synced.
        file.sync_data()?;
        fs::rename(new, path)
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
}
