//! The words of `vmferry libvirt migrate`: a few are ours, the others are `virsh migrate`'s and are passed
//! on, and those that would leave the tunnel or break it are refused by name. An option that this table does
//! not know is refused as well: nobody here could say where it leads.

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};

/// What was asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) domain: String,
    /// The peer.
    pub(super) to: String,
    /// The agent's socket.
    pub(super) socket: Option<PathBuf>,
    /// Where virsh finds the source's libvirt.
    pub(super) connect: Option<String>,
    /// Where libvirt finds the destination's, when that is not through the tunnel.
    pub(super) dest_uri: Option<String>,
    /// Only the line that would be run.
    pub(super) print: bool,
    pub(super) json: bool,
    /// Seconds without progress.
    pub(super) stall_s: Option<u64>,
    /// What virsh gets, each word by itself.
    pub(super) virsh: Vec<String>,
    /// The name at the destination, if it is another.
    pub(super) renamed: Option<String>,
    pub(super) p2p: bool,
    /// Disks are copied.
    pub(super) copies: bool,
    /// Which ones, if not all.
    pub(super) disks: Vec<String>,
    /// RAM connections beside the first.
    pub(super) parallel: u32,
    pub(super) postcopy: bool,
    /// An interrupted post-copy goes on: no disk is copied.
    pub(super) resume: bool,
    /// Only the definition moves.
    pub(super) offline: bool,
}

