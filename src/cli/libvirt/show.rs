//! Migrations that libvirt makes itself, as text for people, or as JSON.

use std::cell::RefCell;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use indicatif::{HumanBytes, ProgressBar};
use serde::Serialize;
use tokio::time::Instant;

use super::job::Job;
use crate::api::{LibvirtEnd, LibvirtMigration, LibvirtRole};
use crate::cli::exit_code::EXIT_LEFT;

/// Between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// How far it is, while it goes on.
pub(super) struct Progress {
    json: bool,
    bar: Option<ProgressBar>,
    last: RefCell<Option<(Instant, u64)>>,
}

#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    state: &'a LibvirtMigration,
    #[serde(skip_serializing_if = "Option::is_none")]
    job: Option<&'a Job>,
}

impl Progress {
    pub(super) fn new(json: bool) -> Self {
        let bar = (!json && std::io::stderr().is_terminal()).then(ProgressBar::new_spinner);
        Self { json, bar, last: RefCell::new(None) }
    }

    pub(super) fn show(&self, state: &LibvirtMigration, job: Option<&Job>) {
        if self.json {
            if let Err(e) = crate::cli::show::json_line(&Line { state, job }, false) {
                eprintln!("{e:#}");
            }
            return;
        }
        let (now, bytes) = (Instant::now(), state.channels.bytes());
        let mut last = self.last.borrow_mut();
        let due = last.is_none_or(|(at, _)| self.bar.is_some() || now.duration_since(at) >= LINE_EVERY);
        if !due {
            return;
        }
        let rate = last.map(|(at, before)| {
            bytes.saturating_sub(before).saturating_mul(1000)
                / (now.duration_since(at).as_millis() as u64).max(1)
        });
        *last = Some((now, bytes));
        let text = text(state, job, rate.unwrap_or_default());
        match &self.bar {
            Some(bar) => bar.set_message(text),
            None => eprintln!("{text}"),
        }
    }

    /// Something that stays.
    pub(super) fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

pub(super) fn text(state: &LibvirtMigration, job: Option<&Job>, rate: u64) -> String {
    let part = |done: u64, total: u64| format!("{} of {}", HumanBytes(done), HumanBytes(total));
    let mut words = Vec::new();
    if let Some(job) = job.filter(|job| job.disks_total > 0) {
        words.push(format!("disks {}", part(job.disks_done, job.disks_total)));
    }
    if let Some(job) = job.filter(|job| job.ram_total > 0) {
        words.push(format!("RAM {}", part(job.ram_done, job.ram_total)));
    }
    let channels = &state.channels;
    words.push(format!(
        "tunnel {} at {}/s, {} connections",
        HumanBytes(channels.bytes()),
        HumanBytes(rate),
        channels.open()
    ));
    if let Some(cause) = state.causes.last() {
        words.push(cause.clone());
    }
    words.join(", ")
}

/// All of them.
pub(super) fn list(all: &[LibvirtMigration], json: bool) -> anyhow::Result<()> {
    if json {
        return crate::cli::show::json_list("migrations", &all);
    }
    if all.is_empty() {
        println!("no migrations of libvirt's yet");
        return Ok(());
    }
    rows(all);
    Ok(())
}

/// One line each, below their heading.
pub(in crate::cli) fn rows(all: &[LibvirtMigration]) {
    println!("{:36}  {:16} {:11} {:16} {:11} BYTES", "ID", "DOMAIN", "ROLE", "PEER", "STATE");
    for m in all {
        let state = state(m);
        let bytes = HumanBytes(m.channels.bytes());
        println!("{:36}  {:16} {:11} {:16} {state:11} {bytes}", m.id, m.domain, role(m.role), m.peer);
    }
}

/// How far it is, or how it ended.
pub(super) fn state(m: &LibvirtMigration) -> &'static str {
    m.ended.map_or(m.stage.name(), |ended| ended.name())
}

/// All that is known of one.
pub(in crate::cli) fn one(m: &LibvirtMigration, json: bool) -> anyhow::Result<()> {
    if json {
        return crate::cli::show::json(m);
    }
    println!("{} ({}), libvirt's own", m.id, role(m.role));
    println!("  domain  {}", m.domain);
    match m.role {
        LibvirtRole::Source => println!("  to      {}", m.peer),
        LibvirtRole::Destination => println!("  from    {}", m.peer),
    }
    println!("  began   {}", crate::cli::show::when(m.began_at.unix_timestamp()));
    println!("  state   {}", state(m));
    println!("  sockets {}", m.folder.display());
    for (channel, moved) in m.channels.all() {
        println!(
            "  {:7} {} connections, {} open, {} sent, {} received",
            channel.name(),
            moved.connections,
            moved.open,
            HumanBytes(moved.sent_bytes),
            HumanBytes(moved.received_bytes)
        );
    }
    m.causes.iter().for_each(|cause| println!("  the tunnel: {cause}"));
    left(m);
    Ok(())
}

fn role(role: LibvirtRole) -> &'static str {
    role.name()
}

/// What has become of the sockets, and of what was to go through them.
pub(super) fn taken_away(ended: &LibvirtMigration) -> ExitCode {
    if ended.left.is_empty() {
        println!("the sockets of {} are gone on both hosts", ended.domain);
    }
    left(ended);
    match ended.ended {
        Some(LibvirtEnd::Bypassed) => bypassed(ended),
        _ => ended.causes.iter().for_each(|cause| eprintln!("the tunnel: {cause}")),
    }
    let is_well = ended.left.is_empty() && ended.ended != Some(LibvirtEnd::Bypassed);
    if is_well { ExitCode::SUCCESS } else { EXIT_LEFT.into() }
}

/// Says it loudly if something went past the tunnel.
pub(super) fn bypassed(ended: &LibvirtMigration) {
    if ended.ended == Some(LibvirtEnd::Bypassed) {
        eprintln!("WARNING: {} has moved, and not all of it went through the tunnel.", ended.domain);
        ended.causes.iter().for_each(|cause| eprintln!("  {cause}"));
    }
}

/// What was said of the tunnel, and what is left.
pub(super) fn left(ended: &LibvirtMigration) {
    ended.left.iter().for_each(|what| println!("left: {what}"));
}
