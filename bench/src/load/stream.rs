//! Sends as much as goes.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use super::{Summary, purpose};

/// What is written at once.
const CHUNK: usize = 128 * 1_024;

/// Sends over so many connections at once. What was written within the window counts; that all of
/// it arrived is asked of the server.
pub fn run(
    to: SocketAddr,
    connections: usize,
    warm_up: Duration,
    measured: Duration,
) -> Result<Summary> {
    let streams: Vec<TcpStream> = (0..connections.max(1))
        .map(|_| {
            let mut stream =
                TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?;
            stream.write_all(&[purpose::SINK])?;
            Ok(stream)
        })
        .collect::<Result<_>>()?;
    let counts_from = Instant::now() + warm_up;
    let end = counts_from + measured;
    let counted: Vec<Result<u64>> = std::thread::scope(|scope| {
        let threads: Vec<_> = streams
            .into_iter()
            .map(|stream| scope.spawn(move || send(stream, counts_from, end)))
            .collect();
        threads
            .into_iter()
            .map(|thread| {
                let outcome = thread.join();
                outcome.unwrap_or_else(|_| Err(anyhow::anyhow!("a sender panicked")))
            })
            .collect()
    });
    let octets = counted.into_iter().sum::<Result<u64>>()?;
    Ok(Summary::of_streams(
        connections,
        octets,
        measured.as_secs_f64(),
    ))
}

fn send(mut stream: TcpStream, counts_from: Instant, end: Instant) -> Result<u64> {
    let chunk = vec![0; CHUNK];
    let (mut all, mut counted) = (0_u64, 0_u64);
    loop {
        let now = Instant::now();
        if now >= end {
            break;
        }
        // Not write_all: what fits now is written now, and the clock is looked at again.
        let length = stream.write(&chunk).context("sending")? as u64;
        all += length;
        if now >= counts_from {
            counted += length;
        }
    }
    stream.shutdown(Shutdown::Write).context("closing")?;
    let mut arrived = [0; 8];
    stream
        .read_exact(&mut arrived)
        .context("waiting for the server's count")?;
    let arrived = u64::from_be_bytes(arrived);
    anyhow::ensure!(arrived == all, "{arrived} of {all} octets arrived");
    Ok(counted)
}
