//! QEMU's commands as types, under QEMU's names. What a command means and when it may be used
//! is said where QEMU's own documentation is silent or misleading; the rest is QEMU's.

mod bitmap;
mod block;
mod machine;
mod migration;
mod schema;
mod throttle;

pub use bitmap::*;
pub use block::*;
pub use machine::*;
pub use migration::*;
pub use schema::*;
pub use throttle::*;

use serde::Deserialize;

/// The return of a command that has nothing to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Empty {}

/// Commands without arguments.
macro_rules! plain_commands {
    ($($(#[$doc:meta])* $name:ident = $qemu:literal -> $returns:ty;)+) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, serde::Serialize)]
        pub struct $name;

        impl crate::qemu::Command for $name {
            const NAME: &'static str = $qemu;
            type Return = $returns;
        }
    )+};
}

/// Commands whose arguments are declared beside them.
macro_rules! commands {
    ($($name:ident = $qemu:literal -> $returns:ty;)+) => {$(
        impl crate::qemu::Command for $name {
            const NAME: &'static str = $qemu;
            type Return = $returns;
        }
    )+};
}

use {commands, plain_commands};
