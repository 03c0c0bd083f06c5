//! `vmferry replicate`: a replica of a VM's disks at a peer, brought into step.

use std::process::ExitCode;

use hyper::Method;

use super::args::ReplicateArgs;
use super::client::Client;
use super::exit_code::EXIT_LEFT;
use super::{show, watch};
use crate::api::{EndReplicaRequest, MigrateRequest, Migration, Options, Replica, ReplicaEnd, Role};

pub(super) async fn run(client: &Client, args: ReplicateArgs) -> anyhow::Result<ExitCode> {
    if args.end {
        return end(client, &args).await;
    }
    let options = Options {
        replicate: true,
        weight: args.weight.try_into()?,
        disks: args.disks.choice(),
        ..args.carry.options()?
    };
    let request = MigrateRequest { vm: args.path.vm, to: args.path.to, options };
    let begun: Migration = client.call(Method::POST, "/v1/migrations", &request).await?;
    if args.detach {
        println!("{}", begun.id);
        return Ok(ExitCode::SUCCESS);
    }
    watch::follow(client, begun.id, args.json).await
}

async fn end(client: &Client, args: &ReplicateArgs) -> anyhow::Result<ExitCode> {
    let (vm, to, images) = (args.path.vm.clone(), args.path.to.clone(), args.remove_images);
    let request = EndReplicaRequest { vm, to, images };
    let ended: ReplicaEnd = client.call(Method::POST, "/v1/replicas/end", &request).await?;
    if args.json {
        show::json(&ended)?;
    } else {
        println!("the replica of {} on {} is ended", request.vm, request.to);
        ended.left.iter().for_each(|left| println!("left: {left}"));
    }
    Ok(if ended.left.is_empty() { ExitCode::SUCCESS } else { EXIT_LEFT.into() })
}

pub(super) async fn list(client: &Client, json: bool) -> anyhow::Result<ExitCode> {
    let all: Vec<Replica> = client.get("/v1/replicas").await?;
    if json {
        show::json_list("replicas", &all)?;
        return Ok(ExitCode::SUCCESS);
    }
    if all.is_empty() {
        println!("no replicas");
    }
    for replica in all {
        println!("{}", line(&replica));
    }
    Ok(ExitCode::SUCCESS)
}

/// One replica, as far as this host knows it.
fn line(replica: &Replica) -> String {
    let Replica { vm, peer, .. } = replica;
    if replica.role == Role::Destination {
        let images: Vec<String> = replica.images.iter().map(|path| path.display().to_string()).collect();
        let made =
            if images.is_empty() { String::new() } else { format!(", made here: {}", images.join(", ")) };
        return format!("{vm}  kept here for {peer}{made}");
    }
    let disks: Vec<String> = replica
        .disks
        .iter()
        .map(|disk| match disk.in_step {
            true => disk.name.clone(),
            false => format!("{} (the next run copies all of it)", disk.name),
        })
        .collect();
    let when = replica.in_step_at.map_or_else(|| "never yet".to_owned(), show::when);
    format!("{vm}  on {peer}, last in step {when}: {}", disks.join(", "))
}
