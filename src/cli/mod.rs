//! Arguments, progress, output; talks only to the local API.

#[macro_use]
mod out;

mod args;
mod audit;
pub mod certs;
mod client;
mod commands;
mod complete;
mod doctor;
mod drain;
mod exit_code;
mod forward;
mod guest;
mod join;
mod libvirt;
mod limit;
mod manual;
mod pick;
mod ping;
mod plan;
mod progress;
mod qemu_command;
mod recover;
mod replicate;
mod report;
mod show;
mod vms;
mod watch;

use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use clap_complete::CompleteEnv;

use crate::agent::{Early, StartMode};
use args::{Arguments, Command};
use exit_code::EXIT_USAGE;

/// Runs the command line, and says what went wrong with all its causes.
pub fn main() -> ExitCode {
    // A shell that asks what could come next.
    let completions = CompleteEnv::with_factory(Arguments::command).var(complete::VARIABLE);
    match completions.try_complete(std::env::args_os(), std::env::current_dir().ok().as_deref()) {
        Ok(false) => {}
        Ok(true) => return ExitCode::SUCCESS,
        Err(_) => return EXIT_USAGE.into(),
    }
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
    match arguments.command {
        Command::Certs(certs) => return certs::run(certs),
        Command::Join(ticket) => return join::run(ticket),
        Command::Guest(command) => return guest::run(command).map(|()| ExitCode::SUCCESS),
        Command::Manual { folder } => return manual::write(&folder).map(|()| ExitCode::SUCCESS),
        _ => {}
    }
    if let Command::Agent { config, check_config: true, .. } = &arguments.command {
        println!("{}", crate::agent::check_config(config)?);
        return Ok(ExitCode::SUCCESS);
    }
    let is_agent = matches!(arguments.command, Command::Agent { .. });
    // Before there is a second thread, which would be left out.
    let early = match &arguments.command {
        Command::Agent { config, handoff_formats: false, .. } => {
            crate::log::start();
            Some(crate::agent::confine(config))
        }
        _ => None,
    };
    let runtime = match is_agent {
        true => tokio::runtime::Builder::new_multi_thread().enable_all().build()?,
        false => tokio::runtime::Builder::new_current_thread().enable_all().build()?,
    };
    let code = runtime.block_on(async move {
        match arguments.command {
            Command::Agent { handoff_formats: true, config, .. } => {
                println!("{}", crate::agent::handoff_formats(&config)?);
                Ok(ExitCode::SUCCESS)
            }
            Command::Agent { config, take_over, .. } => {
                let mode = if take_over { StartMode::TakeOver } else { StartMode::Alone };
                Ok(agent(&config, mode, early).await)
            }
            command => commands::run(&arguments.socket, command).await,
        }
    });
    // Nothing that still blocks a thread may keep the process.
    runtime.shutdown_background();
    code
}

async fn agent(config: &Path, mode: StartMode, early: Option<Early>) -> ExitCode {
    let Some(early) = early else { return EXIT_USAGE.into() };
    match crate::agent::run(config, mode, early).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let code = e.exit_code();
            eprintln!("vmferry: {:#}", anyhow::Error::from(e));
            code.into()
        }
    }
}
