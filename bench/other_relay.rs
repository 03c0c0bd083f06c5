//! Other people's relays with the two faces of `tls_copy.rs`: writes their configuration, starts
//! them, and says "ready" when they listen. All with TLS 1.3 (ssh: its own), certificates of
//! both sides verified against the same CA and name, AES-128-GCM where that can be chosen.

#[path = "other/config.rs"]
mod config;
mod ends;
#[path = "other/ssh.rs"]
mod ssh;

use std::fs;
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::{Args, Parser, ValueEnum};

/// The identity of the far relay; the driver has issued it.
const FAR: &str = "far";
/// Starting, for ssh with a handshake.
const READY_DEADLINE: Duration = Duration::from_secs(15);
/// Between two looks at whether it listens.
const LOOK: Duration = Duration::from_millis(10);

#[derive(Args)]
struct How {
    #[arg(long, value_enum)]
    which: Which,
    /// Folder with the programs; those of the system if they are not there.
    #[arg(long)]
    programs: PathBuf,
    /// Folder with ca-cert.pem, cert.pem and key.pem.
    #[arg(long)]
    tls: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Which {
    Ssh,
    Stunnel,
    Nginx,
    Haproxy,
    Socat,
}

/// One end of a relay: where it takes connections, and where they go.
enum End {
    Near { local: PathBuf, peer: SocketAddr },
    Far { at: SocketAddr, remote: PathBuf },
}

fn main() -> anyhow::Result<()> {
    let (end, how) = match ends::Cli::<How>::parse().end {
        ends::End::Near { local, peer, how } => (End::Near { local, peer }, how),
        ends::End::Far { remote, listen, how } => (End::Far { at: free_port(listen)?, remote }, how),
    };
    let mut command = match how.which {
        Which::Ssh => ssh::command(&how, &end)?,
        which => config::command(which, &how, &end)?,
    };
    let said = fs::File::create(how.tls.join("said"))?;
    command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said);
    let mut child = command.spawn().with_context(|| format!("can't start {command:?}"))?;
    wait_until_listening(&end, &mut child, &how)?;
    println!("ready {}", if let End::Far { at, .. } = end { at.to_string() } else { String::new() });
    std::io::stdout().flush()?;
    // The driver ends it together with us.
    let status = child.wait()?;
    bail!("ended by itself, {status}: {}", last_words(&how))
}

impl How {
    fn program(&self, name: &str) -> Command {
        let own = self.programs.join(name);
        Command::new(if own.exists() { own } else { name.into() })
    }

    /// A file in our folder.
    fn file(&self, name: &str) -> String {
        self.tls.join(name).display().to_string()
    }

    fn write(&self, name: &str, text: &str) -> anyhow::Result<String> {
        fs::write(self.tls.join(name), text)?;
        Ok(self.file(name))
    }
}

/// A port that was free a moment ago: these programs do not tell which one they were given.
fn free_port(at: SocketAddr) -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind(at)?.local_addr()?)
}

fn wait_until_listening(end: &End, child: &mut Child, how: &How) -> anyhow::Result<()> {
    let deadline = Instant::now() + READY_DEADLINE;
    while !is_listening(end)? {
        if let Some(status) = child.try_wait()? {
            bail!("did not start, {status}: {}", last_words(how));
        }
        ensure!(Instant::now() < deadline, "does not listen: {}", last_words(how));
        thread::sleep(LOOK);
    }
    // A unix socket is there a moment before it listens.
    thread::sleep(LOOK);
    Ok(())
}

/// Looked up, not tried: a connection that is tried would be relayed.
fn is_listening(end: &End) -> anyhow::Result<bool> {
    match end {
        End::Near { local, .. } => Ok(local.exists()),
        End::Far { at, .. } => {
            // proc_net(5): "SL LOCAL:PORT REMOTE:PORT STATE …", all in hexadecimal; 0A listens.
            let table = fs::read_to_string("/proc/net/tcp")?;
            let port = format!(":{:04X}", at.port());
            Ok(table.lines().any(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                words.get(1).is_some_and(|local| local.ends_with(&port)) && words.get(3) == Some(&"0A")
            }))
        }
    }
}

fn last_words(how: &How) -> String {
    let mut words = String::new();
    for name in ["said", "log"] {
        words.push_str(&fs::read_to_string(how.tls.join(name)).unwrap_or_default());
    }
    words.lines().rev().take(3).collect::<Vec<_>>().join("; ")
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
