//! A destination that is settled by its journal, with nobody at work. A guest whose start was begun is
//! started, however long its QEMU cannot be asked; if that is gone, the source is asked whether an operator has
//! decided otherwise there. Of a guest whose start was not begun it is proved that it never runs here.

use std::sync::Arc;

use tokio::time::sleep;

use super::{created_images, end, image_stamp};
use crate::migrate::decide::{self, ASK_AGAIN, Afterwards};
use crate::migrate::guest::before_start::{self, Turn};
use crate::migrate::guest::life::{self, Look};
use crate::migrate::guest::process;
use crate::migrate::handover::{
    Answer, Destination, DestinationInput, DestinationState, Fate, Illegal, Mark, Move, Ran, Side, Written,
};
use crate::migrate::handover_run::{DestinationRun, DestinationWorld};
use crate::migrate::host::Host;
use crate::migrate::host::decisions::{Claimed, Decision, Order, Orders};
use crate::migrate::host::witness::WHOLE_DEADLINE;
use crate::migrate::journal::{Journal, JournalError, Past};
use crate::migrate::model::leftover::Leftover;
use crate::migrate::model::problem::chain;
use crate::qemu::{Cont, Qmp, QmpError, QueryStatus, RunState};

/// How often a QEMU that cannot be asked is tried before it is left for `recover` to clean up.
const UNDO_TRIES: usize = 5;

/// Proves of a migration that has made nothing that its guest never runs here; what keeps that from the
/// disk.
pub(crate) async fn never_begun(host: &Arc<Host>, journal: &mut Journal) -> Vec<Leftover> {
    let mut handover = DestinationRun::new(Destination::new());
    let mut settling = Settling::new(host, false, journal);
    let given = handover.give(DestinationInput::Trouble);
    given.unwrap_or_else(|e| settling.illegal(e));
    let _ = handover.run(&mut settling).await;
    settling.leftovers()
}

/// Undoes what was made in a QEMU, and notes how the images were left.
async fn undo(host: &Host, journal: &mut Journal, past: &Past) -> Vec<String> {
    let name = &past.header.vm;
    if !past.came_to_a_qemu() {
        return Vec::new();
    }
    let config = match host.vm(name, "destination") {
        Ok(config) => config,
        Err(_) if past.undo.is_empty() => return Vec::new(),
        Err(problem) => {
            return vec![format!(
                "what the migration made in the destination's QEMU of VM {name} is not undone: {problem}. `vmferry \
                 recover` undoes it then"
            )];
        }
    };
    for tried in 1.. {
        let known = match life::look(past, &config).await {
            // What was made in a QEMU goes with it.
            Look::Lost(known) if known.has_ended() || past.undo.is_empty() => return Vec::new(),
            Look::Lost(_) if process::started_in_vain(past) => {
                return process::end_started(past).await.into_iter().collect();
            }
            Look::Answers(qmp) => {
                let disks = crate::qemu::disks(&qmp).await.unwrap_or_default();
                let images = image_stamp::images(disks.iter().map(|disk| (disk.name.as_str(), disk)));
                let leftovers = end::undo(name, &qmp, past, None, end::Moment::AtOnce).await;
                image_stamp::record(host, journal, &images, &leftovers);
                return leftovers;
            }
            Look::Lost(known) | Look::Silent(known) => known,
        };
        if tried >= UNDO_TRIES || host.stopping.is_cancelled() {
            return vec![format!(
                "the destination's QEMU of VM {name}: {}. What the migration made is undone when `vmferry \
                 recover` reaches it",
                known.in_words()
            )];
        }
        sleep(ASK_AGAIN).await;
    }
    Vec::new()
}

/// The agent stops.
pub(crate) struct Stops;

/// A destination that is settled by its journal. Nobody listens: whoever asks is answered by that.
pub(crate) struct Settling<'a> {
    host: &'a Arc<Host>,
    /// The virtual machine's QEMU is this migration's to touch.
    heir: bool,
    journal: &'a mut Journal,
    leftovers: Vec<Leftover>,
    /// Why the last record was not written.
    unwritten: Option<JournalError>,
    /// Once the source is told that the guest is here.
    orders: Option<Orders>,
    /// The operator whose decision is being written.
    order: Option<Claimed>,
    /// Came while the witness was asked.
    waiting: Option<Order>,
    /// What the witness has said last.
    answered: Option<Answer>,
}

