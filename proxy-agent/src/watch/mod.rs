//! Where objects come from: an API server, or a directory of manifests.
//!
//! A source sends [`Event`]s into a channel. It lists everything once, then says what changes, and
//! never says that something is gone because it could not look.

pub mod kube;
pub mod manifests;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex},
};

use crate::model::object::{Kind, Rejection};

/// What of a cluster an agent wants to know.
#[derive(Clone, Debug)]
pub struct Scope {
    /// Its own node.
    pub node_name: String,
    /// Whether it connects pods, and so must know of the other nodes.
    pub has_network: bool,
}

/// How a source is doing, for the command line.
#[derive(Clone, Debug, Default)]
pub struct Status(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    states: BTreeMap<Kind, String>,
    rejections: HashMap<(String, String, String), Rejection>,
}

/// How many rejections are remembered.
const REMEMBERED: usize = 1_000;

impl Status {
    /// Says what the source does about a kind.
    pub fn set(&self, kind: Kind, state: impl Into<String>) {
        self.lock().states.insert(kind, state.into());
    }

    /// Remembers what can't be used; true if that is news.
    pub fn reject(&self, rejection: &Rejection) -> bool {
        let key = key(rejection);
        let mut inner = self.lock();
        let is_new = inner.rejections.get(&key) != Some(rejection);
        if is_new && inner.rejections.len() < REMEMBERED {
            inner.rejections.insert(key, rejection.clone());
        }
        is_new
    }

    /// Forgets what could not be used of an origin, or of all origins that begin like it.
    pub fn accept(&self, origin: &str) {
        self.lock()
            .rejections
            .retain(|(of, ..), _| !of.starts_with(origin));
    }

    /// Forgets that a directory could not be used.
    pub fn accept_directory(&self, origin: &str) {
        self.lock()
            .rejections
            .retain(|(of, kind, _), _| of != origin || kind != "directory");
    }

    /// Forgets what could not be used of one object.
    pub fn accept_object(&self, kind: Kind, object: &str) {
        let mut inner = self.lock();
        if !inner.rejections.is_empty() {
            let kind = kind.to_string();
            inner
                .rejections
                .retain(|(_, of, name), _| *of != kind || name != object);
        }
    }

    /// What the source does about each kind.
    pub fn states(&self) -> BTreeMap<Kind, String> {
        self.lock().states.clone()
    }

    /// What can't be used.
    pub fn rejections(&self) -> Vec<Rejection> {
        let mut all: Vec<Rejection> = self.lock().rejections.values().cloned().collect();
        all.sort_by(|a, b| (&a.origin, &a.object).cmp(&(&b.origin, &b.object)));
        all
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn key(rejection: &Rejection) -> (String, String, String) {
    (
        rejection.origin.clone(),
        rejection.kind.clone(),
        rejection.object.clone(),
    )
}
