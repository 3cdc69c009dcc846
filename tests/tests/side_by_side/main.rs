//! Penstock beside the real kube-proxy: the same services, the same questions, the same answers,
//! but for differences that docs/differences.md lists.
//!
//! Both nodes see the same objects. Each service is there twice, once as seen from either node, so
//! that "here" and "there" are the same on both. `PENSTOCK_SEED` and `PENSTOCK_SERVICES` choose
//! other random services, and how many.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

mod cases;
mod objects;
mod outcome;
mod random;
mod service;
mod side;
mod stage;

use std::time::{Duration, Instant};

use anyhow::Result;
use penstock_testbed::require_kube_proxy;
use random::Random;
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
    let services = service::services(&mut Random(seed), count);
    let cases = cases::cases(&services);
    let begin = Instant::now();
    let stage = Stage::new(&assets, &services)?;
    eprintln!("{} cases, stage {:?}", cases.len(), begin.elapsed());
    let effort = outcome::Effort {
        times: 6,
        timeout: Duration::from_millis(500),
    };
    let ours = outcome::outcomes(&stage, &stage.sides[0], &services, &cases, effort)?;
    eprintln!("ours {:?}", begin.elapsed());
    let theirs = outcome::outcomes(&stage, &stage.sides[1], &services, &cases, effort)?;
    eprintln!("theirs {:?}", begin.elapsed());
    for ((case, ours), theirs) in cases.iter().zip(&ours).zip(&theirs) {
        if ours != theirs {
            eprintln!(
                "{} | {case} | {ours} | {theirs}",
                services[case.service].text()
            );
        }
    }
    Ok(())
}
