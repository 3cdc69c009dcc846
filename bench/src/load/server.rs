//! The other side.

use std::{
    io::{Read, Write},
    net::{Ipv6Addr, TcpListener, TcpStream, UdpSocket},
};

use anyhow::{Context, Result};

use super::{MESSAGE, WORKERS, datagram, purpose};

/// Serves until it is killed.
pub fn serve(port: u16) -> Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).context("listening")?;
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).context("binding")?;
    println!("ready");
    // Threads that are there already: to start one for each connection would be measured too.
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Ok((stream, _)) = listener.accept() {
                    // A client may close whenever it likes.
                    let _ = answer(stream);
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

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
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
                match stream.read(&mut buffer)? {
                    0 => break,
                    length => octets += length as u64,
                }
            }
            stream.write_all(&octets.to_be_bytes())
        }
        _ => Err(std::io::ErrorKind::InvalidData.into()),
    }
}
