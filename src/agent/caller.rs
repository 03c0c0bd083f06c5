//! Who calls the local API, by the kernel's word for the other end of the socket, and what role that is.

use std::ffi::CString;
use std::sync::LazyLock;
use std::time::Duration;

use nix::unistd::{Gid, Group, Uid, User, getegid, geteuid, getgrouplist};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::access::Role;
use crate::audit::By;
use crate::config::ApiConfig;

/// How long the host's databases of users and groups may take; they may be on other hosts.
const GROUPS_DEADLINE: Duration = Duration::from_secs(5);

/// The user and the group of whoever has no number in a user namespace, unless root has set another
/// (`kernel.overflowuid`).
const OVERFLOW: u32 = 65_534;

/// Whether there are users that have no number here, because the agent is in a user namespace (systemd's
/// `PrivateUsers=`).
static HIDES_USERS: LazyLock<bool> =
    LazyLock::new(|| std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| !is_whole(&map)));

/// Whether a map of user numbers (user_namespaces(7)) has all of them.
fn is_whole(map: &str) -> bool {
    let lengths = map.lines().filter_map(|line| line.split_ascii_whitespace().nth(2)?.parse::<u64>().ok());
    lengths.sum::<u64>() >= u64::from(u32::MAX)
}

/// Who calls.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) pid: Option<i32>,
    /// Its user has no number here; then none is given.
    pub(super) hidden: bool,
}

impl Caller {
    pub(super) fn of(stream: &UnixStream) -> Self {
        let credentials = stream.peer_cred().ok();
        let known = |id: &u32| *id != OVERFLOW || !*HIDES_USERS;
        let uid = credentials.map(|c| c.uid());
        Self {
            uid: uid.filter(known),
            gid: credentials.map(|c| c.gid()).filter(known),
            pid: credentials.and_then(|c| c.pid()),
            hidden: uid.is_some_and(|uid| !known(&uid)),
        }
    }

    /// It is root, or the agent's own user.
    pub(super) fn owns_the_agent(&self) -> bool {
        self.uid.map(Uid::from_raw).is_some_and(|uid| uid.is_root() || uid == geteuid())
    }

    /// For the audit record.
    pub(super) fn by(&self) -> By {
        By { uid: self.uid, gid: self.gid, pid: self.pid }
    }

    /// What refusals are counted by.
    pub(super) fn source(&self) -> String {
        self.uid.map_or_else(|| "a user that is not known".to_owned(), |uid| format!("uid {uid}"))
    }

    /// What it may do; none: nothing. Root and the agent's own user may everything.
    pub(super) async fn role(&self, api: &ApiConfig) -> Option<Role> {
        if self.hidden {
            // Without roles the socket's mode has let it in.
            return (!api.has_roles()).then_some(Role::Admin);
        }
        let (uid, gid) = (Uid::from_raw(self.uid?), Gid::from_raw(self.gid?));
        if self.owns_the_agent() {
            return Some(Role::Admin);
        }
        if !api.has_roles() {
            // The socket's mode has let it in.
            return Some(Role::Admin);
        }
        let api = api.clone();
        let found = tokio::task::spawn_blocking(move || role_of(&groups(uid, gid), &api));
        match timeout(GROUPS_DEADLINE, found).await {
            Ok(role) => role.ok().flatten(),
            Err(_) => {
                tracing::error!(%uid, "which groups a caller is in cannot be found out: it gets no role");
                None
            }
        }
    }
}

/// The groups of a user, that of its process first. Which further ones its process has is not asked of the
/// kernel: for what they were at the connection (`SO_PEERGROUPS`) there is no safe call, and `/proc` would tell of a
/// setuid program that the process runs by now. Those in the host's database count.
fn groups(uid: Uid, gid: Gid) -> Vec<Gid> {
    let listed = User::from_uid(uid).ok().flatten().and_then(|user| {
        let name = CString::new(user.name).ok()?;
        getgrouplist(&name, user.gid).ok()
    });
    let mut groups = vec![gid];
    groups.extend(listed.unwrap_or_default());
    groups
}

