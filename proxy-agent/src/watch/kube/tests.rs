//! The source against API servers that page, forget, break off, restart, fall silent and lie.
use std::time::Duration;

use kube::Config;
use tokio::{
    sync::mpsc::{self, Receiver},
    task::JoinHandle,
    time::timeout,
};

use super::{
    Scope, Servers, Status, Timing,
    fake::{Cluster, Mode, SERVICES, SLICES, Server, service},
    run_with,
};
use crate::model::object::{Event, Kind, Object};

/// Longer than anything here takes, so that a test that waits in vain ends.
const PATIENCE: Duration = Duration::from_secs(20);

fn timing() -> Timing {
    Timing {
        page: 3,
        answer: Duration::from_millis(300),
        watch: Duration::from_secs(3600),
        silence: Duration::from_secs(3600),
        shortest_watch: Duration::from_secs(1),
        first_pause: Duration::from_millis(4),
        longest_pause: Duration::from_millis(40),
    }
}

struct Run {
    events: Receiver<Event>,
    status: Status,
    task: JoinHandle<()>,
}

impl Drop for Run {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Run {
    fn start(servers: &[&Server]) -> Self {
        Self::start_with(servers, timing())
    }

    fn start_with(servers: &[&Server], timing: Timing) -> Self {
        let urls: Vec<http::Uri> = servers.iter().map(|server| server.url()).collect();
        let servers = Servers::new(Config::new(urls[0].clone()), &urls).unwrap();
        let (sender, events) = mpsc::channel(16);
        let status = Status::default();
        let of_task = status.clone();
        let scope = Scope {
            node_name: "node-a".to_owned(),
            has_network: false,
        };
        Self {
            events,
            status,
            task: tokio::spawn(async move {
                run_with(servers, &scope, &of_task, &sender, timing).await;
            }),
        }
    }

    /// The next event about Services, in short.
    async fn next(&mut self) -> String {
        loop {
            let event = timeout(PATIENCE, self.events.recv()).await;
            let event = event.unwrap_or_else(|_| panic!("no event: {:?}", self.state()));
            if let Some(said) = said(&event.expect("the source ended")) {
                return said;
            }
        }
    }

    /// What the source says that it does about Services.
    fn state(&self) -> String {
        let state = self.status.states().remove(&Kind::Service);
        state.unwrap_or_default()
    }

