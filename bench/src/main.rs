//! Measures Penstock beside what it replaces, in one run and in turns.
//!
//! Absolute times say something about this machine only; they are written down with its name.

mod bridge;
mod cluster;
mod cni;
mod contender;
mod control;
mod figures;
mod load;
mod machine;
mod outside;
mod packets;
mod plot;
mod pods;
mod programs;
mod report;
mod results;
mod services;
mod turns;

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use machine::{Machine, Quiet};
use results::Results;
use turns::Effort;

/// Measures Penstock beside what it replaces.
#[derive(Parser)]
struct Cli {
    /// Everything that there is, in many rounds: hours instead of minutes.
    #[arg(long)]
    full: bool,
    #[command(flatten)]
    turns: TurnArgs,
    /// Where results are written [default: bench/results].
    #[arg(long, value_name = "DIR", global = true)]
    results: Option<PathBuf>,
    /// What the files are called.
    #[arg(long, default_value = "latest", global = true)]
    name: String,
    #[command(subcommand)]
    command: Option<Command>,
}

/// How much is measured.
#[derive(Args)]
struct TurnArgs {
    /// How often each contender gets its turn [default: 7, or 15 with --full].
    #[arg(long, global = true, value_parser = rounds)]
    rounds: Option<usize>,
    /// How long a turn is [default: 300, or 2,000 with --full].
    #[arg(long, value_name = "MILLISECONDS", global = true)]
    turn_ms: Option<u64>,
    /// How long it goes on before, unmeasured [default: 100, or 500 with --full].
    #[arg(long, global = true, value_name = "MILLISECONDS")]
    warm_up_ms: Option<u64>,
    /// Only what has this in its name, such as "connect" or "one processor".
    #[arg(long, global = true, value_name = "TEXT")]
    only: Option<String>,
    /// Only contenders that have this in their names (may be repeated).
    #[arg(long = "contender", global = true, value_name = "TEXT")]
    contenders: Vec<String>,
}

#[derive(Subcommand)]
enum Command {
    /// From objects to map entries, in the agent's process and in this one: everything at once, then
    /// one endpoint at a time.
    Control {
        /// How many services there are, and how many endpoints each has.
        #[arg(long, value_delimiter = ',', default_values_t = control::Shape::ALL)]
        shapes: Vec<control::Shape>,
        /// How many single changes are measured.
        #[arg(long, default_value_t = 1_000)]
        changes: usize,
    },
    /// Pod to pod, on one node and on two.
    Pods,
    /// What CNI plugins take to give a pod its network, and to take it away.
    Cni {
        /// Calls in a turn.
        #[arg(long, default_value_t = 50)]
        calls: usize,
    },
    /// What each packet costs in each program, by itself.
    Programs,
    /// To a ClusterIP: Penstock's ways and kube-proxy's.
    Services {
        /// How many there are.
        #[arg(long, value_delimiter = ',', default_values_t = [1, 1_000])]
        services: Vec<usize>,
        /// Which ways; the first is what the others are compared with.
        #[arg(long, value_delimiter = ',', default_values_t = services::Way::ALL)]
        ways: Vec<services::Way>,
    },
    /// From clients outside to a node port: Penstock's ways and kube-proxy's.
    Outside {
        /// How many services there are.
        #[arg(long, default_value_t = 1)]
        services: usize,
        /// Which ways; the first is what the others are compared with.
        #[arg(long, value_delimiter = ',', default_values_t = outside::Way::ALL)]
        ways: Vec<outside::Way>,
    },
    /// What one processor forwards from clients outside to a backend on another node.
    Packets {
        /// How many services there are.
        #[arg(long, default_value_t = 1)]
        services: usize,
        /// How many flows take turns; a power of two.
        #[arg(long, default_value_t = 4_096, value_parser = load::power_of_two)]
        flows: u32,
        /// Which ways; the first is what the others are compared with.
        #[arg(long, value_delimiter = ',', default_values_t = packets::WAYS)]
        ways: Vec<outside::Way>,
    },
    /// Writes the report and the pictures of earlier runs anew, as if they had been one.
    Report {
        /// Their JSON.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    #[command(hide = true)]
    Load(load::Load),
}

fn rounds(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(rounds) if rounds >= figures::LEAST => Ok(rounds),
        _ => Err(format!(
            "has to be {} at least: less have no 95 % interval",
            figures::LEAST
        )),
    }
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    if let Some(Command::Load(load)) = &cli.command {
        return load::run(load);
    }
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
    let folder = cli.results.clone().unwrap_or(default);
    let results = match &cli.command {
        Some(Command::Report { files }) => Results::read_all(files)?,
        _ => measure(&cli, &folder)?,
    };
    for file in results.write(&folder, &cli.name)? {
        println!("{}", file.display());
    }
    Ok(())
}

fn measure(cli: &Cli, folder: &Path) -> Result<Results> {
    let (rounds, turn_ms, warm_up_ms) = if cli.full {
        (15, 2_000, 500)
    } else {
        (7, 300, 100)
    };
    let effort = Effort {
        rounds: cli.turns.rounds.unwrap_or(rounds),
        turn_ms: cli.turns.turn_ms.unwrap_or(turn_ms),
        warm_up_ms: cli.turns.warm_up_ms.unwrap_or(warm_up_ms),
        only: cli.turns.only.clone(),
        contenders: cli.turns.contenders.clone(),
    };
    let machine = Machine::look();
    machine.introduce();
    let mut results = Results::new(machine);
    let all = [
        Command::Control {
            shapes: control::Shape::ALL.to_vec(),
            changes: 1_000,
        },
        Command::Cni {
            calls: if cli.full { 200 } else { 50 },
        },
        Command::Pods,
        Command::Programs,
        Command::Services {
            services: if cli.full {
                vec![1, 1_000, 5_000, 10_000, 50_000]
            } else {
                vec![1, 1_000]
            },
            ways: services::Way::ALL.to_vec(),
        },
        Command::Outside {
            services: if cli.full { 1_000 } else { 1 },
            ways: outside::Way::ALL.to_vec(),
        },
        Command::Packets {
            services: if cli.full { 1_000 } else { 1 },
            flows: 4_096,
            ways: packets::WAYS.to_vec(),
        },
    ];
    let commands = match &cli.command {
        Some(command) => std::slice::from_ref(command),
        None => &all,
    };
    for command in commands {
        match command {
            Command::Control { shapes, changes } => {
                results.control = Some(control::measure(shapes, *changes)?);
            }
            Command::Pods => results.outcomes.extend(pods::measure(&effort)?),
            Command::Programs => results.programs = Some(programs::measure(&effort)?),
            Command::Cni { calls } => results.outcomes.extend(cni::measure(&effort, *calls)?),
            Command::Services { services, ways } => {
                let outcomes = services::measure(services, ways, &effort)?;
                results.outcomes.extend(outcomes);
            }
            Command::Outside { services, ways } => {
                let outcomes = outside::measure(*services, ways, &effort)?;
                results.outcomes.extend(outcomes);
            }
            Command::Packets {
                services,
                flows,
                ways,
            } => {
                let outcomes = packets::measure(*services, *flows, ways, &effort)?;
                results.outcomes.extend(outcomes);
            }
            Command::Report { .. } | Command::Load(_) => {}
        }
        results.machine.quiet.push(Quiet::watch());
        // What is measured stays, should the next comparison fail.
        results.write(folder, &cli.name)?;
    }
    for reason in results.machine.reservations() {
        println!("WARNING: {reason}");
    }
    Ok(results)
}
