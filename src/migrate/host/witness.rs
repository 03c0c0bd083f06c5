//! The witness of this host's migrations: an etcd that keeps one word for each of them
//! ([`crate::migrate::handover::Word`]), under its number. What is asked of it is asked within a deadline, and never
//! guessed; an answer of another etcd than the one that was agreed on, or of one that knows less, is none: it says
//! something of that migration, and nothing of whether the witness is reached.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::config::WitnessConfig;
use crate::migrate::handover::{Answer, Move, Word};
use crate::migrate::model::problem::{Problem, ProblemKind, chain};
use crate::migrate::model::witness::{AgreedWitness, OfferedWitness};
use crate::printable::bounded;
use crate::witness::{Asking, Etcd, EtcdError, Seen, Told};

/// So often a word is changed by somebody else before it is our turn.
const TRIES: usize = 8;
/// Whatever is asked about one migration is answered within this time, over all endpoints, or not at all.
pub(crate) const WHOLE_DEADLINE: Duration = Duration::from_secs(10);
/// So much is asked at once for which nobody waits.
const BACKGROUND_MAX: usize = 64;
/// Of so many migrations it is known what was said of them last.
const SAID_MAX: usize = 256;

/// How often it was asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WitnessFigures {
    pub answered: u64,
    /// And those whose answer was not believed.
    pub unanswered: u64,
    /// Whether it was reached when it was asked last; none before.
    pub answers: Option<bool>,
}

/// Why it cannot be agreed on, or is not believed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WitnessError {
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    #[error("it has a word of this migration already, \"{0}\"")]
    Used(String),
    #[error("it is another than the source's: its cluster is {ours}, the source's is {theirs}")]
    Another { ours: String, theirs: String },
    #[error("the source keeps its word under {theirs}, and this host under {ours}: their `prefix` differs")]
    Elsewhere { ours: String, theirs: String },
    #[error("it has no word of the migration, which the source has begun")]
    NoWord,
    #[error("it knows less than the source's, as one that was restored from a copy")]
    KnowsLess,
    #[error("\"{0}\" is no word of a migration")]
    Odd(String),
}

/// An etcd, for this host's migrations.
#[derive(Debug)]
pub(crate) struct Witness {
    etcd: Etcd,
    figures: [AtomicU64; 2],
    last: Mutex<Last>,
    /// Places for what nobody waits for.
    pub(crate) places: Arc<Semaphore>,
    /// What is asked there.
    pub(crate) background: TaskTracker,
}

/// What became of the last questions.
#[derive(Debug, Default)]
struct Last {
    /// Whether it was reached, and else why not; none before it is asked.
    reached: Option<Result<(), String>>,
    /// What it has said of migrations that are not forgotten there, or why that is not believed.
    said: BTreeMap<Uuid, Result<(Move, Answer), String>>,
    /// Its endpoints with their clusters, if these are several.
    divided: Option<String>,
}

impl Witness {
    pub(crate) fn new(config: &WitnessConfig) -> Self {
        Self {
            etcd: Etcd::new(config),
            figures: Default::default(),
            last: Mutex::default(),
            places: Arc::new(Semaphore::new(BACKGROUND_MAX)),
            background: TaskTracker::new(),
        }
    }

    /// The name of a migration's word.
    fn name(&self, migration: Uuid) -> String {
        self.etcd.name(&key(migration))
    }

    pub(crate) fn figures(&self) -> WitnessFigures {
        let [answered, unanswered] = &self.figures;
        let answers = self.last().reached.as_ref().map(Result::is_ok);
        WitnessFigures { answered: answered.load(Relaxed), unanswered: unanswered.load(Relaxed), answers }
    }

    /// Why it did not answer when it was asked last, or was not believed of that migration.
    pub(crate) fn why_not(&self, migration: Uuid) -> Option<String> {
        let last = self.last();
        let doubt = || last.said.get(&migration).and_then(|said| said.clone().err());
        last.reached.clone().and_then(Result::err).or_else(doubt)
    }

    /// Looks whether it is there, at each endpoint.
    pub(crate) async fn probe(&self) {
        let seen = self.etcd.each().await;
        let divided = divided(&seen);
        let any = seen.iter().any(|seen| seen.cluster.is_ok());
        let why =
            seen.into_iter().filter_map(|seen| Some(format!("{}: {}", seen.endpoint, seen.cluster.err()?)));
        let reached = if any { Ok(()) } else { Err(EtcdError::NoAnswer(why.collect::<Vec<_>>().join("; "))) };
        self.count(any);
        self.note_reached(reached.map_err(|e| chain(&e)));
        let mut last = self.last();
        if let Some(endpoints) = divided.as_ref().filter(|_| last.divided != divided) {
            tracing::warn!(endpoints, "the witness has endpoints of different etcds; most of them are asked");
        }
        last.divided = divided;
    }

