//! Wires listeners, sessions, migrations, the local API and metrics; owns all tasks.
