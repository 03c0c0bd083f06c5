//! Two agents with one identity. A peer's agent that has been started anew takes the old one's
//! place: the old one is gone, and with it whoever could end its sessions. A copy of a host, or of
//! its certificate, is another case: both live, and each would end the migrations of the other. What
//! tells them apart is whether the old one still speaks.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::session::Session;

/// What a process that has ended has sent before may still arrive for so long.
const LATE: Duration = Duration::from_millis(500);
/// A live connection is heard of at least this often: each side pings the other every second.
const SPEAKS_WITHIN: Duration = Duration::from_millis(2500);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Whether the other side of a session still speaks.
pub(super) async fn speaks(session: &Session) -> bool {
    let gone = || !session.is_live() || session.away_since().is_some();
    sleep(LATE).await;
    let before = session.stats().await.received_bytes;
    let until = Instant::now() + SPEAKS_WITHIN;
    while !gone() && Instant::now() < until {
        if session.stats().await.received_bytes > before {
            // Its last words, or the next process's predecessor on its way out?
            sleep(LOOK_EVERY).await;
            return !gone();
        }
        sleep(LOOK_EVERY).await;
    }
    false
}
