//! What is known of a VM's QEMU that cannot be asked, and what an operator is told of it.
//!
//! A monitor that is lost, silent or held by somebody else is a lost view. Only a process that is
//! gone, by the kernel's word, with nobody at its monitor, is a QEMU that has ended: no other case
//! may be told in words that invite to start the VM somewhere.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::{Instant, sleep};

use super::process;
use crate::config::VmConfig;
use crate::migrate::journal::Past;
use crate::migrate::model::leftover::Leftover;
use crate::qemu::{Events, Life, Process, Qmp, QmpError};

/// How long an agent that has just started waits for the monitor of a QEMU that lives.
const REACH_PATIENCE: Duration = Duration::from_secs(300);
/// The same where it is not known whether it lives.
const UNKNOWN_PATIENCE: Duration = Duration::from_secs(30);
const REACH_EVERY: Duration = Duration::from_secs(1);

/// What is known without a monitor.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    life: Life,
    pid: Option<i32>,
    monitor: PathBuf,
    /// Somebody listens at the monitor, whoever it is.
    listens: bool,
}

impl Known {
    /// Of a QEMU that was seen by this process.
    pub(crate) async fn of(process: &Process, monitor: &Path) -> Self {
        let (life, pid) = (process.life(), process.pid());
        Self { life, pid, monitor: monitor.to_owned(), listens: somebody_listens(monitor).await }
    }

    /// Of the QEMU that a journal tells of.
    pub(crate) async fn by_journal(past: &Past, config: &VmConfig) -> Self {
        let pid = past.qemu.as_ref().map(|id| id.pid);
        let life = past.qemu.as_ref().map_or(Life::Unknown, |id| match Process::find(id) {
            Ok(process) => process.life(),
            Err(life) => life,
        });
        let listens = somebody_listens(&config.qmp).await;
        Self { life, pid, monitor: config.qmp.clone(), listens }
    }

    /// Proved: it has ended, and no other has taken its place.
    pub(crate) fn is_gone(&self) -> bool {
        self.life == Life::Ended && !self.listens
    }

    /// Proved: it has ended, whatever may have come after it.
    pub(crate) fn has_ended(&self) -> bool {
        self.life == Life::Ended
    }

    fn process(&self) -> String {
        self.pid.map_or_else(String::new, |pid| format!(" (process {pid})"))
    }

    /// Of a source's QEMU, whose guest is the source's.
    pub(crate) fn of_source(&self, vm: &str) -> Leftover {
        let (process, monitor) = (self.process(), self.monitor.display());
        Leftover::Guest(match self.life {
            Life::Ended if !self.listens => format!(
                "VM {vm} runs nowhere: its QEMU at the source has ended{process}; start it there again"
            ),
            Life::Ended => format!(
                "the QEMU of VM {vm} at the source has ended{process}, but something listens at its monitor \
                 {monitor}: look whether another QEMU runs the VM before you start it anywhere"
            ),
            Life::Alive => format!(
                "the QEMU of VM {vm} lives at the source{process} and cannot be asked: its monitor {monitor} \
                 does not answer. What the migration made in it is undone, and its guest goes on if it was \
                 paused for the migration, when `vmferry recover` reaches it. Start the VM nowhere else"
            ),
            Life::Unknown => format!(
                "whether the QEMU of VM {vm} still runs at the source is not known: its monitor {monitor} does \
                 not answer. Look (`ps`, `ss -xlp`) before you start the VM anywhere"
            ),
        })
    }

    /// Of a destination's QEMU, whose guest is the destination's.
    pub(crate) fn of_destination(&self, vm: &str) -> Leftover {
        let (process, monitor) = (self.process(), self.monitor.display());
        Leftover::Guest(match self.life {
            Life::Ended if !self.listens => format!(
                "the QEMU of VM {vm}, which was handed over to this host, has ended{process}: start the VM here"
            ),
            Life::Ended => format!(
                "the QEMU of VM {vm}, which was handed over to this host, has ended{process}, but something \
                 listens at its monitor {monitor}: look whether another QEMU runs the VM before you start it here"
            ),
            Life::Alive => format!(
                "the QEMU of VM {vm}, which was handed over to this host, lives{process} and cannot be asked: \
                 its monitor {monitor} does not answer. Look whether the guest runs; start no second QEMU"
            ),
            Life::Unknown => format!(
                "whether the QEMU of VM {vm}, which was handed over to this host, still runs is not known: its \
                 monitor {monitor} does not answer. Look (`ps`, `ss -xlp`) before you start the VM here"
            ),
        })
    }

