//! What a peer that asks again and again leaves behind, and keeps from others.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmferry::migrate::message::{Request, Response};
use vmferry::migrate::problem::ProblemKind;

use super::victim::{Attacker, Victim, ask, offer};
use crate::rig::{blocking, soon};

/// A check gives up a QEMU that says nothing after 10 s. Who asks for the VM later than this may find none.
const SILENCE: Duration = Duration::from_secs(9);
/// How often that may be so on a slow machine.
const TRIES: usize = 3;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_prepares_leave_no_journal() {
    let victim = Victim::start();
    let session = Attacker::new(&victim, "bravo").session(&victim).await;
    for n in 0..100 {
        let vm = ["web1", "web2", "web9", "db1"][n % 4];
        let answer = ask(&session, Request::Prepare(offer(vm))).await;
        assert!(matches!(answer, Response::Refused(_)), "{answer:?}");
    }
    let left = std::fs::read_dir(victim.folder.path().join("state/migrations")).unwrap().count();
    assert_eq!(left, 0, "journals of 100 refused prepares");
    assert_eq!(victim.get("/v1/recover?peers=false")["cases"], serde_json::json!([]));
}

/// A check that takes long, of a QEMU that is there and says nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peers_check_gives_way_to_a_migration() {
    for _ in 0..TRIES {
        if gives_way().await {
            return;
        }
    }
    panic!("the check was over before the migration was asked for, {TRIES} times");
}

/// Whether the migration was asked for while the check lasted.
async fn gives_way() -> bool {
    let victim = Victim::start();
    let monitor = UnixListener::bind(victim.folder.path().join("web1.qmp")).unwrap();
    let bravo = Attacker::new(&victim, "bravo");
    let session = bravo.session(&victim).await;
    let since = Instant::now();
    let checking = tokio::spawn(async move { ask(&session, Request::Check(offer("web1"))).await });
    let (monitor, _silent) = blocking(move || {
        let (silent, _) = monitor.accept().unwrap();
        (monitor, silent)
    })
    .await;
    let (said, _) =
        tokio::task::block_in_place(|| victim.vmferry(&["migrate", "web1", "--to", "bravo", "--detach"]));
    let asked_after = since.elapsed();
    let answer = soon("the check's end", checking).await.unwrap();
    let Response::Checked(found) = answer else { panic!("{answer:?}") };
    if found[0].kind == ProblemKind::TargetNotWaiting && asked_after > SILENCE {
        return false;
    }
    assert_eq!(found[0].kind, ProblemKind::Busy, "{found:?}");
    let migrations = victim.get("/v1/migrations");
    assert_eq!(migrations[0]["vm"], "web1", "{said}");
    assert!(!migrations.to_string().contains("already part of"), "{migrations}");
    drop(monitor);
    true
}

/// An agent that has every VM `vm*` started by a command, which takes a while, and as long as there is a file `hold`
/// beside what it says, and fails; it writes down when it begins and ends.
fn starts() -> (Victim, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let (script, said) = (folder.path().join("start"), folder.path().join("said"));
    let text = format!(
        "#!/bin/sh\necho begin >>{0}\nwhile [ -e {1} ]; do sleep 0.05; done\n\
         sleep 0.5\necho end >>{0}\nexit 1\n",
        said.display(),
        hold(&said).display()
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let monitor = folder.path().join("{vm}.qmp");
    let vms = format!(
        "\n[vm.\"vm*\"]\nqmp = \"{}\"\nstart = {{ command = [\"{}\"] }}\n",
        monitor.display(),
        script.display()
    );
    (Victim::start_in(folder, |text| text.replace("'web*'", "'web*', 'vm*'") + &vms), said)
}

fn hold(said: &Path) -> PathBuf {
    said.with_file_name("hold")
}

fn said(by: &PathBuf) -> Vec<String> {
    std::fs::read_to_string(by).unwrap_or_default().lines().map(str::to_owned).collect()
}

/// A pattern stands for VMs of any number, and a check starts a QEMU for each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checks_of_many_vms_start_few_qemus_at_once() {
    let (victim, starts) = starts();
    let session = Attacker::new(&victim, "bravo").session(&victim).await;
    let mut checks = tokio::task::JoinSet::new();
    for n in 0..10 {
        let session = session.clone();
        checks.spawn(async move { ask(&session, Request::Check(offer(&format!("vm{n}")))).await });
    }
    while let Some(answer) = soon("an answer to each check", checks.join_next()).await {
        let answer = answer.unwrap();
        let Response::Checked(found) = &answer else { panic!("{answer:?}") };
        assert_eq!(found[0].kind, ProblemKind::TargetNotWaiting, "{found:?}");
    }
    let said = said(&starts);
    let at_once = |said: &[String]| {
        let begun = said.iter().filter(|word| *word == "begin").count();
        2 * begun - said.len()
    };
    assert_eq!(said.len(), 20, "each was started: {said:?}");
    assert!((1..=said.len()).all(|n| at_once(&said[..n]) <= 2), "{said:?}");
}

/// A check that starts a QEMU has the VM for itself meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_waits_for_a_check_that_starts_a_qemu() {
    let (victim, starts) = starts();
    std::fs::write(hold(&starts), "").unwrap();
    let session = Attacker::new(&victim, "bravo").session(&victim).await;
    let checks = session.clone();
    let checking = tokio::spawn(async move { ask(&checks, Request::Check(offer("vm1"))).await });
    soon("the start for the check", async {
        while said(&starts).is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
    assert!(!checking.is_finished(), "the check is to be under way");
    std::fs::remove_file(hold(&starts)).unwrap();
    let answer = ask(&session, Request::Prepare(offer("vm1"))).await;
    let Response::Refused(refusal) = &answer else { panic!("{answer:?}") };
    assert!(refusal.text.starts_with("the start command of VM vm1 failed"), "{answer:?}");
    assert_eq!(said(&starts), ["begin", "end", "begin", "end"], "one after the other");
    checking.await.unwrap();
}
