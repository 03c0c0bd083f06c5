//! What each option of `virsh migrate` is here: passed on, not needed, or refused, with the reason, because it would
//! leave the tunnel or break it. An option that this table does not know is refused as well: nobody here could say
//! where it leads.

use std::fmt::Write;

use anyhow::Context;

/// What is done with an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Passed on.
    Flag,
    /// Passed on with its value, which the help calls so.
    Value(&'static str),
    /// Taken and left out.
    Needless,
    /// With the reason.
    No(&'static str),
}

use Kind::{Flag, Needless, No, Value};

const OURS: &str = "vmferry gives virsh this option itself, so that it leads into the tunnel";
const NO_TLS: &str =
    "libvirt has no TLS over unix sockets, and the tunnel is encrypted already; leave it out";

type Row = (&'static str, Kind, &'static str);

/// By what they are about, each with what it does.
const VIRSH: &[(&str, &[Row])] = &[
    (
        "How the domain moves",
        &[
            ("live", Flag, "the guest runs on meanwhile"),
            ("p2p", Flag, "libvirt's daemon talks to the other one; without it virsh stays between"),
            ("offline", Flag, "only the definition, of a domain that does not run"),
            ("persistent", Flag, "the destination keeps the definition"),
            ("undefinesource", Flag, "the source forgets it"),
            ("suspend", Flag, "it stands still at the destination"),
            ("change-protection", Flag, "nobody changes it meanwhile"),
            ("unsafe", Flag, "also where libvirt thinks of the disks' caches"),
            ("abort-on-error", Flag, "give up where the guest has an error of a disk"),
            ("dname", Value("NAME"), "its name at the destination"),
            ("xml", Value("FILE"), "its XML at the destination"),
            ("persistent-xml", Value("FILE"), "the XML of the definition that is kept there"),
            ("graphicsuri", Value("URI"), "where viewers of its display are sent"),
            ("timeout", Value("SECONDS"), "then it is suspended, or turned to post-copy"),
            ("timeout-suspend", Flag, "suspended"),
            ("timeout-postcopy", Flag, "turned to post-copy"),
        ],
    ),
    (
        "Disks",
        &[
            ("copy-storage-all", Flag, "copy all of each"),
            ("copy-storage-inc", Flag, "copy what its backing file lacks, which both hosts have"),
            ("migrate-disks", Value("LIST"), "only these: vda,vdb"),
            ("copy-storage-synchronous-writes", Flag, "the guest's writes wait for the destination"),
            ("migrate-disks-detect-zeroes", Value("LIST"), "of these zeroes are not sent"),
            ("migrate-disks-target-zero", Value("LIST"), "these are empty at the destination"),
        ],
    ),
    (
        "RAM",
        &[
            ("parallel", Flag, "by several connections: --parallel 4"),
            ("parallel-connections", Value("N"), "so many, beside the main one"),
            ("bandwidth", Value("MIB/S"), "of RAM, and of each disk"),
            ("available-switchover-bandwidth", Value("MIB/S"), "what QEMU reckons with for the pause"),
            ("auto-converge", Flag, "slow the guest down if it writes too fast"),
            ("auto-converge-initial", Value("PERCENT"), "at first"),
            ("auto-converge-increment", Value("PERCENT"), "and then more each time"),
            ("compressed", Flag, "compress"),
            ("comp-methods", Value("LIST"), "xbzrle, mt; with --parallel zlib, zstd"),
            ("comp-xbzrle-cache", Value("BYTES"), "xbzrle's memory"),
            ("comp-mt-level", Value("N"), "mt's level"),
            ("comp-mt-threads", Value("N"), "mt's threads"),
            ("comp-mt-dthreads", Value("N"), "those at the destination"),
            ("comp-zlib-level", Value("N"), "zlib's level"),
            ("comp-zstd-level", Value("N"), "zstd's level"),
        ],
    ),
    (
        "Post-copy",
        &[
            (
                "postcopy",
                Flag,
                "the guest may run there before its RAM is: `virsh migrate-postcopy` begins that",
            ),
            ("postcopy-after-precopy", Flag, "it begins after one pass"),
            ("postcopy-bandwidth", Value("MIB/S"), "of RAM from then on"),
            ("postcopy-resume", Flag, "one that was broken goes on"),
        ],
    ),
    ("Not needed", &[("verbose", Needless, "the progress is always shown")]),
    (
        "Refused",
        &[
            ("migrateuri", No(OURS), ""),
            ("disks-uri", No(OURS), ""),
            ("tls", No(NO_TLS), ""),
            ("tls-destination", No(NO_TLS), ""),
            (
                "listen-address",
                No("the destination would listen on its network, outside the tunnel; leave it out"),
                "",
            ),
            (
                "disks-port",
                No("the disks would go to a port of the destination, outside the tunnel; leave it out"),
                "",
            ),
            (
                "tunnelled",
                No(
                    "libvirt would put the RAM into its own connection, cannot copy disks so, and needs no vmferry",
                ),
                "",
            ),
            ("direct", No("it is for hypervisors that migrate by themselves; QEMU does not"), ""),
            ("rdma-pin-all", No("RDMA goes past the tunnel"), ""),
            (
                "zerocopy",
                No("QEMU sends without copying over TCP only, and the tunnel's sockets are unix sockets"),
                "",
            ),
        ],
    ),
];

/// What an option of virsh's is.
///
/// # Errors
/// It is not known.
pub(super) fn kind(name: &str) -> anyhow::Result<Kind> {
    let mut rows = VIRSH.iter().flat_map(|(_, rows)| rows.iter());
    let known = rows.find(|(option, ..)| *option == name).map(|(_, kind, _)| *kind);
    known.with_context(|| {
        format!("--{name} is not an option of `virsh migrate` that vmferry knows, so whether it leaves the tunnel is not known either")
    })
}

/// Whether an option is among words for virsh, `--NAME` or `--NAME=VALUE`.
pub(super) fn has(words: &[String], name: &str) -> bool {
    words.iter().any(|word| word.strip_prefix("--").is_some_and(|word| word.split('=').next() == Some(name)))
}

/// The value that it has there.
pub(super) fn value<'a>(words: &'a [String], name: &str) -> Option<&'a str> {
    words.iter().find_map(|word| word.strip_prefix("--")?.strip_prefix(name)?.strip_prefix('='))
}

