//! Which of virsh's options cannot stand together. libvirt or virsh refuses each of these, often late and without
//! the option's name; here it is said at once, with what to write instead.

use anyhow::{bail, ensure};

use super::virsh_options::{has, value};

const COPIES: &[&str] = &["copy-storage-all", "copy-storage-inc"];

/// An option, and those of which it needs one.
const NEEDS: &[(&str, &[&str])] = &[
    ("migrate-disks", COPIES),
    ("migrate-disks-detect-zeroes", COPIES),
    ("migrate-disks-target-zero", COPIES),
    ("copy-storage-synchronous-writes", COPIES),
    ("offline", &["persistent"]),
    ("persistent-xml", &["persistent"]),
    ("timeout", &["live"]),
    ("timeout-suspend", &["timeout"]),
    ("timeout-postcopy", &["timeout"]),
    ("timeout-postcopy", &["postcopy"]),
    ("postcopy", &["live"]),
    ("postcopy-after-precopy", &["postcopy"]),
    ("postcopy-resume", &["postcopy"]),
    ("parallel-connections", &["parallel"]),
    ("auto-converge-initial", &["auto-converge"]),
    ("auto-converge-increment", &["auto-converge"]),
];

/// Two that exclude each other, and what to do.
const APART: &[(&str, &str, &str)] = &[
    (
        "live",
        "offline",
        "a domain that runs moves with --live, the definition of one that does not with --offline",
    ),
    ("copy-storage-all", "copy-storage-inc", "all is copied, or what the backing file lacks: leave one out"),
    ("timeout-suspend", "timeout-postcopy", "leave one out"),
    (
        "offline",
        "copy-storage-all",
        "libvirt moves no disks of a domain that does not run; copy the images yourself",
    ),
    (
        "offline",
        "copy-storage-inc",
        "libvirt moves no disks of a domain that does not run; copy the images yourself",
    ),
    ("suspend", "postcopy", "post-copy has the guest run at the destination: leave one out"),
];

/// Options that tune a method of `--comp-methods`.
const TUNES: &[(&str, &str)] = &[
    ("comp-xbzrle-cache", "xbzrle"),
    ("comp-mt-level", "mt"),
    ("comp-mt-threads", "mt"),
    ("comp-mt-dthreads", "mt"),
    ("comp-zlib-level", "zlib"),
    ("comp-zstd-level", "zstd"),
];

/// Of the words that virsh gets.
///
/// # Errors
/// Two of them do not go together.
pub(super) fn check(words: &[String]) -> anyhow::Result<()> {
    for (option, needed) in NEEDS.iter().filter(|(option, _)| has(words, option)) {
        ensure!(
            needed.iter().any(|one| has(words, one)),
            "--{option} needs --{}: add it, or leave --{option} out",
            needed.join(" or --")
        );
    }
    for (one, other, remedy) in APART {
        ensure!(
            !(has(words, one) && has(words, other)),
            "--{one} and --{other} do not go together: {remedy}"
        );
    }
    compression(words)
}

fn compression(words: &[String]) -> anyhow::Result<()> {
    let methods: Vec<&str> =
        value(words, "comp-methods").into_iter().flat_map(|all| all.split(',')).collect();
    for (option, method) in TUNES.iter().filter(|(option, _)| has(words, option)) {
        ensure!(methods.contains(method), "--{option} needs --comp-methods {method}");
    }
    if has(words, "parallel") {
        if let Some(alone) = methods.iter().find(|method| ["xbzrle", "mt"].contains(method)) {
            bail!("--comp-methods {alone} does not go with --parallel: use zlib or zstd");
        }
        ensure!(
            !has(words, "compressed") || !methods.is_empty(),
            "--compressed with --parallel needs --comp-methods zlib or zstd"
        );
    } else if let Some(many) = methods.iter().find(|method| ["zlib", "zstd"].contains(method)) {
        bail!("--comp-methods {many} needs --parallel; without it there are xbzrle and mt");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(options: &str) -> String {
        let mut words: Vec<String> = Vec::new();
        for word in options.split_whitespace() {
            match words.last_mut() {
                Some(option) if !word.starts_with("--") => *option += &format!("={word}"),
                _ => words.push(word.to_owned()),
            }
        }
        check(&words).map_or_else(|e| e.to_string(), |()| String::new())
    }

    #[test]
    fn what_does_not_go_together_is_refused_with_a_remedy() {
        for (options, said) in [
            ("--migrate-disks vda", "--migrate-disks needs --copy-storage-all or --copy-storage-inc"),
            ("--copy-storage-synchronous-writes", "needs --copy-storage-all"),
            ("--offline", "--offline needs --persistent"),
            ("--persistent-xml f", "needs --persistent"),
            ("--timeout 5", "--timeout needs --live"),
            ("--live --timeout-suspend", "needs --timeout:"),
            ("--live --timeout 5 --timeout-postcopy", "needs --postcopy"),
            ("--postcopy", "--postcopy needs --live"),
            ("--live --postcopy-resume", "needs --postcopy"),
            ("--live --postcopy-after-precopy", "needs --postcopy"),
            ("--parallel-connections 4", "needs --parallel:"),
            ("--auto-converge-initial 5", "needs --auto-converge:"),
            ("--live --offline --persistent", "--live and --offline do not go together"),
            ("--copy-storage-all --copy-storage-inc", "leave one out"),
            ("--live --postcopy --timeout 5 --timeout-postcopy --timeout-suspend", "do not go together"),
            ("--offline --persistent --copy-storage-inc", "copy the images yourself"),
            ("--live --suspend --postcopy", "do not go together"),
            ("--compressed --comp-xbzrle-cache 5", "needs --comp-methods xbzrle"),
            ("--comp-methods xbzrle --comp-mt-level 5", "needs --comp-methods mt"),
            ("--parallel --comp-methods xbzrle", "use zlib or zstd"),
            ("--parallel --compressed", "needs --comp-methods zlib or zstd"),
            ("--comp-methods zstd", "needs --parallel"),
        ] {
            let refusal = refusal(options);
            assert!(refusal.contains(said), "{options}: {refusal:?}");
        }
    }

    #[test]
    fn what_goes_together_is_taken() {
        for options in [
            "--live --p2p --copy-storage-inc --migrate-disks vda --copy-storage-synchronous-writes",
            "--live --timeout 5",
            "--live --timeout 5 --timeout-suspend",
            "--live --postcopy --timeout 5 --timeout-postcopy --postcopy-bandwidth 5",
            "--offline --persistent --undefinesource",
            "--live --parallel 4 --compressed --comp-methods zlib --comp-zlib-level 1",
            "--live --compressed --comp-methods xbzrle,mt --comp-xbzrle-cache 5 --comp-mt-level 5",
            "--live --compressed --auto-converge --auto-converge-initial 5 --persistent --persistent-xml f",
            "--copy-storage-all --suspend --unsafe",
        ] {
            assert_eq!(refusal(options), "", "{options}");
        }
    }
}
