//! One VM of a drain, and what has become of it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A migration that did not move the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "DrainTry")]
pub struct Try {
    /// By its name in the configuration.
    pub peer: String,
    pub migration: Uuid,
    /// Why it did not.
    pub cause: String,
}

/// Where a VM is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum GuestState {
    /// It is here, and its turn comes.
    Waiting,
    /// A migration that the drain has not begun has it; its turn comes after that one's end.
    Busy {
        migration: Uuid,
    },
    Moving {
        peer: String,
        migration: Uuid,
    },
    /// It is there. `peer` is none if the drain has not moved it.
    Moved {
        peer: Option<String>,
        migration: Uuid,
        /// Something is left to clean up.
        left: bool,
    },
    /// It was handed over, and nobody knows yet whose it is.
    Undecided {
        peer: String,
        migration: Uuid,
        cause: String,
    },
    /// It is where it was, and stays there.
    Stays {
        cause: String,
    },
}

/// One VM of a drain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    pub vm: String,
    /// What its disks have together; none where its QEMU did not say.
    pub disk_bytes: Option<u64>,
    /// It ran when the drain began.
    pub ran: bool,
    #[serde(flatten)]
    pub state: GuestState,
    /// What did not move it: no peer is tried twice.
    pub tries: Vec<Try>,
    /// How often a migration of it was ended from outside, and counts for nothing.
    #[serde(default)]
    pub cut_off: u32,
}

impl Guest {
    /// One whose turn comes.
    pub fn new(vm: &str, disk_bytes: Option<u64>, ran: bool) -> Self {
        let vm = vm.to_owned();
        Self { vm, disk_bytes, ran, state: GuestState::Waiting, tries: Vec::new(), cut_off: 0 }
    }

    /// The same, in a migration of somebody else's.
    pub fn busy(self, migration: Uuid) -> Self {
        Self { state: GuestState::Busy { migration }, ..self }
    }

    pub(super) fn has_tried(&self, peer: &str) -> bool {
        self.tries.iter().any(|tried| tried.peer == peer)
    }

    /// The migration whose end is waited for.
    pub fn migration(&self) -> Option<Uuid> {
        match &self.state {
            GuestState::Busy { migration }
            | GuestState::Moving { migration, .. }
            | GuestState::Undecided { migration, .. } => Some(*migration),
            GuestState::Waiting | GuestState::Moved { .. } | GuestState::Stays { .. } => None,
        }
    }
}
