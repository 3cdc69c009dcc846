//! What goes on beside the agent's loop, and what wakes it.

use std::{
    sync::{
        Arc,
        mpsc::{RecvTimeoutError, SyncSender, sync_channel},
    },
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::sync::{Notify, mpsc};

use super::Source;
use crate::{
    dataplane::pins::Pins,
    flows::{Lifetimes, Sweeper},
    model::{object::Event, port::PodPorts},
    network,
    udp::Resteer,
    usage::{self, Counted},
    watch::{self, Scope},
};

/// How often flows are swept.
const SWEEP: Duration = Duration::from_secs(2);
/// Every how many sweeps the other tables are counted.
const COUNT: u64 = 5;
/// How long after a change of UDP backends their sockets are looked at once more, for one that
/// was connecting meanwhile.
const SECOND_LOOK: Duration = Duration::from_millis(250);

/// The ports of this node that pods ask for, whenever they are others.
pub(super) async fn told(
    ports: &mut tokio::sync::watch::Receiver<Option<Vec<PodPorts>>>,
) -> Option<Vec<PodPorts>> {
    ports.changed().await.ok()?;
    ports.borrow_and_update().clone()
}

/// Waits until the network is another.
pub(super) async fn changed(network: &mut Option<tokio::sync::watch::Receiver<network::State>>) {
    if let Some(network) = network
        && network.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

pub(super) async fn source(
    source: Source,
    scope: Scope,
    status: watch::Status,
    events: mpsc::Sender<Event>,
) {
    match source {
        Source::Kube(servers) => watch::kube::run(servers, scope, status, events).await,
        Source::Manifests(directory) => {
            watch::manifests::Manifests::new(&directory, status)
                .run(events)
                .await;
        }
    }
}

/// Sweeps flows on a thread of its own, which also counts what the programs' tables hold; at once whenever
/// it is told to.
pub(super) fn sweep_flows(
    pins: &Pins,
    lifetimes: Lifetimes,
    counted: Counted,
) -> Result<SyncSender<()>> {
    let pins = pins.clone();
    let mut sweeper = Sweeper::open(&pins, lifetimes)?;
    // One word is as good as many.
    let (sweep, told) = sync_channel(1);
    std::thread::Builder::new()
        .name("flows".to_owned())
        .spawn(move || {
            sweeper.refill();
            for number in 0_u64.. {
                let live = sweeper.sweep();
                usage::tell(&counted, usage::flows(live.v4, live.v6, sweeper.records()));
                usage::tell(&counted, usage::source_ports(live.ports));
                if number.is_multiple_of(COUNT) {
                    usage::tell(&counted, usage::others(&pins));
                }
                if live.swept > 0 {
                    let there = live.v4 + live.v6;
                    tracing::debug!(
                        "{} flows went, {} of them since their frontend is another service's; {there} are there",
                        live.swept,
                        live.moved
                    );
                }
                if let Err(RecvTimeoutError::Disconnected) = told.recv_timeout(SWEEP) {
                    return;
                }
            }
        })
        .context("starting the flow sweeper")?;
    Ok(sweep)
}

/// Looks after connected UDP sockets whenever it is notified.
pub(super) fn steer_udp(pins: &Pins) -> Result<Arc<Notify>> {
    let resteer = Arc::new(Resteer::open(pins)?);
    let notify = Arc::new(Notify::new());
    let notified = notify.clone();
    tokio::spawn(async move {
        loop {
            notified.notified().await;
            pass(&resteer).await;
            tokio::time::sleep(SECOND_LOOK).await;
            pass(&resteer).await;
        }
    });
    Ok(notify)
}

async fn pass(resteer: &Arc<Resteer>) {
    let resteer = resteer.clone();
    match tokio::task::spawn_blocking(move || resteer.pass()).await {
        Ok(Ok(report)) if report != crate::udp::Report::default() => {
            tracing::debug!("connected UDP sockets: {report:?}");
            if report.failed > 0 {
                tracing::warn!(
                    "{} connected UDP sockets can't be reached and keep a dead backend; the agent \
                     needs the host's PID namespace and CAP_SYS_PTRACE",
                    report.failed
                );
            }
        }
        Ok(Err(error)) => tracing::warn!("looking after connected UDP sockets: {error}"),
        _ => {}
    }
}
