//! How many sessions a known peer can have: each is a thread here.

use futures_util::future::join_all;
use vmferry::mux::hello::{FirstFrame, Hello, Mode};
use vmferry::mux::{Code, Config};

use super::raw::Raw;
use super::victim::Victim;

/// Of a peer without further lanes.
const SESSIONS_MAX: usize = 4;
const AT_ONCE: usize = 20;

/// A new process's sessions are let in once the old one's no longer speak. Those that wait for that together are no more
/// than there may be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_are_asked_for_at_the_same_moment_are_no_more_than_there_may_be() {
    let victim = Victim::start();
    let mut old = Raw::connect(&victim, "charlie").await;
    old.greet(1).await;
    // Each says HELLO as soon as it can: a silent one is not waited for long.
    let asks = |n: usize| {
        let victim = &victim;
        async move {
            let mut raw = Raw::connect(victim, "charlie").await;
            let mode = Mode::New { session_id: [n as u8 + 2; 16], secret_share: [7; 32] };
            raw.say(&Hello::new(&Config::default(), [2; 16], mode).encode()).await.unwrap();
            raw
        }
    };
    let mut waiting = join_all((0..AT_ONCE).map(asks)).await;
    drop(old);
    let answers = join_all(waiting.iter_mut().map(Raw::first_frame)).await;
    let refused =
        |answer: &&Option<FirstFrame>| matches!(answer, Some(FirstFrame::GoAway { code: Code::Limit, .. }));
    let begun = answers.iter().filter(|a| matches!(a, Some(FirstFrame::Hello { .. }))).count();
    assert_eq!(begun + answers.iter().filter(refused).count(), AT_ONCE, "{answers:?}");
    assert!((1..=SESSIONS_MAX).contains(&begun), "{begun} sessions");
}