    /// Which one it is. Changes nothing.
    /// Errors: [`WitnessError`].
    pub(crate) async fn look(&self) -> Result<OfferedWitness, WitnessError> {
        let usual = self.etcd.usual();
        let told = self.note(self.etcd.get("", asking(usual.as_deref())).await, Ok)?;
        Ok(OfferedWitness { is: agreed(told), key: self.name(Uuid::nil()) })
    }

    /// Begins a word for a migration of this host.
    /// Errors: [`WitnessError`]; there may be a word all the same.
    pub(crate) async fn begin(&self, migration: Uuid) -> Result<OfferedWitness, WitnessError> {
        let (name, usual) = (key(migration), self.etcd.usual());
        let asked = self.etcd.change(&name, 0, Word::Open.name(), asking(usual.as_deref())).await;
        let told = self.note(asked, Ok)?;
        match &told.kept {
            Some(kept) if kept.value == Word::Open.name() => {
                Ok(OfferedWitness { is: agreed(told), key: self.name(migration) })
            }
            kept => Err(WitnessError::Used(kept.as_ref().map_or_else(String::new, |k| bounded(&k.value)))),
        }
    }

    /// Whether it is the source's, which has begun the word of a migration there.
    /// Errors: [`WitnessError`].
    pub(crate) async fn agree(
        &self,
        migration: Uuid,
        theirs: &OfferedWitness,
    ) -> Result<AgreedWitness, WitnessError> {
        self.is_there_too(migration, theirs)?;
        let asked = self.etcd.get(&key(migration), asking(Some(&theirs.is.cluster))).await;
        let told = self.note(of(asked, &theirs.is), Ok)?;
        match &told.kept {
            None => Err(WitnessError::NoWord),
            Some(kept) if kept.value != Word::Open.name() => Err(WitnessError::Used(bounded(&kept.value))),
            Some(_) => Ok(agreed(told)),
        }
    }

    /// The same, of no migration.
    /// Errors: [`WitnessError`].
    pub(crate) async fn is_that(&self, theirs: &OfferedWitness) -> Result<(), WitnessError> {
        self.is_there_too(Uuid::nil(), theirs)?;
        let asked = self.etcd.get("", asking(Some(&theirs.is.cluster))).await;
        self.note(of(asked, &theirs.is), Ok).map(drop)
    }

    fn is_there_too(&self, migration: Uuid, theirs: &OfferedWitness) -> Result<(), WitnessError> {
        let ours = self.name(migration);
        if ours == theirs.key {
            return Ok(());
        }
        let theirs = bounded(&theirs.key);
        Err(WitnessError::Elsewhere { ours, theirs })
    }

    /// Changes the word of a migration.
    pub(crate) async fn make(&self, migration: Uuid, agreed: &AgreedWitness, by: Move) -> Answer {
        let said = self.moved(migration, agreed, by).await;
        let answer = *said.as_ref().unwrap_or(&Answer::Unknown);
        self.note_said(migration, by, said);
        answer
    }

    /// Errors: whatever was said is not believed, or nothing was.
    async fn moved(&self, migration: Uuid, is: &AgreedWitness, by: Move) -> Result<Answer, WitnessError> {
        let name = key(migration);
        let asking = asking(Some(&is.cluster));
        let mut asked = self.etcd.get(&name, asking).await;
        for _ in 0..TRIES {
            let (told, word) = self.note(of(asked, is), |told| word(&told).map(|word| (told, word)))?;
            if told.is_changed {
                return Ok(Answer::Done);
            }
            let Some((word, mod_revision)) = word else { return Ok(Answer::Forgotten) };
            match by.of(word) {
                Err(answer) => return Ok(answer),
                Ok(next) => asked = self.etcd.change(&name, mod_revision, next.name(), asking).await,
            }
        }
        Ok(Answer::Unknown)
    }

    /// Nobody asks for the word of this migration any more. One that is left there does no harm.
    pub(crate) async fn forget(&self, migration: Uuid) {
        let (name, usual) = (key(migration), self.etcd.usual());
        let asking = asking(usual.as_deref());
        let told = self.note(self.etcd.get(&name, asking).await, Ok);
        let Ok(Told { kept: Some(kept), .. }) = told else { return };
        let _ = self.note(self.etcd.remove(&name, kept.mod_revision, asking).await, Ok);
        self.last().said.remove(&migration);
    }

