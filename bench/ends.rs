//! The command line of a relay, which is one of two ends.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

#[derive(Parser)]
pub(crate) struct Cli<How: Args> {
    #[command(subcommand)]
    pub(crate) end: End<How>,
}

#[derive(Subcommand)]
pub(crate) enum End<How: Args> {
    /// Takes connections on a unix socket.
    Near {
        #[arg(long)]
        local: PathBuf,
        #[arg(long)]
        peer: SocketAddr,
        #[command(flatten)]
        how: How,
    },
    /// Passes them on to a unix socket.
    Far {
        #[arg(long)]
        remote: PathBuf,
        #[arg(long, default_value = "127.0.0.1:0")]
        listen: SocketAddr,
        #[command(flatten)]
        how: How,
    },
}
