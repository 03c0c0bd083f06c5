//! Why a migration is not faster: from what was measured of who waits for whom, to a cause. Pure. What the
//! figures do not tell is unknown.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a migration is held up by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HeldUp {
    SourceDisk,
    SourceCpu,
    Network,
    /// A limit that somebody has set.
    Limit,
    DestinationCpu,
    DestinationDisk,
    GuestWrites,
    Reconnecting,
    Unknown,
}

impl HeldUp {
    pub const ALL: [Self; 9] = [
        Self::SourceDisk,
        Self::SourceCpu,
        Self::Network,
        Self::Limit,
        Self::DestinationCpu,
        Self::DestinationDisk,
        Self::GuestWrites,
        Self::Reconnecting,
        Self::Unknown,
    ];

    /// A bounded label.
    pub fn name(self) -> &'static str {
        match self {
            Self::SourceDisk => "source-disk",
            Self::SourceCpu => "source-cpu",
            Self::Network => "network",
            Self::Limit => "limit",
            Self::DestinationCpu => "destination-cpu",
            Self::DestinationDisk => "destination-disk",
            Self::GuestWrites => "guest-writes",
            Self::Reconnecting => "reconnecting",
            Self::Unknown => "unknown",
        }
    }

    /// For people, after "held up by"; none where there is nothing to say.
    pub fn words(self) -> Option<&'static str> {
        Some(match self {
            Self::SourceDisk => "the source's disk: its QEMU gives no more",
            Self::SourceCpu => "the source's processors",
            Self::Network => "the network: what is sent is slow to arrive",
            Self::Limit => "a limit (`vmferry limit`)",
            Self::DestinationCpu => {
                "the destination's processors or its QEMU: what arrives is slow to be decrypted, written or loaded, or \
                 that host takes no more in a second (its `receive_rate`)"
            }
            Self::DestinationDisk => {
                "the destination's disk: what has arrived is slow to be written, or that host takes no more in a second \
                 (its `receive_rate`)"
            }
            Self::GuestWrites => "the guest, which writes faster than is copied",
            Self::Reconnecting => "a lost connection",
            Self::Unknown => return None,
        })
    }
}

/// Whose streams were measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Copied {
    Disks,
    Ram,
}

/// What was measured over some seconds; shares in thousandths of that time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Measured {
    pub(crate) copied: Copied,
    pub(crate) is_away: bool,
    /// The guest makes more to copy than is copied.
    pub(crate) outrun: bool,
    /// A limit kept what could have been sent.
    pub(crate) limited: u64,
    /// The busiest of this agent's threads that encrypt had, or wanted, a processor.
    pub(crate) agent_busy: Option<u64>,
    /// The same of QEMU's first thread.
    pub(crate) qemu_busy: Option<u64>,
    /// The busiest thread of the destination, by its agent's word: one that decrypts, or QEMU's first. None where
    /// it has not said so.
    pub(crate) destination_busy: Option<u64>,
    /// The streams waited for the session to take more.
    pub(crate) session: u64,
    /// The streams waited for QEMU to give more, which waited for no answer.
    pub(crate) local: u64,
    /// The streams waited for QEMU to give more, which may have waited for an answer.
    pub(crate) answer: u64,
    /// Something was on its way, and the other agent had not said that it has it.
    pub(crate) on_its_way: u64,
}

const HALF: u64 = 500;
/// A thread that has no time for more.
const BUSY: u64 = 850;
const MOSTLY: u64 = 700;
const SELDOM: u64 = 350;

