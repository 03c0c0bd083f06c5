//! Who calls the local API: the kernel's word for the other end of the socket.

use tokio::net::UnixStream;

use super::authorize::Role;
use crate::audit::By;

/// Who calls.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) pid: Option<i32>,
}

impl Caller {
    pub(super) fn of(stream: &UnixStream) -> Self {
        let credentials = stream.peer_cred().ok();
        Self {
            uid: credentials.map(|c| c.uid()),
            gid: credentials.map(|c| c.gid()),
            pid: credentials.and_then(|c| c.pid()),
        }
    }

    /// For the audit record.
    pub(super) fn by(&self) -> By {
        By { uid: self.uid, gid: self.gid, pid: self.pid }
    }

    /// What refusals are counted by.
    pub(super) fn source(&self) -> String {
        self.uid.map_or_else(|| "a user that is not known".to_owned(), |uid| format!("uid {uid}"))
    }

    /// What it may do; none: nothing.
    pub(super) fn role(&self) -> Option<Role> {
        Some(Role::Admin)
    }
}
