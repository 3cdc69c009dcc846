//! Waits for what must come true.

use std::time::{Duration, Instant};

/// How long to wait: ten seconds, or as many as `PENSTOCK_PATIENCE` says, for slow machines.
fn patience() -> Duration {
    let seconds = std::env::var("PENSTOCK_PATIENCE");
    let seconds = seconds.ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or(10))
}

/// How long to wait for what several programs must do: six times as long.
pub(crate) fn long() -> Duration {
    patience() * 6
}

/// How long what is there at once may take: a second, and longer on slow machines.
pub fn at_once() -> Duration {
    patience() / 10
}

/// How much longer than on other machines one may have to wait for the agent.
pub(crate) fn slack() -> Duration {
    patience().saturating_sub(Duration::from_secs(10))
}

/// Asks until the answer is yes, for [`patience`] at most; the last reason is the error.
pub fn eventually<T>(what: &str, ask: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    within(patience(), Duration::from_millis(5), what, ask)
}

/// The same for what several programs must do: six times as long, and not as often.
pub fn patiently<T>(what: &str, ask: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    within(long(), Duration::from_millis(50), what, ask)
}

fn within<T>(
    patience: Duration,
    pause: Duration,
    what: &str,
    mut ask: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let started = Instant::now();
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(error) if started.elapsed() > patience => {
                return Err(error.context(format!("{what} did not come true in {patience:?}")));
            }
            Err(_) => std::thread::sleep(pause),
        }
    }
}
