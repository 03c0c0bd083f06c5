//! What may be asked of the local API, and which role it takes. Knows neither HTTP nor who somebody is.

/// What a caller may do, each more than the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    /// Look at everything that the API shows.
    View,
    /// Move virtual machines, and what belongs to that.
    Operate,
    /// Decide what cannot be undone, and open sockets of this host to others.
    Admin,
}

impl Role {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Operate => "operate",
            Self::Admin => "admin",
        }
    }
}

/// Everything that can be asked. A route has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Status,
    Description,
    ListMigrations,
    ShowMigration,
    FollowMigration,
    ListLimits,
    ListForwards,
    LookAtRecovery,
    ListLibvirt,
    FollowLibvirt,
    Check,
    Migrate,
    Cancel,
    LimitMigration,
    LimitPeer,
    CheckLibvirt,
    MigrateLibvirt,
    EndLibvirt,
    Recover,
    AddForward,
    EndForward,
    Force,
}

impl Action {
    /// The least that it takes.
    pub(super) fn role(self) -> Role {
        match self {
            Self::Status
            | Self::Description
            | Self::ListMigrations
            | Self::ShowMigration
            | Self::FollowMigration
            | Self::ListLimits
            | Self::ListForwards
            | Self::LookAtRecovery
            | Self::ListLibvirt
            | Self::FollowLibvirt => Role::View,
            Self::Check
            | Self::Migrate
            | Self::Cancel
            | Self::LimitMigration
            | Self::LimitPeer
            | Self::CheckLibvirt
            | Self::MigrateLibvirt
            | Self::EndLibvirt
            | Self::Recover => Role::Operate,
            Self::AddForward | Self::EndForward | Self::Force => Role::Admin,
        }
    }

    /// As the audit record calls it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Description => "description",
            Self::ListMigrations => "list-migrations",
            Self::ShowMigration => "show-migration",
            Self::FollowMigration => "follow-migration",
            Self::ListLimits => "list-limits",
            Self::ListForwards => "list-forwards",
            Self::LookAtRecovery => "look-at-recovery",
            Self::ListLibvirt => "list-libvirt",
            Self::FollowLibvirt => "follow-libvirt",
            Self::Check => "check",
            Self::Migrate => "migrate",
            Self::Cancel => "cancel",
            Self::LimitMigration => "limit-migration",
            Self::LimitPeer => "limit-peer",
            Self::CheckLibvirt => "check-libvirt",
            Self::MigrateLibvirt => "migrate-libvirt",
            Self::EndLibvirt => "end-libvirt",
            Self::Recover => "recover",
            Self::AddForward => "add-forward",
            Self::EndForward => "end-forward",
            Self::Force => "force",
        }
    }
}
