//! What two agents say to each other about one migration, on its control stream.
//!
//! The source asks, the destination answers each request once, and sends notices in between.
//! All of it is JSON in the frames of `net::message`.
//!
//! # What an agent does not know
//!
//! * What is *to be done* is understood whole or refused, by name: kinds of requests, their own fields, values of
//!   a fixed set, what the operator has decided ([`Policy`]), and everything beside the request ([`Asked`]). An
//!   agent that ignored such a field would do something else than it was asked for. Version N sends one to N−1
//!   only where its operator asked for what it does (then a refusal is right), or where the peer has said in its
//!   HELLO that it knows it.
//! * What is only *told* may have more than one knows: descriptions ([`Offer`], [`DiskSpec`], `Machine`), answers,
//!   notices, summaries, findings. Unknown fields there are ignored, so that N may tell N−1 more.
//! * Where what is told must not be ignored, its name is in [`Offer::needs`] too: whoever does not know a name
//!   there refuses the offer. That is how N makes a description into a demand without a new version.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use crate::migrate::handover::Fate;
use crate::migrate::handover::Known;
use crate::migrate::model::in_band::InBand;
use crate::migrate::model::phase::Phase;
pub use crate::migrate::model::plan::Export;
use crate::migrate::model::problem::{Policy, Problem};
use crate::migrate::model::progress::{DiskProgress, Downtime, RamProgress};
use crate::migrate::model::witness::OfferedWitness;
use crate::qemu::{Encryption, Machine};

/// A disk as the source has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// The same on both hosts: made from the guest device.
    pub name: String,
    /// Bytes that the guest sees.
    pub virtual_size: u64,
    pub format: String,
    /// The guest cannot write to it; it is not copied, but must be there.
    pub read_only: bool,
    /// The guest can write to it, and it is not copied: both hosts are to use one storage, or its contents are
    /// its operator's care. An agent that does not know of it grants an export for it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub left_out: bool,
    /// Only its topmost image is copied: the destination's stands on something that shows the same as what the
    /// source's stands on ([`NEEDS_INCREMENTAL`]).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub incremental: bool,
    /// Its dirty bitmaps that can go along ([`Prepared::bitmaps`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bitmaps: Option<OfferedBitmaps>,
    /// Where it is and what it lies on. None from an agent that does not know of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<DiskPlace>,
}

impl DiskSpec {
    /// Whether its contents go to the destination.
    pub(crate) fn is_copied(&self) -> bool {
        !self.read_only && !self.left_out
    }
}

/// Dirty bitmaps of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferedBitmaps {
    /// What their node is called in QEMU's stream.
    pub node: String,
    pub bitmaps: Vec<OfferedBitmap>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferedBitmap {
    /// In QEMU's stream as well.
    pub name: String,
    /// It is stored in the image.
    #[serde(default)]
    pub persistent: bool,
}

/// By what a disk is paired, and what is below it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPlace {
    /// The id that somebody gave the guest's device.
    #[serde(default)]
    pub id: Option<String>,
    /// Where the guest's device is plugged in, as QEMU's migration stream has it.
    #[serde(default)]
    pub address: Option<String>,
    /// The name of its drive (`-drive`), by which QEMU's own stream calls it; none with `-blockdev`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drive: Option<String>,
    /// It stands on a backing file.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub backing: bool,
    /// The best encryption below it.
    #[serde(default)]
    pub encryption: Encryption,
    /// The source's host encrypts what lies in one of its images, whatever QEMU does.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub host_encrypts: bool,
    /// Whether it does is not known. An agent that does not know of this takes it for no, and one that does not
    /// say it may mean it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub host_encryption_unknown: bool,
    /// The source's QEMU reaches one of its images over a network, by TLS or SSH.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub encrypted_in_transit: bool,
    /// The guest's flushes do not reach the image.
    #[serde(default)]
    pub no_flush: bool,
    /// All the same, what the guest has written is in the storage when QEMU has stopped it: it does not wait for a flush.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stored: bool,
    /// The guest's device has no write cache, which QEMU does not bring along: its driver flushes nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub write_through: bool,
    /// How what the guest sees lies in the storages; none if that is not told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<String>,
    /// What it occupies, in bytes.
    #[serde(default)]
    pub allocated: Option<u64>,
    /// The storages below it that have a name.
    #[serde(default)]
    pub storages: Vec<Storage>,
    /// There are more of them, or some have no name.
    #[serde(default)]
    pub hides_storage: bool,
}

