//! Migrations that libvirt makes itself, through this tunnel: the folder with the sockets on both hosts, the
//! permission of the destination, and what libvirt does not say.
//!
//! ```text
//! source's agent                               destination's agent
//!  folder: libvirt.sock ─┐                      ┌─► /run/libvirt/libvirt-sock     only if its owner permits
//!          ram.sock     ─┼─ forwardings ─ grants┼─► folder: ram.sock ┐ made by the QEMU that waits
//!          nbd.sock     ─┘                      └─► folder: nbd.sock ┘
//!  asks: prepare, renew, end ─────────────────► makes, prolongs, takes away
//! ```
//! Each path is one string on both hosts, because libvirt has one for both. Which requests are made, and that
//! they are repeated, is all that keeps the two sides together: what is not renewed is taken away. Runs no
//! virsh and knows no domain but by name; who does that is the command line.
//!
//! ```text
//! service                 all of it
//! source, destination     what each role does
//! context, store          what both use; what there is, on the disk as well
//! causes, error           what is said when it goes wrong
//! folder, libvirtd        the files
//! message                 what agents say to each other
//! state                   what there is, as a value
//! ```

mod causes;
mod context;
mod destination;
mod error;
mod folder;
mod libvirtd;
#[doc(hidden)]
pub mod message;
mod service;
mod source;
mod state;
mod store;

pub use error::LibvirtError;
pub use service::Follower;
pub use service::Libvirt;
pub use state::{Channel, Channels, Ended, Expected, HoldSeconds, Moved, Request, Role, Stage, State, Told};
