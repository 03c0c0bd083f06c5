//! `vmferry libvirt migrate`: has the agents make the sockets, runs virsh into them, and says what came of it.

use std::process::ExitCode;

use anyhow::bail;
use hyper::Method;
use indicatif::HumanBytes;
use serde::Serialize;

use super::domain::Domain;
use super::options::Wanted;
use super::verdict::Fate;
use super::virsh::{Said, Virsh};
use super::watch::{End, Watch};
use super::{job, show};
use crate::api::{Channel, Expected, HoldSeconds, LIBVIRT, LibvirtMigration, LibvirtRequest, libvirt_path};
use crate::cli::client::Client;
use crate::cli::exit_code::EXIT_FAILED;

/// How long what `--print` has made is kept.
const HOLD_S: u64 = 60 * 60;

pub(super) async fn run(client: &Client, wanted: &Wanted) -> anyhow::Result<ExitCode> {
    let virsh = Virsh::new(wanted.connect.as_deref());
    // What libvirt does not have is not prepared.
    let xml = virsh.ask(&["dumpxml", &wanted.domain]).await?;
    if !xml.ok {
        eprintln!("{}", xml.error());
        return Ok(EXIT_FAILED.into());
    }
    let expected = expected(wanted, &Domain::parse(&xml.stdout));
    let request = LibvirtRequest { expected: Some(expected), ..request(wanted) };
    let state: LibvirtMigration = client.call(Method::POST, LIBVIRT, &request).await?;
    let words = words(wanted, &state);
    if wanted.print {
        print(wanted, &virsh.line(&words), &state)?;
        return Ok(ExitCode::SUCCESS);
    }
    let id = state.id;
    let (end, job) = {
        let mut watch = Watch::new(client, &virsh, wanted, state);
        let end = match virsh.start(&words) {
            Ok(running) => watch.follow(running).await,
            Err(e) => Err(e),
        };
        (end, watch.job().cloned())
    };
    let (why, said) = match end {
        Ok(End::Said(said)) => (None, Some(said)),
        Ok(End::GivenUp { why, said }) => (Some(why), said),
        Err(e) => (Some(format!("{e:#}")), None),
    };
    let fate = Fate::find(&virsh, &wanted.domain, said.as_ref()).await;
    let path = format!("{}/end", libvirt_path(id));
    let ended: anyhow::Result<LibvirtMigration> =
        client.call(Method::POST, &path, &fate.told(expected)).await;
    if let Err(e) = &ended {
        eprintln!("the agent has not taken the sockets away, and does so at its next start: {e:#}");
    }
    let ended = ended.ok();
    tell(wanted, &fate, Told { why, said, job, ended: ended.as_ref() })?;
    Ok(fate.exit_code(ended.as_ref()).into())
}

pub(super) fn request(wanted: &Wanted) -> LibvirtRequest {
    LibvirtRequest {
        domain: wanted.domain.clone(),
        renamed: wanted.renamed.clone(),
        to: wanted.to.clone(),
        rpc: wanted.dest_uri.is_none(),
        hold_s: wanted.print.then_some(HOLD_S).and_then(HoldSeconds::new),
        expected: None,
    }
}

/// What must be seen in the tunnel if nothing goes past it.
fn expected(wanted: &Wanted, domain: &Domain) -> Expected {
    if wanted.offline {
        return Expected::default();
    }
    // `--parallel` has its connections beside the main one.
    let ram = 1 + u64::from(wanted.parallel);
    let disks = if wanted.disks.is_empty() { domain.copied() } else { wanted.disks.len() };
    let nbd = if wanted.copies && !wanted.resume { disks as u64 } else { 0 };
    Expected { ram: if wanted.resume { 1 } else { ram }, nbd }
}

/// virsh's words: `--name=value`, so that no value can be taken for an option.
fn words(wanted: &Wanted, state: &LibvirtMigration) -> Vec<String> {
    let socket = |channel: Channel| channel.socket(&state.folder).display().to_string();
    let through = || format!("qemu+unix:///system?socket={}", socket(Channel::Rpc));
    let mut words = vec!["migrate".to_owned()];
    // The disks are there already when a post-copy is resumed, and libvirt would ask how to reach them.
    let of_disks = |word: &str| word.starts_with("--copy-storage") || word.starts_with("--migrate-disks");
    words.extend(wanted.virsh.iter().filter(|word| !(wanted.resume && of_disks(word))).cloned());
    if !wanted.offline {
        words.push(format!("--migrateuri=unix://{}", socket(Channel::Ram)));
        if wanted.copies && !wanted.resume {
            words.push(format!("--disks-uri=unix://{}", socket(Channel::Nbd)));
        }
    }
    words.push(format!("--domain={}", wanted.domain));
    words.push(format!("--desturi={}", wanted.dest_uri.clone().unwrap_or_else(through)));
    words
}

