//! Relays that carry unix sockets from one host to another: socat and stunnel with mutual TLS, and ssh -L with
//! an sshd of its own. Each socket of libvirt's has a port, but ssh's share one connection.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::support::Host;
use crate::support::process::{Running, SHORT, run, start, wait_for};

/// Where the sockets are, on both hosts.
pub(crate) const FOLDER: &str = "/run/relay";
const LIBVIRT: &str = "/run/libvirt/libvirt-sock";
/// Of each socket's relay at the destination.
const SOCKETS: [(&str, u16); 3] = [("libvirt.sock", 7001), ("ram.sock", 7002), ("nbd.sock", 7003)];
const SSH_PORT: u16 = 7022;
const BUFFER_BYTES: &str = "65536";

/// Which one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Relay {
    Socat,
    Stunnel,
    Ssh,
}

/// A pair of ends at work. Dropped, it ends.
pub(crate) struct Pair(#[allow(dead_code)] Vec<Running>);

/// What relays need.
pub(crate) struct Kit {
    /// The programs.
    pub(crate) programs: PathBuf,
    /// Keys of ssh.
    pub(crate) keys: PathBuf,
}

impl Relay {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Socat => "socat, TLS",
            Self::Stunnel => "stunnel",
            Self::Ssh => "ssh -L",
        }
    }

    /// Starts both ends; returns when the source's sockets are there.
    pub(crate) fn start(self, kit: &Kit, from: &Host, to: &Host) -> Result<Pair> {
        for host in [from, to] {
            run(host.command("rm").args(["-rf", FOLDER]), SHORT)?;
            // The destination's QEMU makes its sockets there.
            run(host.command("install").args(["-d", "-m", "0777", FOLDER]), SHORT)?;
        }
        let running = match self {
            Self::Socat => socat(kit, from, to)?,
            Self::Stunnel => stunnel(kit, from, to)?,
            Self::Ssh => ssh(kit, from, to)?,
        };
        let pair = Pair(running);
        for (socket, _) in SOCKETS {
            wait_for(&format!("{} to listen on {socket}", self.name()), SHORT, || {
                let there = from.command("test").args(["-S", &format!("{FOLDER}/{socket}")]).status()?;
                Ok(there.success().then_some(()))
            })?;
        }
        run(from.command("sh").arg("-c").arg(format!("chmod 0666 {FOLDER}/*.sock")), SHORT)?;
        Ok(pair)
    }
}

/// What a socket is connected to at the destination.
fn target(socket: &str) -> String {
    if socket == "libvirt.sock" { LIBVIRT.to_owned() } else { format!("{FOLDER}/{socket}") }
}

fn tls(host: &Host, file: &str) -> String {
    host.dir.join("tls").join(file).display().to_string()
}

fn socat(kit: &Kit, from: &Host, to: &Host) -> Result<Vec<Running>> {
    let options = |host: &Host| {
        let [cert, key, ca] = ["cert.pem", "key.pem", "ca-cert.pem"].map(|file| tls(host, file));
        format!("nodelay,cert={cert},key={key},cafile={ca},verify=1,openssl-min-proto-version=TLS1.3")
    };
    let socat = |host: &Host, near: &str, far: &str| {
        start(host.command(kit.programs.join("socat")).args(["-b", BUFFER_BYTES, near, far]))
    };
    let mut running = Vec::new();
    for (socket, port) in SOCKETS {
        let listen = format!("OPENSSL-LISTEN:{port},reuseaddr,fork,{}", options(to));
        running.push(socat(to, &listen, &format!("UNIX-CONNECT:{}", target(socket)))?);
        let connect = format!("OPENSSL:{}:{port},{},commonname={}", to.v4, options(from), to.name);
        running.push(socat(from, &format!("UNIX-LISTEN:{FOLDER}/{socket},fork"), &connect)?);
    }
    Ok(running)
}

fn stunnel(kit: &Kit, from: &Host, to: &Host) -> Result<Vec<Running>> {
    let head = |host: &Host| {
        let [cert, key, ca] = ["cert.pem", "key.pem", "ca-cert.pem"].map(|file| tls(host, file));
        format!(
            "foreground = yes\ndebug = err\npid =\nsocket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\n\
             cert = {cert}\nkey = {key}\nCAfile = {ca}\nverifyChain = yes\nsslVersion = TLSv1.3\n\
             ciphersuites = TLS_AES_128_GCM_SHA256\nsessionResume = no\n"
        )
    };
    let mut far = head(to);
    let mut near = head(from);
    for (socket, port) in SOCKETS {
        let target = target(socket);
        far.push_str(&format!("[{socket}]\naccept = {port}\nconnect = {target}\nrequireCert = yes\n"));
        near.push_str(&format!(
            "[{socket}]\nclient = yes\naccept = {FOLDER}/{socket}\nconnect = {}:{port}\ncheckHost = {}\n",
            to.v4, to.name
        ));
    }
    let begin = |host: &Host, text: &str| -> Result<Running> {
        let file = host.dir.join("stunnel.conf");
        fs::write(&file, text)?;
        start(host.command(kit.programs.join("stunnel4")).arg(&file))
    };
    Ok(vec![begin(to, &far)?, begin(from, &near)?])
}

