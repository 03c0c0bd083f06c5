//! One QEMU process, seen through a monitor of its own: the QMP client with descriptor passing,
//! QEMU's commands and events as types, what this QEMU can do, its disks, how to clean up, and a
//! client of its NBD server.
//!
//! Knows no network, no TLS and no other module of vmferry. What leaves or enters here besides
//! values is an `OwnedFd`. Strings of QEMU's are matched in this module and nowhere else.

mod abilities;
mod address;
mod block_devices;
mod cleanup;
mod client;
pub mod command_line;
mod commands;
mod connection;
mod devices;
mod disks;
mod error;
mod event;
mod event_queue;
mod graph;
mod host_crypt;
mod host_use;
mod image;
mod leftovers;
mod machine;
mod memory;
mod monitor_socket;
mod mounted;
mod named_file;
pub mod names;
mod nbd;
mod process;
mod ram;
mod reconnect;
mod states;
mod storage;
mod throttle;
mod transit;
#[doc(hidden)]
pub mod wire;
mod write_through;

pub use abilities::Abilities;
pub use cleanup::{
    CleanupReport, DestinationLeftovers, NotCleaned, Remainder, SourceLeftovers, delete_bitmap,
    delete_export, destination_cleanup, restore_migration_settings, source_cleanup, unthrottle,
};
pub use client::{COMMAND_DEADLINE, COMMAND_QUEUE_MAX, Command, Qmp, Silence};
pub use commands::*;
pub use devices::{Contents, Outside, outside};
pub use disks::{Disk, disks, disks_on_made};
pub use error::QmpError;
pub use event::{Event, EventKind, Timestamp};
pub use event_queue::{EVENT_QUEUE_BYTES_MAX, EVENT_QUEUE_MAX, Events};
pub use graph::{Base, Bitmap, Encryption, Layer};
pub use host_crypt::HostEncryption;
pub use image::{Image, OnHost, Seen};
pub use leftovers::{Leftovers, block_exports, leftovers, nbd_server_runs};
pub use machine::{Device, Machine, machine};
pub use nbd::{
    Asking, EXPORT_NAME_BYTES_MAX, LeftWriter, NbdError, NbdReader, NbdWriter, REQUEST_BYTES_MAX, Replies,
    Terms, Writing, reads_as_zeroes,
};
pub use process::{Life, Process, ProcessId};
pub use ram::{dirty_rate, ram_in_use};
pub use states::{IoStatus, JobStatus, MigrationStatus, RunState};
pub use storage::boot_id;
pub use throttle::{Unthrottled, io_throttle, written_bytes};
pub use transit::Transit;
pub use wire::LINE_MAX_BYTES;
pub use write_through::WriteThrough;
