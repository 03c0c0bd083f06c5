//! `vmferry drain`: begun, planned, followed, cancelled. Whatever happens to this process, the drain goes on: it
//! belongs to the agent.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hyper::Method;
use indicatif::HumanBytes;
use serde_json::Value;

use super::args::DrainArgs;
use super::client::{Client, Lines};
use super::exit_code::{EXIT_FAILED, EXIT_LEFT, EXIT_UNDECIDED};
use super::{plan, show};
use crate::api::{DRAIN, DrainPlan, DrainResult, DrainStage, DrainStatus, DrainVm, DrainVmState, PlannedVm};

/// How long an agent that has gone is waited for.
const REATTACH_WITHIN: Duration = Duration::from_secs(30);
/// Between two looks for it.
const REATTACH_EVERY: Duration = Duration::from_millis(250);
/// A second Ctrl-C within this time confirms the first.
const CONFIRM_WITHIN: Duration = Duration::from_secs(10);

pub(super) async fn run(client: &Client, args: DrainArgs) -> anyhow::Result<ExitCode> {
    if args.cancel {
        return cancel(client).await;
    }
    if args.status {
        let status: DrainStatus = client.get(DRAIN).await?;
        match args.json {
            true => show::json(&status)?,
            false => show_all(&status),
        }
        return Ok(exit_code(&status));
    }
    let (dry_run, detach, json) = (args.dry_run, args.detach, args.json);
    let until = args.within.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let request = request(args)?;
    if dry_run {
        let plan: DrainPlan = client.call(Method::POST, &format!("{DRAIN}/plan"), &request).await?;
        match json {
            true => show::json(&plan)?,
            false => show_plan(&plan),
        }
        let all_go = plan.stay.is_empty() && plan.vms.iter().all(|vm| vm.to.is_some());
        return Ok(if all_go { ExitCode::SUCCESS } else { EXIT_FAILED.into() });
    }
    let begun: DrainStatus = client.call(Method::POST, DRAIN, &request).await?;
    if detach {
        println!("{}", begun.id);
        return Ok(ExitCode::SUCCESS);
    }
    if !json {
        show_beginning(&begun);
    }
    follow(client, json, until).await
}

/// What the agent is asked. The ranges are the agent's to judge.
fn request(args: DrainArgs) -> anyhow::Result<Value> {
    let options = args.moving.options()?;
    Ok(serde_json::json!({
        "to": args.to, "vms": args.vms, "except": args.except, "at_once": args.at_once, "options": options,
    }))
}

pub(super) async fn cancel(client: &Client) -> anyhow::Result<ExitCode> {
    client.call::<_, ()>(Method::POST, &format!("{DRAIN}/cancel"), &()).await?;
    println!("the drain is being cancelled; `vmferry drain --status` shows its end");
    Ok(ExitCode::SUCCESS)
}

fn exit_code(status: &DrainStatus) -> ExitCode {
    match status.result {
        None | Some(DrainResult::Moved) => ExitCode::SUCCESS,
        Some(DrainResult::Left) => EXIT_LEFT.into(),
        Some(DrainResult::Incomplete | DrainResult::Cancelled) => EXIT_FAILED.into(),
        Some(DrainResult::Undecided) => EXIT_UNDECIDED.into(),
    }
}

/// To its end; at `until` it is cancelled.
async fn follow(client: &Client, json: bool, mut until: Option<Instant>) -> anyhow::Result<ExitCode> {
    let events = format!("{DRAIN}/events");
    let mut lines = client.lines(&events).await?;
    let (mut said, mut asked) = (BTreeMap::new(), None::<Instant>);
    let last = loop {
        tokio::select! {
            status = lines.next::<DrainStatus>() => match status {
                Ok(Some(status)) => {
                    if json {
                        show::json_line(&status, status.stage == DrainStage::Ended)?;
                    } else {
                        say_changes(&status, &mut said);
                    }
                    if status.stage == DrainStage::Ended {
                        break status;
                    }
                }
                gone => lines = reattach(client, &events, gone.err()).await?,
            },
            () = at(until) => {
                eprintln!("its time is over: cancelling…");
                until = None;
                ask_to_cancel(client).await;
            }
            interrupt = tokio::signal::ctrl_c() => {
                interrupt?;
                if asked.is_some_and(|first| first.elapsed() < CONFIRM_WITHIN) {
                    eprintln!("cancelling…");
                    ask_to_cancel(client).await;
                } else {
                    eprintln!("press Ctrl-C again within 10 s to cancel the drain; it goes on otherwise");
                }
                asked = Some(Instant::now());
            }
        }
    };
    if !json {
        show_end(&last);
    }
    Ok(exit_code(&last))
}

/// A moment; never without one.
async fn at(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until.into()).await,
        None => std::future::pending().await,
    }
}

async fn ask_to_cancel(client: &Client) {
    if let Err(e) = client.call::<_, ()>(Method::POST, &format!("{DRAIN}/cancel"), &()).await {
        eprintln!("not cancelled: {e:#}");
    }
}

