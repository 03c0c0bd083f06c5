//! What an operator asks of a migration's source.

use uuid::Uuid;

use crate::migrate::journal::RetryOf;
use crate::migrate::model::options::Options;
use crate::migrate::transfer::bandwidth::ShareHandle;

/// What an operator asks for.
#[derive(Debug, Clone)]
pub struct SourceRequest {
    pub id: Uuid,
    pub vm: String,
    /// The destination's name in the configuration.
    pub peer: String,
    pub options: Options,
    /// The migration whose further try this is.
    pub retry: Option<RetryOf>,
    /// What it may send, now.
    pub share: ShareHandle,
}
