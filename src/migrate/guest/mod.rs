//! A virtual machine's QEMU on this host: found, started, set up for a migration, cleaned up,
//! ended.

pub(crate) mod before_start;
pub(crate) mod inventory;
pub(crate) mod last_words;
pub(crate) mod life;
mod marked;
pub(crate) mod nbd_server;
pub(crate) mod process;
pub(crate) mod settings;
pub(crate) mod start_order;
mod state_files;
pub(crate) mod undo;
