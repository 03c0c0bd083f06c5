//! `vmferry forward`: sockets that are carried to peers, shown, added and ended.

use std::process::ExitCode;

use anyhow::{Context, bail};
use hyper::Method;
use indicatif::HumanBytes;
use uuid::Uuid;

use super::args::{AddForwardArgs, ForwardCommand};
use super::client::Client;
use super::show;
use crate::api::{Forward, ForwardRequest, Forwards, Target, Traffic, end_forward_path};

const PATH: &str = "/v1/forwards";

pub(super) async fn run(client: &Client, command: ForwardCommand) -> anyhow::Result<ExitCode> {
    match command {
        ForwardCommand::Add(args) => add(client, args).await?,
        ForwardCommand::List { json } => {
            let all: Forwards = client.get(PATH).await?;
            if json { show::json(&all)? } else { show_all(&all) }
        }
        ForwardCommand::End { forward } => {
            let id = find(client, &forward).await?;
            let ended: Forward = client.call(Method::POST, &end_forward_path(id), &()).await?;
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

/// By its name, its id, or the beginning of that.
async fn find(client: &Client, wanted: &str) -> anyhow::Result<Uuid> {
    let all: Forwards = client.get(PATH).await?;
    if let Some(named) = all.forwards.iter().find(|f| f.name.as_deref() == Some(wanted)) {
        return Ok(named.id);
    }
    let mut found = all.forwards.iter().filter(|f| f.id.to_string().starts_with(wanted));
    let first = found.next().with_context(|| {
        format!("there is no forwarding {wanted}; see `vmferry forward list` for those that there are")
    })?;
    if found.next().is_some() {
        bail!("several forwardings begin with {wanted}; write more of the id");
    }
    Ok(first.id)
}

fn show_all(all: &Forwards) {
    for forward in &all.forwards {
        let Forward { id, name, spec, listening, intact, traffic } = forward;
        let name = name.as_deref().unwrap_or("added");
        println!("{id} ({name}): {} to {} at {}", spec.listen, spec.target, spec.to);
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
