//! `healthCheckNodePort`: tells load balancers whether this node has endpoints of a service whose
//! external policy is Local. Answers are kube-proxy's (pkg/proxy/healthcheck/service_health.go).
//!
//! One server a port on all addresses, or on each that `--nodeport-addresses` names. One that can't be
//! had is a problem of that service alone, and is tried again.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    convert::Infallible,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

use crate::{attach::follow::lock, listen, model::object::ObjectName};

/// How soon a port that could not be had is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// How long a client may take to ask.
const PATIENCE: Duration = Duration::from_secs(10);
/// For how long a change may wait to be written by a proxy that is healthy: kube-proxy's time, twice its
/// default `syncPeriod`.
pub const HEALTH_TIMEOUT: Duration = Duration::from_secs(60);

/// Since when changes wait to be written that could have been: what kube-proxy calls the oldest pending
/// update. Whoever is asked for the agent's health looks at it then, so that an agent that hangs in a
/// write is no healthy one.
#[derive(Clone, Debug, Default)]
pub struct Waiting(Arc<Mutex<Option<Instant>>>);

impl Waiting {
    /// Notes that there is something to be written.
    pub fn begin(&self) {
        lock(&self.0).get_or_insert_with(Instant::now);
    }

    /// Notes since when what could not be written waits; nothing does for `None`.
    pub fn set(&self, since: Option<Instant>) {
        *lock(&self.0) = since;
    }

    /// Whether something waits for too long.
    pub fn is_late(&self) -> bool {
        let since = *lock(&self.0);
        since.is_some_and(|since| since.elapsed() >= HEALTH_TIMEOUT)
    }
}

/// What is answered on a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// The service.
    pub service: ObjectName,
    /// How many of its endpoints on this node are ready.
    pub local_endpoints: usize,
}

/// What is answered on each port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checks {
    /// By port.
    pub ports: BTreeMap<u16, Check>,
    /// At which addresses; `None` for all.
    pub addresses: Option<BTreeSet<IpAddr>>,
    /// Whether every first list has arrived.
    pub is_synced: bool,
}

impl Checks {
    /// Where to listen, with what is answered there.
    fn sockets(&self) -> impl Iterator<Item = (SocketAddr, &Check)> {
        self.ports.iter().flat_map(|(port, check)| {
            let any = self.addresses.is_none();
            let any = any.then_some(IpAddr::from(Ipv6Addr::UNSPECIFIED));
            let named = self.addresses.iter().flatten().copied();
            let ips = any.into_iter().chain(named);
            ips.map(move |ip| (SocketAddr::new(ip, *port), check))
        })
    }
}

/// What can't be served, by where.
pub type Problems = Arc<Mutex<BTreeMap<SocketAddr, String>>>;