/// Waits for an agent that is restarted, which takes moments.
async fn reattach(client: &Client, events: &str, cause: Option<anyhow::Error>) -> anyhow::Result<Lines> {
    eprintln!("the agent has gone; waiting for it to come back");
    let since = Instant::now();
    loop {
        tokio::time::sleep(REATTACH_EVERY).await;
        match client.lines(events).await {
            Ok(lines) => return Ok(lines),
            Err(e) if since.elapsed() > REATTACH_WITHIN => {
                let settled =
                    "the agent is gone; the drain goes on when it is back: `vmferry drain --status`";
                return Err(cause.unwrap_or(e).context(settled));
            }
            Err(_) => {}
        }
    }
}

/// A line for each VM whose state has changed, and for what keeps the drain from going on.
fn say_changes(status: &DrainStatus, said: &mut BTreeMap<String, String>) {
    let vms = status.vms.iter().filter(|vm| vm.state != DrainVmState::Waiting || !vm.tries.is_empty());
    let lines = vms.map(|vm| (vm.vm.clone(), vm_text(vm)));
    let trouble = status.trouble.iter().map(|text| (String::new(), format!("WAITS: {text}")));
    for (about, line) in lines.chain(trouble) {
        if said.get(&about) != Some(&line) {
            eprintln!("{line}");
            said.insert(about, line);
        }
    }
}

fn vm_text(vm: &DrainVm) -> String {
    let name = &vm.vm;
    let (peer, cause) =
        (vm.peer.as_deref().unwrap_or("another host"), vm.cause.as_deref().unwrap_or_default());
    match vm.state {
        DrainVmState::Waiting => match vm.tries.last() {
            None => format!("{name} waits"),
            Some(tried) => {
                format!("{name} did not get to {}, and waits for another: {}", tried.peer, tried.cause)
            }
        },
        DrainVmState::Busy => format!("{name} is part of a migration that was under way before"),
        DrainVmState::Moving => format!("{name} → {peer}"),
        DrainVmState::Moved if vm.left => {
            format!("{name} is on {peer}; something is left: `vmferry recover`")
        }
        DrainVmState::Moved => format!("{name} is on {peer}"),
        DrainVmState::Undecided => format!("{name} UNDECIDED between here and {peer}: {cause}"),
        DrainVmState::Stays => format!("{name} stays: {cause}"),
    }
}

fn show_beginning(status: &DrainStatus) {
    println!(
        "drain {}: {} VMs, {} at once, {} to each peer",
        status.id,
        status.vms.len(),
        status.at_once,
        status.at_once_per_peer
    );
    println!("  order: {}", status.order);
    for (at, vm) in status.vms.iter().enumerate() {
        println!("  {:3}. {:16} {}", at + 1, vm.vm, size(vm.disk_bytes));
    }
}

fn size(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "size not known".to_owned(), |bytes| HumanBytes(bytes).to_string())
}

fn show_all(status: &DrainStatus) {
    println!("drain {}", status.id);
    status.vms.iter().for_each(|vm| println!("  {}", vm_text(vm)));
    for peer in &status.peers {
        let aside = peer.set_aside.as_ref().map(|cause| format!("; asked last: {cause}"));
        println!("  peer {}: {} on their way{}", peer.name, peer.under_way, aside.unwrap_or_default());
    }
    if let Some(trouble) = &status.trouble {
        println!("  WAITS: {trouble}");
    }
    show_end(status);
}

fn show_end(status: &DrainStatus) {
    let count = |state| status.count(state);
    let (moved, stays) = (count(DrainVmState::Moved), count(DrainVmState::Stays));
    let (undecided, all) = (count(DrainVmState::Undecided), status.vms.len());
    let head = match (status.stage, status.result) {
        (DrainStage::UnderWay, _) => "under way",
        (DrainStage::Cancelling, _) => "being cancelled",
        (DrainStage::Ended, Some(DrainResult::Cancelled)) => "cancelled",
        (DrainStage::Ended, _) => "ended",
    };
    println!("{head}: {moved} of {all} VMs moved, {stays} stay, {undecided} undecided");
    if status.stage != DrainStage::Ended {
        return;
    }
    match &status.here_at_end[..] {
        [] => println!("this host is empty"),
        left => println!("this host is not empty: {}", left.join(", ")),
    }
    if undecided > 0 {
        println!("`vmferry recover` says what is known of those that are undecided");
    }
}

fn show_plan(plan: &DrainPlan) {
    println!("{} at once, {} to each peer; order: {}", plan.at_once, plan.at_once_per_peer, plan.order);
    for (at, vm) in plan.vms.iter().enumerate() {
        show_planned(at + 1, vm);
    }
    plan.stay.iter().for_each(|vm| println!("     {}", vm_text(vm)));
    if plan.vms.is_empty() && plan.stay.is_empty() {
        println!("no VM of the selection is here");
    }
}

fn show_planned(at: usize, vm: &PlannedVm) {
    let to = vm.to.as_ref().map_or_else(|| "stays: no peer takes it".to_owned(), |peer| format!("→ {peer}"));
    println!("{at:3}. {:16} {:>12} {to}", vm.vm, size(vm.disk_bytes));
    vm.foretold.iter().flat_map(plan::lines).for_each(|line| println!("     {line}"));
    for check in vm.checks.iter().filter(|check| !check.problems.is_empty()) {
        println!("     {} to {}:", vm.vm, check.peer);
        show::problems(&check.problems);
    }
}
