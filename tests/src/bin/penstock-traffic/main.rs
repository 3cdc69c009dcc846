//! Serves and asks, over TCP and UDP: what tests, demo and benchmarks send.
//!
//! A server answers "NAME PEER REACHED". A question prints one line of JSON.

mod crowd;
mod survey;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use nix::sys::{
    socket::{
        AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect,
        setsockopt, socket, sockopt,
    },
    time::{TimeVal, TimeValLike},
};
use serde_json::json;

/// Serves and asks.
#[derive(Parser)]
struct Cli {
    /// Stay on this processor.
    #[arg(long, global = true)]
    cpu: Option<usize>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answers on a port, TCP and UDP, both families.
    Serve {
        #[arg(long)]
        name: String,
        #[arg(long)]
        port: u16,
    },
    /// Asks once.
    Ask {
        /// tcp, udp (unconnected), udp-connected or icmp (an echo request; the port is ignored).
        protocol: String,
        to: SocketAddr,
        /// Bytes of a datagram's payload.
        #[arg(long, default_value_t = 1)]
        size: usize,
        /// Source port.
        #[arg(long, default_value_t = 0)]
        port: u16,
        #[arg(long, default_value_t = 2_000)]
        timeout_ms: u64,
    },
    /// Asks what a file lists, many at once; one line with what came of each.
    Survey { file: PathBuf },
    /// Asks over one UDP socket, again and again; a line for each answer or failure.
    Keep {
        /// udp or udp-connected.
        protocol: String,
        to: SocketAddr,
        #[arg(long, default_value_t = 20)]
        interval_ms: u64,
        /// How long to wait for each answer.
        #[arg(long, default_value_t = 200)]
        timeout_ms: u64,
    },
    /// Holds one TCP connection and asks over it; a line for each answer or failure.
    Hold {
        to: SocketAddr,
        #[arg(long, default_value_t = 20)]
        interval_ms: u64,
    },
    /// Holds many connections and asks over each at once and whenever SIGUSR1 comes; a line each
    /// time with how many were answered as they were first.
    Crowd {
        /// tcp, udp (unconnected) or udp-connected.
        protocol: String,
        to: Vec<SocketAddr>,
        #[arg(long, default_value_t = 100)]
        count: usize,
        #[arg(long, default_value_t = 2_000)]
        timeout_ms: u64,
    },
    /// Connects, asks and closes, as fast as it goes, until stdin ends or the time is over.
    Load {
        to: Vec<SocketAddr>,
        #[arg(long, default_value_t = 1_000)]
        for_ms: u64,
        #[arg(long, default_value_t = 1)]
        tasks: usize,
        /// How long each task rests after each connection.
        #[arg(long, default_value_t = 0)]
        pause_ms: u64,
    },
    /// Connects, asks and closes for a while; for each connection a line: when it began and ended
    /// (nanoseconds of CLOCK_MONOTONIC), what was dialled, and the address that answered.
    Trail {
        to: Vec<SocketAddr>,
        #[arg(long, default_value_t = 1_000)]
        for_ms: u64,
    },
    /// Connects, asks and closes a number of times, the targets in turns; one line with a list of
    /// times in nanoseconds for each target.
    Times {
        to: Vec<SocketAddr>,
        #[arg(long, default_value_t = 1_000)]
        count: usize,
    },
    /// Takes what comes by TCP on a port, and says how much it was once the sender is done; then it
    /// gives as much as it was told to.
    Drain {
        #[arg(long)]
        port: u16,
        #[arg(long, default_value_t = 0)]
        gives: u64,
    },
    /// Sends bytes by TCP as fast as it goes, and takes what is given; one line when all have arrived.
    Pour {
        to: SocketAddr,
        #[arg(long, default_value_t = 1_000_000)]
        bytes: u64,
    },
    /// Sends datagrams by UDP in one piece, which the kernel cuts apart (UDP_SEGMENT), and takes the answers; one
    /// line with how long each of them says that its datagram was.
    Burst {
        to: SocketAddr,
        #[arg(long, default_value_t = 16)]
        count: usize,
        /// Bytes of each datagram's payload.
        #[arg(long, default_value_t = 1_000)]
        size: usize,
        /// How long to wait for each; nobody waits where all come.
        #[arg(long, default_value_t = 3_000)]
        timeout_ms: u64,
    },
    /// Does nothing, for ever: what keeps a pod's namespaces.
    Pause,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    if let Some(cpu) = cli.cpu {
        let mut cpus = nix::sched::CpuSet::new();
        cpus.set(cpu).context("choosing a processor")?;
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus)
            .with_context(|| format!("staying on processor {cpu}"))?;
    }
    match cli.command {
        Command::Serve { name, port } => serve(&name, port),
        Command::Ask {
            protocol,
            to,
            size,
            port,
            timeout_ms,
        } => {
            let timeout = Duration::from_millis(timeout_ms);
            let answer = ask(&protocol, to, size, port, timeout);
            println!("{}", shown(answer));
            Ok(())
        }
        Command::Survey { file } => survey::run(&file),
        Command::Keep {
            protocol,
            to,
            interval_ms,
            timeout_ms,
        } => {
            let socket = udp(to, 0, Duration::from_millis(timeout_ms))?;
            let is_connected = protocol == "udp-connected";
            if is_connected {
                socket.connect(to)?;
            }
            let to = (!is_connected).then_some(to);
            loop {
                println!("{}", shown(ask_udp(&socket, to, 1)));
                std::thread::sleep(Duration::from_millis(interval_ms));
            }
        }
        Command::Hold { to, interval_ms } => hold(to, Duration::from_millis(interval_ms)),
        Command::Crowd {
            protocol,
            to,
            count,
            timeout_ms,
        } => crowd::run(&protocol, &to, count, Duration::from_millis(timeout_ms)),
        Command::Load {
            to,
            for_ms,
            tasks,
            pause_ms,
        } => {
            let pause = Duration::from_millis(pause_ms);
            load(&to, Duration::from_millis(for_ms), tasks, pause)
        }
        Command::Trail { to, for_ms } => trail(&to, Duration::from_millis(for_ms)),
        Command::Times { to, count } => times(&to, count),
        Command::Drain { port, gives } => drain(port, gives),
        Command::Pour { to, bytes } => pour(to, bytes),
        Command::Burst {
            to,
            count,
            size,
            timeout_ms,
        } => burst(to, count, size, Duration::from_millis(timeout_ms)),
        Command::Pause => loop {
            nix::unistd::pause();
        },
    }
}

