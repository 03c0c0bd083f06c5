//! Wires listeners, sessions, migrations, the local API and metrics; owns all tasks.
//!
//! ```text
//! start ─► handoff, listen, certificates, journals, sessions, signals, stop
//!                      └─► routes ─► gate ─► call, caller; status, limits, draining
//! observe, all of them ─► running: the Agent ─► registry, limits, vm_states, journals_read, refusals
//! ```

mod call;
mod caller;
mod certificate_files;
mod certificates;
mod confine;
mod drain_routes;
mod draining;
mod extract;
mod foretell;
mod gate;
mod handoff;
mod history;
mod http;
mod journals;
mod journals_read;
mod libvirt_routes;
mod limits;
mod listen;
mod observe;
mod once;
mod ping;
mod qemu_command;
mod refusal;
mod refusals;
mod registry;
mod replica_routes;
mod routes;
mod running;
mod sessions;
mod signals;
mod start;
mod status;
mod stop;
mod traces;
mod unix_listener;
mod vm_states;
mod watchdog;

pub use confine::{Early, confine};
pub use handoff::StartMode;
#[doc(hidden)]
pub use handoff::reread as reread_handoff;
pub use start::{AgentError, check_config, handoff_formats, run};
