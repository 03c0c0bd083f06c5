//! `[deadlines]`: how long is waited for what.

use std::ops::RangeInclusive;
use std::time::Duration;

use serde::Deserialize;

/// Longest that a `before_start` command may take.
pub const HOOK_S_MAX: u64 = 600;

/// What a destination may take to look at its QEMU and at what is on offer.
const LOOK: Duration = Duration::from_secs(30);

/// One line for each: its key, its method, its default, and what it may be.
macro_rules! deadlines {
    ($($(#[$doc:meta])* pub $key:ident: $name:ident = $default:literal, $range:expr;)+) => {
        /// How long is waited for what. All in seconds.
        #[derive(Debug, Clone, Copy, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct Deadlines { $($(#[$doc])* pub $key: u64,)+ }

        impl Default for Deadlines {
            fn default() -> Self {
                Self { $($key: $default,)+ }
            }
        }

        impl Deadlines {
            $($(#[$doc])* #[must_use] pub fn $name(&self) -> Duration { Duration::from_secs(self.$key) })+

            /// What a source gives its destination to get ready, or to say what would keep it from that: images are
            /// made there and a QEMU is started.
            #[must_use]
            pub fn prepare(&self) -> Duration {
                self.make() + self.qemu_start() + LOOK
            }

            pub(super) fn check(&self) -> Result<(), (String, String)> {
                $(check(stringify!($key), self.$key, $range)?;)+
                Ok(())
            }
        }
    };
}

deadlines! {
    /// Nothing received on a connection for this long means that it is dead.
    pub dead_peer_s: dead_peer = 5, 1..=600;
    /// A session goes on without a connection for this long; then it ends, and with it
    /// every migration that has not been handed over.
    pub resume_s: resume = 60, 1..=3600;
    /// The same while a migration keeps its guest paused: then it rolls back.
    pub resume_paused_s: resume_paused = 15, 1..=3600;
    /// A fresh destination QEMU must offer its monitor within this time.
    pub qemu_start_s: qemu_start = 60, 1..=600;
    /// The images of one guest may take this long to be made, all together; its source waits as long.
    pub make_s: make = 1200, 1..=86_400;
    /// A mirror or RAM stream without any progress for this long fails the migration.
    pub stall_s: stall = 60, 5..=3600;
    /// A `before_start` command may take this long; it is downtime.
    pub hook_s: hook = 30, 1..=HOOK_S_MAX;
    /// A destination that has loaded the guest waits this long for a lost source to return
    /// before it declares, durably, that the guest never ran there.
    pub handover_s: handover = 120, 1..=86_400;
    /// A peer that was granted a migration here must have handed its guest over within this time.
    pub grant_s: grant = 604_800, 5..=2_592_000;
    /// A migration whose guest may be either side's is shown as undecided after this long.
    pub undecided_s: undecided = 30, 1..=3600;
    /// An operator's decision is void unless the migration has taken it within this time.
    pub order_s: order = 10, 1..=600;
    /// `recover` waits this long for what another agent knows.
    pub recover_s: recover = 5, 1..=600;
}

fn check(key: &str, value: u64, range: RangeInclusive<u64>) -> Result<(), (String, String)> {
    if range.contains(&value) {
        return Ok(());
    }
    let (low, high) = range.into_inner();
    Err((format!("deadlines.{key}"), format!("{value} is outside {low}–{high} seconds")))
}
