//! Floods of each frame that costs its sender nothing, from a peer that is known and permitted nothing, and peers
//! that take no answer: the agent's memory stays within bounds, by the kernel's word, and another peer's migration goes on.

use std::time::Duration;

use vmferry::migrate::message::{Asked, Request};
use vmferry::mux::frame::{FLAG_ABORT, FLAG_IGNORABLE, Header, Kind, encode_open};

use super::moving::Moving;
use super::raw::Raw;
use super::victim::{Victim, control};
use crate::rig::soon;

const MIB: u64 = 1 << 20;
/// What an attacker of a frame or an answer that is not taken may cost, with what the allocator keeps.
const COST_MAX: u64 = 48 * MIB;
/// Sent as fast as they are taken.
const FRAMES: u32 = 200_000;

fn frame(kind: Kind, stream: u32, value: u64, payload: &[u8]) -> Vec<u8> {
    [&Header::new(kind, stream, value).with_len(payload.len()).encode()[..], payload].concat()
}

fn open(stream: u32, credit: u64) -> Vec<u8> {
    frame(Kind::Open, stream, credit, &encode_open(&control(uuid::Uuid::from_u128(u128::from(stream)))))
}

fn reset(stream: u32) -> Vec<u8> {
    let header = Header::new(Kind::Reset, stream, 0).with_len(4).with_flags(FLAG_ABORT);
    [&header.encode()[..], &[0, 0, 0, 7]].concat()
}

fn ignorable(_: u32) -> Vec<u8> {
    let header = Header { kind: 0x77, flags: FLAG_IGNORABLE, len: 60_000, stream: 9, value: 0 };
    [&header.encode()[..], &[0; 60_000]].concat()
}

/// The n-th frame of a flood, and how many there are.
type Flood = (&'static str, u32, fn(u32) -> Vec<u8>);

/// Each frame that changes nothing, or little.
const FLOODS: [Flood; 12] = [
    ("PING", FRAMES, |n| frame(Kind::Ping, 0, u64::from(n), &[])),
    ("PONG", FRAMES, |_| frame(Kind::Pong, 0, 0, &[])),
    ("ACK", FRAMES, |_| frame(Kind::Ack, 0, 0, &[])),
    ("DETACH", FRAMES, |_| frame(Kind::Detach, 0, 0, &[])),
    ("GOAWAY", FRAMES, |_| frame(Kind::GoAway, 0, 0, b"bye")),
    ("OPEN", FRAMES, |n| open(2 * n + 1, 65_536)),
    ("OPEN and RESET", FRAMES, |n| [open(2 * n + 1, 65_536), reset(2 * n + 1)].concat()),
    ("CREDIT", FRAMES, |n| if n == 0 { open(1, 0) } else { frame(Kind::Credit, 1, u64::from(n), &[]) }),
    ("PRIO", FRAMES, |n| if n == 0 { open(1, 0) } else { frame(Kind::Prio, 1, u64::from(n % 1000), &[]) }),
    ("STOP", FRAMES, |n| if n == 0 { open(1, 0) } else { frame(Kind::Stop, 1, 7, &[]) }),
    ("DATA of a byte", FRAMES, |n| {
        if n == 0 { open(1, 0) } else { frame(Kind::Data, 1, u64::from(n) - 1, &[0]) }
    }),
    ("what may be ignored", 2000, ignorable),
];

/// Another peer's migration, and the agent's memory before anything.
struct Witness {
    victim: Victim,
    moving: Moving,
    before: u64,
}

impl Witness {
    async fn new() -> Self {
        // Longer than this machine stalls.
        let victim = Victim::start_with(|text| text + "[deadlines]\ndead_peer_s = 60\n");
        let moving = Moving::begin(&victim).await;
        let before = victim.resident_bytes();
        Self { victim, moving, before }
    }

    /// Nothing has been felt, neither by the machine nor by others.
    async fn is_well(&self, what: &str) {
        let more = self.victim.resident_bytes().saturating_sub(self.before);
        assert!(more < COST_MAX, "{what}: {} MiB more", more / MIB);
        self.moving.goes_on(what).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_each_cheap_frame_costs_little_and_is_felt_by_nobody() {
    let witness = Witness::new().await;
    for (at, (what, count, make)) in FLOODS.into_iter().enumerate() {
        let mut raw = Raw::connect(&witness.victim, "charlie").await;
        raw.greet(at as u8 + 1).await;
        // Whatever is answered is read, or the flood would end by itself.
        let mut sent = 0;
        let mut most = 0;
        let flooding = async {
            let (mut reading, mut writing) = tokio::io::split(raw.stream);
            let heard = async { tokio::io::copy(&mut reading, &mut tokio::io::sink()).await };
            let said = async {
                use tokio::io::AsyncWriteExt;
                while sent < count {
                    let some = (sent..count.min(sent + 500)).flat_map(make).collect::<Vec<_>>();
                    if writing.write_all(&some).await.is_err() {
                        break;
                    }
                    sent += 500;
                    most = most.max(witness.victim.resident_bytes());
                }
                let _ = writing.shutdown().await;
            };
            tokio::join!(heard, said)
        };
        let _ = soon(what, flooding).await;
        println!(
            "{what}: {sent} of {count} taken, {} MiB more at most",
            most.saturating_sub(witness.before) / MIB
        );
        assert!(most.saturating_sub(witness.before) < COST_MAX, "{what}: {most} bytes");
        witness.is_well(what).await;
    }
    let Witness { victim, moving, .. } = witness;
    moving.ends_whole(&victim).await;
}

/// One message, whole, with so many blanks that all of them are far more than may be held.
fn asked(number: u64) -> Vec<u8> {
    let mut json = serde_json::to_vec(&Asked { number, request: Request::Settle, summary: None }).unwrap();
    json.resize(4096, b' ');
    [&(json.len() as u32).to_be_bytes()[..], &json].concat()
}

/// Asks on many streams again and again, with so much credit for the answers, and takes none.
async fn asks_and_takes_nothing(witness: &Witness, what: &str, credit: u64) {
    let mut raw = Raw::connect(&witness.victim, "charlie").await;
    raw.greet(1).await;
    let mut most = 0;
    let mut offset = 0_u64;
    let asking = async {
        for stream in 0..8 {
            raw.say(&open(2 * stream + 1, credit)).await?;
        }
        for number in 0..20_000 {
            let question = asked(number);
            for stream in 0..8 {
                raw.say(&frame(Kind::Data, 2 * stream + 1, offset, &question)).await?;
            }
            offset += question.len() as u64;
            if number % 100 == 0 {
                most = most.max(witness.victim.resident_bytes());
            }
        }
        Ok::<_, std::io::Error>(())
    };
    // It is not read from: at some point it reads no more itself, or ends.
    let _ = tokio::time::timeout(Duration::from_secs(5), asking).await;
    println!(
        "{what}: {offset} bytes on each of 8 streams, {} MiB more",
        most.saturating_sub(witness.before) / MIB
    );
    assert!(most.saturating_sub(witness.before) < COST_MAX, "{what}: {most} bytes");
    witness.is_well(what).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_stops_reading_costs_little() {
    let witness = Witness::new().await;
    asks_and_takes_nothing(&witness, "a peer that reads nothing", 1 << 40).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_grants_no_credit_costs_little() {
    let witness = Witness::new().await;
    asks_and_takes_nothing(&witness, "a peer that grants nothing", 0).await;
}
