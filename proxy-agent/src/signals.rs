//! What the agent does when it is signalled.

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that would end a process that does not look after them.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    user1: Signal,
    user2: Signal,
}

impl Signals {
    /// Looks after them from now on.
    pub fn new() -> Result<Self> {
        let handle = |kind, name| signal(kind).with_context(|| format!("handling {name}"));
        Ok(Self {
            terminate: handle(SignalKind::terminate(), "SIGTERM")?,
            interrupt: handle(SignalKind::interrupt(), "SIGINT")?,
            hangup: handle(SignalKind::hangup(), "SIGHUP")?,
            user1: handle(SignalKind::user_defined1(), "SIGUSR1")?,
            user2: handle(SignalKind::user_defined2(), "SIGUSR2")?,
        })
    }

    /// Waits until the agent is told to stop; other signals are said to be without effect.
    pub async fn stop(&mut self) {
        loop {
            let (name, why) = tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                _ = self.hangup.recv() => ("SIGHUP", "objects are watched, nothing is to be read anew"),
                _ = self.user1.recv() => ("SIGUSR1", "it means nothing here"),
                _ = self.user2.recv() => ("SIGUSR2", "it means nothing here"),
            };
            tracing::info!("ignoring {name}: {why}");
        }
    }
}
