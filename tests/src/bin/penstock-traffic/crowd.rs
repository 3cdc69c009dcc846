//! Many connections from one process, each of which must go on as it began: with the same server,
//! which must go on seeing the same client.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    signal::{SigSet, Signal},
};
use serde_json::json;

use crate::udp;

/// How many questions of a crowd are under way at once: several crowds' datagrams have room in a
/// server's buffer.
const AT_ONCE: usize = 16;
/// Failures that are told.
const TOLD: usize = 5;

enum Line {
    Tcp(TcpStream),
    /// A connected socket.
    Udp(UdpSocket),
    /// One that is not, and whom it asks.
    Datagrams(UdpSocket, SocketAddr),
}

impl Line {
    fn open(protocol: &str, to: SocketAddr, patience: Duration) -> std::io::Result<Self> {
        if protocol == "tcp" {
            let stream = TcpStream::connect_timeout(&to, patience)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(patience))?;
            return Ok(Self::Tcp(stream));
        }
        let socket = udp(to, 0, patience)?;
        if protocol == "udp" {
            return Ok(Self::Datagrams(socket, to));
        }
        socket.connect(to)?;
        Ok(Self::Udp(socket))
    }

    fn ask(&mut self) -> std::io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.write_all(b"?"),
            Self::Udp(socket) => socket.send(b"?").map(drop),
            Self::Datagrams(socket, to) => socket.send_to(b"?", *to).map(drop),
        }
    }

    fn hear(&mut self) -> std::io::Result<String> {
        let mut buffer = [0; 256];
        let mut text = Vec::new();
        loop {
            let length = match self {
                Self::Tcp(stream) => stream.read(&mut buffer)?,
                Self::Udp(socket) => socket.recv(&mut buffer)?,
                Self::Datagrams(socket, to) => {
                    let (length, from) = socket.recv_from(&mut buffer)?;
                    if from != *to {
                        return Err(std::io::Error::other(format!("{from} answered")));
                    }
                    length
                }
            };
            text.extend_from_slice(buffer.get(..length).unwrap_or_default());
            match self {
                Self::Tcp(_) if length == 0 => {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
                Self::Tcp(_) if !text.ends_with(b"\n") => {}
                _ => return Ok(String::from_utf8_lossy(&text).trim_end().to_owned()),
            }
        }
    }
}

/// One of the crowd.
struct Member {
    to: SocketAddr,
    line: Line,
    /// What it was told first, and must be told ever after.
    answer: Option<String>,
}

impl Member {
    /// What it is told that differs from before, or the error instead of it.
    fn heard(&mut self, asked: std::io::Result<()>) -> Result<(), String> {
        let told = asked.and_then(|()| self.line.hear());
        let told = told.map_err(|error| format!("{}: {error}", self.to))?;
        let before = self.answer.get_or_insert_with(|| told.clone());
        if *before == told {
            Ok(())
        } else {
            Err(format!("{}: {told} instead of {before}", self.to))
        }
    }
}

/// As many open files as may be; a service's default is fewer than a crowd's.
pub fn allow_many_files() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).context("asking for limits")?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).context("raising the limit of open files")
}

/// Opens connections and asks on each; asks again on each whenever SIGUSR1 comes. A line for each
/// time: how many were told what they were told first, and what was wrong with some of the others.
pub fn run(protocol: &str, to: &[SocketAddr], count: usize, patience: Duration) -> Result<()> {
    allow_many_files()?;
    let mut again = SigSet::empty();
    again.add(Signal::SIGUSR1);
    again.thread_block().context("blocking a signal")?;
    let members = to.iter().cycle().take(count).map(|to| {
        let line = Line::open(protocol, *to, patience).with_context(|| format!("opening {to}"))?;
        Ok(Member {
            to: *to,
            line,
            answer: None,
        })
    });
    let mut members: Vec<Member> = members.collect::<Result<_>>()?;
    loop {
        let mut failed = Vec::new();
        for some in members.chunks_mut(AT_ONCE) {
            let asked: Vec<_> = some.iter_mut().map(|member| member.line.ask()).collect();
            for (member, asked) in some.iter_mut().zip(asked) {
                failed.extend(member.heard(asked).err());
            }
        }
        let answered = members.len() - failed.len();
        failed.truncate(TOLD);
        println!("{}", json!({ "answered": answered, "failed": failed }));
        again.wait().context("waiting for a signal")?;
    }
}
