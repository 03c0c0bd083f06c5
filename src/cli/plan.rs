//! `vmferry migrate --dry-run`: what a migration would do.

use std::process::ExitCode;
use std::time::Duration;

use hyper::Method;
use indicatif::{HumanBytes, HumanDuration};

use super::client::Client;
use super::exit_code::EXIT_FAILED;
use super::show;
use crate::api::{Foretold, MigrateRequest, MigrationPlan, Prediction};

pub(super) async fn run(client: &Client, request: &MigrateRequest, json: bool) -> anyhow::Result<ExitCode> {
    let plan: MigrationPlan = client.call(Method::POST, "/v1/migrations/plan", request).await?;
    if json {
        show::json(&plan)?;
    } else {
        let (vm, to) = (&request.vm, &request.to);
        match &plan.foretold {
            None => println!("{vm} cannot be moved to {to}:"),
            Some(foretold) => {
                println!("{vm} can be moved to {to}; nothing was begun");
                lines(foretold).iter().for_each(|line| println!("  {line}"));
            }
        }
        show::problems(&plan.problems);
    }
    Ok(if plan.foretold.is_none() { EXIT_FAILED.into() } else { ExitCode::SUCCESS })
}

/// What is to be expected, in lines.
pub(super) fn lines(foretold: &Foretold) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(guest) = &foretold.guest {
        lines.extend(guest.disks.iter().map(|disk| {
            let all = HumanBytes(disk.virtual_bytes);
            match disk.allocated_bytes {
                _ if disk.changed_bytes.is_some() => format!(
                    "disk {}: {} of {all} changed since its replica there was in step; no more is copied, if its image \
                     there is as it was left",
                    disk.disk,
                    HumanBytes(disk.changed_bytes.unwrap_or_default())
                ),
                Some(bytes) => format!("disk {}: {} of {all} are allocated", disk.disk, HumanBytes(bytes)),
                None => format!("disk {}: {all}", disk.disk),
            }
        }));
        if let Some(bytes) = guest.ram_bytes {
            let changes = guest.ram_dirty_bytes_per_s;
            let changes = changes.map(|rate| format!(", of which the guest changes {}/s", HumanBytes(rate)));
            lines.push(format!("RAM: {} at most{}", HumanBytes(bytes), changes.unwrap_or_default()));
        }
    }
    if let Some(rate) = foretold.bytes_per_s {
        lines
            .push(format!("{}/s go to the destination, as measured now and within limits", HumanBytes(rate)));
    }
    lines.push(match (&foretold.prediction, &foretold.cause) {
        (Some(prediction), _) => told(prediction),
        (None, cause) => {
            format!("nothing can be foretold: {}", cause.as_deref().unwrap_or("it is not known why"))
        }
    });
    lines
}

fn told(prediction: &Prediction) -> String {
    let bytes = HumanBytes(prediction.bytes);
    if prediction.outruns {
        return format!(
            "{bytes} and more: the guest changes its RAM faster than it would be copied, so that it would not end \
             by itself. Slow it down with --auto-converge, or allow a longer pause (--downtime-limit)"
        );
    }
    let time = prediction.seconds.map(|seconds| match seconds {
        0..=119 => format!("{seconds} s"),
        _ => HumanDuration(Duration::from_secs(seconds)).to_string(),
    });
    let pause = prediction.downtime_ms.unwrap_or_default();
    let time = time.unwrap_or_else(|| "more than a month".to_owned());
    format!(
        "about {bytes} in about {time}, and a pause of about {pause} ms for the rest of the RAM, commands and the start \
         at the destination aside"
    )
}
