//! A directory of ordinary Kubernetes YAML or JSON, watched for changes.
//!
//! What a file said last, as far as it was good, holds until the file says something else or is
//! deleted. A directory that vanishes, becomes unreadable or empty changes nothing.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use tokio::sync::mpsc::Sender;

use super::{
    Status,
    directory::{Told, Watched},
};
use crate::{
    api::{Decoded, Decoder},
    model::object::{Event, Kind, Object, ObjectName, Rejection},
};

/// How often to look without having been told.
const RESCAN: Duration = Duration::from_secs(10);
/// How soon to look for a directory that vanished.
const RETRY: Duration = Duration::from_millis(500);
/// After how long it is said which file is still being read.
const SLOW: Duration = Duration::from_secs(2);

type Key = (Kind, ObjectName);

/// What tells that a file changed.
type Stamp = (SystemTime, u64, u64);

/// What is known of a file.
#[derive(Debug, Default)]
struct Known {
    stamp: Option<Stamp>,
    keys: BTreeSet<Key>,
}

/// A directory and what its files said.
pub struct Manifests {
    directory: PathBuf,
    decoder: Decoder,
    files: BTreeMap<PathBuf, Known>,
    /// Which files have an object; the first by name is believed.
    holders: HashMap<Key, BTreeSet<PathBuf>>,
    status: Status,
    has_listed: bool,
    /// Files that could not be read, or not all of them.
    bad: BTreeSet<PathBuf>,
    /// The file that is being read.
    reading: Arc<Mutex<Option<PathBuf>>>,
}

/// What a look at the directory found.
#[derive(Debug, Default)]
struct Found {
    events: Vec<Event>,
    rejections: Vec<Rejection>,
    kept: Vec<Key>,
}

impl Manifests {
    /// A directory that has not been looked at.
    pub fn new(directory: &Path, status: Status) -> Self {
        Self {
            directory: directory.to_path_buf(),
            decoder: Decoder::default(),
            files: BTreeMap::new(),
            holders: HashMap::new(),
            status,
            has_listed: false,
            bad: BTreeSet::new(),
            reading: Arc::default(),
        }
    }

    /// Sends events until nobody listens.
    pub async fn run(mut self, events: Sender<Event>) {
        loop {
            let watched = Watched::new(&self.directory);
            if let Err(error) = &watched {
                self.report(&format!("can't be watched: {error}"));
            }
            match self.look_aside(&events).await {
                Some(looked) => self = looked,
                None => return,
            }
            let Ok(mut watched) = watched else {
                tokio::time::sleep(RETRY).await;
                continue;
            };
            loop {
                let told = watched.wait(RESCAN).await;
                if told == Told::Replaced {
                    break;
                }
                match self.look_aside(&events).await {
                    Some(looked) => self = looked,
                    None => return,
                }
            }
        }
    }

    /// Looks on a thread that may wait for files as long as it takes, and sends what changed;
    /// nothing once nobody listens.
    async fn look_aside(mut self, events: &Sender<Event>) -> Option<Self> {
        let (status, reading) = (self.status.clone(), self.reading.clone());
        let mut looking = tokio::task::spawn_blocking(move || {
            let found = self.look();
            (self, found)
        });
        let mut said = None;
        let (looked, found) = loop {
            match tokio::time::timeout(SLOW, &mut looking).await {
                Ok(done) => break done.ok()?,
                Err(_) => say_slow(&status, &reading, &mut said),
            }
        };
        for event in found {
            events.send(event).await.ok()?;
        }
        (!events.is_closed()).then_some(looked)
    }

    fn report(&self, reason: &str) {
        let shown = self.directory.display().to_string();
        let rejection = Rejection {
            kind: "directory".to_owned(),
            object: String::new(),
            origin: shown.clone(),
            reason: format!("{reason}; what is known stays as it is"),
        };
        self.set_state(&format!("{shown}: {reason}"));
        self.status.set_file(&shown, vec![rejection]);
    }

    fn set_state(&self, state: &str) {
        for kind in Kind::ALL {
            self.status.set(kind, state);
        }
    }

