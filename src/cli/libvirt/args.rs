//! The arguments of `vmferry libvirt`.

use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum LibvirtCommand {
    /// Move a domain by `virsh migrate`, with all that it sends in the tunnel: libvirt's own connection (where
    /// the destination permits it), RAM and disks.
    #[command(
        override_usage = "vmferry libvirt migrate DOMAIN --to PEER [--print] [--json] [--dest-uri URI] [--connect URI] \
                          [--stall SECONDS] [options of `virsh migrate`]",
        after_help = "--to PEER        the destination, as [peer.NAME] in this host's configuration\n\
                      --print          print the line for virsh and keep the sockets for an hour, or until `vmferry libvirt end`\n\
                      --dest-uri URI   how libvirt reaches the destination's, where it is not to go through the tunnel\n\
                      --connect URI    this host's libvirt (qemu:///system)\n\
                      --stall SECONDS  no progress for this long: the migration is given up (120)\n\
                      --json           print one line of JSON for each change, the last with last=true\n\n\
                      Of virsh's options those that would leave the tunnel or break it are refused. \
                      `--parallel N` is `--parallel --parallel-connections N`.\n\n\
                      Exit codes: 0 moved; 1 failed, and the domain runs here; 2 usage, or the agent cannot be reached; \
                      3 moved, but something went past the tunnel or is left; 4 not known where it runs."
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
