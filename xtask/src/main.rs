//! `cargo xtask`: sets a machine up, builds, tests, lints and shows the project.
//!
//! Every command first makes sure that what it needs is there, and says what it installs.

mod bench_vm;
mod dist;
mod emulation;
mod kernels;
mod lint;
mod run;
mod setup;

use anyhow::Result;
use clap::{Parser, Subcommand};
use penstock_image::release;

use run::{cargo, in_root};

/// The project's own commands.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what building, testing and the demo need (Debian packages, bpf-linker).
    Setup,
    /// Build everything, the kernel programs included.
    Build {
        /// With optimisation, and what is to be shipped into target/dist.
        #[arg(long)]
        release: bool,
    },
    /// A container image of what is to be shipped, as target/dist/penstock-image.tar.
    Image {
        /// What it will be called where nodes find it: registry, name and tag.
        #[arg(long, default_value = release::NAME)]
        name: String,
    },
    /// Two nodes with pods and services on this machine, real traffic, and what to look at.
    Demo {
        /// Passed on to the demo.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// All tests; those that need root, a kernel feature or KUBEBUILDER_ASSETS say so.
    Test {
        /// Passed on to `cargo test`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// The end-to-end tests on other Linux kernels, emulated.
    Kernels {
        /// Which ones; all if none is named.
        versions: Vec<String>,
        /// Go on without kernels that can't be fetched.
        #[arg(long)]
        allow_missing: bool,
    },
    /// Format, clippy for the host and for the kernel side, dependency audit, house rules.
    Lint,
    /// The side-by-side benchmark: some minutes, or everything with `-- --full` (docs/benchmarks.md).
    Bench {
        /// Passed on to the benchmark.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// The same in an emulated machine whose kernel has IPVS (docs/benchmarks.md).
    BenchVm(bench_vm::Arguments),
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Setup => setup::all(),
        Command::Build { release } => {
            setup::all()?;
            if !release {
                return in_root(cargo("build").arg("--workspace"));
            }
            in_root(cargo("build").args(["--workspace", "--release"]))?;
            dist::collect().map(drop)
        }
        Command::Image { name } => {
            setup::all()?;
            dist::image(&name)
        }
        Command::Demo { arguments } => {
            prepare()?;
            binaries()?;
            in_root(
                cargo("run")
                    .args(["--quiet", "--release", "--package", "penstock-testbed"])
                    .args(["--bin", "penstock-demo", "--"])
                    .args(arguments),
            )
        }
        Command::Test { arguments } => {
            prepare()?;
            binaries()?;
            dist::plugin()?;
            // All that fails is worth knowing, once everything was built.
            let mut test = cargo("test");
            test.arg("--workspace");
            let mut options = arguments.iter().take_while(|argument| *argument != "--");
            if options.all(|argument| argument != "--no-fail-fast") {
                test.arg("--no-fail-fast");
            }
            in_root(test.args(arguments))
        }
        Command::Kernels {
            versions,
            allow_missing,
        } => {
            setup::all()?;
            setup::emulation()?;
            kernels::all(&versions, allow_missing)
        }
        Command::Lint => {
            setup::all()?;
            lint::all()
        }
        Command::Bench { arguments } => {
            prepare()?;
            setup::contenders()?;
            binaries()?;
            in_root(
                cargo("run")
                    .args(["--quiet", "--release", "--package", "penstock-bench", "--"])
                    .args(arguments),
            )
        }
        Command::BenchVm(arguments) => {
            setup::all()?;
            setup::emulation()?;
            setup::contenders()?;
            bench_vm::run(&arguments)
        }
    }
}

/// What running programs needs beyond building them.
fn prepare() -> Result<()> {
    setup::all()?;
    setup::bpffs()
}

/// The programs that tests, demo and benchmark start.
fn binaries() -> Result<()> {
    in_root(
        cargo("build")
            .args([
                "--release",
                "--package",
                "penstock-agent",
                "--package",
                "penstock-cni",
                "--package",
                "penstock-testbed",
            ])
            .arg("--bins"),
    )
}
