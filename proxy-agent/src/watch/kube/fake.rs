//! A cluster made of memory, with API servers in front of it that speak just enough HTTP: lists in
//! pages, watches with bookmarks, and every way of failing that the tests ask for.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
};

use http::Uri;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

pub(super) const SERVICES: &str = "/api/v1/services";
pub(super) const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";

/// How an API server behaves.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) enum Mode {
    #[default]
    Well,
    /// Answers everything with this status.
    Fails(u16),
    /// Answers requests for Services with this status.
    RefusesServices(u16),
    /// Takes requests and says nothing; watches that run say nothing either.
    Silent,
    /// Ends watches as soon as they begin.
    EndsWatches,
    /// Lists well, and says of each version that it is too old.
    ForgetsAtOnce,
}

#[derive(Default)]
struct State {
    version: u64,
    objects: BTreeMap<(&'static str, String), Value>,
    /// Version, path and line of everything that happened.
    log: Vec<(u64, &'static str, String)>,
    /// Changes up to this version are forgotten.
    forgotten: u64,
    /// So many continuation tokens are refused as expired.
    expired_tokens: usize,
    requests: Vec<String>,
}

/// What the servers of one cluster share.
#[derive(Clone)]
pub(super) struct Cluster {
    state: Arc<Mutex<State>>,
    changed: watch::Sender<u64>,
}

impl Cluster {
    /// A cluster with nothing but the API's own Service and its slice.
    pub(super) fn new() -> Self {
        let cluster = Self {
            state: Arc::default(),
            changed: watch::channel(0).0,
        };
        cluster.put(SERVICES, "kubernetes", service("kubernetes", 443));
        cluster.put(
            SLICES,
            "kubernetes",
            json!({"metadata": {"name": "kubernetes"}}),
        );
        cluster
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn log(&self, path: &'static str, line: impl FnOnce(&mut State) -> String) {
        let mut state = self.lock();
        state.version += 1;
        let line = line(&mut state);
        let version = state.version;
        state.log.push((version, path, line));
        drop(state);
        self.changed.send_modify(|changes| *changes += 1);
    }

    /// Creates or changes an object.
    pub(super) fn put(&self, path: &'static str, name: &str, mut object: Value) {
        self.log(path, |state| {
            if let Some(metadata) = object["metadata"].as_object_mut() {
                let version = state.version.to_string();
                metadata.insert("resourceVersion".to_owned(), version.into());
            }
            let old = state
                .objects
                .insert((path, name.to_owned()), object.clone());
            let r#type = if old.is_some() { "MODIFIED" } else { "ADDED" };
            json!({"type": r#type, "object": object}).to_string()
        });
    }

    pub(super) fn put_service(&self, name: &str, port: i64) {
        self.put(SERVICES, name, service(name, port));
    }

    pub(super) fn delete(&self, path: &'static str, name: &str) {
        self.log(path, |state| {
            let mut object = state.objects.remove(&(path, name.to_owned())).unwrap();
            object["metadata"]["resourceVersion"] = state.version.to_string().into();
            json!({"type": "DELETED", "object": object}).to_string()
        });
    }

    /// Tells watchers of Services a version, and nothing else.
    pub(super) fn bookmark_at(&self, version: u64) {
        self.log(SERVICES, |_| {
            let metadata = json!({"resourceVersion": version.to_string()});
            json!({"type": "BOOKMARK", "object": {"metadata": metadata}}).to_string()
        });
    }

    /// Sends watchers of Services a line as it is.
    pub(super) fn say(&self, line: &str) {
        self.log(SERVICES, |_| line.to_owned());
    }

    /// Forgets all changes so far, so that they can't be watched.
    pub(super) fn forget(&self) {
        let mut state = self.lock();
        state.forgotten = state.version;
    }

    pub(super) fn expire_tokens(&self, count: usize) {
        self.lock().expired_tokens = count;
    }

    /// The requests for Services that were made since the last call.
    pub(super) fn requests(&self) -> Vec<String> {
        let all = std::mem::take(&mut self.lock().requests);
        all.into_iter()
            .filter(|r| r.starts_with(SERVICES))
            .collect()
    }

    /// A new API server in front of the cluster.
    pub(super) async fn serve(&self) -> Server {
        self.serve_at("127.0.0.1:0".parse().unwrap()).await
    }

    pub(super) async fn serve_at(&self, address: SocketAddr) -> Server {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let control = watch::channel(Control::default()).0;
        let (cluster, controls) = (self.clone(), control.clone());
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let connection = Connection {
                    cluster: cluster.clone(),
                    control: controls.subscribe(),
                    stream,
                };
                tokio::spawn(connection.serve());
            }
        });
        Server {
            address,
            control,
            task,
        }
    }

    fn list(&self, path: &str, query: &BTreeMap<String, String>) -> Result<Value, u16> {
        let mut state = self.lock();
        let limit = query
            .get("limit")
            .map_or(usize::MAX, |limit| limit.parse().unwrap());
        let start: usize = query
            .get("continue")
            .map_or(0, |token| token.parse().unwrap());
        if start > 0 && state.expired_tokens > 0 {
            state.expired_tokens -= 1;
            return Err(410);
        }
        let all: Vec<_> = state
            .objects
            .iter()
            .filter(|((of, _), _)| *of == path)
            .collect();
        let items: Vec<_> = all
            .iter()
            .skip(start)
            .take(limit)
            .map(|(_, o)| (*o).clone())
            .collect();
        let end = start + items.len();
        let token = if end < all.len() {
            end.to_string()
        } else {
            String::new()
        };
        let metadata = json!({"resourceVersion": state.version.to_string(), "continue": token});
        Ok(json!({"kind": "List", "metadata": metadata, "items": items}))
    }

    /// The lines after a version, and the version of the last.
    fn lines(&self, path: &str, after: u64) -> (Vec<String>, u64) {
        let state = self.lock();
        let new = state
            .log
            .iter()
            .filter(|(version, of, _)| *version > after && *of == path);
        (new.map(|(.., line)| line.clone()).collect(), state.version)
    }
}

#[derive(Clone, Default)]
struct Control {
    mode: Mode,
    /// Connections that began before the last cut are closed.
    cuts: usize,
    /// They say this before.
    last_words: &'static str,
}

/// An API server. Its connections break when it is dropped.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    control: watch::Sender<Control>,
    task: JoinHandle<()>,
}

impl Server {
    pub(super) fn url(&self) -> Uri {
        format!("http://{}/", self.address).parse().unwrap()
    }

