//! What every way to the next process has in common: the package, its limits, and how a version says
//! what it can take over. Whoever leaves asks that first, and gives up nothing before.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{bail, ensure};
use serde::{Deserialize, Serialize};

use super::state::{FORMATS, format};

/// Longest state that is read: replay logs and queues of all sessions.
pub(super) const STATE_BYTES_MAX: u64 = 1 << 31;
/// Most descriptors that are read.
pub(super) const FDS_MAX: u32 = 16_384;

/// All that a process leaves, as it travels.
pub(crate) struct Package {
    pub(super) state: Vec<u8>,
    /// By number. One is missing only where the service manager lost it.
    pub(super) fds: Vec<Option<OwnedFd>>,
}

impl Package {
    /// Errors: it is more than a process reads, which would then go on with nothing of it.
    pub(super) fn fits(&self) -> anyhow::Result<()> {
        let (bytes, fds) = (self.state.len() as u64, self.fds.len());
        ensure!(
            bytes <= STATE_BYTES_MAX && fds < FDS_MAX as usize,
            "{bytes} bytes and {fds} descriptors are more than the next process reads"
        );
        Ok(())
    }
}

/// What a version can take over.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Offer {
    /// The version, for people.
    version: String,
    /// Formats of the state that it reads.
    formats: Vec<u32>,
    /// Whether it finds them in the service manager's store as this version leaves them there.
    #[serde(default, rename = "parcel")]
    fd_queue: bool,
    /// What it would start as. Of a version that does not say it, nothing is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    start: Option<Start>,
}

/// What a process would start as with a configuration.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Start {
    As {
        host: String,
        state_dir: PathBuf,
    },
    /// It would not: why.
    Refused(String),
}

impl Offer {
    /// Of this version.
    pub(super) fn ours() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            formats: FORMATS.to_vec(),
            fd_queue: true,
            start: None,
        }
    }

    /// Says as well what would be started.
    pub(super) fn with_start(self, start: Start) -> Self {
        Self { start: Some(start), ..self }
    }

    /// That it would start, as the agent of the same host with the same journals.
    pub(super) fn check_start(&self, host: &str, state_dir: &Path) -> anyhow::Result<()> {
        match &self.start {
            None => Ok(()),
            Some(Start::Refused(why)) => {
                bail!("with the configuration as it is now it would not start: {why}")
            }
            Some(Start::As { host: theirs, state_dir: folder }) => {
                ensure!(theirs == host, "it would start as {theirs}, and this is {host}");
                ensure!(
                    folder == state_dir,
                    "it would look for journals in {}, and they are in {}",
                    folder.display(),
                    state_dir.display()
                );
                Ok(())
            }
        }
    }

    /// That it can take over through the service manager's store.
    pub(super) fn check_store(&self, has_a_witness: bool) -> anyhow::Result<()> {
        self.check(has_a_witness)?;
        ensure!(self.fd_queue, "version {} does not read what this one leaves in the store", self.version);
        Ok(())
    }

    /// That it reads the format that would be written now.
    pub(super) fn check(&self, has_a_witness: bool) -> anyhow::Result<()> {
        let ours = format(has_a_witness);
        if self.formats.contains(&ours) {
            return Ok(());
        }
        let (version, formats) = (&self.version, &self.formats);
        bail!("version {version} takes over formats {formats:?}, and this one leaves {ours}");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    /// What the version before this one says of itself.
    const BEFORE: &str = r#"{"version":"0.1.0","formats":[2,1],"parcel":true}"#;

    #[test]
    fn a_version_that_knows_no_witness_takes_over_only_while_none_is_open() {
        let before: Offer = serde_json::from_str(BEFORE).unwrap();
        assert!(before.check_store(false).is_ok() && before.check(false).is_ok());
        let refused =
            before.check_store(true).expect_err("it would start the guest without asking").to_string();
        assert_eq!(refused, "version 0.1.0 takes over formats [2, 1], and this one leaves 3");
        assert!(before.check(true).is_err());
        assert!(Offer::ours().check_store(true).is_ok() && Offer::ours().check_store(false).is_ok());
    }
    #[test]
    fn nothing_is_left_to_a_process_that_would_not_start_or_be_another() {
        let folder = Path::new("/var/lib/vmferry");
        let before: Offer = serde_json::from_str(BEFORE).unwrap();
        assert!(before.check_start("alpha", folder).is_ok(), "of a version before, nothing is known");
        let check = |start: Start| {
            let said = serde_json::to_string(&Offer::ours().with_start(start)).unwrap();
            let heard: Offer = serde_json::from_str(&said).unwrap();
            heard.check_start("alpha", folder).map_err(|e| e.to_string())
        };
        let as_host =
            |host: &str, state_dir: &str| Start::As { host: host.into(), state_dir: state_dir.into() };
        assert_eq!(check(as_host("alpha", "/var/lib/vmferry")), Ok(()));
        assert!(check(as_host("bravo", "/var/lib/vmferry")).is_err());
        assert!(check(as_host("alpha", "/srv")).is_err());
        let refused = check(Start::Refused("line 3".into())).unwrap_err();
        assert!(refused.ends_with("it would not start: line 3"), "{refused}");
    }
}
