//! Sends as much as goes, and asks the receiver how much arrived.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use super::{Sent, Summary, purpose};

/// What is written at once.
const CHUNK: usize = 128 * 1_024;

/// What all of a server's sinks have read so far, and when that was, on the server's clock. As octets on the wire:
/// two numbers, most significant octet first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    /// Octets.
    pub octets: u64,
    /// Nanoseconds since the server began.
    pub nanos: u64,
}

impl Tally {
    /// Its length in octets.
    const LENGTH: usize = 16;

    /// As it is sent.
    pub fn to_octets(self) -> Vec<u8> {
        [self.octets.to_be_bytes(), self.nanos.to_be_bytes()].concat()
    }

    fn of(octets: [u8; Self::LENGTH]) -> Self {
        let all = u128::from_be_bytes(octets);
        Self {
            octets: (all >> 64) as u64,
            nanos: all as u64,
        }
    }

    /// The server's, now.
    fn ask(stream: &mut TcpStream) -> Result<Self> {
        stream
            .write_all(&[purpose::TALLY])
            .context("asking what arrived")?;
        let mut answer = [0; Self::LENGTH];
        stream
            .read_exact(&mut answer)
            .context("waiting for what arrived")?;
        Ok(Self::of(answer))
    }
}

/// Sends over so many connections at once. What counts is what the server read between two questions, one at the
/// window's beginning and one at its end: what is still under way, or in somebody's buffer, has not arrived.
pub fn run(
    to: SocketAddr,
    connections: usize,
    warm_up: Duration,
    measured: Duration,
) -> Result<Summary> {
    let connect = |purpose: u8| -> Result<TcpStream> {
        let mut stream = TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?;
        stream.set_nodelay(true)?;
        stream.write_all(&[purpose])?;
        Ok(stream)
    };
    let mut asking = connect(purpose::TALLY)?;
    let streams: Vec<TcpStream> = (0..connections.max(1))
        .map(|_| connect(purpose::SINK))
        .collect::<Result<_>>()?;
    let is_over = AtomicBool::new(false);
    let (tallies, counted) = thread::scope(|scope| {
        let is_over = &is_over;
        let threads: Vec<_> = streams
            .into_iter()
            .map(|stream| scope.spawn(move || send(stream, is_over)))
            .collect();
        let mut watch = || -> Result<[Tally; 2]> {
            thread::sleep(warm_up);
            let begun = Tally::ask(&mut asking)?;
            thread::sleep(measured);
            Ok([begun, Tally::ask(&mut asking)?])
        };
        let tallies = watch();
        is_over.store(true, Ordering::Relaxed);
        let counted: Vec<Result<u64>> = threads
            .into_iter()
            .map(|thread| {
                let outcome = thread.join();
                outcome.unwrap_or_else(|_| Err(anyhow::anyhow!("a sender panicked")))
            })
            .collect();
        (tallies, counted)
    });
    let [begun, ended] = tallies?;
    let octets = counted.into_iter().sum::<Result<u64>>()?;
    ensure!(ended.nanos > begun.nanos, "the server's clock stands still");
    let seconds = (ended.nanos - begun.nanos) as f64 / 1e9;
    let arrived = ended.octets.saturating_sub(begun.octets);
    Ok(
        Summary::of_streams(connections, arrived, seconds).with(Sent {
            connections: 1 + connections.max(1) as u64,
            octets,
            ..Sent::default()
        }),
    )
}

/// Sends until it is over; how much that was, all of which has to have arrived.
fn send(mut stream: TcpStream, is_over: &AtomicBool) -> Result<u64> {
    let chunk = vec![0; CHUNK];
    let mut all = 0_u64;
    while !is_over.load(Ordering::Relaxed) {
        // Not write_all: what fits now is written now, and the end is looked for again.
        all += stream.write(&chunk).context("sending")? as u64;
    }
    stream.shutdown(Shutdown::Write).context("closing")?;
    let mut arrived = [0; 8];
    stream
        .read_exact(&mut arrived)
        .context("waiting for the server's count")?;
    let arrived = u64::from_be_bytes(arrived);
    ensure!(arrived == all, "{arrived} of {all} octets arrived");
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    #[test]
    fn what_the_receiver_says_counts_and_not_what_was_written() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let to = listener.local_addr().unwrap();
        // Reads everything, and says that it was 1,000 octets in two seconds.
        let serving = thread::spawn(move || {
            let mut asked = 0;
            let mut sink = None;
            let (mut asking, _) = listener.accept().unwrap();
            let mut one = [0];
            asking.read_exact(&mut one).unwrap();
            assert_eq!(one, [purpose::TALLY]);
            while asking.read_exact(&mut one).is_ok() {
                sink.get_or_insert_with(|| {
                    let (mut stream, _) = listener.accept().unwrap();
                    thread::spawn(move || {
                        let mut all = Vec::new();
                        stream.read_to_end(&mut all).unwrap();
                        let count = all.len() as u64 - 1;
                        stream.write_all(&count.to_be_bytes()).unwrap();
                        count
                    })
                });
                let tally = Tally {
                    octets: 5_000 + asked * 1_000,
                    nanos: 7 + asked * 2_000_000_000,
                };
                asked += 1;
                asking.write_all(&tally.to_octets()).unwrap();
            }
            sink.unwrap().join().unwrap()
        });
        let summary = run(to, 1, Duration::from_millis(10), Duration::from_millis(10)).unwrap();
        let written = serving.join().unwrap();
        assert_eq!(summary.sent.octets, written);
        assert_eq!(summary.bits_per_second.round() as u64, 4_000, "{written}");
        assert_eq!(summary.seconds.round() as u64, 2);
    }
}
