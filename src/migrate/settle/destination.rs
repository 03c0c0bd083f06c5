//! Settling at the destination. A guest whose start was begun is started, however long its QEMU
//! cannot be asked; of one whose start was not begun it is proved that it never runs here.

use std::sync::Arc;

use tokio::time::sleep;

use super::Open;
use crate::migrate::decide::{self, ASK_AGAIN};
use crate::migrate::destination::{self, image_stamp};
use crate::migrate::guest::life::{self, Look};
use crate::migrate::guest::process;
use crate::migrate::handover::{Destination, DestinationEffect, DestinationInput, Ended, Ran};
use crate::migrate::host::Host;
use crate::migrate::journal::{Journal, Past};
use crate::migrate::model::phase::Phase;
use crate::migrate::model::problem::chain;
use crate::migrate::model::progress::Outcome;
use crate::qemu::{Cont, Qmp, QmpError, QueryStatus, RunState};

/// How often a QEMU that cannot be asked is tried before it is left for `recover` to clean up.
const UNDO_TRIES: usize = 5;

pub(crate) async fn settle(host: Arc<Host>, open: Open) {
    let Open { mut journal, progress, heir, _reservation } = open;
    let past = journal.past().clone();
    let (machine, effects) = Destination::restarted(past.known());
    let going = Going { host: &host, heir };
    let Some((ended, mut leftovers)) = going.on(machine, &mut journal, effects).await else {
        tracing::warn!(vm = past.header.vm, "the agent stops before that is settled; the next one goes on");
        return;
    };
    host.answered(past.header.migration);
    if ended == Ended::Moved {
        // Else it was looked at when the guest was started.
        if heir && past.runs {
            leftovers.extend(unreachable(&host, &past).await);
        }
        return super::end(&host, journal, &progress, Phase::Done, Outcome::Moved { leftovers });
    }
    if heir {
        leftovers.extend(undo(&host, &mut journal, &past).await);
    }
    let cause = super::cause(heir, "the destination's agent was restarted during the migration");
    let outcome =
        Outcome::Failed { phase: past.reached, cause, problems: Vec::new(), cancelled: false, leftovers };
    super::end(&host, journal, &progress, Phase::Failed, outcome);
}

/// What is known of the QEMU of a guest that was started before.
async fn unreachable(host: &Host, past: &Past) -> Option<String> {
    let config = host.vm(&past.header.vm, "destination").ok()?;
    match life::look(past, config).await {
        Look::Answers(_) => None,
        Look::Lost(known) | Look::Silent(known) => Some(known.of_destination(&past.header.vm)),
    }
}

/// Undoes what was made in a QEMU, and notes how the images were left.
async fn undo(host: &Host, journal: &mut Journal, past: &Past) -> Vec<String> {
    let name = &past.header.vm;
    let Ok(config) = host.vm(name, "destination") else { return Vec::new() };
    for tried in 1.. {
        let known = match life::look(past, config).await {
            // What was made in a QEMU goes with it.
            Look::Lost(known) if known.has_ended() || past.undo.is_empty() => return Vec::new(),
            Look::Lost(_) if process::started_in_vain(past) => {
                return process::end_started(past).await.into_iter().collect();
            }
            Look::Answers(qmp) => {
                let disks = crate::qemu::disks(&qmp).await.unwrap_or_default();
                let images = image_stamp::images(disks.iter().map(|disk| (disk.name.as_str(), disk)));
                let leftovers = destination::undo(name, &qmp, past, None).await;
                image_stamp::bear(journal, &images, &leftovers);
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

struct Going<'a> {
    host: &'a Host,
    /// The virtual machine's QEMU is this migration's to touch.
    heir: bool,
}

impl Going<'_> {
    /// Follows the machine until it is decided; `None` when the agent stops before.
    async fn on(
        &self,
        mut machine: Destination,
        journal: &mut Journal,
        mut effects: Vec<DestinationEffect>,
    ) -> Option<(Ended, Vec<String>)> {
        let mut leftovers = Vec::new();
        loop {
            let (next, error) = decide::write_destination(&mut machine, journal, effects, None);
            effects = next;
            if effects == [DestinationEffect::Start] {
                let (ran, trouble) = self.run_at_last(journal.past()).await?;
                leftovers.extend(trouble);
                effects = decide::destination_step(&mut machine, DestinationInput::Ran(ran));
                effects.retain(|e| matches!(e, DestinationEffect::Write(_)));
                continue;
            }
            if let Some(ended) = machine.ended() {
                leftovers.extend(error.map(|e| chain(&e)));
                return Some((ended, leftovers));
            }
            self.wait().await?;
            effects = decide::destination_step(&mut machine, DestinationInput::Again);
        }
    }

    /// Starts a guest that an earlier life of this agent was about to start. Whether its command had
    /// done its work by then is not known, so that runs again.
    async fn run_at_last(&self, past: &Past) -> Option<(Ran, Vec<String>)> {
        let name = &past.header.vm;
        // A later migration has taken it from here, or brings it here anew.
        if !self.heir {
            return Some((Ran::Perhaps, Vec::new()));
        }
        let Ok(config) = self.host.vm(name, "destination") else {
            let left = format!(
                "VM {name}, which was handed over to this host, is not in its configuration: whether it runs \
                 here is not known"
            );
            return Some((Ran::Perhaps, vec![left]));
        };
        let mut hook = Hook::new(self.host, name);
        loop {
            let why = match life::look(past, config).await {
                Look::Lost(known) => return Some((Ran::No, vec![known.of_destination(name)])),
                Look::Answers(qmp) => match start(&qmp, past, &mut hook).await {
                    Ok(()) => return Some((Ran::Yes, hook.trouble)),
                    Err(e) if e.desc().is_some() => {
                        hook.trouble.push(format!("VM {name} could not be continued: {}", chain(&e)));
                        return Some((Ran::Perhaps, hook.trouble));
                    }
                    Err(e) => chain(&e),
                },
                Look::Silent(known) => known.in_words(),
            };
            self.host.open_question(
                past.header.migration,
                format!(
                    "VM {name} was handed over to this host, and its QEMU cannot be asked whether it runs: {why}. \
                     It is asked again every second, and the guest is continued if it stands still"
                ),
            );
            self.wait().await?;
        }
    }

    /// `None` when the agent stops.
    async fn wait(&self) -> Option<()> {
        tokio::select! {
            () = sleep(ASK_AGAIN) => Some(()),
            () = self.host.stopping.cancelled() => None,
        }
    }
}

/// The VM's `before_start`, run once.
struct Hook<'a> {
    host: &'a Host,
    vm: &'a str,
    has_run: bool,
    trouble: Vec<String>,
}

impl<'a> Hook<'a> {
    fn new(host: &'a Host, vm: &'a str) -> Self {
        Self { host, vm, has_run: false, trouble: Vec::new() }
    }

    async fn run(&mut self) {
        if std::mem::replace(&mut self.has_run, true) {
            return;
        }
        let words = self.host.config.vms.get(self.vm).map(|vm| vm.before_start.clone()).unwrap_or_default();
        let ran = process::run_hook(&words, self.vm, self.host.config.deadlines.hook()).await;
        self.trouble.extend(ran.err());
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
