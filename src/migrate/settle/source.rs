//! Settling at the source. The destination is asked until it is decided whose the guest is; then the guest
//! is taken back, or the old QEMU ended, however long that cannot be asked.

use std::sync::Arc;

use tokio::time::sleep;

use super::open::{self, Open};
use crate::migrate::decide::{self, ANSWER_DEADLINE, ASK_AGAIN, Decided, Leaving, Question};
use crate::migrate::guest::life::{self, Look};
use crate::migrate::guest::process;
use crate::migrate::guest::undo::{self, RolledBack};
use crate::migrate::handover::{Answer, Ask, Ended, Illegal, Mark, Source, SourceInput, Written};
use crate::migrate::handover_run::{SourceRun, SourceWorld};
use crate::migrate::host::Host;
use crate::migrate::journal::{Journal, Past};
use crate::migrate::model::leftover::Leftover;
use crate::migrate::model::phase::Phase;
use crate::migrate::model::problem::chain;
use crate::migrate::model::progress::{Outcome, ProgressSink};
use crate::migrate::protocol::message::Request;
use crate::migrate::source;
use crate::qemu::{QueryStatus, RunState};

pub(super) async fn settle(host: Arc<Host>, open: Open) {
    // The guest must not be moved again while this is open.
    let Open { journal, progress, heir, _reservation } = open;
    let past = journal.past().clone();
    let peer = host.peers.name_of(&past.header.peer).unwrap_or(&past.header.peer).to_owned();
    let (mut machine, effects) = Source::restarted(past.known());
    if past.witness.is_some() {
        machine = machine.with_witness();
    }
    let mut handover = SourceRun::restarted((machine, effects));
    let mut settling = Settling {
        host: &host,
        peer: &peer,
        heir,
        progress: &progress,
        journal,
        question: None,
        found: Decided::default(),
        taken_back: None,
        leftovers: Vec::new(),
    };
    settling.open_question();
    // Else the agent stops: its journal stays open, for the next one.
    if handover.run(&mut settling).await.is_ok() {
        settling.end(handover.machine());
    }
}

/// A source that is settled by its journal.
struct Settling<'a> {
    host: &'a Arc<Host>,
    peer: &'a str,
    heir: bool,
    progress: &'a ProgressSink,
    journal: Journal,
    /// Until it is decided whose the guest is.
    question: Option<Question>,
    found: Decided,
    /// What could be taken back has been; whether the guest's QEMU was gone.
    taken_back: Option<bool>,
    leftovers: Vec<Leftover>,
}

impl SourceWorld for Settling<'_> {
    type Stop = Leaving;

    async fn wait(&mut self, machine: Source) -> Result<Option<SourceInput>, Leaving> {
        match &mut self.question {
            Some(question) if machine.ended().is_none() => question.wait(&mut self.journal, machine).await,
            _ => Ok(None),
        }
    }

    async fn write(&mut self, mark: Mark) -> Result<Written, Leaving> {
        Ok(match &mut self.question {
            Some(question) => question.write(&mut self.journal, mark),
            None => decide::write(&mut self.journal, mark, None).0,
        })
    }

    async fn ask(&mut self, ask: Ask, machine: Source) -> Result<Option<SourceInput>, Leaving> {
        if machine.ended().is_none() {
            self.open_question();
        }
        match (ask, machine.ended(), &mut self.question) {
            (Ask::Confirmed, Some(Ended::Stayed), _) => {
                decide::confirm_remote(self.host, self.peer, self.journal.past().header.migration).await;
            }
            (Ask::Confirmed, ..) => {
                self.decided();
                if let Some(link) = &mut self.found.link {
                    let _ = link.demand(Request::Confirmed, ANSWER_DEADLINE).await;
                    link.finish();
                }
            }
            (ask, _, Some(question)) => return question.ask(ask, machine).await,
            (_, _, None) => {}
        }
        Ok(None)
    }

    async fn resume(&mut self, abort: bool) -> Result<Option<SourceInput>, Leaving> {
        self.decided();
        let is_gone = self.take_back().await?;
        let past = self.journal.past();
        if !abort || past.reached < Phase::Precopy {
            return Ok(None);
        }
        let told = decide::abort_remote(self.host, self.peer, past.header.migration, &self.cause()).await;
        let heard = told.unwrap_or_else(|e| {
            tracing::info!(error = chain(&e), "the destination undoes its part by itself");
            None
        });
        self.leftovers.extend(decide::runs_twice(&past.header.vm, self.peer, is_gone, heard));
        Ok(decide::after_resume(is_gone, past.reached, heard))
    }

    async fn offer(&mut self, ask: Option<Ask>, machine: Source) -> Result<Option<SourceInput>, Leaving> {
        self.open_question();
        let past = self.journal.past().clone();
        match &mut self.question {
            Some(question) => question.offer(&past, ask, machine).await,
            None => Ok(None),
        }
    }

    async fn take_back_at_witness(&mut self) -> Result<Answer, Leaving> {
        self.open_question();
        let past = self.journal.past().clone();
        let not_there = match self.host.vm(&past.header.vm, "source") {
            Ok(_) if !self.heir => Some("a later migration of the VM has it".into()),
            Ok(config) => match life::look(&past, &config).await {
                Look::Answers(_) => None,
                Look::Lost(known) | Look::Silent(known) => Some(known.in_words()),
            },
            Err(problem) => Some(problem.to_string()),
        };
        match &mut self.question {
            Some(question) => Ok(question.take_back(&past, not_there).await),
            None => Ok(Answer::Unknown),
        }
    }

    async fn release(&mut self) -> Result<(), Leaving> {
        self.decided();
        // What taking back has left was said of a guest that is not here.
        self.leftovers.clear();
        let past = self.journal.past();
        if self.taken_back == Some(true) {
            return Ok(());
        }
        if self.found.forced.is_some() || past.forced.is_some() {
            self.leftovers.push(source::kept_by_force(&past.header.vm).into());
        } else if self.heir {
            let left = release(self.host, past).await;
            self.leftovers.extend(left.into_iter().map(Leftover::from));
        }
        Ok(())
    }

    fn answer_operator(&mut self, machine: Source) {
        if let Some(question) = &mut self.question {
            question.answer_operator(&self.journal, machine);
        }
    }

    fn illegal(&mut self, error: Illegal) {
        decide::report(&error);
    }
}

