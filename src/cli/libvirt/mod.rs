//! `vmferry libvirt`: migrations that libvirt makes itself, through the tunnel. The agent makes the sockets;
//! virsh is run here, with the rights of whoever calls.
//!
//! ```text
//! options ─► virsh_options, rules
//! migrate ─► options, domain; virsh, job; watch, verdict
//! check   ─► options, domain, devices (xml); virsh
//! look_on ─► show; what `vmferry watch` and `status` tell of them
//! ```

mod args;
mod check;
mod devices;
mod domain;
mod finding;
mod job;
mod look_on;
mod migrate;
mod options;
mod rules;
mod show;
mod verdict;
mod virsh;
mod virsh_options;
mod watch;
mod xml;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::Subcommand;
use hyper::Method;
use uuid::Uuid;

use super::client::Client;
use super::pick;
use crate::api::{LIBVIRT, LibvirtMigration, LibvirtStage, Told, libvirt_path};
pub(super) use args::LibvirtCommand;
pub(super) use look_on::look_on;
pub(super) use show::one as show_one;
use verdict::Fate;
use virsh::Virsh;

/// Those of this host, below its other migrations.
pub(super) fn list_beside(all: &[LibvirtMigration]) {
    if !all.is_empty() {
        println!();
        show::rows(all);
    }
}

/// By its id, its domain, or the beginning of its id. Of a domain it is the one that is not at its end, else the
/// last one.
fn one<'a>(all: &'a [LibvirtMigration], wanted: &str) -> anyhow::Result<Option<&'a LibvirtMigration>> {
    let with = |id: Uuid| all.iter().find(|m| m.id == id);
    if let Ok(id) = wanted.parse() {
        return Ok(with(id));
    }
    let of_domain = || all.iter().rev().filter(|m| m.domain == wanted);
    let open = of_domain().find(|m| m.stage != LibvirtStage::Ended);
    if let Some(found) = open.or_else(|| of_domain().next()) {
        return Ok(Some(found));
    }
    let known = all.iter().map(|m| pick::Known { id: m.id, told: m.domain.clone() });
    Ok(pick::by_beginning(known, wanted)?.and_then(with))
}

/// The one that is meant, if it is none of vmferry's migrations.
pub(super) async fn instead(client: &Client, wanted: &str) -> anyhow::Result<Option<LibvirtMigration>> {
    let all: Vec<LibvirtMigration> = client.get(LIBVIRT).await?;
    if let Ok(id) = wanted.parse::<Uuid>() {
        return Ok(all.into_iter().find(|m| m.id == id));
    }
    match pick::migration(client, wanted).await {
        Ok(_) => Ok(None),
        Err(_) => one(&all, wanted).map(Option::<&LibvirtMigration>::cloned),
    }
}

/// Also where `--help` stands behind a domain, where clap takes it for a word of virsh's.
fn print_help(name: &str) -> anyhow::Result<ExitCode> {
    let mut all = LibvirtCommand::augment_subcommands(clap::Command::new("vmferry libvirt"));
    all.build();
    let command = all.find_subcommand_mut(name).context("no such command")?;
    println!("{}", command.render_long_help().to_string().trim_end());
    Ok(ExitCode::SUCCESS)
}

/// Runs one of its commands.
pub(super) async fn run(socket: &Path, command: LibvirtCommand) -> anyhow::Result<ExitCode> {
    match command {
        LibvirtCommand::Migrate { words } => {
            let wanted = options::parse(&words)?;
            if wanted.help {
                return print_help("migrate");
            }
            let client = Client::new(wanted.socket.as_deref().unwrap_or(socket));
            migrate::run(&client, &wanted).await
        }
        LibvirtCommand::Check { words } => {
            let wanted = options::parse(&words)?;
            if wanted.help {
                return print_help("check");
            }
            let client = Client::new(wanted.socket.as_deref().unwrap_or(socket));
            check::run(&client, &wanted).await
        }
        LibvirtCommand::List { json } => {
            let all: Vec<LibvirtMigration> = Client::new(socket).get(LIBVIRT).await?;
            show::list(&all, json)?;
            Ok(ExitCode::SUCCESS)
        }
        LibvirtCommand::End { id, connect } => end(&Client::new(socket), &id, connect.as_deref()).await,
    }
}

async fn end(client: &Client, wanted: &str, connect: Option<&str>) -> anyhow::Result<ExitCode> {
    let all: Vec<LibvirtMigration> = client.get(LIBVIRT).await?;
    let known = one(&all, wanted)?.with_context(|| {
        format!("{wanted} is neither a migration of libvirt's nor its domain; see `vmferry libvirt list`")
    })?;
    let id = known.id;
    // Of what nobody has used libvirt knows nothing.
    let used = Some(known).filter(|migration| migration.stage == LibvirtStage::UnderWay);
    let told = match used {
        Some(used) => Fate::told_by_libvirt(&Virsh::new(connect), &used.domain, used.expected).await,
        None => Told::Unknown,
    };
    let path = format!("{}/end", libvirt_path(id));
    let ended: LibvirtMigration = client.call(Method::POST, &path, &told).await?;
    Ok(show::taken_away(&ended))
}
