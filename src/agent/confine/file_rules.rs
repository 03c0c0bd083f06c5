//! Files and ports (Landlock): what may be written to, executed and dialed. Reading is left alone, for names,
//! users, certificates and journals are everywhere.

use std::collections::BTreeSet;
use std::fs::{DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use landlock::{
    ABI, AccessFs, AccessNet, BitFlags, NetPort, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetError, RulesetStatus,
};

use super::applied::{Applied, no};
use crate::config::{Config, DEFAULT_PORT, LocalSocket};

/// What this program knows to ask for; of a kernel that knows less, less is asked.
const KNOWN: ABI = ABI::V5;
/// Where programs are.
const PROGRAMS: &[&str] = &["/usr", "/bin", "/sbin", "/lib", "/lib64", "/nix/store", "/run/current-system"];
/// Of names, where an answer is too long for one datagram.
const DNS: u16 = 53;

/// Confines this thread and what it starts.
pub(super) fn apply(config: &Config) -> Result<Applied, RulesetError> {
    let writable = AccessFs::from_write(KNOWN);
    let mut rules = Ruleset::default()
        .handle_access(writable | AccessFs::Execute)?
        .handle_access(AccessNet::ConnectTcp)?
        .create()?;
    let folders = folders(config);
    for folder in &folders {
        rules = beneath(rules, folder, writable)?;
    }
    rules = beneath(rules, Path::new("/dev"), AccessFs::from_file(KNOWN) & writable)?;
    let own = std::env::current_exe().ok();
    let makers = config.creates().flat_map(|create| create.programs());
    for programs in PROGRAMS.iter().map(Path::new).chain(own.as_deref()).chain(makers) {
        rules = beneath(rules, programs, AccessFs::Execute.into())?;
    }
    let ports = ports(config);
    for port in &ports {
        rules = rules.add_rule(NetPort::new(*port, AccessNet::ConnectTcp))?;
    }
    let shown = |all: Vec<String>| all.join(", ");
    let words = format!(
        "writes only to {}, dials only TCP ports {}",
        shown(folders.iter().map(|f| f.display().to_string()).collect()),
        shown(ports.iter().map(ToString::to_string).collect())
    );
    Ok(match rules.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => Applied::Yes(words),
        RulesetStatus::PartiallyEnforced => Applied::Yes(format!("{words}, as far as this kernel can")),
        RulesetStatus::NotEnforced => no("this kernel has none, or lets nobody ask for it"),
    })
}

/// What is not there needs no rule.
fn beneath(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    match PathFd::new(path) {
        Ok(there) => rules.add_rule(PathBeneath::new(there, access)),
        Err(_) => Ok(rules),
    }
}

/// Folders that the agent writes to. Those of its own are made, so that there can be a rule.
fn folders(config: &Config) -> BTreeSet<PathBuf> {
    let own = [(&config.state_dir, 0o700), (&config.runtime_dir, 0o755)];
    for (folder, mode) in own {
        // Whoever needs it says why it cannot be made.
        let _ = DirBuilder::new().recursive(true).mode(mode).create(folder);
    }
    let sockets = config.forwards.values().filter_map(|forward| match &forward.listen {
        LocalSocket::Unix(path) => path.parent().map(Path::to_owned),
        LocalSocket::Tcp(_) => None,
    });
    let libvirt = config.libvirt.folder.clone();
    // Others pass through it. One that is there is somebody's choice.
    if let Some(folder) = libvirt.as_ref().filter(|folder| !folder.exists()) {
        let made = DirBuilder::new().recursive(true).mode(0o711).create(folder);
        let _ = made.and_then(|()| std::fs::set_permissions(folder, Permissions::from_mode(0o711)));
    }
    let own = own.map(|(folder, _)| folder.clone()).into_iter();
    let made_here = config.creates().filter(|create| create.command.is_empty());
    let images = made_here.map(|create| create.folder().to_owned());
    own.chain(sockets).chain(libvirt).chain(images).chain(config.sandbox.write.iter().cloned()).collect()
}

