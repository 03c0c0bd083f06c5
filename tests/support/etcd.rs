//! A real etcd on a host of its own, with a link to each of the two hosts that lasts when theirs is cut. Its clients
//! prove who they are, by certificates of an authority that nobody else trusts.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};

use super::lab::Lab;
use super::net::{Host, Net, THIRD_LINKS};
use super::process::{SHORT, run_any, signal_pid, wait_for};

const PORT: u16 = 2379;

/// An etcd of one member, which does not wait for the disk: what was written is there when it was killed, and no test
/// ends the machine. Killed when dropped.
#[derive(Debug)]
pub struct Etcd {
    host: Host,
    programs: PathBuf,
    /// How long the agents wait for it.
    answer_s: u64,
    child: Option<Child>,
}

impl Etcd {
    /// Starts it, and waits until it answers.
    ///
    /// # Errors
    /// It is not there: tests/setup/etcd.sh.
    pub fn start(lab: &Lab, net: &Net, answer_s: u64) -> Result<Self> {
        let programs = lab.paths.etcd()?;
        let host = net.between(lab.dir())?;
        let mut etcd = Self { host, programs, answer_s, child: None };
        etcd.issue()?;
        etcd.start_again()?;
        Ok(etcd)
    }

    fn issue(&self) -> Result<()> {
        let key = KeyPair::generate()?;
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name.push(DnType::CommonName, "of etcd");
        let dir = &self.host.dir;
        fs::write(dir.join("ca.pem"), authority.self_signed(&key)?.pem())?;
        let issuer = Issuer::new(authority, key);
        for name in ["server", "client"] {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, name);
            let addresses = THIRD_LINKS.iter().map(|link| link.1.to_owned()).chain(["127.0.0.1".to_owned()]);
            let addresses: Result<Vec<IpAddr>, _> = addresses.map(|text| text.parse()).collect();
            params.subject_alt_names = addresses?.into_iter().map(SanType::IpAddress).collect();
            // Its gateway is a client of its own.
            params.extended_key_usages =
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            let key = KeyPair::generate()?;
            let path = dir.join(format!("{name}-key.pem"));
            fs::write(dir.join(format!("{name}.pem")), params.signed_by(&key, &issuer)?.pem())?;
            fs::write(&path, key.serialize_pem())?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        }
        Ok(())
    }

    /// `[witness]` of one of the two hosts.
    pub fn table(&self, host: &Host) -> String {
        let dir = self.host.dir.display();
        let address = THIRD_LINKS.iter().find(|link| link.0 == host.name).map_or("", |link| link.1);
        format!(
            "[witness]\nendpoints = [\"https://{address}:{PORT}\"]\nca = \"{dir}/ca.pem\"\ncert = \"{dir}/client.pem\"\n\
             key = \"{dir}/client-key.pem\"\nanswer_s = {}\nafter_s = 3\n",
            self.answer_s
        )
    }

    /// Without a word to anybody.
    pub fn kill(&mut self) -> Result<()> {
        let mut child = self.child.take().context("etcd does not run")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Takes connections, and answers nothing, until it goes on.
    pub fn stands_still(&self, still: bool) -> Result<()> {
        let pid = self.child.as_ref().context("etcd does not run")?.id();
        signal_pid(pid, if still { Signal::SIGSTOP } else { Signal::SIGCONT })
    }

    /// With what is on its disk, and waits until it answers.
    pub fn start_again(&mut self) -> Result<()> {
        let dir = self.host.dir.clone();
        let log = fs::File::options().create(true).append(true).open(dir.join("etcd.log"))?;
        let file = |name: &str| dir.join(name).display().to_string();
        let mut command = self.host.command(self.programs.join("etcd"));
        command.args(["--name", "witness", "--data-dir", &file("data"), "--unsafe-no-fsync"]);
        command.args(["--initial-advertise-peer-urls", "http://127.0.0.1:2380"]);
        command.args(["--listen-peer-urls", "http://127.0.0.1:2380"]);
        command.args(["--initial-cluster", "witness=http://127.0.0.1:2380"]);
        command.args(["--listen-client-urls", &format!("https://0.0.0.0:{PORT}")]);
        command.args(["--advertise-client-urls", &format!("https://127.0.0.1:{PORT}")]);
        command.args(["--client-cert-auth", "--trusted-ca-file", &file("ca.pem")]);
        command.args(["--cert-file", &file("server.pem"), "--key-file", &file("server-key.pem")]);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.child = Some(command.spawn().context("cannot start etcd")?);
        wait_for("etcd", SHORT, || Ok(self.ctl(&["endpoint", "health"]).is_ok().then_some(())))
    }

    fn ctl(&self, words: &[&str]) -> Result<String> {
        let dir = &self.host.dir;
        let mut command = self.host.command(self.programs.join("etcdctl"));
        command.env("ETCDCTL_API", "3").arg("--endpoints").arg(format!("https://127.0.0.1:{PORT}"));
        command.arg("--cacert").arg(dir.join("ca.pem")).arg("--cert").arg(dir.join("client.pem"));
        command.arg("--key").arg(dir.join("client-key.pem")).args(words);
        let outcome = run_any(&mut command, SHORT)?;
        ensure!(outcome.code == 0, "etcdctl {words:?}: {outcome:?}");
        Ok(outcome.stdout)
    }

    /// What it keeps of a migration.
    pub fn word(&self, migration: &str) -> Result<Option<String>> {
        let key = format!("/vmferry/migration/{migration}");
        let text = self.ctl(&["get", &key, "--print-value-only"])?;
        Ok(Some(text.trim().to_owned()).filter(|word| !word.is_empty()))
    }

    /// How many words it keeps.
    pub fn words(&self) -> Result<usize> {
        Ok(self.ctl(&["get", "/vmferry/", "--prefix", "--keys-only"])?.split_whitespace().count())
    }

    /// Whether a host reaches it.
    pub fn joined(&self, host: &Host, joined: bool) -> Result<()> {
        let link = format!("to-{}", host.name);
        let state = if joined { "up" } else { "down" };
        let mut command = Command::new("ip");
        command.args(["-n", self.host.namespace(), "link", "set", &link, state]);
        ensure!(run_any(&mut command, SHORT)?.code == 0, "{link} {state}");
        Ok(())
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
