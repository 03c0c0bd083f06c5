//! Sockets carried over a session: programs of one host connect to a forwarding, and are connected to a
//! target of another host.
//!
//! ```text
//! program ─► forwarding: a socket of this host        ┌─► target: a name of that host's configuration,
//!              accepts, opens a stream ══ session ════╡     or granted by its agent for a time
//!                                                     └─► connect(2), in the order of the accepts ─► program
//! ```
//! The peer says a name; which socket that is, and whether it may, is decided by the host that has the
//! target. Bytes are not looked into. Stands on `net` alone; `migrate` and this know nothing of each other.
//!
//! ```text
//! forwards                             all of one agent; what it leaves to the next process
//! frozen                               the same as data
//! forwarding          incoming         one that listens; streams that peers open
//! listener, peers     targets, connector
//! connections                          places, pumps
//! tally, reason, spec, status, limits
//! ```

mod connections;
mod connector;
mod forwarding;
mod forwards;
mod frozen;
mod incoming;
mod limits;
mod listener;
mod peers;
mod reason;
mod spec;
mod status;
mod tally;
mod targets;

pub use forwards::{AddError, Forwards, StartError};
pub use frozen::FrozenForwards;
pub use limits::{CONNECTIONS_MAX, PEER_CONNECTIONS_MAX};
pub use listener::ListenError;
pub use spec::{ShareChange, Spec};
pub use status::{Figures, ForwardingStatus, TargetStatus};
pub use tally::{Side, Totals};
pub use targets::{Grant, GrantError};
