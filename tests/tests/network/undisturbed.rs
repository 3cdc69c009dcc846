//! Traffic that goes on whatever happens.

use std::{
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Result, ensure};
use penstock_testbed::Host;
use serde_json::{Value, json};

/// Between each pair of hosts, while `what` is done: a socket that asks by UDP all the time, and
/// connections that come and go, in both families. Every question has to be answered.
pub fn undisturbed<T>(pairs: &[(&Host, &Host)], what: impl FnOnce() -> Result<T>) -> Result<T> {
    let is_over = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mut asking = Vec::new();
        for &(from, to) in pairs {
            for ip in [to.ip4, to.ip6] {
                asking.push(scope.spawn(move || keeps(from, to, ip, is_over)));
            }
            asking.push(scope.spawn(move || connects(from, to, is_over)));
        }
        let done = what();
        is_over.store(true, Ordering::Relaxed);
        for thread in asking {
            let asked = thread.join().expect("nobody panics")?;
            ensure!(asked > 0, "nothing was asked");
        }
        done
    })
}

/// Asks over one socket; how often.
fn keeps(from: &Host, to: &Host, ip: IpAddr, is_over: &AtomicBool) -> Result<u64> {
    let at = SocketAddr::new(ip, 8080).to_string();
    let options = ["--interval-ms", "5", "--timeout-ms", "5000"];
    let mut asking = from.traffic(&[&["keep", "udp-connected", &at], &options[..]].concat())?;
    let mut asked = 0;
    while !is_over.load(Ordering::Relaxed) {
        let answer: Value = serde_json::from_str(&asking.line()?)?;
        ensure!(
            answer["server"] == to.name,
            "{} asked {at}, for the {asked}th time: {answer}",
            from.name
        );
        asked += 1;
    }
    Ok(asked)
}

/// Connects again and again; how often.
fn connects(from: &Host, to: &Host, is_over: &AtomicBool) -> Result<u64> {
    let [v4, v6] = [to.ip4, to.ip6].map(|ip| SocketAddr::new(ip, 8080).to_string());
    let mut asked = 0;
    while !is_over.load(Ordering::Relaxed) {
        let options = ["--for-ms", "1000", "--pause-ms", "5"];
        let arguments = [&["load", &v4, &v6], &options[..]].concat();
        let mut load = from.traffic(&arguments)?;
        let report: Value = serde_json::from_str(&load.line()?)?;
        ensure!(report["failed"] == json!([]), "{report}");
        ensure!(report["servers"] == json!([to.name]), "{report}");
        asked += report["done"].as_u64().unwrap_or_default();
    }
    Ok(asked)
}
