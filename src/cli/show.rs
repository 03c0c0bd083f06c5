//! Answers as text, for people, or as JSON.

use std::collections::BTreeMap;

use anyhow::Context;
use indicatif::HumanBytes;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{progress, vms};
use crate::api::{Disk, Leftover, Migration, Outcome, Problem, Role, Severity, Status};

/// Of what `--json` prints. Fields may be added; where one changes or goes, this rises.
const SCHEMA: u32 = 1;

pub(super) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value).context("no JSON")?;
    match text.strip_prefix("{\n") {
        Some(fields) => println!("{{\n  \"schema\": {SCHEMA},\n{fields}"),
        None => println!("{text}"),
    }
    Ok(())
}

/// A list under its name, so that there is a place for the version.
pub(super) fn json_list(name: &str, all: &impl Serialize) -> anyhow::Result<()> {
    json(&BTreeMap::from([(name, all)]))
}

/// A line of JSON, one of several; whether it is the last.
#[derive(Debug, Serialize)]
struct Line<'a, T> {
    schema: u32,
    last: bool,
    #[serde(flatten)]
    value: &'a T,
}

pub(super) fn json_line(value: &impl Serialize, last: bool) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(&Line { schema: SCHEMA, last, value }).context("no JSON")?);
    Ok(())
}

pub(super) fn problems(problems: &[Problem]) {
    let mut sorted: Vec<_> = problems.iter().collect();
    sorted.sort_by_key(|problem| problem.severity);
    for problem in sorted {
        let mark = match problem.severity {
            Severity::Problem => "✗",
            Severity::Warning => "! warning:",
            Severity::Note => "· note:",
        };
        println!("  {mark} {}", problem.text);
        println!("    → {}", problem.remedy);
    }
}

pub(super) fn list(all: &[Migration]) {
    if all.is_empty() {
        println!("no migrations yet");
        return;
    }
    println!("{:36}  {:16} {:11} {:16} {:11} {:20}  END", "ID", "VM", "ROLE", "PEER", "PHASE", "BEGAN");
    for p in all {
        println!(
            "{:36}  {:16} {:11} {:16} {:11} {:20}  {}",
            p.id,
            p.vm,
            p.role.name(),
            p.peer,
            p.phase.name(),
            when(p.began_at),
            end(p)
        );
    }
}

/// How it ended, in one line; nothing while it has not.
fn end(p: &Migration) -> String {
    let took = if p.elapsed_ms > 0 { format!(" after {} s", seconds(p.elapsed_ms)) } else { String::new() };
    match &p.outcome {
        None => String::new(),
        Some(Outcome::Moved { leftovers }) => {
            let mut words = vec![format!("moved{took}")];
            words.extend(p.downtime.as_ref().map(|d| format!("stood still for {} ms", d.total_ms)));
            words.extend(Some(p.stream_bytes()).filter(|b| *b > 0).map(|b| HumanBytes(b).to_string()));
            words.extend((!leftovers.is_empty()).then(|| "something is left".to_owned()));
            words.join(", ")
        }
        Some(Outcome::Replicated { leftovers }) => {
            let left = if leftovers.is_empty() { "" } else { ", something is left" };
            format!("replicated{took}, {}{left}", HumanBytes(p.stream_bytes()))
        }
        Some(Outcome::Failed { cause, cancelled, .. }) => {
            format!("{}{took}: {cause}", if *cancelled { "cancelled" } else { "failed" })
        }
        Some(Outcome::Undecided { cause }) => format!("UNDECIDED: {cause}"),
    }
}

pub(super) fn agent(status: &Status) {
    println!("{} (vmferry {})", status.identity, status.version);
    println!("  certificate until  {}", when(status.certificate_not_after));
    println!("  peers              {}", listed(&status.peers));
    match &status.vm_states[..] {
        [] => println!("  VMs                {}", listed(&status.vms)),
        states => states.iter().for_each(|state| println!("  VM                 {}", vms::row(state))),
    }
    println!("  migrations         {} under way", status.migrations_active);
    if status.libvirt_migrations_active > 0 {
        println!("  libvirt's own      {} under way", status.libvirt_migrations_active);
    }
    if let Some(sandbox) = &status.sandbox {
        println!("  Landlock           {}", sandbox.landlock);
        println!("  seccomp            {}", sandbox.seccomp);
    }
    if let Some(audit) = &status.audit {
        println!("  audit record       {}", audit.head);
        if let Some(cause) = &audit.failing {
            println!("                     CANNOT BE WRITTEN: {cause}");
        }
    }
    for s in &status.sessions {
        println!(
            "  session            {} at {}, {} streams, {} sent, {} received, {}",
            s.peer,
            s.address,
            s.streams,
            HumanBytes(s.sent_bytes),
            HumanBytes(s.received_bytes),
            s.cipher
        );
        if let Some(missing) = &s.reconnecting {
            println!(
                "                     reconnecting, {} s of {} ({})",
                missing.for_s, missing.of_s, missing.cause
            );
        }
    }
}

