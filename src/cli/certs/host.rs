//! `vmferry certs host`: arguments and output; the arguments are those of `invite`, too.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;

use super::dates::day;
use crate::net::identity::Identity;
use crate::net::naming::TrustDomain;
use crate::pki::{ExtraName, HOST_DAYS, HostRequest, PkiError, issue_host};

#[derive(Debug, Args)]
pub(super) struct HostArgs {
    /// The host's identity, a DNS name; what other hosts' configurations call it.
    pub(super) name: Identity,
    /// Folder of the CA.
    #[arg(long, value_name = "DIR")]
    pub(super) dir: PathBuf,
    /// Validity in days; never beyond the CA's.
    #[arg(long, default_value_t = HOST_DAYS)]
    pub(super) days: u32,
    /// A further name for other programs that use this certificate: a DNS name, an IP
    /// address, DNS:…, IP:…, URI:…; may be repeated. vmferry itself goes by NAME alone.
    #[arg(long, value_name = "NAME")]
    pub(super) san: Vec<ExtraName>,
    /// Add the URI name vmferry://DOMAIN/host/NAME, by which hosts with `trust_domain` in their configuration know
    /// this one.
    #[arg(long, value_name = "DOMAIN")]
    pub(super) trust_domain: Option<TrustDomain>,
    /// Renew: replace key and certificate of this host.
    #[arg(long)]
    pub(super) force: bool,
}

impl HostArgs {
    pub(super) fn request(self) -> Result<HostRequest, PkiError> {
        let mut names = self.san;
        if let Some(domain) = &self.trust_domain {
            names.push(ExtraName::in_trust_domain(domain, &self.name)?);
        }
        Ok(HostRequest { name: self.name, names, days: self.days, force: self.force })
    }
}

pub(super) fn run(args: HostArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let dir = args.dir.clone();
    let request = args.request()?;
    let made = issue_host(&dir, &request)?;
    let dir = made.dir.display();
    let end = day(made.not_after);
    writeln!(out, "Certificate of {} made in {dir}, valid until {end}.", request.name)?;
    if made.cut_short {
        writeln!(out, "It ends on that day because its CA does.")?;
    }
    if let Some(place) = made.left_over {
        let place = place.display();
        writeln!(out, "The folder held files of others; they are in {place} now.")?;
    }
    writeln!(out, "Copy the folder to that host, owned by the agent's user, and keep key.pem at mode 0600.")?;
    Ok(())
}
