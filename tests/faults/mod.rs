//! Faults of real migrations, and the stage that they happen on.
//!
//! `stage` is two hosts with an agent each and one guest; `reach` brings a migration to a phase and
//! holds it there; `migration` is one migration as it is seen from outside. `fault` breaks one thing and
//! repairs it, with the tools in `cut`, `gate`, `proxy` and `operator`. `judge` says whether all is as
//! it was, or the guest has moved. A `Case` is one fault and the end that it must have; `chaos` plays
//! hundreds of faults, drawn from a seed.

// Each user of the stage has its own part of it.
#![allow(dead_code, unreachable_pub, missing_docs)]

pub mod case;
pub mod chaos;
pub mod cut;
pub mod fault;
pub mod gate;
pub mod judge;
pub mod migration;
pub mod operator;
pub mod proxy;
pub mod reach;
pub mod stage;

pub use case::{Case, play_all};
pub use fault::{Fault, Who};
pub use migration::{End, Events, Migration};
pub use reach::Reach;
pub use stage::{Plan, Stage};

/// One of the two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Where the guest boots first.
    Alpha,
    /// The other one.
    Bravo,
}

impl Side {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Alpha, Self::Bravo];

    /// The other host.
    pub fn other(self) -> Self {
        match self {
            Self::Alpha => Self::Bravo,
            Self::Bravo => Self::Alpha,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Alpha => "alpha",
            Self::Bravo => "bravo",
        }
    }

    /// As the guest writes it into its blocks.
    pub fn letter(self) -> u8 {
        self.name().as_bytes()[0]
    }

    /// Where it is in a pair.
    pub fn index(self) -> usize {
        self as usize
    }
}
