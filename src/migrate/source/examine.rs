//! Begin: questions to the source's QEMU and to the destination. Changes nothing.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::failure::Failure;
use super::{trial, verify, witness};
use crate::migrate::checks::disks::in_band;
use crate::migrate::checks::{descriptors, disks, machine, qemu};
use crate::migrate::guest::inventory::Inventory;
use crate::migrate::guest::process;
use crate::migrate::host::{AskError, Host};
use crate::migrate::model::options::Options;
use crate::migrate::model::plan;
use crate::migrate::model::problem::{Policy, Problem, ProblemKind, chain};
use crate::migrate::model::role::Role;
use crate::migrate::protocol::client::{Link, LinkError};
use crate::migrate::protocol::message::{
    NEEDS_HASHES, NEEDS_IN_BAND, NEEDS_INCREMENTAL, NEEDS_READ_ONLY, NEEDS_REPLICA, Offer, Request, Response,
};
use crate::net::session::Session;
use crate::qemu::{
    Abilities, Disk, Events, MigrationStatus, Qmp, QmpError, QueryMigrate, QueryStatus, RunState,
};

/// So many of QEMU's reasons are shown.
const BLOCKERS_SHOWN_MAX: usize = 32;

/// A source's QEMU, asked.
pub(crate) struct Examined {
    pub(crate) qmp: Qmp,
    pub(crate) events: Events,
    pub(crate) disks: Vec<Disk>,
    /// Taken before the disks: what is plugged in between is found out.
    pub(crate) inventory: Inventory,
    pub(crate) running: bool,
    pub(crate) qemu: String,
    pub(crate) problems: Vec<Problem>,
}

impl Examined {
    pub(crate) fn offer(&self, vm: &str, options: &Options) -> Offer {
        Offer {
            vm: vm.into(),
            disks: disks::offered(&self.disks, options),
            flash: disks::offered_flash(&self.disks),
            running: self.running,
            qemu: self.qemu.clone(),
            after: None,
            compress: false,
            policy: Policy::default(),
            machine: None,
            audit_head: None,
            in_band: options.in_band,
            hears_busy: false,
            witness: None,
            needs: needs(options),
        }
    }
}

/// What a destination has to know for these options: it is found out before anything is changed.
pub(crate) fn needs(options: &Options) -> BTreeSet<String> {
    let hashes = options.verify.map(|_| NEEDS_HASHES);
    let incremental = options.incremental.as_ref().map(|_| NEEDS_INCREMENTAL);
    let replica = options.replicate.then_some(NEEDS_REPLICA);
    let in_band = options.in_band.map(|_| NEEDS_IN_BAND);
    let read_only = options.compare_read_only.then_some(NEEDS_READ_ONLY);
    let needs = [hashes, incremental, replica, in_band, read_only];
    needs.into_iter().flatten().map(str::to_owned).collect()
}

/// Asks the source's QEMU everything that would make a migration fail.
pub(crate) async fn source(host: &Host, name: &str, options: &Options) -> Result<Examined, Failure> {
    let config = host.vm(name, "source").map_err(|p| Failure::Problems(vec![p]))?;
    let (qmp, events) = process::connect(&config).await.map_err(|e| {
        let text = format!("the QEMU of VM {name} cannot be asked: {}", chain(&e));
        let remedy = "check that it runs and that `qmp` names a monitor that nobody else uses";
        Failure::Problems(vec![Problem::new(ProblemKind::QemuUnreachable, text, remedy)])
    })?;
    let abilities = Abilities::ask(&qmp).await?;
    let status = qmp.execute(QueryStatus).await?.status;
    let inventory = Inventory::of(&qmp).await?;
    let disks = crate::qemu::disks(&qmp).await?;
    let mut problems = qemu::abilities_missing(&abilities, Role::Source);
    if options.in_band.is_none() && !plan::copied(&disks, &options.disks, None).is_empty() {
        problems.extend(qemu::nbd_missing(&abilities, Role::Source));
    }
    let migration = qmp.execute(QueryMigrate).await?.status;
    problems.extend(state_problem(name, &status, &migration));
    problems.extend(qemu::busy(&qmp, name).await?);
    problems.extend(left_over(&qmp, name).await?);
    problems.extend(disks::source_findings(&qmp, &disks, options).await?);
    if options.verify.is_some() || options.incremental.is_some() || options.compare_read_only {
        problems.extend(verify::hindrance(&qmp).await?);
    }
    if let Some(how) = options.in_band {
        problems.extend(in_band::contradictions(how, options));
        problems.extend(in_band::source_findings(&qmp, &abilities, &disks, how).await?);
    }
    problems.extend(descriptors::findings(&qmp, "source", disks.len()));
    problems.extend(blocked(&qmp, name).await?);
    let (major, minor, micro) = abilities.version;
    let version = format!("QEMU {major}.{minor}.{micro}");
    Ok(Examined {
        qmp,
        events,
        disks,
        inventory,
        running: status == RunState::Running,
        qemu: version,
        problems,
    })
}

