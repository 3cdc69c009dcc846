//! A Kubernetes API server, or several of one cluster: list, then watch.
//!
//! Invariant: a list is sent only when it is complete; a watch that breaks goes on from the last
//! resource version, with the next server if there is one, and everything is listed anew only
//! when the server says that this version is too old (410 Gone).

use std::{sync::Arc, time::Duration};

use futures::{AsyncBufReadExt, StreamExt};
use kube::{Client, Config};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::mpsc::Sender;

use super::Status;
use crate::{
    api::{Decoded, Decoder, SOCKET_HOOKS_DISABLED, SOCKET_HOOKS_LABEL},
    model::object::{Event, Kind, Object, ObjectName, Rejection},
};

/// Objects in a page of a list.
const PAGE: u32 = 500;
/// How long a server may take for a page.
const LIST_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a watch lasts before the server ends it, in seconds.
const WATCH_SECONDS: u64 = 290;
/// How long a watch may be silent: the server ends it earlier, if it is there.
const WATCH_TIMEOUT: Duration = Duration::from_secs(WATCH_SECONDS + 10);
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// The connection can't be set up at all.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The kubeconfig or the pod's service account is no good.
    #[error("reading {what}: {source}")]
    Config {
        /// Which.
        what: String,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No client can be made for a server.
    #[error("connecting to {server}: {source}")]
    Client {
        /// The server.
        server: String,
        /// Why not.
        #[source]
        source: Box<kube::Error>,
    },
}

/// The servers of one cluster.
#[derive(Clone)]
pub struct Servers {
    clients: Arc<Vec<(String, Client)>>,
}

impl Servers {
    /// Connects with the credentials of a configuration to each of `urls`, or to the
    /// configuration's own server if there are none.
    pub fn new(config: Config, urls: &[http::Uri]) -> Result<Self, SetupError> {
        let own = [config.cluster_url.clone()];
        let urls = if urls.is_empty() {
            own.as_slice()
        } else {
            urls
        };
        let mut clients = Vec::with_capacity(urls.len());
        for url in urls {
            let mut config = config.clone();
            config.cluster_url = url.clone();
            config.connect_timeout = Some(Duration::from_secs(5));
            // Watches are long; what may take how long is decided here.
            config.read_timeout = None;
            let client = Client::try_from(config).map_err(|source| SetupError::Client {
                server: url.to_string(),
                source: Box::new(source),
            })?;
            clients.push((url.to_string(), client));
        }
        Ok(Self {
            clients: Arc::new(clients),
        })
    }

    fn at(&self, number: usize) -> Option<&(String, Client)> {
        self.clients.get(number % self.clients.len().max(1))
    }
}

/// Why listing or watching stopped.
#[derive(Debug)]
enum Stop {
    /// Nobody listens any more.
    Closed,
    /// The resource version is too old.
    Gone,
    /// The watch ran its time.
    Ended,
    /// Anything else.
    Failed(String),
}

/// Sends events of all kinds until nobody listens.
pub async fn run(servers: Servers, node_name: String, status: Status, events: Sender<Event>) {
    let tasks = Kind::ALL.into_iter().map(|kind| {
        let watcher = Watcher {
            kind,
            servers: servers.clone(),
            server: 0,
            selector: selector(kind, &node_name),
            decoder: Decoder::default(),
            status: status.clone(),
            complaint: None,
            events: events.clone(),
        };
        tokio::spawn(watcher.run())
    });
    futures::future::join_all(tasks).await;
}

/// The kind's path, and which objects of it are wanted.
fn selector(kind: Kind, node: &str) -> (&'static str, String) {
    // As kube-proxy: what is somebody else's need not even be sent.
    let ours =
        "labelSelector=!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name";
    match kind {
        Kind::Service => ("/api/v1/services", ours.to_owned()),
        Kind::EndpointSlice => ("/apis/discovery.k8s.io/v1/endpointslices", ours.to_owned()),
        Kind::Node => (
            "/api/v1/nodes",
            format!("fieldSelector=metadata.name={node}"),
        ),
        Kind::Pod => (
            "/api/v1/pods",
            format!(
                "fieldSelector=spec.nodeName={node}\
                 &labelSelector={SOCKET_HOOKS_LABEL}={SOCKET_HOOKS_DISABLED}"
            ),
        ),
    }
}

