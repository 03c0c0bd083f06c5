//! One migration: plan, phases, journal, undo, both roles.
