//! The agent's own ports: /metrics for Prometheus, /healthz and /livez for load balancers and kubelet,
//! with kube-proxy's addresses, paths and answers (pkg/proxy/healthcheck/proxy_health.go).
//!
//! A port that can't be had is a problem that is told, and is tried again.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::sync::{mpsc, oneshot};

use crate::{
    attach::follow::lock,
    dataplane::pins::Pins,
    ipc::Query,
    listen,
    metrics::{self, Answers, Vitals},
};

/// How soon a port that could not be had is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// How long a client may take to ask, and the agent to answer: one that does not is not healthy.
const PATIENCE: Duration = Duration::from_secs(5);
/// What OpenMetrics 1.0 calls itself.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Where to listen; nowhere for `None`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Addresses {
    /// For /metrics, /healthz, /livez and /proxyMode.
    pub metrics: Option<SocketAddr>,
    /// For /healthz and /livez.
    pub healthz: Option<SocketAddr>,
}

/// What can't be served, by what it is.
pub type Problems = Arc<Mutex<BTreeMap<&'static str, String>>>;

/// What all answers need.
#[derive(Clone)]
struct Monitor {
    pins: Pins,
    queries: mpsc::Sender<Query>,
    healthz: Answers,
    livez: Answers,
}

/// Which paths a port has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Port {
    Metrics,
    Health,
}

/// Serves both ports.
pub fn run(addresses: Addresses, pins: &Pins, queries: mpsc::Sender<Query>, problems: &Problems) {
    let monitor = Monitor {
        pins: pins.clone(),
        queries,
        healthz: Answers::default(),
        livez: Answers::default(),
    };
    for (port, what, address) in [
        (Port::Metrics, "metrics", addresses.metrics),
        (Port::Health, "health checks", addresses.healthz),
    ] {
        if let Some(address) = address {
            let serving = serve(monitor.clone(), port, what, address, problems.clone());
            tokio::spawn(serving);
        }
    }
}

