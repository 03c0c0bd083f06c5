//! Follows a migration while virsh is at work: what libvirt's job and the tunnel say, Ctrl-C, and a migration
//! that stands still. libvirt 9 can wait for ever for one that has failed, so nothing here does.

use std::time::Duration;

use hyper::Method;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::job::Job;
use super::options::Wanted;
use super::show::Progress;
use super::virsh::{Running, Said, Virsh};
use crate::api::{LibvirtMigration, Told, libvirt_path};
use crate::cli::client::{Client, Lines};

/// Without progress for this long, unless it is said: longer than the agents wait for a new connection.
const STALL: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// For virsh, once its job has been aborted and its connections are cut.
const ABORT_DEADLINE: Duration = Duration::from_secs(30);

/// How virsh ended.
#[derive(Debug)]
pub(super) enum End {
    Said(Said),
    /// It was given up, and virsh with it where it did not end.
    GivenUp {
        why: String,
        said: Option<Said>,
    },
}

/// A migration that is followed.
pub(super) struct Watch<'a> {
    client: &'a Client,
    virsh: &'a Virsh,
    wanted: &'a Wanted,
    /// As the agent said last.
    state: LibvirtMigration,
    job: Option<Job>,
    progress: Progress,
    /// What had moved, and when it was that last.
    moved: (u64, Instant),
    /// It was asked to end.
    is_cancelled: bool,
}

impl<'a> Watch<'a> {
    pub(super) fn new(
        client: &'a Client,
        virsh: &'a Virsh,
        wanted: &'a Wanted,
        state: LibvirtMigration,
    ) -> Self {
        let progress = Progress::new(wanted.json);
        Self {
            client,
            virsh,
            wanted,
            state,
            job: None,
            progress,
            moved: (0, Instant::now()),
            is_cancelled: false,
        }
    }

    /// The last that libvirt's job said.
    pub(super) fn job(&self) -> Option<&Job> {
        self.job.as_ref()
    }

    /// Follows it to virsh's end.
    pub(super) async fn follow(&mut self, mut running: Running) -> anyhow::Result<End> {
        let mut lines = self.lines().await;
        let mut looks = interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut interrupts = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
        loop {
            tokio::select! {
                said = running.wait() => return Ok(End::Said(said?)),
                line = next(&mut lines) => match line {
                    Some(state) => self.state = state,
                    // The agent is restarted, and knows it afterwards; or it is gone.
                    None => lines = None,
                },
                _ = interrupts.recv() => self.cancel().await,
                _ = looks.tick() => {
                    if lines.is_none() {
                        lines = self.lines().await;
                    }
                    self.look().await;
                    if let Some(why) = self.stands_still().await {
                        return self.give_up(running, why).await;
                    }
                }
            }
        }
    }

    async fn lines(&self) -> Option<Lines> {
        self.client.lines(&format!("{}/events", libvirt_path(self.state.id))).await.ok()
    }

    async fn look(&mut self) {
        let said = self.virsh.ask(&["domjobinfo", "--rawstats", &self.wanted.domain]).await;
        if let Some(job) = said.ok().and_then(|said| Job::parse(&said.stdout)) {
            self.job = Some(job);
        }
        let moved = self.state.channels.bytes() + self.job.as_ref().map_or(0, Job::moved);
        if moved != self.moved.0 {
            self.moved = (moved, Instant::now());
        }
        self.progress.show(&self.state, self.job.as_ref());
    }

    /// Why it is to be given up, if it is.
    async fn stands_still(&mut self) -> Option<String> {
        let limit = self.wanted.stall_s.map_or(STALL, Duration::from_secs);
        if self.moved.1.elapsed() < limit {
            return None;
        }
        if self.wanted.postcopy && self.is_in_postcopy().await {
            // Its RAM is on both hosts now: whoever cuts it ends the guest.
            self.progress.say(&format!(
                "nothing has moved for {} s. The guest needs RAM of both hosts now, so it is not given up; is the connection back?",
                limit.as_secs()
            ));
            self.moved.1 = Instant::now();
            return None;
        }
        Some(format!("nothing has moved for {} s", limit.as_secs()))
    }

    /// Also when nobody can say.
    async fn is_in_postcopy(&self) -> bool {
        let state = self.virsh.ask(&["domstate", "--reason", &self.wanted.domain]).await;
        state.map_or(true, |said| !said.ok || said.stdout.contains("post-copy"))
    }

    /// Has libvirt abort its job; the second time does nothing more.
    async fn cancel(&mut self) {
        if std::mem::replace(&mut self.is_cancelled, true) {
            return self.progress.say("libvirt was asked to abort it already");
        }
        self.progress.say("libvirt is asked to abort it");
        self.abort().await;
    }

    async fn abort(&self) {
        match self.virsh.ask(&["domjobabort", &self.wanted.domain]).await {
            Ok(said) if !said.ok => {
                self.progress.say(&format!("libvirt does not abort it: {}", said.error()))
            }
            Ok(_) => {}
            Err(e) => self.progress.say(&format!("libvirt does not abort it: {e:#}")),
        }
    }

    /// Cuts all that goes through the tunnel, for libvirt waits for its connections; then has it abort.
    async fn give_up(&mut self, mut running: Running, why: String) -> anyhow::Result<End> {
        self.progress.say(&format!("{why}: it is given up"));
        let path = format!("{}/end", libvirt_path(self.state.id));
        let cut: anyhow::Result<LibvirtMigration> =
            self.client.call(Method::POST, &path, &Told::Unknown).await;
        if let Err(e) = cut {
            self.progress.say(&format!("the agent has not cut it: {e:#}"));
        }
        self.abort().await;
        let said = match timeout(ABORT_DEADLINE, running.wait()).await {
            Ok(said) => Some(said?),
            Err(_) => {
                running.kill().await;
                None
            }
        };
        Ok(End::GivenUp { why, said })
    }
}

/// The next line, or none at their end; for ever without a connection.
async fn next(lines: &mut Option<Lines>) -> Option<LibvirtMigration> {
    match lines {
        Some(lines) => lines.next().await.ok().flatten(),
        None => std::future::pending().await,
    }
}