    /// Looks at the directory; what changed.
    fn look(&mut self) -> Vec<Event> {
        let paths = match self.paths() {
            Ok(paths) => paths,
            Err(error) => {
                self.report(&format!("can't be read: {error}"));
                return Vec::new();
            }
        };
        if paths.is_empty() && self.files.values().any(|known| !known.keys.is_empty()) {
            self.report("is empty all of a sudden");
            return Vec::new();
        }
        let found = self.scan(&paths);
        let shown = self.directory.display().to_string();
        self.status.set_file(&shown, Vec::new());
        self.set_state(&format!("watching {shown}"));
        let mut events = vec![Event::Doubt(!self.bad.is_empty())];
        if self.has_listed {
            events.extend(found.events);
            return events;
        }
        self.has_listed = true;
        let mut objects: HashMap<Kind, Vec<Object>> = HashMap::new();
        for event in found.events {
            if let Event::Applied(object) = event {
                objects.entry(object.kind()).or_default().push(object);
            }
        }
        events.extend(Kind::ALL.into_iter().map(|kind| {
            let listed = objects.remove(&kind).unwrap_or_default();
            let kept = found.kept.iter().filter(|(of, _)| *of == kind);
            Event::Listed(kind, listed, kept.map(|(_, name)| name.clone()).collect())
        }));
        events
    }