fn print(wanted: &Wanted, line: &str, state: &LibvirtMigration) -> anyhow::Result<()> {
    if wanted.json {
        return crate::cli::show::json(&serde_json::json!({"line": line, "migration": state}));
    }
    println!("{line}");
    eprintln!(
        "The sockets in {} are kept for {} minutes on both hosts, and while something is connected; then, or by\n\
         `vmferry libvirt end {}`, they are taken away. Without --migrateuri the RAM would leave in clear.",
        state.folder.display(),
        HOLD_S / 60,
        state.id
    );
    Ok(())
}

/// The last line of `--json`.
#[derive(Serialize)]
struct Last<'a> {
    /// None where the agent could not be asked.
    #[serde(flatten)]
    state: Option<&'a LibvirtMigration>,
    result: &'static str,
    /// What libvirt has of the domain here, unless it has moved.
    libvirt_state: Option<&'a str>,
}

/// All that is known at the end.
struct Told<'a> {
    why: Option<String>,
    said: Option<Said>,
    job: Option<job::Job>,
    ended: Option<&'a LibvirtMigration>,
}

fn tell(wanted: &Wanted, fate: &Fate, told: Told<'_>) -> anyhow::Result<()> {
    if wanted.json {
        let (result, libvirt_state) = fate.words();
        crate::cli::show::json_line(&Last { state: told.ended, result, libvirt_state }, true)?;
        eprint_errors(&told);
        return Ok(());
    }
    let (domain, to) = (&wanted.domain, &wanted.to);
    let bytes = told.ended.map_or(0, |ended| ended.channels.bytes());
    match fate {
        Fate::Moved => {
            let pause = told
                .job
                .and_then(|job| job.downtime_ms)
                .map_or_else(String::new, |ms| format!(", paused for {ms} ms"));
            println!("{domain} has moved to {to} ({} through the tunnel{pause})", HumanBytes(bytes));
            told.ended.iter().for_each(|ended| show::bypassed(ended));
        }
        Fate::Here(state) => {
            eprintln!("{domain} has not moved to {to}; libvirt has it here: {state}");
            eprint_errors(&told);
        }
        Fate::Unknown(state) => {
            eprintln!("it is not known where {domain} runs: {state}");
            eprint_errors(&told);
            eprintln!(
                "  look with `virsh domstate --reason {domain}` on both hosts before anything is started"
            );
            if fate.can_be_resumed() {
                eprintln!(
                    "  the guest needs both hosts now: the same command with --postcopy-resume has libvirt go on"
                );
            }
        }
    }
    if let Some(ended) = told.ended {
        show::left(ended);
    }
    Ok(())
}

fn eprint_errors(told: &Told<'_>) {
    if let Some(why) = &told.why {
        eprintln!("  {why}");
    }
    if let Some(said) = told.said.as_ref().filter(|said| !said.ok) {
        eprintln!("  libvirt: {}", said.error());
    }
    told.ended.iter().flat_map(|ended| &ended.causes).for_each(|cause| eprintln!("  the tunnel: {cause}"));
}

/// For `check`: the same words are read, and what has no meaning there is refused.
pub(super) fn refuse_print(wanted: &Wanted) -> anyhow::Result<()> {
    if wanted.print {
        bail!("--print is for `vmferry libvirt migrate`");
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::api::{LibvirtRole, LibvirtStage};
    use crate::cli::libvirt::options;

    #[test]
    fn a_resumed_post_copy_is_the_same_command_and_copies_no_disk() {
        let state = LibvirtMigration {
            id: uuid::Uuid::nil(),
            domain: "web1".into(),
            role: LibvirtRole::Source,
            peer: "bravo".into(),
            folder: "/run/x".into(),
            stage: LibvirtStage::Prepared,
            began_at: time::OffsetDateTime::UNIX_EPOCH,
            channels: crate::api::Channels::default(),
            expected: None,
            causes: Vec::new(),
            ended: None,
            left: Vec::new(),
        };
        let line = |more: &str| {
            let all = format!(
                "web1 --to bravo --live --p2p --postcopy --copy-storage-all --migrate-disks vda{more}"
            );
            let all: Vec<String> = all.split(' ').map(str::to_owned).collect();
            words(&options::parse(&all).unwrap(), &state).join(" ")
        };
        let end = "--domain=web1 --desturi=qemu+unix:///system?socket=/run/x/libvirt.sock";
        let ram = "--migrateuri=unix:///run/x/ram.sock";
        let disks = "--copy-storage-all --migrate-disks=vda";
        assert_eq!(
            line(""),
            format!("migrate --live --p2p --postcopy {disks} {ram} --disks-uri=unix:///run/x/nbd.sock {end}")
        );
        assert_eq!(
            line(" --postcopy-resume"),
            format!("migrate --live --p2p --postcopy --postcopy-resume {ram} {end}")
        );
    }
}
