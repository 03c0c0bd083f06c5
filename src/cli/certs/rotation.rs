//! `vmferry certs rotate-ca`: arguments and output, which says what is to be done next.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::dates::day;
use crate::pki::rotation::{self, Step};
use crate::pki::{CA_DAYS, CaRequest, HOST_DAYS};

#[derive(Debug, Args)]
pub(super) struct RotateArgs {
    #[command(subcommand)]
    step: Option<Next>,
    /// Folder of the CA.
    #[arg(long, value_name = "DIR", global = true)]
    dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Next {
    /// Make the new CA. Hosts are to trust both; the old one issues.
    Begin {
        /// Name of the CA. [default: "vmferry CA" and random digits]
        #[arg(long)]
        name: Option<String>,
        /// Validity in days.
        #[arg(long, default_value_t = CA_DAYS)]
        days: u32,
        /// Let the CA vouch only for names in this DNS domain; may be repeated. [default: as the old one]
        #[arg(long, value_name = "DOMAIN")]
        domain: Vec<String>,
    },
    /// Let the new CA issue, and renew every host by it, with the key that it has.
    Switch {
        /// Validity of the hosts' certificates in days.
        #[arg(long, default_value_t = HOST_DAYS)]
        days: u32,
    },
    /// Trust the old CA no more, and delete its key.
    End,
}

pub(super) fn run(args: RotateArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let Some(dir) = args.dir else { anyhow::bail!("give the CA's folder: --dir DIR") };
    match args.step {
        Some(Next::Begin { name, days, domain }) => {
            let made = rotation::begin(&dir, &CaRequest { name, days, domains: domain })?;
            writeln!(
                out,
                "A new CA is in {}, valid until {}. It does not issue yet.",
                dir.display(),
                day(made.not_after)
            )?;
        }
        Some(Next::Switch { days }) => {
            for made in rotation::switch(&dir, days)? {
                writeln!(out, "{}, valid until {}.", made.cert.display(), day(made.not_after))?;
            }
        }
        Some(Next::End) => {
            rotation::end(&dir)?;
            writeln!(out, "The old CA is no longer in {}, and its key is deleted.", dir.display())?;
        }
        None => {}
    }
    Ok(say_next(&dir, rotation::step(&dir)?, out)?)
}

/// What is to be done on all hosts before the next step, and what that is.
fn say_next(dir: &Path, step: Step, out: &mut impl Write) -> std::io::Result<()> {
    let shown = dir.display();
    let lists = match dir.join("crl.pem").exists() {
        true => " and crl.pem",
        false => "",
    };
    match step {
        Step::None => {
            writeln!(
                out,
                "One CA. If the other one was trusted until now: copy {shown}/ca-cert.pem{lists} to every host and"
            )?;
            writeln!(
                out,
                "`systemctl reload vmferry` there; a session whose peer still has an old certificate ends then."
            )?;
            writeln!(out, "To replace it: vmferry certs rotate-ca begin --dir {shown}")
        }
        Step::Begun => {
            writeln!(out, "1. Copy {shown}/ca-cert.pem{lists} to every host; it holds both CAs.")?;
            writeln!(out, "2. `systemctl reload vmferry` on every host. Migrations go on.")?;
            writeln!(out, "3. Only when all have done so: vmferry certs rotate-ca switch --dir {shown}")
        }
        Step::Switched => {
            writeln!(
                out,
                "1. Copy cert.pem and ca-cert.pem{lists} of each host in {shown}/hosts to it; keys stay as they are."
            )?;
            writeln!(out, "2. `systemctl reload vmferry` on every host. Migrations go on.")?;
            writeln!(
                out,
                "3. Only when all have done so, and their sessions have been made anew or ended (`vmferry status`):"
            )?;
            writeln!(out, "   vmferry certs rotate-ca end --dir {shown}")
        }
    }
}
