//! `penstock`: the agent and the operator's command line.

use std::process::ExitCode;

use penstock_agent::cli::{self, Cli};

fn main() -> ExitCode {
    let cli = Cli::read();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("penstock: starting the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(cli::run(cli));
    // A thread that waits for a file or a process must not keep this one from ending.
    runtime.shutdown_background();
    ended.unwrap_or_else(|error| {
        // One line: what failed, and each cause.
        eprintln!("penstock: {}", penstock_agent::words::chain(error.as_ref()));
        ExitCode::FAILURE
    })
}
