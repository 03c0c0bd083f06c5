//! Something that `check` has found.

use serde::Serialize;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    /// It will be refused.
    pub(super) refused: bool,
    pub(super) text: String,
    pub(super) remedy: String,
}

/// What will be refused.
pub(super) fn refused(text: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { refused: true, text: text.into(), remedy: remedy.into() }
}

/// What depends on the other host, or costs something.
pub(super) fn warning(text: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { refused: false, ..refused(text, remedy) }
}
