//! A monitor: QEMU may be its guest's by now.

use serde_json::Value;
use vmferry::qemu::wire::{LineBuffer, Message, Outcome};
use vmferry::qemu::{self, Command};

use super::script::pieces;

/// The lines in these bytes, or as many as there are before one is too long.
fn taken<'a>(parts: impl Iterator<Item = &'a [u8]>) -> (Vec<Vec<u8>>, bool) {
    let mut buffer = LineBuffer::default();
    let (mut lines, mut fits) = (Vec::new(), true);
    for part in parts {
        fits = buffer.push(part).is_ok();
        lines.extend(std::iter::from_fn(|| buffer.next_line()));
        if !fits {
            break;
        }
    }
    (lines, fits)
}

/// Lines come out whole however they arrive; what QEMU says to people is clean; answers are read as what any
/// command returns.
pub(crate) fn lines(data: &[u8]) {
    let at_once = taken(std::iter::once(data));
    assert_eq!(taken(pieces(data, false)), at_once);
    assert_eq!(taken(pieces(data, true)), at_once);
    for line in at_once.0 {
        assert!(!line.contains(&b'\n') && !line.trim_ascii().is_empty());
        match Message::parse(&line) {
            Ok(Message::Reply { outcome: Outcome::Error { class, desc }, .. }) => {
                let clean = |text: &str| !text.chars().any(char::is_control);
                assert!(clean(&class) && clean(&desc), "{class:?} {desc:?}");
            }
            Ok(Message::Reply { outcome: Outcome::Return(value), .. }) => returned(&value),
            Ok(Message::Event(event)) => assert_eq!(event.name.is_empty(), line_says_no_name(&line)),
            Ok(Message::Greeting | Message::Unknown) | Err(_) => {}
        }
    }
}

fn line_says_no_name(line: &[u8]) -> bool {
    serde_json::from_slice::<Value>(line).is_ok_and(|value| value["event"] == "")
}

macro_rules! read_as {
    ($value:expr, $($command:ident)+) => {
        $(let _ = serde_json::from_value::<<qemu::$command as Command>::Return>($value.clone());)+
    };
}

fn returned(value: &Value) {
    read_as!(value, QueryBlock QueryBlockJobs QueryJobs XDebugQueryBlockGraph QueryBlockExports
        QueryNamedBlockNodes QueryVersion QueryName QueryUuid QueryStatus QueryMemorySizeSummary QueryKvm
        QueryHotpluggableCpus XQueryRamblock QueryMemdev QueryMemoryDevices QueryCpusFast QomList QueryMigrate
        QueryMigrateCapabilities QueryMigrateParameters QueryQmpSchema Cont);
}
