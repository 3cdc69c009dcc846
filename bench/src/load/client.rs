//! Asks and measures.

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use super::{
    MESSAGE, Pace, Run, Sent, Summary, Workload, datagrams,
    generators::{self, Connections},
    purpose, stream,
};

/// How long an answer may take; a datagram that takes longer is lost.
pub const PATIENCE: Duration = Duration::from_secs(1);

/// Does what was asked for.
pub fn run(run: &Run) -> Result<Summary> {
    let window = Window {
        warm_up: Duration::from_millis(run.warm_up_ms),
        measured: Duration::from_millis(run.for_ms),
        pace: run.rate.map_or(Pace::Closed, Pace::Open),
    };
    let to = run.to;
    let one_message = [b'?'; MESSAGE];
    match run.workload {
        Workload::Stream => stream::run(to, run.connections, window.warm_up, window.measured),
        Workload::Connect => {
            let mut request = vec![purpose::ONCE];
            request.extend_from_slice(&one_message);
            let summary = window.requests(|| {
                let mut stream = connect(to)?;
                stream.write_all(&request)?;
                let mut answer = [0; MESSAGE + 1];
                let mut got = 0;
                // The last read sees that the server has closed.
                loop {
                    match stream.read(answer.get_mut(got..).unwrap_or_default())? {
                        0 => break,
                        more => got += more,
                    }
                }
                anyhow::ensure!(got == MESSAGE, "{to} answered with {got} octets");
                Ok(Answer::Came)
            })?;
            let sent = Sent {
                connections: summary.sent.requests,
                ..summary.sent
            };
            Ok(summary.with(sent))
        }
        Workload::TcpRr => {
            let mut stream = connect(to)?;
            stream.write_all(&[purpose::ECHO])?;
            let mut answer = [0; MESSAGE];
            window.requests(|| {
                stream.write_all(&one_message)?;
                stream.read_exact(&mut answer)?;
                Ok(Answer::Came)
            })
        }
        Workload::Wrk => generators::wrk(to, window.warm_up, run.for_ms, Connections::Closed),
        Workload::WrkKept => generators::wrk(to, window.warm_up, run.for_ms, Connections::Kept),
        Workload::Iperf => generators::iperf(to, run.for_ms),
        Workload::UdpPackets => datagrams::run(to, window.warm_up, window.measured),
        Workload::UdpRr | Workload::UdpSendto => {
            let is_connected = run.workload == Workload::UdpRr;
            let socket = socket(to)?;
            if is_connected {
                socket.connect(to).context("connecting")?;
            }
            let mut datagrams = Datagrams {
                socket,
                to: (!is_connected).then_some(to),
                number: 0,
            };
            window.requests(|| datagrams.ask())
        }
    }
}

fn connect(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A UDP socket of an address's family.
pub fn socket(to: SocketAddr) -> Result<UdpSocket> {
    let any: IpAddr = if to.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0)).context("binding")?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// What became of a request.
enum Answer {
    Came,
    Lost,
}

/// A UDP socket whose requests are numbered, so that a late answer isn't taken for another's.
struct Datagrams {
    socket: UdpSocket,
    to: Option<SocketAddr>,
    number: u64,
}

impl Datagrams {
    fn ask(&mut self) -> Result<Answer> {
        self.number += 1;
        let mut message = [0; MESSAGE];
        let number = self.number.to_be_bytes();
        for (to, from) in message.iter_mut().zip(number) {
            *to = from;
        }
        match self.to {
            Some(to) => self.socket.send_to(&message, to),
            None => self.socket.send(&message),
        }
        .context("sending")?;
        let mut answer = [0; MESSAGE];
        loop {
            match self.socket.recv(&mut answer) {
                Ok(MESSAGE) if answer == message => return Ok(Answer::Came),
                Ok(_) => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    return Ok(Answer::Lost);
                }
                Err(error) => return Err(error).context("receiving"),
            }
        }
    }
}

/// When requests are made and which of them count.
struct Window {
    warm_up: Duration,
    measured: Duration,
    pace: Pace,
}

impl Window {
    fn requests(&self, mut ask: impl FnMut() -> Result<Answer>) -> Result<Summary> {
        let begun = Instant::now();
        let counts_from = begun + self.warm_up;
        let end = counts_from + self.measured;
        let mut times = Vec::with_capacity(1 << 16);
        let (mut lost, mut answers) = (0, 0);
        let mut number = 0_u32;
        loop {
            let due = match self.pace {
                Pace::Closed => Instant::now(),
                Pace::Open(rate) => {
                    let due = begun + Duration::from_secs(1) * number / rate;
                    // Sleeping would measure how fast the processor wakes up.
                    while Instant::now() < due {
                        std::hint::spin_loop();
                    }
                    due
                }
            };
            // Something counts even where one answer took all of the time.
            if due >= end && !(times.is_empty() && lost == 0) {
                break;
            }
            let answer = ask()?;
            let time = due.elapsed();
            number += 1;
            answers += u64::from(matches!(answer, Answer::Came));
            if due >= counts_from {
                match answer {
                    Answer::Came => times.push(time.as_nanos() as u64),
                    Answer::Lost => lost += 1,
                }
            }
        }
        let seconds = counts_from.elapsed().as_secs_f64();
        anyhow::ensure!(!times.is_empty(), "nothing was answered");
        Ok(Summary::of_requests(times, seconds, lost).with(Sent {
            connections: 1,
            requests: number.into(),
            answers,
            octets: 0,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One answer of a thousand takes 100 ms, the others nothing.
    fn stalled(pace: Pace) -> Summary {
        let window = Window {
            warm_up: Duration::ZERO,
            measured: Duration::from_millis(400),
            pace,
        };
        let mut asked = 0;
        window
            .requests(|| {
                asked += 1;
                if asked == 100 {
                    std::thread::sleep(Duration::from_millis(100));
                }
                Ok(Answer::Came)
            })
            .unwrap()
    }

    #[test]
    fn what_a_stall_delays_is_counted() {
        let summary = stalled(Pace::Open(1_000));
        assert_eq!(summary.count, 400);
        assert_eq!((summary.sent.requests, summary.sent.answers), (400, 400));
        // A quarter of all requests was due while nothing went on, the last of them just before it
        // went on again.
        assert!(summary.p90 > 30_000_000, "{summary:?}");
        assert!(summary.longest >= 100_000_000, "{summary:?}");
    }

    #[test]
    fn what_was_sent_before_it_is_measured_is_told_too() {
        let window = Window {
            warm_up: Duration::from_millis(30),
            measured: Duration::from_millis(20),
            pace: Pace::Open(1_000),
        };
        let mut asked = 0;
        let summary = window
            .requests(|| {
                asked += 1;
                Ok(if asked % 10 == 0 {
                    Answer::Lost
                } else {
                    Answer::Came
                })
            })
            .unwrap();
        assert_eq!((summary.count, summary.lost), (18, 2));
        assert_eq!((summary.sent.requests, summary.sent.answers), (50, 45));
    }

    #[test]
    fn a_closed_loop_does_not_see_what_did_not_begin() {
        let summary = stalled(Pace::Closed);
        assert!(summary.p99 < 30_000_000, "{summary:?}");
        assert!(summary.longest >= 100_000_000, "{summary:?}");
    }
}
