//! All phases of a migration before its hand-over, one after the other by the table.

use super::failure::Failure;
use super::guest_watch::look_if_missed;
use super::phases;
use super::prepare::prepare;
use super::state::Source;
use crate::migrate::model::phase::Phase;

/// Everything from where it is up to the hand-over.
pub(crate) async fn perform(source: &mut Source) -> Result<(), Failure> {
    loop {
        let looked = look_if_missed(source).await;
        let phase = source.clock.phase;
        let done = match phase {
            _ if looked.is_err() => looked,
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
