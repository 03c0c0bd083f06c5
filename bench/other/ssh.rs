//! ssh -L and an sshd of its own, with keys made for the occasion. All local connections share
//! one TCP connection, as with vmferry.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, ensure};
use nix::unistd::{User, getuid};

use super::{End, How, text};

const CIPHER: &str = "aes128-gcm@openssh.com";

pub(super) fn command(how: &How, end: &End) -> anyhow::Result<Command> {
    match end {
        End::Near { local, peer } => near(how, &text(local), *peer),
        End::Far { at, .. } => far(how, *at),
    }
}

/// Both faces find the keys beside the folders of the certificates.
fn keys(how: &How) -> anyhow::Result<PathBuf> {
    Ok(how.tls.parent().context("no folder for keys")?.join("ssh"))
}

/// Who sshd runs as, and who logs in. Root would need a system user for sshd, which a machine
/// without an sshd does not have.
fn account() -> anyhow::Result<User> {
    let uid = getuid();
    let name = if uid.is_root() { "nobody" } else { "" };
    let user = if name.is_empty() { User::from_uid(uid)? } else { User::from_name(name)? };
    user.context("no account to run sshd as")
}

fn far(how: &How, at: std::net::SocketAddr) -> anyhow::Result<Command> {
    let (keys, account) = (keys(how)?, account()?);
    let file = |name: &str| text(&keys.join(name));
    if !keys.exists() {
        fs::create_dir(&keys)?;
        for name in ["host", "client"] {
            let made = how
                .program("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f", &file(name)])
                .status()?;
            ensure!(made.success(), "ssh-keygen failed");
        }
        fs::copy(keys.join("client.pub"), keys.join("allowed"))?;
        fs::write(keys.join("known"), format!("far {}", fs::read_to_string(keys.join("host.pub"))?))?;
    }
    let config = how.write(
        "sshd.conf",
        &format!(
            "ListenAddress {at}\nHostKey {}\nAuthorizedKeysFile {}\nCiphers {CIPHER}\n\
             PidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\n\
             KbdInteractiveAuthentication no\nAllowStreamLocalForwarding yes\nLogLevel ERROR\n\
             MaxSessions 10000\n",
            file("host"),
            file("allowed"),
        ),
    )?;
    let mut command = how.program("sshd");
    if getuid().is_root() {
        // Not root, and yet able to read its files and to reach the sink.
        let sshd = command.get_program().to_owned();
        command = Command::new("setpriv");
        command.args([&format!("--reuid={}", account.uid), &format!("--regid={}", account.gid)]);
        command
            .args(["--clear-groups", "--inh-caps=+dac_override", "--ambient-caps=+dac_override"])
            .arg(sshd);
    }
    command.args(["-D", "-e", "-f", &config]);
    Ok(command)
}

fn near(how: &How, local: &str, peer: std::net::SocketAddr) -> anyhow::Result<Command> {
    let (keys, account) = (keys(how)?, account()?);
    let remote = how.tls.parent().context("no folder")?.join("remote.sock");
    let mut command = how.program("ssh");
    command.args(["-F", "none", "-N", "-T", "-c", CIPHER]);
    command.args(["-i", &text(&keys.join("client")), "-p", &peer.port().to_string()]);
    for option in [
        "BatchMode=yes",
        "IdentitiesOnly=yes",
        "HostKeyAlias=far",
        "StrictHostKeyChecking=yes",
        "ExitOnForwardFailure=yes",
        "Compression=no",
        "LogLevel=ERROR",
        &format!("UserKnownHostsFile={}", text(&keys.join("known"))),
    ] {
        command.args(["-o", option]);
    }
    command.arg("-L").arg(format!("{local}:{}", text(&remote)));
    command.arg(format!("{}@{}", account.name, peer.ip()));
    Ok(command)
}
