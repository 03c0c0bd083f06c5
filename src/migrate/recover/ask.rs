//! What the other agent and the virtual machine's QEMU say now, or why they cannot be asked.

use std::time::Duration;

use tokio::time::timeout;

use super::case::records;
use crate::migrate::guest::life;
use crate::migrate::guest::process;
use crate::migrate::host::Host;
use crate::migrate::journal::Past;
use crate::migrate::model::problem::chain;
use crate::migrate::protocol::message::Told;
use crate::qemu::QueryStatus;

/// How long a monitor may take. One that the migration itself is using does not answer.
pub(super) const QEMU_DEADLINE: Duration = Duration::from_secs(2);

pub(crate) fn peer_words(told: &Result<Option<Told>, String>) -> String {
    match told {
        Err(why) => format!("cannot be reached: {why}"),
        Ok(None) => "it has no record of this migration".into(),
        Ok(Some(told)) => {
            let records = records(&told.known);
            let words =
                if records.is_empty() { "nothing that decides it".into() } else { records.join(", ") };
            format!("{words} (phase {})", told.phase.name())
        }
    }
}

pub(crate) async fn ask_qemu(host: &Host, past: &Past) -> String {
    let Some(config) = host.config.vm(&past.header.vm) else {
        return "the VM is not in this host's configuration".into();
    };
    let asked = async {
        let (qmp, _events) = process::connect(&config).await?;
        qmp.execute(QueryStatus).await
    };
    match timeout(QEMU_DEADLINE, asked).await {
        Ok(Ok(info)) => info.status.to_string(),
        Ok(Err(e)) if e.is_not_listening() => life::Known::by_journal(past, &config).await.in_words(),
        Ok(Err(e)) => format!("cannot be asked: {}", chain(&e)),
        Err(_) => "cannot be asked: its monitor is used by the migration itself, or does not answer".into(),
    }
}