    /// Of the QEMU that a guest has left; `None` if nothing of it is left.
    pub(crate) fn of_the_old(&self, vm: &str) -> Option<String> {
        let (process, monitor) = (self.process(), self.monitor.display());
        match self.life {
            // Whatever listens there now is another one.
            Life::Ended => None,
            Life::Alive => Some(format!(
                "the old QEMU of VM {vm} lives at the source{process}, paused, and cannot be asked: its monitor \
                 {monitor} does not answer. Never continue it; `vmferry recover` ends it when it answers"
            )),
            Life::Unknown => Some(format!(
                "whether the old QEMU of VM {vm} still lives at the source, paused, is not known: its monitor \
                 {monitor} does not answer. Never continue it; `vmferry recover` ends it when it answers"
            )),
        }
    }

    /// For who asks what QEMU says.
    pub(crate) fn in_words(&self) -> String {
        let process = self.process();
        match (self.life, self.listens) {
            (Life::Ended, false) => format!("it has ended{process}"),
            (Life::Ended, true) => format!("it has ended{process}; something else listens at its monitor"),
            (Life::Alive, _) => format!("it lives{process}; its monitor does not answer"),
            (Life::Unknown, true) => "whether it lives is not known: its monitor does not answer".into(),
            (Life::Unknown, false) => "whether it lives is not known: nobody listens at its monitor".into(),
        }
    }
}

/// Never waits: a backlog that is full has somebody before it.
async fn somebody_listens(monitor: &Path) -> bool {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    match UnixStream::connect(monitor).await {
        Ok(_) => true,
        Err(e) => !matches!(e.kind(), ConnectionRefused | NotFound),
    }
}

/// Reaches the QEMU that a journal tells of, and waits for it while it may be there. What is known of
/// it where that is in vain.
pub(crate) async fn reach(past: &Past, config: &VmConfig) -> Result<(Qmp, Events), (Known, QmpError)> {
    let since = Instant::now();
    loop {
        let error = match process::connect(config).await {
            Ok(reached) if past.is_of(reached.0.process()) => return Ok(reached),
            // Another QEMU than that one: nothing of the migration is in it.
            Ok((qmp, _)) => QmpError::Replaced { name: "monitor", path: qmp.path().to_owned() },
            Err(error) => error,
        };
        let known = Known::by_journal(past, config).await;
        let patience = match known.life {
            Life::Ended => Duration::ZERO,
            Life::Alive => REACH_PATIENCE,
            // Somebody is there, and may be slow.
            Life::Unknown if known.listens => UNKNOWN_PATIENCE,
            Life::Unknown => Duration::ZERO,
        };
        if since.elapsed() >= patience {
            return Err((known, error));
        }
        let seconds = since.elapsed().as_secs();
        tracing::warn!(vm = past.header.vm, seconds, "QEMU's monitor does not answer; it is waited for");
        sleep(REACH_EVERY).await;
    }
}

/// What came of one look at the QEMU that a journal tells of.
pub(crate) enum Look {
    Answers(Qmp),
    /// Nobody is there to be waited for: it has ended, or nothing is known of it and nobody listens.
    Lost(Known),
    /// It lives, or somebody listens: it may answer later.
    Silent(Known),
}

/// Looks once, and does not wait.
pub(crate) async fn look(past: &Past, config: &VmConfig) -> Look {
    if let Ok((qmp, _)) = process::connect(config).await
        && past.is_of(qmp.process())
    {
        return Look::Answers(qmp);
    }
    let known = Known::by_journal(past, config).await;
    let is_lost = match known.life {
        Life::Ended => true,
        Life::Alive => false,
        Life::Unknown => !known.listens,
    };
    if is_lost { Look::Lost(known) } else { Look::Silent(known) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(life: Life, listens: bool) -> Known {
        let pid = (life != Life::Unknown).then_some(4711);
        Known { life, pid, monitor: "/run/qemu/web1.qmp".into(), listens }
    }

    #[test]
    fn only_a_proved_end_invites_to_start_the_vm() {
        let invites =
            |text: &str| text.ends_with("start it there again") || text.ends_with(": start the VM here");
        for life in [Life::Alive, Life::Ended, Life::Unknown] {
            for listens in [false, true] {
                let known = known(life, listens);
                let gone = life == Life::Ended && !listens;
                assert_eq!(known.is_gone(), gone);
                for text in [known.of_source("web1"), known.of_destination("web1")].map(String::from) {
                    assert_eq!(invites(&text), gone, "{text}");
                    assert_eq!(text.contains("not known"), life == Life::Unknown, "{text}");
                }
                let old = known.of_the_old("web1");
                assert_eq!(old.is_none(), life == Life::Ended);
                assert!(old.is_none_or(|text| text.contains("Never continue it")));
            }
        }
    }
}
