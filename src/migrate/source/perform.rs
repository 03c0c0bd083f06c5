//! All phases of a migration before its hand-over, one after the other by the table.

use super::changes;
use super::failure::Failure;
use super::guest_watch::look_if_missed;
use super::phases;
use super::prepare::prepare;
use super::replicate;
use super::state::Source;
use crate::migrate::model::phase::Phase;

/// The disks are brought into step, and that is all.
async fn bring_into_step(source: &mut Source) -> Result<(), Failure> {
    // The end of the copies may be behind it: a process before this one has come so far.
    if !source.copy.completed {
        phases::mirror(source).await?;
    }
    replicate::complete(source).await
}

/// Everything from where it is up to the hand-over.
pub(crate) async fn perform(source: &mut Source) -> Result<(), Failure> {
    loop {
        let looked = match look_if_missed(source).await {
            Ok(()) => changes::go_on(source).await,
            failed => failed,
        };
        let phase = source.clock.phase;
        let replicates = source.context.request.options.replicate;
        let done = match phase {
            _ if looked.is_err() => looked,
            // Whatever the plan: of a replica no RAM follows.
            _ if replicates && phase > Phase::Mirror => return Err(Failure::Replicated),
            Phase::Mirror if replicates => bring_into_step(source).await,
            Phase::Prepare => prepare(source).await,
            Phase::Mirror => phases::mirror(source).await,
            Phase::Precopy => phases::precopy(source).await,
            Phase::Switchover => phases::switchover(source).await,
            Phase::Device => phases::device(source).await,
            Phase::HandOver => return source.peer.is_trusted(&source.context),
            _ => Ok(()),
        };
        match done {
            Ok(()) => source.enter_next()?,
            Err(failure) => source.guest.look_again(phase, failure)?,
        }
    }
}
