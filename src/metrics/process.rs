//! The agent's process, by the names that every Prometheus client gives these figures. From `/proc`, where
//! another user's eyes are kept out: what cannot be read is left out, and is not shown as 0.

use std::fs;

use prometheus::{CounterVec, Error, GaugeVec, Opts};

use super::register::{Kind, Register};

/// Clock ticks in a second, in what the kernel tells programs (proc(5)).
const TICKS_PER_S: f64 = 100.0;
/// The smallest page of every kernel that this is built for.
const PAGE_BYTES: f64 = 4096.0;

/// What is measured of the process.
#[derive(Debug)]
pub(super) struct ProcessMetrics {
    cpu: CounterVec,
    start: GaugeVec,
    resident: GaugeVec,
    size: GaugeVec,
    threads: GaugeVec,
    open_fds: GaugeVec,
    max_fds: GaugeVec,
}

impl ProcessMetrics {
    pub(super) fn new(register: &Register) -> Result<Self, Error> {
        let gauge = |name: &str, help: &str| {
            register.add(Kind::Gauge, GaugeVec::new(Opts::new(format!("process_{name}"), help), &[])?)
        };
        let cpu = Opts::new("process_cpu_seconds_total", "Processor time that this process has used.");
        Ok(Self {
            cpu: register.add(Kind::Counter, CounterVec::new(cpu, &[])?)?,
            start: gauge("start_time_seconds", "When this process began, in seconds since the epoch.")?,
            resident: gauge("resident_memory_bytes", "Memory of this process that is in RAM.")?,
            size: gauge("virtual_memory_bytes", "Address space of this process.")?,
            threads: gauge("threads", "Threads of this process: two, one for each processor and session.")?,
            open_fds: gauge(
                "open_fds",
                "Open descriptors of this process; absent where the agent may not look at its own.",
            )?,
            max_fds: gauge("max_fds", "How many descriptors this process may have open.")?,
        })
    }

    /// As it is now.
    pub(super) fn set(&self) {
        let set = |gauge: &GaugeVec, value: Option<f64>| match value {
            Some(value) => gauge.with_label_values::<&str>(&[]).set(value),
            None => gauge.reset(),
        };
        let stat = fs::read_to_string("/proc/self/stat").ok();
        let stat = stat.as_deref().and_then(Stat::parse);
        if let Some(stat) = &stat {
            let cpu = self.cpu.with_label_values::<&str>(&[]);
            cpu.inc_by((stat.cpu_s - cpu.get()).max(0.0));
        }
        let boot = fs::read_to_string("/proc/stat").ok().and_then(|text| boot_time(&text));
        set(&self.start, stat.as_ref().zip(boot).map(|(stat, boot)| boot + stat.start_s));
        set(&self.resident, stat.as_ref().map(|stat| stat.resident_bytes));
        set(&self.size, stat.as_ref().map(|stat| stat.size_bytes));
        set(&self.threads, stat.as_ref().map(|stat| stat.threads));
        // One of them is the folder that is being read.
        let open = fs::read_dir("/proc/self/fd").ok().map(|fds| fds.count().saturating_sub(1) as f64);
        set(&self.open_fds, open);
        let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE);
        set(&self.max_fds, limit.ok().map(|(soft, _)| soft as f64));
    }
}

/// Of proc(5), `/proc/PID/stat`.
#[derive(Debug, PartialEq)]
struct Stat {
    cpu_s: f64,
    threads: f64,
    /// After the machine's start.
    start_s: f64,
    size_bytes: f64,
    resident_bytes: f64,
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // The program's name, in brackets, may have spaces and brackets in it.
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        // Fields are counted from 1 in the manual, and the third is the first one here.
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        Some(Self {
            cpu_s: (field(14)? + field(15)?) / TICKS_PER_S,
            threads: field(20)?,
            start_s: field(22)? / TICKS_PER_S,
            size_bytes: field(23)?,
            resident_bytes: field(24)? * PAGE_BYTES,
        })
    }
}

/// Seconds since the epoch.
fn boot_time(stat: &str) -> Option<f64> {
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_and_spaces_shifts_no_field() {
        let text = "7 (vm) f (x) S 1 7 7 0 -1 4194560 9 0 0 0 250 50 0 0 20 0 5 0 12345 8192000 100 1844";
        let expected = Stat {
            cpu_s: 3.0,
            threads: 5.0,
            start_s: 123.45,
            size_bytes: 8_192_000.0,
            resident_bytes: 409_600.0,
        };
        assert_eq!(Stat::parse(text), Some(expected));
        assert_eq!(Stat::parse("7 (vm"), None);
        assert_eq!(boot_time("cpu 1 2\nbtime 1700000000\n"), Some(1_700_000_000.0));
    }
}
