//! A directory of ordinary Kubernetes YAML or JSON, watched for changes.
//!
//! What a file said last, as far as it was good, holds until the file says something else or is
//! deleted. A directory that vanishes, becomes unreadable or empty changes nothing.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use futures::StreamExt;
use inotify::{Inotify, WatchMask};
use tokio::sync::mpsc::Sender;

use super::Status;
use crate::{
    api::{Decoded, Decoder},
    model::object::{Event, Kind, Object, ObjectName, Rejection},
};

/// How often to look without having been told.
const RESCAN: Duration = Duration::from_secs(10);
/// How soon to look for a directory that vanished.
const RETRY: Duration = Duration::from_millis(500);

type Key = (Kind, ObjectName);

/// What tells that a file changed.
type Stamp = (SystemTime, u64, u64);

/// What is known of a file.
#[derive(Debug, Default)]
struct Known {
    stamp: Option<Stamp>,
    keys: BTreeSet<Key>,
}

/// A directory.
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
        }
    }

    /// Sends events until nobody listens.
    pub async fn run(mut self, events: Sender<Event>) {
        loop {
            let watched = Self::watch(&self.directory);
            let mut stream = match watched {
                Ok(stream) => stream,
                Err(error) => {
                    self.report(&format!("can't be watched: {error}"));
                    if !self.look(&events).await {
                        return;
                    }
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            };
            if !self.look(&events).await {
                return;
            }
            loop {
                let told = tokio::time::timeout(RESCAN, stream.next()).await;
                if !self.look(&events).await {
                    return;
                }
                // A directory that was deleted or moved must be watched anew.
                if !matches!(told, Err(_) | Ok(Some(Ok(_)))) || self.is_replaced(&told) {
                    break;
                }
            }
        }
    }

    fn watch(
        directory: &Path,
    ) -> io::Result<impl futures::Stream<Item = io::Result<inotify::EventOwned>> + use<>> {
        let inotify = Inotify::init()?;
        let mask = WatchMask::CLOSE_WRITE
            | WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::MOVE
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        inotify.watches().add(directory, mask)?;
        inotify.into_event_stream(vec![0; 65_536])
    }

    fn is_replaced(
        &self,
        told: &Result<Option<io::Result<inotify::EventOwned>>, tokio::time::error::Elapsed>,
    ) -> bool {
        use inotify::EventMask;
        let gone = EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED;
        matches!(told, Ok(Some(Ok(event))) if event.mask.intersects(gone))
    }

    fn report(&self, reason: &str) {
        let rejection = Rejection {
            kind: "directory".to_owned(),
            object: String::new(),
            origin: self.directory.display().to_string(),
            reason: format!("{reason}; what is known stays as it is"),
        };
        for kind in Kind::ALL {
            self.status
                .set(kind, format!("{}: {reason}", self.directory.display()));
        }
        if self.status.reject(&rejection) {
            tracing::warn!("{}: {}", rejection.origin, rejection.reason);
        }
    }

    /// Looks at the directory and sends what changed; false once nobody listens.
    async fn look(&mut self, events: &Sender<Event>) -> bool {
        let paths = match self.paths() {
            Ok(paths) => paths,
            Err(error) => {
                self.report(&format!("can't be read: {error}"));
                return !events.is_closed();
            }
        };
        if paths.is_empty() && self.files.values().any(|known| !known.keys.is_empty()) {
            self.report("is empty all of a sudden");
            return !events.is_closed();
        }
        let found = self.scan(&paths);
        if events
            .send(Event::Doubt(!self.bad.is_empty()))
            .await
            .is_err()
        {
            return false;
        }
        self.status
            .accept_directory(&self.directory.display().to_string());
        for rejection in found.rejections {
            if events.send(Event::Rejected(rejection)).await.is_err() {
                return false;
            }
        }
        for kind in Kind::ALL {
            self.status
                .set(kind, format!("watching {}", self.directory.display()));
        }
        if self.has_listed {
            for event in found.events {
                if events.send(event).await.is_err() {
                    return false;
                }
            }
            return !events.is_closed();
        }
        self.has_listed = true;
        let mut objects: HashMap<Kind, Vec<Object>> = HashMap::new();
        for event in found.events {
            if let Event::Applied(object) = event {
                objects.entry(object.kind()).or_default().push(object);
            }
        }
        for kind in Kind::ALL {
            let listed = objects.remove(&kind).unwrap_or_default();
            let kept = found.kept.iter().filter(|(of, _)| *of == kind);
            let kept = kept.map(|(_, name)| name.clone()).collect();
            if events
                .send(Event::Listed(kind, listed, kept))
                .await
                .is_err()
            {
                return false;
            }
        }
        true
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
            self.status.accept(&path.display().to_string());
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
            let more = self.read(&path, &mut found);
            to_read.extend(more);
        }
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
        let text = match content(path) {
            Ok(text) => text,
            Err(error) => {
                self.bad.insert(path.to_path_buf());
                self.files.entry(path.to_path_buf()).or_default().stamp = stamp;
                found
                    .rejections
                    .push(unreadable(&shown, &format!("can't be read: {error}")));
                return BTreeSet::new();
            }
        };
        let is_known = self
            .files
            .get(path)
            .is_some_and(|known| !known.keys.is_empty());
        if text.trim().is_empty() && (is_known || !self.has_listed) {
            let reason = "is empty; what it said before holds (delete it to take that back)";
            self.bad.insert(path.to_path_buf());
            found.rejections.push(unreadable(&shown, reason));
            self.files.entry(path.to_path_buf()).or_default().stamp = stamp;
            return BTreeSet::new();
        }
        self.status.accept(&shown);
        let is_json = shown.to_ascii_lowercase().ends_with(".json");
        let decoded = self.decoder.manifest(&text, is_json, &shown);
        drop(text);
        let mut keys = BTreeSet::new();
        let mut has_errors = false;
        for result in flatten(decoded) {
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
