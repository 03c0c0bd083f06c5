//! Faults injected into migrations of one guest that goes there and back between two hosts, drawn
//! from a seed. After each one the judge must be content, and the guest's next migration must succeed:
//! so the two hosts change their parts all the time.
//!
//! `plan` draws, `inflict` breaks, `judge` judges, `record` keeps what was measured; `world` is what
//! all of it happens on, and `run` one migration as it is seen from outside.

// Each test uses its own part of it.
#![allow(dead_code, unreachable_pub)]

pub mod chaos;
pub mod inflict;
pub mod judge;
pub mod others;
pub mod plan;
pub mod record;
pub mod rng;
pub mod run;
pub mod world;

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