/// What an option of virsh's is to us.
enum Verdict {
    Flag,
    Value,
    /// With the reason.
    No(&'static str),
}

use Verdict::{Flag, No, Value};

/// libvirt's connections of `--parallel` without a number.
const PARALLEL_DEFAULT: u32 = 2;
/// More than this is a mistake, and each is a stream of the session.
const PARALLEL_MAX: u32 = 64;

const OURS: &str = "vmferry gives virsh this option itself, so that it leads into the tunnel";
const VIRSH: &[(&str, Verdict)] = &[
    ("live", Flag),
    ("offline", Flag),
    ("p2p", Flag),
    ("persistent", Flag),
    ("undefinesource", Flag),
    ("suspend", Flag),
    ("copy-storage-all", Flag),
    ("copy-storage-inc", Flag),
    ("copy-storage-synchronous-writes", Flag),
    ("change-protection", Flag),
    ("unsafe", Flag),
    ("compressed", Flag),
    ("auto-converge", Flag),
    ("abort-on-error", Flag),
    ("postcopy", Flag),
    ("postcopy-after-precopy", Flag),
    ("postcopy-resume", Flag),
    ("timeout-suspend", Flag),
    ("timeout-postcopy", Flag),
    ("parallel", Flag),
    ("parallel-connections", Value),
    ("graphicsuri", Value),
    ("dname", Value),
    ("timeout", Value),
    ("xml", Value),
    ("persistent-xml", Value),
    ("migrate-disks", Value),
    ("migrate-disks-detect-zeroes", Value),
    ("migrate-disks-target-zero", Value),
    ("comp-methods", Value),
    ("comp-mt-level", Value),
    ("comp-mt-threads", Value),
    ("comp-mt-dthreads", Value),
    ("comp-xbzrle-cache", Value),
    ("comp-zlib-level", Value),
    ("comp-zstd-level", Value),
    ("auto-converge-initial", Value),
    ("auto-converge-increment", Value),
    ("postcopy-bandwidth", Value),
    ("available-switchover-bandwidth", Value),
    ("bandwidth", Value),
    ("verbose", No("vmferry shows the progress itself; leave it out")),
    ("tls", No("libvirt has no TLS over unix sockets, and the tunnel is encrypted already; leave it out")),
    (
        "tls-destination",
        No("libvirt has no TLS over unix sockets, and the tunnel is encrypted already; leave it out"),
    ),
    ("migrateuri", No(OURS)),
    ("disks-uri", No(OURS)),
    (
        "desturi",
        No("give the destination's URI as --dest-uri, or let the tunnel carry libvirt's own connection"),
    ),
    ("domain", No("name the domain without an option")),
    ("listen-address", No("the destination would listen on its network, outside the tunnel")),
    ("disks-port", No("the disks would go to a port of the destination, outside the tunnel")),
    (
        "tunnelled",
        No("libvirt would put the RAM into its own connection, cannot copy disks so, and needs no vmferry"),
    ),
    ("direct", No("it is for hypervisors that migrate by themselves; QEMU does not")),
    ("rdma-pin-all", No("RDMA goes past the tunnel")),
    ("zerocopy", No("QEMU sends without copying over TCP only, and the tunnel's sockets are unix sockets")),
];

/// Reads the words after `migrate`.
///
/// # Errors
/// What is wrong with them, and what to write instead.
pub(super) fn parse(words: &[String]) -> anyhow::Result<Wanted> {
    let mut wanted = Wanted::default();
    let mut words = words.iter().map(String::as_str).peekable();
    while let Some(word) = words.next() {
        let Some(option) = word.strip_prefix("--") else {
            ensure!(!word.starts_with('-'), "{word} is not known; options have long names, as virsh's");
            ensure!(
                wanted.domain.is_empty(),
                "{word} is one word too many: the destination's URI is given as --dest-uri, and the other URIs \
                 by vmferry"
            );
            wanted.domain = word.to_owned();
            continue;
        };
        let (name, given) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (option, None),
        };
        let mut value = || given.or_else(|| words.next()).with_context(|| format!("--{name} needs a value"));
        match name {
            "to" => wanted.to = value()?.to_owned(),
            "socket" => wanted.socket = Some(value()?.into()),
            "connect" => wanted.connect = Some(value()?.to_owned()),
            "dest-uri" => wanted.dest_uri = Some(value()?.to_owned()),
            "stall" => wanted.stall_s = Some(number(name, value()?)?),
            "print" => wanted.print = true,
            "json" => wanted.json = true,
            // As people say it: virsh has the number in an option of its own.
            "parallel" => {
                let next = words.peek().is_some_and(|next| next.parse::<u32>().is_ok());
                wanted.take("parallel", None)?;
                match given {
                    Some(count) => wanted.take("parallel-connections", Some(count))?,
                    None if next => wanted.take("parallel-connections", words.next())?,
                    None => {}
                }
            }
            _ => {
                let value = match verdict(name)? {
                    Value => Some(value()?),
                    Flag if given.is_some() => bail!("--{name} has no value"),
                    Flag => None,
                    No(reason) => bail!("--{name} cannot be used: {reason}"),
                };
                wanted.take(name, value)?;
            }
        }
    }
    wanted.check()
}

fn verdict(name: &str) -> anyhow::Result<&'static Verdict> {
    let known = VIRSH.iter().find(|(option, _)| *option == name);
    known.map(|(_, verdict)| verdict).with_context(|| {
        format!("--{name} is not an option of `virsh migrate` that vmferry knows, so whether it leaves the tunnel is not known either")
    })
}

fn number<T: std::str::FromStr>(name: &str, word: &str) -> anyhow::Result<T> {
    word.parse().ok().with_context(|| format!("--{name}: {word} is not a number that it can have"))
}

impl Wanted {
    fn take(&mut self, name: &str, value: Option<&str>) -> anyhow::Result<()> {
        match (name, value) {
            ("p2p", _) => self.p2p = true,
            ("copy-storage-all" | "copy-storage-inc", _) => self.copies = true,
            ("migrate-disks", Some(disks)) => self.disks = disks.split(',').map(str::to_owned).collect(),
            ("postcopy", _) => self.postcopy = true,
            ("postcopy-resume", _) => self.resume = true,
            ("offline", _) => self.offline = true,
            ("dname", Some(other)) => self.renamed = Some(other.to_owned()),
            ("parallel", _) => self.parallel = self.parallel.max(PARALLEL_DEFAULT),
            ("parallel-connections", Some(count)) => {
                self.parallel = number(name, count)?;
                ensure!(
                    (1..=PARALLEL_MAX).contains(&self.parallel),
                    "--parallel has 1 to {PARALLEL_MAX} connections"
                );
            }
            _ => {}
        }
        let word = match value {
            Some(value) => format!("--{name}={value}"),
            None => format!("--{name}"),
        };
        if !self.virsh.contains(&word) {
            self.virsh.push(word);
        }
        Ok(())
    }

