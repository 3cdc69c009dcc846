//! The other side.

use std::{
    io::{Read, Write},
    net::{Ipv6Addr, TcpListener, TcpStream, UdpSocket},
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use anyhow::{Context, Result};

use super::{MESSAGE, WORKERS, datagram, generators, purpose, stream::Tally};

/// What all sinks together have read.
struct Sinks {
    octets: AtomicU64,
    begun: Instant,
}

impl Sinks {
    fn new() -> Self {
        Self {
            octets: AtomicU64::new(0),
            begun: Instant::now(),
        }
    }

    fn tally(&self) -> Tally {
        Tally {
            octets: self.octets.load(Ordering::Relaxed),
            nanos: self.begun.elapsed().as_nanos() as u64,
        }
    }
}

/// Serves until it is killed.
pub fn serve(port: u16) -> Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).context("listening")?;
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).context("binding")?;
    let _iperf = generators::serve_iperf()?;
    println!("ready");
    let sinks = &Sinks::new();
    // Threads that are there already: to start one for each connection would be measured too.
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Ok((stream, _)) = listener.accept() {
                    // A client may close whenever it likes.
                    let _ = answer(stream, sinks);
                }
            });
        }
        let mut buffer = [0; 2_048];
        let mut silent = 0_u32;
        loop {
            // An ICMP error about an earlier answer is no reason to end.
            let Ok((length, peer)) = socket.recv_from(&mut buffer) else {
                continue;
            };
            match buffer {
                [datagram::SILENT, ..] => {
                    silent = silent.wrapping_add(1);
                    continue;
                }
                [datagram::ASKING, ..] => {
                    if let Some(count) = buffer.get_mut(datagram::COUNT) {
                        count.copy_from_slice(&silent.to_be_bytes());
                    }
                    silent = 0;
                }
                _ => {}
            }
            let _ = socket.send_to(buffer.get(..length).unwrap_or_default(), peer);
        }
    })
}

fn answer(mut stream: TcpStream, sinks: &Sinks) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut first = [0];
    stream.read_exact(&mut first)?;
    let mut message = [0; MESSAGE];
    match first {
        [purpose::ONCE] => {
            stream.read_exact(&mut message)?;
            stream.write_all(&message)
        }
        [purpose::ECHO] => loop {
            stream.read_exact(&mut message)?;
            stream.write_all(&message)?;
        },
        [purpose::SINK] => {
            let mut buffer = vec![0; 256 * 1_024];
            let mut octets = 0_u64;
            loop {
                let length = stream.read(&mut buffer)? as u64;
                if length == 0 {
                    break;
                }
                octets += length;
                sinks.octets.fetch_add(length, Ordering::Relaxed);
            }
            stream.write_all(&octets.to_be_bytes())
        }
        [purpose::TALLY] => loop {
            stream.read_exact(&mut first)?;
            stream.write_all(&sinks.tally().to_octets())?;
        },
        [purpose::HTTP] => answer_http(&mut stream),
        _ => Err(std::io::ErrorKind::InvalidData.into()),
    }
}

/// What an answer over HTTP brings.
pub(super) const BODY: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// Answers requests of HTTP/1.1 that have no body, of which the first octet is read already, until the
/// client wants no more.
fn answer_http(stream: &mut TcpStream) -> std::io::Result<()> {
    let length = BODY.len();
    let answer =
        |header| format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n{header}\r\n{BODY}");
    let (last, other) = (answer("Connection: close\r\n"), answer(""));
    const END: &[u8] = b"\r\n\r\n";
    const CLOSE: &[u8] = b"connection: close\r\n";
    loop {
        let mut request = Vec::with_capacity(512);
        let mut buffer = [0; 512];
        while !request.ends_with(END) {
            match stream.read(&mut buffer)? {
                0 => return Ok(()),
                length => request.extend_from_slice(buffer.get(..length).unwrap_or_default()),
            }
        }
        request.make_ascii_lowercase();
        if request.windows(CLOSE.len()).any(|header| header == CLOSE) {
            return stream.write_all(last.as_bytes());
        }
        stream.write_all(other.as_bytes())?;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{
        super::generators::{self, Connections},
        *,
    };

    /// What comes back for what is written at once.
    fn answers(requests: &[u8]) -> String {
        let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let serving =
            std::thread::spawn(move || answer(listener.accept().unwrap().0, &Sinks::new()));
        client.write_all(requests).unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        serving.join().unwrap().unwrap();
        text
    }

    #[test]
    fn sinks_tally_what_they_have_read_and_not_what_was_sent() {
        let sinks = Sinks::new();
        let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
        let connect = |purpose: u8, more: &[u8]| {
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            client.write_all(&[&[purpose], more].concat()).unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
            (client, listener.accept().unwrap().0)
        };
        let (mut sinking, server) = connect(purpose::SINK, &[0; 777]);
        let tally = || {
            let (mut asking, server) = connect(purpose::TALLY, b"t");
            // It ends with the client.
            answer(server, &sinks).unwrap_err();
            let mut octets = Vec::new();
            asking.read_to_end(&mut octets).unwrap();
            u64::from_be_bytes(octets[..8].try_into().unwrap())
        };
        assert_eq!(tally(), 0, "nobody has read anything yet");
        answer(server, &sinks).unwrap();
        assert_eq!(tally(), 777);
        let mut count = Vec::new();
        sinking.read_to_end(&mut count).unwrap();
        assert_eq!(count, 777_u64.to_be_bytes());
    }

    #[test]
    fn a_request_over_http_is_answered_and_the_connection_closed() {
        let text = answers(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Close\r\n\r\n");
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.ends_with("\r\nConnection: close"), "{head}");
        assert_eq!(body.len(), 64);
    }

    #[test]
    fn a_connection_over_http_stays_for_the_next_request() {
        let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
        let to = listener.local_addr().unwrap();
        let serving =
            std::thread::spawn(move || answer(listener.accept().unwrap().0, &Sinks::new()));
        let sent = generators::ask(to, Duration::from_millis(50), Connections::Kept).unwrap();
        serving.join().unwrap().unwrap();
        assert_eq!(sent.connections, 1);
        assert!(
            sent.requests > 1 && sent.answers == sent.requests,
            "{sent:?}"
        );
    }
}
