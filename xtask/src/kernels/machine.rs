//! The tests in an emulated machine, reported as they end.

use std::{path::Path, time::Duration};

use anyhow::Result;

use super::Group;
use crate::emulation::{
    emulator::{BROKEN, Machine},
    fetch::Image,
};

/// How long a kernel has for all tests: 15 minutes where nobody else works, and twice as many beside a build.
const TIMEOUT: Duration = Duration::from_secs(2_700);

/// A test that ended.
#[derive(Debug, PartialEq)]
struct Ended {
    test: String,
    is_passed: bool,
    seconds: f32,
}

impl Ended {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.trim_end().strip_prefix("@@")?.split(' ');
        let verdict = words
            .next()
            .filter(|word| ["pass", "fail"].contains(word))?;
        let test = words.next()?.to_owned();
        let began: f32 = words.next()?.parse().ok()?;
        let ended: f32 = words.next()?.parse().ok()?;
        Some(Self {
            test,
            is_passed: verdict == "pass",
            seconds: ended - began,
        })
    }
}

/// Runs the tests on a kernel, printing a line for each; those that did not pass.
pub fn run(name: &str, image: &Image, initrd: &Path, tests: &[Group]) -> Result<Vec<String>> {
    let machine = Machine {
        image,
        initrd,
        memory_mib: 2_048,
        execution: &["-accel", "tcg,thread=multi"],
        without: &[BROKEN],
        // Without cmpxchg16b Linux 7.2 has storage for sockets only from caches that are debugged
        // (kmalloc_nolock).
        kernel_options: "slub_debug=Z",
        timeout: TIMEOUT,
    };
    let mut passed = Vec::new();
    let ended = machine.run(|line| {
        if let Some(ended) = Ended::parse(line) {
            let verdict = if ended.is_passed { "ok" } else { "FAILED" };
            let Ended { test, seconds, .. } = ended;
            println!("{name:7} {test} ... {verdict} ({seconds:.0} s)");
            if ended.is_passed {
                passed.push(test);
            }
        }
    })?;
    let failed: Vec<String> = tests
        .iter()
        .flat_map(|(_, names)| *names)
        .filter(|test| !passed.iter().any(|name| name == *test))
        .map(|test| (*test).to_owned())
        .collect();
    if let Err(reason) = ended {
        println!("{name:7} the machine {reason}");
    }
    if !failed.is_empty() {
        println!(
            "{name:7} what was said is in {} and console.log beside it",
            machine.report().display()
        );
    }
    Ok(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_is_read() {
        assert_eq!(
            Ended::parse("@@fail a_test 2.50 4.00\r"),
            Some(Ended {
                test: "a_test".to_owned(),
                is_passed: false,
                seconds: 1.5
            })
        );
        assert_eq!(Ended::parse("test a_test ... ok"), None);
        assert_eq!(Ended::parse("@@pass a_test"), None);
        assert_eq!(Ended::parse("@@up"), None);
    }
}
