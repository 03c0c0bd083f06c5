//! A trial: QEMU's `migrate` into a socket that nobody reads, taken back at once. Some of what a
//! QEMU cannot migrate it says only then, and by then the disks would have been copied.
//!
//! The guest runs on, or stays paused: the socket takes a few kilobytes and then no more, so that
//! the trial is always in its first pass over the RAM when it is taken back, and never near a
//! switchover. Where the agent dies in the middle of it, the socket closes and QEMU ends the trial
//! by itself.
//!
//! ```text
//! none ──► setup ──► active ──► (migrate_cancel) ──► cancelled
//!   └─ refused ─┴──► failed
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::context::Context;
use super::failure::Failure;
use crate::migrate::guest::settings::{self, Settings};
use crate::migrate::journal::{Journal, Undo};
use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::migrate::transfer::streams::socket_pair;
use crate::qemu::{
    Closefd, Migrate, MigrateCancel, MigrationStatus, Qmp, QmpError, QomGet, QomList, QueryMigrate, names,
};

/// How long QEMU may take to begin. Large guests take their time to track what they write.
const BEGIN_DEADLINE: Duration = Duration::from_secs(20);
/// How long QEMU may take to end it.
const END_DEADLINE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(5);

/// Why a trial could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrialError {
    #[error("no local socket")]
    Socket(#[from] io::Error),
    #[error("the source's QEMU")]
    Qmp(#[from] QmpError),
}

/// What is on for a trial. Not `events`: whoever listens to this QEMU hears nothing of it.
const CAPABILITIES: [&str; 2] = ["return-path", "pause-before-switchover"];

/// Before the destination prepares anything.
pub(crate) async fn rehearse(context: &Context, qmp: &Qmp, journal: &mut Journal) -> Result<(), Failure> {
    let settings = settings::remember::<Failure>(qmp, journal).await?;
    journal.will_make(Undo::Fd(names::TRIAL_FDNAME.into()))?;
    settings.state(qmp, &CAPABILITIES, None).await?;
    let mut found = Vec::from_iter(trial(qmp, &context.request.vm).await?);
    found.extend(settings.note("source"));
    let findings = context.request.options.policy().judge(found).map_err(Failure::Problems)?;
    context.note_findings(findings);
    Ok(())
}

/// The same for `check`, which leaves everything as it is.
pub(crate) async fn try_and_restore(qmp: &Qmp, vm: &str) -> Result<Vec<Problem>, TrialError> {
    let settings = Settings::ask(qmp).await?;
    let mut found = Vec::from_iter(settings.note("source"));
    if settings.is_ordinary() {
        found.extend(trial(qmp, vm).await?);
        return Ok(found);
    }
    let stated = settings.state(qmp, &CAPABILITIES, None).await;
    let tried = match stated {
        Ok(()) => trial(qmp, vm).await,
        Err(e) => Err(e.into()),
    };
    settings.restore(qmp).await?;
    found.extend(tried?);
    Ok(found)
}

impl From<TrialError> for Failure {
    fn from(error: TrialError) -> Self {
        match error {
            TrialError::Socket(source) => Self::Socket(source),
            TrialError::Qmp(source) => Self::Qmp(source),
        }
    }
}

/// Whether `migrate` would unplug a network card that another one stands in for.
async fn has_failover(qmp: &Qmp) -> Result<bool, QmpError> {
    for folder in ["/machine/peripheral", "/machine/peripheral-anon"] {
        for child in qmp.execute(QomList { path: folder.to_owned() }).await? {
            if !child.kind.starts_with("child<virtio-net-") {
                continue;
            }
            let (path, property) = (format!("{folder}/{}", child.name), "failover".to_owned());
            match qmp.execute(QomGet { path, property }).await {
                Ok(Value::Bool(true)) => return Ok(true),
                Err(e) if e.desc().is_none() => return Err(e),
                _ => {}
            }
        }
    }
    Ok(false)
}

/// Tries whether this QEMU would migrate its guest at all. `None`: it would.
async fn trial(qmp: &Qmp, vm: &str) -> Result<Option<Problem>, TrialError> {
    if has_failover(qmp).await? {
        let text = format!(
            "whether the source's QEMU would migrate VM {vm} was not tried: that would unplug the network card \
             for which another has `failover=on`"
        );
        return Ok(Some(Problem::note(ProblemKind::NotSeen, text, "nothing has to be done")));
    }
    let (ours, theirs) = socket_pair()?;
    take_little(&theirs)?;
    qmp.getfd(names::TRIAL_FDNAME, theirs).await?;
    let begun = match qmp.execute(Migrate::to_fd(names::TRIAL_FDNAME)).await {
        Err(refused) if refused.desc().is_some() => {
            // QEMU keeps the descriptor of what it refuses, mostly.
            match qmp.execute(Closefd { fdname: names::TRIAL_FDNAME.into() }).await {
                Err(e) if !e.is_not_found_fd() => return Err(e.into()),
                _ => return Ok(Some(refusal(vm, refused.desc().unwrap_or_default()))),
            }
        }
        done => done.map(drop),
    };
    let end = match begun {
        Ok(()) => watch(qmp).await,
        Err(e) => Err(e),
    };
    let taken_back = take_back(qmp, ours).await;
    let end = end?;
    if !taken_back? {
        let text = format!("a trial migration of VM {vm} does not end");
        let remedy = "end it with `migrate_cancel` on another monitor, and look at QEMU's log";
        return Ok(Some(Problem::new(ProblemKind::Busy, text, remedy)));
    }
    Ok(match end {
        End::Failed(why) => Some(refusal(vm, &why)),
        End::Active => None,
        End::Slow => {
            let text = format!(
                "whether the source's QEMU would migrate VM {vm} is unknown: it did not begin within {} s",
                BEGIN_DEADLINE.as_secs()
            );
            Some(Problem::warning(ProblemKind::NotSeen, text, "look at the load of the source's host"))
        }
    })
}

/// So that nothing but the first bytes is ever taken.
fn take_little(socket: &OwnedFd) -> io::Result<()> {
    socket2::SockRef::from(socket).set_send_buffer_size(1)
}

fn refusal(vm: &str, why: &str) -> Problem {
    let why = if why.is_empty() { "it does not say why; its log may" } else { why };
    let text = format!("the source's QEMU would refuse to migrate VM {vm}: {why}");
    let remedy = "take what QEMU names out of the guest, or move the VM while it is shut down";
    Problem::new(ProblemKind::MigrationRefused, text, remedy)
}

/// How far a trial came.
enum End {
    Active,
    Failed(String),
    Slow,
}

async fn watch(qmp: &Qmp) -> Result<End, QmpError> {
    let until = Instant::now() + BEGIN_DEADLINE;
    loop {
        let info = qmp.execute(QueryMigrate).await?;
        match info.status {
            MigrationStatus::None | MigrationStatus::Setup | MigrationStatus::WaitUnplug
                if Instant::now() < until =>
            {
                sleep(POLL).await;
            }
            MigrationStatus::None | MigrationStatus::Setup | MigrationStatus::WaitUnplug => {
                return Ok(End::Slow);
            }
            MigrationStatus::Failed => return Ok(End::Failed(info.error_desc.unwrap_or_default())),
            _ => return Ok(End::Active),
        }
    }
}

/// Ends a trial, whatever it has come to; whether it has ended.
async fn take_back(qmp: &Qmp, ours: OwnedFd) -> Result<bool, QmpError> {
    let until = Instant::now() + END_DEADLINE;
    let mut ours = Some(ours);
    qmp.execute(MigrateCancel).await?;
    while qmp.execute(QueryMigrate).await?.status.is_live() {
        if Instant::now() >= until {
            return Ok(false);
        }
        if Instant::now() + END_DEADLINE / 2 >= until {
            // An end of another kind.
            ours = None;
        }
        sleep(POLL).await;
    }
    drop(ours);
    Ok(true)
}
