//! What the numbers are from: the machine, its programs, and whether anything else ran.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant, SystemTime},
};

use serde::{Deserialize, Serialize};

/// A machine on which others use this much of the processors is not idle.
const IDLE: f64 = 0.05;
/// Says how this machine is emulated, by whoever made it.
const EMULATION: &str = "PENSTOCK_EMULATION";
/// Says which commit was built, where there is no git to say so.
const COMMIT: &str = "PENSTOCK_COMMIT";
/// How long the processors are watched.
const WATCHED: Duration = Duration::from_secs(1);

/// Where and when something was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Machine {
    /// Seconds since 1970.
    pub time: u64,
    /// Its kernel's release.
    pub kernel: String,
    /// Its processors' model.
    pub processor: String,
    /// How many they are.
    pub processors: usize,
    /// Its memory in MiB.
    pub memory_mib: u64,
    /// Whether it is a virtual one.
    pub is_virtual: bool,
    /// How it is emulated, if it is: then times are not any machine's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub emulation: Option<String>,
    /// The programs that were compared, and their versions.
    pub programs: Vec<(String, String)>,
    /// Whether Penstock was built with optimisation.
    pub is_release: bool,
    /// What else ran, before anything was measured and during what is no trial.
    pub quiet: Vec<Quiet>,
}

/// How quiet the machine was.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quiet {
    /// The part of all processors that programs used which this one has not started.
    pub busy: f64,
    /// The part of all processors that the machine's own host took away.
    #[serde(default)]
    pub stolen: f64,
    /// The load average of the last minute, this program's own work included.
    pub load: f64,
}

impl Quiet {
    /// Watches the processors for a moment.
    pub fn watch() -> Self {
        let watch = Watch::begin();
        std::thread::sleep(WATCHED);
        watch.end()
    }

    /// Whether nothing else ran.
    pub fn is_idle(self) -> bool {
        self.busy <= IDLE && self.stolen <= IDLE
    }

    /// In words.
    pub fn shown(self) -> String {
        let busy = format!(
            "other programs used {:.0} % of the processors",
            self.busy * 100.0
        );
        if self.stolen <= IDLE {
            return busy;
        }
        format!(
            "{busy}, the machine's host took {:.0} %",
            self.stolen * 100.0
        )
    }
}

/// From when on others are watched.
pub struct Watch {
    begun: Instant,
    others: u64,
    stolen: (f64, f64),
}

impl Watch {
    /// From now on. From the first time on, children whose parent has ended become this process's, so that it
    /// knows them for its own.
    pub fn begin() -> Self {
        // Without it some of our own work is taken for others', which errs on the safe side.
        let _ = nix::sys::prctl::set_child_subreaper(true);
        Self {
            begun: Instant::now(),
            others: used_by_others(),
            stolen: stolen_and_all(),
        }
    }

    /// What others did since.
    pub fn end(&self) -> Quiet {
        let used = used_by_others().saturating_sub(self.others) as f64 / TICKS;
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let seconds = self.begun.elapsed().as_secs_f64() * processors as f64;
        let after = stolen_and_all();
        let (stolen, all) = (after.0 - self.stolen.0, after.1 - self.stolen.1);
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let first = load.split(' ').next();
        Quiet {
            busy: used / seconds,
            stolen: if all > 0.0 { stolen / all } else { 0.0 },
            load: first.and_then(|one| one.parse().ok()).unwrap_or_default(),
        }
    }
}

/// What the machine's host took of the processors' time so far, and all of it.
fn stolen_and_all() -> (f64, f64) {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = text.lines().next().unwrap_or_default();
    let times: Vec<f64> = line
        .split_whitespace()
        .skip(1)
        // Guests' time is in user time already.
        .take(8)
        .filter_map(|time| time.parse().ok())
        .collect();
    (
        times.get(7).copied().unwrap_or_default(),
        times.iter().sum(),
    )
}

/// A process, in /proc/PID/stat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    pid: u32,
    parent: u32,
    is_kernels: bool,
    /// Ticks of its own, and of its children that have ended.
    ticks: u64,
}

/// Threads of the kernel's (PF_KTHREAD, linux/sched.h).
const KERNEL_THREAD: u64 = 0x0020_0000;

