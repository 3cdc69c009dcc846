//! The agent's socket in its run directory: the command line and the CNI plugin ask there.

use std::{
    fs,
    io::{self, BufWriter, Write},
    os::unix::net::UnixStream as Blocking,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use penstock_cni::agent::{Answer, Request, SOCKET};
use serde::{Serialize, Serializer, de::DeserializeOwned};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
};

use crate::{
    attach::follow::WireRequest,
    metrics::Vitals,
    network::Obstacles,
    plan::planner::PortView,
    report::{Port, Report},
};

/// A question, and where its answer goes.
pub enum Query {
    /// How the agent is.
    Report(oneshot::Sender<Report>),
    /// Every port that the kernel holds, and why clients outside may not be handed over.
    Ports(oneshot::Sender<(Vec<PortView>, Obstacles)>),
    /// How the agent is, in short.
    Vitals(oneshot::Sender<Vitals>),
    /// Whether pods can be given a network.
    Ready(oneshot::Sender<Answer>),
    /// Whether a pod's interface is wired.
    Wire(WireRequest),
}

fn socket_path(run_dir: &Path) -> PathBuf {
    run_dir.join(SOCKET)
}

/// Takes the run directory, unless another agent has it.
pub fn listen(run_dir: &Path) -> Result<UnixListener> {
    fs::create_dir_all(run_dir)
        .with_context(|| format!("creating {}; pass --run-dir", run_dir.display()))?;
    let path = socket_path(run_dir);
    if Blocking::connect(&path).is_ok() {
        bail!(
            "another agent is running (it answers at {}); stop it, or pass another --run-dir",
            path.display()
        );
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing {}", path.display()));
        }
        _ => {}
    }
    UnixListener::bind(&path).with_context(|| format!("listening at {}", path.display()))
}

/// How long who connects may take to ask.
const ASKING: Duration = Duration::from_secs(5);
/// The longest question.
const LONGEST: u64 = 64 * 1024;