    /// Counts a question, and says whether the witness is reached.
    fn note<T, E: Into<WitnessError>>(
        &self,
        asked: Result<Told, E>,
        judge: impl FnOnce(Told) -> Result<T, WitnessError>,
    ) -> Result<T, WitnessError> {
        let asked = asked.map_err(E::into);
        self.note_reached(match &asked {
            Err(e @ WitnessError::Etcd(EtcdError::NoAnswer(_))) => Err(chain(e)),
            _ => Ok(()),
        });
        let judged = asked.and_then(judge);
        self.count(judged.is_ok());
        judged
    }

    fn count(&self, is_answered: bool) {
        let [answered, unanswered] = &self.figures;
        let count = if is_answered { answered } else { unanswered };
        count.fetch_add(1, Relaxed);
    }

    /// Says what has changed.
    fn note_reached(&self, now: Result<(), String>) {
        let mut last = self.last();
        if last.reached.as_ref() == Some(&now) {
            return;
        }
        match (&now, &last.reached) {
            (Err(cause), _) => tracing::warn!(cause, "the witness does not answer"),
            (Ok(()), Some(Err(_))) => tracing::info!("the witness answers again"),
            (Ok(()), _) => {}
        }
        last.reached = Some(now);
    }

    /// Says what it has said of a migration, or why that is not believed, once. That nothing was said is another matter.
    fn note_said(&self, migration: Uuid, by: Move, said: Result<Answer, WitnessError>) {
        let said = match said {
            Ok(Answer::Unknown) | Err(WitnessError::Etcd(EtcdError::NoAnswer(_))) => {
                return tracing::debug!(%migration, ?by, "the witness has not answered");
            }
            Ok(answer) => Ok((by, answer)),
            Err(e) => Err(chain(&e)),
        };
        let mut last = self.last();
        if last.said.get(&migration) == Some(&said) {
            return;
        }
        match &said {
            Ok((by, answer)) => tracing::info!(%migration, ?by, ?answer, "the witness has answered"),
            Err(cause) => tracing::warn!(%migration, cause, "the witness answers, and is not believed"),
        }
        if last.said.len() >= SAID_MAX {
            last.said.pop_first();
        }
        last.said.insert(migration, said);
    }

    fn last(&self) -> MutexGuard<'_, Last> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A destination without a witness is offered a guest that has one.
pub(crate) fn has_none(here: &str, peer: &str) -> Problem {
    let text = format!("{peer} has a witness for its migrations, and {here} has none");
    Problem::new(ProblemKind::Witness, text, "give both hosts the same [witness], or none")
}

/// Why a host's witness is no help, before anything has begun.
pub(crate) fn unusable(host: &str, why: &WitnessError) -> Problem {
    let text = format!("the witness of {host} cannot be used: {}", chain(why));
    let remedy =
        "make the same etcd reachable from both hosts, or take [witness] out of the configuration of both";
    Problem::new(ProblemKind::Witness, text, remedy)
}

fn key(migration: Uuid) -> String {
    format!("migration/{migration}")
}

fn agreed(told: Told) -> AgreedWitness {
    AgreedWitness { cluster: told.cluster, revision: told.revision }
}

fn is_the_same(told: &Told, theirs: &AgreedWitness) -> Result<(), WitnessError> {
    if told.cluster != theirs.cluster {
        return Err(WitnessError::Another { ours: bounded(&told.cluster), theirs: bounded(&theirs.cluster) });
    }
    if told.revision < theirs.revision {
        return Err(WitnessError::KnowsLess);
    }
    Ok(())
}

/// Only what the one says that was agreed on.
fn of(asked: Result<Told, EtcdError>, theirs: &AgreedWitness) -> Result<Told, WitnessError> {
    let told = asked.map_err(|e| match e {
        EtcdError::Another { cluster, .. } => {
            WitnessError::Another { ours: cluster, theirs: bounded(&theirs.cluster) }
        }
        e => e.into(),
    })?;
    is_the_same(&told, theirs)?;
    Ok(told)
}

/// The word that there is, and when it was changed last.
fn word(told: &Told) -> Result<Option<(Word, i64)>, WitnessError> {
    let Some(kept) = &told.kept else { return Ok(None) };
    let word = Word::named(&kept.value).ok_or_else(|| WitnessError::Odd(bounded(&kept.value)))?;
    Ok(Some((word, kept.mod_revision)))
}

/// A question that is asked now, of this cluster.
fn asking(cluster: Option<&str>) -> Asking<'_> {
    Asking { until: Instant::now() + WHOLE_DEADLINE, cluster }
}

