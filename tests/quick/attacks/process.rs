//! The agent's own process: against others of its user, as a QEMU that a guest has taken over, and against itself,
//! should somebody get hold of it. Takes root, to be another user.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustls_pki_types::pem::PemObject;

use super::victim::Victim;
use crate::rig::until;

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

/// How often `wanted` is in a process's memory.
fn found_in_memory(pid: i32, wanted: &[u8]) -> usize {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let number = |hex: &str| u64::from_str_radix(hex, 16).unwrap();
    let mut found = 0;
    for line in maps.lines().filter(|line| line.contains(" rw") && !line.contains("[v")) {
        let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let mut piece = vec![0; 1 << 20];
        let mut at = number(from);
        while at < number(to) {
            let long = piece.len().min((number(to) - at) as usize);
            // A page that was given back meanwhile has nothing.
            if memory.read_exact_at(&mut piece[..long], at).is_ok() {
                found += piece[..long].windows(wanted.len()).filter(|window| *window == wanted).count();
            }
            // Pieces overlap: nothing lies between two of them.
            at += (long - wanted.len()).max(1) as u64;
            if long < piece.len() {
                break;
            }
        }
    }
    found
}

/// The key is read at the start and at each reload; a set that is refused has been read as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_private_key_is_overwritten_when_it_was_read() {
    assert!(nix::unistd::geteuid().is_root(), "this test looks into another process: run it as root");
    let victim = Victim::start();
    let host = victim.pki().join("hosts/alpha");
    let text = std::fs::read_to_string(host.join("key.pem")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    // The end of a line and the beginning of the next: the base64 alone has no line ends.
    let across = format!("{}\n{}", &lines[1][40..], &lines[2][..16]);
    let der = rustls_pki_types::PrivateKeyDer::from_pem_slice(text.as_bytes()).unwrap();
    // RFC 5958: version, algorithm, and then the key, for which there are 32 bytes.
    let encoded = &der.secret_der()[36..68];
    assert!(
        found_in_memory(std::process::id() as i32, across.as_bytes()) > 0,
        "it is not the test that cannot"
    );
    let is_nowhere = |when: &str| {
        assert_eq!(found_in_memory(victim.pid(), across.as_bytes()), 0, "the file's text {when}");
        assert_eq!(found_in_memory(victim.pid(), encoded), 0, "the key as it is encoded {when}");
    };
    is_nowhere("after the start");
    let (cert, other) = (host.join("cert.pem"), victim.pki().join("hosts/bravo/cert.pem"));
    let own = std::fs::read(&cert).unwrap();
    let told = |word: &str| victim.log().iter().filter(|line| line.contains(word)).count();
    let reload = || kill(Pid::from_raw(victim.pid()), Signal::SIGHUP).unwrap();
    std::fs::copy(other, &cert).unwrap();
    for times in 1..=10 {
        reload();
        until("a refusal", || told("certificates not reloaded") == times).await;
        is_nowhere("of a set that is refused");
    }
    std::fs::write(&cert, own).unwrap();
    reload();
    until("a reload", || told("certificates reloaded") > 0).await;
    is_nowhere("after a reload");
}

/// All files and folders below, with their modes.
fn modes(folder: &Path, into: &mut Vec<(String, u32)>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let seen = entry.metadata().unwrap();
        into.push((entry.path().display().to_string(), seen.mode() & 0o7777));
        if seen.is_dir() {
            modes(&entry.path(), into);
        }
    }
}

#[test]
fn whatever_the_umask_is_the_agents_files_are_its_users_alone() {
    let victim = Victim::start_with_umask(0);
    let (said, _) = victim.vmferry(&["migrate", "web1", "--to", "bravo"]);
    assert!(said.contains("web1"), "{said}");
    let mut all = Vec::new();
    for folder in ["state", "run"] {
        modes(&victim.folder.path().join(folder), &mut all);
    }
    let is_open = |(path, mode): &&(String, u32)| mode & 0o077 != 0 && !path.ends_with("run/vmferry.sock");
    let open: Vec<_> = all.iter().filter(is_open).collect();
    assert!(open.is_empty() && all.len() > 5, "{open:?} of {all:?}");
    let socket = std::fs::metadata(victim.socket()).unwrap().mode() & 0o777;
    assert_eq!(socket, 0o660, "the API's socket");
}
