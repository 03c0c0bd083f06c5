//! How far a migration is, in words: one line for a log, the head and the bars of a terminal. Pure but for
//! the rates of single streams, which are measured from line to line.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration};

use crate::api::{Disk, Migration, Phase, Ram, Role};

/// The rate of a stream is over about so long.
const RATE_OVER: Duration = Duration::from_secs(2);

/// The phase, for people.
pub(super) fn phase_words(p: &Migration) -> &'static str {
    match p.phase {
        Phase::Begin => "asking both hosts",
        Phase::Prepare => "getting the destination ready",
        Phase::Mirror => "copying the disks",
        // Disks that have streams of their own are in step by then.
        Phase::Precopy if p.role == Role::Source && p.disks.iter().any(|disk| !disk.ready) => {
            "copying disks and RAM in one stream"
        }
        Phase::Precopy => "copying the RAM",
        Phase::Switchover => "the guest is paused, its disks are finished",
        Phase::Device => "the guest is paused, the rest of it crosses",
        Phase::HandOver => "the destination starts the guest",
        Phase::Confirm => "the guest runs there, tidying up",
        Phase::Done => "moved",
        Phase::RollBack => "rolling back",
        Phase::Failed => "not moved",
        Phase::Undecided => "UNDECIDED",
    }
}

/// A migration's VM and the other host, from where this one stands.
pub(super) fn way(p: &Migration) -> String {
    match p.role {
        Role::Source => format!("{} to {}", p.vm, p.peer),
        Role::Destination => format!("{} from {}", p.vm, p.peer),
    }
}

/// The one thing that matters while it lasts.
pub(super) fn hindrance(progress: &Migration) -> Option<String> {
    let Some(missing) = progress.reconnecting.as_ref() else { return progress.slow.clone() };
    Some(format!("reconnecting, {} s of {} ({})", missing.for_s, missing.of_s, missing.cause))
}

/// Which try it is, where there may be several.
pub(super) fn which_try(progress: &Migration) -> String {
    progress.tries.as_ref().map_or_else(String::new, |t| format!(", try {} of {}", t.number, t.of))
}

/// The wait for the next try, while there is one.
pub(super) fn waiting(progress: &Migration) -> Option<String> {
    let next_in_ms = progress.tries.as_ref()?.next_in_ms?;
    let last = progress.tries.as_ref()?.last_failure.as_deref().unwrap_or_default();
    let head = format!("{}{}", way(progress), which_try(progress));
    Some(format!("{head}, next in {} s: {last}", next_in_ms.div_ceil(1000)))
}

/// All of it in one line.
pub(super) fn line(progress: &Migration) -> String {
    if let Some(waiting) = waiting(progress) {
        return waiting;
    }
    let head = format!("{}{}", way(progress), which_try(progress));
    let (name, words) = (progress.phase.name(), phase_words(progress));
    format!("{head}: {name} ({words}), {}", pace(progress))
}

/// How far, how fast, how long still; or what keeps it.
pub(super) fn pace(progress: &Migration) -> String {
    let mut parts = Vec::new();
    match &progress.whole {
        Some(whole) => parts.push(format!(
            "{}.{} %, {} of {}",
            whole.permille / 10,
            whole.permille % 10,
            HumanBytes(whole.done_bytes),
            HumanBytes(whole.done_bytes + whole.left_bytes)
        )),
        None => parts.push(format!("{} have come", HumanBytes(progress.stream_bytes()))),
    }
    if let Some(c) = progress.comparison.filter(|_| progress.phase == Phase::Mirror) {
        parts.push(format!(
            "{} of {} equal on both hosts",
            HumanBytes(c.equal_bytes),
            HumanBytes(c.of_bytes)
        ));
    }
    match hindrance(progress) {
        Some(hindrance) => parts.push(hindrance),
        None => {
            parts.push(format!("{}/s", HumanBytes(progress.rate_bytes_per_s)));
            parts.extend(left(progress));
            parts.extend(held_up(progress));
            parts.extend(slowed(progress));
        }
    }
    parts.join(", ")
}

/// What can be foretold.
pub(super) fn left(progress: &Migration) -> Vec<String> {
    let Some(whole) = &progress.whole else { return Vec::new() };
    let left = whole.left_s.map(|s| format!("about {} left", HumanDuration(Duration::from_secs(s))));
    let pause = whole.downtime_ms.map(|ms| format!("pause of about {ms} ms"));
    left.into_iter().chain(pause).collect()
}

/// Why it is not faster, where that is known.
pub(super) fn held_up(progress: &Migration) -> Option<String> {
    let words = progress.held_up_by?.words()?;
    Some(format!("held up by {words}"))
}

/// To which disks the guest's writes are made slower.
fn slowed(progress: &Migration) -> Vec<String> {
    let words = |disk: &Disk| Some(format!("{}: {}", disk.name, disk.slowed?.words()));
    progress.disks.iter().filter_map(words).collect()
}

/// A disk's copy or the RAM's, as a bar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bar {
    pub(super) name: String,
    pub(super) done_bytes: u64,
    pub(super) total_bytes: u64,
    /// Beside the bar.
    pub(super) text: String,
}

