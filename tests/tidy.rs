//! The house rules that a compiler does not know: who may use whom, what the pure code must not
//! touch, how long a file may grow, what a text may not name. Reads the checkout, builds nothing.
//! Every rule is shown to fail on a made-up mistake (`each_rule_can_fail`).

#![allow(clippy::expect_used)]

#[path = "tidy_rules/source.rs"]
mod source;

use std::path::{Path, PathBuf};
use std::process::Command;

use source::{code_of, paths_used};
use vmferry::config::Config;

/// Longest source file, tests in it included.
const LINES_MAX: usize = 600;

/// What a module of `src/` may use of ours, by path prefix. What is not here is forbidden.
const EDGES: &[(&str, &[&str])] = &[
    (
        "cli",
        &[
            "agent::How",
            "agent::run",
            "agent::succession_formats",
            "api",
            "config::DEFAULT_PATH",
            "migrate::DowntimeLimit",
            "migrate::Options",
            "migrate::handover::Side",
            "migrate::journal::Role",
            "migrate::Retry",
            "migrate::phase",
            "migrate::problem",
            "migrate::progress",
            "migrate::recover",
            "migrate::share::Weight",
            "migrate::vm_state",
            "printable",
            "rate",
        ],
    ),
    // `vmferry certs` works on files, without an agent.
    ("cli::certs", &["cli", "net::identity", "net::tls::TlsPaths", "pki"]),
    ("agent", &["api", "config", "metrics", "migrate", "mux", "net", "rate"]),
    (
        "api",
        &[
            "migrate::Options",
            "migrate::handover::Side",
            "migrate::problem",
            "migrate::progress::Reconnecting",
            "migrate::recover",
            "migrate::share::Weight",
            "migrate::vm_state::VmState",
            "rate",
        ],
    ),
    ("metrics", &["migrate::journal::Role", "migrate::progress", "mux::Stats"]),
    ("migrate", &["config", "error_chain", "mux", "net", "printable", "qemu", "rate"]),
    ("net", &["error_chain", "mux", "printable", "rate"]),
    ("pki", &["net::credentials", "net::identity", "net::tls"]),
    ("config", &["net::identity", "rate"]),
    ("mux", &["printable"]),
    ("qemu", &["printable"]),
    ("error_chain", &[]),
    ("printable", &[]),
    ("rate", &[]),
    ("lib", &[]),
    ("main", &[]),
];