impl Settling<'_> {
    fn open_question(&mut self) {
        let (host, peer, migration) = (self.host, self.peer, self.journal.past().header.migration);
        self.question.get_or_insert_with(|| {
            let why = "the agent was restarted after the hand-over".into();
            Question::new(host, peer, migration, self.progress.clone(), why).with_witness(self.journal.past())
        });
    }

    /// Nothing is asked any more.
    fn decided(&mut self) {
        if let Some(question) = self.question.take() {
            self.found = question.close();
        }
    }

    fn cause(&self) -> String {
        open::cause(
            self.heir,
            match self.leftovers.is_empty() {
                true => "the source's agent was restarted during the migration; it was rolled back",
                false => {
                    "the source's agent was restarted during the migration; rolling it back has left something"
                }
            },
        )
    }

    /// However long the QEMU cannot be asked, and once. Whether that QEMU is gone.
    async fn take_back(&mut self) -> Result<bool, Leaving> {
        if let (false, done) | (true, done @ Some(_)) = (self.heir, self.taken_back) {
            return Ok(done.unwrap_or(false));
        }
        let past = self.journal.past();
        let (id, name) = (past.header.migration, &past.header.vm);
        loop {
            let why = match take_back(self.host, past).await {
                Ok(undone) => {
                    self.host.decisions.answered(id);
                    self.progress.update(|p| p.notes.extend(undone.standing));
                    self.leftovers.extend(undone.leftovers);
                    self.taken_back = Some(undone.gone);
                    return Ok(undone.gone);
                }
                Err(why) => why,
            };
            let words = format!(
                "VM {name} is this host's, and its guest cannot be taken back yet: {why}. That is tried again every \
                 second"
            );
            self.host.decisions.open_question(id, words);
            tokio::select! {
                () = sleep(ASK_AGAIN) => {}
                () = self.host.stopping.cancelled() => {
                    tracing::warn!(
                        vm = name,
                        "the agent stops before the guest is taken back; the next one goes on"
                    );
                    return Err(Leaving);
                }
            }
        }
    }

    fn end(mut self, machine: Source) {
        self.decided();
        let phase = self.journal.past().reached;
        let cause = self.cause();
        let Self { host, peer, progress, journal, mut leftovers, found, .. } = self;
        match machine.ended() {
            Some(Ended::Moved) => {
                leftovers.extend(source::stands_there(peer, found.started.as_ref(), None));
                open::end(host, journal, progress, Phase::Done, Outcome::Moved { leftovers })
            }
            _ => {
                let problems = Vec::new();
                let outcome = Outcome::Failed { phase, cause, problems, cancelled: false, leftovers };
                open::end(host, journal, progress, Phase::Failed, outcome);
            }
        }
    }
}

/// Ends the old QEMU, or leaves it as was asked for. One that somebody has started since is left alone.
async fn release(host: &Host, past: &Past) -> Vec<String> {
    let name = &past.header.vm;
    let Some(config) = host.config.vm(name) else {
        return vec![format!(
            "VM {name}, which was handed over, is not in this host's configuration: if its old QEMU lives, end \
             it, and never continue it"
        )];
    };
    let qmp = match life::reach(past, &config).await {
        Ok((qmp, _events)) => qmp,
        Err((known, _)) => return known.of_the_old(name).into_iter().collect(),
    };
    match qmp.execute(QueryStatus).await {
        Err(_) => life::Known::of(qmp.process(), qmp.path()).await.of_the_old(name).into_iter().collect(),
        Ok(info) if info.status != RunState::PostMigrate => Vec::new(),
        Ok(_) if past.header.keep_source => undo::clean_kept(&qmp, past).await,
        Ok(_) => process::end_the_old(name, &qmp).await.into_iter().collect(),
    }
}

/// Undoes what was made in the source's QEMU, and lets the guest run; why that QEMU cannot be asked.
async fn take_back(host: &Host, past: &Past) -> Result<RolledBack, String> {
    let name = &past.header.vm;
    let config = match host.vm(name, "source") {
        Err(problem) => {
            let words = format!(
                "VM {name} is this host's, and what the migration made in its QEMU is not undone; a guest that was \
                 paused for the migration stays paused: {problem}. `vmferry recover` undoes it then"
            );
            return Ok(RolledBack::not(Leftover::Guest(words)));
        }
        Ok(config) => config,
    };
    match life::look(past, &config).await {
        Look::Answers(qmp) => Ok(undo::roll_back(&qmp, past, undo::Bitmaps::Go).await),
        Look::Lost(known) => {
            Ok(RolledBack { gone: known.has_ended(), ..RolledBack::not(known.of_source(name)) })
        }
        Look::Silent(known) => Err(known.in_words()),
    }
}
