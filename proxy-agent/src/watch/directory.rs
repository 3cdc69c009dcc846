//! A directory that tells when something in it may have changed, wherever its path leads.
//!
//! A path may lead through symbolic links that are swapped to change all files at once, as git-sync
//! and mounted ConfigMaps do: the folders of those links are watched too.

use std::{
    collections::{BTreeSet, VecDeque},
    ffi::OsString,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use futures::{FutureExt, StreamExt};
use inotify::{EventMask, EventOwned, EventStream, Inotify, WatchDescriptor, WatchMask};
use tokio::time::{Instant, timeout_at};

/// How many symbolic links a path may lead through (path_resolution(7)).
const MOST_LINKS: usize = 40;

/// Which directory it is.
type Identity = (u64, u64);

/// A watched directory.
pub(super) struct Watched {
    path: PathBuf,
    identity: Identity,
    own: WatchDescriptor,
    events: EventStream<Vec<u8>>,
}

/// What a wait for changes ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// Something in the directory may have changed.
    Changed,
    /// The directory must be watched anew: it is gone, or the path leads to another.
    Replaced,
}

impl Watched {
    /// Watches the directory that `path` leads to.
    pub(super) fn new(path: &Path) -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let mut watches = inotify.watches();
        let mask = WatchMask::CLOSE_WRITE
            | WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::MOVE
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        // Known before it is watched: one that is swapped in between is seen to be another.
        let identity = identity(path)?;
        let own = watches.add(path, mask)?;
        for folder in folders_of_links(path) {
            // The folder may be the directory itself, which must not lose what it has.
            let mask = WatchMask::CREATE | WatchMask::MOVE | WatchMask::DELETE;
            watches.add(folder, mask | WatchMask::MASK_ADD)?;
        }
        Ok(Self {
            path: path.to_path_buf(),
            identity,
            own,
            events: inotify.into_event_stream(vec![0; 65_536])?,
        })
    }

    /// Waits until something may have changed, for `patience` at most.
    pub(super) async fn wait(&mut self, patience: Duration) -> Told {
        let end = Instant::now() + patience;
        loop {
            let first = timeout_at(end, self.events.next()).await;
            if identity(&self.path).ok() != Some(self.identity) {
                return Told::Replaced;
            }
            let mut told = match first {
                Err(_) => return Told::Changed,
                Ok(event) => self.judge(event),
            };
            // What came with it is seen by the same look.
            while let Some(event) = self.events.next().now_or_never() {
                let next = self.judge(event);
                told = match (told, next) {
                    (Some(Told::Replaced), _) | (_, Some(Told::Replaced)) => Some(Told::Replaced),
                    (told, next) => told.or(next),
                };
                if told == Some(Told::Replaced) {
                    break;
                }
            }
            if let Some(told) = told {
                return told;
            }
        }
    }

    /// What an event means; nothing, if it is about something beside a link.
    fn judge(&self, event: Option<io::Result<EventOwned>>) -> Option<Told> {
        let Some(Ok(event)) = event else {
            return Some(Told::Replaced);
        };
        let gone = EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED;
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            return Some(Told::Changed);
        }
        if event.wd != self.own {
            // A link's folder that is gone can't tell any more.
            let is_gone = event.mask.contains(EventMask::IGNORED);
            return is_gone.then_some(Told::Replaced);
        }
        Some(if event.mask.intersects(gone) {
            Told::Replaced
        } else {
            Told::Changed
        })
    }
}

fn identity(path: &Path) -> io::Result<Identity> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// The folders of all symbolic links that a path leads through.
fn folders_of_links(path: &Path) -> BTreeSet<PathBuf> {
    let parts = |path: &Path| -> Vec<OsString> {
        let parts = path.components().map(|part| part.as_os_str().to_owned());
        parts.collect()
    };
    let mut found = BTreeSet::new();
    let mut links = 0;
    let mut here = PathBuf::from(".");
    let mut rest: VecDeque<OsString> = parts(path).into();
    while let Some(part) = rest.pop_front() {
        match Path::new(&part).components().next() {
            Some(Component::ParentDir) => here.push(".."),
            Some(Component::Normal(name)) => {
                let next = here.join(name);
                let Ok(target) = fs::read_link(&next) else {
                    here = next;
                    continue;
                };
                found.insert(here.clone());
                links += 1;
                if links > MOST_LINKS {
                    break;
                }
                parts(&target)
                    .into_iter()
                    .rev()
                    .for_each(|part| rest.push_front(part));
            }
            Some(Component::RootDir) => here = PathBuf::from("/"),
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    #[test]
    fn links_are_found_wherever_they_are_on_the_path() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("real/one/manifests")).unwrap();
        fs::create_dir(root.join("links")).unwrap();
        symlink("../real/one", root.join("links/current")).unwrap();
        symlink(root.join("links/current"), root.join("entry")).unwrap();
        let found = folders_of_links(&root.join("entry/manifests"));
        assert_eq!(found, [root.clone(), root.join("links")].into());
        assert_eq!(folders_of_links(&root.join("real/one")), BTreeSet::new());
        // A circle is left alone.
        symlink("circle", root.join("circle")).unwrap();
        assert_eq!(folders_of_links(&root.join("circle")).len(), 1);
    }

    #[tokio::test]
    async fn a_swapped_link_is_told_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        for name in ["one", "two"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        symlink("one", root.join("current")).unwrap();
        let path = root.join("current");
        let mut watched = Watched::new(&path).unwrap();
        // What is beside the link is nobody's business.
        fs::write(root.join("noise"), "").unwrap();
        fs::write(path.join("a.yaml"), "").unwrap();
        assert_eq!(watched.wait(LONG).await, Told::Changed);
        symlink("two", root.join("new")).unwrap();
        fs::rename(root.join("new"), &path).unwrap();
        let swapped = Instant::now();
        assert_eq!(watched.wait(LONG).await, Told::Replaced);
        assert!(swapped.elapsed() < LONG / 2, "it was told, not found out");
        let mut watched = Watched::new(&path).unwrap();
        fs::write(root.join("two/b.yaml"), "").unwrap();
        assert_eq!(watched.wait(LONG).await, Told::Changed);
    }

    #[tokio::test]
    async fn a_directory_that_is_removed_must_be_watched_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("manifests");
        fs::create_dir(&path).unwrap();
        let mut watched = Watched::new(&path).unwrap();
        fs::remove_dir(&path).unwrap();
        assert_eq!(watched.wait(LONG).await, Told::Replaced);
    }
}
