//! What a destination asks itself before it changes anything: may this peer send this VM here,
//! and could the QEMU that waits for it take it? `vmferry check` ends with these answers.

use std::path::PathBuf;
use std::sync::Arc;

use uuid::Uuid;

use super::end::never_ran;
use super::error::Error;
use super::settling::never_begun;
use super::state::beginning;
use super::{created_images, exports, witness};
use crate::config::{CreateConfig, Start, VmConfig};
use crate::migrate::checks::disks::in_band;
use crate::migrate::checks::{descriptors, disks, machine, qemu};
use crate::migrate::guest::process;
use crate::migrate::guest::start_order::{PlacedDisk, StartOrder};
use crate::migrate::host::{Host, vm_state};
use crate::migrate::journal::{Role as JournalRole, Undo};
use crate::migrate::model::leftover::Leftover;
use crate::migrate::model::problem::{Problem, ProblemKind, chain};
use crate::migrate::model::role::Role;
use crate::migrate::protocol::message::Offer;
use crate::net::identity::Identity;
use crate::qemu::{Abilities, Qmp, QmpError, QueryMigrate, QueryStatus, disks_on_made};

/// May this peer send this VM here, and could it? A QEMU that is there is looked at until a migration wants
/// the VM.
pub(crate) async fn check(host: &Arc<Host>, peer: &Identity, offer: &Offer) -> Result<Vec<Problem>, Error> {
    let problem = |p| Error::Problems(vec![p]);
    let config = host.vm_from(peer, &offer.vm).map_err(problem)?;
    if let Some(refused) = host.not_acceptable(peer, offer) {
        return Err(problem(refused));
    }
    if let Some(found) = witness::finding(host, peer, offer).await {
        return Err(problem(found));
    }
    let looking = host.look(&offer.vm).map_err(problem)?;
    let looked = async {
        match process::connect(&config).await {
            Ok((qmp, _events)) => Ok(Ok(target_problems(&qmp, offer, Vec::new()).await?)),
            Err(e) => Ok::<_, Error>(Err(e)),
        }
    };
    let seen = tokio::select! {
        biased;
        Some(holder) = looking.taken() => return Err(problem(host.busy(&offer.vm, holder))),
        seen = looked => seen?,
    };
    drop(looking);
    match (seen, &config.start) {
        (Ok(problems), _) => Ok(problems),
        // Its disks are known only to a QEMU: one is started for the questions and ended again.
        (Err(e), Some(start)) if e.is_not_listening() => {
            let place = tokio::select! {
                place = host.check_turns.start(peer) => place,
                () = host.freeze.begun() => None,
                () = host.stopping.cancelled() => None,
            };
            let _place = place.ok_or_else(|| problem(others_start(host, peer)))?;
            let _not_meanwhile = host.reserve_for_task(&offer.vm, "a check").map_err(problem)?;
            match host.config.create_for(&config) {
                None => {
                    start_and_look(host, offer, (&config, start), (&[], Vec::new()), Uuid::new_v4()).await
                }
                Some(create) => made_and_looked(host, peer, offer, (&config, start), create).await,
            }
        }
        (Err(e), _) => Err(problem(unreachable(&offer.vm, &chain(&e)))),
    }
}

fn others_start(host: &Host, peer: &Identity) -> Problem {
    let text = format!("{} starts QEMUs for other checks of {peer}", host.identity);
    Problem::new(ProblemKind::Busy, text, "wait for these checks")
}

/// With the images that a migration would make, for as long as it takes. A journal tells of them.
async fn made_and_looked(
    host: &Arc<Host>,
    peer: &Identity,
    offer: &Offer,
    (config, start): (&VmConfig, &Start),
    create: &CreateConfig,
) -> Result<Vec<Problem>, Error> {
    let purpose = Uuid::new_v4();
    let mut journal = host.journals.begin(purpose, JournalRole::Destination, peer, beginning(offer))?;
    let looked = async {
        let disks = created_images::make(&host.config, create, offer, &mut journal, false).await?;
        journal.will_make(Undo::Qemu)?;
        let made = created_images::present(journal.past());
        start_and_look(host, offer, (config, start), (&disks, made), purpose).await
    };
    let looked = looked.await;
    let mut left = never_begun(host, &mut journal).await;
    let images = created_images::remove_all(&host.config, journal.past()).await;
    left.extend(images.into_iter().map(Leftover::from));
    let is_clean = left.is_empty();
    let outcome = never_ran(&Error::Checked, left);
    match is_clean {
        true => host.journals.forget(journal, outcome),
        false => host.journals.end(journal, outcome),
    }
    looked
}

async fn start_and_look(
    host: &Host,
    offer: &Offer,
    (config, start): (&VmConfig, &Start),
    (disks, made): (&[PlacedDisk], Vec<PathBuf>),
    purpose: Uuid,
) -> Result<Vec<Problem>, Error> {
    let problem = |p| Error::Problems(vec![p]);
    let order = StartOrder { vm: &offer.vm, config, how: start, disks };
    let started = process::start(&host.config, &order, purpose).await;
    let (started, qmp, _events) = started.map_err(|e| problem(unreachable(&offer.vm, &chain(&e))))?;
    let problems = target_problems(&qmp, offer, made).await;
    started.stop(&qmp).await?;
    problems.map_err(Error::from)
}

/// Nobody answers at the monitor where a waiting QEMU should be.
pub(crate) fn unreachable(vm: &str, why: &str) -> Problem {
    let text = format!("no QEMU waits for VM {vm} at the destination: {why}");
    let remedy =
        format!("start one with `-incoming defer -S`, or give [vm.{vm}] a `start` so that the agent can");
    Problem::new(ProblemKind::TargetNotWaiting, text, remedy)
}

/// What keeps the QEMU that was found from taking this VM, on images of which this agent has just made these.
pub(crate) async fn target_problems(
    qmp: &Qmp,
    offer: &Offer,
    made: Vec<PathBuf>,
) -> Result<Vec<Problem>, QmpError> {
    let status = qmp.execute(QueryStatus).await?.status;
    let migration = qmp.execute(QueryMigrate).await?.status;
    if let Some(problem) = vm_state::not_waiting(&offer.vm, &status, &migration) {
        return Ok(vec![problem]);
    }
    let abilities = Abilities::ask(qmp).await?;
    let mut problems = qemu::abilities_missing(&abilities, Role::Destination);
    if exports::exports(offer).len() + exports::compared(offer).len() > 0 {
        problems.extend(qemu::nbd_missing(&abilities, Role::Destination));
    }
    problems.extend(qemu::busy(qmp, &offer.vm).await?);
    let present = disks_on_made(qmp, made).await?;
    problems.extend(disks::destination_findings(qmp, offer, &present).await?);
    if let Some(how) = offer.in_band {
        problems.extend(in_band::destination_findings(how, &abilities, offer, &present));
    }
    problems.extend(machine::findings(qmp, offer).await?);
    problems.extend(descriptors::findings(qmp, "destination", offer.disks.len()));
    Ok(problems)
}
