//! `vmferry replicate`: a replica of a VM's disks at a peer, brought into step.

use std::process::ExitCode;

use hyper::Method;

use super::args::ReplicateArgs;
use super::client::Client;
use super::watch;
use crate::api::{MigrateRequest, Migration, Options};

pub(super) async fn run(client: &Client, args: ReplicateArgs) -> anyhow::Result<ExitCode> {
    let options = Options {
        replicate: true,
        retry: args.retry.try_into()?,
        compress: args.compress,
        limit_bytes_per_s: args.limit,
        weight: args.weight.try_into()?,
        disks: args.disks.choice(),
        strict: args.strict,
        accept: args.accept.into_iter().collect(),
        ..Options::default()
    };
    let request = MigrateRequest { vm: args.vm, to: args.to, options };
    let begun: Migration = client.call(Method::POST, "/v1/migrations", &request).await?;
    if args.detach {
        println!("{}", begun.id);
        return Ok(ExitCode::SUCCESS);
    }
    watch::follow(client, begun.id, args.json).await
}
