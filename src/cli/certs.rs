//! `vmferry certs`: arguments and output. What the words mean is `pki.rs`'s business. Works on
//! files alone, without an agent.

mod dates;
mod host;
mod invite;
mod renewal;
mod rotation;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use crate::net::naming::TrustDomain;
use crate::net::tls::TlsPaths;
use crate::pki::report::{self, CertificateReport};
use crate::pki::revocation::{CRL_DAYS, Revoke, revoke};
use crate::pki::{CA_DAYS, CaRequest, create_ca};
use crate::private_memory::keep_private;
use dates::{day, second};

/// Make, show and check the certificates that hosts trust each other by.
#[derive(Debug, Args)]
pub struct CertsArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make a CA in a folder. Keep the folder off the hypervisors, and have a backup.
    Ca(CaArgs),
    /// Issue the certificate of one host: DIR/hosts/NAME, to be copied to that host.
    Host(host::HostArgs),
    /// Invite a host that makes its own key: prints a ticket for `vmferry join`, and serves it until it was used.
    Invite(invite::InviteArgs),
    /// Renew certificates of hosts: the same names, and the same key unless another one is asked for.
    Renew(renewal::RenewArgs),
    /// Replace the CA by a new one while hosts trust both; without a step, say which is the next.
    RotateCa(rotation::RotateArgs),
    /// Revoke certificates, or renew the revocation list: DIR/crl.pem, for every host.
    Revoke(RevokeArgs),
    /// Show what is in certificate files.
    Show(ShowArgs),
    /// Check that a host's files work together, and that peers would be accepted.
    Check(CheckArgs),
}

#[derive(Debug, Args)]
struct CaArgs {
    /// Folder of the CA; created if it is not there.
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Name of the CA. [default: "vmferry CA" and random digits]
    #[arg(long)]
    name: Option<String>,
    /// Validity in days.
    #[arg(long, default_value_t = CA_DAYS)]
    days: u32,
    /// Let the CA vouch only for names in this DNS domain; may be repeated.
    #[arg(long, value_name = "DOMAIN")]
    domain: Vec<String>,
}

#[derive(Debug, Args)]
struct RevokeArgs {
    /// Revoke everything that was ever issued to this host.
    name: Option<String>,
    /// Revoke one certificate, by its serial number.
    #[arg(long, value_name = "HEX", conflicts_with = "name")]
    serial: Option<String>,
    /// Folder of the CA.
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Validity of the list in days; hosts refuse every peer when it is over.
    #[arg(long, default_value_t = CRL_DAYS)]
    days: u32,
}

