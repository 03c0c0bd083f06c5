//! Why a migration of libvirt's cannot be prepared, for its operator.

use crate::forward::AddError;
use crate::net::connect_error::ConnectError;
use crate::net::message::MessageError;
use crate::net::session::OpenStreamError;

/// What is wrong, with what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum LibvirtError {
    /// Not in the configuration.
    #[error("this host knows no peer {0}")]
    NoPeer(String),
    /// `send` has not this domain.
    #[error("this host does not send domain {domain} to {peer}")]
    NotSent { peer: String, domain: String },
    /// No session with the peer.
    #[error("no session with peer {peer}")]
    Connect { peer: String, source: ConnectError },
    /// The peer does not take the question.
    #[error("the agent of {peer} does not take the question")]
    Open { peer: String, source: OpenStreamError },
    /// No answer, or none that can be understood.
    #[error("the agent of {peer} gave no answer")]
    Answer { peer: String, source: MessageError },
    /// No answer in time.
    #[error("the agent of {peer} did not answer within {after_s} s")]
    Late { peer: String, after_s: u64 },
    /// An answer to something else.
    #[error("the agent of {peer} gave an answer that does not fit")]
    Unexpected { peer: String },
    /// It said no.
    #[error("{peer} refused: {text}")]
    Refused { peer: String, text: String, remedy: String },
    /// A folder or a socket of this host.
    #[error("{what}")]
    Here { what: String, remedy: String, source: std::io::Error },
    /// A socket cannot be forwarded.
    #[error("{socket} cannot be made")]
    Forward { socket: String, source: AddError },
    /// Too many at once.
    #[error("{0} migrations of libvirt's are prepared already")]
    TooMany(usize),
    /// A name that no domain has.
    #[error("a domain's name has 1 to {0} bytes")]
    Name(usize),
    /// There is none of that id.
    #[error("this agent knows no migration of libvirt's {0}")]
    Unknown(uuid::Uuid),
}

impl LibvirtError {
    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::NoPeer(peer) => {
                format!("add [peer.{peer}] with `identity` and `address` to the configuration")
            }
            Self::NotSent { peer, .. } => {
                format!("add it to `send` of [peer.{peer}] in this host's configuration")
            }
            Self::Connect { .. } => {
                "check that its agent runs, its `address`, and that the firewall passes that one port".into()
            }
            Self::Open { .. } => "its vmferry may be too old for this: compare `vmferry --version`".into(),
            Self::Answer { .. } | Self::Late { .. } | Self::Unexpected { .. } => {
                "look at that agent's log".into()
            }
            Self::Refused { remedy, .. } | Self::Here { remedy, .. } => remedy.clone(),
            Self::Forward { .. } => "look at the agent's log".into(),
            Self::TooMany(_) => "end those that are over: `vmferry libvirt list`".into(),
            Self::Name(_) => "give the domain's name".into(),
            Self::Unknown(_) => "see `vmferry libvirt list` for those that it knows".into(),
        }
    }
}
