//! What each sub-command asks of the agent and how its answer becomes an exit code.

use std::path::Path;
use std::process::ExitCode;

use anyhow::bail;
use hyper::Method;
use serde::Serialize;

use super::args::{CheckArgs, Command, MigrateArgs};
use super::client::Client;
use super::exit_code::{EXIT_FAILED, EXIT_USAGE};
use super::{
    audit, doctor, drain, forward, libvirt, limit, pick, ping, plan, qemu_command, recover, replicate,
    report, show, vms, watch,
};
use crate::api::{
    CheckReport, CheckRequest, LIBVIRT, LibvirtMigration, LibvirtStage, MigrateRequest, Migration, Options,
    Severity, Status, VmState, migration_path,
};

pub(super) async fn run(socket: &Path, command: Command) -> anyhow::Result<ExitCode> {
    let client = Client::new(socket);
    match command {
        Command::Migrate(args) => migrate(&client, args).await,
        Command::Replicate(args) => replicate::run(&client, *args).await,
        Command::Replicas { json } => replicate::list(&client, json).await,
        Command::Check(args) => check(&client, args).await,
        Command::List { json } => list(&client, json).await,
        Command::Status { what: None, json } => status(&client, json).await,
        Command::Status { what: Some(what), json } => status_of(&client, &what, json).await,
        Command::Watch { what, json } => watch_any(&client, &what, json).await,
        Command::Doctor(args) => doctor::run(&client, socket, args).await,
        Command::Ping(args) => ping::run(&client, args).await,
        Command::Qemu(args) => qemu_command::run(&client, args).await,
        Command::Report(args) => report::run(&client, args).await,
        Command::Cancel { migration } => cancel(&client, &migration).await,
        Command::Drain(args) => drain::run(&client, *args).await,
        Command::Limit(args) => limit::run(&client, args).await,
        Command::Forward(command) => forward::run(&client, command).await,
        Command::Audit(args) => audit::run(socket, args).await,
        Command::Libvirt(command) => libvirt::run(socket, command).await,
        Command::Recover(args) => recover::run(&client, args).await,
        Command::Agent { .. }
        | Command::Certs(_)
        | Command::Guest(_)
        | Command::Join(_)
        | Command::Manual { .. } => Ok(EXIT_USAGE.into()),
    }
}

/// A migration, one of libvirt's own, or a forwarding.
async fn watch_any(client: &Client, what: &str, json: bool) -> anyhow::Result<ExitCode> {
    if let Some(id) = forward::with_id(client, what).await? {
        return forward::watch(client, id, json).await;
    }
    if let Some(own) = libvirt::instead(client, what).await? {
        return libvirt::look_on(client, own.id, json).await;
    }
    match pick::migration(client, what).await {
        Ok(id) => watch::follow(client, id, json).await,
        Err(e) => match forward::find(client, what).await {
            Ok(id) => forward::watch(client, id, json).await,
            Err(_) => Err(e),
        },
    }
}

async fn migrate(client: &Client, args: MigrateArgs) -> anyhow::Result<ExitCode> {
    let options = Options {
        keep_source: args.keep_source,
        weight: args.weight.try_into()?,
        disks: args.disks.choice(),
        disks_at_once: args.disks_at_once.map(TryInto::try_into).transpose()?,
        incremental: args.incremental.disks(),
        verify: args.verify,
        compare_read_only: args.compare_read_only,
        in_band: args.in_band,
        ..args.moving.options()?
    };
    let request = MigrateRequest { vm: args.path.vm, to: args.path.to, options };
    if args.dry_run {
        return plan::run(client, &request, args.json).await;
    }
    let begun: Migration = client.call(Method::POST, "/v1/migrations", &request).await?;
    if args.detach {
        println!("{}", begun.id);
        return Ok(ExitCode::SUCCESS);
    }
    watch::follow(client, begun.id, args.json).await
}

