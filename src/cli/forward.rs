//! `vmferry forward`: sockets that are carried to peers, shown, added and ended.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use hyper::Method;
use indicatif::HumanBytes;
use tokio::time::{Instant, MissedTickBehavior};
use uuid::Uuid;

use super::args::{AddForwardArgs, ForwardCommand, Limit};
use super::client::Client;
use super::{pick, show};
use crate::api::{Forward, ForwardRequest, Forwards, ShareRequest, Target, Traffic, forward_path};

const PATH: &str = "/v1/forwards";
/// Between two lines of `watch`.
const WATCH_EVERY: Duration = Duration::from_secs(1);

pub(super) async fn run(client: &Client, command: ForwardCommand) -> anyhow::Result<ExitCode> {
    match command {
        ForwardCommand::Add(args) => add(client, args).await?,
        ForwardCommand::List { json } => {
            let all: Forwards = client.get(PATH).await?;
            if json { show::json(&all)? } else { show_all(&all) }
        }
        ForwardCommand::Limit { forward, rate, weight, json } => {
            let id = find(client, &forward).await?;
            let limit_bytes_per_s = rate.map(|Limit(limit)| limit);
            let request =
                ShareRequest { limit_bytes_per_s, weight: weight.map(TryInto::try_into).transpose()? };
            let path = format!("{}/limit", forward_path(id));
            let changed: Forward = client.call(Method::POST, &path, &request).await?;
            if json {
                show::json(&changed)?
            } else {
                println!("{}: {}", name(&changed), share_text(&changed))
            }
        }
        ForwardCommand::End { forward } => {
            let id = find(client, &forward).await?;
            let path = format!("{}/end", forward_path(id));
            let ended: Forward = client.call(Method::POST, &path, &()).await?;
            println!("{} has ended; it carried {}", ended.spec.listen, traffic_text(&ended.traffic));
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn add(client: &Client, args: AddForwardArgs) -> anyhow::Result<()> {
    let request = ForwardRequest {
        listen: args.listen,
        to: args.to,
        target: args.target,
        weight: args.weight.try_into()?,
        limit_bytes_per_s: args.limit,
        urgent: args.urgent,
        owner: args.owner,
        group: args.group,
        mode: args.mode.try_into()?,
    };
    let begun: Forward = client.call(Method::POST, PATH, &request).await?;
    if args.json {
        show::json(&begun)?
    } else {
        println!("{}", begun.id);
    }
    Ok(())
}

/// The forwarding with that whole id, if it is one.
pub(super) async fn with_id(client: &Client, wanted: &str) -> anyhow::Result<Option<Uuid>> {
    let Ok(id) = wanted.parse::<Uuid>() else { return Ok(None) };
    Ok(one(client, id).await?.map(|forward| forward.id))
}

async fn one(client: &Client, id: Uuid) -> anyhow::Result<Option<Forward>> {
    let all: Forwards = client.get(PATH).await?;
    Ok(all.forwards.into_iter().find(|forward| forward.id == id))
}

/// Shows what a forwarding carries, second by second, until it ends. Ctrl-C ends the watching only.
pub(super) async fn watch(client: &Client, id: Uuid, json: bool) -> anyhow::Result<ExitCode> {
    let mut seconds = tokio::time::interval(WATCH_EVERY);
    seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before: Option<(Instant, Traffic)> = None;
    loop {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => return Ok(ExitCode::SUCCESS),
            _ = seconds.tick() => {}
        }
        let Some(forward) = one(client, id).await? else {
            if !json {
                println!("it has ended");
            }
            return Ok(ExitCode::SUCCESS);
        };
        let now = (Instant::now(), forward.traffic.clone());
        if json {
            show::json_line(&forward, false)?;
        } else {
            println!("{}: {}", name(&forward), moving_text(before.as_ref().unwrap_or(&now), &now));
            if !forward.intact {
                println!("  the socket's file is another one now: programs connect past this forwarding");
            }
        }
        before = Some(now);
    }
}

/// What has moved between two looks.
fn moving_text((at, before): &(Instant, Traffic), (until, now): &(Instant, Traffic)) -> String {
    let millis = (until.duration_since(*at).as_millis() as u64).max(1);
    let rate = |now: u64, before: u64| HumanBytes(now.saturating_sub(before).saturating_mul(1000) / millis);
    format!(
        "sends {}/s, receives {}/s, {}",
        rate(now.sent_bytes, before.sent_bytes),
        rate(now.received_bytes, before.received_bytes),
        traffic_text(now)
    )
}

fn name(forward: &Forward) -> String {
    forward.name.clone().unwrap_or_else(|| forward.spec.listen.to_string())
}

fn share_text(forward: &Forward) -> String {
    let limit = forward.spec.limit_bytes_per_s.map_or_else(|| "no limit".into(), |limit| limit.to_string());
    format!("{limit}, weight {}", u16::from(forward.spec.weight))
}

/// By its name, its id, or the beginning of that.
pub(super) async fn find(client: &Client, wanted: &str) -> anyhow::Result<Uuid> {
    let all: Forwards = client.get(PATH).await?;
    if let Some(named) = all.forwards.iter().find(|f| f.name.as_deref() == Some(wanted)) {
        return Ok(named.id);
    }
    let known = all.forwards.iter().map(|f| pick::Known { id: f.id, told: name(f) });
    pick::by_beginning(known, wanted)?.with_context(|| {
        format!("there is no forwarding {wanted}; see `vmferry forward list` for those that there are")
    })
}

fn show_all(all: &Forwards) {
    for forward in &all.forwards {
        let Forward { id, name, spec, listening, intact, traffic } = forward;
        let name = name.as_deref().unwrap_or("added");
        println!("{id} ({name}): {} to {} at {}, {}", spec.listen, spec.target, spec.to, share_text(forward));
        println!("  {}", traffic_text(traffic));
        if !listening {
            println!("  it does not listen");
        }
        if !intact {
            println!("  the socket's file is another one now: programs connect past this forwarding");
        }
    }
    for Target { name, connect, from, granted_for_s, traffic } in &all.targets {
        let whose = if from.is_empty() { "nobody".to_owned() } else { from.join(", ") };
        let until = granted_for_s.map(|s| format!(", for {s} s")).unwrap_or_default();
        println!("target {name}: {connect}, for {whose}{until}");
        println!("  {}", traffic_text(traffic));
    }
    if all.forwards.is_empty() && all.targets.is_empty() {
        println!("no forwardings and no targets");
    }
}

fn traffic_text(traffic: &Traffic) -> String {
    let Traffic { connections, opened, sent_bytes, received_bytes, stalls, failed } = traffic;
    let (sent, received) = (HumanBytes(*sent_bytes), HumanBytes(*received_bytes));
    let mut text = format!(
        "{connections} of {opened} connections open, {sent} sent, {received} received, {stalls} stalls"
    );
    for (reason, count) in failed {
        text += &format!(", {count} failed ({reason})");
    }
    text
}