async fn serve(
    monitor: Monitor,
    port: Port,
    what: &'static str,
    address: SocketAddr,
    problems: Problems,
) {
    let listener = loop {
        match listen::at(address).await {
            Ok(listener) => break listener,
            Err(error) => {
                let problem = format!("serving {what} at {address}: {error}");
                lock(&problems).insert(what, problem);
                tokio::time::sleep(RETRY).await;
            }
        }
    };
    lock(&problems).remove(what);
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!("accepting at {address}: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let monitor = monitor.clone();
        tokio::spawn(async move {
            let answer = service_fn(move |request: Request<Incoming>| {
                let monitor = monitor.clone();
                async move { Ok::<_, Infallible>(monitor.answer(port, &request).await) }
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

impl Monitor {
    async fn answer(&self, port: Port, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return response(StatusCode::METHOD_NOT_ALLOWED, "text/plain", String::new());
        }
        match (request.uri().path(), port) {
            ("/healthz", _) => {
                let (code, body) = health(self.vitals().await.as_ref(), Check::Health);
                self.healthz.get_or_create(&labels(code)).inc();
                response(code, "application/json", body)
            }
            ("/livez", _) => {
                let (code, body) = health(self.vitals().await.as_ref(), Check::Life);
                self.livez.get_or_create(&labels(code)).inc();
                response(code, "application/json", body)
            }
            ("/metrics", Port::Metrics) => self.metrics().await,
            // Who asks wants to know which of kube-proxy's modes this is: none of them.
            ("/proxyMode", Port::Metrics) => {
                response(StatusCode::OK, "text/plain", "penstock".to_owned())
            }
            _ => response(StatusCode::NOT_FOUND, "text/plain", String::new()),
        }
    }

    /// How the agent is; `None` where it does not say within time.
    async fn vitals(&self) -> Option<Vitals> {
        let (sender, answer) = oneshot::channel();
        let asking = async {
            self.queries.send(Query::Vitals(sender)).await.ok()?;
            answer.await.ok()
        };
        tokio::time::timeout(PATIENCE, asking).await.ok()?
    }

    async fn metrics(&self) -> Response<Full<Bytes>> {
        let failed = |reason| response(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", reason);
        let Some(vitals) = self.vitals().await else {
            return failed("the agent does not answer".to_owned());
        };
        let monitor = self.clone();
        let reading = tokio::task::spawn_blocking(move || {
            metrics::text(&monitor.pins, &vitals, &monitor.healthz, &monitor.livez)
        });
        match reading.await {
            Ok(Ok(text)) => response(StatusCode::OK, OPEN_METRICS, text),
            Ok(Err(error)) => failed(error.to_string()),
            Err(error) => failed(error.to_string()),
        }
    }
}

fn labels(code: StatusCode) -> [(&'static str, String); 1] {
    [("code", code.as_u16().to_string())]
}

fn response(code: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = code;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    response
}

/// What is asked of the agent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Check {
    /// Whether load balancers should send this node traffic.
    Health,
    /// Whether the agent is all right, whatever becomes of the node.
    Life,
}

/// kube-proxy's answer: healthy once every first list has arrived and while changes get written within
/// time, and on a node that stays.
fn health(vitals: Option<&Vitals>, check: Check) -> (StatusCode, String) {
    let now = jiff::Timestamp::now().to_string();
    let is_healthy = vitals.is_some_and(|vitals| vitals.is_synced && !vitals.is_late);
    let is_eligible = vitals.is_some_and(|vitals| vitals.is_node_eligible);
    // As kube-proxy's, it was updated just now for as long as nothing waits for too long.
    let updated = if is_healthy {
        now.clone()
    } else {
        let written = vitals.and_then(|vitals| vitals.syncs.written());
        written.map(|at| at.to_string()).unwrap_or_default()
    };
    let (is_good, body) = match check {
        Check::Health => (
            is_healthy && is_eligible,
            json!({ "lastUpdated": updated, "currentTime": now, "nodeEligible": is_eligible }),
        ),
        Check::Life => (
            is_healthy,
            json!({ "lastUpdated": updated, "currentTime": now }),
        ),
    };
    let code = if is_good {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (code, body.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_leaves_is_unhealthy_and_its_agent_alive() {
        let vitals = |is_synced, is_node_eligible| Vitals {
            is_synced,
            is_node_eligible,
            ..Vitals::default()
        };
        let codes = |vitals: Option<Vitals>| {
            [Check::Health, Check::Life].map(|check| health(vitals.as_ref(), check).0.as_u16())
        };
        assert_eq!(codes(Some(vitals(true, true))), [200, 200]);
        assert_eq!(codes(Some(vitals(true, false))), [503, 200]);
        assert_eq!(codes(Some(vitals(false, true))), [503, 503]);
        assert_eq!(codes(None), [503, 503]);
        let late = Vitals {
            is_late: true,
            ..vitals(true, true)
        };
        assert_eq!(codes(Some(late)), [503, 503]);
        let (_, body) = health(Some(&vitals(true, false)), Check::Health);
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["nodeEligible"], false);
        assert_eq!(body["lastUpdated"], body["currentTime"]);
    }

    #[test]
    fn who_is_late_says_when_all_was_written_last() {
        let late = Vitals {
            is_synced: true,
            is_late: true,
            is_node_eligible: true,
            ..Vitals::default()
        };
        let updated = || {
            let (_, body) = health(Some(&late), Check::Life);
            let body: serde_json::Value = serde_json::from_str(&body).unwrap();
            body["lastUpdated"].as_str().unwrap().to_owned()
        };
        assert_eq!(updated(), "");
        late.syncs.done(Duration::ZERO, 0);
        let before = updated();
        assert!(
            before.starts_with("20") && before.ends_with('Z'),
            "{before}"
        );
        late.syncs.done(Duration::ZERO, 1);
        assert_eq!(updated(), before);
    }
}
