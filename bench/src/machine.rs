//! What the numbers are from: the machine, its programs, and whether anything else ran.

use std::{
    collections::HashSet,
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
    /// The part that programs used which this one has started and which are neither measured nor make the load: API
    /// servers, and agents and kube-proxies that have nothing to do.
    #[serde(default)]
    pub background: f64,
    /// The part of all processors that the machine's own host took away.
    #[serde(default)]
    pub stolen: f64,
    /// The load average of the last minute, this program's own work included.
    pub load: f64,
}

impl Quiet {
    /// Watches the processors for a moment.
    pub fn watch() -> Self {
        let watch = Watch::begin(NOBODY);
        std::thread::sleep(WATCHED);
        watch.end()
    }

    /// The part of all processors that whatever programs used beside what was measured.
    pub fn disturbed(self) -> f64 {
        self.busy + self.background
    }

    /// All that was not there for what was measured.
    pub fn in_all(self) -> f64 {
        self.disturbed() + self.stolen
    }

    /// The same without this program's own background, where that is what goes on.
    #[must_use]
    pub const fn of_others(self) -> Self {
        Self {
            background: 0.0,
            ..self
        }
    }

    /// Whether nothing else ran.
    pub fn is_idle(self) -> bool {
        self.disturbed() <= IDLE && self.stolen <= IDLE
    }

    /// In words.
    pub fn shown(self) -> String {
        let busy = format!(
            "other programs used {:.0} % of the processors",
            self.busy * 100.0
        );
        let mut all = vec![busy];
        if self.background >= 0.005 {
            let background = self.background * 100.0;
            all.push(format!(
                "the benchmark's own in the background {background:.0} %"
            ));
        }
        if self.stolen > IDLE {
            let stolen = self.stolen * 100.0;
            all.push(format!("the machine's host took {stolen:.0} %"));
        }
        all.join(", ")
    }
}

/// From when on others are watched.
pub struct Watch {
    begun: Instant,
    measured: &'static [&'static str],
    used: Used,
    stolen: (f64, f64),
}

/// Where no program of its own is measured, but what the kernel does.
pub const NOBODY: &[&str] = &[];

impl Watch {
    /// From now on. From the first time on, children whose parent has ended become this process's, so that it
    /// knows them for its own. Programs of these names are measured.
    pub fn begin(measured: &'static [&'static str]) -> Self {
        // Without it some of our own work is taken for others', which errs on the safe side.
        let _ = nix::sys::prctl::set_child_subreaper(true);
        Self {
            begun: Instant::now(),
            measured,
            used: used(measured),
            stolen: stolen_and_all(),
        }
    }

    /// What others did since.
    pub fn end(&self) -> Quiet {
        let used = used(self.measured);
        let since = |now: u64, then: u64| now.saturating_sub(then) as f64 / TICKS;
        let others = since(used.by_others, self.used.by_others);
        let background = since(used.in_background, self.used.in_background);
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let seconds = self.begun.elapsed().as_secs_f64() * processors as f64;
        let after = stolen_and_all();
        let (stolen, all) = (after.0 - self.stolen.0, after.1 - self.stolen.1);
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let first = load.split(' ').next();
        Quiet {
            busy: others / seconds,
            background: background / seconds,
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
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    pid: u32,
    parent: u32,
    name: String,
    is_kernels: bool,
    /// Ticks of its own, and of its children that have ended.
    ticks: u64,
}

/// Threads of the kernel's (PF_KTHREAD, linux/sched.h).
const KERNEL_THREAD: u64 = 0x0020_0000;

fn seen(stat: &str) -> Option<Seen> {
    let pid = stat.split(' ').next()?.parse().ok()?;
    // The name may hold anything, but ends with the last parenthesis; the state is next.
    let (begin, rest) = stat.rsplit_once(')')?;
    let (_, name) = begin.split_once('(')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some(Seen {
        pid,
        parent: number(1)? as u32,
        name: name.to_owned(),
        is_kernels: number(6)? & KERNEL_THREAD != 0,
        ticks: number(11)? + number(12)? + number(13)? + number(14)?,
    })
}

/// Ticks that programs have used beside the load and what is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Used {
    by_others: u64,
    in_background: u64,
}

/// What programs have used so far. Ticks of one that has ended are its parent's, so that sums only grow. What the
/// kernel does by threads of its own is left out: much of it is ours, and what isn't comes with programs that are seen.
fn used(measured: &[&str]) -> Used {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let all: Vec<Seen> = entries
        .filter(|entry| {
            let name = entry.file_name();
            name.as_encoded_bytes().iter().all(u8::is_ascii_digit)
        })
        .filter_map(|entry| seen(&fs::read_to_string(entry.path().join("stat")).ok()?))
        .collect();
    used_of(&all, std::process::id(), measured)
}

