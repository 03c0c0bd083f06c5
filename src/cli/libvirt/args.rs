//! The arguments of `vmferry libvirt`.

use clap::Subcommand;

use super::virsh_options::help;

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum LibvirtCommand {
    /// Move a domain by `virsh migrate`, with all that it sends in the tunnel: libvirt's own connection (where
    /// the destination permits it), RAM and disks.
    #[command(
        override_usage = "vmferry libvirt migrate DOMAIN --to PEER [--print] [--json] [--dest-uri URI] [--connect URI] \
                          [--stall SECONDS] [virsh's options]",
        after_help = help()
    )]
    Migrate {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
        words: Vec<String>,
    },
    /// Say what libvirt or the destination will refuse; nothing is made or changed. Takes the words of `migrate`.
    #[command(override_usage = "vmferry libvirt check DOMAIN --to PEER [options of `migrate`]")]
    Check {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
        words: Vec<String>,
    },
    /// List those of this host, in both directions.
    List {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Take away what `migrate --print` has made, on both hosts. What is connected through it is cut. Says
    /// whether all that libvirt has moved went through it: exit code 3 if not.
    End {
        /// The migration: its id, the beginning of it, or its domain.
        #[arg(value_name = "DOMAIN|ID")]
        id: String,
        /// This host's libvirt.
        #[arg(long, value_name = "URI")]
        connect: Option<String>,
    },
}
