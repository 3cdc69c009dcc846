//! What the agent tells the command line, over a socket in its run directory.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use penstock_common::{BackendFlags, FrontendFlags};
use serde::{Deserialize, Serialize};
use tokio::{
    io::AsyncWriteExt,
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
};

use crate::{
    attach::follow,
    dataplane::Dataplane,
    model::{
        object::{Family, Rejection},
        port::OnEmpty,
    },
    plan::planner::PortView,
    reconcile::Reconciler,
    watch,
};

/// A question, answered with the whole report.
pub type Query = oneshot::Sender<Report>;

/// Everything about a running agent.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// The agent's version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// For how long it has been running, in seconds.
    pub uptime_secs: u64,
    /// This node's name.
    pub node: String,
    /// Every first list has arrived.
    pub synced: bool,
    /// The kernel holds all that is wanted and nothing else.
    pub settled: bool,
    /// What the source does about each kind.
    pub sources: BTreeMap<String, String>,
    /// Kinds whose first list has not arrived.
    pub awaited: Vec<String>,
    /// How many there are.
    pub services: usize,
    /// How many there are.
    pub endpoint_slices: usize,
    /// How many there are.
    pub endpoints: usize,
    /// Backend ids in use.
    pub backends_used: usize,
    /// Slots in use.
    pub slots_used: u32,
    /// Interfaces with packet hooks.
    pub interfaces: Vec<Interface>,
    /// Objects that can't be used, and frontends that a service does not get.
    pub problems: Vec<String>,
    /// Ports that the kernel serves.
    pub ports: Vec<Port>,
}

/// A followed interface.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Whether both hooks are on it.
    pub attached: bool,
    /// Why not.
    pub error: Option<String>,
    /// The pod's addresses, as far as known.
    pub addresses: Vec<String>,
}

/// A port of a service in one family.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Port {
    /// namespace/name.
    pub service: String,
    /// The port's name.
    pub port: String,
    /// TCP, UDP or SCTP.
    pub protocol: String,
    /// IPv4 or IPv6.
    pub family: String,
    /// Its id in the kernel.
    pub id: u32,
    /// Addresses and ports that clients dial.
    pub frontends: Vec<String>,
    /// Seconds of session affinity, 0 without.
    pub affinity_secs: u32,
    /// What a client meets where there is no backend.
    pub on_empty: String,
    /// Who serves.
    pub backends: Vec<Backend>,
}

/// A backend.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Backend {
    /// Address and port.
    pub address: String,
    /// Its id in the kernel.
    pub id: u32,
    /// The life of the id.
    pub generation: u32,
    /// "active": gets new connections; "resting": keeps what it has.
    pub state: String,
}

/// An address and port as one writes them.
pub fn endpoint(ip: std::net::IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(ip, port).to_string()
}

impl From<&PortView> for Port {
    fn from(view: &PortView) -> Self {
        let first = view
            .frontends
            .first()
            .map(|(.., frontend)| *frontend)
            .unwrap_or_default();
        let drops = first.flags & FrontendFlags::DROP_WHEN_EMPTY != 0;
        let on_empty = if drops {
            OnEmpty::Drop
        } else {
            OnEmpty::Reject
        };
        Self {
            service: view.key.service.to_string(),
            port: view.key.port.to_string(),
            protocol: format!("{:?}", view.key.protocol).to_uppercase(),
            family: if view.key.family == Family::V4 {
                "IPv4"
            } else {
                "IPv6"
            }
            .to_owned(),
            id: view.id.0,
            frontends: view
                .frontends
                .iter()
                .map(|(ip, port, _)| endpoint(*ip, *port))
                .collect(),
            affinity_secs: first.affinity_secs,
            on_empty: on_empty.words().to_owned(),
            backends: view
                .backends
                .iter()
                .map(|(ip, port, id, generation, flags)| Backend {
                    address: endpoint(*ip, *port),
                    id: id.0,
                    generation: *generation,
                    state: state(*flags).to_owned(),
                })
                .collect(),
        }
    }
}

/// A backend's flags in a word.
pub fn state(flags: u32) -> &'static str {
    if flags & BackendFlags::SELECTED != 0 {
        "active"
    } else if flags & BackendFlags::LIVE != 0 {
        "resting"
    } else {
        "gone"
    }
}

