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

use super::client::Client;
use crate::api::{LIBVIRT, LibvirtMigration, Told, libvirt_path};
pub(super) use args::LibvirtCommand;

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
        LibvirtCommand::End { id } => {
            let client = Client::new(socket);
            let path = format!("{}/end", libvirt_path(id));
            let ended: LibvirtMigration = client.call(Method::POST, &path, &Told::Unknown).await?;
            Ok(show::taken_away(&ended))
        }
    }
}
