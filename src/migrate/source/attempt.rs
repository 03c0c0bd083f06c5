//! One try of a migration: Begin, which changes nothing at either host's QEMU, and then all the rest.

use std::collections::BTreeMap;

use super::clock::Clock;
use super::connect::connect;
use super::context::Context;
use super::copying::Copying;
use super::examine::{self, Examined};
use super::failure::Failure;
use super::further_try::{Ended, Held};
use super::guest::Guest;
use super::peer::Peer;
use super::state::Source;
use super::{replica, witness};
use crate::migrate::checks::disks::allocated;
use crate::migrate::guest::last_words::LastWords;
use crate::migrate::journal::{Beginning, Role};
use crate::migrate::model::phase::Phase;
use crate::migrate::model::plan::{self, Plan};
use crate::migrate::model::problem::chain;
use crate::migrate::model::progress::{DiskProgress, Downtime};
use crate::migrate::transfer::streams::Streams;

/// Runs one try of a migration from Begin to its end, which it leaves to the caller to make
/// known. The caller has reserved the VM.
pub(crate) async fn attempt(context: Context, mut held: Option<Held>) -> Option<Ended> {
    match begin(context, &mut held).await {
        Ok(source) => source.run().await,
        Err(failure) => Some(Ended { held, ..not_begun(&failure) }),
    }
}

/// The end of a try before it changed anything.
pub(crate) fn not_begun(failure: &Failure) -> Ended {
    tracing::warn!(cause = chain(failure), "migration not begun; nothing was changed");
    Ended {
        phase: Phase::Failed,
        outcome: failure.outcome(Phase::Begin, chain(failure), Vec::new()),
        may_pass: failure.may_pass(),
        handed_over: false,
        held: None,
    }
}

async fn begin(context: Context, held: &mut Option<Held>) -> Result<Source, Failure> {
    let Context { host, request, progress, .. } = &context;
    let problem = |p| Failure::Problems(vec![p]);
    let peer = host.peers.find(&request.peer).map_err(problem)?.identity.clone();
    host.may_go(&request.vm, &request.peer).map_err(problem)?;
    let options = &request.options;
    let examined = examine::source(host, &request.vm, options).await?;
    let Examined { qmp, events, disks, inventory, problems, running, .. } = examined;
    context.note_findings(request.options.policy().judge(problems).map_err(Failure::Problems)?);
    let destination = Peer::new(&context, connect(&context).await?);
    let mut retry = request.retry.clone();
    if let (Some(retry), Some(held)) = (&mut retry, &*held) {
        retry.kept = held.tracking.undo();
    }
    let beginning = Beginning {
        vm: &request.vm,
        running,
        keep_source: request.options.keep_source,
        retry,
        accepted: request.options.accept.clone(),
        witness: witness::is_wanted(host, options),
    };
    let mut journal = host.journals.begin(request.id, Role::Source, &peer, beginning)?;
    if let Err(e) = journal.note_qemu(qmp.process()) {
        tracing::error!(
            error = chain(&e),
            "which QEMU it is was not written; the next record will fail, too"
        );
    }
    let config = host.vm(&request.vm, "source").map_err(problem)?;
    let last_words = LastWords::of(&config, qmp.process(), None);
    // Now that this one tells of the bitmaps.
    let tracking = match held.take() {
        Some(held) => held.pass_on(host),
        None => replica::known(host, (&request.vm, &peer), options.replicate, qmp.process()),
    };
    let ram_expected = crate::qemu::ram_in_use(&qmp).await;
    let allocated: BTreeMap<_, _> = disks.iter().map(|d| (d.name.clone(), allocated(d, options))).collect();
    let disks = plan::copied(&disks, &options.disks, options.incremental.as_ref());
    progress.update(|p| {
        let known = |name: &str| allocated.get(name).copied().flatten();
        p.disks = disks.iter().map(|d| DiskProgress::new(&d.name, d.virtual_size, known(&d.name))).collect();
        p.whole.get_or_insert_default().ram_expected_bytes = ram_expected;
        p.paused = !running;
    });
    let guest = Guest::new((qmp, events), Some(inventory), last_words, false);
    let plan = Plan::of(disks, request.options.in_band);
    let copy = Copying::new(plan, Streams::default(), tracking);
    let clock = Clock::new(Phase::Begin, Downtime::default(), None);
    Ok(Source::new(context, destination, guest, copy, clock, journal))
}
