//! What a peer that asks again and again leaves behind, and keeps from others.

use std::os::unix::net::UnixListener;

use vmferry::migrate::message::{Request, Response};
use vmferry::migrate::problem::ProblemKind;

use super::victim::{Attacker, Victim, ask, offer};
use crate::rig::{blocking, soon};

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
    let victim = Victim::start();
    let monitor = UnixListener::bind(victim.folder.path().join("web1.qmp")).unwrap();
    let bravo = Attacker::new(&victim, "bravo");
    let session = bravo.session(&victim).await;
    let checking = tokio::spawn(async move { ask(&session, Request::Check(offer("web1"))).await });
    let (monitor, _silent) = blocking(move || {
        let (silent, _) = monitor.accept().unwrap();
        (monitor, silent)
    })
    .await;
    let (said, _) =
        tokio::task::block_in_place(|| victim.vmferry(&["migrate", "web1", "--to", "bravo", "--detach"]));
    let answer = soon("the check's end", checking).await.unwrap();
    let Response::Checked(found) = answer else { panic!("{answer:?}") };
    assert_eq!(found[0].kind, ProblemKind::Busy, "{found:?}");
    let migrations = victim.get("/v1/migrations");
    assert_eq!(migrations[0]["vm"], "web1", "{said}");
    assert!(!migrations.to_string().contains("already part of"), "{migrations}");
    drop(monitor);
}