struct Watcher {
    kind: Kind,
    servers: Servers,
    server: usize,
    selector: (&'static str, String),
    decoder: Decoder,
    status: Status,
    complaint: Option<String>,
    events: Sender<Event>,
}

#[derive(Deserialize)]
struct List<'a> {
    metadata: ListMetadata,
    #[serde(borrow, default)]
    items: Option<Vec<&'a RawValue>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMetadata {
    #[serde(default)]
    resource_version: String,
    #[serde(default)]
    r#continue: Option<String>,
}

#[derive(Deserialize)]
struct WatchEvent<'a> {
    r#type: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Versioned {
    metadata: VersionedMetadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct VersionedMetadata {
    #[serde(default)]
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    resource_version: String,
}

#[derive(Default, Deserialize)]
struct ErrorObject {
    #[serde(default)]
    code: u16,
    #[serde(default)]
    message: String,
}

impl Watcher {
    async fn run(mut self) {
        let mut wait = FIRST_WAIT;
        let mut version = None;
        loop {
            let stop = match version.take() {
                None => match self.list().await {
                    Ok(listed) => {
                        version = Some(listed);
                        wait = FIRST_WAIT;
                        self.complaint = None;
                        continue;
                    }
                    Err(stop) => stop,
                },
                Some(from) => {
                    let mut at: String = from;
                    let before = at.clone();
                    let stop = self.watch(&mut at).await;
                    if at != before {
                        wait = FIRST_WAIT;
                    }
                    version = Some(at);
                    stop
                }
            };
            match stop {
                Stop::Closed => return,
                Stop::Ended => {}
                Stop::Gone => version = None,
                Stop::Failed(reason) => {
                    self.complain(&reason);
                    self.server += 1;
                    tokio::time::sleep(jittered(wait)).await;
                    wait = (wait * 2).min(LONGEST_WAIT);
                }
            }
            if self.events.is_closed() {
                return;
            }
        }
    }

    fn complain(&self, reason: &str) {
        let state = format!("retrying: {reason}");
        if self.status.states().get(&self.kind) != Some(&state) {
            tracing::warn!(
                "{}: {reason}; what is known stays as it is, trying again",
                self.kind
            );
        }
        self.status.set(self.kind, state);
    }

    fn client(&self) -> Result<(String, Client), Stop> {
        self.servers
            .at(self.server)
            .cloned()
            .ok_or_else(|| Stop::Failed("no server".to_owned()))
    }

    fn request(&self, query: &str) -> Result<http::Request<Vec<u8>>, Stop> {
        let (path, selector) = &self.selector;
        let uri = format!("{path}?{selector}{query}").replace('!', "%21");
        http::Request::get(uri)
            .header(http::header::ACCEPT, "application/json")
            .body(Vec::new())
            .map_err(|error| Stop::Failed(format!("the request is no good: {error}")))
    }