/// Asks once, from a port if it is not 0.
fn ask(
    protocol: &str,
    to: SocketAddr,
    size: usize,
    port: u16,
    timeout: Duration,
) -> std::io::Result<serde_json::Value> {
    match protocol {
        "tcp" => ask_tcp(to, port, timeout),
        "udp" => ask_udp(&udp(to, port, timeout)?, Some(to), size),
        "icmp" => ask_icmp(to, size, timeout),
        _ => {
            let socket = udp(to, port, timeout)?;
            socket.connect(to)?;
            ask_udp(&socket, None, size)
        }
    }
}

/// Targets take turns within each repetition, and the order turns around each time: whatever
/// drifts meanwhile, drifts for all.
fn times(to: &[SocketAddr], count: usize) -> Result<()> {
    let mut times = vec![Vec::with_capacity(count); to.len()];
    for number in 0..count {
        let mut turns: Vec<_> = to.iter().zip(&mut times).collect();
        if number % 2 == 1 {
            turns.reverse();
        }
        for (to, times) in turns {
            let started = Instant::now();
            ask_tcp(*to, 0, Duration::from_secs(2))?;
            times.push(started.elapsed().as_nanos() as u64);
        }
    }
    println!("{}", json!(times));
    Ok(())
}

fn shown(answer: std::io::Result<serde_json::Value>) -> serde_json::Value {
    answer.unwrap_or_else(|error| json!({ "error": error.kind().to_string() }))
}

/// An address as one writes it, IPv4 never in IPv6's form.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn serve(name: &str, port: u16) -> Result<()> {
    crowd::allow_many_files()?;
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).context("listening")?;
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).context("binding")?;
    println!("ready");
    let udp_name = name.to_owned();
    std::thread::spawn(move || {
        let mut buffer = [0; 65_536];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            let answer = format!("{udp_name} {} {length}", plain(peer));
            // The peer may be gone.
            let _ = socket.send_to(answer.as_bytes(), peer);
        }
    });
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let name = name.to_owned();
        std::thread::spawn(move || answer(stream, &name));
    }
    Ok(())
}

/// One line for each byte that comes.
fn answer(mut stream: TcpStream, name: &str) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let peer = plain(stream.peer_addr()?);
    let own = plain(stream.local_addr()?);
    let mut byte = [0];
    while stream.read(&mut byte)? > 0 {
        stream.write_all(format!("{name} {peer} {own}\n").as_bytes())?;
    }
    Ok(())
}

