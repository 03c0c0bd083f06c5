//! What became of one kind of confinement.

/// What became of one kind of confinement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::agent) enum Applied {
    /// In words: what is refused.
    Yes(String),
    /// Why not.
    No(String),
}

impl Applied {
    pub(in crate::agent) fn is_on(&self) -> bool {
        matches!(self, Self::Yes(_))
    }

    pub(super) fn told(self, what: &str) -> Self {
        match &self {
            Self::Yes(words) => tracing::info!("{what}: {words}"),
            Self::No(words) => tracing::info!("no {what}: {words}"),
        }
        self
    }
}

impl std::fmt::Display for Applied {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Yes(words) => write!(f, "on: {words}"),
            Self::No(words) => write!(f, "off: {words}"),
        }
    }
}

/// It is not.
pub(super) fn no(why: &str) -> Applied {
    Applied::No(why.to_owned())
}
