//! `[api]`: who may do what through the local API.

use serde::Deserialize;

/// Groups by role. Each role includes those before it; root and the agent's own user have all.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApiConfig {
    /// May look at everything.
    #[serde(default)]
    pub view: Vec<String>,
    /// May migrate, cancel, limit, forward, clean up.
    #[serde(default)]
    pub operate: Vec<String>,
    /// May also decide whose a VM is. By default the group of the socket, which is the agent's.
    pub admin: Option<Vec<String>>,
}

impl ApiConfig {
    /// Whether groups have roles. Without, who may connect to the socket may do everything.
    pub fn has_roles(&self) -> bool {
        self.admin.is_some() || !self.view.is_empty() || !self.operate.is_empty()
    }

    pub(super) fn check(&self) -> Result<(), (String, String)> {
        let roles =
            [("view", Some(&self.view)), ("operate", Some(&self.operate)), ("admin", self.admin.as_ref())];
        for (role, groups) in roles {
            if groups.into_iter().flatten().any(String::is_empty) {
                return Err((format!("api.{role}"), "a group has a name, or a number".into()));
            }
        }
        Ok(())
    }
}
