//! The `vmferry` binary: agent and command line.

fn main() {}
