//! Penstock beside the real kube-proxy: the same services, the same questions, the same answers,
//! but for differences that docs/differences.md lists.
//!
//! Both nodes see the same objects. Each service is there twice, once as seen from either node, so
//! that "here" and "there" are the same on both. Then every service becomes another one while both
//! run, and all is asked again. `PENSTOCK_SEED` and `PENSTOCK_SERVICES` choose other random services, and
//! how many.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

mod affinity;
mod cases;
mod comparison;
mod differences;
mod health;
mod objects;
mod outcome;
mod service;
mod side;
mod stage;

use std::collections::BTreeSet;

use anyhow::Result;
use comparison::Comparison;
use differences::Difference;
use penstock_testbed::{Random, require_kube_proxy};
use service::Service;
use stage::Stage;

fn setting(name: &str, default: u64) -> u64 {
    let value = std::env::var(name).ok().and_then(|text| text.parse().ok());
    value.unwrap_or(default)
}

#[test]
fn penstock_answers_as_kube_proxy_does() -> Result<()> {
    let Some(assets) = require_kube_proxy() else {
        return Ok(());
    };
    let seed = setting("PENSTOCK_SEED", 20_260_101);
    let count = setting("PENSTOCK_SERVICES", 12) as usize;
    let mut random = Random(seed);
    let services = service::services(&mut random, count, 0);
    let mut stage = Stage::new(&assets, &services)?;
    let met = compare(&stage, &services, seed)?;
    // What is never met is no difference any more.
    for difference in Difference::ALL {
        assert!(met.contains(&difference), "{}", difference.heading());
    }
    // Every service becomes another one, while both serve.
    let others = service::services(&mut random, count + 1, 7);
    stage.change(&services, &others)?;
    compare(&stage, &others, seed)?;
    affinity::compare(&mut stage)
}

/// Puts all questions, and says which differences were met.
fn compare(stage: &Stage, services: &[Service], seed: u64) -> Result<BTreeSet<Difference>> {
    let cases = cases::cases(services);
    let comparison = Comparison::make(stage, services, &cases)?;
    let table = comparison.table();
    assert!(table.is_empty(), "seed {seed}:\n{table}");
    health::compare(stage, services)?;
    Ok(comparison.met())
}

#[test]
fn every_difference_has_its_reason_in_the_documentation() {
    let text = include_str!("../../../docs/differences.md");
    let headings: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("### "))
        .collect();
    let known = Difference::ALL.map(Difference::heading);
    let known = known.into_iter().chain([differences::AFFINITY]);
    assert_eq!(headings, known.collect::<Vec<_>>());
}