fn state_problem(name: &str, status: &RunState, migration: &MigrationStatus) -> Option<Problem> {
    let remedy = match status {
        RunState::Running | RunState::Paused => return None,
        RunState::InMigrate => {
            "this is a QEMU that waits for a migration: move the VM from the host where it runs"
        }
        // QEMU 7.2 leaves a guest so that was paused before its migration was cancelled.
        RunState::PostMigrate
            if matches!(migration, MigrationStatus::Cancelled | MigrationStatus::Failed) =>
        {
            "it did not move and is paused here; its QEMU takes no further migration until it was continued once: \
             `cont` it, and `stop` it again if it is to stay paused"
        }
        RunState::PostMigrate => {
            "an earlier migration paused it for good: if `vmferry list` shows that it moved, end this QEMU; \
             only if that one failed, `cont` it"
        }
        _ => "bring it to running or paused first",
    };
    let text = format!("VM {name} is in state {status} at the source");
    Some(Problem::new(ProblemKind::SourceState, text, remedy))
}

/// What an earlier migration has left in a QEMU, and the next one would meet.
async fn left_over(qmp: &Qmp, name: &str) -> Result<Vec<Problem>, QmpError> {
    let nodes = crate::qemu::leftovers(qmp).await?.nodes;
    if nodes.is_empty() {
        return Ok(Vec::new());
    }
    let text =
        format!("an earlier migration has left block nodes in the QEMU of VM {name}: {}", nodes.join(", "));
    let remedy = "`vmferry recover` takes away what this host's journals tell of; end the others with \
                  `blockdev-del`";
    Ok(vec![Problem::new(ProblemKind::Busy, text, remedy)])
}

/// What QEMU itself says stands in the way.
async fn blocked(qmp: &Qmp, name: &str) -> Result<Vec<Problem>, QmpError> {
    let reasons = qmp.execute(QueryMigrate).await?.blocked_reasons;
    let remedy = "take what QEMU names out of the guest, or move the VM while it is shut down";
    let problem = |reason: &String| {
        let text = format!("the source's QEMU cannot migrate VM {name} as it is: {reason}");
        Problem::new(ProblemKind::MigrationBlocked, text, remedy)
    };
    Ok(reasons.iter().take(BLOCKERS_SHOWN_MAX).map(problem).collect())
}

/// Tries whether QEMU would migrate, unless it is known already that it would not.
async fn tried(examined: &Examined, name: &str) -> Vec<Problem> {
    if examined.problems.iter().any(Problem::is_refusal) {
        return Vec::new();
    }
    match trial::try_and_restore(&examined.qmp, name).await {
        Ok(found) => found,
        Err(e) => problems_of(e.into()),
    }
}

/// `vmferry check`: everything that would fail, from both sides; changes nothing.
pub async fn check(host: &Arc<Host>, vm: &str, peer: &str, options: &Options) -> Vec<Problem> {
    let found = options.policy().applied(findings(host, vm, peer, options).await);
    let Some((options, said)) = in_band::instead(&found, options) else { return found };
    let again = [vec![said], findings(host, vm, peer, &options).await].concat();
    in_band::settled(found, options.policy().applied(again))
}

