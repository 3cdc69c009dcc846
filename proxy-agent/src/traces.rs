//! What the kernel programs trace, as log lines. Off unless asked for: a trace costs microseconds.

use std::time::Duration;

use penstock_common::{Counter, Proto};

/// How often traces are fetched.
const INTERVAL: Duration = Duration::from_millis(50);

/// Forwards traces from now on.
pub fn forward(ebpf: &mut aya::Ebpf) {
    match aya_log::EbpfLogger::init_with_logger(ebpf, TraceLog) {
        Ok(mut logger) => {
            let started = std::thread::Builder::new()
                .name("traces".to_owned())
                .spawn(move || {
                    loop {
                        logger.flush();
                        std::thread::sleep(INTERVAL);
                    }
                });
            if let Err(error) = started {
                tracing::warn!("the programs' traces can't be read: {error}");
            }
        }
        Err(error) => tracing::warn!("the programs' traces can't be read: {error}"),
    }
}

/// Takes what the programs said.
struct TraceLog;

impl log::Log for TraceLog {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        tracing::debug!(target: "penstock::kernel", "kernel: {}", in_words(&record.args().to_string()));
    }
    fn flush(&self) {}
}

/// "counter 8 protocol 6 port 80" with names in the place of numbers; anything else as it is.
fn in_words(text: &str) -> String {
    let words: Vec<&str> = text.split(' ').collect();
    let ["counter", counter, "protocol", proto, "port", port] = words.as_slice() else {
        return text.to_owned();
    };
    let counter = counter
        .parse()
        .ok()
        .and_then(|index: usize| Counter::ALL.get(index));
    let (Some(counter), Ok(proto)) = (counter, proto.parse()) else {
        return text.to_owned();
    };
    if proto == 0 {
        return counter.label().to_owned();
    }
    format!("{}, {}, port {port}", counter.label(), Proto(proto))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_names() {
        let index = Counter::NoEndpoints as u32;
        assert_eq!(
            in_words(&format!("counter {index} protocol 17 port 53")),
            "no_endpoints, UDP, port 53"
        );
        assert_eq!(
            in_words(&format!("counter {index} protocol 0 port 0")),
            "no_endpoints"
        );
        assert_eq!(
            in_words("counter 999 protocol 6 port 1"),
            "counter 999 protocol 6 port 1"
        );
        assert_eq!(in_words("hello"), "hello");
    }
}
