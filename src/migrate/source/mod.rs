//! The source's role: runs one migration through its phases, and back when one fails.
//!
//! ```text
//! retry                              tries, one after the other
//!   attempt                          one try: begins it and runs it to its end
//!     ownership                      the hand-over and the roll-back
//!       perform, phases              the phases before it
//!         prepare, copies, bases, changes, disk_stream, guest_watch, given_up, slow_writes, slowness, trial,
//!                                        explain
//!           state                    a migration: context, peer, guest, copying, clock
//! ```

mod any_phase;
mod attempt;
mod awaited_try;
mod bases;
mod changes;
pub(crate) mod clock;
mod connect;
pub(crate) mod context;
mod copies;
pub(crate) mod copying;
mod disk_stream;
mod end;
mod event;
pub(crate) mod examine;
mod explain;
pub(crate) mod failure;
pub(crate) mod further_try;
mod given_up;
pub(crate) mod guest;
mod guest_watch;
pub(crate) mod handoff;
mod in_band;
mod meter;
pub(crate) mod outlook;
mod ownership;
pub(crate) mod peer;
mod perform;
mod phases;
mod prepare;
mod read_only;
mod reconnect;
mod replica;
mod replicate;
pub(crate) mod request;
pub(crate) mod retry;
mod slow_writes;
mod slowness;
mod stall;
pub(crate) mod state;
mod trial;
pub(crate) mod verify;
mod witness;

pub(crate) use end::{kept_by_force, stands_there};
