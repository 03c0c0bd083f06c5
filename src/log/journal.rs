//! The log where systemd's journal reads it: the same line as elsewhere, and beside it, in fields of their own, what an
//! operator searches by: `journalctl MIGRATION=…`, `VM=…`, `PEER=…`, `PHASE=…`, and for what has one a `MESSAGE_ID`.
//!
//! Speaks the journal's own protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL), one datagram for each event: every value goes
//! through [`printable`] first, which no crate that takes events as they are could do.

use std::fmt::{Debug, Write as _};
use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

use super::line::{bounded, line};

const SOCKET: &str = "/run/systemd/journal/socket";
/// Longest value of a field of its own.
const VALUE_BYTES_MAX: usize = 512;

/// Which of an event's fields are the journal's as well, and by what name.
const FIELDS: [(&str, &str); 9] = [
    ("migration", "MIGRATION"),
    ("vm", "VM"),
    ("domain", "VM"),
    ("peer", "PEER"),
    ("to", "PEER"),
    ("phase", "PHASE"),
    ("result", "RESULT"),
    ("identity", "IDENTITY"),
    ("uid", "CALLER_UID"),
];

/// What programs wait for, by its text. An id is never used for anything else.
const MESSAGE_IDS: [(&str, &str); 8] = [
    ("the agent starts", "3f0c1a0e6c5b4d0a9d3e7a5c1b2f4e01"),
    ("the agent ends", "3f0c1a0e6c5b4d0a9d3e7a5c1b2f4e02"),
    ("migrate asked for", "3f0c1a0e6c5b4d0a9d3e7a5c1b2f4e03"),
    ("phase", "3f0c1a0e6c5b4d0a9d3e7a5c1b2f4e04"),
    ("migration ends", "3f0c1a0e6c5b4d0a9d3e7a5c1b2f4e05"),
    ("the hand-over is open: the destination is asked", "3f0c1a0e6c5b4d0a9d3e7a5c1b2f4e06"),
    ("session begins", "3f0c1a0e6c5b4d0a9d3e7a5c1b2f4e07"),
    ("session ends", "3f0c1a0e6c5b4d0a9d3e7a5c1b2f4e08"),
];

/// Writes events to the journal.
pub(super) struct Journal(UnixDatagram);

impl Journal {
    /// If standard error is the journal's: by what systemd says of it (systemd.exec(5)), not by the variable alone,
    /// which whoever is started by a service inherits.
    pub(super) fn behind_stderr() -> Option<Self> {
        let told = std::env::var("JOURNAL_STREAM").ok()?;
        let (device, inode) = told.split_once(':')?;
        let own = std::fs::File::from(io::stderr().as_fd().try_clone_to_owned().ok()?).metadata().ok()?;
        let is_journal = device.parse() == Ok(own.dev()) && inode.parse() == Ok(own.ino());
        let socket = is_journal.then(UnixDatagram::unbound)?.ok()?;
        // An empty one is nothing to it.
        socket.send_to(&[], SOCKET).ok().map(|_| Self(socket))
    }
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let entry = Entry::of(event);
        if self.0.send_to(&entry.datagram(*event.metadata().level()), SOCKET).is_err() {
            // It may be starting again; it reads this stream then.
            let _ = writeln!(io::stderr(), "{}", line(&entry.text));
        }
    }
}

/// An event as the journal has it.
#[derive(Debug, Default)]
struct Entry {
    text: String,
    id: Option<&'static str>,
    fields: Vec<(&'static str, String)>,
}

impl Entry {
    fn of(event: &Event<'_>) -> Self {
        let mut entry = Self::default();
        let mut rest = Rest(String::new());
        event.record(&mut Words { entry: &mut entry, rest: &mut rest });
        entry.id = MESSAGE_IDS.iter().find(|(text, _)| *text == entry.text).map(|(_, id)| *id);
        entry.text.push_str(&rest.0);
        entry
    }

    fn datagram(&self, level: Level) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(512);
        // syslog(3)
        let priority = match level {
            Level::ERROR => "3",
            Level::WARN => "4",
            Level::INFO => "6",
            _ => "7",
        };
        put(&mut bytes, "MESSAGE", &line(&self.text));
        put(&mut bytes, "PRIORITY", priority);
        put(&mut bytes, "SYSLOG_IDENTIFIER", env!("CARGO_PKG_NAME"));
        if let Some(id) = self.id {
            put(&mut bytes, "MESSAGE_ID", id);
        }
        for (name, value) in &self.fields {
            put(&mut bytes, name, value);
        }
        bytes
    }
}