async fn findings(host: &Arc<Host>, vm: &str, peer: &str, options: &Options) -> Vec<Problem> {
    // The peer's name is judged below, with what else there is to say of it.
    if let Err(problem) = host.may_go(vm, peer)
        && problem.kind == ProblemKind::NotSent
    {
        return vec![problem];
    }
    let _not_meanwhile = match host.reserve_for_task(vm, "a check") {
        Ok(reservation) => reservation,
        Err(problem) => return vec![problem],
    };
    let (mut problems, offer) = match source(host, vm, options).await {
        Ok(examined) => {
            let tried = tried(&examined, vm).await;
            let mut offer = examined.offer(vm, options);
            let mut problems = examined.problems;
            problems.extend(tried);
            match machine::ask(&examined.qmp, "source").await {
                Ok(machine) => offer.machine = Some(machine),
                Err(problem) => problems.push(problem),
            }
            match witness::look(host, options).await {
                Ok(witness) => offer = offer.with_witness(witness),
                Err(problem) => problems.push(problem),
            }
            (problems, Some(offer))
        }
        Err(failure) => (problems_of(failure), None),
    };
    match host.peers.session(peer).await {
        Err(AskError::Connect { source, .. }) => problems.push(host.peers.connect_problem(peer, &source)),
        Err(error) => problems.extend(problems_of(error.into())),
        // The destination has nothing to say to a VM that the source does not know.
        Ok(session) => {
            if let Some(offer) = offer {
                problems.extend(ask(&session, offer, host.config.deadlines.prepare()).await);
            }
        }
    }
    problems
}

async fn ask(session: &Session, offer: Offer, deadline: Duration) -> Vec<Problem> {
    let leaves_out = offer.disks.iter().any(|disk| disk.left_out);
    let bitmaps = disks::bitmaps::unknown_there(&offer.disks);
    let asked = async {
        let mut link = Link::open(session, Uuid::new_v4()).await?;
        let answer = link.ask(Request::Check(offer), deadline).await?;
        link.finish();
        match answer {
            Response::Checked(problems) => Ok(problems),
            _ => Err(LinkError::Unexpected { request: "check" }),
        }
    };
    match asked.await {
        Ok(mut problems) => {
            // One that knows of such disks says something of each, unless it refuses for another reason.
            let knows = problems.iter().any(|p| p.is_refusal() || p.kind == ProblemKind::DiskLeftOut);
            if leaves_out && !knows {
                problems.push(leaves_none_out());
            }
            let is_of_bitmaps =
                |kind| matches!(kind, ProblemKind::BitmapsCarried | ProblemKind::BitmapsDropped);
            if !problems.iter().any(|p| p.is_refusal() || is_of_bitmaps(p.kind)) {
                problems.extend(bitmaps);
            }
            problems
        }
        Err(LinkError::Refused(refusal)) if !refusal.problems.is_empty() => refusal.problems,
        Err(e) => {
            vec![Problem::new(ProblemKind::PeerUnreachable, chain(&e), "look at the destination agent's log")]
        }
    }
}

/// An older agent would export such a disk for a copy that never comes.
pub(crate) fn leaves_none_out() -> Problem {
    let text = "the destination's agent does not know disks that are not copied: it is older than this one";
    let remedy = "install this version of vmferry there as well, or copy all disks";
    Problem::new(ProblemKind::DiskLeftOut, text, remedy)
}

fn problems_of(failure: Failure) -> Vec<Problem> {
    match failure {
        Failure::Problems(problems) => problems,
        other => vec![Problem::new(ProblemKind::Other, chain(&other), "look at the agent's log")],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_did_not_move_may_be_continued_and_one_that_did_may_not() {
        let remedy = |migration| {
            let problem = state_problem("web1", &RunState::PostMigrate, &migration);
            problem.map(|problem| problem.remedy).unwrap_or_default()
        };
        assert!(remedy(MigrationStatus::Cancelled).contains("it did not move"));
        assert!(
            remedy(MigrationStatus::Completed)
                .contains("if `vmferry list` shows that it moved, end this QEMU")
        );
    }
}