/// A rejection as a sentence.
pub fn in_words(rejection: &Rejection) -> String {
    let Rejection {
        kind,
        object,
        origin,
        reason,
    } = rejection;
    let name = if object.is_empty() {
        kind.clone()
    } else {
        format!("{kind} {object}")
    };
    if origin.is_empty() {
        format!("{name}: {reason}")
    } else {
        format!("{origin}: {name}: {reason}")
    }
}

impl Report {
    /// What there is to tell.
    pub fn of<D: Dataplane>(
        node: &str,
        reconciler: &Reconciler<D>,
        status: &watch::Status,
        interfaces: &follow::Status,
        uptime: Duration,
    ) -> Self {
        let world = &reconciler.world;
        let (services, endpoint_slices, endpoints) = world.sizes();
        let (backends_used, slots_used) = reconciler.used();
        let mut problems: Vec<String> = status.rejections().iter().map(in_words).collect();
        problems.extend(world.conflicts().iter().map(in_words));
        problems.extend(
            reconciler
                .errors()
                .iter()
                .map(|(name, reason)| format!("Service {name} is not programmed: {reason}")),
        );
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_secs: uptime.as_secs(),
            node: node.to_owned(),
            synced: world.is_synced(),
            settled: reconciler.is_settled(),
            sources: status
                .states()
                .into_iter()
                .map(|(kind, state)| (kind.to_string(), state))
                .collect(),
            awaited: world.awaited().iter().map(ToString::to_string).collect(),
            services,
            endpoint_slices,
            endpoints,
            backends_used,
            slots_used,
            interfaces: interfaces
                .interfaces
                .values()
                .map(Interface::from)
                .collect(),
            problems,
            ports: reconciler.ports().iter().map(Port::from).collect(),
        }
    }
}

impl From<&follow::Followed> for Interface {
    fn from(followed: &follow::Followed) -> Self {
        let identity = followed.identity.as_ref();
        let addr4 = identity
            .and_then(|identity| identity.addr4)
            .map(|ip| ip.to_string());
        let addr6 = identity
            .and_then(|identity| identity.addr6)
            .map(|ip| ip.to_string());
        Self {
            name: followed.name.clone(),
            attached: followed.is_attached,
            error: followed.error.clone(),
            addresses: addr4.into_iter().chain(addr6).collect(),
        }
    }
}

fn socket_path(run_dir: &Path) -> PathBuf {
    run_dir.join("agent.sock")
}

/// Takes the run directory, unless another agent has it.
pub fn listen(run_dir: &Path) -> Result<UnixListener> {
    fs::create_dir_all(run_dir)
        .with_context(|| format!("creating {}; pass --run-dir", run_dir.display()))?;
    let path = socket_path(run_dir);
    if std::os::unix::net::UnixStream::connect(&path).is_ok() {
        bail!(
            "another agent is running (it answers at {}); stop it, or pass another --run-dir",
            path.display()
        );
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing {}", path.display()));
        }
        _ => {}
    }
    UnixListener::bind(&path).with_context(|| format!("listening at {}", path.display()))
}

/// Answers everybody who connects with the report as JSON.
pub async fn serve(listener: UnixListener, queries: mpsc::Sender<Query>) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let queries = queries.clone();
        tokio::spawn(async move {
            let (sender, answer) = oneshot::channel();
            if queries.send(sender).await.is_ok()
                && let Ok(report) = answer.await
                && let Ok(json) = serde_json::to_vec(&report)
            {
                // Who asked may have gone.
                let _ = stream.write_all(&json).await;
            }
        });
    }
}

/// The report of the agent whose run directory this is; `None` if none is running.
pub async fn fetch(run_dir: &Path) -> Result<Option<Report>> {
    let path = socket_path(run_dir);
    let Ok(mut stream) = UnixStream::connect(&path).await else {
        return Ok(None);
    };
    let mut json = Vec::new();
    let read = tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut json);
    tokio::time::timeout(Duration::from_secs(10), read)
        .await
        .with_context(|| format!("the agent at {} does not answer", path.display()))??;
    serde_json::from_slice(&json).map(Some).with_context(|| {
        format!(
            "the agent at {} answered with something else",
            path.display()
        )
    })
}