    /// Lists everything and sends it; the resource version to watch from.
    async fn list(&mut self) -> Result<String, Stop> {
        let (server, client) = self.client()?;
        self.status.set(self.kind, format!("listing from {server}"));
        let mut objects = Vec::new();
        let mut kept = Vec::new();
        let mut rejections = Vec::new();
        let mut position = String::new();
        loop {
            let request = self.request(&format!("&limit={PAGE}{position}"))?;
            let text = tokio::time::timeout(LIST_TIMEOUT, client.request_text(request))
                .await
                .map_err(|_| Stop::Failed(format!("{server} took too long to answer a list")))?
                .map_err(|error| stop_for(&server, &error))?;
            let list: List<'_> = serde_json::from_str(&text)
                .map_err(|error| Stop::Failed(format!("{server} sent no list: {error}")))?;
            for item in list.items.unwrap_or_default() {
                match self.decoder.json(self.kind, item.get(), &server) {
                    Ok(Decoded::Object(object)) => objects.push(object),
                    Ok(_) => {}
                    Err(rejection) => {
                        kept.extend(name_of(item.get()));
                        rejections.push(rejection);
                    }
                }
            }
            match list.metadata.r#continue.filter(|more| !more.is_empty()) {
                Some(more) => position = format!("&continue={more}"),
                None => {
                    self.send_list(objects, kept, rejections).await?;
                    self.status.set(self.kind, format!("watching {server}"));
                    return Ok(list.metadata.resource_version);
                }
            }
        }
    }

    async fn send_list(
        &self,
        objects: Vec<Object>,
        kept: Vec<ObjectName>,
        rejections: Vec<Rejection>,
    ) -> Result<(), Stop> {
        for rejection in rejections {
            self.send(Event::Rejected(rejection)).await?;
        }
        self.send(Event::Listed(self.kind, objects, kept)).await
    }

    async fn send(&self, event: Event) -> Result<(), Stop> {
        self.events.send(event).await.map_err(|_| Stop::Closed)
    }

    /// Watches from `version` on, which it moves along.
    async fn watch(&mut self, version: &mut String) -> Stop {
        match self.try_watch(version).await {
            Ok(()) => Stop::Ended,
            Err(stop) => stop,
        }
    }

    async fn try_watch(&mut self, version: &mut String) -> Result<(), Stop> {
        let (server, client) = self.client()?;
        let request = self.request(&format!(
            "&watch=1&allowWatchBookmarks=true&timeoutSeconds={WATCH_SECONDS}&resourceVersion={version}"
        ))?;
        let late = |_| Stop::Failed(format!("{server} is silent"));
        let body = tokio::time::timeout(LIST_TIMEOUT, client.request_stream(request))
            .await
            .map_err(late)?
            .map_err(|error| stop_for(&server, &error))?;
        self.status.set(self.kind, format!("watching {server}"));
        let mut lines = std::pin::pin!(body.lines());
        loop {
            let line = tokio::time::timeout(WATCH_TIMEOUT, lines.next())
                .await
                .map_err(late)?;
            match line {
                None => return Ok(()),
                Some(Err(error)) => {
                    return Err(Stop::Failed(format!(
                        "the watch of {server} broke: {error}"
                    )));
                }
                Some(Ok(line)) if line.trim().is_empty() => {}
                Some(Ok(line)) => self.handle(&line, version, &server).await?,
            }
        }
    }

    async fn handle(&mut self, line: &str, version: &mut String, server: &str) -> Result<(), Stop> {
        let event: WatchEvent<'_> = serde_json::from_str(line)
            .map_err(|error| Stop::Failed(format!("{server} sent no watch event: {error}")))?;
        let object = event.object.get();
        if event.r#type == "ERROR" {
            let error: ErrorObject = serde_json::from_str(object).unwrap_or_default();
            return Err(match error.code {
                410 => Stop::Gone,
                code => Stop::Failed(format!(
                    "{server} ended the watch: {code} {}",
                    error.message
                )),
            });
        }
        if let Ok(versioned) = serde_json::from_str::<Versioned>(object)
            && !versioned.metadata.resource_version.is_empty()
        {
            *version = versioned.metadata.resource_version;
        }
        match event.r#type {
            "ADDED" | "MODIFIED" => match self.decoder.json(self.kind, object, server) {
                Ok(decoded) => match decoded.into_event() {
                    Some(event) => self.send(event).await,
                    None => Ok(()),
                },
                Err(rejection) => self.send(Event::Rejected(rejection)).await,
            },
            "DELETED" => match name_of(object) {
                Some(name) => self.send(Event::Deleted(self.kind, name)).await,
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }
}

/// The name of an object that may be no good otherwise.
fn name_of(json: &str) -> Option<ObjectName> {
    let metadata = serde_json::from_str::<Versioned>(json).ok()?.metadata;
    (!metadata.name.is_empty()).then(|| ObjectName::new(metadata.namespace, metadata.name))
}

fn stop_for(server: &str, error: &kube::Error) -> Stop {
    match error {
        kube::Error::Api(status) if status.code == 410 => Stop::Gone,
        kube::Error::Api(status) if status.code == 404 => Stop::Failed(format!(
            "{server} does not know this kind ({}); Penstock needs Kubernetes 1.21 or newer",
            status.message
        )),
        kube::Error::Api(status) if status.code == 403 => Stop::Failed(format!(
            "{server} forbids it: {}; the service account needs get, list and watch",
            status.message
        )),
        other => Stop::Failed(format!("{server}: {}", chain(other))),
    }
}

/// An error with all its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

/// A wait between half and all of `wait`, so that nodes do not come back in step.
fn jittered(wait: Duration) -> Duration {
    let nanos = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.subsec_nanos());
    wait / 2 + wait.mul_f64(f64::from(nanos % 1_000) / 2_000.0)
}