impl DestinationWorld for Settling<'_> {
    type Stop = Stops;

    async fn wait(&mut self, machine: Destination) -> Result<Option<DestinationInput>, Stops> {
        if machine.ended().is_some() {
            return Ok(None);
        }
        match machine.state() {
            DestinationState::Claiming => return self.until_agreed().await,
            DestinationState::Sealing { .. } => return self.until_sealed().await,
            _ => {}
        }
        self.pause().await?;
        Ok(Some(DestinationInput::Again))
    }

    async fn write(&mut self, mark: Mark) -> Result<Written, Stops> {
        let uid = self.order.as_ref().and_then(|order| order.uid);
        let (written, error) = decide::write(self.journal, mark, uid);
        self.unwritten = error;
        Ok(written)
    }

    /// What a source hears that asks before the journal has ended.
    async fn say(&mut self, fate: Fate) -> Result<(), Stops> {
        if fate == Fate::Runs {
            let (decisions, migration) = (&self.host.decisions, self.journal.past().header.migration);
            self.orders.get_or_insert_with(|| decisions.take_orders(migration)).answer_runs();
        }
        Ok(())
    }

    async fn start(&mut self) -> Result<Ran, Stops> {
        let past = self.journal.past().clone();
        let (ran, trouble) = self.run_at_last(&past).await?;
        self.leftovers.extend(trouble);
        Ok(ran)
    }

    async fn undo(&mut self) -> Result<(), Stops> {
        // What was said of a guest that is not here after all.
        self.leftovers.clear();
        if self.heir {
            self.host.decisions.answered(self.journal.past().header.migration);
            let past = self.journal.past().clone();
            let mut left = undo(self.host, self.journal, &past).await;
            left.extend(match left.is_empty() {
                true => created_images::remove_late(self.host, &past, false).await,
                // A QEMU that may be there has them open.
                false => created_images::kept(&self.host.config, &past),
            });
            self.leftovers.extend(left.into_iter().map(Leftover::from));
        }
        Ok(())
    }

    async fn seal(&mut self, by: Move) -> Result<Answer, Stops> {
        let Self { host, journal, orders, order, waiting, answered, .. } = self;
        let past = journal.past();
        let orders = orders.get_or_insert_with(|| host.decisions.take_orders(past.header.migration));
        let within = if order.is_some() { decide::ORDERED_WITHIN } else { WHOLE_DEADLINE };
        // Whatever cuts it short, it may be done all the same.
        tokio::select! {
            biased;
            answer = decide::at_witness(host, past, by) => {
                *answered = Some(answer);
                Ok(answer)
            }
            Some(came) = orders.recv(), if order.is_none() => {
                *waiting = Some(came);
                Ok(Answer::Unknown)
            }
            () = sleep(within) => Ok(Answer::Unknown),
            () = host.stopping.cancelled() => Err(Stops),
        }
    }

    async fn give_up_at_witness(&mut self) -> Result<(), Stops> {
        decide::afterwards(self.host, self.journal.past(), Afterwards::Yield);
        Ok(())
    }

    fn answer_operator(&mut self, machine: Destination) {
        let Some(order) = self.order.take() else { return };
        let side = order.side;
        if side == Side::Here && matches!(machine.state(), DestinationState::Starting { .. }) {
            // So that the source does not take it back, nor, of a decision that was wrong, lets it run.
            decide::afterwards(self.host, self.journal.past(), Afterwards::Take);
        }
        let wanted = if side == Side::Here { DestinationState::Runs } else { DestinationState::NeverRan };
        order.answer(match machine.state() {
            DestinationState::GivingUp { .. } => decide::is_being_given_up(),
            DestinationState::NeverRan if side == Side::Here => Decision::Refused(format!(
                "the witness gives the guest to {}: it has been given up here",
                self.journal.past().header.peer
            )),
            // It was being taken at the witness, which has not said that the source has it.
            DestinationState::Starting { .. } if side == Side::Here => {
                decide::decision(true, self.journal, self.unwritten.as_ref())
            }
            state => decide::decision(state == wanted, self.journal, self.unwritten.as_ref()),
        });
    }

    fn illegal(&mut self, error: Illegal) {
        decide::report(&error);
    }
}

impl<'a> Settling<'a> {
    pub(crate) fn new(host: &'a Arc<Host>, heir: bool, journal: &'a mut Journal) -> Self {
        Self {
            host,
            heir,
            journal,
            leftovers: Vec::new(),
            unwritten: None,
            orders: None,
            order: None,
            waiting: None,
            answered: None,
        }
    }

    pub(crate) fn leftovers(self) -> Vec<Leftover> {
        self.unwritten.iter().map(|e| chain(e).into()).chain(self.leftovers).collect()
    }