fn read_line(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut text = Vec::new();
    let mut buffer = [0; 256];
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        text.extend_from_slice(buffer.get(..length).unwrap_or_default());
        if text.ends_with(b"\n") {
            return Ok(String::from_utf8_lossy(&text).trim_end().to_owned());
        }
    }
}

fn ask_tcp(to: SocketAddr, port: u16, timeout: Duration) -> std::io::Result<serde_json::Value> {
    let mut stream = match port {
        0 => TcpStream::connect_timeout(&to, timeout)?,
        port => connect_from(port, to, timeout)?,
    };
    stream.set_read_timeout(Some(timeout))?;
    stream.set_nodelay(true)?;
    stream.write_all(b"?")?;
    let line = read_line(&mut stream)?;
    let peer = plain(stream.peer_addr()?).to_string();
    let own = plain(stream.local_addr()?).to_string();
    Ok(parsed(&line, &peer, &own))
}

/// Connects from a port, also one that was used a moment ago.
fn connect_from(port: u16, to: SocketAddr, timeout: Duration) -> std::io::Result<TcpStream> {
    let (family, any): (_, IpAddr) = match to {
        SocketAddr::V4(_) => (AddressFamily::Inet, [0, 0, 0, 0].into()),
        SocketAddr::V6(_) => (AddressFamily::Inet6, Ipv6Addr::UNSPECIFIED.into()),
    };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let limit = TimeVal::microseconds(i64::try_from(timeout.as_micros()).unwrap_or(i64::MAX));
    setsockopt(&socket, sockopt::SendTimeout, &limit)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    bind(
        socket.as_raw_fd(),
        &SockaddrStorage::from(SocketAddr::new(any, port)),
    )?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(to))?;
    Ok(TcpStream::from(socket))
}

fn parsed(line: &str, peer: &str, own: &str) -> serde_json::Value {
    let mut words = line.split(' ');
    json!({
        "server": words.next(),
        "source": words.next(),
        "reached": words.next(),
        "peer": peer,
        "own": own,
    })
}

fn udp(to: SocketAddr, port: u16, timeout: Duration) -> std::io::Result<UdpSocket> {
    let any: IpAddr = if to.is_ipv4() {
        [0, 0, 0, 0].into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, port))?;
    socket.set_read_timeout(Some(timeout))?;
    Ok(socket)
}

/// Sends a datagram; to the socket's peer if `to` is `None`.
fn ask_udp(
    socket: &UdpSocket,
    to: Option<SocketAddr>,
    size: usize,
) -> std::io::Result<serde_json::Value> {
    let payload = vec![b'?'; size];
    match to {
        Some(to) => socket.send_to(&payload, to)?,
        None => socket.send(&payload)?,
    };
    let mut buffer = [0; 65_536];
    let (length, from) = socket.recv_from(&mut buffer)?;
    let line = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned();
    let own = plain(socket.local_addr()?).to_string();
    let mut answer = parsed(&line, &plain(from).to_string(), &own);
    if let (None, Some(answer)) = (to, answer.as_object_mut()) {
        let name = socket
            .peer_addr()
            .map(|peer| plain(peer).to_string())
            .unwrap_or_default();
        answer.insert("peername".to_owned(), name.into());
    }
    Ok(answer)
}

/// Sends an echo request; who replied, and how many bytes of payload.
fn ask_icmp(to: SocketAddr, size: usize, timeout: Duration) -> std::io::Result<serde_json::Value> {
    /// Type, code, checksum, identifier and sequence number; the kernel cares for all but the first.
    const HEADER: usize = 8;
    let (family, protocol, request) = if to.is_ipv4() {
        (AddressFamily::Inet, SockProtocol::Icmp, 8)
    } else {
        (AddressFamily::Inet6, SockProtocol::IcmpV6, 128)
    };
    let socket = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol)?;
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(timeout))?;
    let mut message = vec![0; HEADER + size];
    if let Some(first) = message.first_mut() {
        *first = request;
    }
    socket.send_to(&message, to)?;
    let mut buffer = [0; 65_536];
    let (length, from) = socket.recv_from(&mut buffer)?;
    Ok(json!({ "peer": from.ip().to_string(), "reached": length.saturating_sub(HEADER) }))
}

fn drain(port: u16, gives: u64) -> Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).context("listening")?;
    println!("ready");
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 18];
            let mut bytes = 0_u64;
            // Who sent may be gone.
            while let Ok(length) = stream.read(&mut buffer)
                && length > 0
            {
                bytes += length as u64;
            }
            let _ = stream.write_all(format!("{bytes}\n").as_bytes());
            let _ = std::io::copy(&mut std::io::repeat(b'.').take(gives), &mut stream);
        });
    }
    Ok(())
}

