//! What the measurements send: this program started again, as a server or as a client.
//!
//! A server and a client are one process each, on one processor each, so that no contender is
//! measured where the scheduler happened to put it.

mod client;
mod datagrams;
mod flood;
mod generators;
mod server;
mod stream;
mod summary;
mod workload;

use std::net::SocketAddr;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};

pub use flood::{OBJECT, power_of_two};
pub use generators::{IPERF_PORT, is_there};
pub use summary::{Sent, Summary};
pub use workload::{Pace, Workload};

/// The length of a request and of an answer, in octets.
const MESSAGE: usize = 64;
/// Connections that a server serves at once.
const WORKERS: usize = 32;

/// What a TCP connection is for: the first octet that a client sends.
mod purpose {
    /// Each message is answered by one.
    pub(super) const ECHO: u8 = b'e';
    /// One message is answered, then the server closes.
    pub(super) const ONCE: u8 = b'o';
    /// What comes is counted, and the count is the answer.
    pub(super) const SINK: u8 = b's';
    /// Each octet asks for how much all sinks have got so far, and when that was.
    pub(super) const TALLY: u8 = b't';
    /// Requests of HTTP/1.1 follow: this begins the first one's method, GET.
    pub(super) const HTTP: u8 = b'G';
}

/// What a datagram is for: its first octet. All others are answered with themselves; they begin with a
/// number whose first octet is zero.
mod datagram {
    /// Counted, and not answered.
    pub(super) const SILENT: u8 = b's';
    /// Answered with itself, but for the count of silent ones since the last answer in [`COUNT`].
    pub(super) const ASKING: u8 = b'a';
    /// Where the count is, four octets, most significant first.
    pub(super) const COUNT: std::ops::Range<usize> = 12..16;
}

/// Serves, or asks and measures.
#[derive(Args)]
pub struct Load {
    /// Stay on this processor.
    #[arg(long)]
    cpu: Option<usize>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answers on a port, TCP and UDP, both families, after saying "ready".
    Serve {
        /// The port.
        port: u16,
    },
    /// Asks; one line of JSON tells how that went.
    Run(Run),
    /// Sends frames into a node and counts those that it forwards; one line of JSON tells how that went.
    Flood(flood::Flood),
    /// Lets every frame through at an interface's XDP, after saying "ready".
    Pass {
        /// The interface.
        interface: String,
    },
}

/// What a client does.
#[derive(Args)]
struct Run {
    /// What is sent.
    workload: Workload,
    /// Where to.
    to: SocketAddr,
    /// How long it is measured.
    #[arg(long, default_value_t = 1_000)]
    for_ms: u64,
    /// How long it is done before, unmeasured.
    #[arg(long, default_value_t = 200)]
    warm_up_ms: u64,
    /// Requests a second, begun when they are due and not when the last answer came.
    #[arg(long)]
    rate: Option<u32>,
    /// Connections at once, of streams.
    #[arg(long, default_value_t = 1)]
    connections: usize,
}

/// Does what it says.
pub fn run(load: &Load) -> Result<()> {
    if let Some(cpu) = load.cpu {
        stay_on(cpu)?;
    }
    match &load.command {
        Command::Serve { port } => server::serve(*port),
        Command::Run(run) => tell(&client::run(run)?),
        Command::Flood(flood) => tell(&flood::run(flood)?),
        Command::Pass { interface } => flood::pass(interface),
    }
}

fn tell(summary: &Summary) -> Result<()> {
    println!("{}", serde_json::to_string(summary).context("JSON")?);
    Ok(())
}

/// Keeps this thread, and threads and programs that it starts, on a processor.
pub fn stay_on(cpu: usize) -> Result<()> {
    let mut cpus = nix::sched::CpuSet::new();
    cpus.set(cpu).context("choosing a processor")?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus)
        .with_context(|| format!("staying on processor {cpu}"))
}