    /// Starts a guest that an earlier life of this agent was about to start. Whether its command had
    /// done its work by then is not known, so that runs again.
    async fn run_at_last(&self, past: &Past) -> Result<(Ran, Vec<Leftover>), Stops> {
        let name = &past.header.vm;
        // A later migration has taken it from here, or brings it here anew.
        if !self.heir {
            return Ok((Ran::Perhaps, Vec::new()));
        }
        let Ok(config) = self.host.vm(name, "destination") else {
            let left = format!(
                "VM {name}, which was handed over to this host, is not in its configuration: whether it runs \
                 here is not known"
            );
            return Ok((Ran::Perhaps, vec![Leftover::Guest(left)]));
        };
        let mut hook = Hook::new(self.host, name);
        loop {
            let why = match life::look(past, &config).await {
                Look::Lost(known) => return Ok((Ran::No, vec![known.of_destination(name)])),
                Look::Answers(qmp) => match start(&qmp, past, &mut hook).await {
                    Ok(()) => {
                        self.host.replicas.guest_is_here(name);
                        return Ok((Ran::Yes, hook.trouble));
                    }
                    Err(e) if e.desc().is_some() => {
                        let words = format!("VM {name} could not be continued: {}", chain(&e));
                        hook.trouble.push(Leftover::Guest(words));
                        return Ok((Ran::Perhaps, hook.trouble));
                    }
                    Err(e) => chain(&e),
                },
                Look::Silent(known) => known.in_words(),
            };
            self.host.decisions.open_question(
                past.header.migration,
                format!(
                    "VM {name} was handed over to this host, and its QEMU cannot be asked whether it runs: {why}. \
                     It is asked again every second, and the guest is continued if it stands still"
                ),
            );
            self.pause().await?;
        }
    }

    /// The guest may have run here, and does no more. Asks the source how the migration has ended there, which is
    /// for good; or an operator decides.
    async fn until_agreed(&mut self) -> Result<Option<DestinationInput>, Stops> {
        let Self { host, journal, orders, .. } = self;
        let past = journal.past();
        let (id, name, peer) = (past.header.migration, &past.header.vm, &past.header.peer);
        let orders = orders.get_or_insert_with(|| host.decisions.take_orders(id));
        let words = format!(
            "VM {name} was handed over to this host, where its QEMU has ended; whether it ran by then is not known. \
             {peer} is asked every second whether the VM is still this host's; start it nowhere until then"
        );
        host.decisions.open_question(id, words);
        let asked = async {
            let told = decide::ask_peer(host, past).await;
            match told.ok().flatten().and_then(|told| told.known.ended) {
                Some(ended) => DestinationInput::Told(ended),
                None => {
                    sleep(ASK_AGAIN).await;
                    DestinationInput::Again
                }
            }
        };
        tokio::select! {
            input = asked => Ok(Some(input)),
            Some(order) = orders.recv() => {
                self.order = order.claim();
                Ok(Some(self.order.as_ref().map_or(DestinationInput::Again, |o| DestinationInput::Forced(o.side))))
            }
            () = host.stopping.cancelled() => Err(Stops),
        }
    }

    /// The guest was about to be started, and whether it is the source's by now only the witness knows; or an
    /// operator decides.
    async fn until_sealed(&mut self) -> Result<Option<DestinationInput>, Stops> {
        let Self { host, journal, orders, .. } = self;
        let past = journal.past();
        let (id, name) = (past.header.migration, &past.header.vm);
        let orders = orders.get_or_insert_with(|| host.decisions.take_orders(id));
        let why = match self.answered {
            Some(Answer::Forgotten) => "it knows nothing of this migration".into(),
            _ => decide::witness_trouble(host, past).unwrap_or_else(|| "it does not answer".into()),
        };
        let words = format!(
            "VM {name} was handed over to this host, and whether it may run here the witness has not said: {why}. It \
             is asked every second; start the VM nowhere until then"
        );
        host.decisions.open_question(id, words);
        let order = match self.waiting.take() {
            Some(order) => order,
            None => tokio::select! {
                () = sleep(ASK_AGAIN) => return Ok(Some(DestinationInput::Again)),
                Some(order) = orders.recv() => order,
                () = host.stopping.cancelled() => return Err(Stops),
            },
        };
        self.order = order.claim();
        Ok(Some(self.order.as_ref().map_or(DestinationInput::Again, |o| DestinationInput::Forced(o.side))))
    }

    async fn pause(&self) -> Result<(), Stops> {
        tokio::select! {
            () = sleep(ASK_AGAIN) => Ok(()),
            () = self.host.stopping.cancelled() => Err(Stops),
        }
    }
}

/// The VM's `before_start`, run once by this agent.
struct Hook<'a> {
    host: &'a Host,
    vm: &'a str,
    has_run: bool,
    trouble: Vec<Leftover>,
}

impl<'a> Hook<'a> {
    fn new(host: &'a Host, vm: &'a str) -> Self {
        Self { host, vm, has_run: false, trouble: Vec::new() }
    }

    async fn run(&mut self) {
        if std::mem::replace(&mut self.has_run, true) {
            return;
        }
        let ran = before_start::run(&self.host.config, self.vm, Turn::Again).await;
        self.trouble.extend(ran.err().map(Leftover::from));
    }
}

/// Continues the guest, unless it runs already or is to stay paused.
async fn start(qmp: &Qmp, past: &Past, hook: &mut Hook<'_>) -> Result<(), QmpError> {
    let status = qmp.execute(QueryStatus).await?.status;
    if status != RunState::Paused || !past.running() {
        return Ok(());
    }
    hook.run().await;
    qmp.execute(Cont).await?;
    Ok(())
}
