//! For how long both keep a client with its endpoint.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use penstock_testbed::Question;

use crate::{
    cases::{Address, Client},
    objects::Object,
    service::{Kind, Port, Role, Service},
    side::Side,
    stage::Stage,
};

/// The service's number.
const NUMBER: usize = 121;
/// Its timeout.
const TIMEOUT: Duration = Duration::from_secs(8);
/// How long clients stay away that are to be known again: as near to the timeout as a busy machine
/// allows. The exact second is tested packet by packet.
const SHORTER: Duration = Duration::from_secs(6);
/// And those that are to be forgotten: Penstock counts whole seconds.
const LONGER: Duration = Duration::from_secs(10);
/// Its ports, each of which binds a client by itself: of so many one changes its endpoint of four.
const PORTS: u16 = 24;
/// How often to try to be fast enough.
const TRIES: usize = 6;

/// Who asks, and where.
const CLIENTS: [(Client, Address); 4] = [
    (Client::Pod, Address::Cluster),
    (Client::PodByPackets, Address::Cluster),
    (Client::Host, Address::Cluster),
    (Client::Outside, Address::External),
];

fn service() -> Service {
    let roles = [Role::Here(0), Role::Here(1), Role::There(0), Role::There(1)];
    let ports = (0..PORTS).map(|number| Port {
        number: 1_000 + number,
        target: 8_080,
        is_tcp: true,
    });
    Service {
        number: NUMBER,
        ports: ports.collect(),
        affinity: true,
        timeout_secs: u32::try_from(TIMEOUT.as_secs()).unwrap_or(u32::MAX),
        external_ips: true,
        ..Service::ready(Kind::ClusterIp, &roles)
    }
}

/// Who answers a client at each port.
fn servers(
    stage: &Stage,
    side: &Side,
    service: &Service,
    (client, address): (Client, Address),
    is_v4: bool,
) -> Result<Vec<Role>> {
    let object = Object { service, side };
    let ip = match address {
        Address::External => object.external_ip(is_v4),
        _ => object.cluster_ip(is_v4),
    };
    let questions: Vec<Question> = service
        .ports
        .iter()
        .map(|port| Question {
            protocol: "tcp",
            to: SocketAddr::new(ip, port.number),
            times: 1,
            timeout: Duration::from_secs(3),
        })
        .collect();
    let found = client.host(side).survey(stage.folder(), &questions)?;
    let servers = found.iter().zip(&questions).map(|(found, question)| {
        let answer = found.answers.first();
        let answer = answer.with_context(|| format!("{client:?} {}: {found:?}", question.to))?;
        side.role(&answer.server).context("a role")
    });
    servers.collect()
}

/// Who answers all clients of both sides.
fn all(stage: &Stage, service: &Service) -> Result<Vec<Vec<Role>>> {
    let mut all = Vec::new();
    for side in &stage.sides {
        for client in CLIENTS {
            for is_v4 in [true, false] {
                all.push(servers(stage, side, service, client, is_v4)?);
            }
        }
    }
    Ok(all)
}

/// Compares them.
pub fn compare(stage: &mut Stage) -> Result<()> {
    let service = service();
    stage.add(&service)?;
    let stage = &*stage;
    for _ in 0..TRIES {
        let began = Instant::now();
        let first = all(stage, &service)?;
        std::thread::sleep(SHORTER.saturating_sub(began.elapsed()));
        let second = all(stage, &service)?;
        if began.elapsed() >= TIMEOUT {
            continue;
        }
        ensure!(
            first == second,
            "{first:?}, and before the timeout {second:?}"
        );
        std::thread::sleep(LONGER);
        let third = all(stage, &service)?;
        for (before, after) in second.iter().zip(&third) {
            ensure!(
                before != after,
                "all have stayed after the timeout: {before:?}"
            );
        }
        return Ok(());
    }
    bail!("asking everybody took longer than {TIMEOUT:?} each time");
}
