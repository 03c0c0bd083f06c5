//! The house rules that a compiler does not know: who may use whom, what the pure code must not
//! touch, how long a file may grow, what a text may not name. Reads the checkout, builds nothing.
//! Every rule is shown to fail on a made-up mistake (`each_rule_can_fail`).

#![allow(clippy::expect_used)]

#[path = "tidy_rules/locks.rs"]
mod locks;
#[path = "tidy_rules/modules.rs"]
mod modules;
#[path = "tidy_rules/source.rs"]
mod source;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use modules::Modules;
use source::code_of;
use vmferry::config::Config;

/// Longest source file, tests in it included.
const LINES_MAX: usize = 600;

/// What both roles of a migration use, and one of them beside that.
macro_rules! role_uses {
    ($($more:literal)*) => {
        &[
            "error_chain",
            "migrate::checks",
            "migrate::decide",
            "migrate::guest",
            "migrate::handoff::TakenUp",
            "migrate::handoff::state",
            "migrate::handoff::taken_up",
            "migrate::handover",
            "migrate::handover_run",
            "migrate::host",
            "migrate::journal",
            "migrate::model",
            "migrate::protocol",
            "migrate::transfer",
            "mux",
            "net",
            "qemu",
            $($more,)*
        ]
    };
}

/// What a module of `src/` may use of ours beside its own, by path prefix; what is not here is
/// forbidden. The row of the nearest ancestor counts: a folder or file with a row of its own may use
/// of its own top module, too, only what is in that row. A name may be allowed by the path that is
/// written or by that of the file that defines it.
const EDGES: &[(&str, &[&str])] = &[
    (
        "cli",
        &[
            "agent::Early",
            "agent::StartMode",
            "agent::check_config",
            "agent::confine",
            "agent::run",
            "agent::handoff_formats",
            "api",
            "audit",
            "config::DEFAULT_PATH",
            "doctor",
            "enrol",
            "log",
            "printable",
            "private_memory",
            "rate",
        ],
    ),
    // It looks at files, the kernel and the witness, without an agent, too.
    ("doctor", &["config", "error_chain", "net::tls", "witness"]),
    // `vmferry certs` works on files, without an agent.
    ("cli::certs", &["enrol", "net::identity", "net::naming", "net::tls::TlsPaths", "pki", "private_memory"]),
    (
        "agent",
        &[
            "access",
            "api",
            "audit",
            "config",
            "drain",
            "error_chain",
            "forward",
            "json",
            "libvirt",
            "metrics",
            "migrate",
            "mux",
            "net",
            "peer_refusals",
            "private_memory",
            "traces",
            "witness",
        ],
    ),
    (
        "agent::handoff",
        &[
            "agent::draining",
            "agent::journals",
            "agent::limits",
            "agent::registry",
            "agent::running",
            "agent::unix_listener",
            "config",
            "forward",
            "metrics",
            "migrate",
            "net",
        ],
    ),
    // What the agent has, below it.
    ("agent::limits", &["agent::registry", "api", "migrate", "rate"]),
    ("agent::history", &["migrate"]),
    ("agent::registry", &["migrate"]),
    ("agent::vm_states", &["migrate"]),
    (
        "api",
        &[
            "config::LocalSocket",
            "config::SocketMode",
            "config::TargetName",
            "drain",
            "forward",
            "libvirt",
            "migrate::DiskChoice",
            "migrate::DisksAtOnce",
            "migrate::DowntimeLimit",
            "migrate::Options",
            "migrate::Retry",
            "migrate::DiskSample",
            "migrate::Incremental",
            "migrate::InBand",
            "migrate::handover::Side",
            "migrate::journal::Role",
            "migrate::leftover",
            "migrate::phase::Phase",
            "migrate::prediction",
            "migrate::problem",
            "migrate::progress",
            "migrate::recover",
            "migrate::replicas",
            "migrate::timeline",
            "migrate::bandwidth",
            "migrate::vm_state",
            "net::probe::BYTES_MAX",
            "ranged",
            "rate",
        ],
    ),
    (
        "metrics",
        &[
            "audit",
            "drain",
            "forward",
            "libvirt::Ended",
            "libvirt::Role",
            "migrate::WitnessFigures",
            "migrate::journal::Role",
            "migrate::progress",
            "migrate::phase",
            "migrate::timeline",
            "migrate::vm_state",
            "mux::Stats",
            "net::expiry",
            "net::identity",
            "peer_refusals",
        ],
    ),
    ("migrate", &["audit", "config", "error_chain", "mux", "net", "peer_refusals", "qemu"]),
    // The two roles know all below them, and not each other.
    ("migrate::source", role_uses!("audit")),
    ("migrate::destination", role_uses!("size" "config" "peer_refusals" "printable")),
    ("migrate::checks", &["error_chain", "migrate::model", "migrate::protocol::message", "qemu"]),
    ("migrate::model", &["audit", "error_chain", "qemu", "ranged", "rate", "weight"]),
    // The pure machines know nothing of those who carry out their effects, their interpreter only them.
    ("migrate::handover", &[]),
    ("migrate::handover_run", &["migrate::handover"]),
    // What one agent's migrations share, and all that is below it, knows neither role.
    (
        "migrate::host",
        &[
            "access",
            "audit",
            "config",
            "control_streams",
            "error_chain",
            "migrate::handoff::state",
            "migrate::handover",
            "migrate::journal",
            "migrate::model",
            "migrate::protocol",
            "net",
            "peer_refusals",
            "printable",
            "qemu",
            "witness",
        ],
    ),
    // What is left to another process is data: it knows nobody who stops or goes on.
    (
        "migrate::handoff::state",
        &[
            "migrate::guest",
            "migrate::handover",
            "migrate::journal",
            "migrate::model",
            "migrate::protocol::message",
            "migrate::transfer",
            "net",
        ],
    ),
    ("migrate::protocol", &["error_chain", "json", "migrate::transfer::frozen", "mux", "net"]),
    ("migrate::protocol::message", &["migrate::handover", "migrate::model", "qemu"]),
    (
        "migrate::transfer",
        &[
            "audit",
            "migrate::guest",
            "migrate::journal",
            "migrate::model",
            "migrate::protocol::message",
            "mux",
            "net",
            "qemu",
            "rate",
        ],
    ),
    (
        "migrate::guest",
        &[
            "config",
            "error_chain",
            "migrate::journal",
            "migrate::model",
            "migrate::protocol::message",
            "printable",
            "qemu",
        ],
    ),
    ("migrate::journal", &["migrate::handover", "migrate::model", "qemu"]),
    // What is moved when: it knows how a migration is asked for, and no migration.
    ("drain", &["config::glob_matches", "migrate::Options", "ranged"]),
    // An etcd, and nothing of migrations.
    ("witness", &["config", "error_chain", "net::addresses", "net::connect_error", "net::tls", "printable"]),
    // Beside `migrate`; neither knows the other.
    ("forward", &["config", "error_chain", "mux", "net", "peer_refusals", "printable", "rate", "weight"]),
    // Migrations that libvirt makes itself: nothing of ours.
    (
        "libvirt",
        &[
            "access",
            "config",
            "control_streams",
            "error_chain",
            "forward",
            "mux",
            "net",
            "peer_refusals",
            "ranged",
        ],
    ),
    ("net", &["error_chain", "mux", "printable", "rate"]),
    // Who somebody is knows no connection, what a connection is no session, and a session not who accepts it.
    ("net::identity", &[]),
    ("net::naming", &["net::identity"]),
    ("net::expiry", &[]),
    ("net::credentials", &["net::identity", "net::naming"]),
    ("net::handshake_failure", &["net::identity"]),
    (
        "net::tls",
        &["net::credentials", "net::expiry", "net::handshake_failure", "net::identity", "net::naming"],
    ),
    ("net::handshake", &["net::certificate_dates", "net::handshake_failure", "net::identity", "net::tls"]),
    ("net::record", &[]),
    ("net::session_key", &["mux", "net::connect_error"]),
    ("net::connection", &["mux", "net::connect_error", "net::identity", "net::record", "net::session_key"]),
    ("net::link", &["mux", "net::connect_error", "net::connection"]),
    ("net::stream_inbox", &["mux"]),
    ("net::stream_port", &["mux", "net::stream_inbox"]),
    (
        "net::stream",
        &[
            "mux",
            "net::connection::Resumed",
            "net::cpu_time",
            "net::frozen",
            "net::stream_inbox",
            "net::stream_port",
        ],
    ),
    ("net::cpu_time", &[]),
    ("net::waits", &[]),
    ("net::pump", &["mux", "net::compress", "net::inbox", "net::nbd_requests", "net::stream", "net::waits"]),
    ("net::inbox", &["net::compress", "net::nbd_requests", "net::stream"]),
    ("net::nbd_requests", &[]),
    (
        "net::session",
        &[
            "mux",
            "net::connection",
            "net::cpu_time",
            "net::frozen",
            "net::identity",
            "net::link",
            "net::message_budget",
            "net::session_key",
            "net::stream",
        ],
    ),
    ("net::lanes", &["net::session"]),
    // A new host and the CA's machine: without an agent, too.
    (
        "enrol",
        &["error_chain", "json", "net::credentials", "net::identity", "net::naming", "pki", "printable"],
    ),
    (
        "pki",
        &[
            "error_chain",
            "net::credentials",
            "net::expiry",
            "net::identity",
            "net::naming",
            "net::tls",
            "printable",
        ],
    ),
    ("access", &["config"]),
    // Whatever messages are about: what comes before a stream of them is accepted.
    ("control_streams", &["access", "mux", "net", "peer_refusals"]),
    // Whoever refuses something to a peer says so there.
    ("peer_refusals", &["audit", "net::identity"]),
    ("config", &["net::identity", "net::naming", "net::tls::KeyExchange", "rate", "size", "weight"]),
    ("mux", &["printable"]),
    ("qemu", &["printable"]),
    ("qemu::commands", &["qemu::Command", "qemu::states"]),
    ("audit", &["printable"]),
    ("error_chain", &[]),
    ("log", &["printable"]),
    ("json", &[]),
    ("printable", &["json"]),
    ("private_memory", &[]),
    ("ranged", &[]),
    ("rate", &["ranged"]),
    ("size", &[]),
    ("traces", &["migrate::journal::Role", "migrate::progress", "migrate::timeline"]),
    ("weight", &["mux::SHARE_WEIGHT_DEFAULT", "ranged"]),
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

/// All files of a folder, one after the other.
fn read_all(folder: &str) -> String {
    files().iter().filter(|path| path.starts_with(folder)).map(|path| read(path)).collect()
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

type Edges = [(&'static str, &'static [&'static str])];

/// The row of the nearest ancestor that has one.
fn edges_of(edges: &'static Edges, module: &str) -> Option<(&'static str, &'static [&'static str])> {
    let fitting = edges.iter().filter(|(m, _)| starts_with_path(module, m));
    fitting.max_by_key(|(m, _)| m.len()).copied()
}

/// The sources of this checkout.
static MODULES: LazyLock<Modules> = LazyLock::new(|| {
    let files = files().into_iter();
    let sources: Vec<_> = files.filter_map(|path| Some((module_of(&path)?, read(&path)))).collect();
    Modules::read(&sources)
});

fn upward_imports(path: &Path, text: &str) -> Vec<String> {
    imports_against(EDGES, path, text)
}

fn imports_against(edges: &'static Edges, path: &Path, text: &str) -> Vec<String> {
    let Some(module) = module_of(path) else { return Vec::new() };
    let Some((own, allowed)) = edges_of(edges, &module) else {
        return vec![format!("module {module} is in no layer")];
    };
    let is_allowed = |used: &str| [own].iter().chain(allowed).any(|a| starts_with_path(used, a));
    let read = MODULES.module(&module, &code_of(text));
    let wrong = read.paths().filter(|written| {
        let home = MODULES.home(written).map(|(_, path)| path);
        !is_allowed(written) && !home.is_some_and(|path| is_allowed(&path))
    });
    wrong.map(|used| format!("{module} must not use crate::{used}")).collect()
}

/// Files that use each other in a circle.
fn circles(modules: &Modules) -> Vec<String> {
    let circles = modules.circles().into_iter();
    circles.map(|c| format!("these use each other in a circle: {}", c.join(", "))).collect()
}

fn impure_core(path: &Path, text: &str) -> Vec<String> {
    let pure = ["src/mux", "src/migrate/handover", "src/migrate/handover_run.rs"];
    if !pure.iter().any(|place| path.starts_with(place)) {
        return Vec::new();
    }
    let code = code_of(text);
    let found = IMPURE.iter().filter(|word| source::has_word(&code, word));
    found.map(|word| format!("the pure code names {word}")).collect()
}

/// What a machine of the hand-over wants done is done by its interpreter, which names every effect.
fn other_interpreters(path: &Path, text: &str) -> Vec<String> {
    let room = ["src/migrate/handover", "src/migrate/handover_run.rs"];
    if !path.starts_with("src") || room.iter().any(|place| path.starts_with(place)) {
        return Vec::new();
    }
    let code = code_of(text);
    let found = ["SourceEffect", "DestinationEffect"].into_iter().filter(|e| source::has_word(&code, e));
    found.map(|effect| format!("{effect} is carried out beside the interpreter")).collect()
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
    ("other interpreter", other_interpreters),
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
fn every_permitted_import_is_made() {
    let is_there = |row: &str| MODULES.all().any(|(module, _)| starts_with_path(module, row));
    let gone: Vec<_> = EDGES.iter().map(|(row, _)| row).filter(|row| !is_there(row)).collect();
    assert!(gone.is_empty(), "EDGES has rows for modules that are not there: {gone:?}");
    let makes = |row: &str, edge: &str| {
        let of_row = MODULES.all().filter(|(m, _)| edges_of(EDGES, m).is_some_and(|(r, _)| r == row));
        let mut paths = of_row.flat_map(|(_, module)| module.paths());
        paths.any(|written| {
            let home = MODULES.home(written).map(|(_, path)| path);
            starts_with_path(written, edge) || home.is_some_and(|path| starts_with_path(&path, edge))
        })
    };
    let all = EDGES.iter().flat_map(|(row, allowed)| allowed.iter().map(move |edge| (row, edge)));
    let stale: Vec<_> = all.filter(|(row, edge)| !makes(row, edge)).collect();
    assert!(stale.is_empty(), "nobody makes these any more, take them out of EDGES: {stale:?}");
}

#[test]
fn no_files_use_each_other_in_a_circle() {
    let found = circles(&MODULES);
    assert!(found.is_empty(), "\n{}\n", found.join("\n"));
}

/// Circles of made-up sources.
fn circles_of(sources: &[(&str, &str)]) -> Vec<String> {
    let sources: Vec<_> = sources.iter().map(|(m, text)| ((*m).to_owned(), (*text).to_owned())).collect();
    circles(&Modules::read(&sources))
}

#[test]
fn circles_are_found() {
    let circles: &[&[(&str, &str)]] = &[
        &[("a::p", "use super::q::Q; struct P;"), ("a::q", "struct Q; fn f() -> crate::a::p::P {}")],
        // Of three, by names that the folder's file passes on.
        &[
            ("a", "mod x; mod y; mod z; pub use x::X; pub(crate) use self::{y::Y as Why, z::*};"),
            ("a::x", "pub struct X(super::Why);"),
            ("a::y", "use super::Z; pub struct Y(Z);"),
            ("a::z", "use crate::a; pub struct Z(a::X);"),
        ],
        // The folder's file defines something itself, and uses a child.
        &[("a", "mod x; pub struct A; fn f() { x::g() }"), ("a::x", "pub fn g(a: &super::A) {}")],
        &[("a", "mod x; pub use x::X; pub struct A(X);"), ("a::x", "use super::*; pub struct X;")],
    ];
    for sources in circles {
        assert_eq!(circles_of(sources).len(), 1, "{sources:?}");
    }
    let none: &[&[(&str, &str)]] = &[
        // What the folder's file only passes on is not its own.
        &[
            ("a", "mod x; mod y; pub use x::X; pub use y::*;"),
            ("a::x", "pub struct X(super::Y);"),
            ("a::y", "pub struct Y;"),
        ],
        &[
            ("a", "pub struct A; #[cfg(test)] mod t { use crate::b::B; }"),
            ("b", "// crate::b::B\nuse crate::a::A; pub struct B(A); const S: &str = \"crate::b\";"),
        ],
        &[("a", "#[cfg(test)]\nmod t; pub struct A;"), ("a::t", "use super::A; fn f() { crate::b::B }")],
    ];
    for sources in none {
        assert_eq!(circles_of(sources), Vec::<String>::new(), "{sources:?}");
    }
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
        (upward_imports, "src/metrics/mod.rs", "use super::agent;"),
        (upward_imports, "src/novelty.rs", ""),
        (upward_imports, "src/migrate/handover/source.rs", "use super::super::settle;"),
        (upward_imports, "src/migrate/handover/mod.rs", "use crate::migrate::Host;"),
        (upward_imports, "src/qemu/commands/block.rs", "use crate::qemu; fn f(q: &qemu::Qmp) {}"),
        (impure_core, "src/mux/link.rs", "let now = Instant::now();"),
        (impure_core, "src/mux/link.rs", "use std::{net::IpAddr, time::SystemTime};"),
        (impure_core, "src/mux/link.rs", "async fn f() { tokio::task::yield_now().await }"),
        (impure_core, "src/migrate/handover/source.rs", "std::fs::remove_file(p);"),
        (impure_core, "src/migrate/handover_run.rs", "tokio::select! {}"),
        (other_interpreters, "src/migrate/settle/mod.rs", "if effects == [SourceEffect::Resume] {}"),
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
        (upward_imports, "src/cli/certs.rs", "use crate::pki::{self, report};"),
        (upward_imports, "src/mux/frame.rs", "// use crate::net;\nlet s = \"crate::net\";"),
        (upward_imports, "src/qemu/client.rs", "#[cfg(test)]\nmod tests { use crate::net; }"),
        (upward_imports, "src/qemu/commands/block.rs", "use super::Empty; use crate::qemu::RunState;"),
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
    let fields = read_all("src/config");
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
        "vms" | "templates" => "vm".to_owned(),
        "forwards" => "forward".to_owned(),
        "targets" => "target".to_owned(),
        other => other.to_owned(),
    };
    let keys: Vec<String> = fields.filter(|k| is_key(k)).map(spelled).collect();
    assert!(keys.len() > 15, "only {keys:?} were found");
    let missing: Vec<&String> = keys.iter().filter(|k| !has(k)).collect();
    assert!(missing.is_empty(), "deploy/vmferry.toml does not show {missing:?}");
}

#[test]
fn what_is_fuzzed_is_what_is_shipped() {
    let [product, fuzzer] = ["Cargo.lock", "tests/fuzz/Cargo.lock"].map(|path| read(&root().join(path)));
    let tests_alone = ["proptest", "tempfile"];
    let stale = locks::stale(&product, &fuzzer, &tests_alone);
    let remedy = "cargo metadata --manifest-path tests/fuzz/Cargo.toml";
    assert!(stale.is_empty(), "tests/fuzz/Cargo.lock is stale ({remedy} mends it): {stale:?}");
    let older = fuzzer
        .replace("\"clap_mangen\",", "")
        .replace("name = \"serde\"\nversion = \"1", "name = \"serde\"\nversion = \"0");
    assert_eq!(locks::stale(&product, &older, &tests_alone).len(), 2, "a stale one is not seen");
}
