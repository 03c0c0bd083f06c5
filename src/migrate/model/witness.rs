//! The witness on which both sides of a migration have agreed.

use serde::{Deserialize, Serialize};

/// Which etcd it is, and what it had come to by then: one that is another, or knows less, has forgotten.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgreedWitness {
    /// The cluster's id.
    pub cluster: String,
    /// Of the whole cluster, when the migration's word was begun or first seen.
    pub revision: i64,
}

/// What a source says of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferedWitness {
    pub is: AgreedWitness,
    /// The name under which it keeps a word for the migration.
    pub key: String,
}
