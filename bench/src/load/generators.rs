//! Load generators that others know: wrk and iperf3, where they are installed.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Sent, Summary};

/// Where iperf3's server serves.
pub const IPERF_PORT: u16 = 5_201;
/// wrk's connections at once, of which each carries one request.
const CONNECTIONS: &str = "8";

/// Whether a program is installed.
pub fn is_there(program: &str) -> bool {
    Path::new("/usr/bin").join(program).exists()
}

/// Starts iperf3's server, which ends with this process; nothing where there is no iperf3.
pub fn serve_iperf() -> Result<Option<std::process::Child>> {
    if !is_there("iperf3") {
        return Ok(None);
    }
    let port = IPERF_PORT.to_string();
    let server = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--", "iperf3", "--server", "--port"])
        .arg(port)
        .stdout(std::process::Stdio::null())
        .spawn()
        .context("starting iperf3's server")?;
    Ok(Some(server))
}

/// What becomes of a connection once its request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connections {
    /// It is closed.
    Closed,
    /// It carries the next one.
    Kept,
}

impl Connections {
    /// The header that says so.
    const fn header(self) -> &'static str {
        match self {
            Self::Closed => "Connection: close",
            Self::Kept => "Connection: keep-alive",
        }
    }
}

/// HTTP by wrk. It measures from its first request on, so that others of the same kind come before.
pub fn wrk(to: SocketAddr, warm_up: Duration, for_ms: u64, after: Connections) -> Result<Summary> {
    let before = ask(to, warm_up, after).with_context(|| format!("asking {to} before wrk does"))?;
    let (duration, url) = (format!("{}s", seconds(for_ms)), format!("http://{to}/"));
    let text = run(Command::new("wrk")
        .args(["--threads", "1", "--connections", CONNECTIONS])
        .args(["--duration", &duration, "--header", after.header()])
        .arg(url))?;
    let summary = requests(&text).with_context(|| format!("wrk said {text}"))?;
    let wrks = match after {
        Connections::Closed => summary.count,
        Connections::Kept => CONNECTIONS.parse().context("a number")?,
    };
    let requests = before.requests + summary.count;
    Ok(summary.with(Sent {
        connections: before.connections + wrks,
        requests,
        answers: requests,
        octets: 0,
    }))
}

/// Asks as wrk does, one request after the other.
pub(super) fn ask(to: SocketAddr, for_long: Duration, after: Connections) -> std::io::Result<Sent> {
    let begun = Instant::now();
    let mut sent = Sent::default();
    let mut kept: Option<TcpStream> = None;
    while begun.elapsed() < for_long {
        let mut stream = match kept.take() {
            Some(stream) => stream,
            None => {
                sent.connections += 1;
                TcpStream::connect(to)?
            }
        };
        let header = after.header();
        write!(stream, "GET / HTTP/1.1\r\nHost: {to}\r\n{header}\r\n\r\n")?;
        match after {
            Connections::Closed => {
                stream.read_to_end(&mut Vec::new())?;
            }
            Connections::Kept => {
                read_answer(&mut stream)?;
                kept = Some(stream);
            }
        }
        sent.requests += 1;
        sent.answers += 1;
    }
    Ok(sent)
}

/// Reads an answer of our own server's, whose body it says the length of.
fn read_answer(stream: &mut TcpStream) -> std::io::Result<()> {
    const END: &[u8] = b"\r\n\r\n";
    let (mut answer, mut buffer) = (Vec::new(), [0; 512]);
    loop {
        let end = answer.windows(END.len()).position(|octets| octets == END);
        if end.is_some_and(|end| answer.len() >= end + END.len() + super::server::BODY.len()) {
            return Ok(());
        }
        match stream.read(&mut buffer)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            length => answer.extend_from_slice(buffer.get(..length).unwrap_or_default()),
        }
    }
}

/// A stream by iperf3, which leaves out its first second.
pub fn iperf(to: SocketAddr, for_ms: u64) -> Result<Summary> {
    let (ip, port) = (to.ip().to_string(), to.port().to_string());
    let text = run(Command::new("iperf3")
        .args(["--client", &ip, "--port", &port, "--json", "--time"])
        .arg(seconds(for_ms).to_string())
        .args(["--omit", "1"]))?;
    stream(&text).with_context(|| format!("iperf3 said {text}"))
}

/// Both take whole seconds only.
fn seconds(for_ms: u64) -> u64 {
    for_ms.div_ceil(1_000).max(1)
}

fn run(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("starting {command:?}"))?;
    let text = String::from_utf8(output.stdout).context("what it printed is no text")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{command:?} ended with {}: {errors}{text}",
        output.status
    );
    Ok(text)
}

/// What wrk counted.
fn requests(text: &str) -> Result<Summary> {
    // Written only where there were any.
    for trouble in ["Socket errors:", "Non-2xx"] {
        ensure!(!text.contains(trouble), "there were errors");
    }
    let line = text.lines().find(|line| line.contains(" requests in "));
    let count = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    let rate = text
        .lines()
        .find_map(|line| line.strip_prefix("Requests/sec:"));
    let rate: Option<f64> = rate.and_then(|rate| rate.trim().parse().ok());
    let (count, rate) = count.zip(rate).context("no count of requests")?;
    ensure!(rate > 0.0, "nothing was answered");
    Ok(Summary::of_packets(count, count as f64 / rate, 0))
}

/// What iperf3's server received.
fn stream(text: &str) -> Result<Summary> {
    let value: Value = serde_json::from_str(text).context("JSON")?;
    let received = value.pointer("/end/sum_received").context("a sum")?;
    let number = |field| received.get(field).and_then(Value::as_f64);
    let (octets, seconds) = number("bytes").zip(number("seconds")).context("numbers")?;
    ensure!(octets > 0.0 && seconds > 0.0, "nothing arrived");
    // A connection for what is said about the other; what came before the first second is in neither number.
    Ok(Summary::of_streams(1, octets as u64, seconds).with(Sent {
        connections: 2,
        octets: octets as u64,
        ..Sent::default()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRK: &str = "Running 1s test @ http://10.96.1.0:80/
  1 threads and 8 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency    85.11us   20.52us 431.00us   91.02%
    Req/Sec    11.02k   255.48    11.41k    81.82%
  12110 requests in 1.10s, 1.20MB read
Requests/sec:  11009.09
Transfer/sec:      1.09MB
";

    #[test]
    fn what_wrk_says_is_read() {
        let summary = requests(WRK).unwrap();
        assert_eq!(summary.count, 12_110);
        assert!((summary.per_second - 11_009.09).abs() < 1e-6, "{summary:?}");
        assert!((summary.seconds - 1.1).abs() < 1e-6, "{summary:?}");
        let failed = WRK.replace(
            "Requests/sec",
            "  Non-2xx or 3xx responses: 7\nRequests/sec",
        );
        assert!(requests(&failed).is_err());
        let failed = "  Socket errors: connect 0, read 1, write 0, timeout 0\n".to_owned() + WRK;
        assert!(requests(&failed).is_err());
    }

    #[test]
    fn what_iperf3_says_is_read() {
        let text = r#"{ "end": { "sum_received": { "seconds": 2.0, "bytes": 1000000000 } } }"#;
        let summary = stream(text).unwrap();
        assert!((summary.bits_per_second - 4e9).abs() < 1.0, "{summary:?}");
        assert!(stream(r#"{ "error": "unable to connect" }"#).is_err());
    }

    #[test]
    fn turns_last_whole_seconds() {
        assert_eq!([300, 1_000, 1_001].map(seconds), [1, 1, 2]);
    }
}
