//! What lies between the two relays: loopback, a slow link, or a long one. Network namespaces of
//! our own that go when this program ends; nothing of the machine is changed. Must not know who
//! relays.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, ensure};
use nix::sched::{CloneFlags, setns, unshare};

use crate::delay_line;

/// Congestion control of every connection, whoever makes it: a route can say so, a program often
/// can't.
pub(crate) const CONGESTION: &str = "cubic";
/// The interface of each end.
const LINK: &str = "link0";
/// Largest TCP buffers on a long road (the machine's own may be smaller than what is under way).
const LONG_BUFFER_BYTES: usize = 64 << 20;
/// Largest packet on the long road: a jumbo frame. Larger ones would make the delay line cheaper,
/// but TCP's windows then hold so few that they hardly open.
const LONG_MTU: u32 = 9000;
/// What VXLAN puts around it.
const VXLAN_BYTES: u32 = 50;

/// One of the two ends.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Near,
    Far,
}

/// The road of one measurement. `None`: both ends are in our own namespace.
pub(crate) struct Road(Option<[Namespace; 2]>);

impl Road {
    /// Both ends on the loopback interface.
    pub(crate) fn loopback() -> Self {
        Self(None)
    }

    /// A link of so many megabits per second, with a bottleneck queue of so many bytes at each end.
    pub(crate) fn limited(mbit: u32, queue_bytes: u32) -> anyhow::Result<Self> {
        let ends = [Namespace::new()?, Namespace::new()?];
        let [near, far] = &ends;
        near.ip(&format!("link add {LINK} type veth peer name {LINK} netns {}", far.path()))?;
        for (end, number) in ends.iter().zip(1..) {
            end.ip(&format!("addr add 10.77.0.{number}/24 dev {LINK}"))?;
            end.ip(&format!("link set {LINK} up"))?;
            end.ip(&format!("route replace 10.77.0.0/24 dev {LINK} congctl {CONGESTION}"))?;
            let tbf = format!("qdisc add dev {LINK} root tbf rate {mbit}mbit burst 64kb limit {queue_bytes}");
            end.run("tc", &tbf)?;
        }
        Ok(Self(Some(ends)))
    }

    /// A link without a limit whose packets take half of `round_trip` each way: VXLAN through a
    /// delay line in the middle. `ethtool` keeps checksums in software: a delayed packet meets no
    /// device that would fill them in.
    pub(crate) fn delayed(round_trip: Duration, ethtool: &str) -> anyhow::Result<Self> {
        let ends = [Namespace::new()?, Namespace::new()?];
        let middle = Namespace::new()?;
        let outer = LONG_MTU + VXLAN_BYTES;
        for (end, number) in ends.iter().zip(1..) {
            let (ours, theirs) = (format!("10.78.{number}.1"), format!("10.78.{number}.2"));
            let way = format!("way{number}");
            middle.ip(&format!(
                "link add {way} mtu {outer} type veth peer name way mtu {outer} netns {}",
                end.path()
            ))?;
            middle.ip(&format!("addr add {ours}/24 dev {way}"))?;
            middle.ip(&format!("link set {way} up"))?;
            end.ip(&format!("addr add {theirs}/24 dev way"))?;
            end.ip("link set way up")?;
            end.ip(&format!(
                "link add {LINK} type vxlan id 7 local {theirs} remote {ours} dstport 4789 dev way"
            ))?;
            end.ip(&format!("link set {LINK} mtu {LONG_MTU} up"))?;
            end.run(ethtool, &format!("-K {LINK} tx off"))?;
            end.ip(&format!("addr add 10.77.0.{number}/24 dev {LINK}"))?;
            end.ip(&format!("route replace 10.77.0.0/24 dev {LINK} congctl {CONGESTION}"))?;
            end.inside(|| {
                fs::write("/proc/sys/net/ipv4/tcp_rmem", format!("4096 131072 {LONG_BUFFER_BYTES}"))?;
                fs::write("/proc/sys/net/ipv4/tcp_wmem", format!("4096 65536 {LONG_BUFFER_BYTES}"))
            })?;
        }
        middle.inside(|| delay_line::start(round_trip / 2))?;
        Ok(Self(Some(ends)))
    }

    /// Starts a program at one of the ends.
    pub(crate) fn spawn(&self, end: End, command: &mut Command) -> anyhow::Result<Child> {
        match &self.0 {
            None => Ok(command.spawn()?),
            Some(ends) => ends[usize::from(end == End::Far)].inside(|| command.spawn()),
        }
    }

    /// Where the far relay is to listen.
    pub(crate) fn listen(&self) -> &'static str {
        if self.0.is_some() { "10.77.0.2:0" } else { "127.0.0.1:0" }
    }
}

/// Leaves the machine's network for one of our own, in which every connection has the same
/// congestion control. To be called before any thread is started.
pub(crate) fn leave_the_machine() -> anyhow::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("a network namespace needs root")?;
    run("ip", "link set lo up")?;
    for prefix in ["127.0.0.0/8", "127.0.0.1"] {
        let route = format!("route replace local {prefix} dev lo table local proto kernel scope host");
        run("ip", &format!("{route} src 127.0.0.1 congctl {CONGESTION}"))?;
    }
    Ok(())
}

/// A network namespace without a name: it goes with the last that holds it.
struct Namespace(File);

impl Namespace {
    fn new() -> anyhow::Result<Self> {
        let made = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET)?;
                File::open("/proc/thread-self/ns/net")
            });
            thread.join().map_err(|_| io::Error::other("a thread panicked"))?
        });
        Ok(Self(made.context("can't make a network namespace")?))
    }

    /// As programs of this machine may open it.
    fn path(&self) -> String {
        let path = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()));
        path.display().to_string()
    }

    /// Calls `make` inside: a socket or a process that it makes stays there. The namespace belongs
    /// to the thread that entered it, so one that ends with the call.
    fn inside<T: Send>(&self, make: impl FnOnce() -> io::Result<T> + Send) -> anyhow::Result<T> {
        let made = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.0, CloneFlags::CLONE_NEWNET)?;
                make()
            });
            thread.join().map_err(|_| io::Error::other("a thread panicked"))?
        });
        Ok(made?)
    }

    fn ip(&self, words: &str) -> anyhow::Result<()> {
        self.run("ip", words)
    }

    fn run(&self, program: &str, words: &str) -> anyhow::Result<()> {
        let said = self.inside(|| Command::new(program).args(words.split(' ')).output());
        judge(program, words, said)
    }
}

fn run(program: &str, words: &str) -> anyhow::Result<()> {
    judge(program, words, Command::new(program).args(words.split(' ')).output().map_err(Into::into))
}

fn judge(program: &str, words: &str, said: anyhow::Result<std::process::Output>) -> anyhow::Result<()> {
    let said = said.with_context(|| format!("can't run {program}"))?;
    let complaint = String::from_utf8_lossy(&said.stderr);
    ensure!(said.status.success(), "`{program} {words}` failed: {}", complaint.trim());
    Ok(())
}
