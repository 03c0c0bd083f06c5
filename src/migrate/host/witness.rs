//! The witness of this host's migrations: an etcd that keeps one word for each of them
//! ([`crate::migrate::handover::Word`]), under its number. What is asked of it is asked within a deadline, and never
//! guessed; an answer of another etcd than the one that was agreed on, or of one that knows less, is none.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::timeout;
use uuid::Uuid;

use crate::config::WitnessConfig;
use crate::migrate::handover::{Answer, Move, Word};
use crate::migrate::model::problem::{Problem, ProblemKind, chain};
use crate::migrate::model::witness::{AgreedWitness, OfferedWitness};
use crate::printable::bounded;
use crate::witness::{Etcd, EtcdError, Told};

/// So often a word is changed by somebody else before it is our turn.
const TRIES: usize = 8;
/// Whatever is asked about one migration is answered within this time, over all endpoints, or not at all.
pub(crate) const WHOLE_DEADLINE: Duration = Duration::from_secs(10);
/// So much is asked at once for which nobody waits.
const BACKGROUND_MAX: usize = 64;

/// How often it was asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WitnessFigures {
    pub answered: u64,
    pub unanswered: u64,
    /// Whether it answered when it was asked last; none before.
    pub answers: Option<bool>,
}

/// Why it cannot be agreed on.
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
}

/// An etcd, for this host's migrations.
#[derive(Debug)]
pub(crate) struct Witness {
    etcd: Etcd,
    figures: [AtomicU64; 2],
    /// Why it did not answer last, if it did not; none before it is asked.
    last: Mutex<Option<Result<(), String>>>,
    /// Places for what nobody waits for.
    pub(crate) background: Arc<Semaphore>,
}

impl Witness {
    pub(crate) fn new(config: &WitnessConfig) -> Self {
        Self {
            etcd: Etcd::new(config),
            figures: Default::default(),
            last: Mutex::default(),
            background: Arc::new(Semaphore::new(BACKGROUND_MAX)),
        }
    }

    /// The name of a migration's word.
    fn name(&self, migration: Uuid) -> String {
        self.etcd.name(&key(migration))
    }

    pub(crate) fn figures(&self) -> WitnessFigures {
        let [answered, unanswered] = &self.figures;
        let answers = self.last().as_ref().map(Result::is_ok);
        WitnessFigures { answered: answered.load(Relaxed), unanswered: unanswered.load(Relaxed), answers }
    }

    /// Why it did not answer when it was asked last.
    pub(crate) fn why_not(&self) -> Option<String> {
        self.last().as_ref().and_then(|last| last.clone().err())
    }

    /// Which one it is. Changes nothing.
    /// Errors: [`WitnessError`].
    pub(crate) async fn look(&self) -> Result<OfferedWitness, WitnessError> {
        let told = self.asked(self.etcd.get("")).await?;
        Ok(OfferedWitness { is: agreed(told), key: self.name(Uuid::nil()) })
    }

    /// Begins a word for a migration of this host.
    /// Errors: [`WitnessError`]; there may be a word all the same.
    pub(crate) async fn begin(&self, migration: Uuid) -> Result<OfferedWitness, WitnessError> {
        let told = self.asked(self.etcd.change(&key(migration), 0, Word::Open.name())).await?;
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
        let told = self.asked(self.etcd.get(&key(migration))).await?;
        is_the_same(&told, &theirs.is)?;
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
        is_the_same(&self.asked(self.etcd.get("")).await?, &theirs.is)
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
        let answer = match timeout(WHOLE_DEADLINE, self.moved(migration, agreed, by)).await {
            Ok(answer) => answer,
            Err(_) => self.too_late(),
        };
        match answer {
            Answer::Unknown => tracing::debug!(%migration, ?by, "the witness has not answered"),
            answer => tracing::info!(%migration, ?by, ?answer, "the witness has answered"),
        }
        answer
    }

    async fn moved(&self, migration: Uuid, agreed: &AgreedWitness, by: Move) -> Answer {
        let name = key(migration);
        let mut asked = self.etcd.get(&name).await;
        for _ in 0..TRIES {
            let Ok(told) = self.note(believed(asked, agreed)) else { return Answer::Unknown };
            if told.is_changed {
                return Answer::Done;
            }
            let Some(kept) = told.kept else { return Answer::Forgotten };
            let Some(word) = Word::named(&kept.value) else {
                let odd = EtcdError::NoAnswer(format!("\"{}\" is no word", bounded(&kept.value)));
                let _ = self.note(Err::<(), _>(odd));
                return Answer::Unknown;
            };
            match by.of(word) {
                Err(answer) => return answer,
                Ok(next) => asked = self.etcd.change(&name, kept.mod_revision, next.name()).await,
            }
        }
        Answer::Unknown
    }

    fn too_late(&self) -> Answer {
        let _ = self
            .note(Err::<(), _>(EtcdError::NoAnswer(format!("none within {} s", WHOLE_DEADLINE.as_secs()))));
        Answer::Unknown
    }

    /// Nobody asks for the word of this migration any more. One that is left there does no harm.
    pub(crate) async fn forget(&self, migration: Uuid) {
        let name = key(migration);
        let Ok(Told { kept: Some(kept), .. }) = self.asked(self.etcd.get(&name)).await else { return };
        let _ = self.asked(self.etcd.remove(&name, kept.mod_revision)).await;
    }

    async fn asked(&self, asking: impl Future<Output = Result<Told, EtcdError>>) -> Result<Told, EtcdError> {
        let answer = timeout(WHOLE_DEADLINE, asking).await;
        self.note(answer.unwrap_or_else(|_| {
            Err(EtcdError::NoAnswer(format!("none within {} s", WHOLE_DEADLINE.as_secs())))
        }))
    }

    /// Counts, and says what has changed.
    fn note<T>(&self, asked: Result<T, EtcdError>) -> Result<T, EtcdError> {
        let [answered, unanswered] = &self.figures;
        let now = asked.as_ref().map(drop).map_err(|e| chain(e));
        let count = if now.is_ok() { answered } else { unanswered };
        count.fetch_add(1, Relaxed);
        let mut last = self.last();
        if last.as_ref() != Some(&now) {
            match (&now, &*last) {
                (Err(cause), _) => tracing::warn!(cause, "the witness does not answer"),
                (Ok(()), Some(Err(_))) => tracing::info!("the witness answers again"),
                (Ok(()), _) => {}
            }
            *last = Some(now);
        }
        drop(last);
        asked
    }

    fn last(&self) -> MutexGuard<'_, Option<Result<(), String>>> {
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
fn believed(asked: Result<Told, EtcdError>, agreed: &AgreedWitness) -> Result<Told, EtcdError> {
    let told = asked?;
    is_the_same(&told, agreed).map_err(|e| EtcdError::NoAnswer(chain(&e)))?;
    Ok(told)
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert!(believed(Ok(told("7", 5)), &agreed).is_ok());
        assert!(believed(Ok(told("7", 4)), &agreed).is_err());
        assert!(believed(Ok(told("8", 9)), &agreed).is_err());
    }
}
