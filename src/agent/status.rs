//! What is asked of the agent as a whole: its status.

use uuid::Uuid;

use super::confine::Confinement;
use super::running::Agent;
use crate::api::{AuditStatus, LibvirtRole, Reconnecting, SandboxStatus, SessionStatus, Status, VmState};
use crate::audit::Figures;
use crate::migrate::known_vms;
use crate::mux::Role as DialRole;

const LIBVIRT_ROLES: [LibvirtRole; 2] = [LibvirtRole::Source, LibvirtRole::Destination];

impl Agent {
    pub(super) async fn status(&self) -> Status {
        let mut sessions = Vec::new();
        for session in self.host.pool.all() {
            let (info, link, stats) = (session.info(), session.link(), session.stats().await);
            sessions.push(SessionStatus {
                peer: info.peer.to_string(),
                address: link.connection.address.to_string(),
                dialed: info.role == DialRole::Dialer,
                cipher: link.connection.cipher.clone(),
                reconnecting: link.away.as_ref().map(Reconnecting::from),
                age_s: info.since.elapsed().as_secs(),
                streams: stats.streams as u64,
                sent_bytes: stats.sent_data_bytes,
                received_bytes: stats.received_data_bytes,
            });
        }
        let config = &self.host.config;
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            identity: self.host.identity.to_string(),
            certificate_not_after: self.host.pool.endpoint().tls().not_after.unix_timestamp(),
            sessions,
            migrations_active: self.active(),
            libvirt_migrations_active: LIBVIRT_ROLES.map(|role| self.libvirt.active(role)).iter().sum(),
            vms: known_vms::names(config),
            vm_states: self.vm_states().await,
            peers: config.peers.keys().cloned().collect(),
            audit: Some(self.audit_status()),
            sandbox: Some(self.sandbox_status()),
        }
    }

    fn sandbox_status(&self) -> SandboxStatus {
        let Confinement { landlock, seccomp } = &self.confinement;
        SandboxStatus { landlock: landlock.to_string(), seccomp: seccomp.to_string() }
    }

    fn audit_status(&self) -> AuditStatus {
        let folder = self.host.config.audit_folder().display().to_string();
        let Figures { head, lost, failing, .. } = self.host.audit.figures();
        AuditStatus { folder, head: head.to_string(), lost, failing }
    }

    async fn vm_states(&self) -> Vec<VmState> {
        let mut states = self.vm_states.look(&self.host).await;
        // A check has no migration that anybody could ask for.
        let is_known = |id: &Uuid| self.registry.get(*id).is_some();
        states.iter_mut().for_each(|state| state.migration = state.migration.filter(is_known));
        states
    }
}
