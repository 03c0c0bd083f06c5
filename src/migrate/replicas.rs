//! Replicas as an operator sees them: what this host remembers of them, and their end.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::guest::process;
use super::host::Host;
use super::journal::{Role, Undo};
use super::model::problem::{Problem, ProblemKind, chain};
use super::model::replica::SourceReplica;
use super::protocol::client::{Link, LinkError};
use super::protocol::message::{EndReplica, EndedReplica, Request, Response};
use super::transfer::disk::bitmaps::Bitmaps;
use crate::qemu::QmpError;

/// How long the peer may take to end its part.
const END_DEADLINE: Duration = Duration::from_secs(45);
/// How long the VM's monitor may take.
const MONITOR_DEADLINE: Duration = Duration::from_secs(10);

/// A replica, as this host remembers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Replica {
    pub vm: String,
    /// Source: the VM is this host's, the replica is at the peer. Destination: the other way round.
    pub role: Role,
    /// As its certificate names it.
    pub peer: String,
    /// When all of its disks were last in step; in seconds since the epoch. Only its source knows.
    pub in_step_at: Option<i64>,
    pub disks: Vec<ReplicatedDisk>,
    /// Images that were made for it here.
    pub images: Vec<PathBuf>,
}

/// A disk of a replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ReplicatedDisk {
    pub name: String,
    /// A run or a move copies only what changed since, if nothing speaks against it by then.
    pub in_step: bool,
}

/// All that this host remembers.
pub fn list(host: &Host) -> Vec<Replica> {
    let (sources, kept) = host.replicas.all();
    let source = |r: SourceReplica| Replica {
        vm: r.vm,
        role: Role::Source,
        peer: r.peer,
        in_step_at: r.in_step_at,
        disks: r
            .disks
            .into_iter()
            .map(|one| ReplicatedDisk { name: one.disk.name, in_step: one.in_step })
            .collect(),
        images: Vec::new(),
    };
    let path = |undo: Undo| match undo {
        Undo::Image { path, .. } => Some(path),
        Undo::Volume(volume) => Some(volume.path),
        _ => None,
    };
    let kept = kept.into_iter().map(|r| Replica {
        vm: r.vm,
        role: Role::Destination,
        peer: r.peer,
        in_step_at: None,
        disks: Vec::new(),
        images: r.made.into_iter().filter_map(path).collect(),
    });
    sources.into_iter().map(source).chain(kept).collect()
}

/// Ends the replica of a VM at a peer: the record there, its bitmaps and the record here, and its images if that is
/// wanted. What stays of these, in words. May be asked for again.
///
/// # Errors
/// There is none, or the peer cannot be asked: then its record stays here as well, without anything to use.
pub async fn end(host: &Arc<Host>, vm: &str, peer: &str, images: bool) -> Result<Vec<String>, Problem> {
    let identity = host.peers.find(peer)?.identity.clone();
    let _not_meanwhile = host.reserve_for_task(vm, "the end of a replica")?;
    let known = host.replicas.source(vm, identity.as_str());
    if let Some(replica) = &known {
        let mut unused = replica.clone();
        unused.disks.iter_mut().for_each(|one| one.in_step = false);
        host.replicas.remember(&unused).map_err(|e| {
            let remedy = "look at the room and the owner of the agent's `state_dir`";
            Problem::new(ProblemKind::Other, chain(&e), remedy)
        })?;
        end_bitmaps(host, replica).await?;
    }
    let EndedReplica { was_kept, left } = ask(host, vm, peer, images).await?;
    if known.is_none() && !was_kept {
        let text = format!("neither {} nor {peer} remembers a replica of VM {vm}", host.identity);
        return Err(Problem::new(
            ProblemKind::VmUnknown,
            text,
            "see `vmferry replicas` for those that there are",
        ));
    }
    if let Err(e) = host.replicas.forget_source(vm, identity.as_str()) {
        tracing::warn!(vm, error = chain(&e), "a replica that was ended is still listed");
    }
    Ok(left)
}

/// In the QEMU that has them; with another one they have gone.
async fn end_bitmaps(host: &Host, replica: &SourceReplica) -> Result<(), Problem> {
    let Some(config) = host.config.vm(&replica.vm) else { return Ok(()) };
    let unreachable = |why: String| {
        let text =
            format!("the dirty bitmaps of the replica are still in the QEMU of VM {}: {why}", replica.vm);
        Problem::new(ProblemKind::QemuUnreachable, text, "try again when its monitor answers")
    };
    let ended = async {
        let (qmp, _events) = match process::connect(&config).await {
            Err(e) if e.is_not_listening() => return Ok(()),
            connected => connected?,
        };
        if replica.qemu.is_some() && replica.qemu.as_ref() != qmp.process().id() {
            return Ok(());
        }
        for one in &replica.disks {
            Bitmaps::replica(&one.disk.node_name, replica.id).end(&qmp).await?;
        }
        Ok::<(), QmpError>(())
    };
    match tokio::time::timeout(MONITOR_DEADLINE, ended).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(e)) => Err(unreachable(chain(&e))),
        Err(_) => Err(unreachable(format!("it does not answer within {} s", MONITOR_DEADLINE.as_secs()))),
    }
}

async fn ask(host: &Host, vm: &str, peer: &str, images: bool) -> Result<EndedReplica, Problem> {
    let session = host.peers.session(peer).await.map_err(|e| not_ended(peer, &chain(&e)))?;
    let asked = async {
        let mut link = Link::open(&session, Uuid::new_v4()).await?;
        let wanted = EndReplica { vm: vm.to_owned(), images };
        let answer = link.ask(Request::EndReplica(wanted), END_DEADLINE).await?;
        link.finish();
        match answer {
            Response::ReplicaEnded(ended) => Ok(ended),
            _ => Err(LinkError::Unexpected { request: "end-replica" }),
        }
    };
    match asked.await {
        Ok(ended) => Ok(ended),
        Err(LinkError::Refused(refusal)) if !refusal.problems.is_empty() => Err(refusal.problems[0].clone()),
        Err(e) => Err(not_ended(peer, &chain(&e))),
    }
}

fn not_ended(peer: &str, why: &str) -> Problem {
    let text = format!("{peer} still has its part of the replica: {why}");
    Problem::new(ProblemKind::PeerUnreachable, text, "end it again when its agent can be reached")
}