/// A flash of the firmware.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlashSpec {
    /// In QEMU's tree of objects, such as `/machine/system.flash1`.
    pub place: String,
    /// What the guest writes there outlives QEMU.
    pub kept: bool,
}

/// A storage by a name that is the same on every host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Storage {
    pub key: String,
    /// The guest's writes go to it.
    pub written: bool,
}

/// A request with its number: an answer that nobody waits for any more is told from the next.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    /// Rises with every request on a control stream.
    pub number: u64,
    pub request: Request,
    /// With [`Request::Confirmed`]: how it went, for the destination's operators.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<Summary>,
}

/// What a source has measured of a migration that is at its end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    #[serde(default)]
    pub disks: Vec<DiskProgress>,
    #[serde(default)]
    pub ram: Option<RamProgress>,
    /// How long the guest stood still.
    #[serde(default)]
    pub downtime: Option<Downtime>,
}

/// The reason of an [`Request::Abort`] that an operator asked for.
pub const CANCELLED: &str = "cancelled";

/// The reason of an [`Request::Abort`] when a replica is in step, which was all that was wanted.
pub const REPLICATED: &str = "the replica is in step";

/// From source to destination.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What would fail? Changes nothing.
    Check(Offer),
    /// Start or find the QEMU that waits, export its disks, grant the streams. Asked again, this and
    /// what follows get the same answer again.
    Prepare(Offer),
    Incoming,
    /// Whether the guest is to run at its start, where that has changed since the offer: somebody has
    /// paused or continued it. Durable before it is answered.
    ToRun {
        running: bool,
    },
    /// What are the hashes of these parts of a disk, as your QEMU has them at this moment?
    Hash(Pieces),
    /// Which of these parts of a disk read as zeroes by your QEMU's word, without being read?
    Zeroes(Parts),
    /// The mirrors are finished: close the exports, so that the disks are the guest's alone.
    Switchover,
    /// The source has durably handed over: start the guest.
    Start,
    /// The source has durably taken note that the guest runs here.
    Confirmed,
    /// Give up; undo what was prepared.
    Abort {
        /// Why, for the destination's log.
        reason: String,
    },
    /// After a lost connection or a restart: what has become of this migration?
    Settle,
    /// For an operator, from either side: what does your journal say? Changes nothing.
    Tell,
    /// Of no migration: forget the replica that you keep for me.
    EndReplica(EndReplica),
}

impl Request {
    /// For logs and errors.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Check(_) => "check",
            Self::Prepare(_) => "prepare",
            Self::Incoming => "incoming",
            Self::ToRun { .. } => "to-run",
            Self::Hash(_) => "hash",
            Self::Zeroes(_) => "zeroes",
            Self::Switchover => "switchover",
            Self::Start => "start",
            Self::Confirmed => "confirmed",
            Self::Abort { .. } => "abort",
            Self::Settle => "settle",
            Self::Tell => "tell",
            Self::EndReplica(_) => "end-replica",
        }
    }
}

/// Of a replica that the asking peer has made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndReplica {
    pub vm: String,
    /// The images go as well that were made for it.
    pub images: bool,
}

/// What has become of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndedReplica {
    /// There was one.
    pub was_kept: bool,
    /// Images that were to go and stay, and why.
    pub left: Vec<String>,
}

/// A virtual machine on offer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Its name, the same on both hosts.
    pub vm: String,
    pub disks: Vec<DiskSpec>,
    /// Whether its guest runs, and is to run at the destination.
    pub running: bool,
    /// The source's QEMU, for people.
    pub qemu: String,
    /// The try before, which copied these disks: are they still as it left them?
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Uuid>,
    /// The source would like to compress what it sends of the disks.
    #[serde(default)]
    pub compress: bool,
    /// What the source's operator has decided about findings.
    #[serde(default)]
    pub policy: Policy,
    /// The machine around the disks; none from an agent that does not know of it, or could not ask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<Machine>,
    /// The last line of the source's audit record, which the destination keeps in its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit_head: Option<String>,
    /// The disks that are copied come inside QEMU's own stream, and are not exported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_band: Option<InBand>,
    /// The source understands [`Reply::Busy`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hears_busy: bool,
    /// The firmware's flash, whose contents go with the guest's state.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flash: Vec<FlashSpec>,
    /// The source's witness, which is to be the destination's as well: with [`NEEDS_WITNESS`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub witness: Option<OfferedWitness>,
    /// Names of what else is in it that must not be ignored: of [`NEEDS_KNOWN`].
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub needs: BTreeSet<String>,
}

