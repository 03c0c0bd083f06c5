//! The witness as the source has it: wanted, offered, and agreed on with the destination.

use super::context::Context;
use super::failure::Failure;
use super::state::Source;
use crate::migrate::host::Host;
use crate::migrate::host::witness::unusable;
use crate::migrate::journal::Record;
use crate::migrate::model::options::Options;
use crate::migrate::model::problem::Problem;
use crate::migrate::model::witness::OfferedWitness;
use crate::migrate::protocol::client::LinkError;
use crate::migrate::protocol::message::Prepared;

/// Whether a migration with these options is to have a witness: this host has one, and a guest is to be moved.
pub(crate) fn is_wanted(host: &Host, options: &Options) -> bool {
    host.witness.is_some() && !options.replicate
}

/// Begins a word for a migration; none where no witness is wanted.
/// Errors: it cannot be reached. Nothing has begun by then.
pub(super) async fn offer(context: &Context) -> Result<Option<OfferedWitness>, Failure> {
    let wanted = is_wanted(&context.host, &context.request.options);
    let Some(witness) = context.host.witness.as_ref().filter(|_| wanted) else { return Ok(None) };
    let begun = witness.begin(context.request.id).await;
    begun.map(Some).map_err(|e| Failure::Problems(vec![unusable(context.host.identity.as_str(), &e)]))
}

/// What a check finds of it, and what it offers. Changes nothing.
pub(super) async fn look(host: &Host, options: &Options) -> Result<Option<OfferedWitness>, Problem> {
    let Some(witness) = host.witness.as_ref().filter(|_| is_wanted(host, options)) else { return Ok(None) };
    witness.look().await.map(Some).map_err(|e| unusable(host.identity.as_str(), &e))
}

/// Takes note of the witness that the destination has agreed on, before anything is copied.
/// Errors: it has not, though it was not to ignore it.
pub(super) fn agree(
    source: &mut Source,
    offered: Option<OfferedWitness>,
    grant: &Prepared,
) -> Result<(), Failure> {
    let Some(OfferedWitness { is, .. }) = offered else { return Ok(()) };
    if !grant.witness {
        return Err(LinkError::Unexpected { request: "prepare" }.into());
    }
    // Begun again in another process: what was agreed on first counts.
    if source.journal.past().witness.is_none() {
        source.journal.record(Record::WitnessAgreed(is))?;
    }
    Ok(())
}
