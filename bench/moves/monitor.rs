//! A QEMU's monitor as a witness: which event came when, by QEMU's own clock. All QEMUs here have
//! the same one.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::support::process::{SHORT, wait_for};
use crate::support::{Qmp, Vm};

/// For whatever is waited for here.
pub(crate) const WITHIN: Duration = Duration::from_secs(180);

/// An event by its name, and by one of its data.
#[derive(Clone, Copy)]
pub(crate) struct Sign {
    pub(crate) event: &'static str,
    pub(crate) says: Option<(&'static str, &'static str)>,
}

impl Sign {
    pub(crate) const fn new(event: &'static str) -> Self {
        Self { event, says: None }
    }

    /// Of the migration of RAM.
    pub(crate) const fn migration(status: &'static str) -> Self {
        Self { event: "MIGRATION", says: Some(("status", status)) }
    }

    /// Of a block job.
    pub(crate) const fn job(status: &'static str) -> Self {
        Self { event: "JOB_STATUS_CHANGE", says: Some(("status", status)) }
    }

    fn is(&self, event: &Value) -> bool {
        event["event"] == self.event && self.says.is_none_or(|(key, value)| event["data"][key] == value)
    }
}

pub(crate) struct Monitor {
    qmp: Qmp,
    seen: Vec<Value>,
}

impl Monitor {
    /// Of a QEMU that runs, or that somebody is about to start.
    pub(crate) fn of(vm: &Vm) -> Result<Self> {
        let qmp = wait_for(&format!("the QEMU on {}", vm.host_name()), SHORT, || {
            Ok(if vm.is_running() { vm.qmp().ok() } else { None })
        })?;
        Ok(Self { qmp, seen: Vec::new() })
    }

    /// Runs a command.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.qmp.execute(command, arguments)
    }

    /// Runs a command without arguments.
    pub(crate) fn query(&mut self, command: &str) -> Result<Value> {
        self.execute(command, json!({}))
    }

    /// When this was first seen, in seconds since the epoch; waits for it.
    pub(crate) fn wait(&mut self, sign: Sign) -> Result<f64> {
        self.wait_within(sign, WITHIN)
    }

    fn wait_within(&mut self, sign: Sign, within: Duration) -> Result<f64> {
        loop {
            if let Some(event) = self.seen.iter().find(|event| sign.is(event)) {
                return moment(event);
            }
            let waited = self.qmp.wait_event(sign.event, within);
            self.seen.push(waited.with_context(|| format!("{:?} was awaited", sign.says))?);
        }
    }

    /// That a block job ended well.
    pub(crate) fn completed(&mut self) -> Result<f64> {
        let sign = Sign::new("BLOCK_JOB_COMPLETED");
        let when = self.wait(sign)?;
        let event = self.seen.iter().find(|event| sign.is(event)).context("an event was lost")?;
        anyhow::ensure!(event["data"]["error"].is_null(), "a mirror failed: {event}");
        Ok(when)
    }
}

#[allow(clippy::cast_precision_loss)]
fn moment(event: &Value) -> Result<f64> {
    let stamp = &event["timestamp"];
    let part = |name: &str| stamp[name].as_u64().with_context(|| format!("no {name} in {event}"));
    Ok(part("seconds")? as f64 + part("microseconds")? as f64 / 1e6)
}