/// In [`Offer::needs`]: the destination is to answer [`Request::Hash`].
pub const NEEDS_HASHES: &str = "hashes";
/// In [`Offer::needs`]: no guest comes. The images stay, and are remembered as a replica's.
pub const NEEDS_REPLICA: &str = "replica";
/// In [`Offer::needs`]: of some disks only the topmost image is copied ([`DiskSpec::incremental`]).
pub const NEEDS_INCREMENTAL: &str = "incremental";
/// In [`Offer::needs`]: the destination is to heed [`Offer::in_band`].
pub const NEEDS_IN_BAND: &str = "in-band";
/// In [`Offer::needs`]: the destination is to answer [`Request::Hash`] of disks that are read-only at the source.
pub const NEEDS_READ_ONLY: &str = "read-only";
/// In [`Offer::needs`]: the destination asks a witness before the guest runs there ([`Offer::witness`]).
pub const NEEDS_WITNESS: &str = "witness";
/// What this version knows of [`Offer::needs`].
pub const NEEDS_KNOWN: &[&str] =
    &[NEEDS_HASHES, NEEDS_REPLICA, NEEDS_INCREMENTAL, NEEDS_IN_BAND, NEEDS_READ_ONLY, NEEDS_WITNESS];

/// Parts of a granted disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pieces {
    pub disk: String,
    pub pieces: Vec<Piece>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Piece {
    /// Where it begins, in bytes.
    pub at: u64,
    pub bytes: u32,
}

/// Parts of a granted disk that may be long.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parts {
    pub disk: String,
    /// Where each begins, and where it ends.
    pub parts: Vec<(u64, u64)>,
}

impl Offer {
    /// Whether only a replica of the disks is wanted.
    pub(crate) fn is_replica(&self) -> bool {
        self.needs.contains(NEEDS_REPLICA)
    }

    /// Disks that are not copied, because the guest cannot write to them, and are compared instead.
    pub(crate) fn compared(&self) -> impl Iterator<Item = &DiskSpec> {
        let compares = self.needs.contains(NEEDS_READ_ONLY);
        self.disks.iter().filter(move |disk| compares && disk.read_only)
    }

    /// With a witness, which must not be ignored.
    #[must_use]
    pub(crate) fn with_witness(mut self, witness: Option<OfferedWitness>) -> Self {
        if witness.is_some() {
            self.needs.insert(NEEDS_WITNESS.to_owned());
        }
        self.witness = witness;
        self
    }

    /// Whether it is the same offer, said again: what a disk occupies changes while the guest runs.
    pub(crate) fn is_again(&self, before: &Self) -> bool {
        let disk = |d: &DiskSpec| (d.name.clone(), d.virtual_size, d.read_only, d.left_out, d.incremental);
        self.vm == before.vm
            && (self.running, self.after, self.compress) == (before.running, before.after, before.compress)
            && self.in_band == before.in_band
            && self.disks.iter().map(disk).eq(before.disks.iter().map(disk))
    }
}

/// From destination to source.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    Response {
        number: u64,
        response: Response,
    },
    /// Unasked.
    Notice(Notice),
    /// Unasked, and only to a source that understands it ([`Offer::hears_busy`]): about once a second while disks
    /// or RAM come.
    Busy(Busy),
}

/// In which part of about the last second threads of the destination had, or wanted, a processor, in thousandths. A
/// source sees only that what it has sent is slow to be taken, and not whether a disk is the cause.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Busy {
    /// The busiest of the agent's threads that decrypt. None where the kernel does not tell, as below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<u64>,
    /// QEMU's first thread, which serves its exports and loads the RAM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu: Option<u64>,
}

impl Busy {
    /// The busier of both.
    pub(crate) fn most(self) -> Option<u64> {
        self.agent.max(self.qemu)
    }
}

/// The answer to a request.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    Checked(Vec<Problem>),
    /// To [`Request::Prepare`]: the grant.
    Prepared(Prepared),
    /// To what needs no other answer.
    Done,
    Started(Started),
    /// To [`Request::Hash`]: SHA-256 in hex, in the order of the pieces.
    Hashes(Vec<String>),
    /// To [`Request::Zeroes`], in the order of the parts.
    AreZeroes(Vec<bool>),
    /// To [`Request::Settle`] and [`Request::Abort`], and to a [`Request::Start`] that comes too late.
    Fate(Fate),
    /// To [`Request::Tell`]; none when there is no journal.
    Told(Option<Told>),
    /// To [`Request::EndReplica`].
    ReplicaEnded(EndedReplica),
    /// The request was refused or failed.
    Refused(Refusal),
}