/// Words of the outside world that sans-I/O code has no business with.
const IMPURE: &[&str] = &[
    "tokio",
    "rustls",
    "getrandom",
    "tracing",
    "nix",
    "socket2",
    "Instant::now",
    "SystemTime",
    "std::fs",
    "std::net",
    "std::os",
    "std::thread",
    "std::process",
    "std::env",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Files that git knows or would add, relative to the checkout.
fn files() -> Vec<PathBuf> {
    let list = ["ls-files", "--cached", "--others", "--exclude-standard"];
    let output = Command::new("git").args(list).current_dir(root()).output().expect("git");
    assert!(output.status.success(), "git ls-files: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("paths in UTF-8");
    text.lines().map(PathBuf::from).filter(|p| root().join(p).is_file()).collect()
}

fn read(path: &Path) -> String {
    let bytes = std::fs::read(root().join(path)).expect("a readable file");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// `src/net/tls.rs` is `net::tls`, `src/net/mod.rs` is `net`.
fn module_of(path: &Path) -> Option<String> {
    let inner = path.strip_prefix("src").ok()?.with_extension("");
    let parts: Vec<_> = inner.iter().map(|p| p.to_string_lossy().into_owned()).collect();
    let parts = parts.strip_suffix(&["mod".to_owned()]).unwrap_or(&parts);
    (path.extension()? == "rs").then(|| parts.join("::"))
}

fn starts_with_path(path: &str, prefix: &str) -> bool {
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// The rules of the nearest ancestor that has some.
fn edges_of(module: &str) -> Option<&'static [&'static str]> {
    let fitting = EDGES.iter().filter(|(m, _)| starts_with_path(module, m));
    fitting.max_by_key(|(m, _)| m.len()).map(|(_, allowed)| *allowed)
}

fn upward_imports(path: &Path, text: &str) -> Vec<String> {
    let Some(module) = module_of(path) else { return Vec::new() };
    let Some(allowed) = edges_of(&module) else { return vec![format!("module {module} is in no layer")] };
    let own = module.split("::").next().unwrap_or(&module);
    let is_wrong = |used: &String| {
        let foreign = !starts_with_path(used, own);
        foreign && !allowed.iter().any(|a| starts_with_path(used, a))
    };
    let wrong = paths_used(&code_of(text), &module).into_iter().filter(is_wrong);
    wrong.map(|used| format!("{module} must not use crate::{used}")).collect()
}

fn impure_core(path: &Path, text: &str) -> Vec<String> {
    if !path.starts_with("src/mux") && !path.starts_with("src/migrate/handover") {
        return Vec::new();
    }
    let code = code_of(text);
    let found = IMPURE.iter().filter(|word| source::has_word(&code, word));
    found.map(|word| format!("the pure code names {word}")).collect()
}

fn panics(path: &Path, text: &str) -> Vec<String> {
    if !path.starts_with("src") {
        return Vec::new();
    }
    let code = code_of(text);
    let found = [".unwrap()", ".expect("].into_iter().filter(|call| code.contains(call));
    found.map(|call| format!("{call} outside tests")).collect()
}

fn too_long(path: &Path, text: &str) -> Vec<String> {
    let lines = text.lines().count();
    let long = module_of(path).is_some() && lines > LINES_MAX;
    long.then(|| format!("{lines} lines; split it, {LINES_MAX} are enough")).into_iter().collect()
}

/// Paths of the machine on which somebody happened to write this.
fn workplaces(_: &Path, text: &str) -> Vec<String> {
    let place = concat!("/wor", "k/");
    let starts_a_path = |at: usize| {
        let before = text[..at].chars().next_back();
        before.is_none_or(|c| !(c.is_alphanumeric() || "._-~}".contains(c)))
    };
    let hits = text.match_indices(place).filter(|(at, _)| starts_a_path(*at));
    hits.map(|(at, _)| format!("a workplace's path on line {}", text[..at].lines().count().max(1))).collect()
}

/// What a document calls by its path in this checkout must be there.
fn dead_paths(path: &Path, text: &str) -> Vec<String> {
    if path.extension().is_none_or(|e| e != "md") {
        return Vec::new();
    }
    let of_ours = |word: &&str| {
        ["src/", "tests/", "deploy/", "bench/", "certs/"].iter().any(|f| word.starts_with(f))
            && !word.contains(['*', '…', ' ', '<'])
    };
    let quoted = text.split('`').skip(1).step_by(2).filter(of_ours);
    let linked = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
    let linked = linked.filter(|l| !l.is_empty() && !l.contains("://"));
    let folder = path.parent().unwrap_or(Path::new(""));
    let missing = |word: &&str| !root().join(word).exists() && !root().join(folder).join(word).exists();
    quoted.chain(linked).filter(missing).map(|word| format!("names {word}, which is not there")).collect()
}

type Rule = fn(&Path, &str) -> Vec<String>;

const RULES: &[(&str, Rule)] = &[
    ("upward import", upward_imports),
    ("impure core", impure_core),
    ("panic", panics),
    ("length", too_long),
    ("workplace", workplaces),
    ("dead path", dead_paths),
];

#[test]
fn the_checkout_is_tidy() {
    let mut found = Vec::new();
    let mut sources = 0;
    for path in files() {
        let text = read(&path);
        sources += usize::from(module_of(&path).is_some());
        for (name, rule) in RULES {
            found.extend(rule(&path, &text).into_iter().map(|w| format!("{}: {name}: {w}", path.display())));
        }
    }
    assert!(sources > 50, "only {sources} sources were read");
    assert!(found.is_empty(), "\n{}\n", found.join("\n"));
}

#[test]
fn each_rule_can_fail() {
    let long = "//\n".repeat(LINES_MAX + 1);
    let path = concat!("let p = \"/wor", "k/x\";");
    let mistakes: &[(Rule, &str, &str)] = &[
        (upward_imports, "src/mux/frame.rs", "use crate::net::tls;"),
        (upward_imports, "src/net/pool.rs", "use crate::{mux::Code, migrate::{Host, plan}};"),
        (upward_imports, "src/qemu/client.rs", "fn f() { super::super::config::glob_matches(); }"),
        (upward_imports, "src/qemu/commands/block.rs", "pub(crate) use super::super::super::net;"),
        (upward_imports, "src/cli/show.rs", "use crate::migrate::host::Host;"),
        (upward_imports, "src/cli/show.rs", "use crate::net::identity::Identity;"),
        (upward_imports, "src/metrics.rs", "use super::agent;"),
        (upward_imports, "src/novelty.rs", ""),
        (impure_core, "src/mux/link.rs", "let now = Instant::now();"),
        (impure_core, "src/mux/link.rs", "use std::{net::IpAddr, time::SystemTime};"),
        (impure_core, "src/mux/link.rs", "async fn f() { tokio::task::yield_now().await }"),
        (impure_core, "src/migrate/handover/source.rs", "std::fs::remove_file(p);"),
        (panics, "src/net/pool.rs", "x.unwrap();"),
        (panics, "src/net/pool.rs", "x\n.expect(\"\");\n#[cfg(test)]\nmod tests {}"),
        (too_long, "src/net/pool.rs", &long),
        (workplaces, "README.md", path),
        (dead_paths, "README.md", "see `src/net/nowhere.rs`"),
        (dead_paths, "README.md", "see [there](deploy/nowhere.md#x)"),
    ];
    for (rule, path, text) in mistakes {
        assert!(!rule(Path::new(path), text).is_empty(), "nothing was found in {path}: {text:.60}");
    }
}

#[test]
fn what_is_allowed_is_not_found() {
    let fine: &[(Rule, &str, &str)] = &[
        (upward_imports, "src/net/pool.rs", "use crate::mux::{Code, Role}; use super::identity;"),
        (upward_imports, "src/cli/certs.rs", "use crate::pki::{self, report}; use super::show;"),
        (upward_imports, "src/mux/frame.rs", "// use crate::net;\nlet s = \"crate::net\";"),
        (upward_imports, "src/qemu/client.rs", "#[cfg(test)]\nmod tests { use crate::net; }"),
        (impure_core, "src/mux/link.rs", "/// Not tokio::x.\nuse std::time::Instant;"),
        (panics, "src/net/pool.rs", "#[cfg(test)]\nmod tests { fn f() { x.unwrap(); } }"),
        (panics, "src/net/pool.rs", "x.unwrap_or_default(); x.expect_err_text();"),
        (workplaces, "README.md", concat!("/home/me/wor", "k/x")),
        (dead_paths, "README.md", "see `src/net/mod.rs`, `src/*.rs`, [site](https://example.org)"),
    ];
    for (rule, path, text) in fine {
        assert_eq!(rule(Path::new(path), text), Vec::<String>::new(), "{path}: {text}");
    }
}

/// The example with all that is commented out, too.
fn example(uncomment: bool) -> String {
    let text = read(Path::new("deploy/vmferry.toml"));
    let line = |line: &str| {
        let bare = line.strip_prefix("# ").unwrap_or(line);
        let is_setting = bare.starts_with('[') || bare.split_once(" = ").is_some_and(|(k, _)| is_key(k));
        if uncomment && is_setting { format!("{bare}\n") } else { format!("{line}\n") }
    };
    text.lines().map(line).collect()
}

fn is_key(word: &str) -> bool {
    word.chars().all(|c| c.is_ascii_lowercase() || c == '_')
}

#[test]
fn the_example_configuration_is_good() {
    for uncomment in [false, true] {
        let text = example(uncomment);
        let parsed = Config::parse(&text, Path::new("/etc/vmferry/vmferry.toml"));
        assert!(parsed.is_ok(), "uncommented: {uncomment}: {parsed:?}\n{text}");
    }
}

#[test]
fn the_example_configuration_has_every_key() {
    let fields = read(Path::new("src/config.rs"));
    let fields = fields.lines().filter_map(|l| l.strip_prefix("    pub ")?.split_once(':').map(|(k, _)| k));
    let text = example(true);
    let has = |key: &str| {
        let table = [format!("[{key}]"), format!("[{key}.")];
        let lines = || text.lines().map(str::trim_start);
        lines().any(|l| l.starts_with(&format!("{key} = ")) || table.iter().any(|t| l.starts_with(t)))
    };
    // Tables of their own have the singular's name.
    let spelled = |key: &str| match key {
        "peers" => "peer".to_owned(),
        "vms" => "vm".to_owned(),
        other => other.to_owned(),
    };
    let keys: Vec<String> = fields.filter(|k| is_key(k)).map(spelled).collect();
    assert!(keys.len() > 15, "only {keys:?} were found");
    let missing: Vec<&String> = keys.iter().filter(|k| !has(k)).collect();
    assert!(missing.is_empty(), "deploy/vmferry.toml does not show {missing:?}");
}

/// What promtool would say of names, and that README.md lists them.
#[test]
fn metrics_are_well_named_and_listed() {
    let source = read(Path::new("src/metrics.rs"));
    let readme = read(Path::new("README.md"));
    let mut names = 0;
    for maker in ["counter(", "gauge(", "histogram(", "IntGauge::new(", "Opts::new("] {
        for part in source.split(maker).skip(1) {
            let Some(name) = part.split('"').nth(1).filter(|n| is_key(n)) else { continue };
            let name = name.strip_prefix("vmferry_").unwrap_or(name);
            names += 1;
            assert_eq!(maker == "counter(", name.ends_with("_total"), "{maker}{name}");
            assert!(readme.contains(&format!("`vmferry_{name}`")), "README.md does not list vmferry_{name}");
        }
    }
    assert!(names >= 15, "only {names} were found");
}