/// Answers everybody who connects: see [`penstock_cni::agent`].
pub async fn serve(listener: UnixListener, queries: mpsc::Sender<Query>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(converse(stream, queries.clone()))),
            Err(error) => {
                // Out of descriptors, say; that passes.
                tracing::warn!("accepting at the agent's socket: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(mut stream: UnixStream, queries: mpsc::Sender<Query>) {
    let mut line = String::new();
    let mut question = BufReader::new((&mut stream).take(LONGEST));
    let reading = tokio::time::timeout(ASKING, question.read_line(&mut line));
    if !matches!(reading.await, Ok(Ok(1..))) {
        return;
    }
    let answer = match serde_json::from_str(&line) {
        Ok(Request::Report) => ask(&queries, Query::Report)
            .await
            .map(|report| json(&report)),
        Ok(Request::Ports) => {
            if let Some((views, obstacles)) = ask(&queries, Query::Ports).await {
                tell_ports(stream, views, obstacles).await;
            }
            return;
        }
        Ok(Request::Ready) => ask(&queries, Query::Ready)
            .await
            .map(|answer| json(&answer)),
        Ok(Request::Wire {
            network,
            attachment,
            netns,
        }) => {
            let wire = |answer| {
                Query::Wire(WireRequest {
                    network,
                    attachment,
                    is_check: false,
                    netns,
                    answer,
                })
            };
            ask(&queries, wire).await.map(|answer| json(&answer))
        }
        Ok(Request::Check {
            network,
            attachment,
        }) => {
            let check = |answer| {
                Query::Wire(WireRequest {
                    network,
                    attachment,
                    is_check: true,
                    netns: None,
                    answer,
                })
            };
            ask(&queries, check).await.map(|answer| json(&answer))
        }
        Err(error) => Some(json(&Answer::Failed(format!("not understood: {error}")))),
    };
    if let Some(mut answer) = answer {
        answer.push(b'\n');
        // Who asked may have gone, or not read.
        let _ = tokio::time::timeout(ANSWERING, stream.write_all(&answer)).await;
    }
}

/// Writes all ports one by one: in words they take many times the memory that the agent has them in.
async fn tell_ports(stream: UnixStream, views: Vec<PortView>, obstacles: Obstacles) {
    let tell = move || -> io::Result<()> {
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        let mut writer = BufWriter::new(Until {
            stream,
            end: Instant::now() + ANSWERING,
        });
        let ports = views
            .iter()
            .map(|view| Port::from(view).forwarded(obstacles));
        serde_json::Serializer::new(&mut writer).collect_seq(ports)?;
        writer.write_all(b"\n")?;
        writer.flush()
    };
    // Who asked may have gone.
    if let Ok(Err(error)) = tokio::task::spawn_blocking(tell).await {
        tracing::debug!("telling all ports: {error}");
    }
}

/// What is written at once.
const PIECE: usize = 8 << 10;

/// A socket that is written to until a moment and no longer, however slowly its other end reads.
struct Until {
    stream: Blocking,
    end: Instant,
}

impl Write for Until {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_write_timeout(Some(left))?;
        // The kernel waits for so long for each piece that it takes, so that it gets one at a time.
        let (piece, _) = bytes.split_at(bytes.len().min(PIECE));
        self.stream.write(piece)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

async fn ask<T>(
    queries: &mpsc::Sender<Query>,
    query: impl FnOnce(oneshot::Sender<T>) -> Query,
) -> Option<T> {
    let (sender, answer) = oneshot::channel();
    queries.send(query(sender)).await.ok()?;
    answer.await.ok()
}

fn json(value: &impl Serialize) -> Vec<u8> {
    // None of these types can fail to be written.
    serde_json::to_vec(value).unwrap_or_default()
}

/// How long an agent may take to answer.
const ANSWERING: Duration = Duration::from_secs(5);
/// How soon to knock again where too many others do.
const KNOCK: Duration = Duration::from_millis(50);

/// The report of the agent whose run directory this is; `None` if none is running.
pub async fn report(run_dir: &Path) -> Result<Option<Report>> {
    fetch(run_dir, &Request::Report).await
}

/// All ports that it serves; `None` likewise.
pub async fn ports(run_dir: &Path) -> Result<Option<Vec<Port>>> {
    fetch(run_dir, &Request::Ports).await
}

/// What the agent answers to a question.
async fn fetch<T: DeserializeOwned>(run_dir: &Path, question: &Request) -> Result<Option<T>> {
    let path = socket_path(run_dir);
    let shown = path.display();
    let json = match tokio::time::timeout(ANSWERING, exchange(&path, question)).await {
        Err(_) => bail!(
            "the agent at {shown} does not answer within {} s: it hangs, was stopped (SIGSTOP), or \
             the node is overloaded; traffic goes on. Look at its log, and restart it if it does \
             not come back",
            ANSWERING.as_secs()
        ),
        Ok(Err(error)) => match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => return Ok(None),
            io::ErrorKind::PermissionDenied => {
                bail!("permission to ask the agent at {shown} is denied; run this as root")
            }
            _ => return Err(error).with_context(|| format!("asking the agent at {shown}")),
        },
        Ok(Ok(json)) => json,
    };
    anyhow::ensure!(
        !json.is_empty(),
        "the agent at {shown} ended before it answered"
    );
    serde_json::from_slice(&json)
        .map(Some)
        .with_context(|| format!("the agent at {shown} answered with something else"))
}

/// Asks; the answer as it came.
async fn exchange(path: &Path, question: &Request) -> io::Result<Vec<u8>> {
    let mut stream = loop {
        match UnixStream::connect(path).await {
            // Others wait to be let in, and the queue is full.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                tokio::time::sleep(KNOCK).await;
            }
            connected => break connected?,
        }
    };
    let mut line = json(question);
    line.push(b'\n');
    stream.write_all(&line).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(answer)
}

/// Takes the socket away: nobody will answer there.
pub fn leave(run_dir: &Path) {
    let path = socket_path(run_dir);
    if let Err(error) = fs::remove_file(&path) {
        tracing::debug!("removing {}: {error}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn who_reads_slowly_is_not_told_for_ever() {
        let (stream, mut reader) = Blocking::pair().unwrap();
        let (begun, limit) = (Instant::now(), Duration::from_millis(300));
        let mut until = Until {
            stream,
            end: begun + limit,
        };
        // Something is read again and again, well before any single write would take too long.
        let reading = std::thread::spawn(move || {
            let mut some = vec![0; 64 << 10];
            while reader.read(&mut some).is_ok_and(|count| count > 0) {
                std::thread::sleep(limit / 10);
            }
        });
        let error = until.write_all(&vec![0; 64 << 20]).unwrap_err();
        assert!(
            matches!(
                error.kind(),
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
            ),
            "{error}"
        );
        assert!(begun.elapsed() < 4 * limit, "{:?}", begun.elapsed());
        drop(until);
        reading.join().unwrap();
    }
}
