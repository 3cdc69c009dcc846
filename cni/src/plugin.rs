//! The program: a request in, an answer on standard output, an exit code. The only place where
//! anything is printed.

use std::{
    io::{Read, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
};

use serde_json::Value;

use crate::{
    command,
    error::Failure,
    request::{Request, Variables},
    version::Version,
};

/// More than any configuration: a result of a thousand interfaces is not half of it.
const INPUT_LIMIT: u64 = 16 << 20;

/// Runs the plugin.
pub fn main() -> ExitCode {
    let mut input = Vec::new();
    let read = std::io::stdin()
        .lock()
        .take(INPUT_LIMIT)
        .read_to_end(&mut input);
    let result = match read {
        Ok(_) => answer(&|variable| std::env::var_os(variable), &input),
        Err(error) => Err(Failure::io("reading standard input")(error)),
    };
    let (output, code) = match result {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(result)) => (result, ExitCode::SUCCESS),
        Err(failure) => (failure.to_json(version(&input)), ExitCode::FAILURE),
    };
    // In one piece: each line of its own would be a write of its own. Nobody is left to tell that
    // nobody listens.
    let text = format!("{output:#}\n");
    let written = std::io::stdout().lock().write_all(text.as_bytes());
    if written.is_err() {
        ExitCode::FAILURE
    } else {
        code
    }
}

/// The version in which an error is told.
fn version(input: &[u8]) -> Version {
    let config: Result<Value, _> = serde_json::from_slice(input);
    let version = config
        .ok()
        .and_then(|config| Version::of_config(&config).ok());
    version.unwrap_or(Version::LATEST)
}

/// What is printed, if anything.
fn answer(variables: Variables, input: &[u8]) -> Result<Option<Value>, Failure> {
    let work = || {
        let request = Request::parse(variables, input)?;
        // One thread: all waiting is for the kernel and the agent, and starting it costs nothing.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Failure::io("starting"))?;
        runtime.block_on(command::run(request))
    };
    guard(work)
}

/// Makes a panic a failure like others: whoever called has to be told in JSON.
fn guard<T>(work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let message = match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
            (Some(message), _) => (*message).to_owned(),
            (_, Some(message)) => message.clone(),
            _ => "a panic without a message".to_owned(),
        };
        Err(Failure::Internal(message))
    })
}

#[cfg(test)]
#[allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_object() {
        let number = 7;
        for panic in [
            guard::<()>(|| panic!("static")),
            guard(|| panic!("number {number}")),
        ] {
            let error = panic.unwrap_err().to_json(Version::LATEST);
            assert_eq!(error["code"], 105);
            let details = error["details"].as_str().unwrap();
            assert!(
                details.contains("static") || details.contains("number 7"),
                "{details}"
            );
        }
    }
}
