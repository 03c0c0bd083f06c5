//! `vmferry report`: what a migration has been through, as one page of HTML that needs nothing else, or as JSON.

mod chart;
mod page;
mod redact;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;

use super::client::Client;
use super::{complete, pick, show};
use crate::api::{Course, migration_path};

#[derive(Debug, Args)]
pub(super) struct ReportArgs {
    /// The migration: its id, the beginning of it, or its VM.
    #[arg(value_name = "VM|ID", add = complete::migrations())]
    migration: String,
    /// Write the page here; else it goes to the standard output, which may not be a terminal then.
    #[arg(long, short, value_name = "FILE", conflicts_with = "json")]
    output: Option<PathBuf>,
    /// Print JSON instead of a page.
    #[arg(long)]
    json: bool,
    /// For a report of a bug: names, addresses, paths and ids are replaced, the same one by the same word.
    #[arg(long)]
    redact: bool,
}

pub(super) async fn run(client: &Client, args: ReportArgs) -> anyhow::Result<ExitCode> {
    if args.output.is_none() && !args.json && std::io::stdout().is_terminal() {
        bail!("the page is HTML: name a file with --output FILE, or redirect it");
    }
    let id = pick::migration(client, &args.migration).await?;
    let mut course: Course = client.get(&format!("{}/timeline", migration_path(id))).await?;
    if args.redact {
        course = redact::redacted(&course)?;
    }
    if args.json {
        show::json(&course)?;
        return Ok(ExitCode::SUCCESS);
    }
    let page = page::page(&course);
    match &args.output {
        Some(path) => {
            std::fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))?;
            println!("{}", path.display());
        }
        None => std::io::stdout().write_all(page.as_bytes()).context("cannot write the page")?,
    }
    Ok(ExitCode::SUCCESS)
}