/// The endpoints with their clusters, if these are several.
fn divided(seen: &[Seen]) -> Option<String> {
    let of = seen.iter().filter_map(|seen| Some((&seen.endpoint, seen.cluster.as_ref().ok()?)));
    let clusters: BTreeSet<_> = of.clone().map(|(_, cluster)| cluster).collect();
    let each = of.map(|(endpoint, cluster)| format!("{endpoint}: {cluster}"));
    (clusters.len() > 1).then(|| each.collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::witness::fake::{Fake, Reply, nothing, table};

    #[test]
    fn words_are_kept_as_text() {
        let all = [
            (Word::Open, "open"),
            (Word::Offered, "offered"),
            (Word::SealedBySource, "sealed-by-source"),
            (Word::SealedByDestination, "sealed-by-destination"),
            (Word::Yielded, "yielded"),
        ];
        for (one, kept) in all {
            assert_eq!((one.name(), Word::named(kept)), (kept, Some(one)));
        }
        assert_eq!(Word::named("of-tomorrow"), None);
    }

    #[test]
    fn another_witness_and_one_that_knows_less_are_not_believed() {
        let agreed = AgreedWitness { cluster: "7".into(), revision: 5 };
        let told = |cluster: &str, revision| Told {
            kept: None,
            is_changed: false,
            cluster: cluster.into(),
            revision,
        };
        assert!(of(Ok(told("7", 5)), &agreed).is_ok());
        assert!(of(Ok(told("7", 4)), &agreed).is_err());
        assert!(of(Ok(told("8", 9)), &agreed).is_err());
    }

    /// It is reached all the same, and other migrations may believe it.
    #[tokio::test]
    async fn a_witness_that_is_not_believed_is_up() {
        const ODD: &str =
            r#"{"header":{"cluster_id":"7","revision":"9"},"kvs":[{"mod_revision":"3","value":"b2Rk"}]}"#;
        for (says, words) in [
            (r#"{"header":{"cluster_id":"8","revision":"9"}}"#, "its cluster is 8, the source's is 7"),
            (r#"{"header":{"cluster_id":"7","revision":"4"}}"#, "it knows less"),
            (ODD, "\"odd\" is no word"),
        ] {
            let fake = Fake::start(move |_, _| Reply::Says(200, says.into())).await.unwrap();
            let witness = Witness::new(&table(&[&fake], 10).unwrap());
            let agreed = AgreedWitness { cluster: "7".into(), revision: 5 };
            let answer = witness.make(Uuid::nil(), &agreed, Move::Offer).await;
            assert_eq!(answer, Answer::Unknown);
            let figures = WitnessFigures { answered: 0, unanswered: 1, answers: Some(true) };
            assert_eq!(witness.figures(), figures, "{words}");
            assert!(witness.why_not(Uuid::nil()).unwrap().contains(words), "{words}");
        }
    }

    #[tokio::test]
    async fn a_probe_says_whether_the_witness_is_reached_and_which_etcd_is_asked() {
        let good = Fake::start(|_, _| nothing("7")).await.unwrap();
        let silent = Fake::start(|_, _| Reply::Silent).await.unwrap();
        let witness = Witness::new(&table(&[&good], 10).unwrap());
        assert_eq!(witness.figures().answers, None);
        witness.probe().await;
        assert_eq!(witness.figures().answers, Some(true));
        let deaf = Witness::new(&table(&[&silent], 1).unwrap());
        deaf.probe().await;
        assert_eq!(deaf.figures().answers, Some(false));
        assert!(deaf.why_not(Uuid::nil()).unwrap().contains("no answer within"));
        // One that is of another etcd is not asked for a word.
        let other = Fake::start(|_, _| nothing("8")).await.unwrap();
        let more = Fake::start(|_, _| nothing("7")).await.unwrap();
        let mixed = Witness::new(&table(&[&other, &good, &more], 10).unwrap());
        assert_eq!(mixed.look().await.unwrap().is.cluster, "8", "nobody has looked");
        mixed.probe().await;
        assert_eq!(mixed.look().await.unwrap().is.cluster, "7");
    }
}