    async fn until(&self, text: &str) {
        let wait = async {
            while !self.state().contains(text) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let waited = timeout(PATIENCE, wait).await;
        assert!(waited.is_ok(), "not {text}: {}", self.state());
    }
}

fn short(object: &Object) -> String {
    match object {
        Object::Service(service) => format!("{} {}", service.name.name, service.ports[0].port),
        other => panic!("{other:?}"),
    }
}

fn said(event: &Event) -> Option<String> {
    match event {
        Event::Listed(Kind::Service, objects, kept) => {
            let objects: Vec<_> = objects.iter().map(short).collect();
            let kept: Vec<&str> = kept
                .iter()
                .map(|name| &*name.name)
                .filter(|name| name.len() < 10)
                .collect();
            let kept = if kept.is_empty() {
                String::new()
            } else {
                format!("; kept: {}", kept.join(", "))
            };
            Some(format!("all: {}{kept}", objects.join(", ")))
        }
        Event::Applied(object) if object.kind() == Kind::Service => {
            Some(format!("+{}", short(object)))
        }
        Event::Deleted(Kind::Service, name) => Some(format!("-{}", name.name)),
        Event::Rejected(rejection) if rejection.kind == "Service" => {
            Some(format!("!{} {}", rejection.object, rejection.reason))
        }
        _ => None,
    }
}

/// One server, services `a` and `b` listed and watched.
async fn started() -> (Cluster, Server, Run) {
    let cluster = Cluster::new();
    cluster.put_service("a", 1);
    cluster.put_service("b", 1);
    let server = cluster.serve().await;
    let mut run = Run::start(&[&server]);
    assert_eq!(run.next().await, "all: a 1, b 1, kubernetes 443");
    run.until("watching").await;
    cluster.requests();
    (cluster, server, run)
}

fn is_list(request: &str) -> bool {
    !request.contains("watch=true")
}

#[tokio::test]
async fn pages_become_one_list() {
    let cluster = Cluster::new();
    for name in ["a", "b", "c", "d", "e", "f"] {
        cluster.put_service(name, 1);
    }
    let server = cluster.serve().await;
    let mut run = Run::start(&[&server]);
    assert_eq!(
        run.next().await,
        "all: a 1, b 1, c 1, d 1, e 1, f 1, kubernetes 443"
    );
    let lists: Vec<_> = cluster
        .requests()
        .into_iter()
        .filter(|r| is_list(r))
        .collect();
    assert_eq!(lists.len(), 3);
    assert!(
        lists.iter().all(|request| request.contains("limit=3")),
        "{lists:?}"
    );
    assert!(lists[2].contains("continue=6"), "{lists:?}");
}

#[tokio::test]
async fn every_kind_is_listed() {
    let cluster = Cluster::new();
    let server = cluster.serve().await;
    let mut run = Run::start(&[&server]);
    let mut kinds = Vec::new();
    while kinds.len() < Kind::ALL.len() {
        let event = timeout(PATIENCE, run.events.recv()).await.unwrap().unwrap();
        if let Event::Listed(kind, ..) = event {
            kinds.push(kind);
        }
    }
    kinds.sort();
    assert_eq!(kinds, Kind::ALL);
}

#[tokio::test]
async fn changes_are_told_as_they_come() {
    let (cluster, _server, mut run) = started().await;
    cluster.put_service("c", 3);
    assert_eq!(run.next().await, "+c 3");
    cluster.put_service("a", 2);
    assert_eq!(run.next().await, "+a 2");
    cluster.delete(SERVICES, "b");
    assert_eq!(run.next().await, "-b");
    let mut headless = service("a", 2);
    headless["spec"]["clusterIP"] = "None".into();
    cluster.put(SERVICES, "a", headless);
    assert_eq!(run.next().await, "-a");
}

#[tokio::test]
async fn a_broken_connection_is_resumed_without_listing() {
    let (cluster, server, mut run) = started().await;
    for (port, last_words) in [(2, ""), (3, "{\"type\": \"ADDED\", \"obj"), (4, "\n")] {
        server.cut(last_words);
        cluster.put_service("a", port);
        assert_eq!(run.next().await, format!("+a {port}"));
    }
    let requests = cluster.requests();
    assert!(
        !requests.iter().any(|request| is_list(request)),
        "{requests:?}"
    );
}

#[tokio::test]
async fn bookmarks_move_on_where_a_watch_resumes() {
    let (cluster, server, mut run) = started().await;
    cluster.put(SLICES, "x", serde_json::json!({"metadata": {"name": "x"}}));
    // A connection may be cut before it passed the bookmark on, so perhaps more than once.
    while !cluster
        .requests()
        .iter()
        .any(|r| r.ends_with("resourceVersion=6"))
    {
        cluster.bookmark_at(6);
        tokio::time::sleep(Duration::from_millis(5)).await;
        server.cut("");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    cluster.put_service("a", 3);
    assert_eq!(run.next().await, "+a 3");
    assert!(!cluster.requests().iter().any(|request| is_list(request)));
}

#[tokio::test]
async fn forgotten_changes_are_found_by_a_list() {
    let (cluster, server, mut run) = started().await;
    server.set_mode(Mode::Fails(503));
    server.cut("");
    run.until("503").await;
    cluster.put_service("a", 2);
    cluster.put_service("c", 3);
    cluster.delete(SERVICES, "b");
    cluster.forget();
    server.set_mode(Mode::Well);
    assert_eq!(run.next().await, "all: a 2, c 3, kubernetes 443");
    cluster.put_service("a", 4);
    assert_eq!(run.next().await, "+a 4");
}

#[tokio::test]
async fn an_error_inside_of_a_watch_leads_to_a_list() {
    for code in [410, 500] {
        let (cluster, _server, mut run) = started().await;
        cluster.delete(SERVICES, "b");
        assert_eq!(run.next().await, "-b");
        cluster.say(&format!(
            r#"{{"type":"ERROR","object":{{"kind":"Status","code":{code},"message":"no"}}}}"#
        ));
        assert_eq!(run.next().await, "all: a 1, kubernetes 443", "{code}");
    }
}

#[tokio::test]
async fn a_list_whose_pages_expire_is_asked_for_in_one_piece() {
    let cluster = Cluster::new();
    for name in ["a", "b", "c", "d"] {
        cluster.put_service(name, 1);
    }
    cluster.expire_tokens(usize::MAX);
    let server = cluster.serve().await;
    let mut run = Run::start(&[&server]);
    assert_eq!(run.next().await, "all: a 1, b 1, c 1, d 1, kubernetes 443");
}

#[tokio::test]
async fn a_server_that_restarts_is_found_again() {
    let (cluster, server, mut run) = started().await;
    let address = server.address;
    drop(server);
    run.until("retrying").await;
    cluster.put_service("a", 2);
    let _server = cluster.serve_at(address).await;
    assert_eq!(run.next().await, "+a 2");
    run.until("watching").await;
    assert!(!cluster.requests().iter().any(|request| is_list(request)));
}

#[tokio::test]
async fn another_server_takes_over_from_one_that_is_gone() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.serve().await, cluster.serve().await);
    let mut run = Run::start(&[&one, &two]);
    assert_eq!(run.next().await, "all: kubernetes 443");
    run.until("watching").await;
    cluster.requests();
    let address = one.address;
    drop(one);
    cluster.put_service("a", 2);
    assert_eq!(run.next().await, "+a 2");
    // And back.
    let _one = cluster.serve_at(address).await;
    drop(two);
    cluster.put_service("a", 3);
    assert_eq!(run.next().await, "+a 3");
    assert!(!cluster.requests().iter().any(|request| is_list(request)));
}

#[tokio::test]
async fn another_server_takes_over_from_one_that_answers_errors_or_nothing() {
    for mode in [Mode::Fails(500), Mode::Fails(503), Mode::Silent] {
        let cluster = Cluster::new();
        let (one, two) = (cluster.serve().await, cluster.serve().await);
        one.set_mode(mode.clone());
        let mut run = Run::start(&[&one, &two]);
        assert_eq!(run.next().await, "all: kubernetes 443", "{mode:?}");
    }
}

#[tokio::test]
async fn a_watch_that_falls_silent_is_asked_for_anew() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.serve().await, cluster.serve().await);
    let silence = Duration::from_millis(200);
    let mut run = Run::start_with(
        &[&one, &two],
        Timing {
            silence,
            ..timing()
        },
    );
    assert_eq!(run.next().await, "all: kubernetes 443");
    run.until("watching").await;
    cluster.requests();
    one.set_mode(Mode::Silent);
    cluster.put_service("a", 2);
    assert_eq!(run.next().await, "+a 2");
    assert!(!cluster.requests().iter().any(|request| is_list(request)));
}