    /// The manifests in the directory.
    fn paths(&self) -> io::Result<BTreeSet<PathBuf>> {
        let mut paths = BTreeSet::new();
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let lower = name.to_ascii_lowercase();
            let is_manifest = [".yaml", ".yml", ".json"]
                .iter()
                .any(|end| lower.ends_with(end));
            if is_manifest && !name.starts_with('.') {
                paths.insert(path);
            }
        }
        Ok(paths)
    }

    /// Reads the files that changed, and forgets those that are gone.
    fn scan(&mut self, paths: &BTreeSet<PathBuf>) -> Found {
        let mut found = Found::default();
        let mut to_read: BTreeSet<PathBuf> = BTreeSet::new();
        let gone: Vec<PathBuf> = self
            .files
            .keys()
            .filter(|path| !paths.contains(*path))
            .cloned()
            .collect();
        for path in gone {
            let known = self.files.remove(&path).unwrap_or_default();
            self.bad.remove(&path);
            self.status
                .set_file(&path.display().to_string(), Vec::new());
            self.release(&path, known.keys, &mut found, &mut to_read);
        }
        for path in paths {
            let stamp = stamp(path);
            let known = self.files.get(path);
            if known.is_none_or(|known| known.stamp != stamp || stamp.is_none()) {
                to_read.insert(path.clone());
            }
        }
        while let Some(path) = to_read.pop_first() {
            *lock(&self.reading) = Some(path.clone());
            let more = self.read(&path, &mut found);
            to_read.extend(more);
        }
        *lock(&self.reading) = None;
        found
    }

    /// Takes away what a file had; what another file has too is read from there.
    fn release(
        &mut self,
        path: &Path,
        keys: BTreeSet<Key>,
        found: &mut Found,
        to_read: &mut BTreeSet<PathBuf>,
    ) {
        for key in keys {
            let Some(holders) = self.holders.get_mut(&key) else {
                continue;
            };
            let was_first = holders.first().is_some_and(|first| first == path);
            holders.remove(path);
            match holders.first() {
                Some(next) if was_first => {
                    to_read.insert(next.clone());
                }
                Some(_) => {}
                None => {
                    self.holders.remove(&key);
                    found.events.push(Event::Deleted(key.0, key.1));
                }
            }
        }
    }

    /// Reads a file. Returns files that must be read because this one no longer has something.
    fn read(&mut self, path: &Path, found: &mut Found) -> BTreeSet<PathBuf> {
        let shown = path.display().to_string();
        let stamp = stamp(path);
        let is_first = !self.has_listed;
        let known = self.files.get(path);
        let has_said = known.is_some_and(|known| !known.keys.is_empty());
        let text = match content(path) {
            Ok(text) if text.trim().is_empty() && (has_said || is_first) => {
                Err("is empty; what it said before holds (delete it to take that back)".to_owned())
            }
            Ok(text) => Ok(text),
            // It was deleted after it was listed, and the next look will find it gone.
            Err(_) if fs::symlink_metadata(path).is_err() => return BTreeSet::new(),
            Err(error) => Err(format!("can't be read: {error}")),
        };
        let before = found.rejections.len();
        let to_read = match text {
            Ok(text) => self.decode(path, &text, stamp, found),
            Err(reason) => {
                self.bad.insert(path.to_path_buf());
                self.files.entry(path.to_path_buf()).or_default().stamp = stamp;
                found.rejections.push(unreadable(&shown, &reason));
                BTreeSet::new()
            }
        };
        let problems = found.rejections.get(before..).unwrap_or_default();
        self.status.set_file(&shown, problems.to_vec());
        to_read
    }

    /// Decodes a file. Returns files that must be read because this one no longer has something.
    fn decode(
        &mut self,
        path: &Path,
        text: &str,
        stamp: Option<Stamp>,
        found: &mut Found,
    ) -> BTreeSet<PathBuf> {
        let shown = path.display().to_string();
        let is_json = shown.to_ascii_lowercase().ends_with(".json");
        let mut keys = BTreeSet::new();
        let mut has_errors = false;
        for result in flatten(self.decoder.manifest(text, is_json, &shown)) {
            match result {
                Ok(decoded) => self.take(path, decoded, &mut keys, found),
                Err(rejection) => {
                    has_errors = true;
                    found.rejections.push(rejection);
                }
            }
        }
        if has_errors {
            self.bad.insert(path.to_path_buf());
        } else {
            self.bad.remove(path);
        }
        let mut to_read = BTreeSet::new();
        let known = self.files.entry(path.to_path_buf()).or_default();
        known.stamp = stamp;
        let old = std::mem::replace(&mut known.keys, keys.clone());
        let missing: BTreeSet<Key> = old.difference(&keys).cloned().collect();
        if has_errors {
            // Which of them a broken document meant can't be told: they hold.
            found.kept.extend(missing.iter().cloned());
            known.keys.extend(missing);
        } else {
            self.release(path, missing, found, &mut to_read);
        }
        to_read
    }

    fn take(&mut self, path: &Path, decoded: Decoded, keys: &mut BTreeSet<Key>, found: &mut Found) {
        let key = match &decoded {
            Decoded::Object(object) => (object.kind(), object.name()),
            Decoded::Ignored(kind, name) => (*kind, name.clone()),
            Decoded::OtherKind(kind) => {
                tracing::debug!(
                    "{}: a {kind} is nothing that Penstock serves",
                    path.display()
                );
                return;
            }
            Decoded::List(_) => return,
        };
        if !keys.insert(key.clone()) {
            found.rejections.push(twice(path, &key, path));
            return;
        }
        let holders = self.holders.entry(key.clone()).or_default();
        holders.insert(path.to_path_buf());
        match holders.first() {
            Some(first) if first != path => found.rejections.push(twice(path, &key, first)),
            _ => found.events.extend(decoded.into_event()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says that a file takes long, once a file.
fn say_slow(status: &Status, reading: &Mutex<Option<PathBuf>>, said: &mut Option<PathBuf>) {
    let Some(path) = lock(reading).clone() else {
        return;
    };
    if said.as_ref() == Some(&path) {
        return;
    }
    let state = format!("still reading {}", path.display());
    tracing::warn!("{state}; what is known stays as it is until then");
    for kind in Kind::ALL {
        status.set(kind, &state);
    }
    *said = Some(path);
}

/// Lists' items in the lists' place.
fn flatten(decoded: Vec<Result<Decoded, Rejection>>) -> Vec<Result<Decoded, Rejection>> {
    let mut flat = Vec::with_capacity(decoded.len());
    for result in decoded {
        match result {
            Ok(Decoded::List(items)) => flat.extend(flatten(items)),
            other => flat.push(other),
        }
    }
    flat
}

/// The largest manifest that is read: several times a cluster's worth of services.
const LARGEST: u64 = 512 << 20;

/// A file's text, without the mark that some editors put first.
fn content(path: &Path) -> io::Result<String> {
    let metadata = fs::metadata(path)?;
    // Opening a pipe would wait for its writer.
    if !metadata.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    if metadata.len() > LARGEST {
        return Err(io::Error::other(format!(
            "it has {} bytes; at most {LARGEST} are read",
            metadata.len()
        )));
    }
    let bytes = fs::read(path)?;
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    Ok(String::from_utf8_lossy(bytes).into_owned())
}

fn twice(path: &Path, (kind, name): &Key, first: &Path) -> Rejection {
    Rejection {
        kind: kind.to_string(),
        object: name.to_string(),
        origin: path.display().to_string(),
        reason: format!("is there twice; the one in {} holds", first.display()),
    }
}

fn unreadable(file: &str, reason: &str) -> Rejection {
    Rejection {
        kind: "file".to_owned(),
        object: String::new(),
        origin: file.to_owned(),
        reason: reason.to_owned(),
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt;
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.modified().ok()?, metadata.len(), metadata.ino()))
}

/// All objects of a directory as it is at the moment, for tests and tools.
pub fn read_once(directory: &Path) -> io::Result<(Vec<Event>, Vec<Rejection>)> {
    let mut manifests = Manifests::new(directory, Status::default());
    let paths = manifests.paths()?;
    let found = manifests.scan(&paths);
    Ok((found.events, found.rejections))
}
