//! Prepare: the source's QEMU is tried, and the destination gets ready for what it is offered.

use std::collections::BTreeSet;

use super::failure::Failure;
use super::state::Source;
use super::{examine, read_only, trial, witness};
use crate::audit::{Event, Grant, head_of_peer};
use crate::migrate::checks::{disks, machine};
use crate::migrate::protocol::client::LinkError;
use crate::migrate::protocol::message::{DiskSpec, Export, Offer, Prepared, Request, Response};
use crate::qemu::EXPORT_NAME_BYTES_MAX;

pub(crate) async fn prepare(source: &mut Source) -> Result<(), Failure> {
    if !source.context.request.options.replicate {
        trial::rehearse(&source.context, &source.guest.qmp, &mut source.journal).await?;
    }
    let offer = offer(source).await?.with_witness(witness::offer(&source.context).await?);
    let offered = offer.witness.clone();
    let left_out = offer.disks.iter().any(|disk| disk.left_out);
    let disks = offer.disks.clone();
    let mut grant = ask(source, offer).await?;
    if let Some(accepted) = &mut grant.bitmaps {
        disks::bitmaps::keep_offered(accepted, &disks);
    }
    if left_out && !grant.leaves_out {
        return Err(Failure::Problems(vec![examine::leaves_none_out()]));
    }
    if !are_of_these(&grant.exports, &disks) || !source.copy.plan.is_granted(&grant.exports) {
        return Err(LinkError::Unexpected { request: "prepare" }.into());
    }
    if grant.bitmaps.is_none() {
        let unknown = disks::bitmaps::unknown_there(&disks);
        let said = source.context.request.options.policy().judge(unknown).map_err(Failure::Problems)?;
        source.context.note_findings(said);
    }
    witness::agree(source, offered, &grant)?;
    tracing::info!(destination = grant.qemu, "the destination is prepared");
    let (context, tracking) = (&source.context, &mut source.copy.tracking);
    if context.request.options.compress && !grant.compress {
        let text = "the destination's agent does not know compression: disks are sent as they are";
        context.progress.update(|p| p.notes.push(text.into()));
    }
    context.note_findings(grant.findings.clone());
    let disks = source.copy.plan.disks.iter().map(|plan| plan.disk.name.clone()).collect();
    context.host.audit.record(Event::Obtained(Grant {
        subject: context.progress.now().subject(),
        certificate: source.peer.lanes.first().link().connection.fingerprint(),
        disks,
        peers_head: head_of_peer(grant.audit_head.as_deref()),
    }));
    tracking.learn(&grant.since);
    tracking.after = Some(context.request.id);
    source.peer.grant = Some(grant);
    read_only::compare(source).await
}

async fn ask(source: &mut Source, offer: Offer) -> Result<Prepared, Failure> {
    let policy = source.reconnect_policy();
    let deadline = source.context.host.config.deadlines.prepare();
    let answer = tokio::select! {
        answer = policy.with(source.peer.link.ask(Request::Prepare(offer), deadline)) => answer?,
        () = source.context.cancel.cancelled() => return Err(source.context.cancelled()),
    };
    match answer {
        Response::Prepared(grant) => Ok(grant),
        _ => Err(LinkError::Unexpected { request: "prepare" }.into()),
    }
}

/// Whether each export is of another one of the offered disks that are copied, and has a channel of its own and a
/// name that NBD knows.
fn are_of_these(exports: &[Export], offered: &[DiskSpec]) -> bool {
    let mut copied: BTreeSet<_> =
        offered.iter().filter(|disk| disk.is_copied()).map(|disk| &disk.name).collect();
    let mut channels = BTreeSet::new();
    exports.iter().all(|export| {
        let has_name = export.export.len() <= EXPORT_NAME_BYTES_MAX;
        has_name && copied.remove(&export.disk) && channels.insert(export.channel)
    })
}

/// The offer again: between Begin and Prepare the guest may have been paused.
async fn offer(source: &Source) -> Result<Offer, Failure> {
    let (qmp, tracking) = (&source.guest.qmp, &source.copy.tracking);
    let request = &source.context.request;
    let found = crate::qemu::disks(qmp).await?;
    let disks = disks::offered(&found, &source.context.request.options);
    let running = source.journal.past().running();
    let unknown = |why| source.context.note_findings(vec![why]);
    Ok(Offer {
        vm: request.vm.clone(),
        disks,
        flash: disks::offered_flash(&found),
        running,
        qemu: String::new(),
        compress: request.options.compress,
        policy: request.options.policy(),
        machine: machine::ask(qmp, "source").await.map_err(unknown).ok(),
        after: tracking.after.filter(|_| tracking.has_whole()),
        audit_head: Some(source.context.host.audit.figures().head.to_string()),
        in_band: request.options.in_band,
        hears_busy: true,
        witness: None,
        needs: examine::needs(&request.options),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_is_for_what_was_offered_and_for_each_once() {
        let spec = |name: &str, read_only, left_out| DiskSpec {
            name: name.into(),
            virtual_size: 1,
            format: "raw".into(),
            read_only,
            left_out,
            incremental: false,
            bitmaps: None,
            place: None,
        };
        let offered = [
            spec("a", false, false),
            spec("b", false, false),
            spec("r", true, false),
            spec("l", false, true),
        ];
        let fits = |exports: &[(&str, u16)]| {
            let export = |(disk, channel): &(&str, u16)| Export {
                disk: (*disk).to_owned(),
                export: "x".into(),
                channel: *channel,
                is_fresh: false,
            };
            are_of_these(&exports.iter().map(export).collect::<Vec<_>>(), &offered)
        };
        assert!(fits(&[("a", 1), ("b", 2)]) && fits(&[("b", 9)]) && fits(&[]));
        assert!(!fits(&[("a", 1), ("b", 1)]), "a channel twice");
        assert!(!fits(&[("a", 1), ("a", 2)]), "a disk twice");
        for other in ["r", "l", "of nobody"] {
            assert!(!fits(&[("a", 1), (other, 2)]), "{other}");
        }
        let named = |bytes| {
            let (disk, export) = ("a".to_owned(), "x".repeat(bytes));
            are_of_these(&[Export { disk, export, channel: 1, is_fresh: false }], &offered)
        };
        assert!(named(EXPORT_NAME_BYTES_MAX) && !named(EXPORT_NAME_BYTES_MAX + 1), "longer than NBD knows");
    }
}
