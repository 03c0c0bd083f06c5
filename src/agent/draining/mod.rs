//! Empties this host: carries out what the machine of a drain wants.
//!
//! ```text
//! run ─► plan       which VMs there are to move, and what a dry run says
//!  │ └─► follow     a migration to its end, and what that means for the drain
//!  └───► state      the drain that there is, for whoever asks
//! ```

mod follow;
mod plan;
mod run;
mod state;

pub(super) use plan::{Checked, dry_run};
pub(super) use run::{begin, find, go_on};
pub(super) use state::{DrainError, Draining, Shown};
