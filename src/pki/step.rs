//! Where a folder stands while one CA replaces another.

/// Where a folder stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// One CA.
    None,
    /// The old one issues, both are trusted.
    Begun,
    /// The new one issues, both are trusted.
    Switched,
}
