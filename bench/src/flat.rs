//! Penstock with few services and with many, side by side and in turns: whether connecting takes longer the more
//! there are is a ratio within one run.

use anyhow::{Context, Result, ensure};
use penstock_testbed::{Testbed, patiently};

use crate::{
    contender::Contender,
    load::Workload,
    results::Keeper,
    services::{Lane, Way, objects},
    turns::{self, Effort, Trial},
};

/// How many services there are: one, and as many as nodes are said to take.
pub const COUNTS: [usize; 2] = [1, 44_000];

/// What begins its titles.
pub const TITLE: &str = "By the number of services";

/// What is measured: what finds the service, and for packets what finds the flow.
const TRIALS: [Trial; 3] = [
    Trial::together(Workload::Connect),
    Trial::together(Workload::UdpSendto),
    Trial::together(Workload::TcpRr),
];

/// The names of all trials.
pub fn names() -> Vec<String> {
    TRIALS.iter().map(Trial::name).collect()
}

/// The ways that are compared with themselves.
const WAYS: [Way; 2] = [Way::Socket, Way::Packet];

/// A contender's name.
fn name(way: Way, count: usize) -> String {
    format!("{}, of {count}", way.name(None))
}

/// All contenders.
pub fn contenders(counts: &[usize]) -> Vec<String> {
    let of = |way: Way| counts.iter().map(move |count| name(way, *count));
    WAYS.into_iter().flat_map(of).collect()
}

/// What measures this alone.
pub fn command(counts: &[usize]) -> String {
    let list: Vec<String> = counts.iter().map(usize::to_string).collect();
    format!("flat --services {}", list.join(","))
}

/// Measures both ways with each number of services, of which the last is asked. The first number is what the
/// others are compared with.
pub fn measure(counts: &[usize], effort: &Effort, keeper: &mut Keeper) -> Result<()> {
    ensure!(
        counts.len() > 1 && counts.iter().all(|count| *count > 0),
        "there have to be two numbers of services to be compared"
    );
    let effort = effort.of(command(counts));
    for way in WAYS {
        let mut testbed = Testbed::new()?;
        let mut contenders: Vec<Contender> = Vec::new();
        for count in counts {
            let mut lane = Lane::new(&mut testbed, way)?;
            lane.program(&mut testbed, None, *count)?;
            let [_, last] = objects::ends(*count)?;
            let name = name(way, *count);
            if !effort.names(&name) {
                continue;
            }
            let contender = lane.contender(&name, last.udp());
            patiently("the service answers", || contender.answers()).context(name)?;
            contenders.push(contender);
        }
        let title = format!("{TITLE}: {}", way.name(None));
        turns::take(&title, &contenders, &TRIALS, &effort, keeper)?;
    }
    Ok(())
}
