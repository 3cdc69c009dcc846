//! Measures side by side, in one run, and prints ratios with their spread.
//!
//! Absolute times say something about this machine only; they are printed with its name.

mod cluster;
mod control;
mod data;
mod figures;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use serde_json::json;

/// Measures Penstock on this machine.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Connect, ask and close: through a ClusterIP beside the pod's own address.
    Data {
        /// How many services there are.
        #[arg(long, value_delimiter = ',', default_values_t = [1, 100_000])]
        services: Vec<usize>,
        /// How often each contender gets its turn.
        #[arg(long, default_value_t = 15)]
        rounds: usize,
    },
    /// From objects to map entries, in the agent's process and in this one: everything at once, then
    /// one endpoint at a time.
    Control {
        /// How many services there are.
        #[arg(long, default_value_t = 5_000)]
        services: usize,
        /// How many endpoints each has.
        #[arg(long, default_value_t = 50)]
        endpoints: usize,
        /// How many single changes are measured.
        #[arg(long, default_value_t = 1_000)]
        changes: usize,
    },
}

fn main() -> Result<()> {
    let machine = figures::machine();
    println!("{machine}");
    let mut results = json!({ "machine": machine });
    let commands = match Cli::parse().command {
        Some(command) => vec![command],
        None => vec![
            Command::Control {
                services: 5_000,
                endpoints: 50,
                changes: 1_000,
            },
            Command::Data {
                services: vec![1, 100_000],
                rounds: 15,
            },
        ],
    };
    for command in commands {
        let (name, result) = match command {
            Command::Data { services, rounds } => ("data", data::measure(&services, rounds)?),
            Command::Control {
                services,
                endpoints,
                changes,
            } => ("control", control::measure(services, endpoints, changes)?),
        };
        if let Some(results) = results.as_object_mut() {
            results.insert(name.to_owned(), result);
        }
    }
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
    std::fs::create_dir_all(&folder).context("making bench/results")?;
    let path = folder.join("latest.json");
    let text = serde_json::to_string_pretty(&results).context("writing JSON")?;
    std::fs::write(&path, text + "\n").with_context(|| format!("writing {}", path.display()))?;
    println!("raw data: {}", path.display());
    Ok(())
}
