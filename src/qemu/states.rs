//! QEMU's enumerations as types. A word that this build does not know is kept, never an error:
//! QEMU's schema grows. Owns no logic beyond what a state means.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// An enumeration of QEMU's words with a place for the ones added later.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$vdoc])* #[doc = concat!("QEMU's `", $word, "`.")] $variant,)+
            /// A word of a QEMU newer than this build.
            Other(String),
        }

        impl $name {
            /// QEMU's word.
            pub fn as_str(&self) -> &str {
                match self {
                    $(Self::$variant => $word,)+
                    Self::Other(word) => word,
                }
            }
        }

        impl From<String> for $name {
            fn from(word: String) -> Self {
                match word.as_str() {
                    $($word => Self::$variant,)+
                    _ => Self::Other(word),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str(self.as_str())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
                String::deserialize(input).map(Self::from)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
                output.serialize_str(self.as_str())
            }
        }
    };
}

words! {
    /// What the virtual machine as a whole is doing (`query-status`).
    RunState {
        Debug = "debug",
        InMigrate = "inmigrate",
        InternalError = "internal-error",
        IoError = "io-error",
        Paused = "paused",
        PostMigrate = "postmigrate",
        Prelaunch = "prelaunch",
        FinishMigrate = "finish-migrate",
        RestoreVm = "restore-vm",
        Running = "running",
        SaveVm = "save-vm",
        Shutdown = "shutdown",
        Suspended = "suspended",
        Watchdog = "watchdog",
        GuestPanicked = "guest-panicked",
        Colo = "colo",
    }
}

words! {
    /// How far a migration of RAM is (`query-migrate`, event `MIGRATION`).
    MigrationStatus {
        None = "none",
        Setup = "setup",
        Cancelling = "cancelling",
        Cancelled = "cancelled",
        Active = "active",
        PostcopyDevice = "postcopy-device",
        PostcopyActive = "postcopy-active",
        PostcopyPaused = "postcopy-paused",
        PostcopyRecoverSetup = "postcopy-recover-setup",
        PostcopyRecover = "postcopy-recover",
        Completed = "completed",
        Failed = "failed",
        Colo = "colo",
        PreSwitchover = "pre-switchover",
        Device = "device",
        WaitUnplug = "wait-unplug",
    }
}

impl Default for MigrationStatus {
    /// `query-migrate` has no `status` before the first migration of a process.
    fn default() -> Self {
        Self::None
    }
}

impl MigrationStatus {
    /// The migration is over, well or badly; nothing more will happen by itself.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }

    /// A migration is under way: a second one would be refused. An unknown word counts as live,
    /// because that is the careful reading.
    pub fn is_live(&self) -> bool {
        !self.is_terminal() && *self != Self::None
    }
}

words! {
    /// Where a job is in its life (`query-jobs`, event `JOB_STATUS_CHANGE`).
    ///
    /// QEMU 10.0 flaps between ready and standby whenever its block graph drains: leaving
    /// `ready` is no failure.
    JobStatus {
        Undefined = "undefined",
        Created = "created",
        Running = "running",
        Paused = "paused",
        Ready = "ready",
        Standby = "standby",
        Waiting = "waiting",
        Pending = "pending",
        Aborting = "aborting",
        /// Over, and kept for its error to be read until `job-dismiss`.
        Concluded = "concluded",
        Null = "null",
    }
}

impl JobStatus {
    /// The job does no more I/O; only `job-dismiss` is left to do.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Concluded | Self::Null)
    }

    /// Nothing that the job reads or writes is under way, nor will be before it is resumed.
    pub fn is_at_rest(&self) -> bool {
        matches!(self, Self::Paused | Self::Standby) || self.is_over()
    }
}

words! {
    /// Whether a device or a job has been stopped by an I/O error.
    IoStatus {
        Ok = "ok",
        Failed = "failed",
        NoSpace = "nospace",
    }
}