/// Ports of peers, of targets, of the collector of traces and of the witness.
fn ports(config: &Config) -> BTreeSet<u16> {
    let peers = config.peers.values().filter_map(|peer| {
        let port = peer.address.as_deref()?.rsplit_once(':')?.1;
        Some(port.parse().unwrap_or(DEFAULT_PORT))
    });
    let targets = config.targets.values().filter_map(|target| match target.socket("x").ok()? {
        LocalSocket::Tcp(address) => Some(address.port()),
        LocalSocket::Unix(_) => None,
    });
    let collector = config.traces.as_ref().map(|traces| traces.url.address.port());
    let witness = config.witness.iter().flat_map(|witness| &witness.endpoints).map(|endpoint| endpoint.port);
    peers.chain(targets).chain(collector).chain(witness).chain([DNS]).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::ErrorKind;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    const TEXT: &str = "state_dir = 'state'\nruntime_dir = 'run'\n[tls]\nca = 'a'\ncert = 'b'\nkey = 'c'\n";

    #[test]
    fn libvirts_folder_is_made_so_that_there_can_be_a_rule() {
        let folder = tempfile::tempdir().unwrap();
        let all = folder.path().join("run/libvirt");
        let text = format!("{TEXT}[libvirt]\nfolder = '{}'\n", all.display());
        let config = Config::parse(&text, folder.path()).unwrap();
        assert!(folders(&config).contains(&all));
        assert_eq!(std::fs::metadata(&all).unwrap().permissions().mode() & 0o777, 0o711);
    }

    #[test]
    fn images_are_made_in_their_folders() {
        let text = format!(
            "{TEXT}[create]\npath = '/images/{{vm}}/{{disk}}'\n[vm.web1]\nqmp = '/x'\n[vm.web1.create]\n\
             path = '/fast/web1-{{disk}}.raw'\n"
        );
        let config = Config::parse(&text, Path::new("/etc/vmferry.toml")).unwrap();
        let folders = folders(&config);
        assert!(
            folders.contains(Path::new("/images/")) && folders.contains(Path::new("/fast/")),
            "{folders:?}"
        );
    }

    #[test]
    fn only_what_the_configuration_names_is_written_to_executed_and_dialed() {
        let folder = tempfile::tempdir().unwrap();
        let [peer, stranger] = [0; 2].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
        let [to_peer, to_stranger] = [&peer, &stranger].map(|listener| listener.local_addr().unwrap());
        let text = format!("{TEXT}[peer.bravo]\nidentity = 'bravo'\naddress = '{to_peer}'\n");
        let config = Config::parse(&text, &folder.path().join("vmferry.toml")).unwrap();
        let program = folder.path().join("state/program");
        let inside = folder.path().to_owned();
        let confined = move || {
            let applied = apply(&config).unwrap();
            if !applied.is_on() {
                return assert_eq!(applied, no("this kernel has none, or lets nobody ask for it"));
            }
            std::fs::write(inside.join("state/file"), "written").unwrap();
            std::fs::copy("/bin/true", &program).unwrap();
            let run = |program: &Path| std::process::Command::new(program).status().map(|s| s.success());
            assert!(run(Path::new("/bin/true")).unwrap());
            let refused = run(&program).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::PermissionDenied, "what it wrote itself is executed");
            assert_eq!(std::fs::read(inside.join("state/file")).unwrap(), b"written");
            let written = std::fs::write(inside.join("file"), "").unwrap_err();
            assert_eq!(written.kind(), ErrorKind::PermissionDenied);
            TcpStream::connect(to_peer).unwrap();
            assert_eq!(TcpStream::connect(to_stranger).unwrap_err().kind(), ErrorKind::PermissionDenied);
        };
        // Landlock is a thread's, until a process begins with it.
        std::thread::spawn(confined).join().unwrap();
        std::fs::write(folder.path().join("file"), "").unwrap();
    }
}