/// A field. Its value has no end of line: it is printable.
fn put(bytes: &mut Vec<u8>, name: &str, value: &str) {
    bytes.extend_from_slice(name.as_bytes());
    bytes.push(b'=');
    bytes.extend_from_slice(value.as_bytes());
    bytes.push(b'\n');
}

/// What follows the message on its line.
struct Rest(String);

struct Words<'a> {
    entry: &'a mut Entry,
    rest: &'a mut Rest,
}

impl Words<'_> {
    fn take(&mut self, field: &Field, shown: &dyn Debug, plain: Option<&str>) {
        if field.name() == "message" {
            let _ = write!(self.entry.text, "{shown:?}");
            return;
        }
        let _ = write!(self.rest.0, " {}={shown:?}", field.name());
        if let Some((_, name)) = FIELDS.iter().find(|(ours, _)| *ours == field.name()) {
            let value = plain.map_or_else(|| format!("{shown:?}"), str::to_owned);
            self.entry.fields.push((name, bounded(&value, VALUE_BYTES_MAX)));
        }
    }
}

impl Visit for Words<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.entry.text.push_str(value);
        } else {
            self.take(field, &value, Some(value));
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.take(field, value, None);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// Keeps what would be sent.
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<String>>>);

    impl<S: Subscriber> Layer<S> for Kept {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            let datagram = Entry::of(event).datagram(*event.metadata().level());
            self.0.lock().unwrap().push(String::from_utf8(datagram).unwrap());
        }
    }

    fn sent(say: impl FnOnce()) -> Vec<String> {
        let kept = Kept::default();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(kept.clone()), say);
        kept.0.lock().unwrap().drain(..).collect()
    }

    #[test]
    fn what_is_searched_by_has_fields_of_its_own() {
        let id = uuid::Uuid::from_u128(7);
        let all = sent(|| {
            tracing::info!(migration = %id, vm = "web1", phase = "mirror", "phase");
            tracing::warn!(peer = "bravo", bytes = 3, "session {}", "lost");
        });
        let ours = "MESSAGE_ID=3f0c1a0e6c5b4d0a9d3e7a5c1b2f4e04";
        let wanted = format!(
            "MESSAGE=phase migration={id} vm=\"web1\" phase=\"mirror\"\nPRIORITY=6\nSYSLOG_IDENTIFIER=vmferry\n{ours}\n\
             MIGRATION={id}\nVM=web1\nPHASE=mirror\n"
        );
        assert_eq!(all[0], wanted);
        assert_eq!(
            all[1],
            "MESSAGE=session lost peer=\"bravo\" bytes=3\nPRIORITY=4\nSYSLOG_IDENTIFIER=vmferry\nPEER=bravo\n"
        );
    }

    /// A name with an end of line would be a field that nobody has sent.
    #[test]
    fn foreign_text_makes_no_field_and_no_line() {
        let forged = format!("x\nMESSAGE_ID=forged\n\x1b[2J{}", "y".repeat(1 << 20));
        let all = sent(|| tracing::error!(vm = forged, cause = %forged, "{forged}"));
        let names: Vec<_> = all[0].lines().map(|l| l.split('=').next().unwrap()).collect();
        assert_eq!(names, ["MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "VM"]);
        assert!(all[0].len() < 40 * 1024, "{}", all[0].len());
        assert!(!all[0].contains('\x1b'));
    }

    /// A text that was written anew would lose its id, and nobody would see it.
    #[test]
    fn every_id_belongs_to_a_line_of_the_agent() {
        fn sources(folder: &std::path::Path, all: &mut String) {
            for entry in std::fs::read_dir(folder).unwrap().flatten() {
                match entry.path() {
                    path if path.is_dir() => sources(&path, all),
                    path if path.ends_with("log/journal.rs") => {}
                    path => all.push_str(&std::fs::read_to_string(path).unwrap_or_default()),
                }
            }
        }
        let mut all = String::new();
        sources(std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")), &mut all);
        for (text, _) in MESSAGE_IDS {
            assert!(all.contains(&format!("\"{text}\"")), "no line says {text:?}");
        }
    }
}
