//! `vmferry certs renew`: arguments and output.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use time::Duration;

use super::dates::day;
use crate::net::identity::Identity;
use crate::pki::HOST_DAYS;
use crate::pki::renewal::{Renewal, ends_within, hosts, renew};

#[derive(Debug, Args)]
pub(super) struct RenewArgs {
    /// The hosts; all of the folder's by default.
    name: Vec<Identity>,
    /// Folder of the CA.
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Only those whose certificate ends within so many days: for a timer.
    #[arg(long, value_name = "DAYS")]
    within: Option<u32>,
    /// Validity in days; never beyond the CA's.
    #[arg(long, default_value_t = HOST_DAYS)]
    days: u32,
    /// Make another key, too. By default the host keeps its own, which need not be here.
    #[arg(long)]
    new_key: bool,
}

pub(super) fn run(args: RenewArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let names = if args.name.is_empty() { hosts(&args.dir)? } else { args.name };
    let renewal = Renewal { days: args.days, new_key: args.new_key };
    let mut renewed = 0;
    for name in &names {
        let within = args.within.map(|days| Duration::days(days.into()));
        if within.map_or(Ok(true), |within| ends_within(&args.dir, name, within))? {
            let made = renew(&args.dir, name, renewal)?;
            writeln!(out, "{name}: {}, valid until {}.", made.cert.display(), day(made.not_after))?;
            renewed += 1;
        }
    }
    if renewed == 0 {
        writeln!(out, "Nothing to renew.")?;
    } else if args.new_key {
        writeln!(
            out,
            "Copy cert.pem, key.pem and ca-cert.pem to each, then `systemctl reload vmferry` there."
        )?;
    } else {
        writeln!(out, "Copy cert.pem and ca-cert.pem to each, then `systemctl reload vmferry` there.")?;
    }
    Ok(())
}
