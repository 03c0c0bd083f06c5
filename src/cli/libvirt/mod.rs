//! `vmferry libvirt`: migrations that libvirt makes itself, through the tunnel. The agent makes the sockets;
//! virsh is run here, with the rights of whoever calls.
//!
//! ```text
//! migrate ─► options, domain; virsh, job; watch, verdict
//! check   ─► options, domain; virsh
//! ```

mod args;
mod check;
mod domain;
mod job;
mod migrate;
mod options;
mod show;
mod verdict;
mod virsh;
mod watch;

use std::path::Path;
use std::process::ExitCode;

use anyhow::anyhow;
use hyper::Method;
use uuid::Uuid;

use super::client::Client;
use super::pick;
use crate::api::{LIBVIRT, LibvirtMigration, LibvirtStage, Told, libvirt_path};
pub(super) use args::LibvirtCommand;
use verdict::Fate;
use virsh::Virsh;

/// Those of this host, below its other migrations.
pub(super) fn list_beside(all: &[LibvirtMigration]) {
    if !all.is_empty() {
        println!();
        show::rows(all);
    }
}

/// By its id, the beginning of that, or its domain.
fn one(all: &[LibvirtMigration], wanted: &str) -> anyhow::Result<Uuid> {
    if let Ok(id) = wanted.parse() {
        return Ok(id);
    }
    let known = |m: &LibvirtMigration| pick::Known { id: m.id, told: m.domain.clone() };
    if let Some(id) = pick::only(all.iter().filter(|m| m.domain == wanted).map(known), wanted)? {
        return Ok(id);
    }
    let found = pick::by_beginning(all.iter().map(known), wanted)?;
    found.ok_or_else(|| {
        anyhow!("{wanted} is neither a migration of libvirt's nor its domain; see `vmferry libvirt list`")
    })
}

/// Runs one of its commands.
pub(super) async fn run(socket: &Path, command: LibvirtCommand) -> anyhow::Result<ExitCode> {
    match command {
        LibvirtCommand::Migrate { words } => {
            let wanted = options::parse(&words)?;
            let client = Client::new(wanted.socket.as_deref().unwrap_or(socket));
            migrate::run(&client, &wanted).await
        }
        LibvirtCommand::Check { words } => {
            let wanted = options::parse(&words)?;
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
    let id = one(&all, wanted)?;
    let known = all.into_iter().find(|migration| migration.id == id);
    // Of what nobody has used libvirt knows nothing.
    let used = known.filter(|migration| migration.stage == LibvirtStage::UnderWay);
    let told = match used {
        Some(used) => Fate::told_by_libvirt(&Virsh::new(connect), &used.domain, used.expected).await,
        None => Told::Unknown,
    };
    let path = format!("{}/end", libvirt_path(id));
    let ended: LibvirtMigration = client.call(Method::POST, &path, &told).await?;
    Ok(show::taken_away(&ended))
}
