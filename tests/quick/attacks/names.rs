//! Who is whom, and what a peer learns of this host.

use vmferry::migrate::message::{Request, Response};
use vmferry::migrate::problem::Problem;

use super::victim::{Attacker, Victim, ask, offer};

async fn found(attacker: &Attacker, victim: &Victim, vm: &str, prepare: bool) -> Vec<Problem> {
    let session = attacker.session(victim).await;
    let request = if prepare { Request::Prepare(offer(vm)) } else { Request::Check(offer(vm)) };
    match ask(&session, request).await {
        Response::Checked(problems) => problems,
        Response::Refused(refusal) => refusal.problems,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_is_told_the_names_of_no_virtual_machine_that_it_may_not_send() {
    let victim = Victim::start();
    let (bravo, charlie) = (Attacker::new(&victim, "bravo"), Attacker::new(&victim, "charlie"));
    for prepare in [false, true] {
        // It may send web*, and is told what there is of these.
        let problems = found(&bravo, &victim, "web9", prepare).await;
        let said = format!("{problems:?}");
        assert!(said.contains("knows no VM web9; it knows web1, web2\""), "{said}");
        for (attacker, vm) in [(&bravo, "db1"), (&bravo, "db9"), (&charlie, "web1"), (&charlie, "web9")] {
            let problems = found(attacker, &victim, vm, prepare).await;
            let said = format!("{problems:?}");
            assert!(said.contains("NotPermitted"), "{said}");
            // The same, whether there is one of that name or not; and no other name.
            for name in ["web1", "web2", "db1"].iter().filter(|name| **name != vm) {
                assert!(!said.contains(name), "{name} is told: {said}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_of_our_authority_is_refused_by_its_name() {
    let victim = Victim::start();
    let mallory = Attacker::new(&victim, "mallory");
    mallory.dial(&victim).await.unwrap_err();
    let line = victim.logs(|line| line.contains("refused")).await;
    assert!(line.contains("mallory was refused (auth): no peer with this identity"), "{line}");
    let counted = "vmferry_connect_failures_total{direction=\"in\",reason=\"unknown_peer\"}";
    assert_eq!(victim.metric(counted), 1.0);
}

/// A second agent that has the victim's own certificate.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_with_this_hosts_own_identity_is_refused() {
    let victim = Victim::start();
    let twin = Attacker::new(&victim, "alpha");
    twin.dial(&victim).await.unwrap_err();
    let line = victim.logs(|line| line.contains("refused")).await;
    assert!(line.contains("alpha was refused (auth)"), "{line}");
    assert_eq!(victim.get("/v1/status")["sessions"], serde_json::json!([]));
}
