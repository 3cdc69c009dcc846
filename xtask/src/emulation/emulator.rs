//! An emulated machine: boots, reports line by line, and stops.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::fetch::Image;

/// How long a machine has until its init says that it is up.
const BOOT: Duration = Duration::from_secs(120);
/// Some kernels rarely die in their early boot when emulated; what is tried again is only that.
const TRIES: u32 = 3;
/// What an init reports once it runs.
const UP: &str = "@@up";
/// What it reports when it is done.
const END: &str = "@@end";

/// Masked because QEMU before version 8 emulates cmpxchg16b wrongly, from which Linux 6.12 dies while it
/// boots.
pub const BROKEN: &str = "cx16";

/// What machines differ in.
pub struct Machine<'a> {
    /// Its kernel.
    pub image: &'a Image,
    /// Its file system.
    pub initrd: &'a Path,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// QEMU's options for how its processors execute.
    pub execution: &'a [&'a str],
    /// What its processors lack of what QEMU emulates.
    pub without: &'a [&'a str],
    /// What its kernel is told besides.
    pub kernel_options: &'a str,
    /// How long it has.
    pub timeout: Duration,
}

/// How a machine ended that was up: with its last line, or else.
pub type Ended = Result<(), &'static str>;

impl Machine<'_> {
    /// What it reports.
    pub fn report(&self) -> PathBuf {
        self.image.folder.join("report.log")
    }

    /// Runs it to its end, telling every line that it reports meanwhile.
    pub fn run(&self, mut tell: impl FnMut(&str)) -> Result<Ended> {
        for _ in 1..TRIES {
            match self.boot(&mut tell)? {
                Outcome::NeverUp(reason) => {
                    eprintln!("{} {reason}; once more", self.image.release);
                }
                Outcome::WasUp(ended) => return Ok(ended),
            }
        }
        match self.boot(&mut tell)? {
            Outcome::WasUp(ended) => Ok(ended),
            Outcome::NeverUp(reason) => bail!(
                "{} {reason}, {TRIES} times; its console is in {}",
                self.image.release,
                self.console().display()
            ),
        }
    }

    fn console(&self) -> PathBuf {
        self.image.folder.join("console.log")
    }

    fn boot(&self, tell: &mut impl FnMut(&str)) -> Result<Outcome> {
        let report = self.report();
        File::create(&report).context("making the report")?;
        let mut emulator = self.start()?;
        let started = Instant::now();
        let mut seen = 0;
        let mut is_up = false;
        loop {
            // Asked before reading, so that what it said last is read.
            let has_ended = emulator.0.try_wait().context("waiting")?.is_some();
            let text = fs::read(&report).context("reading the report")?;
            let text = String::from_utf8_lossy(&text).into_owned();
            // A line that is still being written is left for the next time.
            let whole = text.rfind('\n').map_or(0, |end| end + 1);
            let lines: Vec<&str> = text.get(..whole).unwrap_or_default().lines().collect();
            for line in lines.iter().skip(seen) {
                match line.trim_end() {
                    UP => is_up = true,
                    END => return Ok(Outcome::WasUp(Ok(()))),
                    line => tell(line),
                }
            }
            seen = lines.len();
            let reason = if has_ended {
                "died"
            } else if !is_up && started.elapsed() > BOOT {
                "did not boot in time"
            } else if started.elapsed() > self.timeout {
                "did not end in time"
            } else {
                std::thread::sleep(Duration::from_millis(200));
                continue;
            };
            return Ok(match is_up {
                true => Outcome::WasUp(Err(reason)),
                false => Outcome::NeverUp(reason),
            });
        }
    }

    fn start(&self) -> Result<Emulator> {
        let serial = |file: &Path| format!("file:{}", file.display());
        let options = format!(
            "console=ttyS0 quiet loglevel=4 panic=-1 tsc=reliable mitigations=off {}",
            self.kernel_options
        );
        let processor: String = std::iter::once("max".to_owned())
            .chain(self.without.iter().map(|feature| format!(",-{feature}")))
            .collect();
        // The two lines of a virtual machine without anything else.
        let child = Command::new("qemu-system-x86_64")
            .args(self.execution)
            .args(["-cpu", &processor, "-smp", "2"])
            .args(["-m", &self.memory_mib.to_string()])
            .args(["-nodefaults", "-no-reboot", "-display", "none"])
            .arg("-kernel")
            .arg(&self.image.vmlinuz)
            .arg("-initrd")
            .arg(self.initrd)
            .args(["-append", options.trim_end()])
            .args(["-serial", &serial(&self.console())])
            .args(["-serial", &serial(&self.report())])
            .stdin(Stdio::null())
            .spawn()
            .context("starting qemu-system-x86_64")?;
        Ok(Emulator(child))
    }
}

enum Outcome {
    /// The init never ran.
    NeverUp(&'static str),
    /// It did.
    WasUp(Ended),
}

/// An emulator that ends with its owner.
struct Emulator(Child);

impl Drop for Emulator {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