fn seen(stat: &str) -> Option<Seen> {
    let pid = stat.split(' ').next()?.parse().ok()?;
    // The name may hold anything, but ends with the last parenthesis; the state is next.
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some(Seen {
        pid,
        parent: number(1)? as u32,
        is_kernels: number(6)? & KERNEL_THREAD != 0,
        ticks: number(11)? + number(12)? + number(13)? + number(14)?,
    })
}

/// Ticks that all programs have used but this one and whom it has started. Those of one that has ended are its
/// parent's, so that the sum only grows. What the kernel does by threads of its own is left out: much of it
/// is ours, and what isn't comes with programs that are seen.
fn used_by_others() -> u64 {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let all: Vec<Seen> = entries
        .filter(|entry| {
            let name = entry.file_name();
            name.as_encoded_bytes().iter().all(u8::is_ascii_digit)
        })
        .filter_map(|entry| seen(&fs::read_to_string(entry.path().join("stat")).ok()?))
        .collect();
    others(&all, std::process::id())
}

fn others(all: &[Seen], own: u32) -> u64 {
    let mut ours = std::collections::HashSet::from([own]);
    loop {
        let before = ours.len();
        let children = all.iter().filter(|one| ours.contains(&one.parent));
        let children: Vec<u32> = children.map(|one| one.pid).collect();
        ours.extend(children);
        if ours.len() == before {
            break;
        }
    }
    let others = all
        .iter()
        .filter(|one| !one.is_kernels && !ours.contains(&one.pid));
    others.map(|one| one.ticks).sum()
}

impl Machine {
    /// This one, now.
    pub fn look() -> Self {
        let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let models: Vec<&str> = processors
            .lines()
            .filter_map(|line| line.strip_prefix("model name"))
            .map(|rest| rest.trim_start_matches(['\t', ':', ' ']))
            .collect();
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let memory = memory.lines().find_map(|line| kib(line, "MemTotal"));
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let flags = processors.lines().find(|line| line.starts_with("flags"));
        Self {
            time: since.map_or(0, |since| since.as_secs()),
            kernel: kernel.trim().to_owned(),
            processor: models.first().copied().unwrap_or("unknown").to_owned(),
            processors: models.len(),
            memory_mib: memory.unwrap_or_default() / 1_024,
            is_virtual: flags.is_some_and(|flags| flags.split(' ').any(|one| one == "hypervisor")),
            emulation: std::env::var(EMULATION).ok(),
            programs: programs(),
            is_release: penstock_testbed::binary("penstock")
                .is_ok_and(|path| path.components().any(|part| part.as_os_str() == "release")),
            quiet: vec![Quiet::watch()],
        }
    }

    /// What results have to have in common to be one's: kernel, processor, whether it is emulated, and what
    /// was measured.
    pub fn identity(&self) -> String {
        let penstock = self.programs.iter().find(|(name, _)| name == "penstock");
        format!(
            "Linux {} on {}{}, Penstock {}",
            self.kernel,
            self.processor,
            if self.emulation.is_some() {
                ", emulated"
            } else {
                ""
            },
            penstock.map_or("unknown", |(_, version)| version),
        )
    }

    /// Says what it is, and what is wrong with measuring on it.
    pub fn introduce(&self) {
        println!("{}", self.line());
        for (program, version) in &self.programs {
            println!("  {program}: {version}");
        }
        for reason in self.reservations() {
            println!("WARNING: {reason}");
        }
    }

    /// In a line.
    pub fn line(&self) -> String {
        let kind = match (&self.emulation, self.is_virtual) {
            (Some(how), _) => format!(", an emulated machine ({how})"),
            (None, true) => ", a virtual machine".to_owned(),
            (None, false) => String::new(),
        };
        format!(
            "Linux {} on {} x {}, {} MiB{kind}",
            self.kernel, self.processors, self.processor, self.memory_mib
        )
    }

    /// Why the numbers should not be relied upon.
    pub fn reservations(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        let loud = self.quiet.iter().filter(|quiet| !quiet.is_idle());
        if let Some(loudest) =
            loud.max_by(|a, b| (a.busy + a.stolen).total_cmp(&(b.busy + b.stolen)))
        {
            reasons.push(format!(
                "the machine was not idle: {}; these numbers are provisional",
                loudest.shown()
            ));
        }
        if !self.is_release {
            reasons.push("Penstock was built without optimisation".to_owned());
        }
        if self.emulation.is_some() {
            reasons.push(
                "the machine is emulated: times are no machine's, and ratios are of what is done, not of \
                 how fast a processor does it"
                    .to_owned(),
            );
        }
        if self.processors < 3 {
            reasons.push(format!(
                "{} processors: client and server share them with everything else",
                self.processors
            ));
        }
        reasons
    }
}

