//! What two agents say to each other about one migration, on its control stream.

pub(crate) mod client;
pub mod message;
pub(crate) mod server;
