//! A tcpdump on the link, from before the first packet to after the last, that lost none of them.

use std::fs;
use std::net::UdpSocket;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::net::{Host, LINK, Net};
use super::pcap::{SENTINEL, Traffic};
use super::process::{Running, SHORT, start, wait_for};

/// Of the kernel's ring, so that a burst at full speed is not lost.
const RING_KIB: &str = "65536";
/// Where the last packet goes: nobody answers there.
pub(super) const DISCARD_PORT: u16 = 9;

/// A running capture, taken at bravo's end of the link.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Running,
    file: PathBuf,
    alpha: Host,
    bravo_v4: String,
}

impl Capture {
    /// Starts capturing; returns when packets are being captured.
    pub fn start(net: &Net, name: &str) -> Result<Self> {
        Self::start_with(net, name, "")
    }

    /// The same without the contents of IPv4 connections, only their beginnings: what crosses the
    /// link may be more than a busy machine can write down.
    pub fn start_without_contents(net: &Net, name: &str) -> Result<Self> {
        Self::start_with(net, name, "not (ip and tcp) or tcp[tcpflags] & tcp-syn != 0")
    }

    fn start_with(net: &Net, name: &str, filter: &str) -> Result<Self> {
        let file = net.bravo.dir.join(format!("{name}.pcap"));
        let words = ["-i", LINK, "-n", "-s", "0", "-U", "-Z", "root", "-B", RING_KIB, "-w"];
        let mut tcpdump = start(net.bravo.command("tcpdump").args(words).arg(&file).arg(filter))?;
        wait_for("tcpdump to listen", SHORT, || {
            let said = tcpdump.stderr()?;
            ensure!(tcpdump.ended()?.is_none(), "tcpdump ended: {said}");
            Ok(said.contains("listening on").then_some(()))
        })?;
        Ok(Self { tcpdump, file, alpha: net.alpha.clone(), bravo_v4: net.bravo.v4.clone() })
    }

    /// Ends the capture and reads it, counting each of `texts`.
    ///
    /// # Errors
    /// The kernel dropped packets: then nothing can be said about what was on the wire.
    pub fn finish(self, texts: &[&[u8]]) -> Result<Traffic> {
        // What the kernel still holds is lost when tcpdump ends; a last packet of our own, once
        // it is in the file, says that all before it are.
        self.send_sentinel()?;
        wait_for("the last packet in the capture", SHORT, || {
            Ok(ends_with_sentinel(&self.file)?.then_some(()))
        })?;
        self.tcpdump.signal(Signal::SIGINT)?;
        let said = self.tcpdump.wait(SHORT)?.stderr;
        let dropped = said
            .lines()
            .find_map(|l| l.strip_suffix(" packets dropped by kernel"))
            .context("tcpdump told no count")?;
        ensure!(dropped.trim() == "0", "the kernel dropped {dropped} packets of the capture");
        Traffic::read(&self.file, texts)
    }

    fn send_sentinel(&self) -> Result<()> {
        let target = (self.bravo_v4.as_str(), DISCARD_PORT);
        self.alpha.inside(|| UdpSocket::bind("0.0.0.0:0")?.send_to(SENTINEL, target)).map(drop)
    }
}

fn ends_with_sentinel(file: &Path) -> Result<bool> {
    /// More than a few packets that may come after the sentinel.
    const LOOK_BACK: u64 = 1 << 20;
    let length = fs::metadata(file)?.len();
    let from = length.saturating_sub(LOOK_BACK);
    let mut tail = vec![0; usize::try_from(length - from)?];
    fs::File::open(file)?.read_exact_at(&mut tail, from)?;
    Ok(tail.windows(SENTINEL.len()).any(|w| w == SENTINEL))
}
