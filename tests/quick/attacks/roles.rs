//! Roles on the local API: real users of this host, by the groups of their processes, ask for everything that
//! there is. Takes root, as all of `make test` does.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::victim::Victim;

/// Connects to a socket, says what it is told, prints the answer.
const ASK: &str = "use IO::Socket::UNIX; my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or do { print 'no way in'; exit }; \
                   local $/; print $s <STDIN>; $s->flush; print <$s>;";

/// A user without a name.
const SOMEBODY: u32 = 61_234;
/// Groups without a name.
pub(super) const VIEWERS: u32 = 61_001;
const OPERATORS: u32 = 61_002;
const ADMINS: u32 = 61_003;
const OTHERS: u32 = 61_004;

/// What the agent answers a user with this group.
pub(super) fn ask(victim: &Victim, gid: u32, method: &str, path: &str) -> String {
    let body = if method == "post" { "{}" } else { "" };
    let mut asking = Command::new("perl");
    asking.arg("-e").arg(ASK).arg(victim.socket()).uid(SOMEBODY).gid(gid);
    let mut asking = asking.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let request = format!(
        "{} {path} HTTP/1.0\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        method.to_uppercase(),
        body.len()
    );
    asking.stdin.take().unwrap().write_all(request.as_bytes()).unwrap();
    String::from_utf8(asking.wait_with_output().unwrap().stdout).unwrap()
}

/// Everything that is described: method, path, role.
fn described(victim: &Victim) -> Vec<(String, String, String)> {
    let all = victim.get("/v1/openapi.json")["paths"].clone();
    let mut found = Vec::new();
    for (path, methods) in all.as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let role = operation["x-role"].as_str().unwrap_or_else(|| panic!("{method} {path}: no role"));
            let id = "00000000-0000-4000-8000-000000000000";
            let path = path.replace("{id}", id).replace("{name}", "bravo");
            found.push((method.clone(), path, role.to_owned()));
        }
    }
    found
}

pub(super) fn open_to_all(victim: &Victim) {
    let all = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(victim.folder.path(), all).unwrap();
}

#[test]
fn each_user_may_what_its_role_may_and_nothing_else() {
    assert!(nix::unistd::geteuid().is_root(), "this test takes the part of other users: run it as root");
    let victim = Victim::start_with(|text| {
        format!(
            "{text}\n[api]\nview = ['{VIEWERS}', 'no-such-group']\noperate = ['{OPERATORS}']\nadmin = ['{ADMINS}']\n"
        )
    });
    open_to_all(&victim);
    let all = described(&victim);
    assert!(all.len() > 20, "{all:?}");
    let rank = |role: &str| ["none", "view", "operate", "admin"].iter().position(|r| *r == role).unwrap();
    for (gid, has) in [(OTHERS, "none"), (VIEWERS, "view"), (OPERATORS, "operate"), (ADMINS, "admin")] {
        for (method, path, needed) in &all {
            let answer = ask(&victim, gid, method, path);
            let is_refused = answer.starts_with("HTTP/1.0 403");
            assert!(answer.starts_with("HTTP/1.0 "), "{has} {method} {path}: {answer}");
            assert_eq!(
                is_refused,
                rank(has) < rank(needed),
                "{has} {method} {path} takes {needed}: {answer}"
            );
        }
    }
    assert!(victim.metric("vmferry_api_refusals_total{action=\"force\"}") > 2.0);
    // Root may everything, whatever its group.
    let (said, is_content) = victim.vmferry(&["status", "--json"]);
    assert!(is_content && serde_json::from_str::<Value>(&said).is_ok(), "{said}");
}

/// As it is without `[api]`: nobody but root and the socket's group gets in at all.
#[test]
fn without_roles_the_sockets_group_may_everything_and_nobody_else_gets_in() {
    assert!(nix::unistd::geteuid().is_root(), "this test takes the part of other users: run it as root");
    let victim = Victim::start();
    open_to_all(&victim);
    let group = nix::unistd::getegid().as_raw();
    assert_eq!(ask(&victim, OTHERS, "get", "/v1/status"), "no way in");
    assert!(ask(&victim, group, "get", "/v1/status").starts_with("HTTP/1.0 200"));
    assert!(ask(&victim, group, "post", "/v1/recover").starts_with("HTTP/1.0 200"));
}
