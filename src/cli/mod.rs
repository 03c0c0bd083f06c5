//! Arguments, progress, output; talks only to the local API.

mod args;
pub mod certs;
mod client;
mod commands;
mod exit_code;
mod limit;
mod pick;
mod recover;
mod show;
mod vms;
mod watch;

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;

use crate::agent::StartMode;
use args::{Arguments, Command};
use exit_code::EXIT_USAGE;

/// Runs the command line, and says what went wrong with all its causes.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(e) => {
            let _ = e.print();
            return if e.use_stderr() { EXIT_USAGE.into() } else { ExitCode::SUCCESS };
        }
    };
    match run(arguments) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("vmferry: {e:#}");
            EXIT_USAGE.into()
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    if let Command::Certs(certs) = arguments.command {
        return certs::run(certs);
    }
    let is_agent = matches!(arguments.command, Command::Agent { .. });
    let runtime = match is_agent {
        true => tokio::runtime::Builder::new_multi_thread().enable_all().build()?,
        false => tokio::runtime::Builder::new_current_thread().enable_all().build()?,
    };
    let code = runtime.block_on(async move {
        match arguments.command {
            Command::Agent { handoff_formats: true, .. } => {
                println!("{}", crate::agent::handoff_formats()?);
                Ok(ExitCode::SUCCESS)
            }
            Command::Agent { config, take_over, .. } => {
                log_to_stderr();
                let mode = if take_over { StartMode::TakeOver } else { StartMode::Alone };
                Ok(agent(&config, mode).await)
            }
            command => commands::run(&arguments.socket, command).await,
        }
    });
    // Nothing that still blocks a thread may keep the process.
    runtime.shutdown_background();
    code
}

async fn agent(config: &Path, mode: StartMode) -> ExitCode {
    match crate::agent::run(config, mode).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let code = e.exit_code();
            eprintln!("vmferry: {:#}", anyhow::Error::from(e));
            code.into()
        }
    }
}

/// Human lines on a terminal and in the journal; `VMFERRY_LOG` filters as `RUST_LOG` does.
fn log_to_stderr() {
    use std::io::IsTerminal;
    let filter = tracing_subscriber::EnvFilter::try_from_env("VMFERRY_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let lines = lines.with_ansi(std::io::stderr().is_terminal()).with_target(false);
    // The journal stamps its lines itself.
    let started = match std::env::var_os("JOURNAL_STREAM") {
        Some(_) => lines.without_time().try_init(),
        None => lines.try_init(),
    };
    if let Err(e) = started {
        eprintln!("vmferry: no log: {e}");
    }
}
