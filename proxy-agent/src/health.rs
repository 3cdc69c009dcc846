//! `healthCheckNodePort`: tells load balancers whether this node has endpoints of a service whose
//! external policy is Local. Answers are kube-proxy's (pkg/proxy/healthcheck/service_health.go).
//!
//! One server a port, on all addresses. A port that can't be had is a problem of that service alone,
//! and is tried again.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

use crate::{attach::follow::lock, model::object::ObjectName};

/// How soon a port that could not be had is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// How long a client may take to ask.
const PATIENCE: Duration = Duration::from_secs(10);

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
    /// Whether the kernel holds what it should.
    pub is_proxy_healthy: bool,
}

/// What can't be served, by port.
pub type Problems = Arc<Mutex<BTreeMap<u16, String>>>;

/// Serves what `checks` says until it is dropped.
pub async fn run(mut checks: watch::Receiver<Arc<Checks>>, problems: Problems) {
    let mut servers: HashMap<u16, JoinHandle<()>> = HashMap::new();
    loop {
        let wanted = checks.borrow_and_update().clone();
        servers.retain(|port, server| {
            let is_wanted = wanted.ports.contains_key(port);
            if !is_wanted {
                server.abort();
            }
            is_wanted
        });
        lock(&problems).retain(|port, _| wanted.ports.contains_key(port));
        for (port, check) in &wanted.ports {
            if servers.contains_key(port) {
                continue;
            }
            match listen(*port).await {
                Ok(listener) => {
                    lock(&problems).remove(port);
                    let server = serve(listener, *port, checks.clone());
                    servers.insert(*port, tokio::spawn(server));
                }
                Err(error) => {
                    let problem = format!(
                        "Service {}: serving health checks on port {port}: {error}; load balancers \
                         will leave this node out",
                        check.service
                    );
                    lock(&problems).insert(*port, problem);
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

/// Listens for both families, or for IPv4 where the kernel has no other.
async fn listen(port: u16) -> io::Result<TcpListener> {
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    match TcpListener::bind(any).await {
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))).await
        }
        result => result,
    }
}

async fn serve(listener: TcpListener, port: u16, checks: watch::Receiver<Arc<Checks>>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!("accepting a health check on port {port}: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let checks = checks.clone();
        tokio::spawn(async move {
            let answer = service_fn(move |_: Request<Incoming>| {
                let response = respond(&checks.borrow(), port);
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

fn respond(checks: &Checks, port: u16) -> Response<Full<Bytes>> {
    let Some(check) = checks.ports.get(&port) else {
        // Its server is about to end.
        return status(StatusCode::NOT_FOUND, Bytes::new());
    };
    let is_good = check.local_endpoints > 0 && checks.is_proxy_healthy;
    let body = json!({
        "service": { "namespace": &*check.service.namespace, "name": &*check.service.name },
        "localEndpoints": check.local_endpoints,
        "serviceProxyHealthy": checks.is_proxy_healthy,
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

    fn checks(local_endpoints: usize, is_proxy_healthy: bool) -> Checks {
        let service = ObjectName::new("default", "web");
        Checks {
            ports: BTreeMap::from([(
                32_000,
                Check {
                    service,
                    local_endpoints,
                },
            )]),
            is_proxy_healthy,
        }
    }

    #[test]
    fn a_node_is_good_while_it_has_endpoints_and_a_healthy_proxy() {
        let code = |endpoints, healthy| respond(&checks(endpoints, healthy), 32_000).status();
        assert_eq!(code(2, true), StatusCode::OK);
        assert_eq!(code(0, true), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(code(2, false), StatusCode::SERVICE_UNAVAILABLE);
        let response = respond(&checks(2, true), 32_000);
        assert_eq!(response.headers()["x-load-balancing-endpoint-weight"], "2");
        assert_eq!(respond(&checks(2, true), 1).status(), StatusCode::NOT_FOUND);
    }
}
