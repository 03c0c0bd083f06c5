//! A migration as QEMU does it by itself over TCP, in clear or with its own TLS, driven over the
//! monitors with the parameters and the order that vmferry uses: the same safety, without a journal.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::{Value, json};

use crate::monitor::{Monitor, Sign};
use crate::support::Vm;
use crate::support::plain::{NBD_PORT, RAM_PORT};

/// vmferry's, unless it is told otherwise: the longest pause that QEMU plans, in milliseconds.
pub(crate) const DOWNTIME_LIMIT_MS: u64 = 300;
/// vmferry's: no limit.
const MAX_BANDWIDTH: u64 = 1 << 40;
/// One cipher suite for all: GnuTLS would take AES-256.
const PRIORITY: &str = "NORMAL:-VERS-ALL:+VERS-TLS1.3:-CIPHER-ALL:+AES-128-GCM";
const CREDENTIALS: &str = "tls0";
/// The first disk's node, at the source what it is copied to, and the job.
const NODE: &str = "vda";
const TARGET: &str = "to-vda";
const JOB: &str = "mirror-vda";

/// QEMU's own TLS 1.3, both ends verified.
#[derive(Clone)]
pub(crate) struct Tls {
    /// Folders of the source and of the destination.
    pub(crate) dirs: [PathBuf; 2],
    /// What the destination's certificate says.
    pub(crate) destination: &'static str,
}

/// Both ends of one migration.
pub(crate) struct ByHand {
    pub(crate) source: Monitor,
    pub(crate) destination: Monitor,
    address: String,
    tls: Option<Tls>,
}

impl ByHand {
    /// Starts the destination's QEMU.
    pub(crate) fn begin(source: &Vm, destination: &Vm, address: &str, tls: Option<Tls>) -> Result<Self> {
        destination.start_incoming()?;
        let (mut from, mut to) = (Monitor::of(source)?, Monitor::of(destination)?);
        if let Some(tls) = &tls {
            for (monitor, dir, end) in
                [(&mut from, &tls.dirs[0], "client"), (&mut to, &tls.dirs[1], "server")]
            {
                let object = json!({"qom-type": "tls-creds-x509", "id": CREDENTIALS, "dir": dir, "endpoint": end,
                                    "verify-peer": true, "priority": PRIORITY});
                monitor.execute("object-add", object)?;
            }
        }
        Ok(Self { source: from, destination: to, address: address.to_owned(), tls })
    }

    /// Everything up to the mirror of the first disk.
    pub(crate) fn prepare_disk(&mut self) -> Result<()> {
        let listen = json!({"type": "inet", "data": {"host": self.address, "port": NBD_PORT.to_string()}});
        let mut server = json!({"addr": listen});
        if self.tls.is_some() {
            server["tls-creds"] = json!(CREDENTIALS);
        }
        self.destination.execute("nbd-server-start", server)?;
        let export = json!({"type": "nbd", "id": NODE, "node-name": NODE, "name": NODE, "writable": true});
        self.destination.execute("block-export-add", export)?;
        let server = json!({"type": "inet", "host": self.address, "port": NBD_PORT.to_string()});
        let mut client = json!({"driver": "nbd", "node-name": TARGET, "server": server, "export": NODE,
                                "discard": "unmap", "detect-zeroes": "unmap"});
        if let Some(tls) = &self.tls {
            client["tls-creds"] = json!(CREDENTIALS);
            client["tls-hostname"] = json!(tls.destination);
        }
        self.source.execute("blockdev-add", client).map(drop)
    }

    /// Begins to copy it.
    pub(crate) fn mirror(&mut self) -> Result<()> {
        let mirror = json!({"job-id": JOB, "device": NODE, "target": TARGET, "sync": "full",
                            "copy-mode": "background", "auto-dismiss": false,
                            "on-source-error": "report", "on-target-error": "report"});
        self.source.execute("blockdev-mirror", mirror).map(drop)
    }

    /// Everything up to the copy of the RAM.
    pub(crate) fn prepare_ram(&mut self, downtime_limit_ms: u64) -> Result<()> {
        let on = |names: &[&str]| {
            let all: Vec<Value> = names.iter().map(|n| json!({"capability": n, "state": true})).collect();
            json!({"capabilities": all})
        };
        let capabilities = on(&["events", "return-path", "pause-before-switchover"]);
        self.source.execute("migrate-set-capabilities", capabilities)?;
        self.destination.execute("migrate-set-capabilities", on(&["events", "return-path"]))?;
        let mut ours = json!({"max-bandwidth": MAX_BANDWIDTH, "downtime-limit": downtime_limit_ms});
        if let Some(tls) = &self.tls {
            ours["tls-creds"] = json!(CREDENTIALS);
            ours["tls-hostname"] = json!(tls.destination);
            self.destination.execute("migrate-set-parameters", json!({"tls-creds": CREDENTIALS}))?;
        }
        self.source.execute("migrate-set-parameters", ours)?;
        self.destination.execute("migrate-incoming", self.uri()).map(drop)
    }

    /// Copies the RAM until the guest is at rest.
    pub(crate) fn migrate(&mut self) -> Result<()> {
        self.source.execute("migrate", self.uri())?;
        self.source.wait(Sign::migration("pre-switchover")).map(drop)
    }

    fn uri(&self) -> Value {
        json!({"uri": format!("tcp:{}:{RAM_PORT}", self.address)})
    }

    /// The guest is at rest: makes both sides' disks identical.
    pub(crate) fn finish_disk(&mut self) -> Result<()> {
        self.source.execute("block-job-cancel", json!({"device": JOB, "force": false}))?;
        self.source.completed()?;
        self.source.wait(Sign::job("concluded"))?;
        self.source.execute("job-dismiss", json!({"id": JOB}))?;
        self.destination.query("nbd-server-stop").map(drop)
    }

    /// The rest of the RAM and the devices, until both QEMUs say that all has arrived.
    pub(crate) fn go_on(&mut self) -> Result<()> {
        self.source.execute("migrate-continue", json!({"state": "pre-switchover"}))?;
        self.source.wait(Sign::migration("completed"))?;
        self.destination.wait(Sign::migration("completed")).map(drop)
    }

    /// Starts the guest at the destination.
    pub(crate) fn start(&mut self) -> Result<()> {
        self.destination.query("cont").map(drop)
    }

    /// Ends the source's QEMU.
    pub(crate) fn quit(mut self) {
        // It may close the monitor before it has answered.
        let _ = self.source.query("quit");
    }
}
