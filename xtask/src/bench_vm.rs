//! The benchmark in an emulated machine, for what this machine's kernel lacks: IPVS. All contenders run
//! there side by side, so that a comparison stays within one kernel.
//!
//! The machine's clock counts the instructions that its processors execute, one nanosecond each, and
//! stands still while the emulator waits. So a time is a number of instructions, whatever the emulator
//! takes for them and whoever else needs the real processors.

mod initrd;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{
    emulation::{
        self, Kernel,
        emulator::{BROKEN, Machine},
        output_of,
    },
    run::{cargo, in_root, root},
};

/// How long the machine has, in real time.
const TIMEOUT: Duration = Duration::from_secs(4 * 3_600);
/// What API servers, agents and the initrd need.
const MEMORY_MIB: u32 = 4_096;
/// One thread executes for all processors in turn, and the clock goes by what it executes.
const EXECUTION: &[&str] = &[
    "-accel",
    "tcg,thread=single",
    "-icount",
    "shift=0,sleep=off",
];
/// Without the latter two, kernels copy with loops of eight octets' moves. With them they copy by one
/// instruction, which would be counted, and take as long, as if it were one for each octet.
const WITHOUT: &[&str] = &[BROKEN, "erms", "fsrm"];
/// What is measured where nothing is said. What two processors win by working at the same time is not to
/// be seen in a machine that executes one after the other.
const DEFAULT: &[&str] = &[
    "services",
    "--services",
    "1,1000",
    "--only",
    "one processor",
    "--rounds",
    "7",
    "--turn-ms",
    "50",
    "--warm-up-ms",
    "10",
];
/// What of KUBEBUILDER_ASSETS is needed.
const ASSETS: &[&str] = &["etcd", "kube-apiserver", "kube-proxy", "kubectl"];

/// This workspace's packages and programs that take part.
const PROGRAMS: &[(&str, &str)] = &[
    ("penstock-agent", "penstock"),
    ("penstock-bench", "penstock-bench"),
    ("penstock-cni", "penstock-cni"),
    ("penstock-testbed", "penstock-traffic"),
];

/// How it is run.
#[derive(Args)]
pub struct Arguments {
    /// Debian's kernel: 6.1, 6.12 or newest.
    #[arg(long, default_value = "6.12")]
    kernel: String,
    /// What the files of results are called.
    #[arg(long, default_value = "vm")]
    name: String,
    /// With binaries that are not optimised: to try it, not for numbers.
    #[arg(long)]
    debug: bool,
    /// With the binaries as they were built before.
    #[arg(long)]
    no_build: bool,
    /// Passed on to the benchmark in the machine [default: services --services 1,1000 --only "one
    /// processor" --rounds 7 --turn-ms 50 --warm-up-ms 10].
    #[arg(last = true)]
    benchmark: Vec<String>,
}

/// What runs in the machine.
struct Binaries {
    /// Which of cargo's folders this workspace's are in.
    profile: &'static str,
    /// Kubernetes' own.
    assets: PathBuf,
}

impl Binaries {
    /// A program of this workspace's.
    fn path(&self, program: &str) -> PathBuf {
        root().join("target").join(self.profile).join(program)
    }
}

/// Builds this workspace's programs that take part.
fn build(is_debug: bool) -> Result<()> {
    let mut command = cargo("build");
    for (package, program) in PROGRAMS {
        command.args(["--package", package, "--bin", program]);
    }
    if !is_debug {
        command.arg("--release");
    }
    in_root(&mut command)
}

/// Runs the benchmark there, and writes its results among the others.
pub fn run(arguments: &Arguments) -> Result<()> {
    emulation::require_architecture()?;
    let assets = assets()?;
    let binaries = Binaries {
        profile: if arguments.debug { "debug" } else { "release" },
        assets,
    };
    if !arguments.no_build {
        build(arguments.debug)?;
    }
    let image = Kernel::named(&arguments.kernel)?
        .image()
        .with_context(|| format!("fetching Linux {}", arguments.kernel))?;
    let benchmark: Vec<&str> = match arguments.benchmark.as_slice() {
        [] => DEFAULT.to_vec(),
        given => given.iter().map(String::as_str).collect(),
    };
    let environment = [
        ("PENSTOCK_EMULATION", emulated()?),
        ("PENSTOCK_COMMIT", commit()),
    ];
    let initrd = initrd::build(&image, &binaries, &environment, &benchmark)
        .with_context(|| format!("an initrd for {}", image.release))?;
    let machine = Machine {
        image: &image,
        initrd: &initrd,
        memory_mib: MEMORY_MIB,
        execution: EXECUTION,
        without: WITHOUT,
        kernel_options: "",
        timeout: TIMEOUT,
    };
    println!("booting Linux {} in QEMU", image.release);
    let mut said = Said::default();
    let ended = machine.run(|line| said.take(line))?;
    let report = machine.report();
    if let Err(reason) = ended {
        bail!(
            "the machine {reason}; what it said is in {}",
            report.display()
        );
    }
    let results = said
        .results()
        .with_context(|| format!("what it said is in {}", report.display()))?;
    keep(&binaries, results, &arguments.name)
}

