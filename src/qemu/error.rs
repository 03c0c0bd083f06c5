//! Everything that can go wrong between vmferry and a QEMU monitor, and what it means.
//!
//! QEMU has few error classes and many sentences: callers ask the predicates here and never
//! read a sentence themselves. The sentences were seen on QEMU 7.2 and 10.0.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// A QMP exchange that did not succeed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    #[error("cannot connect to the QEMU monitor {path}")]
    Connect { path: PathBuf, source: io::Error },
    #[error(
        "the QEMU monitor {path} sent no greeting within {after:?}: another client holds this monitor \
         (give vmferry one of its own), or QEMU's main loop is stuck"
    )]
    Busy { path: PathBuf, after: Duration },
    /// What answered is no QMP monitor.
    #[error("{path} did not greet as a QEMU monitor: {reason}")]
    Greeting { path: PathBuf, reason: String },
    #[error("QEMU refused {name}: {desc} ({class})")]
    Command {
        name: &'static str,
        /// QEMU's error class, mostly `GenericError`.
        class: String,
        desc: String,
    },
    /// No reply in time. The connection remains usable.
    #[error("no reply to {name} within {after:?} ({})", if *.sent { "QEMU may still execute it" } else { "it was not sent" })]
    Deadline {
        name: &'static str,
        after: Duration,
        /// Whether QEMU may have got it. If false it never will.
        sent: bool,
    },
    /// The connection was lost while the command was under way: QEMU may have executed it. The
    /// connection is made again.
    #[error("{name}: the connection to the QEMU monitor {path} was lost")]
    Disconnected {
        name: &'static str,
        path: PathBuf,
        /// The socket's error; none when the other end was closed.
        source: Option<Arc<io::Error>>,
    },
    /// A line from the monitor is no JSON object: that connection is given up and made again.
    #[error("{name}: the QEMU monitor {path} sent something that is not QMP")]
    Malformed { name: &'static str, path: PathBuf, source: Arc<serde_json::Error> },
    /// QEMU has ended, by the kernel's word.
    #[error("{name}: the QEMU at the monitor {path} has ended (process {pid})")]
    Ended { name: &'static str, path: PathBuf, pid: i32 },
    /// Nobody listens at the monitor. Whether QEMU has ended is not known.
    #[error(
        "{name}: nobody listens at the QEMU monitor {path} any more; whether that QEMU still runs is not known"
    )]
    Vanished { name: &'static str, path: PathBuf },
    /// The monitor leads to another process. Whether QEMU has ended is not known.
    #[error(
        "{name}: another process than before listens at the QEMU monitor {path}; whether the QEMU of before \
         still runs is not known"
    )]
    Replaced { name: &'static str, path: PathBuf },
    /// The reply to a command is not of the expected shape. The connection remains usable.
    #[error("QEMU's reply to {name} has an unexpected shape")]
    Reply { name: &'static str, source: serde_json::Error },
    /// A line without end: that connection is given up and made again.
    #[error("{name}: the QEMU monitor {path} sent a line of more than {limit} bytes")]
    LineTooLong { name: &'static str, path: PathBuf, limit: usize },
    /// The kernel refused to send the command or its descriptor; QEMU got nothing of it.
    #[error("{name} could not be sent to QEMU")]
    Send { name: &'static str, source: io::Error },
    /// The command could not be written as JSON.
    #[error("{name} cannot be written as JSON")]
    Encode { name: &'static str, source: serde_json::Error },
    /// QEMU takes no descriptor name that is empty or begins with a digit.
    #[error("{fdname:?} cannot be the name of a descriptor in QEMU")]
    FdName { fdname: String },
}

impl QmpError {
    /// QEMU's sentence, for a person to read.
    pub fn desc(&self) -> Option<&str> {
        match self {
            Self::Command { desc, .. } => Some(desc),
            _ => None,
        }
    }

    /// Whether QEMU answered with this error class.
    pub fn is_class(&self, wanted: &str) -> bool {
        matches!(self, Self::Command { class, .. } if class == wanted)
    }

    /// The connection was lost with the command under way, and is made again.
    pub fn is_interrupted(&self) -> bool {
        matches!(self, Self::Disconnected { .. } | Self::Malformed { .. } | Self::LineTooLong { .. })
    }

    /// The connection is over: every further command fails as well.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Ended { .. } | Self::Vanished { .. } | Self::Replaced { .. })
    }

    /// No reply in time; QEMU's main loop may be stuck.
    pub fn is_deadline(&self) -> bool {
        matches!(self, Self::Deadline { .. })
    }

    /// QEMU has surely not executed the command and never will.
    pub fn is_not_executed(&self) -> bool {
        matches!(
            self,
            Self::Deadline { sent: false, .. }
                | Self::Connect { .. }
                | Self::Busy { .. }
                | Self::Greeting { .. }
                | Self::Send { .. }
                | Self::Encode { .. }
                | Self::FdName { .. }
        )
    }

    /// Trying to connect again may help: the socket is not there yet, or nobody listens yet.
    pub fn is_not_listening(&self) -> bool {
        use io::ErrorKind::{ConnectionRefused, NotFound};
        matches!(self, Self::Connect { source, .. } if matches!(source.kind(), NotFound | ConnectionRefused))
    }

    /// This QEMU does not have the command (or not in its present state).
    pub fn is_command_not_found(&self) -> bool {
        self.is_class("CommandNotFound")
    }

    /// This QEMU does not know a parameter of the command.
    pub fn is_unexpected_parameter(&self) -> bool {
        self.says("Parameter '", "' is unexpected")
    }

    /// The monitor holds no descriptor of that name.
    pub fn is_not_found_fd(&self) -> bool {
        self.says("File descriptor named '", "' not found")
            || self.says("File descriptor named '", "' has not been found")
    }

    /// There is no NBD server in this process.
    pub fn is_nbd_server_not_running(&self) -> bool {
        self.says("NBD server not running", "")
    }

    /// There is an NBD server in this process already.
    pub fn is_nbd_server_already_running(&self) -> bool {
        self.says("NBD server already running", "")
    }

    /// No block export has that id.
    pub fn is_not_found_export(&self) -> bool {
        self.says("Export '", "' is not found")
    }

    /// No job has that id (it is over and dismissed, or never was).
    pub fn is_not_found_job(&self) -> bool {
        self.is_class("DeviceNotActive") || self.says("Job not found", "")
    }

    /// The job is gone, or so far that the command comes too late.
    pub fn is_job_past_that(&self) -> bool {
        self.is_not_found_job() || self.says("Job '", "' cannot accept command verb")
    }

    /// No node has that name.
    pub fn is_not_found_node(&self) -> bool {
        self.says("Failed to find node with node-name='", "'") || self.says("Cannot find device='", "'")
    }

    /// The node is used by a job or a device.
    pub fn is_node_in_use(&self) -> bool {
        self.says("Node ", " is in use")
            || self.says("Node '", "' is busy")
            || self.says("Need a root block node", "")
    }

    /// The node has no dirty bitmap of that name, or is gone itself.
    pub fn is_not_found_bitmap(&self) -> bool {
        self.says("Dirty bitmap '", "' not found") || self.says("Node '", "' not found")
    }

    /// The process waits for no migration: it was started without `-incoming defer`, or has
    /// already taken one and can't take a second.
    pub fn is_not_incoming(&self) -> bool {
        self.says("'-incoming' was not specified", "")
            || self.says("The incoming migration has already been started", "")
            || self.says("Illegal migration incoming state", "")
    }

    /// `migrate-continue` came when the migration was not paused before switchover.
    pub fn is_not_in_expected_state(&self) -> bool {
        self.says("Migration not in expected state", "")
    }

    fn says(&self, start: &str, then: &str) -> bool {
        self.desc().and_then(|desc| desc.strip_prefix(start)).is_some_and(|rest| rest.contains(then))
    }
}
