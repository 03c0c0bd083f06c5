//! The session protocol, pure as it is: against a model, against a peer that means harm, and what
//! it promises about order, shares and paths. Each world is drawn from a seed.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failure here is a failure of the test")]

mod attack;
mod cuts;
mod hostile;
mod inflow;
mod life;
mod model;
mod pair;
mod path;
mod rng;
mod roundtrip;
mod schedule;
mod shares;
mod wire;
mod world;
