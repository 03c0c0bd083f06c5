//! How much there may be of what programs and peers can begin.

use std::time::Duration;

/// Connections of one forwarding, or to one target.
pub const CONNECTIONS_MAX: usize = 256;
/// Forwarded connections to one peer, and as many from it. A session has room for 1024 streams each way:
/// the rest is for migrations.
pub const PEER_CONNECTIONS_MAX: usize = 768;
/// Forwarded connections to one peer that it has not answered yet. A session has 64 places for streams
/// that wait: the rest is for migrations.
pub(super) const UNANSWERED_MAX: usize = 32;
/// Forwarded connections that are begun at once, and how much later each further one: a session may
/// open 256 streams at once and 50 in a second, and some of them are for migrations.
pub(super) const OPENS_AT_ONCE: u32 = 128;
pub(super) const OPENS_APART: Duration = Duration::from_millis(25);
/// How long a connection may wait until its session has room for it.
pub(super) const ROOM_DEADLINE: Duration = Duration::from_secs(30);
/// Between two looks whether there is room.
pub(super) const ROOM_POLL: Duration = Duration::from_millis(20);
/// How long a target may take to take a connection.
pub(super) const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// Between two tries to connect to a unix socket whose queue is full.
pub(super) const CONNECT_POLL: Duration = Duration::from_millis(5);
/// Connections that the kernel keeps for a forwarding before they are accepted.
pub(super) const LISTEN_BACKLOG: i32 = 256;
/// Before the next try when no connection can be accepted, for want of descriptors mostly.
pub(super) const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// Forwardings of one agent, and targets that were granted for a time.
pub(super) const FORWARDINGS_MAX: usize = 1024;
/// Longest life of a grant that nobody prolongs.
pub(super) const GRANT_MAX: Duration = Duration::from_secs(24 * 60 * 60);
