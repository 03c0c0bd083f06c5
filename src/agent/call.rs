//! What can be asked of the local API, and what that takes. Knows neither HTTP nor who somebody is.

use crate::access::Action;

/// Everything that can be asked. A route has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    Status,
    Names,
    Description,
    ListMigrations,
    ShowMigration,
    ShowTimeline,
    FollowMigration,
    ListLimits,
    ListForwards,
    LookAtRecovery,
    ListReplicas,
    ListLibvirt,
    FollowLibvirt,
    ShowDrain,
    FollowDrain,
    Drain,
    PlanDrain,
    CancelDrain,
    Check,
    PlanMigration,
    Migrate,
    Cancel,
    LimitMigration,
    LimitPeer,
    Ping,
    QemuCommand,
    LimitForward,
    CheckLibvirt,
    MigrateLibvirt,
    EndLibvirt,
    EndReplica,
    Recover,
    AddForward,
    EndForward,
    Force,
}

impl Call {
    /// What is asked of [`crate::access::authorize`].
    pub(super) fn action(self) -> Action<'static> {
        match self {
            Self::Status
            | Self::Names
            | Self::Description
            | Self::ListMigrations
            | Self::ShowMigration
            | Self::ShowTimeline
            | Self::FollowMigration
            | Self::ListLimits
            | Self::ListForwards
            | Self::LookAtRecovery
            | Self::ListReplicas
            | Self::ListLibvirt
            | Self::FollowLibvirt
            | Self::ShowDrain
            | Self::FollowDrain => Action::View,
            Self::Check
            | Self::PlanMigration
            | Self::Migrate
            | Self::Cancel
            | Self::LimitMigration
            | Self::LimitPeer
            | Self::Ping
            | Self::QemuCommand
            | Self::LimitForward
            | Self::CheckLibvirt
            | Self::MigrateLibvirt
            | Self::EndLibvirt
            | Self::EndReplica
            | Self::Recover
            | Self::AddForward
            | Self::EndForward
            | Self::Drain
            | Self::PlanDrain
            | Self::CancelDrain => Action::Operate,
            Self::Force => Action::Administer,
        }
    }

    /// As the audit record calls it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Names => "names",
            Self::Description => "description",
            Self::ListMigrations => "list-migrations",
            Self::ShowMigration => "show-migration",
            Self::ShowTimeline => "show-timeline",
            Self::FollowMigration => "follow-migration",
            Self::ListLimits => "list-limits",
            Self::ListForwards => "list-forwards",
            Self::LookAtRecovery => "look-at-recovery",
            Self::ListLibvirt => "list-libvirt",
            Self::FollowLibvirt => "follow-libvirt",
            Self::Check => "check",
            Self::PlanMigration => "plan-migration",
            Self::Migrate => "migrate",
            Self::Cancel => "cancel",
            Self::LimitMigration => "limit-migration",
            Self::LimitPeer => "limit-peer",
            Self::Ping => "ping",
            Self::QemuCommand => "qemu-command",
            Self::LimitForward => "limit-forward",
            Self::CheckLibvirt => "check-libvirt",
            Self::MigrateLibvirt => "migrate-libvirt",
            Self::EndLibvirt => "end-libvirt",
            Self::Recover => "recover",
            Self::AddForward => "add-forward",
            Self::EndForward => "end-forward",
            Self::ShowDrain => "show-drain",
            Self::FollowDrain => "follow-drain",
            Self::Drain => "drain",
            Self::PlanDrain => "plan-drain",
            Self::CancelDrain => "cancel-drain",
            Self::ListReplicas => "list-replicas",
            Self::EndReplica => "end-replica",
            Self::Force => "force",
        }
    }
}