pub(super) fn migration(p: &Migration) {
    println!("{} ({})", p.id, p.role.name());
    println!("  VM      {}", p.vm);
    match p.role {
        Role::Source => println!("  to      {}", p.peer),
        Role::Destination => println!("  from    {}", p.peer),
    }
    println!("  began   {}", when(p.began_at));
    println!("  phase   {}: {}", p.phase.name(), progress::phase_words(p));
    if let Some(whole) = &p.whole {
        let left: String = progress::left(p).iter().map(|words| format!(", {words}")).collect();
        println!("  whole   {}.{} %{left}", whole.permille / 10, whole.permille % 10);
    }
    if let Some(tries) = &p.tries {
        println!("  try     {} of {}, as migration {}", tries.number, tries.of, tries.migration);
    }
    let limit = p.share.and_then(|wish| wish.limit_bytes_per_s);
    let limit = limit.map_or_else(String::new, |limit| format!(", limited to {limit}"));
    println!("  rate    {}/s{limit}", HumanBytes(p.rate_bytes_per_s));
    if let Some(words) = progress::held_up(p) {
        println!("          {words}");
    }
    for disk in &p.disks {
        let state = if disk.ready { ", in step" } else { "" };
        let slowed = disk.slowed.map_or_else(String::new, |slowed| format!(", {}", slowed.words()));
        println!(
            "  disk    {}: {} of {}{state}{slowed}{}",
            disk.name,
            HumanBytes(disk.done_bytes),
            HumanBytes(disk.total_bytes),
            saved(disk)
        );
    }
    match &p.ram {
        Some(ram) if ram.total_bytes > 0 => println!(
            "  RAM     {} of {} left, pass {}",
            HumanBytes(ram.remaining_bytes),
            HumanBytes(ram.total_bytes),
            ram.passes
        ),
        // Before the source has told its figures.
        Some(ram) if p.role == Role::Destination => {
            println!("  RAM     {} have come", HumanBytes(ram.stream_bytes));
        }
        _ => {}
    }
    if let Some(c) = &p.comparison {
        println!("  compared {} of {} equal", HumanBytes(c.equal_bytes), HumanBytes(c.of_bytes));
    }
    outcome(p);
}

/// The host to which it goes.
fn destination(p: &Migration) -> String {
    match (p.role, &p.host[..]) {
        (Role::Source, _) => p.peer.clone(),
        (Role::Destination, "") => format!("this host, moved from {}", p.peer),
        (Role::Destination, host) => format!("{host}, moved from {}", p.peer),
    }
}

/// Where the guest of a replica stays.
fn source(p: &Migration) -> &str {
    match (p.role, &p.host[..]) {
        (Role::Source, "") => "this host",
        (Role::Source, host) => host,
        (Role::Destination, _) => &p.peer,
    }
}

fn saved(disk: &Disk) -> String {
    match disk.saved_bytes {
        0 => String::new(),
        bytes => format!(", compression saved {}", HumanBytes(bytes)),
    }
}

pub(super) fn outcome(p: &Migration) {
    for note in &p.notes {
        println!("note: {note}");
    }
    match &p.outcome {
        None => {}
        Some(Outcome::Moved { leftovers }) => {
            println!(
                "{} {} on {} ({} s in all, {} on the wire)",
                p.vm,
                match leftovers.is_empty() {
                    _ if p.paused => "is paused",
                    true => "runs",
                    false => "is",
                },
                destination(p),
                seconds(p.elapsed_ms),
                HumanBytes(p.stream_bytes())
            );
            downtime(p);
            left(leftovers);
        }
        Some(Outcome::Replicated { leftovers }) => {
            println!(
                "the replica of {} on {} is in step ({} s in all, {} on the wire); the VM stays on {}",
                p.vm,
                destination(p),
                seconds(p.elapsed_ms),
                HumanBytes(p.stream_bytes()),
                source(p)
            );
            left(leftovers);
        }
        Some(Outcome::Failed { phase, cause, problems: found, cancelled, leftovers }) => {
            let what = if *cancelled { "was cancelled" } else { "failed" };
            let tries =
                p.tries.as_ref().map_or_else(String::new, |t| format!(", try {} of {}", t.number, t.of));
            println!(
                "the migration of {} {what} in phase {}{tries}; the VM was not moved",
                p.vm,
                phase.name()
            );
            if found.is_empty() {
                println!("cause: {cause}");
            } else {
                problems(found);
            }
            left(leftovers);
        }
        Some(Outcome::Undecided { cause }) => println!("undecided: {cause}"),
    }
}

fn downtime(p: &Migration) {
    let Some(d) = &p.downtime else { return };
    let hook = d.hook_ms.map(|ms| format!(" of which before_start {ms}")).unwrap_or_default();
    let other = if d.other_ms > 0 { format!(", other {}", d.other_ms) } else { String::new() };
    println!(
        "the guest stood still for {} ms: disks {}, device state {}, start {}{hook}{other}",
        d.total_ms, d.disks_ms, d.device_ms, d.start_ms
    );
}

fn left(leftovers: &[Leftover]) {
    for one in leftovers {
        println!("left to clean up: {one}");
    }
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

fn seconds(ms: u64) -> String {
    format!("{}.{}", ms / 1000, ms % 1000 / 100)
}

pub(super) fn when(at: i64) -> String {
    let time = OffsetDateTime::from_unix_timestamp(at).ok();
    time.and_then(|t| t.format(&Rfc3339).ok()).unwrap_or_else(|| at.to_string())
}