async fn check(client: &Client, args: CheckArgs) -> anyhow::Result<ExitCode> {
    let request = CheckRequest {
        vm: args.path.vm,
        to: args.path.to,
        strict: args.judge.strict,
        accept: args.judge.accept.into_iter().collect(),
        disks: args.disks.choice(),
        verify: args.verify,
        compare_read_only: args.compare_read_only,
        incremental: args.incremental.disks(),
        in_band: args.in_band,
        never_in_band: args.never_in_band,
    };
    let report: CheckReport = client.call(Method::POST, "/v1/check", &request).await?;
    let refused = report.problems.iter().any(|p| p.severity == Severity::Problem);
    if args.json {
        show::json(&report)?;
    } else {
        let (vm, to) = (&request.vm, &request.to);
        match refused {
            true => println!("{vm} cannot be moved to {to}:"),
            false => println!("{vm} can be moved to {to}: nothing was found that would fail"),
        }
        show::problems(&report.problems);
    }
    Ok(if refused { EXIT_FAILED.into() } else { ExitCode::SUCCESS })
}

/// What `list --json` prints: what vmferry moves, and what libvirt moves by itself through the tunnel.
#[derive(Debug, Serialize)]
struct Listed {
    migrations: Vec<Migration>,
    libvirt: Vec<LibvirtMigration>,
}

async fn list(client: &Client, json: bool) -> anyhow::Result<ExitCode> {
    let migrations: Vec<Migration> = client.get("/v1/migrations").await?;
    let libvirt: Vec<LibvirtMigration> = client.get(LIBVIRT).await?;
    if json {
        show::json(&Listed { migrations, libvirt })?
    } else {
        show::list(&migrations);
        let status: Status = client.get("/v1/status").await?;
        vms::list(&status.vm_states);
        libvirt::list_beside(&libvirt);
    }
    Ok(ExitCode::SUCCESS)
}

async fn status(client: &Client, json: bool) -> anyhow::Result<ExitCode> {
    let status: Status = client.get("/v1/status").await?;
    if json {
        show::json(&status)?
    } else {
        show::agent(&status)
    }
    Ok(ExitCode::SUCCESS)
}

/// A VM and its migration, as `status VM --json` prints them.
#[derive(Debug, Serialize)]
struct VmAndMigration {
    vm: VmState,
    migration: Option<Migration>,
}

async fn status_of(client: &Client, wanted: &str, json: bool) -> anyhow::Result<ExitCode> {
    let status: Status = client.get("/v1/status").await?;
    let vm = status.vm_states.into_iter().find(|state| state.vm == wanted);
    if vm.is_none()
        && let Some(own) = libvirt::instead(client, wanted).await?
    {
        libvirt::show_one(&own, json)?;
        return Ok(ExitCode::SUCCESS);
    }
    let progress = match pick::migration(client, wanted).await {
        Ok(id) => Some(client.get::<Migration>(&migration_path(id)).await?),
        Err(_) if vm.is_some() => None,
        Err(e) => return Err(e),
    };
    match (vm, progress) {
        (Some(vm), migration) if json => show::json(&VmAndMigration { vm, migration })?,
        (None, Some(progress)) if json => show::json(&progress)?,
        (vm, progress) => {
            if let Some(vm) = vm {
                println!("{} {} ({})", vm.vm, vms::state_text(&vm), status.identity);
            }
            progress.iter().for_each(show::migration);
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn cancel(client: &Client, wanted: &str) -> anyhow::Result<ExitCode> {
    if let Some(own) = libvirt::instead(client, wanted).await?.filter(|own| own.stage != LibvirtStage::Ended)
    {
        bail!(
            "migration {} is libvirt's own: `virsh domjobabort {}` on its source aborts it, and the domain runs on there",
            own.id,
            own.domain
        );
    }
    let id = match pick::migration(client, wanted).await {
        // A VM of that name goes first.
        Err(_) if wanted == "drain" => return drain::cancel(client).await,
        picked => picked?,
    };
    client.cancel(id).await?;
    println!("{id} is being rolled back; `vmferry watch {id}` shows its end");
    Ok(ExitCode::SUCCESS)
}
