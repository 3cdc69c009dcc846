//! How sources are doing, and what of theirs can't be used.
//!
//! A file's problems are the file's: they are replaced together, and go when it does. An object's
//! go when it is accepted or gone. Each is logged once when it appears and once when it is over.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Mutex},
};

use crate::{
    api::cut,
    model::object::{Kind, ObjectName, Rejection},
    words::harmless,
};

/// How many problems are told in full: of one file, and in all.
const TOLD: usize = 1_000;

/// How sources are doing, for the command line.
#[derive(Clone, Debug, Default)]
pub struct Status(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    states: BTreeMap<Kind, String>,
    /// By file or directory.
    files: BTreeMap<String, Problems>,
    /// By kind and name.
    objects: BTreeMap<(String, String), Rejection>,
}

/// What can't be used of a file.
#[derive(Debug, Default)]
struct Problems {
    told: Vec<Rejection>,
    /// How many there are besides.
    more: usize,
}

impl Status {
    /// Says what the source does about a kind.
    pub fn set(&self, kind: Kind, state: impl Into<String>) {
        self.lock().states.insert(kind, state.into());
    }

    /// What the source does about each kind.
    pub fn states(&self) -> BTreeMap<Kind, String> {
        self.lock().states.clone()
    }

    /// Says everything that can't be used of a file or directory, in the place of what was said.
    pub fn set_file(&self, file: &str, mut problems: Vec<Rejection>) {
        let more = problems.len().saturating_sub(TOLD);
        problems.truncate(TOLD);
        let mut inner = self.lock();
        let old = inner.files.remove(file).unwrap_or_default();
        let is_in = |all: &[Rejection]| all.iter().map(shown).collect::<HashSet<String>>();
        let (before, after) = (is_in(&old.told), is_in(&problems));
        for new in problems
            .iter()
            .map(shown)
            .filter(|text| !before.contains(text))
        {
            tracing::warn!("{new}");
        }
        for gone in old
            .told
            .iter()
            .map(shown)
            .filter(|text| !after.contains(text))
        {
            over(&gone);
        }
        if more > 0 && more != old.more {
            tracing::warn!("{}: {more} more problems", harmless(file));
        }
        if !problems.is_empty() {
            let problems = Problems {
                told: problems,
                more,
            };
            inner.files.insert(file.to_owned(), problems);
        }
    }

    /// Says that an object can't be used.
    pub fn reject(&self, rejection: &Rejection) {
        let key = (rejection.kind.clone(), rejection.object.clone());
        let old = self.lock().objects.insert(key, rejection.clone());
        if old.as_ref() != Some(rejection) {
            tracing::warn!("{}", shown(rejection));
        }
    }

    /// Says that an object can be used, or is gone.
    pub fn accept(&self, kind: Kind, object: &ObjectName) {
        let mut inner = self.lock();
        if inner.objects.is_empty() {
            return;
        }
        if let Some(old) = inner.objects.remove(&(kind.to_string(), called(object))) {
            over(&shown(&old));
        }
    }

    /// Says that a kind's objects can be used or are gone, but for `kept`.
    pub fn accept_others(&self, kind: Kind, kept: &[ObjectName]) {
        let mut inner = self.lock();
        if inner.objects.is_empty() {
            return;
        }
        let kind = kind.to_string();
        let kept: HashSet<String> = kept.iter().map(called).collect();
        inner.objects.retain(|(of, name), old| {
            let stays = *of != kind || kept.contains(name);
            if !stays {
                over(&shown(old));
            }
            stays
        });
    }

    /// What can't be used, and of how much more that is so.
    pub fn rejections(&self) -> (Vec<Rejection>, usize) {
        let inner = self.lock();
        let files = inner.files.values().flat_map(|problems| &problems.told);
        let mut all: Vec<Rejection> = files.chain(inner.objects.values()).cloned().collect();
        let untold: usize = inner.files.values().map(|problems| problems.more).sum();
        let more = untold + all.len().saturating_sub(TOLD);
        all.truncate(TOLD);
        (all, more)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// An object as its rejection calls it, which cuts long names.
fn called(name: &ObjectName) -> String {
    if name.namespace.is_empty() {
        return cut(&name.name);
    }
    format!("{}/{}", cut(&name.namespace), cut(&name.name))
}

fn shown(rejection: &Rejection) -> String {
    harmless(&rejection.to_string())
}

fn over(problem: &str) {
    tracing::info!("no longer a problem: {problem}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rejection(origin: &str, object: &str) -> Rejection {
        Rejection {
            kind: "Service".to_owned(),
            object: object.to_owned(),
            origin: origin.to_owned(),
            reason: "is no good".to_owned(),
        }
    }

    fn told(status: &Status) -> Vec<String> {
        let (told, more) = status.rejections();
        assert_eq!(more, 0);
        told.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_files_problems_are_its_own_whatever_others_are_called() {
        let status = Status::default();
        status.set_file("q.yaml", vec![rejection("q.yaml", "a")]);
        status.set_file("q.yaml.yml", vec![rejection("q.yaml.yml", "b")]);
        assert_eq!(told(&status).len(), 2);
        status.set_file("q.yaml", Vec::new());
        assert_eq!(told(&status), ["q.yaml.yml: Service b: is no good"]);
        status.set_file("q.yaml.yml", Vec::new());
        assert_eq!(told(&status), Vec::<String>::new());
    }

    #[test]
    fn an_objects_problem_goes_with_it() {
        let status = Status::default();
        let name = |name: &str| ObjectName::new("default", name);
        for object in ["default/a", "default/b", "default/c"] {
            status.reject(&rejection("server", object));
        }
        status.accept(Kind::Service, &name("a"));
        status.accept(Kind::EndpointSlice, &name("b"));
        assert_eq!(told(&status).len(), 2);
        status.accept_others(Kind::Service, &[name("c")]);
        assert_eq!(told(&status), ["server: Service default/c: is no good"]);
    }

    #[test]
    fn an_object_with_a_long_name_is_known_again() {
        let long = "a".repeat(200);
        let object = serde_json::json!({ "metadata": { "name": long, "namespace": "default" } });
        let refused = crate::api::Decoder::default()
            .json(Kind::Service, &object.to_string(), "server")
            .unwrap_err();
        let status = Status::default();
        status.reject(&refused);
        assert_eq!(told(&status).len(), 1);
        status.accept(Kind::Service, &ObjectName::new("default", long));
        assert_eq!(told(&status), Vec::<String>::new());
    }

    #[test]
    fn what_is_not_told_is_counted() {
        let status = Status::default();
        let many = |file: &str, count: usize| -> Vec<Rejection> {
            let names = (0..count).map(|number| number.to_string());
            names.map(|name| rejection(file, &name)).collect()
        };
        status.set_file("a.yaml", many("a.yaml", TOLD + 7));
        status.set_file("b.yaml", many("b.yaml", 3));
        let (told, more) = status.rejections();
        assert_eq!((told.len(), more), (TOLD, 10));
        status.set_file("a.yaml", Vec::new());
        let (told, more) = status.rejections();
        assert_eq!((told.len(), more), (3, 0));
    }
}
