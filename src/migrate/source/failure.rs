//! Why a migration failed on the source's side.

use std::time::Duration;

use crate::mux::Code;
use crate::net::connect_error::ConnectError;
use crate::net::handshake_failure::HandshakeFailure;
use crate::net::pump::PumpEnd;
use crate::net::session::{OpenStreamError, Session};
use crate::net::stream::StreamEnded;
use crate::qemu::{MigrationStatus, NbdError, Qmp, QmpError};

use crate::migrate::guest::process::VmError;
use crate::migrate::host::replicas::ReplicaError;
use crate::migrate::host::{AskError, Host};
use crate::migrate::journal::JournalError;
use crate::migrate::model::label::Label;
use crate::migrate::model::leftover::Leftover;
use crate::migrate::model::meanwhile::Meanwhile;
use crate::migrate::model::phase::{IllegalStep, Phase};
use crate::migrate::model::problem::Problem;
use crate::migrate::model::progress::Outcome;
use crate::migrate::protocol::client::LinkError;
use crate::migrate::protocol::message::{CANCELLED, REPLICATED};
use crate::migrate::transfer::disk::error::DeltaError;
use crate::migrate::transfer::disk::mirror::MirrorError;

/// Why a migration did not go on.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// An operator asked for it.
    #[error("{CANCELLED}")]
    Cancelled,
    /// Not a failure: a replica is in step, and nothing else was wanted.
    #[error("{REPLICATED}")]
    Replicated,
    /// It is left to another process; not a failure at all.
    #[error("it is left to another process")]
    Frozen,
    #[error("the source's agent was told to stop")]
    Stopping,
    #[error("{}", .0.first().map_or_else(String::new, ToString::to_string))]
    Problems(Vec<Problem>),
    #[error("the source's QEMU")]
    Qmp(#[from] QmpError),
    #[error("the source's QEMU has gone: its process {0} has ended")]
    QemuGone(i32),
    /// QEMU cannot be found again. It may live.
    #[error("the source's QEMU cannot be reached any more: {0}")]
    QemuUnknown(String),
    #[error("the source's QEMU could not be reached for {seconds} s: {cause}")]
    MonitorLost { seconds: u64, cause: String },
    #[error("the monitor of the source's QEMU was lost {0} times")]
    MonitorUnsteady(u32),
    /// Events of QEMU's were missed; not a failure, the phase looks again at what is there.
    #[error("events of the source's QEMU were missed")]
    Missed,
    #[error("no session with {peer}")]
    Connect { peer: String, source: ConnectError },
    #[error("the session with {peer} was lost: {cause}")]
    SessionLost { peer: String, cause: String },
    /// Its certificate was revoked, or has expired, since the migration began.
    #[error("{peer} is not trusted any more: {cause}")]
    Untrusted { peer: String, cause: HandshakeFailure },
    #[error("no connection for {seconds} s with the guest, or what it writes, at a standstill: {cause}")]
    Away { seconds: u64, cause: String },
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("the destination failed: {0}")]
    Destination(String),
    #[error("the stream of {stream} did not come about")]
    Open { stream: String, source: OpenStreamError },
    #[error("the stream of {stream} ended before its time")]
    Stream { stream: String, source: PumpEnd },
    #[error("no NBD connection for disk {disk}")]
    Handshake { disk: String, source: NbdError },
    #[error(
        "disk {disk} has {source_bytes} bytes, and what the destination exports for it has {destination_bytes}"
    )]
    Size { disk: String, source_bytes: u64, destination_bytes: u64 },
    /// Its stream ends in this process alone, and a destination takes one for each disk.
    #[error(
        "the agent was restarted while the NBD handshake of disk {disk} with the destination was under way; begin \
         the migration again"
    )]
    HandshakeLeft { disk: String },
    #[error("the mirror of disk {disk} failed: {error}")]
    Mirror { disk: String, error: String },
    #[error("what changed of disk {disk} could not be copied")]
    Delta { disk: String, source: DeltaError },
    #[error(
        "disk {disk} is not the same on both hosts: bytes {} to {} differ, and nobody has written to them in between",
        .range.start, .range.end - 1
    )]
    Differs { disk: String, range: std::ops::Range<u64> },
    #[error("disk {disk} could not be compared")]
    NotCompared { disk: String, source: DeltaError },
    #[error(transparent)]
    Meanwhile(#[from] Meanwhile),
    #[error("the migration of the RAM ended as {status}{}", said(error))]
    Ram { status: MigrationStatus, error: String },
    /// Nothing moved for too long.
    #[error("{what} made no progress for {seconds} s")]
    Stalled { what: String, seconds: u64 },
    #[error("the journal cannot be written, so nothing further is done")]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    #[error("no local socket")]
    Socket(#[source] std::io::Error),
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A mistake of our own, found before it did harm.
    #[error(transparent)]
    Step(#[from] IllegalStep),
}

impl From<AskError> for Failure {
    fn from(error: AskError) -> Self {
        match error {
            AskError::Unknown(problem) => Self::Problems(vec![problem]),
            AskError::Connect { peer, source } => Self::Connect { peer, source },
            AskError::Link(error) => Self::Link(error),
        }
    }
}

/// QEMU does not always say why.
fn said(error: &str) -> String {
    if error.is_empty() { String::new() } else { format!(": {error}") }
}

impl From<MirrorError> for Failure {
    fn from(error: MirrorError) -> Self {
        match error {
            MirrorError::Qmp(error) => Self::Qmp(error),
            MirrorError::Failed { disk, error } => Self::Mirror { disk, error },
            MirrorError::Lasts { disk, after } => {
                Self::stalled(&format!("the end of the mirror of disk {disk}"), after)
            }
        }
    }
}

impl Failure {
    /// Who cancelled: an operator, or the agent on its way out.
    pub(crate) fn of_cancel(host: &Host) -> Self {
        if host.stopping.is_cancelled() { Self::Stopping } else { Self::Cancelled }
    }

    /// The peer did not accept a stream.
    pub(crate) fn refused(label: &Label, session: &Session, ended: StreamEnded) -> Self {
        let source = OpenStreamError::Refused { peer: session.info().peer.clone(), source: ended };
        Self::Open { stream: label.to_string(), source }
    }

    /// Nothing moved for too long.
    pub(crate) fn stalled(what: &str, after: Duration) -> Self {
        Self::Stalled { what: what.into(), seconds: after.as_secs() }
    }

    /// The end of a migration that failed so. `cause`: in words.
    pub(crate) fn outcome(&self, phase: Phase, cause: String, leftovers: Vec<Leftover>) -> Outcome {
        if matches!(self, Self::Replicated) {
            return Outcome::Replicated { leftovers };
        }
        let cancelled = matches!(self, Self::Cancelled);
        Outcome::Failed { phase, cause, problems: self.problems(), cancelled, leftovers }
    }

    /// Of a monitor whose connection is over.
    pub(crate) fn of_monitor(qmp: &Qmp) -> Self {
        match qmp.failure() {
            Some(QmpError::Ended { pid, .. }) => Self::QemuGone(pid),
            Some(error) => Self::QemuUnknown(crate::migrate::model::problem::chain(&error)),
            None => Self::QemuUnknown("its monitor is over".into()),
        }
    }

    /// Whether a command's reply was lost with the monitor, or events were.
    pub(crate) fn is_interrupted(&self) -> bool {
        matches!(self, Self::Missed) || matches!(self, Self::Qmp(error) if error.is_interrupted())
    }

    /// Whether it may be only the echo of something that the other side, or the monitor, knows better.
    pub fn is_echo(&self) -> bool {
        // QEMU refuses what a dead destination has made impossible, to cancel a failed job for one.
        if let Self::Qmp(error) = self {
            return error.desc().is_some();
        }
        // What a handshake was found to be here is nobody's echo.
        if let Self::Handshake {
            source: NbdError::Protocol(_) | NbdError::Client(_) | NbdError::Name(_),
            ..
        } = self
        {
            return false;
        }
        matches!(
            self,
            Self::Handshake { .. }
                | Self::Mirror { .. }
                | Self::Delta { .. }
                | Self::Ram { .. }
                | Self::Stream { .. }
                | Self::Link(LinkError::Lost(_) | LinkError::Closed)
                | Self::Open {
                    source: OpenStreamError::Refused { source: StreamEnded(Code::SessionLost), .. },
                    ..
                }
        )
    }

    /// Whether it is only how the session's end looks from one of its streams.
    pub fn is_session_lost(&self) -> bool {
        match self {
            Self::Link(e) => e.is_session_lost(),
            Self::Stream { source: PumpEnd::Remote(StreamEnded(Code::SessionLost)), .. } => true,
            Self::Open { source: OpenStreamError::Refused { source, .. }, .. } => {
                *source == StreamEnded(Code::SessionLost)
            }
            _ => false,
        }
    }

    /// Whether the same migration, begun again later, may succeed without anybody's doing: what
    /// broke on the way and on the other host may, what the source itself lacks may not.
    pub fn may_pass(&self) -> bool {
        let all_may = |problems: &[Problem]| problems.iter().all(|p| p.kind.may_pass());
        match self {
            Self::Cancelled | Self::Replicated | Self::Stopping | Self::Frozen => false,
            Self::QemuGone(_) | Self::QemuUnknown(_) => false,
            Self::Meanwhile(meanwhile) => meanwhile.may_pass(),
            // Something on the way is broken, and may hide it the next time.
            Self::Differs { .. } => false,
            Self::Journal(_)
            | Self::Replica(_)
            | Self::Vm(_)
            | Self::Step(_)
            // What a destination makes of its disks it makes again.
            | Self::Size { .. }
            | Self::Link(LinkError::Unexpected { .. }) => false,
            Self::Handshake { source, .. } => source.may_pass(),
            Self::Problems(problems) => all_may(problems),
            // Without problems it is an error at the destination, such as a full disk.
            Self::Link(LinkError::Refused(refusal)) => all_may(&refusal.problems),
            Self::Connect { source, .. } => source.may_pass(),
            // An expired one may have been renewed.
            Self::Untrusted { cause, .. } => *cause == HandshakeFailure::Expired,
            // A QEMU that refuses does so for what the other side made impossible.
            Self::Qmp(error) => !error.is_over(),
            Self::MonitorLost { .. } | Self::MonitorUnsteady(_) | Self::Missed => true,
            Self::Link(_)
            | Self::SessionLost { .. }
            | Self::Destination(_)
            | Self::Open { .. }
            | Self::Stream { .. }
            | Self::HandshakeLeft { .. }
            | Self::Mirror { .. }
            | Self::Delta { .. }
            | Self::NotCompared { .. }
            | Self::Away { .. }
            | Self::Ram { .. }
            | Self::Stalled { .. }
            | Self::Socket(_) => true,
        }
    }

    /// What stands in the way and how to remove it, where that is known.
    pub fn problems(&self) -> Vec<Problem> {
        match self {
            Self::Problems(problems) => problems.clone(),
            Self::Link(LinkError::Refused(refusal)) => refusal.problems.clone(),
            _ => Vec::new(),
        }
    }
}