/// The highest role that one of these groups has.
fn role_of(groups: &[Gid], api: &ApiConfig) -> Option<Role> {
    let has = |names: &[String]| names.iter().any(|name| gid_of(name).is_some_and(|g| groups.contains(&g)));
    let is_admin = match &api.admin {
        Some(names) => has(names),
        None => groups.contains(&getegid()),
    };
    match () {
        () if is_admin => Some(Role::Admin),
        () if has(&api.operate) => Some(Role::Operate),
        () if has(&api.view) => Some(Role::View),
        () => None,
    }
}

/// A group's number, by its name or by that.
fn gid_of(name: &str) -> Option<Gid> {
    let by_number = || name.parse().ok().map(Gid::from_raw);
    Group::from_name(name).ok().flatten().map(|group| group.gid).or_else(by_number)
}

/// Says which of the configured groups this host does not know: nobody has their roles.
pub(super) fn warn_of_unknown_groups(api: &ApiConfig) {
    let all = api.view.iter().chain(&api.operate).chain(api.admin.iter().flatten());
    for name in all.filter(|name| gid_of(name).is_none()) {
        tracing::warn!(group = name, "a group in [api] is not known on this host: nobody has its role");
    }
    if api.has_roles() && *HIDES_USERS {
        tracing::warn!(
            "[api] gives groups roles, and the agent is in a user namespace (`PrivateUsers=`) where callers are not \
             known: nobody but root has a role"
        );
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_users_groups_are_those_that_the_host_knows() {
        let root = Uid::from_raw(0);
        let ours: Vec<_> = groups(root, Gid::from_raw(54_321)).iter().map(|g| g.as_raw()).collect();
        assert_eq!(ours[..2], [54_321, 0]);
        // A user that is in no database has the group of its process alone.
        let nobody = groups(Uid::from_raw(4_000_000_000), Gid::from_raw(7));
        assert_eq!(nobody, [Gid::from_raw(7)]);
    }

    #[test]
    fn a_namespace_that_lacks_users_is_told_from_one_that_has_all() {
        assert!(is_whole("         0          0 4294967295\n"));
        // As systemd maps them for a service.
        assert!(!is_whole("0 0 1\n998 998 1\n"));
        assert!(!is_whole("0 0 65536\n") && !is_whole(""));
    }

    #[tokio::test]
    async fn a_caller_without_a_number_has_what_the_sockets_mode_gives_and_no_role() {
        let caller = Caller { uid: None, gid: None, pid: Some(1), hidden: true };
        let roles = ApiConfig { view: vec!["1001".into()], ..ApiConfig::default() };
        assert_eq!(caller.role(&ApiConfig::default()).await, Some(Role::Admin));
        assert_eq!(caller.role(&roles).await, None);
        let unknown = Caller { hidden: false, ..caller };
        assert_eq!(unknown.role(&ApiConfig::default()).await, None);
    }

    #[test]
    fn the_highest_role_of_all_groups_counts_and_none_is_none() {
        let names = |all: &[&str]| all.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let api = ApiConfig {
            view: names(&["1001", "1002"]),
            operate: names(&["1002"]),
            admin: Some(names(&["1003", "no such group"])),
        };
        let role = |gids: &[u32]| {
            let groups: Vec<_> = gids.iter().map(|gid| Gid::from_raw(*gid)).collect();
            role_of(&groups, &api)
        };
        assert_eq!(role(&[1001]), Some(Role::View));
        assert_eq!(role(&[1001, 1002]), Some(Role::Operate));
        assert_eq!(role(&[1002, 1003]), Some(Role::Admin));
        assert_eq!((role(&[1004]), role(&[])), (None, None));
        let default = ApiConfig { admin: None, ..api };
        assert_eq!(role_of(&[getegid()], &default), Some(Role::Admin), "the socket's group");
        let nobody = ApiConfig { admin: Some(Vec::new()), ..default };
        assert_eq!(role_of(&[getegid()], &nobody), None);
    }
}
