//! `vmferry join`: arguments and output. Works without an agent.

use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;

use crate::enrol::{Ticket, join};
use crate::private_memory::keep_private;

/// Longest ticket that is read from standard input.
const TICKET_BYTES_MAX: u64 = 4096;

#[derive(Debug, Args)]
pub(super) struct JoinArgs {
    /// What `vmferry certs invite` has printed; `-` reads it from standard input.
    ticket: String,
    /// Folder for key and certificates.
    #[arg(long, value_name = "DIR", default_value = "/etc/vmferry/tls")]
    dir: PathBuf,
    /// Replace this host's key and certificate.
    #[arg(long)]
    force: bool,
}

pub(super) fn run(args: JoinArgs) -> anyhow::Result<ExitCode> {
    keep_private();
    let text = match args.ticket.as_str() {
        "-" => {
            let mut text = String::new();
            std::io::stdin()
                .take(TICKET_BYTES_MAX)
                .read_to_string(&mut text)
                .context("cannot read the ticket")?;
            text
        }
        text => text.to_owned(),
    };
    let ticket: Ticket = text.parse()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let joined = runtime.block_on(join(&ticket, &args.dir, args.force))?;
    println!("This host is {} now, until {}.", ticket.name, joined.not_after.date());
    for file in &joined.files {
        println!("  {}", file.display());
    }
    println!(
        "The key was made here and is nowhere else. The agent's user has to own it: `systemd-tmpfiles --create vmferry.conf`"
    );
    println!("does that, for /etc/vmferry/tls; then start the agent, or `systemctl reload vmferry`.");
    if joined.has_list {
        println!("Name crl.pem in the configuration (tls.crl): certificates of this CA are revoked.");
    }
    Ok(ExitCode::SUCCESS)
}
