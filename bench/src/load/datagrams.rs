//! Sends datagrams, many at once, and learns how many arrived.

use std::{
    io::{ErrorKind, IoSlice},
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg};

use super::{MESSAGE, Sent, Summary, client, datagram};

/// Datagrams of a system call, of which the last is answered: few enough for the server's socket to hold
/// them all, so that none is lost to haste.
pub const AT_ONCE: usize = 32;

/// Sends over one connected socket. What is answered within the window counts.
pub fn run(to: SocketAddr, warm_up: Duration, measured: Duration) -> Result<Summary> {
    let socket = client::socket(to)?;
    socket.connect(to).context("connecting")?;
    let mut number = 0_u64;
    let before = send_for(&socket, &mut number, warm_up)?.sent;
    let summary = send_for(&socket, &mut number, measured)?;
    let sent = Sent {
        connections: 1,
        requests: before.requests + summary.sent.requests,
        answers: before.answers + summary.sent.answers,
        octets: 0,
    };
    Ok(summary.with(sent))
}

/// Sends for so long, and once at least.
fn send_for(socket: &UdpSocket, number: &mut u64, duration: Duration) -> Result<Summary> {
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(AT_ONCE, None);
    let (mut arrived, mut sent, mut answers) = (0_u64, 0_u64, 0_u64);
    let begun = Instant::now();
    loop {
        *number += 1;
        let silent = message(datagram::SILENT, *number);
        let asking = message(datagram::ASKING, *number);
        let mut datagrams = [[IoSlice::new(&silent)]; AT_ONCE];
        let [.., last] = &mut datagrams;
        *last = [IoSlice::new(&asking)];
        let results = sendmmsg(
            socket.as_raw_fd(),
            &mut headers,
            &datagrams,
            [None; AT_ONCE],
            [],
            MsgFlags::empty(),
        );
        let accepted = results.context("sending")?.count();
        ensure!(accepted == AT_ONCE, "{accepted} of {AT_ONCE} were sent");
        sent += AT_ONCE as u64;
        let came = answer(socket, *number)?;
        arrived += came;
        answers += u64::from(came > 0);
        if begun.elapsed() >= duration {
            break;
        }
    }
    ensure!(arrived > 0, "nothing was answered");
    let seconds = begun.elapsed().as_secs_f64();
    let lost = sent.saturating_sub(arrived);
    Ok(Summary::of_packets(arrived, seconds, lost).with(Sent {
        requests: sent,
        answers,
        ..Sent::default()
    }))
}

fn message(purpose: u8, number: u64) -> [u8; MESSAGE] {
    let mut message = [0; MESSAGE];
    let head = std::iter::once(purpose).chain(number.to_be_bytes());
    for (to, from) in message.iter_mut().zip(head) {
        *to = from;
    }
    message
}

/// How many datagrams of this number arrived; none if there is no answer.
fn answer(socket: &UdpSocket, number: u64) -> Result<u64> {
    let expected = message(datagram::ASKING, number);
    let head = ..datagram::COUNT.start;
    let mut answer = [0; MESSAGE];
    loop {
        match socket.recv(&mut answer) {
            Ok(MESSAGE) if answer.get(head) == expected.get(head) => {
                let count = answer.get(datagram::COUNT).unwrap_or_default();
                let silent = count.try_into().map_or(0, u32::from_be_bytes);
                return Ok(u64::from(silent) + 1);
            }
            // An earlier one's, which came late.
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Ok(0);
            }
            Err(error) => return Err(error).context("receiving"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, thread};

    use super::*;

    #[test]
    fn what_does_not_arrive_is_counted_as_lost() {
        let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let to = server.local_addr().unwrap();
        // A server that sees every other silent datagram only.
        let serving = thread::spawn(move || {
            let (mut buffer, mut silent) = ([0; MESSAGE], 0_u32);
            loop {
                let (length, peer) = server.recv_from(&mut buffer).unwrap();
                match buffer[0] {
                    datagram::SILENT => silent += 1,
                    datagram::ASKING => {
                        buffer[datagram::COUNT].copy_from_slice(&(silent / 2).to_be_bytes());
                        silent = 0;
                        server.send_to(&buffer[..length], peer).unwrap();
                    }
                    _ => return,
                }
            }
        });
        let summary = run(to, Duration::ZERO, Duration::from_millis(20)).unwrap();
        assert_eq!(summary.count % 16, 0, "{summary:?}");
        assert_eq!(summary.count, summary.lost, "{summary:?}");
        // With the one call that comes before.
        let sent = summary.sent;
        assert_eq!(sent.requests, 32 + summary.count + summary.lost);
        assert_eq!(sent.answers, sent.requests / 32);
        client::socket(to).unwrap().send_to(b"end", to).unwrap();
        serving.join().unwrap();
    }
}