#[derive(Debug, Args)]
struct ShowArgs {
    /// PEM files.
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct CheckArgs {
    /// The CA's certificate.
    #[arg(long, value_name = "PATH")]
    ca: PathBuf,
    /// The host's certificate.
    #[arg(long, value_name = "PATH")]
    cert: PathBuf,
    /// The host's private key.
    #[arg(long, value_name = "PATH")]
    key: PathBuf,
    /// The revocation list, if the host uses one.
    #[arg(long, value_name = "PATH")]
    crl: Option<PathBuf>,
    /// `trust_domain` in the host's configuration, if it has one.
    #[arg(long, value_name = "DOMAIN")]
    trust_domain: Option<TrustDomain>,
    /// A peer's certificate; may be repeated.
    #[arg(long, value_name = "PATH")]
    peer_cert: Vec<PathBuf>,
}

/// Runs `vmferry certs`. Exit code 0 if all is well, 1 if `check` has found a problem.
/// Errors: whatever kept the command from doing its work; the caller prints the chain.
pub fn run(args: CertsArgs) -> anyhow::Result<ExitCode> {
    keep_private();
    let mut out = io::stdout().lock();
    run_to(args, &mut out)
}

/// The same with the output going elsewhere.
pub fn run_to(args: CertsArgs, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    match args.action {
        Action::Ca(args) => make_ca(args, out)?,
        Action::Host(args) => host::run(args, out)?,
        Action::Invite(args) => invite::run(args, out)?,
        Action::Renew(args) => renewal::run(args, out)?,
        Action::RotateCa(args) => rotation::run(args, out)?,
        Action::Revoke(args) => make_list(args, out)?,
        Action::Show(args) => show(&args, out)?,
        Action::Check(args) => return check(args, out),
    }
    Ok(ExitCode::SUCCESS)
}

fn make_ca(args: CaArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let request = CaRequest { name: args.name, days: args.days, domains: args.domain };
    let made = create_ca(&args.dir, &request)?;
    let dir = args.dir.display();
    writeln!(out, "CA made in {dir}, valid until {}.", day(made.not_after))?;
    writeln!(out, "  {dir}/ca-cert.pem   for every host")?;
    writeln!(out, "  {dir}/ca-key.pem    secret: keep it off the hypervisors, and keep a backup")?;
    writeln!(out, "Next: vmferry certs host NAME --dir {dir}")?;
    Ok(())
}

fn make_list(args: RevokeArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let what = match (args.name, args.serial) {
        (Some(name), _) => Revoke::Host(name),
        (None, Some(serial)) => Revoke::Serial(serial),
        (None, None) => Revoke::Nothing,
    };
    let list = revoke(&args.dir, &what, args.days)?;
    for serial in &list.added {
        writeln!(out, "Revoked {serial}.")?;
    }
    if list.unrecorded {
        writeln!(
            out,
            "WARNING: {} has no record that it issued that serial number. The list has it now, and refuses a \
             certificate of this CA that bears it; if it is mistyped, nothing is revoked that you meant. \
             Nothing ever leaves the list.",
            args.dir.display()
        )?;
    }
    if list.added.is_empty() && what != Revoke::Nothing {
        writeln!(out, "Revoked already; the list was only renewed.")?;
    }
    let (path, end) = (list.path.display(), day(list.next_update));
    writeln!(out, "{path} holds {} certificates and is valid until {end}.", list.total)?;
    writeln!(out, "Copy it to every host (tls.crl), and renew it before that day.")?;
    Ok(())
}

fn show(args: &ShowArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let mut all = Vec::new();
    for path in &args.paths {
        all.extend(report::inspect(path)?);
    }
    if args.json {
        serde_json::to_writer_pretty(&mut *out, &all)?;
        writeln!(out)?;
        return Ok(());
    }
    for (index, cert) in all.iter().enumerate() {
        if index > 0 {
            writeln!(out)?;
        }
        show_one(cert, out)?;
    }
    Ok(())
}

fn show_one(cert: &CertificateReport, out: &mut impl Write) -> io::Result<()> {
    let kind = if cert.is_ca { " (a CA)" } else { "" };
    writeln!(out, "{} #{}{kind}", cert.path.display(), cert.place)?;
    let identity = match (&cert.identity, cert.is_ca) {
        (Some(identity), _) => identity.as_str(),
        (None, true) => "-",
        (None, false) => "none: this certificate can't be a host's",
    };
    let left = match cert.days_left {
        days if days < 0 => "EXPIRED".to_owned(),
        days => format!("{days} days left"),
    };
    let rows = [
        ("identity", identity.to_owned()),
        ("subject", cert.subject.clone()),
        ("names", list(&cert.names)),
        ("issuer", cert.issuer.clone()),
        ("serial", cert.serial.clone()),
        ("not before", second(cert.not_before)),
        ("not after", format!("{}  {left}", second(cert.not_after))),
        ("key usage", list(&cert.key_usage)),
        ("extended", list(&cert.extended_key_usage)),
        ("SHA-256", cert.fingerprint_sha256.clone()),
    ];
    for (title, text) in rows {
        writeln!(out, "  {title:<12}{text}")?;
    }
    Ok(())
}

fn check(args: CheckArgs, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    let paths = TlsPaths { ca: args.ca, cert: args.cert, key: args.key, crl: args.crl };
    let findings = report::check(&paths, &args.trust_domain.into(), &args.peer_cert);
    for problem in &findings.problems {
        writeln!(out, "problem: {problem}")?;
    }
    for remark in &findings.remarks {
        writeln!(out, "remark:  {remark}")?;
    }
    if !findings.problems.is_empty() {
        return Ok(ExitCode::FAILURE);
    }
    let peers = args.peer_cert.len();
    writeln!(out, "All is well with the host's files and with {peers} certificates of peers.")?;
    Ok(ExitCode::SUCCESS)
}

fn list(words: &[impl AsRef<str>]) -> String {
    if words.is_empty() {
        return "-".to_owned();
    }
    let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
    words.join(", ")
}
