//! Why a peer could not be asked.

use crate::migrate::model::problem::Problem;
use crate::migrate::protocol::client::LinkError;
use crate::net::connect_error::ConnectError;

/// Why a peer could not be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    #[error("{0}")]
    Unknown(Problem),
    #[error("no session with {peer}")]
    Connect { peer: String, source: ConnectError },
    #[error(transparent)]
    Link(#[from] LinkError),
}
