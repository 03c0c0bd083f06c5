//! Files: certificates, the key, folders, sockets.

use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use time::OffsetDateTime;

use super::finding::Finding;
use crate::config::{Config, TlsConfig};
use crate::error_chain::chain;
use crate::net::tls::{Aead, Tls, TlsPaths};

/// Whether the certificates fit together, whom they prove, and when they end.
pub(super) fn certificates(config: &Config, path: &Path) -> Vec<Finding> {
    let TlsConfig { ca, cert, key, crl, trust_domain, .. } = config.tls.clone();
    let has_list = crl.is_some();
    let tls = match Tls::load_named(&TlsPaths { ca, cert, key, crl }, trust_domain.into(), Aead::Auto) {
        Ok(tls) => tls,
        Err(error) => {
            let remedy = "`vmferry certs check` says more; certs/README.md has how to make them";
            return vec![Finding::failed("certificates", chain(&error), remedy)];
        }
    };
    let mut found = vec![match config.check_own(&tls.identity, path) {
        Ok(()) => Finding::ok("identity", format!("this host is {}", tls.identity)),
        Err(error) => Finding::failed("identity", chain(&error), "give the peer its own identity"),
    }];
    let now = OffsetDateTime::now_utc();
    for ending in &tls.endings {
        let (what, remedy) = ending.kind.words();
        let days = (ending.not_after - now).whole_days();
        let text = format!("until {}, {days} days", ending.not_after.date());
        found.push(if ending.not_before > now {
            let text = format!("is not valid before {}: this host's clock may be wrong", ending.not_before);
            Finding::failed(what, text, "set the clock")
        } else if ending.not_after <= now {
            Finding::failed(what, text, remedy)
        } else if ending.is_soon(now) {
            Finding::warning(what, text, remedy)
        } else {
            Finding::ok(what, text)
        });
    }
    if !has_list {
        let remedy = "`vmferry certs revoke` makes one; `tls.crl` names it";
        found.push(Finding::warning("revocation", "no list: a certificate that is lost stays good", remedy));
    }
    found
}

/// Who can read the keys.
pub(super) fn keys(config: &Config) -> Vec<Finding> {
    let of_witness = config.witness.iter().filter_map(|witness| witness.key.as_deref());
    let keys = of_witness.map(|path| key(format!("witness's key {}", path.display()), path));
    let own = &config.tls.key;
    [key(format!("key {}", own.display()), own)].into_iter().chain(keys).collect()
}

fn key(what: String, path: &Path) -> Finding {
    match std::fs::metadata(path) {
        Ok(meta) if meta.mode() & 0o077 == 0 => {
            Finding::ok(what, format!("mode {:04o}, of user {}", meta.mode() & 0o7777, meta.uid()))
        }
        Ok(meta) => {
            let text = format!("mode {:04o}: others than its owner can get at it", meta.mode() & 0o7777);
            Finding::failed(what, text, format!("chmod 0600 {}", path.display()))
        }
        Err(e) => unseen(what, &e, "run it as root"),
    }
}

/// Folders of the agent's own.
pub(super) fn folders(config: &Config) -> Vec<Finding> {
    let folders = [("state folder", &config.state_dir, 0o022), ("socket folder", &config.runtime_dir, 0o002)];
    let folders = folders.map(|(name, path, unwanted)| {
        let what = format!("{name} {}", path.display());
        match std::fs::metadata(path) {
            Ok(meta) if !meta.is_dir() => Finding::failed(what, "is no folder", "take it away"),
            Ok(meta) if meta.mode() & unwanted == 0 => {
                Finding::ok(what, format!("mode {:04o}, of user {}", meta.mode() & 0o7777, meta.uid()))
            }
            Ok(meta) => {
                let text = format!("mode {:04o}: others can write to it", meta.mode() & 0o7777);
                Finding::failed(what, text, format!("chmod go-w {}", path.display()))
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {
                Finding::warning(what, "is not there", "the agent makes it when it starts")
            }
            Err(e) => unseen(what, &e, "run it as root"),
        }
    });
    folders.into()
}

/// The local API's socket.
pub(super) fn sockets(config: &Config, agent_answers: bool) -> Vec<Finding> {
    let path = config.api_socket();
    let what = format!("socket {}", path.display());
    let connects = || UnixStream::connect(&path);
    vec![match std::fs::metadata(&path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            Finding::failed(what, "is no socket", "take it away and restart the agent")
        }
        Ok(meta) => match connects() {
            Ok(_) => Finding::ok(what, format!("mode {:04o}", meta.permissions().mode() & 0o7777)),
            Err(e) if e.kind() == ErrorKind::ConnectionRefused => {
                Finding::warning(what, "nobody listens there", "systemctl start vmferry")
            }
            Err(e) => unseen(what, &e, "use it as root or a member of its group"),
        },
        Err(e) if e.kind() == ErrorKind::NotFound && !agent_answers => {
            Finding::warning(what, "is not there: no agent runs", "systemctl start vmferry")
        }
        Err(e) => unseen(what, &e, "`--config` names the running agent's configuration"),
    }]
}

/// Where the monitors of virtual machines are to be. They are not connected to: each serves one client.
pub(super) fn monitors(config: &Config) -> Vec<Finding> {
    let vms = config.vms.keys().filter_map(|name| Some((name, config.vm(name)?)));
    let monitors = vms.map(|(name, vm)| {
        let what = format!("monitor of {name}, {}", vm.qmp.display());
        match std::fs::metadata(&vm.qmp) {
            Ok(meta) if !meta.file_type().is_socket() => {
                Finding::failed(what, "is no socket", format!("see `qmp` of [vm.{name}]"))
            }
            Ok(meta) if meta.mode() & 0o002 != 0 => {
                let text =
                    format!("mode {:04o}: every user of this host owns the guest", meta.mode() & 0o7777);
                Finding::failed(what, text, format!("chmod o-w {}", vm.qmp.display()))
            }
            Ok(meta) => Finding::ok(what, format!("a socket, mode {:04o}", meta.mode() & 0o7777)),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                let remedy = "nothing to do unless it is to run here now";
                Finding::unknown(what, "is not there: no QEMU of it runs here", remedy)
            }
            Err(e) => unseen(what, &e, "run it as root"),
        }
    });
    monitors.collect()
}

fn unseen(what: String, error: &std::io::Error, remedy: &str) -> Finding {
    Finding::unknown(what, error.to_string(), remedy)
}
