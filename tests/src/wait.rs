//! Waits for what must come true.

use std::time::{Duration, Instant};

/// Asks until the answer is yes, for ten seconds at most; the last reason is the error.
pub fn eventually<T>(what: &str, mut ask: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let started = Instant::now();
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(error) if started.elapsed() > Duration::from_secs(10) => {
                return Err(error.context(format!("{what} did not come true in 10 s")));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
