//! A Kubernetes API server, or several of one cluster: list, then watch.
//!
//! Invariant: a list is sent only when it is complete; a watch that breaks goes on from the last
//! resource version, with the next server if there is one, and everything is listed anew only
//! when the server says that this version is too old (410 Gone), or says what nobody understands.

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;
mod watcher;
mod wire;

use std::{sync::Arc, time::Duration};

use kube::{Client, Config};
use tokio::sync::mpsc::Sender;

use super::{Scope, Status};
use crate::{
    api::{SOCKET_HOOKS_DISABLED, SOCKET_HOOKS_LABEL},
    model::object::{Event, Kind},
};
use watcher::Watcher;

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
            // So is when to try again, and where: the next server may be well.
            config.default_retry = false;
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

/// What takes how long.
#[derive(Clone, Copy, Debug)]
struct Timing {
    /// Objects in a page of a list.
    page: u32,
    /// How long a server may take to answer: with a page, or with the beginning of a watch.
    answer: Duration,
    /// How long a watch lasts before the server ends it.
    watch: Duration,
    /// How long a watch may be silent. Servers send a bookmark every 60 to 75 s (`bookmarkFrequency`
    /// and its jitter in Kubernetes' watch cache), so that a longer silence is a connection that
    /// nobody holds the other end of.
    silence: Duration,
    /// A watch that ends earlier, having said nothing, is taken for a failure.
    shortest_watch: Duration,
    /// The pause after a first failure; each further one takes twice as long.
    first_pause: Duration,
    /// The longest pause.
    longest_pause: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            page: 500,
            answer: Duration::from_secs(60),
            watch: Duration::from_secs(290),
            silence: Duration::from_secs(90),
            shortest_watch: Duration::from_secs(1),
            first_pause: Duration::from_millis(100),
            longest_pause: Duration::from_secs(10),
        }
    }
}

/// Sends events of all kinds until nobody listens.
pub async fn run(servers: Servers, scope: Scope, status: Status, events: Sender<Event>) {
    run_with(servers, &scope, &status, &events, Timing::default()).await;
}

async fn run_with(
    servers: Servers,
    scope: &Scope,
    status: &Status,
    events: &Sender<Event>,
    timing: Timing,
) {
    let tasks = Kind::ALL.into_iter().map(|kind| {
        let watcher = Watcher::new(
            kind,
            servers.clone(),
            selector(kind, scope),
            status.clone(),
            events.clone(),
            timing,
        );
        watcher.run()
    });
    // Dropped with this future, which ends the watchers.
    let mut running: tokio::task::JoinSet<()> = tasks.collect();
    tokio::select! {
        () = events.closed() => {}
        () = async { while running.join_next().await.is_some() {} } => {}
    }
}

/// The kind's path, and which objects of it are wanted.
fn selector(kind: Kind, scope: &Scope) -> (&'static str, String) {
    let node = &scope.node_name;
    // As kube-proxy: what is somebody else's need not even be sent.
    let ours =
        "labelSelector=!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name";
    match kind {
        Kind::Service => ("/api/v1/services", ours.to_owned()),
        Kind::EndpointSlice => ("/apis/discovery.k8s.io/v1/endpointslices", ours.to_owned()),
        Kind::Node if scope.has_network => ("/api/v1/nodes", String::new()),
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
