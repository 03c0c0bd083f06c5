//! Migrations that libvirt makes itself.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::VERSION;
pub use crate::libvirt::{
    Channel, Channels, Ended as LibvirtEnd, Expected, HoldSeconds, Moved as MovedBytes,
    Request as LibvirtRequest, Role as LibvirtRole, Stage as LibvirtStage, State as LibvirtMigration, Told,
};

/// What the destination says before anything is made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LibvirtLook {
    /// libvirt's own connection may go through the tunnel, too.
    pub rpc: bool,
    /// What keeps the destination's host from taking it.
    pub lacks: Vec<String>,
}

/// All of them.
pub const LIBVIRT: &str = "/v1/libvirt";

pub fn libvirt_path(id: Uuid) -> String {
    format!("{VERSION}/libvirt/{id}")
}