/// What the destination grants.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Prepared {
    /// Names of exports by disk, in the order of the offered disks that are copied.
    pub exports: Vec<Export>,
    /// The destination's QEMU, for people.
    pub qemu: String,
    /// Whether a further try will get a fresh QEMU by itself.
    pub restartable: bool,
    #[serde(default)]
    pub since: Vec<DiskState>,
    /// What comes of the disks is compressed ([`Offer::compress`]); an agent that does not know of
    /// it says no.
    #[serde(default)]
    pub compress: bool,
    /// Disks that are not copied ([`DiskSpec::left_out`]) were understood as such.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaves_out: bool,
    /// It answers [`Request::Zeroes`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tells_zeroes: bool,
    /// Which of the offered dirty bitmaps are taken in, by disk. None from an agent that does not know of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bitmaps: Option<BTreeMap<String, Vec<String>>>,
    /// What was found, and did not keep the destination from being prepared.
    #[serde(default)]
    pub findings: Vec<Problem>,
    /// How long the destination's `before_start` may take, in seconds; 0 when there is none. An agent
    /// that does not say it is taken to wait as long as the source would.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hook_s: Option<u64>,
    /// The offered witness is the destination's, too: the guest runs only once it is taken there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub witness: bool,
    /// The last line of the destination's audit record, which the source keeps in its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit_head: Option<String>,
}

/// What is known of a disk since an earlier try.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskState {
    pub disk: String,
    /// Why it may not be as that try left it; none when it surely is.
    pub doubt: Option<String>,
}

/// The guest runs at the destination.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Started {
    /// Time spent in the `before_start` command, in milliseconds.
    pub hook_ms: Option<u64>,
    /// What went wrong without keeping the guest from starting.
    pub warnings: Vec<String>,
    /// Why it does not run, although it was started and could.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stands: Option<String>,
}

/// Why a request was refused or failed at the destination.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Refusal {
    /// What would have to be mended first; empty when it was an error.
    pub problems: Vec<Problem>,
    /// The error and its causes, in words.
    pub text: String,
}

/// What the destination says unasked.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Notice {
    /// The guest's whole state is here, paused, ready to start.
    Loaded,
    /// The destination cannot go on.
    Failed {
        /// Why, in words.
        text: String,
    },
}

/// What an agent's journal says, for the other side's operator.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Told {
    pub phase: Phase,
    pub known: Known,
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;

    /// As agents say it that know nothing of disks that are not copied, and as it is said to them.
    #[test]
    fn disks_that_are_not_copied_are_unknown_to_an_older_agent() {
        let older = r#"{"name":"vda","virtual_size":1,"format":"raw","read_only":false}"#;
        let spec: DiskSpec = serde_json::from_str(older).unwrap();
        assert!(spec.is_copied());
        assert_eq!(serde_json::to_string(&spec).unwrap(), older);
        let left_out = DiskSpec { left_out: true, ..spec };
        let said: DiskSpec = serde_json::from_str(&serde_json::to_string(&left_out).unwrap()).unwrap();
        assert!(!said.is_copied());
        let grant: Prepared =
            serde_json::from_str(r#"{"exports":[],"qemu":"QEMU 10.0.2","restartable":true}"#).unwrap();
        assert!(!grant.leaves_out);
    }

    /// It is only told: an agent that does not know of it ignores it.
    #[test]
    fn what_is_not_known_of_encryption_is_unknown_to_an_older_agent() {
        let older = r#"{"id":"vda","address":null,"encryption":"none","host_encrypts":true,"no_flush":false,"allocated":null,"storages":[],"hides_storage":false}"#;
        let place: DiskPlace = serde_json::from_str(older).unwrap();
        assert!(!place.host_encryption_unknown && !place.encrypted_in_transit);
        assert_eq!(serde_json::to_string(&place).unwrap(), older);
        let newer = DiskPlace { host_encryption_unknown: true, encrypted_in_transit: true, ..place };
        let said = serde_json::to_string(&newer).unwrap();
        assert_eq!(serde_json::from_str::<DiskPlace>(&said).unwrap(), newer);
        let of_tomorrow = said.replace("host_encryption_unknown", "of_tomorrow");
        assert!(!serde_json::from_str::<DiskPlace>(&of_tomorrow).unwrap().host_encryption_unknown);
    }
}
