//! The `vmferry` binary: agent and command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmferry::cli::main()
}