/// Makes the keys.
pub(crate) fn keys(kit: &Kit) -> Result<()> {
    fs::create_dir(&kit.keys)?;
    for name in ["host", "client"] {
        let file = kit.keys.join(name).display().to_string();
        let words = ["-q", "-t", "ed25519", "-N", "", "-f", &file];
        run(Command::new(kit.programs.join("ssh-keygen")).args(words), SHORT)?;
    }
    fs::copy(kit.keys.join("client.pub"), kit.keys.join("allowed"))?;
    let host = fs::read_to_string(kit.keys.join("host.pub"))?;
    fs::write(kit.keys.join("known"), format!("far {host}"))?;
    fs::set_permissions(&kit.keys, fs::Permissions::from_mode(0o755)).context("the folder of keys")
}

fn ssh(kit: &Kit, from: &Host, to: &Host) -> Result<Vec<Running>> {
    let file = |name: &str| kit.keys.join(name).display().to_string();
    let config = to.dir.join("sshd.conf");
    let text = format!(
        "ListenAddress {}:{SSH_PORT}\nHostKey {}\nAuthorizedKeysFile {}\nCiphers aes128-gcm@openssh.com\n\
         PidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\n\
         KbdInteractiveAuthentication no\nAllowStreamLocalForwarding yes\nLogLevel ERROR\nMaxSessions 10000\n",
        to.v4,
        file("host"),
        file("allowed")
    );
    fs::write(&config, text)?;
    // What Debian's package would make.
    let user =
        "getent passwd sshd >/dev/null || echo sshd:x:64057:65534::/run/sshd:/usr/sbin/nologin >>/etc/passwd";
    run(to.command("sh").args(["-c", user]), SHORT)?;
    run(to.command("install").args(["-d", "-m", "0755", "/run/sshd"]), SHORT)?;
    let sshd = start(to.command(kit.programs.join("sshd")).args(["-D", "-e", "-f"]).arg(&config))?;
    wait_for("sshd", SHORT, || Ok(to.listening_ports()?.contains(&SSH_PORT).then_some(())))?;
    let mut command = from.command(kit.programs.join("ssh"));
    command.args(["-F", "none", "-N", "-T", "-c", "aes128-gcm@openssh.com", "-i", &file("client")]);
    command.args(["-p", &SSH_PORT.to_string()]);
    for option in [
        "BatchMode=yes",
        "IdentitiesOnly=yes",
        "HostKeyAlias=far",
        "ExitOnForwardFailure=yes",
        "LogLevel=ERROR",
    ] {
        command.args(["-o", option]);
    }
    command.args(["-o", &format!("UserKnownHostsFile={}", file("known"))]);
    for (socket, _) in SOCKETS {
        command.arg("-L").arg(format!("{FOLDER}/{socket}:{}", target(socket)));
    }
    command.arg(format!("root@{}", to.v4));
    Ok(vec![sshd, start(&mut command)?])
}

/// Certificates where libvirt and QEMU look for theirs, for a host that has its own already.
pub(crate) fn libvirt_pki(host: &Host, tls: &Path) -> Result<()> {
    let script = format!(
        "set -e; t={}; q=/etc/pki/qemu; l=/etc/pki/libvirt; mkdir -p /etc/pki/CA $q $l/private\n\
         cp $t/ca-cert.pem /etc/pki/CA/cacert.pem; cp $t/ca-cert.pem $q/ca-cert.pem\n\
         for r in server client; do cp $t/cert.pem $q/$r-cert.pem; cp $t/key.pem $q/$r-key.pem\n\
         cp $t/cert.pem $l/${{r}}cert.pem; cp $t/key.pem $l/private/${{r}}key.pem; done\n\
         chmod -R a+rX /etc/pki\n\
         printf '10.77.0.1 alpha\\n10.77.0.2 bravo\\n' >>/etc/hosts",
        tls.display()
    );
    run(host.command("bash").arg("-c").arg(script), SHORT).map(drop)
}