    fn check(self) -> anyhow::Result<Self> {
        ensure!(!self.domain.is_empty(), "which domain? vmferry libvirt migrate DOMAIN --to PEER");
        ensure!(!self.to.is_empty(), "where to? --to PEER, as in [peer.NAME] of the configuration");
        ensure!(
            self.disks.is_empty() || self.copies,
            "--migrate-disks says which disks are copied: add --copy-storage-all or --copy-storage-inc"
        );
        ensure!(
            self.stall_s.is_none_or(|s| s >= 10),
            "--stall: less than 10 seconds without progress is ordinary"
        );
        Ok(self)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn of(line: &str) -> anyhow::Result<Wanted> {
        parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn virshs_words_are_passed_on_and_understood() {
        let line = "web1 --live --p2p --to bravo --copy-storage-all --migrate-disks vda,vdb --bandwidth=50 \
                    --persistent --undefinesource --timeout 30 --timeout-suspend --json";
        let wanted = of(line).unwrap();
        assert_eq!((wanted.domain.as_str(), wanted.to.as_str()), ("web1", "bravo"));
        assert!(wanted.p2p && wanted.copies && wanted.json && !wanted.postcopy);
        assert_eq!(wanted.disks, ["vda", "vdb"]);
        let passed = "--live --p2p --copy-storage-all --migrate-disks=vda,vdb --bandwidth=50 --persistent \
                      --undefinesource --timeout=30 --timeout-suspend";
        assert_eq!(wanted.virsh.join(" "), passed.split_whitespace().collect::<Vec<_>>().join(" "));
    }

    #[test]
    fn the_number_of_parallel_connections_is_taken_as_people_say_it() {
        for line in [
            "web1 --parallel 4 --to bravo",
            "web1 --to=bravo --parallel=4",
            "web1 --parallel --parallel-connections 4 --to bravo",
        ] {
            let wanted = of(line).unwrap();
            assert_eq!(wanted.parallel, 4, "{line}");
            assert_eq!(wanted.virsh, ["--parallel", "--parallel-connections=4"], "{line}");
        }
        assert_eq!(of("web1 --parallel --to bravo").unwrap().parallel, PARALLEL_DEFAULT);
        assert!(of("web1 --parallel 4000 --to bravo").is_err());
    }

    #[test]
    fn what_leaves_the_tunnel_is_refused_by_name_and_with_the_reason() {
        for (options, reason) in [
            ("--tls", "no TLS over unix sockets"),
            ("--migrateuri tcp://bravo", "gives virsh this option itself"),
            ("--disks-uri=tcp://bravo:1", "gives virsh this option itself"),
            ("--tunnelled", "needs no vmferry"),
            ("--listen-address 0.0.0.0", "outside the tunnel"),
            ("--disks-port 49153", "outside the tunnel"),
            ("--zerocopy", "TCP only"),
            ("--rdma-pin-all", "RDMA"),
            ("--a-new-one", "whether it leaves the tunnel is not known"),
            ("qemu+tcp://bravo/system", "--dest-uri"),
            ("-c qemu:///system", "long names"),
            ("--live=yes", "has no value"),
            ("--migrate-disks vda", "add --copy-storage-all"),
            ("--timeout", "needs a value"),
            ("--stall 1", "ordinary"),
        ] {
            let error = of(&format!("web1 --to bravo {options}")).unwrap_err().to_string();
            assert!(error.contains(reason), "{options}: {error}");
        }
        assert!(of("--to bravo").is_err() && of("web1").is_err());
    }
}