/// Serves what `checks` says until it is dropped.
pub async fn run(mut checks: watch::Receiver<Arc<Checks>>, waiting: Waiting, problems: Problems) {
    let mut servers: HashMap<SocketAddr, JoinHandle<()>> = HashMap::new();
    loop {
        let all = checks.borrow_and_update().clone();
        let wanted: BTreeMap<SocketAddr, &Check> = all.sockets().collect();
        servers.retain(|at, server| {
            let is_wanted = wanted.contains_key(at);
            if !is_wanted {
                server.abort();
            }
            is_wanted
        });
        lock(&problems).retain(|at, _| wanted.contains_key(at));
        for (at, check) in wanted {
            if servers.contains_key(&at) {
                continue;
            }
            match listen::at(at).await {
                Ok(listener) => {
                    lock(&problems).remove(&at);
                    let server = serve(listener, at.port(), checks.clone(), waiting.clone());
                    servers.insert(at, tokio::spawn(server));
                }
                Err(error) => {
                    let place = if at.ip().is_unspecified() {
                        format!("on port {}", at.port())
                    } else {
                        format!("at {at}")
                    };
                    let problem = format!(
                        "Service {}: serving health checks {place}: {error}; load balancers that ask \
                         there will leave this node out",
                        check.service
                    );
                    lock(&problems).insert(at, problem);
                }
            }
        }
        let has_problems = !lock(&problems).is_empty();
        let retry = async {
            if has_problems {
                tokio::time::sleep(RETRY).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            changed = checks.changed() => {
                if changed.is_err() {
                    break;
                }
            }
            () = retry => {}
        }
    }
    for server in servers.into_values() {
        server.abort();
    }
}

async fn serve(
    listener: TcpListener,
    port: u16,
    checks: watch::Receiver<Arc<Checks>>,
    waiting: Waiting,
) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!("accepting a health check on port {port}: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (checks, waiting) = (checks.clone(), waiting.clone());
        tokio::spawn(async move {
            let answer = service_fn(move |_: Request<Incoming>| {
                let response = respond(&checks.borrow(), waiting.is_late(), port);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .serve_connection(TokioIo::new(stream), answer);
            // Who asked may have gone.
            let _ = connection.await;
        });
    }
}

fn respond(checks: &Checks, is_late: bool, port: u16) -> Response<Full<Bytes>> {
    let Some(check) = checks.ports.get(&port) else {
        // Its server is about to end.
        return status(StatusCode::NOT_FOUND, Bytes::new());
    };
    let is_proxy_healthy = checks.is_synced && !is_late;
    let is_good = check.local_endpoints > 0 && is_proxy_healthy;
    let body = json!({
        "service": { "namespace": &*check.service.namespace, "name": &*check.service.name },
        "localEndpoints": check.local_endpoints,
        "serviceProxyHealthy": is_proxy_healthy,
    });
    let code = if is_good {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let mut response = status(code, Bytes::from(body.to_string()));
    let headers = response.headers_mut();
    headers.insert(
        http::header::CONTENT_TYPE,
        http::HeaderValue::from_static("application/json"),
    );
    headers.insert(
        http::header::X_CONTENT_TYPE_OPTIONS,
        http::HeaderValue::from_static("nosniff"),
    );
    headers.insert(
        "x-load-balancing-endpoint-weight",
        http::HeaderValue::from(check.local_endpoints),
    );
    response
}

fn status(code: StatusCode, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = code;
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checks(local_endpoints: usize, is_synced: bool) -> Checks {
        let service = ObjectName::new("default", "web");
        Checks {
            ports: BTreeMap::from([(
                32_000,
                Check {
                    service,
                    local_endpoints,
                },
            )]),
            addresses: None,
            is_synced,
        }
    }

    #[test]
    fn a_node_is_good_while_it_has_endpoints_and_a_healthy_proxy() {
        let code = |endpoints, is_synced, is_late| {
            respond(&checks(endpoints, is_synced), is_late, 32_000).status()
        };
        assert_eq!(code(2, true, false), StatusCode::OK);
        assert_eq!(code(0, true, false), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(code(2, false, false), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(code(2, true, true), StatusCode::SERVICE_UNAVAILABLE);
        let response = respond(&checks(2, true), false, 32_000);
        assert_eq!(response.headers()["x-load-balancing-endpoint-weight"], "2");
        let other = respond(&checks(2, true), false, 1);
        assert_eq!(other.status(), StatusCode::NOT_FOUND);
    }

    #[test]
    fn a_change_may_wait_for_a_minute() {
        let waiting = Waiting::default();
        assert!(!waiting.is_late());
        waiting.begin();
        assert!(!waiting.is_late());
        let ago = |time| Instant::now().checked_sub(time).unwrap();
        waiting.set(Some(ago(HEALTH_TIMEOUT - Duration::from_secs(5))));
        assert!(!waiting.is_late());
        waiting.set(Some(ago(HEALTH_TIMEOUT)));
        // What comes later does not make the first one any younger.
        waiting.begin();
        assert!(waiting.is_late());
        waiting.set(None);
        assert!(!waiting.is_late());
    }

    #[test]
    fn every_address_has_a_server_or_one_has_them_all() {
        let at = |addresses: Option<&[&str]>| {
            let addresses = addresses.map(|all| all.iter().map(|ip| ip.parse().unwrap()).collect());
            let checks = Checks {
                addresses,
                ..checks(1, true)
            };
            let sockets = checks.sockets().map(|(at, _)| at.to_string());
            sockets.collect::<Vec<_>>()
        };
        assert_eq!(at(None), ["[::]:32000"]);
        assert!(at(Some(&[])).is_empty());
        let both = at(Some(&["172.18.0.2", "fd00::2"]));
        assert_eq!(both, ["172.18.0.2:32000", "[fd00::2]:32000"]);
    }
}