    pub(super) fn set_mode(&self, mode: Mode) {
        self.control.send_modify(|control| control.mode = mode);
    }

    /// Closes all connections in the middle of whatever they say.
    pub(super) fn cut(&self, last_words: &'static str) {
        self.control.send_modify(|control| {
            control.cuts += 1;
            control.last_words = last_words;
        });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        self.cut("");
    }
}

struct Connection {
    cluster: Cluster,
    control: watch::Receiver<Control>,
    stream: TcpStream,
}

impl Connection {
    async fn serve(mut self) {
        let mut control = self.control.clone();
        let cuts = control.borrow().cuts;
        let cut = async move {
            let changed = control.wait_for(|control| control.cuts != cuts).await;
            changed
                .map(|control| control.last_words)
                .unwrap_or_default()
        };
        let last_words = tokio::select! {
            () = async { while self.answer().await.is_some() {} } => return,
            last_words = cut => last_words,
        };
        if !last_words.is_empty() {
            let _ = self.stream.write_all(&chunk(last_words)).await;
        }
    }

    /// Answers one request; nothing if the connection ended.
    async fn answer(&mut self) -> Option<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(self.stream.read_u8().await.ok()?);
        }
        let head = String::from_utf8(head).unwrap();
        let target = head.split_whitespace().nth(1).unwrap().to_owned();
        self.cluster.lock().requests.push(target.clone());
        let (path, query) = parse(&target);
        let mode = self.control.borrow().mode.clone();
        match mode {
            Mode::Fails(status) => return self.fail(status).await,
            Mode::RefusesServices(status) if path == SERVICES => return self.fail(status).await,
            Mode::Silent => std::future::pending().await,
            Mode::ForgetsAtOnce if query.contains_key("watch") => return self.fail(410).await,
            Mode::EndsWatches if query.contains_key("watch") => return self.say(200, "").await,
            _ => {}
        }
        if query.contains_key("watch") {
            return self.watch(&path, &query).await;
        }
        match self.cluster.list(&path, &query) {
            Ok(list) => self.say(200, &list.to_string()).await,
            Err(status) => self.fail(status).await,
        }
    }

    async fn watch(&mut self, path: &str, query: &BTreeMap<String, String>) -> Option<()> {
        assert_eq!(query["allowWatchBookmarks"], "true");
        let mut after = query["resourceVersion"].parse().unwrap();
        if after < self.cluster.lock().forgotten {
            return self.fail(410).await;
        }
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        self.stream.write_all(head.as_bytes()).await.ok()?;
        let mut changed = self.cluster.changed.subscribe();
        loop {
            changed.borrow_and_update();
            let mode = self.control.borrow().mode.clone();
            if mode != Mode::Silent {
                let (lines, version) = self.cluster.lines(path, after);
                after = version;
                for line in lines {
                    self.stream.write_all(&chunk(&(line + "\n"))).await.ok()?;
                }
            }
            changed.changed().await.ok()?;
        }
    }

    async fn fail(&mut self, status: u16) -> Option<()> {
        let body = json!({"kind": "Status", "status": "Failure", "code": status,
                          "message": format!("made to answer {status}")});
        self.say(status, &body.to_string()).await
    }

    async fn say(&mut self, status: u16, body: &str) -> Option<()> {
        let length = body.len();
        let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {length}\r\n\r\n");
        self.stream.write_all((head + body).as_bytes()).await.ok()
    }
}

fn chunk(text: &str) -> Vec<u8> {
    format!("{:x}\r\n{text}\r\n", text.len()).into_bytes()
}

fn parse(target: &str) -> (String, BTreeMap<String, String>) {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let pairs = pairs.map(|(key, value)| (key.to_owned(), value.to_owned()));
    (path.to_owned(), pairs.collect())
}

/// A Service as a list has it: without kind and version.
pub(super) fn service(name: &str, port: i64) -> Value {
    json!({"metadata": {"name": name, "namespace": "default"},
           "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": port}]}})
}
