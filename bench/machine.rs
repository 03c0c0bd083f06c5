//! What the figures were measured on. Without this a figure means nothing.

use std::fs;
use std::process::Command;

/// Lines of Markdown.
pub(crate) fn describe(aead: &str, congestion: &str) -> String {
    let cpuinfo = read("/proc/cpuinfo");
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|l| l.starts_with(name));
        let value = line.and_then(|l| l.split_once(':'));
        value.map_or("unknown", |(_, v)| v.trim()).to_owned()
    };
    let flags = field("flags");
    let known = ["hypervisor", "aes", "vaes", "avx2", "avx512f", "erms", "fsrm"];
    let flags: Vec<&str> = known.into_iter().filter(|known| flags.split(' ').any(|f| f == *known)).collect();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let glibc = output("ldd", &["--version"]);
    let lines = [
        format!(
            "- processor: {} (family {}, model {}), {cores} cores, {}",
            field("model name"),
            field("cpu family"),
            field("model\t"),
            flags.join(" ")
        ),
        format!(
            "- kernel: {}; {}",
            read("/proc/sys/kernel/osrelease").trim(),
            glibc.lines().next().unwrap_or_default()
        ),
        format!("- sealed by: {aead}; congestion control: {congestion}"),
        format!(
            "- built: {}",
            if cfg!(debug_assertions) {
                "dev profile (libraries optimised, own code barely)"
            } else {
                "release profile"
            }
        ),
        format!("- load average before the first round: {}", load()),
    ];
    lines.join("\n")
}

pub(crate) fn load() -> String {
    let text = read("/proc/loadavg");
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn output(program: &str, args: &[&str]) -> String {
    let done = Command::new(program).args(args).output();
    done.map(|d| String::from_utf8_lossy(&d.stdout).into_owned()).unwrap_or_default()
}