fn used_of(all: &[Seen], own: u32, measured: &[&str]) -> Used {
    let ours = with_descendants(all, HashSet::from([own]));
    // This program itself waits while others take turns, and its children that make the load bear its name.
    let own_name = all.iter().find(|one| one.pid == own);
    let is_load = |one: &&Seen| {
        let is_ours = own_name.is_some_and(|own| own.name == one.name);
        ours.contains(&one.pid) && (is_ours || measured.contains(&one.name.as_str()))
    };
    let load: HashSet<u32> = all.iter().filter(is_load).map(|one| one.pid).collect();
    // Who makes the load may have it made by others, but this program has started everything.
    let mut makers = with_descendants(
        all,
        load.iter().copied().filter(|pid| *pid != own).collect(),
    );
    makers.insert(own);
    let ticks = |wanted: &dyn Fn(&Seen) -> bool| -> u64 {
        let programs = all.iter().filter(|one| !one.is_kernels && wanted(one));
        programs.map(|one| one.ticks).sum()
    };
    Used {
        by_others: ticks(&|one| !ours.contains(&one.pid)),
        in_background: ticks(&|one| ours.contains(&one.pid) && !makers.contains(&one.pid)),
    }
}

/// These, and whom they have started.
fn with_descendants(all: &[Seen], mut these: HashSet<u32>) -> HashSet<u32> {
    loop {
        let before = these.len();
        let children = all.iter().filter(|one| these.contains(&one.parent));
        let children: Vec<u32> = children.map(|one| one.pid).collect();
        these.extend(children);
        if these.len() == before {
            return these;
        }
    }
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

    /// What results have to have in common to be one's: kernel, processors, memory, whether it is emulated, what was
    /// measured and what it was compared with.
    pub fn identity(&self) -> String {
        let emulated = if self.emulation.is_some() {
            ", emulated"
        } else {
            ""
        };
        let [kube_proxy, iptables] = ["kube-proxy", "iptables' backend"]
            .map(|program| self.version(program).unwrap_or("none"));
        format!(
            "Linux {} on {} x {}, {} MiB{emulated}, Penstock {}, kube-proxy {kube_proxy}, iptables {iptables}",
            self.kernel,
            self.processors,
            self.processor,
            self.memory_mib,
            self.version("penstock").unwrap_or("unknown"),
        )
    }

    /// A compared program's version.
    pub fn version(&self, program: &str) -> Option<&str> {
        let mut programs = self.programs.iter();
        let found = programs.find(|(name, _)| name == program);
        found.map(|(_, version)| version.as_str())
    }

    /// Notes something else that was found here.
    pub fn found(&mut self, what: &str, is: String) {
        let found = (what.to_owned(), is);
        if !self.programs.contains(&found) {
            self.programs.push(found);
        }
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
        if let Some(loudest) = loud.max_by(|a, b| a.in_all().total_cmp(&b.in_all())) {
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

    /// A program as /proc has it, which has used so much and 31 more.
    fn program(pid: u32, parent: u32, name: &str, used: u64) -> Seen {
        let flags = 4_194_560;
        let stat = format!(
            "{pid} ({name}) S {parent} 7 7 0 -1 {flags} 9 0 0 0 {used} 1 10 20 20 0 1 0 5 6 7"
        );
        seen(&stat).unwrap()
    }

    #[test]
    fn who_is_neither_load_nor_measured_disturbs() {
        let mut all = vec![
            program(1, 0, "init", 100),
            program(2, 0, "kthreadd", 5_000),
            program(10, 1, "penstock-bench", 7_000),
            // A child that is listed before its parent.
            program(11, 12, "iperf3", 9_000),
            program(12, 10, "penstock-bench", 9_000),
            program(13, 1, "a b) c", 40),
            program(14, 10, "kube-apiserver", 300),
            program(15, 14, "etcd", 30),
            program(16, 10, "penstock", 3),
        ];
        all[1].is_kernels = true;
        let used = |measured| used_of(&all, 10, measured);
        let by_others = 131 + 71;
        let in_background = 331 + 61;
        assert_eq!(
            used(NOBODY),
            Used {
                by_others,
                in_background: in_background + 34
            }
        );
        assert_eq!(
            used(&["penstock"]),
            Used {
                by_others,
                in_background
            }
        );
    }

    #[test]
    fn own_background_makes_a_trial_provisional() {
        let quiet = Quiet {
            busy: 0.03,
            background: 0.03,
            stolen: 0.0,
            load: 1.0,
        };
        assert!(!quiet.is_idle());
        assert!(
            quiet.shown().contains("in the background 3 %"),
            "{}",
            quiet.shown()
        );
        assert!(quiet.of_others().is_idle());
    }

    #[test]
    fn threads_of_the_kernels_are_told_from_programs() {
        let stat =
            |flags: u64| format!("2 (kthreadd) S 0 7 7 0 -1 {flags} 9 0 0 0 1 1 1 2 20 0 1 0 5");
        assert!(seen(&stat(0x0020_8040)).unwrap().is_kernels);
        assert!(!seen(&stat(4_194_560)).unwrap().is_kernels);
    }

    #[test]
    fn ticks_are_the_fourteenth_and_fifteenth_field() {
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194560 9 0 0 0 123 45 0 0 20 0 1 0 5 6 7";
        assert_eq!(ticks(stat), Some(168));
        assert_eq!(ticks("7 (a"), None);
    }
}
