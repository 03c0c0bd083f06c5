//! The agent's own process: against others of its user, as a QEMU that a guest has taken over, and against itself,
//! should somebody get hold of it. Takes root, to be another user.

use std::os::unix::process::CommandExt;
use std::process::Command;

use super::victim::Victim;

/// A user without a name.
const SOMEBODY: u32 = 61_235;

/// Which of these files of a process another process of the user may read.
fn readable(pid: u32) -> Vec<String> {
    let script =
        "for my $f ('environ', 'maps', 'mem') { print \"$f \" if open(my $h, '<', \"/proc/$ARGV[0]/$f\") }";
    let mut reading = Command::new("perl");
    let said = reading.args(["-e", script, &pid.to_string()]).uid(SOMEBODY).gid(SOMEBODY).output().unwrap();
    assert!(said.status.success(), "{said:?}");
    String::from_utf8(said.stdout).unwrap().split_whitespace().map(str::to_owned).collect()
}

#[test]
fn nobody_but_root_reads_the_agents_memory() {
    assert!(nix::unistd::geteuid().is_root(), "this test takes the part of other users: run it as root");
    let victim = Victim::start_as(SOMEBODY, |text| text);
    assert_eq!(readable(victim.pid() as u32), [""; 0]);
    // Any other process of the user can be read, so it is not the test that cannot.
    let mut other = Command::new("sleep").arg("600").uid(SOMEBODY).gid(SOMEBODY).spawn().unwrap();
    let of_other = readable(other.id());
    other.kill().unwrap();
    other.wait().unwrap();
    assert!(of_other.contains(&"environ".to_owned()), "{of_other:?}");
}

/// What each thread of a process says of its filter; 2: it has one.
fn filters(pid: i32) -> Vec<String> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let status = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("status")).ok());
    let filter =
        |status: String| Some(status.lines().find_map(|l| l.strip_prefix("Seccomp:"))?.trim().to_owned());
    status.filter_map(filter).collect()
}

#[test]
fn an_agent_writes_where_its_configuration_says_and_has_a_filter_in_all_threads() {
    assert!(nix::unistd::geteuid().is_root(), "this test takes the part of other users: run it as root");
    for (more, is_confined) in [("", true), ("[sandbox]\nlandlock = false\nseccomp = false\n", false)] {
        let victim = Victim::start_as(SOMEBODY, |text| text + more);
        let status = victim.get("/v1/status")["sandbox"].clone();
        let says = |what: &str| status[what].as_str().unwrap().to_owned();
        assert_eq!(says("seccomp").starts_with("on: "), is_confined, "{status}");
        let all = filters(victim.pid());
        assert!(all.len() > 2 && all.iter().all(|one| (one == "2") == is_confined), "{all:?}");
        // A folder of its user's that the configuration does not name.
        let folder = victim.folder.path().join("other");
        std::fs::create_dir(&folder).unwrap();
        std::os::unix::fs::chown(&folder, Some(SOMEBODY), Some(SOMEBODY)).unwrap();
        let socket = folder.join("x.sock");
        let words = ["forward", "add", socket.to_str().unwrap(), "--to", "bravo", "--target", "x"];
        let (said, is_content) = victim.vmferry(&words);
        if says("landlock").contains("this kernel has none") {
            continue;
        }
        assert_eq!(says("landlock").starts_with("on: "), is_confined, "{status}");
        assert_eq!(is_content, !is_confined, "{said}");
        assert!(is_content || said.contains("Permission denied"), "{said}");
    }
}
