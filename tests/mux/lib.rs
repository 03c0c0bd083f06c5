//! The session protocol's own source, without the rest of the product.
#![allow(clippy::duplicate_mod)]

#[path = "../../src/json.rs"]
pub mod json;
#[path = "../../src/mux/mod.rs"]
pub mod mux;
#[path = "../../src/printable.rs"]
pub mod printable;
