//! One kind of objects: listed, then watched, for as long as anybody listens.

use std::time::Duration;

use futures::{AsyncBufReadExt, StreamExt};
use kube::Client;
use tokio::{
    sync::mpsc::Sender,
    time::{Instant, sleep, timeout},
};

use super::{
    Servers, Status, Timing,
    wire::{ErrorObject, List, WatchEvent, name_of, version_of},
};
use crate::{
    api::{Decoded, Decoder},
    model::object::{Event, Kind, Object, ObjectName, Rejection},
    words::chain,
};

/// How the state begins while something fails.
const RETRYING: &str = "retrying";

/// Why listing or watching stopped.
#[derive(Debug)]
enum Stop {
    /// Nobody listens any more.
    Closed,
    /// The resource version is too old.
    Gone,
    /// The watch said what it would say again.
    Broken(String),
    /// The watch ran its time.
    Ended,
    /// The watch said nothing for too long.
    Silent,
    /// Anything else.
    Failed(String),
}

/// Watches a kind.
pub(super) struct Watcher {
    kind: Kind,
    servers: Servers,
    server: usize,
    selector: (&'static str, String),
    decoder: Decoder,
    status: Status,
    events: Sender<Event>,
    timing: Timing,
}

impl Watcher {
    pub(super) fn new(
        kind: Kind,
        servers: Servers,
        selector: (&'static str, String),
        status: Status,
        events: Sender<Event>,
        timing: Timing,
    ) -> Self {
        Self {
            kind,
            servers,
            server: 0,
            selector,
            decoder: Decoder::default(),
            status,
            events,
            timing,
        }
    }

    pub(super) async fn run(mut self) {
        let mut pause = self.timing.first_pause;
        let mut version: Option<String> = None;
        while !self.events.is_closed() {
            let began = Instant::now();
            let (stop, is_progress) = match &mut version {
                None => match self.list().await {
                    Ok(listed) => {
                        version = Some(listed);
                        continue;
                    }
                    Err(stop) => (stop, false),
                },
                Some(version) => {
                    let before = version.clone();
                    let stop = self.watch(version).await;
                    let is_long = began.elapsed() >= self.timing.shortest_watch;
                    (stop, is_long || *version != before)
                }
            };
            // Only a watch that was of use makes up for failures: a server may list well and
            // forget at once what it listed.
            if is_progress {
                pause = self.timing.first_pause;
            }
            match stop {
                Stop::Closed => return,
                Stop::Ended if is_progress => continue,
                Stop::Silent => {
                    tracing::debug!("{}: the watch is silent; asking anew", self.kind);
                    self.server += 1;
                    continue;
                }
                Stop::Gone => version = None,
                Stop::Broken(reason) => {
                    self.fail(&reason);
                    version = None;
                }
                Stop::Ended => self.fail("the server ends the watch at once"),
                Stop::Failed(reason) => self.fail(&reason),
            }
            sleep(jittered(pause)).await;
            pause = (pause * 2).min(self.timing.longest_pause);
        }
    }

    /// Says so, and turns to the next server.
    fn fail(&mut self, reason: &str) {
        let state = format!("{RETRYING}: {reason}");
        if self.status.states().get(&self.kind) != Some(&state) {
            tracing::warn!(
                "{}: {reason}; what is known stays as it is, trying again",
                self.kind
            );
        }
        self.status.set(self.kind, state);
        self.server += 1;
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
        let limit = self.timing.page;
        let mut collected = Collected::default();
        let mut query = format!("&limit={limit}");
        loop {
            let (version, more) = match self.page(&query, &mut collected).await {
                // A list's snapshot may expire between its pages. One answer can't.
                Err(Stop::Gone) if query.contains("&continue=") => {
                    collected = Collected::default();
                    self.page("", &mut collected).await?
                }
                page => page?,
            };
            match more {
                Some(more) => query = format!("&limit={limit}&continue={more}"),
                None => {
                    self.send_list(collected).await?;
                    return Ok(version);
                }
            }
        }
    }

    /// Asks for a page; the list's resource version, and where the next page begins.
    async fn page(
        &mut self,
        query: &str,
        collected: &mut Collected,
    ) -> Result<(String, Option<String>), Stop> {
        let (server, client) = self.client()?;
        let request = self.request(query)?;
        let text = timeout(self.timing.answer, client.request_text(request))
            .await
            .map_err(|_| Stop::Failed(format!("{server} took too long to answer a list")))?
            .map_err(|error| stop_for(&server, &error))?;
        let list: List<'_> = serde_json::from_str(&text)
            .map_err(|error| Stop::Failed(format!("{server} sent no list: {error}")))?;
        for item in list.items.unwrap_or_default() {
            match self.decoder.json(self.kind, item.get(), &server) {
                Ok(Decoded::Object(object)) => collected.objects.push(object),
                Ok(_) => {}
                Err(rejection) => {
                    collected.kept.extend(name_of(item.get()));
                    collected.rejections.push(rejection);
                }
            }
        }
        let more = list.metadata.r#continue.filter(|more| !more.is_empty());
        Ok((list.metadata.resource_version, more))
    }

    async fn send_list(&self, collected: Collected) -> Result<(), Stop> {
        self.send(Event::Listed(self.kind, collected.objects, collected.kept))
            .await?;
        for rejection in collected.rejections {
            self.send(Event::Rejected(rejection)).await?;
        }
        Ok(())
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
        let seconds = self.timing.watch.as_secs();
        let request = self.request(&format!(
            "&watch=true&allowWatchBookmarks=true&timeoutSeconds={seconds}&resourceVersion={version}"
        ))?;
        let body = timeout(self.timing.answer, client.request_stream(request))
            .await
            .map_err(|_| Stop::Failed(format!("{server} took too long to begin a watch")))?
            .map_err(|error| stop_for(&server, &error))?;
        let before = self.status.states().remove(&self.kind);
        if before.is_some_and(|state| state.starts_with(RETRYING)) {
            tracing::info!("{}: watching {server} again", self.kind);
        }
        self.status.set(self.kind, format!("watching {server}"));
        let mut lines = std::pin::pin!(body.lines());
        loop {
            let line = timeout(self.timing.silence, lines.next())
                .await
                .map_err(|_| Stop::Silent)?;
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
            .map_err(|error| Stop::Broken(format!("{server} sent no watch event: {error}")))?;
        let object = event.object.get();
        if event.r#type == "ERROR" {
            let error: ErrorObject = serde_json::from_str(object).unwrap_or_default();
            return Err(match error.code {
                410 => Stop::Gone,
                code => Stop::Broken(format!(
                    "{server} ended the watch: {code} {}",
                    error.message
                )),
            });
        }
        match event.r#type {
            "ADDED" | "MODIFIED" => match self.decoder.json(self.kind, object, server) {
                Ok(decoded) => {
                    if let Some(event) = decoded.into_event() {
                        self.send(event).await?;
                    }
                }
                Err(rejection) => self.send(Event::Rejected(rejection)).await?,
            },
            "DELETED" => {
                if let Some(name) = name_of(object) {
                    self.send(Event::Deleted(self.kind, name)).await?;
                }
            }
            _ => {}
        }
        if let Some(now) = version_of(object) {
            *version = now;
        }
        Ok(())
    }
}

/// What the pages of a list held.
#[derive(Default)]
struct Collected {
    objects: Vec<Object>,
    /// Objects that are there and can't be used.
    kept: Vec<ObjectName>,
    rejections: Vec<Rejection>,
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

/// A wait between half and all of `wait`, so that nodes do not come back in step.
fn jittered(wait: Duration) -> Duration {
    let nanos = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.subsec_nanos());
    wait / 2 + wait.mul_f64(f64::from(nanos % 1_000) / 2_000.0)
}
