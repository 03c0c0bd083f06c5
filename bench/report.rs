//! The text of `RESULTS.md` as it grows: what each table says, and the command that repeats it.

use std::fmt::Write;

use vmferry::mux::Config;

use crate::latency::BULK_STREAMS;
use crate::machine;

const RATIOS: &str = "*CPU ratio*: processor seconds per byte of both relays, user and system (below 1 \
    is better). *Speed ratio*: bytes per second (above 1 is better); generators, sinks and both \
    relays share the cores.";

/// The results so far.
pub(crate) struct Report {
    text: String,
}

impl Report {
    /// Begins with what it is measured on.
    pub(crate) fn begin(machine: &str) -> Self {
        let text = format!(
            "# Results\n\n\
             Written by `bench/run.sh` (`make bench`). Repeat it before you believe it: figures of \
             another machine say little about yours, and two cores that others use too say less \
             about time than about processor seconds.\n\n{machine}\n\n\
             Generators → unix sockets → relay `near` → TCP → relay `far` → unix sockets → sinks, all \
             on this machine, with mutual TLS 1.3 and AES-128-GCM unless said otherwise; without a \
             word on the road it is loopback. Contenders take turns within a round. Ratios are taken \
             within a round, to the contender in **bold**; shown is the median over the rounds and \
             [least–greatest]. *again* is the reference itself: its distance from 1 is the noise. \
             Processor time counts from when a first connection has gone through; memory is the \
             largest of all rounds (with 4 MiB of what starts them for the programs of others).\n"
        );
        Self { text }
    }

    /// A section: what was done, the command that repeats it, what is asked of vmferry, the table.
    pub(crate) fn section(&mut self, title: &str, what: &str, command: &str, table: &str) {
        // Writing to a String can't fail.
        let _ = write!(
            self.text,
            "\n## {title}\n\n{what}\n\nAgain: `bench/run.sh {command}`. Load average afterwards: {}.\n\n{table}",
            machine::load(),
        );
    }

    /// A section without figures.
    pub(crate) fn failed(&mut self, title: &str, why: &str) {
        let _ = write!(self.text, "\n## {title}\n\n**Not measured**: {why}.\n");
    }

    /// The whole.
    pub(crate) fn end(self) -> String {
        self.text
    }
}

pub(crate) fn relays(mib: u64) -> String {
    format!(
        "{mib} MiB per round through one local connection. Asked of vmferry: CPU ratio at most 1.10, speed \
         ratio at least 0.95. {RATIOS} The others run with one worker, their buffers at 64 KiB where \
         they can be set; ssh and socat seal in other ways, see `bench/other`."
    )
}

pub(crate) fn streams(mib: u64) -> String {
    let config = Config::default();
    format!(
        "{mib} MiB per round over all streams together, from when all are open. Asked of vmferry: speed ratio \
         at least 0.9 to its own with one stream. A peer can make an agent hold {} MiB at most \
         (`budget_bytes`), and what it has not acknowledged {} MiB (`replay_cap_bytes`). {RATIOS}",
        config.budget_bytes >> 20,
        config.replay_cap_bytes >> 20,
    )
}

pub(crate) fn latency(requests: usize) -> String {
    format!(
        "A request of 1 KiB and its reply of 1 KiB, alone and while {BULK_STREAMS} bulk streams send as \
         fast as they can; {requests} requests each, or what 3 s \
         allow. vmferry and ssh carry all five in one connection, the \
         copies each in its own (ratios below 1 are better). On loopback the processor is the queue, \
         not the wire."
    )
}

pub(crate) fn link(requests: usize, mbit: u32, queue_bytes: u32) -> String {
    format!(
        "As before, over a link of {mbit} Mbit/s (`tbf`, MTU 1500) with a queue of {} KiB in front of it, \
         which alone delays by {:.1} ms when it is full; at most {requests} requests each, or what 3 s allow.",
        queue_bytes / 1024,
        f64::from(queue_bytes) * 8.0 / f64::from(mbit) / 1e3,
    )
}

pub(crate) fn delay(milliseconds: u64, seconds: u64) -> String {
    format!(
        "One stream over a round trip of {milliseconds} ms (a delay line in user space that loses nothing \
         and has no limit but the processor's), {seconds} s after the windows had 2 s to grow; TCP buffers \
         of 64 MiB. Asked of vmferry: speed ratio at least 0.9 to TCP without TLS. {RATIOS}"
    )
}

pub(crate) fn resets(every: u64, seconds: u64) -> String {
    format!(
        "One stream for {seconds} s, its connection reset by the kernel every {every} s and taken up again \
         by the session; every byte was checked. Asked of vmferry: speed ratio at least 0.9. {RATIOS}"
    )
}