#[tokio::test]
async fn a_bad_object_is_reported_and_the_others_are_used() {
    let cluster = Cluster::new();
    cluster.put_service("a", 70_000);
    cluster.put(SERVICES, "b", serde_json::json!({"metadata": "b"}));
    cluster.put(SERVICES, "c", service(&"c".repeat(1_000_000), 1));
    cluster.put_service("d", 4);
    let server = cluster.serve().await;
    let mut run = Run::start(&[&server]);
    // `a` is there, whatever it is: what was known of it is not to be forgotten.
    assert_eq!(run.next().await, "all: d 4, kubernetes 443; kept: a");
    let told = [run.next().await, run.next().await, run.next().await];
    assert!(
        told[0].starts_with("!default/a") && told[0].contains("70000"),
        "{told:?}"
    );
    assert!(told[1].starts_with('!'), "{told:?}");
    assert!(
        told[2].starts_with("!default/ccc") && told[2].len() < 1_000,
        "{told:?}"
    );
    cluster.put_service("d", 0);
    assert!(run.next().await.starts_with("!default/d"));
    cluster.put_service("e", 5);
    assert_eq!(run.next().await, "+e 5");
    cluster.delete(SERVICES, "d");
    assert_eq!(run.next().await, "-d");
}

#[tokio::test]
async fn a_line_that_is_not_json_leads_to_a_list() {
    let (cluster, _server, mut run) = started().await;
    cluster.say("{\"type\": \"MODIFIED\", \"object\": {\"metadata\": {{}}}");
    assert_eq!(run.next().await, "all: a 1, b 1, kubernetes 443");
    cluster.put_service("z", 9);
    assert_eq!(run.next().await, "+z 9");
}

#[tokio::test]
async fn a_server_that_forgets_everything_at_once_is_not_asked_all_the_time() {
    let cluster = Cluster::new();
    let server = cluster.serve().await;
    server.set_mode(Mode::ForgetsAtOnce);
    let mut run = Run::start(&[&server]);
    let started = std::time::Instant::now();
    for _ in 0..8 {
        assert_eq!(run.next().await, "all: kubernetes 443");
    }
    // Pauses of 4, 8, 16, 32 and then 40 ms; at the least half of each.
    assert!(
        started.elapsed() >= Duration::from_millis(85),
        "{:?}",
        started.elapsed()
    );
}

#[tokio::test]
async fn a_watch_that_ends_at_once_is_a_failure() {
    let cluster = Cluster::new();
    let server = cluster.serve().await;
    server.set_mode(Mode::EndsWatches);
    let mut run = Run::start(&[&server]);
    assert_eq!(run.next().await, "all: kubernetes 443");
    run.until("ends the watch at once").await;
    server.set_mode(Mode::Well);
    cluster.put_service("a", 1);
    assert_eq!(run.next().await, "+a 1");
}

#[tokio::test]
async fn what_is_missing_is_said() {
    for (status, text) in [
        (403, "the service account needs get, list and watch"),
        (404, "does not know this kind"),
        (500, "made to answer 500"),
    ] {
        let cluster = Cluster::new();
        let server = cluster.serve().await;
        server.set_mode(Mode::RefusesServices(status));
        let mut run = Run::start(&[&server]);
        run.until(text).await;
        // The other kinds go on meanwhile, and this one as soon as it can.
        server.set_mode(Mode::Well);
        assert_eq!(run.next().await, "all: kubernetes 443");
    }
}

#[tokio::test]
async fn it_ends_when_nobody_receives() {
    let (_cluster, _server, mut run) = started().await;
    run.events.close();
    assert!(timeout(PATIENCE, &mut run.task).await.is_ok());
}
