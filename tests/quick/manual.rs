//! Manual pages and completions, as packages install them: there is a page for every command, and a real shell
//! completes names that the running agent knows. Needs no root.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::api::Agent;
use crate::rig::PATIENCE;

const VMFERRY: &str = env!("CARGO_BIN_EXE_vmferry");

/// Everything that `vmferry manual` writes.
fn written() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let made = Command::new(VMFERRY).arg("manual").arg(folder.path()).output().unwrap();
    assert!(made.status.success() && made.stderr.is_empty(), "{made:?}");
    folder
}

/// The commands that the help of a command names.
fn commands(above: &[&str]) -> Vec<String> {
    let help = Command::new(VMFERRY).args(above).arg("--help").output().unwrap();
    let text = String::from_utf8(help.stdout).unwrap();
    let below = text.lines().skip_while(|l| *l != "Commands:").skip(1).take_while(|l| !l.is_empty());
    let named = below.filter_map(|l| l.strip_prefix("  ")?.split(' ').next().map(str::to_owned));
    named.filter(|name| !name.is_empty() && name != "help").collect()
}

#[test]
fn every_command_has_a_page() {
    let folder = written();
    let pages = folder.path().join("share/man/man1");
    let page = |name: &str| {
        let path = pages.join(format!("{name}.1"));
        std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{name}: {e}"))
    };
    let whole = page("vmferry");
    for said in ["EXIT STATUS", "/etc/vmferry/vmferry.toml", "VMFERRY_SOCKET", "vmferry\\-migrate(1)"] {
        assert!(whole.contains(said), "{said} in {whole}");
    }
    assert!(!whole.contains("succession"), "what is hidden is shown: {whole}");
    let mut all: Vec<Vec<String>> = commands(&[]).into_iter().map(|name| vec![name]).collect();
    let mut seen = 0;
    while let Some(words) = all.get(seen).cloned() {
        assert!(page(&format!("vmferry-{}", words.join("-"))).contains("vmferry(1)"), "{words:?}");
        let below = commands(&words.iter().map(String::as_str).collect::<Vec<_>>()).into_iter();
        all.extend(below.map(|name| [words.clone(), vec![name]].concat()));
        seen += 1;
    }
    assert_eq!(seen + 1, std::fs::read_dir(&pages).unwrap().count(), "pages of nothing");
    assert!(seen > 20, "{seen} commands");
}

/// What a shell offers behind `line`, whose last word is not complete.
fn offered(share: &Path, socket: &Path, line: &[&str]) -> Vec<String> {
    let script = share.join("share/bash-completion/completions/vmferry");
    let program = r#"source "$1"; shift; COMP_WORDS=(vmferry "$@"); COMP_CWORD=$#
        f=$(complete -p vmferry | grep -o -- '-F [^ ]*'); ${f#-F } vmferry "${@: -1}"
        printf '%s\n' "${COMPREPLY[@]}""#;
    let path =
        format!("{}:{}", Path::new(VMFERRY).parent().unwrap().display(), std::env::var("PATH").unwrap());
    let mut bash = Command::new("bash");
    bash.arg("-c").arg(program).arg("bash").arg(script).args(line);
    let said = bash.env("PATH", path).env("VMFERRY_SOCKET", socket).output().unwrap();
    assert!(said.status.success() && said.stderr.is_empty(), "{line:?}: {said:?}");
    String::from_utf8(said.stdout).unwrap().lines().map(|l| l.trim().to_owned()).collect()
}

#[test]
fn a_shell_completes_names_that_the_agent_knows() {
    let folder = written();
    let agent = Agent::start();
    let after = |line: &[&str]| offered(folder.path(), &agent.socket, line).join(" ");
    // The agent has half a second to answer a shell: on a slow machine it is asked again.
    let known_after = |line: &[&str]| {
        let since = Instant::now();
        loop {
            let offered = after(line);
            if !offered.is_empty() || since.elapsed() > PATIENCE {
                return offered;
            }
        }
    };
    assert_eq!(known_after(&["migrate", "we"]), "web1");
    assert_eq!(known_after(&["migrate", "web1", "--to", ""]), "bravo");
    assert_eq!(after(&["migrate", "web1", "--to", "x"]), "");
    assert_eq!(after(&["rec"]), "recover");
    let begun = agent.ask("POST", "/v1/migrations", Some(r#"{"vm":"web1","to":"bravo"}"#));
    let id = serde_json::from_str::<serde_json::Value>(&begun.2).unwrap()["id"].as_str().unwrap().to_owned();
    let offered = known_after(&["cancel", ""]);
    assert!(offered.starts_with(&format!("web1 {id}")), "{offered}");
    assert_eq!(known_after(&["recover", &id[..4]]), id);
}

/// Nobody, and somebody who takes connections and does not answer.
#[test]
fn without_an_agent_nothing_is_offered_nor_said() {
    let folder = written();
    let nobody = folder.path().join("nobody.sock");
    assert_eq!(offered(folder.path(), &nobody, &["migrate", "w"]), [""]);
    let silent = folder.path().join("silent.sock");
    let _listening = std::os::unix::net::UnixListener::bind(&silent).unwrap();
    assert_eq!(offered(folder.path(), &silent, &["migrate", "w"]), [""]);
}