/// The last bytes of each stream, for its rate.
#[derive(Debug, Default)]
pub(super) struct Rates(BTreeMap<String, Rate>);

#[derive(Debug)]
struct Rate {
    at: Instant,
    bytes: u64,
    per_s: u64,
}

impl Rates {
    /// One for each disk and the RAM.
    pub(super) fn bars(&mut self, progress: &Migration, now: Instant) -> Vec<Bar> {
        let disks = progress.disks.iter().map(|disk| (disk_bar(disk, progress.role), disk.stream_bytes));
        let ram = progress.ram.iter().map(|ram| (ram_bar(ram), ram.stream_bytes));
        let bars: Vec<_> = disks.chain(ram).collect();
        bars.into_iter().map(|(bar, bytes)| self.with_rate(bar, bytes, now)).collect()
    }

    fn with_rate(&mut self, mut bar: Bar, bytes: u64, now: Instant) -> Bar {
        let fresh = || Rate { at: now, bytes, per_s: 0 };
        let rate = self.0.entry(bar.name.clone()).or_insert_with(fresh);
        let long = now.duration_since(rate.at);
        if bytes < rate.bytes {
            // A further try begins anew.
            *rate = fresh();
        } else if long >= RATE_OVER {
            let per_s = ((bytes - rate.bytes) as f64 / long.as_secs_f64()) as u64;
            *rate = Rate { at: now, bytes, per_s };
        }
        bar.text = format!("{}/s {}", HumanBytes(rate.per_s), bar.text);
        bar
    }
}

fn disk_bar(disk: &Disk, role: Role) -> Bar {
    let (done_bytes, total_bytes) = match (role, disk.left_bytes) {
        (Role::Source, Some(left)) => {
            let done = disk.stream_bytes + disk.saved_bytes;
            (done, done + left)
        }
        _ => (disk.done_bytes, disk.total_bytes),
    };
    let text = match (disk.slowed, disk.ready) {
        (Some(slowed), _) => slowed.words(),
        (None, true) => "in step",
        (None, false) => "",
    };
    let text = text.to_owned();
    Bar { name: format!("disk {}", disk.name), done_bytes, total_bytes, text }
}

fn ram_bar(ram: &Ram) -> Bar {
    let total_bytes = ram.left_bytes.map_or(ram.total_bytes, |left| ram.stream_bytes + left);
    let text = if ram.passes > 0 { format!("pass {}", ram.passes) } else { String::new() };
    Bar { name: "RAM".into(), done_bytes: ram.stream_bytes, total_bytes, text }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::api::{HeldUp, Reconnecting, Whole};
    use crate::migrate::progress::Progress;

    fn copying() -> Migration {
        let mut known = Progress::new(Uuid::nil(), "web1", Role::Source, "bravo");
        known.phase = Phase::Mirror;
        known.rate_bytes_per_s = 100 << 20;
        known.held_up_by = Some(HeldUp::Limit);
        known.whole = Some(Whole {
            done_bytes: 1 << 30,
            left_bytes: 3 << 30,
            permille: 251,
            left_s: Some(31),
            downtime_ms: Some(80),
            ..Whole::default()
        });
        Migration::new(known, "alpha")
    }

    #[test]
    fn a_line_says_how_far_how_fast_and_how_long_or_what_keeps_it() {
        let mut migration = copying();
        let said = "web1 to bravo: mirror (copying the disks), 25.1 %, 1.00 GiB of 4.00 GiB, 100.00 MiB/s, \
                    about 31 seconds left, pause of about 80 ms, held up by a limit (`vmferry limit`)";
        assert_eq!(line(&migration), said);
        let cause = "timed out".into();
        migration.reconnecting = Some(Reconnecting { for_s: 3, of_s: 60, cause });
        assert!(line(&migration).ends_with("of 4.00 GiB, reconnecting, 3 s of 60 (timed out)"));
        migration.whole = Some(Whole::default());
        (migration.reconnecting, migration.held_up_by) = (None, Some(HeldUp::Unknown));
        assert!(line(&migration).ends_with("100.00 MiB/s"), "nothing is foretold: {}", line(&migration));
    }

    #[test]
    fn a_bar_counts_what_is_copied_and_its_rate_begins_anew_with_a_try() {
        let (mut rates, begin) = (Rates::default(), Instant::now());
        let mut migration = copying();
        let disk = |stream_bytes, left| Disk {
            name: "vda".into(),
            total_bytes: 40 << 30,
            stream_bytes,
            left_bytes: Some(left),
            ..Disk::default()
        };
        for (second, bytes, rate) in [(0, 0, "0 B/s "), (2, 20 << 20, "10.00 MiB/s "), (3, 0, "0 B/s ")] {
            migration.disks = vec![disk(bytes, 5)];
            let bars = rates.bars(&migration, begin + Duration::from_secs(second));
            let expected =
                Bar { name: "disk vda".into(), done_bytes: bytes, total_bytes: bytes + 5, text: rate.into() };
            assert_eq!(bars, [expected]);
        }
    }
}
