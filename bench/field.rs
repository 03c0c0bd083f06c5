//! Who is measured in which table. The first of a table is the reference of its ratios.

use std::path::PathBuf;

use vmferry::net::tls::Aead;

use crate::contender::Contender;

/// The rustls copy that is the bar, in all tables.
pub(crate) const TLS_COPY: &str = "TLS copy, one connection";

/// What the command line says about who takes part.
pub(crate) struct Field<'a> {
    /// Folder with the programs of others.
    pub(crate) relays: &'a str,
    /// Only those whose name contains this word, and the reference.
    pub(crate) only: Option<&'a str>,
    /// `NAME=PROGRAM ARG…`.
    pub(crate) more: &'a [String],
}

impl Field<'_> {
    /// One bulk stream: the copies, vmferry, and what people use today.
    pub(crate) fn relays(&self) -> anyhow::Result<Vec<Contender>> {
        self.chosen(vec![
            copy(TLS_COPY, &[])?,
            // The reference against itself: what it differs from 1 is noise.
            copy("TLS copy, again", &[])?,
            copy("TLS copy, 256 KiB buffers", &["--buffer", "262144"])?,
            other_aead()?,
            copy("clear TCP copy", &["--clear"])?,
            vmferry("vmferry, one connection")?,
            self.other("ssh -L", "ssh")?,
            self.other("stunnel", "stunnel")?,
            self.other("nginx stream", "nginx")?,
            self.other("haproxy", "haproxy")?,
            self.other("socat, AES-256", "socat")?,
        ])
    }

    /// vmferry with more and more streams in one connection; and, so that one sees what so many local
    /// sockets cost whoever relays them, copies with as many connections.
    pub(crate) fn streams(&self, numbers: &[u32]) -> anyhow::Result<Vec<Contender>> {
        let mut contenders = vec![vmferry("vmferry, 1 stream")?.with_streams(1)];
        for number in numbers.iter().filter(|n| **n != 1) {
            contenders.push(vmferry(&format!("vmferry, {number} streams"))?.with_streams(*number));
        }
        contenders.push(copy(TLS_COPY, &[])?.with_streams(1));
        for number in numbers.iter().filter(|n| **n > 4) {
            contenders.push(copy(&format!("TLS copy, {number} connections"), &[])?.with_streams(*number));
        }
        self.chosen(contenders)
    }

    /// A small request beside bulk streams.
    pub(crate) fn latency(&self) -> anyhow::Result<Vec<Contender>> {
        self.chosen(vec![
            copy("TLS copy, a connection of its own", &[])?,
            copy("the same, again", &[])?,
            vmferry("vmferry, ordinary stream")?,
            vmferry("vmferry, urgent stream")?.with_near(&["--urgent-first"]),
            self.other("ssh -L", "ssh")?,
        ])
    }

    /// One stream over a long road.
    pub(crate) fn delays(&self) -> anyhow::Result<Vec<Contender>> {
        self.chosen(vec![
            copy("clear TCP copy", &["--clear"])?,
            copy(TLS_COPY, &[])?,
            vmferry("vmferry, a disk's stream")?,
            vmferry("vmferry, the RAM's stream")?.with_near(&["--ram"]),
        ])
    }

    /// One stream whose connection is reset, and not.
    pub(crate) fn resets(&self) -> anyhow::Result<Vec<Contender>> {
        self.chosen(vec![vmferry("vmferry, no resets")?, vmferry("vmferry, with resets")?.with_resets()])
    }

    fn other(&self, name: &str, which: &str) -> anyhow::Result<Contender> {
        let args = ["--which", which, "--programs", self.relays];
        Ok(Contender::new(name, &beside("bench-other")?, &args))
    }

    fn chosen(&self, mut contenders: Vec<Contender>) -> anyhow::Result<Vec<Contender>> {
        if let Some(word) = self.only {
            let mut first = true;
            contenders.retain(|c| std::mem::take(&mut first) || c.name.contains(word));
        }
        for text in self.more {
            contenders.push(Contender::parse(text)?);
        }
        Ok(contenders)
    }
}

pub(crate) fn vmferry(name: &str) -> anyhow::Result<Contender> {
    Ok(Contender::new(name, &beside("bench-vmferry")?, &[]))
}

fn copy(name: &str, args: &[&str]) -> anyhow::Result<Contender> {
    Ok(Contender::new(name, &beside("bench-tls-copy")?, args))
}

fn other_aead() -> anyhow::Result<Contender> {
    let other = match Aead::Auto.resolve() {
        Aead::Ring => "aws-lc",
        _ => "ring",
    };
    copy(&format!("TLS copy, {other}"), &["--aead", other])
}

fn beside(program: &str) -> anyhow::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name(program))
}
