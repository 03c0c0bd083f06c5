//! What the relays have in common: their credentials, cubic, and the line that says "ready".
//! Must not know how anything is relayed.

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use vmferry::net::tls::{Aead, Tls, TlsPaths};

/// Congestion control on every socket. bbr, some machines' default, makes loopback two to three
/// times slower.
pub(crate) const CONGESTION: &str = "cubic";
/// The identity of the far relay; the driver has issued it.
pub(crate) const FAR: &str = "far";

/// Who a relay is.
#[derive(Args, Clone)]
pub(crate) struct Credentials {
    /// Folder with ca-cert.pem, cert.pem and key.pem.
    #[arg(long)]
    tls: PathBuf,
    /// The library that seals.
    #[arg(long, value_enum, default_value = "auto")]
    aead: Seal,
}

#[derive(Clone, Copy, ValueEnum)]
enum Seal {
    Auto,
    Ring,
    AwsLc,
}

impl Credentials {
    pub(crate) fn load(&self) -> anyhow::Result<Tls> {
        let paths = TlsPaths {
            ca: self.tls.join("ca-cert.pem"),
            cert: self.tls.join("cert.pem"),
            key: self.tls.join("key.pem"),
            crl: None,
        };
        let aead = match self.aead {
            Seal::Auto => Aead::Auto,
            Seal::Ring => Aead::Ring,
            Seal::AwsLc => Aead::AwsLc,
        };
        Ok(Tls::load(&paths, aead)?)
    }
}

/// Tells the driver that the relay takes connections; `address` is where.
pub(crate) fn ready(address: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "ready {address}")?;
    out.flush()
}

/// A failed connection is seen by the driver's sink; this says why.
pub(crate) fn report(outcome: anyhow::Result<()>) {
    if let Err(error) = outcome {
        eprintln!("a relayed connection failed: {error:#}");
    }
}
