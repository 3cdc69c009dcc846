//! Session affinity to the second: what the programs remember of a client is made older by hand.

use std::net::IpAddr;

use nix::time::{ClockId, clock_gettime};
use penstock_common::{Addr, Affinity, AffinityKey, Algorithm, V4, V6};

use crate::{
    frame::{self, TCP},
    ip,
    kernel::{AFFINITY_SECS, Kernel},
    model::{Endpoint, Hook, Model, NEXT, Service, service_id},
    plain,
};

const CLIENTS: [&str; 2] = ["10.244.1.5", "fd00:244:1::5"];
const FRONTENDS: [&str; 2] = ["10.96.0.9", "fd00:96::9"];
const BACKENDS: [[&str; 2]; 2] = [
    ["10.244.2.1", "10.244.2.2"],
    ["fd00:244:2::1", "fd00:244:2::2"],
];

/// A service of each family that asks its backends in turn.
fn model() -> Model {
    let mut model = Model::default();
    for half in [0, 1] {
        model.service_addrs.insert(ip(FRONTENDS[half]));
        model.services.push(Service {
            frontend: (ip(FRONTENDS[half]), 80),
            proto: TCP,
            backends: BACKENDS[half].map(|text| (ip(text), 8_080)).into(),
            drops_when_empty: false,
            has_affinity: true,
            algorithm: Algorithm::RoundRobin,
        });
    }
    model
}

/// The second that the programs' clock is in.
fn second() -> u32 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).expect("a clock");
    now.tv_sec() as u32
}

/// The client's service port was used so many seconds ago.
fn away(kernel: &mut Kernel, half: usize, now: u32, secs: u32) {
    fn rewind<A: Addr>(kernel: &mut Kernel, map: &str, client: A, half: usize, used_secs: u32)
    where
        AffinityKey<A>: aya::Pod,
    {
        let service = service_id(half);
        let key = AffinityKey { service, client };
        let known: Affinity = kernel.get(map, &key).expect("the client is known");
        kernel.put(map, key, Affinity { used_secs, ..known });
    }
    // The clock may have begun later than that.
    let used = now.wrapping_sub(secs);
    match ip(CLIENTS[half]) {
        IpAddr::V4(ip) => rewind(kernel, "AFFINITY4", V4::from(ip), half, used),
        IpAddr::V6(ip) => rewind(kernel, "AFFINITY6", V6::from(ip), half, used),
    }
}

/// Whom a new connection of the client's goes to.
fn connect(kernel: &mut Kernel, half: usize, port: u16) -> Endpoint {
    let mut spec = plain(
        (ip(CLIENTS[half]), port),
        (ip(FRONTENDS[half]), 80),
        TCP,
        vec![],
    );
    spec.tcp_flags = 2;
    let (verdict, output) = kernel.run(Hook::FromPod, &frame::build(&spec));
    assert_eq!(verdict, NEXT);
    let header = frame::header(&output, 14, half == 0).expect("a header");
    let (_, port) = frame::ports(&output, header.transport).expect("ports");
    (header.dst, port)
}

#[test]
fn a_client_is_kept_to_the_last_second_of_the_timeout() {
    let Some(mut kernel) = Kernel::load(&model()) else {
        return;
    };
    for half in [0, 1] {
        let mut ports = 40_000..;
        let mut connect = |kernel: &mut Kernel| {
            let port = ports.next().expect("a port");
            connect(kernel, half, port)
        };
        let mut bound = connect(&mut kernel);
        for (secs, is_kept) in [
            (0, true),
            (AFFINITY_SECS - 1, true),
            (AFFINITY_SECS, true),
            (AFFINITY_SECS + 1, false),
            (1, true),
            (2 * AFFINITY_SECS, false),
            (AFFINITY_SECS, true),
        ] {
            loop {
                let now = second();
                away(&mut kernel, half, now, secs);
                let chosen = connect(&mut kernel);
                let is_same = chosen == bound;
                bound = chosen;
                // Otherwise it was away for a second more.
                if second() == now {
                    assert_eq!(is_same, is_kept, "away for {secs} s of {AFFINITY_SECS}");
                    break;
                }
            }
        }
    }
}
