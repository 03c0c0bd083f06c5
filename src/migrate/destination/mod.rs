//! The destination's role: serves one migration's control stream, step by step, once it is admitted.
//!
//! It never starts a guest unasked, and once it has durably begun to start one it never goes
//! back. Before that, anything that fails, and any loss of the source, undoes what it prepared
//! and leaves the durable word that the guest never ran here.

pub(crate) mod admission;
mod busy;
pub(crate) mod created_images;
mod data;
mod end;
pub(crate) mod error;
mod explain;
mod exports;
pub(crate) mod handoff;
mod hash;
pub(crate) mod image_stamp;
mod made_by_command;
mod ownership;
mod prepare;
pub(crate) mod replica;
mod serve;
mod settling;
mod start;
mod state;
mod view;
mod witness;

pub(crate) use end::{Moment, undo};
pub(crate) use settling::Settling;
pub(crate) use state::{Destination, Serving};
