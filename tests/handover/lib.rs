//! The hand-over's own source, without the rest of the product.

#[path = "../../src/migrate/handover/mod.rs"]
pub mod handover;
#[path = "../../src/migrate/handover_run.rs"]
pub mod handover_run;
