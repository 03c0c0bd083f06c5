//! Completions: what a shell asks for on Tab. Names are the running agent's, asked through the local API; without
//! an agent, or without the right to ask it, there are none and nothing is said.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};
use serde::de::DeserializeOwned;

use super::client::{Client, SOCKET, SOCKET_VARIABLE};
use crate::api::{Forwards, Migration, Names};

/// Names the shell that asks. Not `COMPLETE`, which other programs may have set for themselves.
pub(super) const VARIABLE: &str = "VMFERRY_COMPLETE";
/// Somebody waits with a finger on the key.
const ANSWER_WITHIN: Duration = Duration::from_millis(500);
/// More than a screen is of no use.
const MIGRATIONS_MAX: usize = 50;

pub(super) fn vms() -> ArgValueCandidates {
    ArgValueCandidates::new(|| plain(names().vms))
}

pub(super) fn peers() -> ArgValueCandidates {
    ArgValueCandidates::new(|| plain(names().peers))
}

pub(super) fn migrations() -> ArgValueCandidates {
    ArgValueCandidates::new(|| migrations_of(known_migrations()))
}

/// Where a VM's name does not do.
pub(super) fn migration_ids() -> ArgValueCandidates {
    ArgValueCandidates::new(|| ids(&known_migrations()))
}

pub(super) fn vms_and_migrations() -> ArgValueCandidates {
    ArgValueCandidates::new(|| both(plain(names().vms), ids(&known_migrations())))
}

pub(super) fn forwards() -> ArgValueCandidates {
    ArgValueCandidates::new(known_forwards)
}

pub(super) fn migrations_and_forwards() -> ArgValueCandidates {
    ArgValueCandidates::new(|| both(migrations_of(known_migrations()), known_forwards()))
}

fn plain(names: Vec<String>) -> Vec<CompletionCandidate> {
    names.into_iter().map(CompletionCandidate::new).collect()
}

fn names() -> Names {
    ask("/v1/names").unwrap_or_default()
}

fn both(mut some: Vec<CompletionCandidate>, others: Vec<CompletionCandidate>) -> Vec<CompletionCandidate> {
    some.extend(others);
    some
}

/// The last ones first.
fn known_migrations() -> Vec<Migration> {
    let mut all: Vec<Migration> = ask("/v1/migrations").unwrap_or_default();
    all.reverse();
    all.truncate(MIGRATIONS_MAX);
    all
}

fn migrations_of(known: Vec<Migration>) -> Vec<CompletionCandidate> {
    let vms: BTreeSet<String> = known.iter().map(|m| m.vm.clone()).collect();
    both(plain(vms.into_iter().collect()), ids(&known))
}

fn ids(known: &[Migration]) -> Vec<CompletionCandidate> {
    let told = |m: &Migration| CompletionCandidate::new(m.id.to_string()).help(Some(m.vm.clone().into()));
    known.iter().map(told).collect()
}

fn known_forwards() -> Vec<CompletionCandidate> {
    let all = ask::<Forwards>("/v1/forwards").map(|all| all.forwards).unwrap_or_default();
    let word = |name: Option<String>, id: uuid::Uuid| name.unwrap_or_else(|| id.to_string());
    let told = all.into_iter().map(|f| (word(f.name, f.id), f.spec.listen.to_string()));
    told.map(|(word, listen)| CompletionCandidate::new(word).help(Some(listen.into()))).collect()
}

/// What the agent answers, if it does so soon.
fn ask<T: DeserializeOwned>(path: &str) -> Option<T> {
    let socket = std::env::var_os(SOCKET_VARIABLE).map_or_else(|| PathBuf::from(SOCKET), PathBuf::from);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
    let client = Client::new(&socket);
    runtime.block_on(async { tokio::time::timeout(ANSWER_WITHIN, client.get(path)).await.ok()?.ok() })
}
