//! An emulated machine: boots, reports the tests as they end, and stops.

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::{Group, fetch::Image};

/// How long a kernel has for all tests.
const TIMEOUT: Duration = Duration::from_secs(1_200);
/// How long it has until the first.
const BOOT: Duration = Duration::from_secs(120);
/// Some kernels rarely die in their early boot when emulated; what is tried again is only that.
const TRIES: u32 = 3;

/// A line of the machine's report.
#[derive(Debug, PartialEq)]
enum Event {
    /// The init runs.
    Up,
    /// A test ended.
    Ended {
        test: String,
        is_passed: bool,
        seconds: f32,
    },
    /// All tests ended.
    End,
}

impl Event {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.trim_end().strip_prefix("@@")?.split(' ');
        match words.next()? {
            "up" => Some(Self::Up),
            "end" => Some(Self::End),
            verdict @ ("pass" | "fail") => {
                let test = words.next()?.to_owned();
                let began: f32 = words.next()?.parse().ok()?;
                let ended: f32 = words.next()?.parse().ok()?;
                Some(Self::Ended {
                    test,
                    is_passed: verdict == "pass",
                    seconds: ended - began,
                })
            }
            _ => None,
        }
    }
}

/// Runs the tests on a kernel, printing a line for each; those that did not pass.
pub fn run(name: &str, image: &Image, initrd: &Path, tests: &[Group]) -> Result<Vec<String>> {
    for _ in 1..TRIES {
        match boot(name, image, initrd, tests)? {
            Outcome::NeverUp(reason) => {
                eprintln!("kernels: {} {reason}; once more", image.release);
            }
            Outcome::Ran(failed) => return Ok(failed),
        }
    }
    match boot(name, image, initrd, tests)? {
        Outcome::Ran(failed) => Ok(failed),
        Outcome::NeverUp(reason) => bail!(
            "{} {reason}, {TRIES} times; its console is in {}",
            image.release,
            image.folder.join("console.log").display()
        ),
    }
}

enum Outcome {
    /// The init never ran.
    NeverUp(&'static str),
    /// These tests did not pass.
    Ran(Vec<String>),
}

/// An emulator that ends with its owner.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn boot(name: &str, image: &Image, initrd: &Path, tests: &[Group]) -> Result<Outcome> {
    let report = image.folder.join("report.log");
    File::create(&report).context("making the report")?;
    let serial = |file: &Path| format!("file:{}", file.display());
    // The two lines of a virtual machine without anything else. cmpxchg16b is masked because QEMU
    // before version 8 emulates it wrongly, from which Linux 6.12 dies while it boots. Without it
    // Linux 7.2 has storage for sockets only from caches that are debugged (kmalloc_nolock).
    let child = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg,thread=multi", "-cpu", "max,-cx16"])
        .args(["-smp", "2", "-m", "2048"])
        .args(["-nodefaults", "-no-reboot", "-display", "none"])
        .arg("-kernel")
        .arg(&image.vmlinuz)
        .arg("-initrd")
        .arg(initrd)
        .arg("-append")
        .arg("console=ttyS0 quiet loglevel=4 panic=-1 tsc=reliable mitigations=off slub_debug=Z")
        .args(["-serial", &serial(&image.folder.join("console.log"))])
        .args(["-serial", &serial(&report)])
        .stdin(Stdio::null())
        .spawn()
        .context("starting qemu-system-x86_64")?;
    let mut machine = Machine(child);
    let started = Instant::now();
    let mut seen = 0;
    let mut is_up = false;
    let mut passed = Vec::new();
    let mut is_over = false;
    let reason = loop {
        // Asked before reading, so that what it said last is read.
        let has_ended = machine.0.try_wait().context("waiting")?.is_some();
        let text = fs::read(&report).context("reading the report")?;
        let text = String::from_utf8_lossy(&text).into_owned();
        // A line that is still being written is left for the next time.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let lines: Vec<&str> = text.get(..whole).unwrap_or_default().lines().collect();
        for line in lines.iter().skip(seen) {
            match Event::parse(line) {
                Some(Event::Up) => is_up = true,
                Some(Event::End) => is_over = true,
                Some(Event::Ended {
                    test,
                    is_passed,
                    seconds,
                }) => {
                    let verdict = if is_passed { "ok" } else { "FAILED" };
                    println!("{name:7} {test} ... {verdict} ({seconds:.0} s)");
                    if is_passed {
                        passed.push(test);
                    }
                }
                None => {}
            }
        }
        seen = lines.len();
        if is_over {
            break None;
        }
        if has_ended {
            break Some("died");
        }
        if !is_up && started.elapsed() > BOOT {
            break Some("did not boot in time");
        }
        if started.elapsed() > TIMEOUT {
            break Some("did not end in time");
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    if let (false, Some(reason)) = (is_up, reason) {
        return Ok(Outcome::NeverUp(reason));
    }
    let failed: Vec<String> = tests
        .iter()
        .flat_map(|(_, names)| *names)
        .filter(|test| !passed.iter().any(|name| name == *test))
        .map(|test| (*test).to_owned())
        .collect();
    if let Some(reason) = reason {
        println!("{name:7} the machine {reason}");
    }
    if !failed.is_empty() {
        println!(
            "{name:7} what was said is in {} and console.log beside it",
            report.display()
        );
    }
    Ok(Outcome::Ran(failed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_is_read() {
        assert_eq!(Event::parse("@@up\r"), Some(Event::Up));
        assert_eq!(Event::parse("@@end"), Some(Event::End));
        assert_eq!(
            Event::parse("@@fail a_test 2.50 4.00\r"),
            Some(Event::Ended {
                test: "a_test".to_owned(),
                is_passed: false,
                seconds: 1.5
            })
        );
        assert_eq!(Event::parse("test a_test ... ok"), None);
        assert_eq!(Event::parse("@@pass a_test"), None);
    }
}
