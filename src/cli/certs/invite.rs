//! `vmferry certs invite`: arguments and output.

use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

use clap::Args;

use super::dates::{day, second};
use super::host::HostArgs;
use crate::enrol::Invitation;

/// Where an invitation listens if its address does not say.
const PORT: u16 = 9909;

#[derive(Debug, Args)]
pub(super) struct InviteArgs {
    #[command(flatten)]
    host: HostArgs,
    /// Where the new host reaches this machine: HOST:PORT.
    #[arg(long, value_name = "HOST:PORT")]
    address: String,
    /// Where to listen. [default: all addresses, the port of --address]
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// How long the ticket is good.
    #[arg(long, value_name = "N", default_value_t = 60)]
    minutes: u32,
}

/// Prints the ticket, and serves it until it was used or is over.
pub(super) fn run(args: InviteArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let dir = args.host.dir.clone();
    let request = args.host.request()?;
    let name = request.name.clone();
    let port = args.address.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
    let (address, port) = match port {
        Some(port) => (args.address, port),
        None => (format!("{}:{PORT}", args.address), PORT),
    };
    let listen = args.listen.unwrap_or_else(|| SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, port)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let refused = runtime.block_on(async {
        let lifetime = Duration::from_secs(u64::from(args.minutes) * 60);
        let invitation = Invitation::open(dir.clone(), request, (listen, &address), lifetime).await?;
        let ticket = invitation.ticket();
        writeln!(
            out,
            "On {name}, as root, within {} minutes (until {}):",
            args.minutes,
            second(ticket.expires)
        )?;
        writeln!(out)?;
        writeln!(out, "  vmferry join '{ticket}'")?;
        writeln!(out)?;
        writeln!(out, "The ticket is a secret, and good once. Other users of {name} can read it while it is an argument:")?;
        writeln!(out, "`vmferry join -` reads it from standard input. Waiting for {name} …")?;
        out.flush()?;
        anyhow::Ok(invitation.serve().await?)
    })?;
    let made = crate::pki::report::inspect(&dir.join("hosts").join(name.as_str()).join("cert.pem"))?;
    let until = made.first().map(|cert| day(cert.not_after)).unwrap_or_default();
    writeln!(out, "{name} has joined; its certificate is valid until {until}{}.", refused.in_words())?;
    Ok(())
}