/// Each compared program's own word for its version; those that aren't there are left out.
fn programs() -> Vec<(String, String)> {
    let mut found = vec![(
        "penstock".to_owned(),
        format!("{}{}", env!("CARGO_PKG_VERSION"), commit()),
    )];
    let packages = [
        ("containernetworking-plugins", None),
        ("iptables", Some("iptables")),
        ("nftables", Some("nft")),
        ("ipset", Some("ipset")),
        ("wrk", None),
        ("iperf3", None),
    ];
    for (package, program) in packages {
        let query = ["-W", "-f", "${Version}", package];
        let version = said("dpkg-query", &query);
        // Where nothing knows of packages.
        let version = version.or_else(|| said(program?, &["--version"]));
        if let Some(version) = version {
            found.push((package.to_owned(), version));
        }
    }
    // Debian's package has both; which of them writes rules is an alternative's choice.
    if let Some(backend) = said("iptables", &["-V"]) {
        found.push(("iptables' backend".to_owned(), backend));
    }
    let proxy = crate::services::program::find();
    if let Some(version) = proxy.and_then(|proxy| said(proxy, &["--version"])) {
        found.push(("kube-proxy".to_owned(), version));
    }
    let kernel = fs::read_to_string("/proc/sys/kernel/version").unwrap_or_default();
    found.push(("kernel".to_owned(), kernel.trim().to_owned()));
    found
}

fn commit() -> String {
    if let Ok(commit) = std::env::var(COMMIT) {
        return format!(" ({commit})");
    }
    let folder = env!("CARGO_MANIFEST_DIR");
    let described = said("git", &["-C", folder, "describe", "--always", "--dirty"]);
    described.map_or_else(String::new, |commit| format!(" ({commit})"))
}

/// The first line that a program prints.
pub fn said(program: impl AsRef<std::ffi::OsStr>, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let line = text.lines().next()?.trim();
    (output.status.success() && !line.is_empty()).then(|| line.to_owned())
}

/// A line of a file of /proc that is about that.
fn kib(line: &str, field: &str) -> Option<u64> {
    let value = line.strip_prefix(field)?.strip_prefix(':')?;
    value.split_whitespace().next()?.parse().ok()
}

/// A line of a process's /proc status in MiB.
pub fn memory(pid: u32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let value = status.lines().find_map(|line| kib(line, field));
    value.unwrap_or_default() / 1_024
}

/// The processor time that a process has used, in seconds.
pub fn processor_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    ticks(&stat).unwrap_or_default() as f64 / TICKS
}

/// Clock ticks in a second, as /proc counts them (USER_HZ, which is the same everywhere that we run).
const TICKS: f64 = 100.0;

/// Ticks in user space and in the kernel, in /proc/PID/stat.
fn ticks(stat: &str) -> Option<u64> {
    // The name may hold anything, but ends with the last parenthesis; the state is next.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut times = rest.split_whitespace().skip(11).map(str::parse::<u64>);
    Some(times.next()?.ok()? + times.next()?.ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_program_starts_is_not_others() {
        let stat = |pid, parent, flags, used| {
            format!(
                "{pid} (a b) c) S {parent} 7 7 0 -1 {flags} 9 0 0 0 {used} 1 10 20 20 0 1 0 5 6 7"
            )
        };
        let all = [
            stat(1, 0, 4_194_560, 100),
            stat(2, 0, 0x0020_8040, 5_000),
            stat(10, 1, 4_194_560, 7_000),
            // A child that is listed before its parent.
            stat(11, 12, 4_194_560, 9_000),
            stat(12, 10, 4_194_560, 9_000),
            stat(13, 1, 4_194_560, 40),
        ];
        let all: Vec<Seen> = all.iter().filter_map(|stat| seen(stat)).collect();
        assert_eq!(all.len(), 6);
        assert_eq!(others(&all, 10), 131 + 71);
    }

    #[test]
    fn ticks_are_the_fourteenth_and_fifteenth_field() {
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194560 9 0 0 0 123 45 0 0 20 0 1 0 5 6 7";
        assert_eq!(ticks(stat), Some(168));
        assert_eq!(ticks("7 (a"), None);
    }
}