fn pour(to: SocketAddr, bytes: u64) -> Result<()> {
    let patience = Duration::from_secs(30);
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    let started = Instant::now();
    let piece = vec![b'.'; 1 << 18];
    let mut left = bytes;
    while left > 0 {
        let length = piece.len().min(usize::try_from(left)?);
        stream.write_all(piece.get(..length).unwrap_or_default())?;
        left -= length as u64;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line)?;
    let arrived: u64 = line.trim_end().parse().context("a number")?;
    let seconds = started.elapsed().as_secs_f64();
    let given = std::io::copy(&mut stream, &mut std::io::sink())?;
    println!(
        "{}",
        json!({ "arrived": arrived, "seconds": seconds, "given": given })
    );
    Ok(())
}

fn burst(to: SocketAddr, count: usize, size: usize, timeout: Duration) -> Result<()> {
    let socket = udp(to, 0, timeout)?;
    socket.connect(to)?;
    setsockopt(&socket, sockopt::UdpGsoSegment, &i32::try_from(size)?)?;
    socket.send(&vec![b'?'; size * count])?;
    let mut buffer = [0; 256];
    let mut reached = Vec::new();
    // What does not come within time is lost.
    while reached.len() < count
        && let Ok(length) = socket.recv(&mut buffer)
    {
        let line = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
        let long = line.rsplit(' ').next().unwrap_or_default();
        reached.push(long.parse::<usize>().context("a length")?);
    }
    println!("{}", json!({ "reached": reached }));
    Ok(())
}

fn hold(to: SocketAddr, interval: Duration) -> Result<()> {
    /// Longer than some segments in a row take that are lost and sent again.
    const PATIENCE: Duration = Duration::from_secs(15);
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    loop {
        let answer = stream.write_all(b"?").and_then(|()| read_line(&mut stream));
        let peer = stream
            .peer_addr()
            .map(|peer| plain(peer).to_string())
            .unwrap_or_default();
        println!("{}", shown(answer.map(|line| parsed(&line, &peer, ""))));
        std::thread::sleep(interval);
    }
}

fn monotonic_nanos() -> Result<i64> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    Ok(now.tv_sec() * 1_000_000_000 + now.tv_nsec())
}

fn trail(to: &[SocketAddr], time: Duration) -> Result<()> {
    let started = Instant::now();
    for to in to.iter().cycle() {
        let began = monotonic_nanos()?;
        let answer = ask_tcp(*to, 0, Duration::from_secs(5));
        let ended = monotonic_nanos()?;
        let reached = match &answer {
            Ok(answer) => answer.get("reached").and_then(|reached| reached.as_str()),
            Err(_) => None,
        };
        let failed = answer.as_ref().err().map(ToString::to_string);
        println!(
            "{}",
            json!({ "began": began, "ended": ended, "to": to, "reached": reached, "failed": failed })
        );
        if started.elapsed() >= time {
            break;
        }
    }
    Ok(())
}

fn load(to: &[SocketAddr], time: Duration, tasks: usize, pause: Duration) -> Result<()> {
    let started = Instant::now();
    let threads: Vec<_> = (0..tasks.max(1))
        .map(|task| {
            let to = to.to_vec();
            std::thread::spawn(move || {
                let (mut done, mut failed) = (0_u64, Vec::new());
                let mut servers = std::collections::BTreeSet::new();
                for to in to.iter().cycle().skip(task) {
                    if started.elapsed() >= time {
                        break;
                    }
                    match ask_tcp(*to, 0, Duration::from_secs(5)) {
                        Ok(answer) => {
                            done += 1;
                            let server = answer.get("server").and_then(|server| server.as_str());
                            servers.extend(server.map(str::to_owned));
                        }
                        Err(error) => failed.push(format!("{to}: {error}")),
                    }
                    if !pause.is_zero() {
                        std::thread::sleep(pause);
                    }
                }
                (done, failed, servers)
            })
        })
        .collect();
    let (mut done, mut failed) = (0, Vec::new());
    let mut servers = std::collections::BTreeSet::new();
    for thread in threads {
        if let Ok((more, errors, names)) = thread.join() {
            done += more;
            failed.extend(errors);
            servers.extend(names);
        }
    }
    println!(
        "{}",
        json!({ "done": done, "failed": failed, "servers": servers })
    );
    Ok(())
}
