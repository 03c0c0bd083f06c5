//! The agent's own process, against others of its user: a QEMU that a guest has taken over, a hook. Takes root,
//! to be another user.

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
    let victim = Victim::start_as(SOMEBODY);
    assert_eq!(readable(victim.pid() as u32), [""; 0]);
    // Any other process of the user can be read, so it is not the test that cannot.
    let mut other = Command::new("sleep").arg("600").uid(SOMEBODY).gid(SOMEBODY).spawn().unwrap();
    let of_other = readable(other.id());
    other.kill().unwrap();
    other.wait().unwrap();
    assert!(of_other.contains(&"environ".to_owned()), "{of_other:?}");
}
