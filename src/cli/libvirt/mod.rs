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

use hyper::Method;
use uuid::Uuid;

use super::client::Client;
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
        LibvirtCommand::End { id, connect } => end(&Client::new(socket), id, connect.as_deref()).await,
    }
}

async fn end(client: &Client, id: Uuid, connect: Option<&str>) -> anyhow::Result<ExitCode> {
    let all: Vec<LibvirtMigration> = client.get(LIBVIRT).await?;
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
