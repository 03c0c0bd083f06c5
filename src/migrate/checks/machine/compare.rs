//! Asks both QEMUs for their machines and compares them.

use std::time::Duration;

use tokio::time::timeout;

use super::{devices, hardware, shown};
use crate::migrate::model::problem::{Problem, ProblemKind, chain};
use crate::migrate::protocol::message::Offer;
use crate::qemu::{Machine, Qmp, QmpError, machine};

/// How long QEMU may be asked.
const ASK_DEADLINE: Duration = Duration::from_secs(20);
/// Findings of a comparison that are told.
const FINDINGS_MAX: usize = 48;

/// Asks a QEMU for its machine, or says why it is not known.
pub(crate) async fn ask(qmp: &Qmp, side: &str) -> Result<Machine, Problem> {
    let unknown = |why: &str| {
        let text = format!("the two machines were not compared: the {side}'s QEMU could not be asked: {why}");
        let remedy = "compare the two command lines yourself, or try again";
        Problem::warning(ProblemKind::NotSeen, text, remedy)
    };
    match timeout(ASK_DEADLINE, machine(qmp)).await {
        Ok(Ok(machine)) => Ok(machine),
        Ok(Err(e)) => Err(unknown(&chain(&e))),
        Err(_) => Err(unknown(&format!("no answer within {} s", ASK_DEADLINE.as_secs()))),
    }
}

/// What differs at the destination.
pub(crate) async fn findings(qmp: &Qmp, offer: &Offer) -> Result<Vec<Problem>, QmpError> {
    let Some(source) = &offer.machine else { return Ok(Vec::new()) };
    Ok(match ask(qmp, "destination").await {
        Ok(here) => compare(source, &here, offer),
        Err(problem) => vec![problem],
    })
}

fn compare(source: &Machine, here: &Machine, offer: &Offer) -> Vec<Problem> {
    let mut found = hardware::compare(source, here);
    if source.kind == here.kind {
        found.extend(devices::compare(source, here, offer));
    }
    if found.len() > FINDINGS_MAX {
        let more = found.len() - FINDINGS_MAX;
        found.truncate(FINDINGS_MAX);
        let text = format!("{more} more differences between the two machines");
        found.push(Problem::new(ProblemKind::Device, text, "mend those that are named first"));
    }
    for (side, machine) in [("source", source), ("destination", here)] {
        if !machine.unseen.is_empty() {
            let what: Vec<String> = machine.unseen.iter().take(8).map(|what| shown(what)).collect();
            let text = format!("the {side}'s QEMU does not tell, so not compared: {}", what.join(", "));
            found.push(Problem::note(ProblemKind::NotSeen, text, "compare the two command lines yourself"));
        }
    }
    found
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
