//! What is done with foreign bytes, as functions of bytes alone: the fuzzer runs them, and `tests/quick` runs
//! them on the corpus. Each asserts more than that nothing panics. `tests/fuzz/README.md` has the list.

mod api;
mod blocks;
mod config;
mod enrol;
mod handoff;
mod hello;
mod identity;
mod journal;
mod messages;
mod nbd;
mod probe;
mod qmp;
mod requests;
mod script;
mod session;
mod shape;
mod witness;
mod words;

type Target = fn(&[u8]);

/// By name; the corpus of each is in the folder of that name.
pub(crate) const TARGETS: [(&str, Target); 20] = [
    ("api", api::requests),
    ("blocks", blocks::blocks),
    ("config", config::config),
    ("enrol", enrol::enrolment),
    ("frames", session::frames),
    ("handoff", handoff::left),
    ("hello", hello::first_frame),
    ("identity", identity::names),
    ("journal", journal::file),
    ("journal-lines", journal::lines),
    ("libvirt", messages::libvirt),
    ("messages", messages::messages),
    ("nbd", nbd::server),
    ("offering", nbd::client),
    ("probe", probe::lines),
    ("qmp", qmp::lines),
    ("requests", requests::requests),
    ("session", session::session),
    ("witness", witness::answer),
    ("words", words::words),
];
