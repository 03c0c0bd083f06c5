//! `vmferry recover`: what is not closed on this host, in words, and an operator's decision.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use anyhow::{Context, bail};
use hyper::Method;
use uuid::Uuid;

use super::args::RecoverArgs;
use super::client::{Client, NotDone};
use super::exit_code::{EXIT_FAILED, EXIT_LEFT, EXIT_UNDECIDED};
use super::{pick, show};
use crate::api::{Case, CaseKind, ForceRequest, Owner, Recovery, Side, unknown_remedy};

/// An agent that gets to a decision later than that does not carry it out.
const DECISION_VALID_S: i64 = 30;

pub(super) async fn run(client: &Client, args: RecoverArgs) -> anyhow::Result<ExitCode> {
    let id = match &args.id {
        Some(wanted) => Some(case(client, wanted).await?),
        None => None,
    };
    if let (Some(id), Some(side)) = (id, args.force) {
        match force(client, id, side, args.yes).await? {
            Forced::Taken => {}
            Forced::Not(why) => {
                eprintln!("vmferry: {why}");
                return Ok(EXIT_FAILED.into());
            }
            Forced::Unknown => return Ok(EXIT_UNDECIDED.into()),
        }
    }
    let method = if args.look { Method::GET } else { Method::POST };
    // After a decision nobody waits for what the other host knows.
    let path = path(id, args.force.is_none());
    let recovery: Recovery = client.call(method, &path, &()).await?;
    if args.json {
        show::json(&recovery)?;
    } else if recovery.cases.is_empty() {
        println!("nothing is open, left over or refused on this host");
    } else {
        recovery.cases.iter().for_each(show_case);
    }
    Ok(exit_code(&recovery.cases).into())
}

/// Which migration is meant: of those that are not closed, else of those that the agent knows.
async fn case(client: &Client, wanted: &str) -> anyhow::Result<Uuid> {
    if let Ok(id) = wanted.parse() {
        return Ok(id);
    }
    let open: Recovery = client.get(&path(None, false)).await?;
    let known = |case: &Case| {
        let vm = case.vm.clone().unwrap_or_default();
        Some(pick::Known { id: case.id?, told: vm })
    };
    let of_vm = open.cases.iter().filter(|case| case.vm.as_deref() == Some(wanted)).filter_map(known);
    if let Some(id) = pick::only(of_vm, wanted)? {
        return Ok(id);
    }
    match pick::by_beginning(open.cases.iter().filter_map(known), wanted)? {
        Some(id) => Ok(id),
        None => pick::migration(client, wanted).await,
    }
}

fn path(id: Option<Uuid>, peers: bool) -> String {
    let id = id.map(|id| format!("&id={id}")).unwrap_or_default();
    format!("/v1/recover?peers={peers}{id}")
}

fn exit_code(cases: &[Case]) -> u8 {
    let any = |kinds: &[CaseKind]| cases.iter().any(|c| kinds.contains(&c.kind));
    if any(&[CaseKind::Undecided, CaseKind::Refused]) {
        EXIT_UNDECIDED
    } else if any(&[CaseKind::Leftovers]) {
        EXIT_LEFT
    } else {
        0
    }
}

fn show_case(case: &Case) {
    let vm = case.vm.as_deref().unwrap_or("an unknown VM");
    let what = match case.kind {
        CaseKind::UnderWay => "under way",
        CaseKind::Undecided => "UNDECIDED",
        CaseKind::Leftovers => "ended, with something left",
        CaseKind::Refused => "NOT BELIEVED",
        CaseKind::Closed => "closed",
    };
    println!("{vm}: {what}");
    if let (Some(id), Some(role), Some(peer)) = (case.id, case.role, &case.peer) {
        let began = case.began_at.map(show::when).unwrap_or_default();
        println!("  migration  {id}, {} (the other side is {peer}), began {began}", role.name());
    }
    println!("  journal    {}: {}", case.file.display(), journal_text(case));
    for (name, said) in [("the peer   ", &case.peer_says), ("QEMU here  ", &case.qemu_says)] {
        if let Some(said) = said {
            println!("  {name}{said}");
        }
    }
    let owner = match case.owner {
        Owner::Here => "this host's",
        Owner::There => "the other host's",
        Owner::Unknown => "not known",
    };
    println!("  the VM is  {owner}");
    println!("  plan       {}", case.plan);
    for left in &case.left {
        println!("  left       {left}");
    }
    if let (true, Some(id)) = (case.may_force, case.id) {
        println!(
            "  or decide  vmferry recover {id} --force here|there   (if that is wrong, the VM runs twice)"
        );
    }
}

fn journal_text(case: &Case) -> String {
    if case.journal.is_empty() { "nothing that decides it".into() } else { case.journal.join(", ") }
}

/// What is known of a decision.
enum Forced {
    Taken,
    /// Nothing was written, and nothing will be; why.
    Not(String),
    Unknown,
}

/// Decides, after the operator has typed the VM's name.
async fn force(client: &Client, id: Uuid, side: Side, yes: bool) -> anyhow::Result<Forced> {
    let seen: Recovery = client.get(&path(Some(id), !yes)).await?;
    let Some(case) = seen.cases.iter().find(|c| c.may_force) else {
        return Ok(Forced::Not(format!(
            "migration {id} is not undecided on this host; see `vmferry recover`"
        )));
    };
    let (vm, id) = (case.vm.clone().context("a case without a VM")?, case.id.unwrap_or(id));
    if !yes {
        show_case(case);
        if !confirm(&vm, side)? {
            return Ok(Forced::Not("that is not its name; nothing was changed".into()));
        }
    }
    let until = time::OffsetDateTime::now_utc().unix_timestamp() + DECISION_VALID_S;
    let request = ForceRequest { force: side, until: Some(until) };
    let forced = client.call::<_, ()>(Method::POST, &format!("/v1/recover/{id}"), &request).await;
    match forced {
        Ok(()) => {
            let whose = if side == Side::Here { "this host's" } else { "the other host's" };
            println!("decided: {vm} is {whose}");
            Ok(Forced::Taken)
        }
        Err(e) => {
            match e.downcast_ref::<NotDone>() {
                Some(refused @ NotDone::Refused { .. }) => return Ok(Forced::Not(refused.to_string())),
                Some(NotDone::Unreachable { .. }) => return Err(e),
                None => {}
            }
            eprintln!("vmferry: NOT KNOWN whether the decision over {vm} was taken: {e:#}");
            if !format!("{e:#}").contains(&unknown_remedy(id)) {
                eprintln!("vmferry: {}", unknown_remedy(id));
            }
            Ok(Forced::Unknown)
        }
    }
}

/// Whether the operator types the VM's name.
fn confirm(vm: &str, side: Side) -> anyhow::Result<bool> {
    if !std::io::stdin().is_terminal() {
        bail!("a forced decision asks for the VM's name on a terminal, or needs --yes");
    }
    let (ours, theirs, checked) = match side {
        Side::Here => (
            "will run here",
            "must never run on the other host",
            "Nobody but the other agent is asked, if it answers",
        ),
        Side::There => (
            "will never run here again",
            "runs, or is to be started, on the other host",
            "Nobody checks that",
        ),
    };
    println!("{vm} {ours}, and {theirs}. {checked}: if it is not so, it runs twice or is lost.");
    print!("Type the VM's name to go on: ");
    std::io::stdout().flush()?;
    let mut typed = String::new();
    std::io::stdin().read_line(&mut typed)?;
    Ok(typed.trim() == vm)
}