/// The end of `vmferry libvirt migrate --help`.
pub(in crate::cli) fn help() -> String {
    let mut text = OWN.to_owned();
    for (about, rows) in VIRSH {
        let _ = write!(text, "\n\n{about} (virsh's):");
        for (option, kind, does) in *rows {
            let (option, does) = match kind {
                Value(value) => (format!("--{option} {value}"), *does),
                No(reason) => (format!("--{option}"), *reason),
                Flag | Needless => (format!("--{option}"), *does),
            };
            let _ = write!(text, "\n  {option:33} {does}");
        }
    }
    text + CODES
}

const OWN: &str = "\
vmferry's own:
  --to PEER                         the destination, as [peer.NAME] in this host's configuration
  --dest-uri URI                    how libvirt reaches the destination's, where it is not to go through the tunnel;
                                    also as virsh has it: after the domain, or --desturi URI
  --connect URI                     this host's libvirt (qemu:///system)
  --print                           print the line for virsh and keep the sockets for an hour, or until
                                    `vmferry libvirt end`
  --stall SECONDS                   no progress for this long: the migration is given up (120)
  --json                            print one line of JSON for each change, the last with last=true";

const CODES: &str = "

Exit codes: 0 moved; 1 failed, and the domain runs here; 2 usage, or the agent cannot be reached; 3 moved, but \
something went past the tunnel or is left; 4 not known where it runs.";

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_help_has_each_option_once_with_what_it_does() {
        let help = help();
        for (option, ..) in VIRSH.iter().flat_map(|(_, rows)| rows.iter()) {
            let lines = help.lines().filter_map(|line| line.trim_start().split_once(' '));
            let of_it: Vec<_> = lines.filter(|(word, _)| *word == format!("--{option}")).collect();
            assert!(of_it.len() == 1 && of_it[0].1.trim().len() > 3, "--{option}: {of_it:?}");
        }
    }
}