/// What the machine has said.
#[derive(Default)]
struct Said {
    /// How the benchmark ended.
    status: Option<String>,
    results: Option<String>,
}

impl Said {
    /// Takes a line; all but what is for this program is for who watches.
    fn take(&mut self, line: &str) {
        if let Some(status) = line.strip_prefix("@@status ") {
            self.status = Some(status.to_owned());
        } else if let Some(results) = line.strip_prefix("@@results ") {
            self.results = Some(results.to_owned());
        } else {
            println!("{line}");
        }
    }

    /// The results, if the benchmark came to its end.
    fn results(&self) -> Result<&str> {
        match (self.status.as_deref(), self.results.as_deref()) {
            (Some("0"), Some(results)) => Ok(results),
            (Some("0"), None) => bail!("the benchmark left no results"),
            (Some(status), _) => bail!("the benchmark ended with {status}"),
            (None, _) => bail!("the benchmark did not run"),
        }
    }
}

/// Has the benchmark write its report and pictures where other results are.
fn keep(binaries: &Binaries, results: &str, name: &str) -> Result<()> {
    let file = tempfile::NamedTempFile::new().context("making a file")?;
    fs::write(file.path(), results).context("writing results")?;
    in_root(
        Command::new(binaries.path("penstock-bench"))
            .arg("report")
            .arg(file.path())
            .args(["--name", name]),
    )
}

/// Where Kubernetes' programs are.
fn assets() -> Result<PathBuf> {
    let assets = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    let assets = assets.context("KUBEBUILDER_ASSETS, a folder with kube-proxy, is not set")?;
    for program in ASSETS {
        let path = assets.join(program);
        anyhow::ensure!(path.exists(), "{} is not there", path.display());
    }
    Ok(assets)
}

/// The emulator in the words of a report.
fn emulated() -> Result<String> {
    let text = output_of(Command::new("qemu-system-x86_64").arg("--version"))?;
    let version = version(&text).with_context(|| format!("{text:?} is no version"))?;
    Ok(format!(
        "QEMU {version}, whose clock counts instructions, 1 ns each"
    ))
}

/// The version in QEMU's first line.
fn version(text: &str) -> Option<&str> {
    text.lines()
        .next()?
        .strip_prefix("QEMU emulator version ")?
        .split(' ')
        .next()
}

/// The commit that is measured, as git calls it.
fn commit() -> String {
    let described = output_of(
        Command::new("git")
            .arg("-C")
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")))
            .args(["describe", "--always", "--dirty"]),
    );
    described.map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_count_only_if_the_benchmark_came_to_its_end() {
        let mut said = Said::default();
        assert!(said.results().is_err());
        said.take("@@results {\"outcomes\":[]}");
        assert!(said.results().is_err());
        said.take("@@status 1");
        assert!(said.results().is_err());
        said.take("@@status 0");
        assert_eq!(said.results().unwrap(), "{\"outcomes\":[]}");
    }

    #[test]
    fn the_emulator_names_its_version() {
        let text = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright (c) 2003-2022\n";
        assert_eq!(version(text), Some("7.2.22"));
        assert_eq!(version("qemu: not found"), None);
    }

    #[test]
    fn the_help_names_what_is_measured_by_default() {
        use clap::CommandFactory;

        #[derive(clap::Parser)]
        struct Cli {
            #[command(flatten)]
            arguments: Arguments,
        }
        let help = Cli::command().render_long_help().to_string();
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        let default = DEFAULT
            .join(" ")
            .replace("one processor", "\"one processor\"");
        assert!(help.contains(&default), "{help}");
    }
}