/// The cause, by the first of these that is measured.
pub(crate) fn held_up_by(m: &Measured) -> HeldUp {
    if m.is_away {
        return HeldUp::Reconnecting;
    }
    if m.outrun {
        return HeldUp::GuestWrites;
    }
    if m.limited >= HALF {
        return HeldUp::Limit;
    }
    if m.agent_busy.is_some_and(|busy| busy >= BUSY) {
        return HeldUp::SourceCpu;
    }
    // QEMU sends the RAM without waiting for answers.
    let (local, far) = match m.copied {
        Copied::Disks => (m.local, m.session + m.answer),
        Copied::Ram => (m.local + m.answer, m.session),
    };
    match m.copied {
        // What waits there for a processor is on its way for long, or unanswered for long.
        _ if far >= HALF && m.destination_busy.is_some_and(|busy| busy >= BUSY) => HeldUp::DestinationCpu,
        _ if far >= HALF && m.on_its_way >= MOSTLY => HeldUp::Network,
        Copied::Disks if far >= HALF && m.on_its_way <= SELDOM => HeldUp::DestinationDisk,
        Copied::Ram if far >= HALF && m.on_its_way <= SELDOM => HeldUp::DestinationCpu,
        Copied::Disks if local >= HALF && m.qemu_busy.is_some_and(|busy| busy >= BUSY) => HeldUp::SourceCpu,
        Copied::Disks if local >= HALF => HeldUp::SourceDisk,
        Copied::Ram if local >= HALF => HeldUp::SourceCpu,
        _ => HeldUp::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALM: Measured = Measured {
        copied: Copied::Disks,
        is_away: false,
        outrun: false,
        limited: 0,
        agent_busy: Some(300),
        qemu_busy: Some(300),
        destination_busy: Some(300),
        session: 0,
        local: 0,
        answer: 0,
        on_its_way: 0,
    };

    #[test]
    fn who_waits_for_whom_is_the_cause() {
        let ram = Measured { copied: Copied::Ram, ..CALM };
        let cases = [
            ("nobody waits", CALM, HeldUp::Unknown),
            (
                "no connection",
                Measured { is_away: true, limited: 900, outrun: true, ..CALM },
                HeldUp::Reconnecting,
            ),
            ("the guest", Measured { outrun: true, limited: 900, session: 900, ..CALM }, HeldUp::GuestWrites),
            ("a limit", Measured { limited: 700, session: 900, on_its_way: 900, ..CALM }, HeldUp::Limit),
            ("a limit now and then", Measured { limited: 100, local: 900, ..CALM }, HeldUp::SourceDisk),
            ("encryption", Measured { agent_busy: Some(960), session: 900, ..CALM }, HeldUp::SourceCpu),
            ("QEMU reads slowly", Measured { local: 800, answer: 100, ..CALM }, HeldUp::SourceDisk),
            ("QEMU has no time", Measured { local: 800, qemu_busy: Some(990), ..CALM }, HeldUp::SourceCpu),
            (
                "nothing is known of QEMU",
                Measured { local: 800, qemu_busy: None, ..CALM },
                HeldUp::SourceDisk,
            ),
            (
                "it arrives, no answer",
                Measured { answer: 900, on_its_way: 100, ..CALM },
                HeldUp::DestinationDisk,
            ),
            (
                "it arrives, no credit",
                Measured { session: 900, on_its_way: 0, ..CALM },
                HeldUp::DestinationDisk,
            ),
            ("it does not arrive", Measured { session: 900, on_its_way: 1000, ..CALM }, HeldUp::Network),
            ("answers come late", Measured { answer: 900, on_its_way: 900, ..CALM }, HeldUp::Network),
            ("half of it is on its way", Measured { answer: 900, on_its_way: 500, ..CALM }, HeldUp::Unknown),
            ("two halves", Measured { answer: 450, local: 450, ..CALM }, HeldUp::Unknown),
            ("RAM is read slowly", Measured { answer: 600, local: 300, ..ram }, HeldUp::SourceCpu),
            ("RAM does not arrive", Measured { session: 600, on_its_way: 900, ..ram }, HeldUp::Network),
            (
                "RAM is loaded slowly",
                Measured { session: 600, on_its_way: 100, ..ram },
                HeldUp::DestinationCpu,
            ),
            (
                "it arrives, and QEMU there has no time",
                Measured { answer: 900, on_its_way: 100, destination_busy: Some(900), ..CALM },
                HeldUp::DestinationCpu,
            ),
            (
                "it is slow to be decrypted there",
                Measured { session: 900, on_its_way: 1000, destination_busy: Some(900), ..CALM },
                HeldUp::DestinationCpu,
            ),
            (
                "the destination has much to do and waits for us",
                Measured { local: 900, destination_busy: Some(1000), ..CALM },
                HeldUp::SourceDisk,
            ),
            (
                "an older destination says nothing",
                Measured { answer: 900, destination_busy: None, ..CALM },
                HeldUp::DestinationDisk,
            ),
            ("the kernel tells nothing", Measured { agent_busy: None, ..CALM }, HeldUp::Unknown),
        ];
        for (name, measured, expected) in cases {
            assert_eq!(held_up_by(&measured), expected, "{name}");
        }
        // Every cause but one is told in words, and each is some case's.
        for cause in HeldUp::ALL {
            assert_eq!(cause.words().is_none(), cause == HeldUp::Unknown);
            assert!(cases.iter().any(|(.., expected)| *expected == cause), "{cause:?}");
            assert_eq!(serde_json::json!(cause), cause.name());
        }
    }
}
