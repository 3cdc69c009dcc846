//! A folder of manifests as a source: what it tells, and what it never takes back by mistake.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use penstock_agent::{
    dataplane::memory::Memory,
    model::{object::Event, world::World},
    reconcile::Reconciler,
    watch::{Status, manifests::Manifests},
};
use tokio::sync::mpsc::{self, Receiver};

/// An agent's middle: a folder, what it tells, and maps in memory.
struct Run {
    events: Receiver<Event>,
    status: Status,
    reconciler: Reconciler<Memory>,
    started: Instant,
}

impl Run {
    fn start(directory: &Path, left: Memory) -> Self {
        let (sender, events) = mpsc::channel(16);
        let status = Status::default();
        tokio::spawn(Manifests::new(directory, status.clone()).run(sender));
        Self {
            events,
            status,
            reconciler: Reconciler::new(left, World::new("here")).unwrap(),
            started: Instant::now(),
        }
    }

    /// Takes events in until something is so.
    async fn until(&mut self, what: &str, mut is_so: impl FnMut(&Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(8);
        while !is_so(self) {
            assert!(Instant::now() < end, "{what}: {}", self.told());
            let pause = Duration::from_millis(20);
            if let Ok(Some(event)) = tokio::time::timeout(pause, self.events.recv()).await {
                self.reconciler.world.apply(event).expect("a good event");
            }
            self.reconciler.step(self.started.elapsed());
        }
    }

    /// Whether exactly these services' addresses are served.
    fn serves(&self, numbers: &[u8]) -> bool {
        let frontends = &self.reconciler.dataplane.state.v4.frontends;
        let served = frontends.keys().map(|key| key.addr.to_string());
        let wanted = numbers.iter().map(|number| format!("10.96.0.{number}"));
        served.eq(wanted)
    }

    fn problems(&self) -> Vec<String> {
        let (told, more) = self.status.rejections();
        assert_eq!(more, 0);
        told.iter().map(ToString::to_string).collect()
    }

    fn told(&self) -> String {
        let frontends = &self.reconciler.dataplane.state.v4.frontends;
        format!("{:?}\n{:#?}", frontends.keys(), self.problems())
    }
}

fn service(number: u8) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web{number}}}\n\
         spec: {{clusterIP: 10.96.0.{number}, ports: [{{port: 80}}]}}\n"
    )
}

fn write(directory: &Path, numbers: &[u8]) {
    fs::create_dir_all(directory).unwrap();
    for number in numbers {
        fs::write(directory.join(format!("{number}.yaml")), service(*number)).unwrap();
    }
}

/// A folder, and maps that serve the services 1 and 2 of it.
async fn served(folder: &Path) -> Memory {
    write(folder, &[1, 2]);
    let mut run = Run::start(folder, Memory::default());
    run.until("both are served", |run| run.serves(&[1, 2]))
        .await;
    run.reconciler.dataplane
}

type Breaking = fn(&Path);

#[tokio::test]
async fn a_manifest_that_cant_be_read_at_the_start_keeps_what_an_earlier_agent_left() {
    let breakings: [(&str, Breaking); 6] = [
        ("garbage", |path| fs::write(path, "\t{{{").unwrap()),
        ("empty", |path| fs::write(path, "").unwrap()),
        ("no text at all", |path| {
            fs::write(path, [0xff; 64]).unwrap()
        }),
        ("too much", |path| {
            let file = fs::File::create(path).unwrap();
            file.set_len(1 << 40).unwrap();
        }),
        ("a dangling link", |path| {
            fs::remove_file(path).unwrap();
            symlink("/nowhere/at/all", path).unwrap();
        }),
        ("a pipe", |path| {
            fs::remove_file(path).unwrap();
            nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        }),
    ];
    for (what, breaks) in breakings {
        let folder = tempfile::tempdir().unwrap();
        let left = served(folder.path()).await;
        let broken = folder.path().join("2.yaml");
        breaks(&broken);
        let mut run = Run::start(folder.path(), left);
        run.until(what, |run| run.reconciler.unswept().is_some())
            .await;
        assert!(run.serves(&[1, 2]), "{what}: {}", run.told());
        assert_eq!(run.problems().len(), 1, "{what}: {}", run.told());
        // Deleting it is what takes the service back.
        fs::remove_file(&broken).unwrap();
        run.until(what, |run| run.serves(&[1])).await;
        assert_eq!(run.problems(), Vec::<String>::new(), "{what}");
    }
}

#[tokio::test]
async fn files_that_vanish_leave_no_problem() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = Run::start(folder.path(), Memory::default());
    let names: Vec<PathBuf> = (0..400)
        .map(|number| folder.path().join(format!("x{number}.yaml")))
        .collect();
    write(folder.path(), &[1]);
    for _ in 0..3 {
        for (number, name) in names.iter().enumerate() {
            let text = if number % 2 == 0 { "{{{" } else { "kind: A" };
            fs::write(name, text).unwrap();
        }
        run.until("something is told", |run| {
            run.status.rejections().0.len() > 9
        })
        .await;
        for name in &names {
            fs::remove_file(name).unwrap();
        }
    }
    run.until("nothing is left to tell", |run| run.problems().is_empty())
        .await;
    // One file more shows that all before it was looked at.
    write(folder.path(), &[2]);
    run.until("both are served", |run| run.serves(&[1, 2]))
        .await;
    assert_eq!(run.problems(), Vec::<String>::new());
}

#[tokio::test]
async fn a_swapped_folder_is_followed() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    write(&root.join("one/manifests"), &[1]);
    write(&root.join("two/manifests"), &[1, 2]);
    symlink("one", root.join("current")).unwrap();
    let mut run = Run::start(&root.join("current/manifests"), Memory::default());
    run.until("the first is served", |run| run.serves(&[1]))
        .await;
    symlink("two", root.join("next")).unwrap();
    fs::rename(root.join("next"), root.join("current")).unwrap();
    run.until("the second is served", |run| run.serves(&[1, 2]))
        .await;
    write(&root.join("two/manifests"), &[3]);
    run.until("a change of it is seen", |run| run.serves(&[1, 2, 3]))
        .await;
}
