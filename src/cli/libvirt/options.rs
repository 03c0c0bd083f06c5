//! The words of `vmferry libvirt migrate`: a few are ours, the others are `virsh migrate`'s, by the table of
//! `virsh_options`. virsh's ways of saying the domain and the destination's URI are understood as well.

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};

use super::rules;
use super::virsh_options::{self, Kind, kind};

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
    /// Only what can be said is asked for.
    pub(super) help: bool,
}

/// libvirt's connections of `--parallel` without a number.
const PARALLEL_DEFAULT: u32 = 2;
/// More than this is a mistake, and each is a stream of the session.
const PARALLEL_MAX: u32 = 64;

/// Reads the words after `migrate`.
///
/// # Errors
/// What is wrong with them, and what to write instead.
pub(super) fn parse(words: &[String]) -> anyhow::Result<Wanted> {
    let mut wanted = Wanted::default();
    let mut words = words.iter().map(String::as_str).peekable();
    while let Some(word) = words.next() {
        let Some(option) = word.strip_prefix("--") else {
            wanted.take_bare(word)?;
            continue;
        };
        let (name, given) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (option, None),
        };
        let mut value = || given.or_else(|| words.next()).with_context(|| format!("--{name} needs a value"));
        match name {
            "help" => wanted.help = true,
            "to" => wanted.to = value()?.to_owned(),
            "domain" => wanted.set_domain(value()?)?,
            "socket" => wanted.socket = Some(value()?.into()),
            "connect" => wanted.connect = Some(value()?.to_owned()),
            "dest-uri" | "desturi" => wanted.set_uri(value()?)?,
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
                let value = match kind(name)? {
                    Kind::Value(_) => Some(value()?),
                    Kind::Flag | Kind::Needless if given.is_some() => bail!("--{name} has no value"),
                    Kind::Flag => None,
                    Kind::Needless => continue,
                    Kind::No(reason) => bail!("--{name} cannot be used: {reason}"),
                };
                wanted.take(name, value)?;
            }
        }
    }
    wanted.check()
}

fn number<T: std::str::FromStr>(name: &str, word: &str) -> anyhow::Result<T> {
    word.parse().ok().with_context(|| format!("--{name}: {word} is not a number that it can have"))
}

impl Wanted {
    /// A word without an option: as with virsh the domain, and then the destination's URI.
    fn take_bare(&mut self, word: &str) -> anyhow::Result<()> {
        if word == "-h" {
            self.help = true;
            return Ok(());
        }
        ensure!(!word.starts_with('-'), "{word} is not known; options have long names, as virsh's");
        if self.domain.is_empty() {
            return self.set_domain(word);
        }
        ensure!(word.contains("://"), "{word} is one word too many: the destination is --to PEER, or a URI");
        self.set_uri(word)
    }

    fn set_domain(&mut self, name: &str) -> anyhow::Result<()> {
        ensure!(self.domain.is_empty(), "two domains: {} and {name}; each is a migration", self.domain);
        self.domain = name.to_owned();
        Ok(())
    }

    fn set_uri(&mut self, uri: &str) -> anyhow::Result<()> {
        ensure!(
            self.dest_uri.is_none(),
            "two URIs: one is the destination's libvirt; --migrateuri and --disks-uri are given by vmferry"
        );
        self.dest_uri = Some(uri.to_owned());
        Ok(())
    }

    /// Whether virsh gets this option.
    pub(super) fn has(&self, name: &str) -> bool {
        virsh_options::has(&self.virsh, name)
    }

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
        if self.help && (self.domain.is_empty() || self.to.is_empty()) {
            return Ok(self);
        }
        ensure!(!self.domain.is_empty(), "which domain? vmferry libvirt migrate DOMAIN --to PEER");
        ensure!(!self.to.is_empty(), "where to? --to PEER, as in [peer.NAME] of the configuration");
        rules::check(&self.virsh)?;
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
        assert!(wanted.has("timeout") && !wanted.has("time"));
        let value = |name| virsh_options::value(&wanted.virsh, name);
        assert_eq!((value("timeout"), value("live"), value("time")), (Some("30"), None, None));
    }

    #[test]
    fn a_line_for_virsh_is_understood_as_it_is() {
        let plain = of("web1 --to bravo --live --dest-uri qemu+ssh://bravo/system").unwrap();
        for line in [
            "--live web1 qemu+ssh://bravo/system --to bravo",
            "--live --verbose --domain web1 --desturi qemu+ssh://bravo/system --to bravo",
            "--desturi=qemu+ssh://bravo/system --domain=web1 --live --to=bravo",
        ] {
            assert_eq!(of(line).unwrap(), plain, "{line}");
        }
    }

    #[test]
    fn help_is_given_at_any_place_of_what_is_right() {
        for line in ["--live --help", "web1 -h", "web1 --to bravo --copy-storage-all --help"] {
            assert!(of(line).unwrap().help, "{line}");
        }
        assert!(of("web1 --to bravo --tunnelled --help").is_err());
        assert!(of("web1 --to bravo --timeout-suspend --help").is_err());
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
            ("web2", "one word too many"),
            ("--domain web2", "two domains"),
            ("qemu+ssh://a/system qemu+ssh://b/system", "two URIs"),
            ("-c qemu:///system", "long names"),
            ("--live=yes", "has no value"),
            ("--migrate-disks vda", "--copy-storage-all"),
            ("--timeout", "needs a value"),
            ("--stall 1", "ordinary"),
        ] {
            let error = of(&format!("web1 --to bravo {options}")).unwrap_err().to_string();
            assert!(error.contains(reason), "{options}: {error}");
        }
        assert!(of("--to bravo").is_err() && of("web1").is_err());
    }
}
