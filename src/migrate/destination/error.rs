//! Why a destination cannot go on, and how that is told to the source.

use crate::migrate::guest::nbd_server::NbdServerError;
use crate::migrate::guest::process;
use crate::migrate::model::problem::{Problem, chain};
use crate::migrate::protocol::message::{CANCELLED, REPLICATED, Refusal};
use crate::net::handshake_failure::HandshakeFailure;
use crate::net::identity::Identity;
use crate::qemu::{MigrationStatus, Qmp, QmpError};
use crate::size::Size;

/// Why the destination cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{}", .0.first().map_or_else(String::new, ToString::to_string))]
    Problems(Vec<Problem>),
    /// It was refused to the peer, which is counted and recorded.
    #[error("{0}")]
    Refused(Problem),
    #[error("the destination's QEMU")]
    Qmp(#[from] QmpError),
    #[error("the destination's QEMU of VM {vm} has gone: its process {pid} has ended{words}")]
    QemuGone { vm: String, pid: i32, words: String },
    #[error("the destination's QEMU of VM {vm} cannot be reached any more: {cause}")]
    QemuUnknown { vm: String, cause: String },
    #[error("the destination's QEMU ended the migration as {status}: {error}")]
    Ram { status: MigrationStatus, error: String },
    #[error(transparent)]
    Vm(#[from] process::VmError),
    #[error("the destination's journal cannot be written, so nothing further is done")]
    Journal(#[from] crate::migrate::journal::JournalError),
    #[error(transparent)]
    Replica(#[from] crate::migrate::host::replicas::ReplicaError),
    #[error("no local socket at the destination")]
    Socket(#[from] std::io::Error),
    #[error("exports of the guest's disks are still open in the destination's QEMU: {}", .0.join(", "))]
    ExportsOpen(Vec<String>),
    #[error("`{0}` was asked at the wrong moment")]
    OutOfOrder(&'static str),
    #[error("an operator gave the VM to the source")]
    Forced,
    #[error("the destination's agent was told to stop")]
    Stopping,
    #[error("it was only checked")]
    Checked,
    #[error("it is left to another process")]
    Frozen,
    #[error("the source gave up: {0}")]
    Aborted(Abort),
    #[error("the guest of VM {vm} could not be started")]
    NotStarted { vm: String, source: QmpError },
    #[error(
        "its grant is over: {0} s have passed since it began (`grant_s` in the destination's configuration)"
    )]
    GrantOver(u64),
    #[error(
        "it has brought {0} bytes, and {1} are permitted (`receive_bytes` of the peer in the destination's configuration)"
    )]
    TooManyBytes(u64, Size),
    /// Its certificate has expired, or the like, since its control stream was opened.
    #[error("{peer} is not trusted any more: {cause}")]
    Untrusted { peer: Identity, cause: HandshakeFailure },
    #[error("the source was lost")]
    SourceLost,
    #[error("the source did not return within {0} s")]
    SourceStayedAway(u64),
    #[error(
        "somebody continued the guest at the destination before it was handed over (cont): it was stopped at once, and \
         is given up there"
    )]
    Continued,
    #[error("the witness does not let the guest run here: {0}")]
    NotSealed(String),
}

/// Why a source gave up, by its word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Abort {
    Cancelled,
    /// It did what it was for: nothing was to be moved.
    Replicated,
    Failed(String),
}

impl From<String> for Abort {
    fn from(reason: String) -> Self {
        match reason.as_str() {
            CANCELLED => Self::Cancelled,
            REPLICATED => Self::Replicated,
            _ => Self::Failed(reason),
        }
    }
}

impl std::fmt::Display for Abort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cancelled => f.write_str(CANCELLED),
            Self::Replicated => f.write_str(REPLICATED),
            Self::Failed(reason) => f.write_str(reason),
        }
    }
}

impl From<NbdServerError> for Error {
    fn from(error: NbdServerError) -> Self {
        match error {
            NbdServerError::Qmp(error) => Self::Qmp(error),
            NbdServerError::Journal(error) => Self::Journal(error),
            NbdServerError::Socket(error) => Self::Socket(error),
            NbdServerError::ExportsOpen(exports) => Self::ExportsOpen(exports),
        }
    }
}

impl Error {
    /// Of a monitor whose connection is over.
    pub(crate) fn of_monitor(vm: &str, qmp: &Qmp) -> Self {
        let vm = vm.to_owned();
        match qmp.failure() {
            Some(QmpError::Ended { pid, .. }) => Self::QemuGone { vm, pid, words: String::new() },
            Some(error) => Self::QemuUnknown { vm, cause: chain(&error) },
            None => Self::QemuUnknown { vm, cause: "its monitor is over".into() },
        }
    }

    /// One of few words.
    pub(crate) fn reason(&self) -> String {
        match self {
            Self::Problems(problems) => problems.first().map(|first| first.kind.name()),
            Self::Refused(problem) => Some(problem.kind.name()),
            _ => None,
        }
        .unwrap_or_else(|| "not-prepared".to_owned())
    }

    pub(crate) fn refusal(&self) -> Refusal {
        let problems = match self {
            Self::Problems(problems) => problems.clone(),
            Self::Refused(problem) => vec![problem.clone()],
            _ => Vec::new(),
        };
        Refusal { problems, text: chain(self) }
    }
}
