//! Disks as people have them: encrypted, below filters, without ids, in several files, shared, too
//! many. What must not be moved is refused by `check` and by `migrate` alike, and nothing is changed;
//! what is moved arrives where it should. Judged by the bytes in the images.

pub(crate) mod adapted;
pub(crate) mod after_failures;
mod again;
pub(crate) mod arm;
mod below_filter;
mod created;
mod cut;
mod encrypted;
pub(crate) mod firmware;
mod handshake;
mod held_up;
pub(crate) mod in_band;
pub(crate) mod incremental;
pub(crate) mod left_out;
mod machine;
mod many;
pub(crate) mod moved;
pub(crate) mod outrun;
pub(crate) mod read_only;
mod refused;
mod refused_more;
pub(crate) mod replica;
pub(crate) mod template;
pub(crate) mod thin;
mod tpm;
pub(crate) mod verify;
pub(crate) mod volumes;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::support::{Agent, AgentSpec, Credentials, Lab, Net, Version, VmEntry, with_lab};
use machine::{Arch, Machine, Place};
use refused::Case;

/// Two agents that know guests of these names.
struct Stage {
    net: Net,
    alpha: Agent,
    bravo: Agent,
    shared: PathBuf,
}

impl Stage {
    fn set_up(lab: &Lab, names: &[&str]) -> Result<Self> {
        Self::set_up_with(lab, names, None)
    }

    /// With a destination's agent that starts the QEMUs ([`Place::will_start`]) and has these lines about the
    /// images that it makes.
    fn set_up_with(lab: &Lab, names: &[&str], create: Option<&str>) -> Result<Self> {
        Self::begin(lab, lab.two_hosts()?, names, create, None)
    }

    /// On these hosts; with agents of this user, who may not see what other users' QEMUs have open.
    fn begin(lab: &Lab, net: Net, names: &[&str], create: Option<&str>, user: Option<u32>) -> Result<Self> {
        let mut paths = lab.paths.clone();
        if user.is_some() {
            // The way to the program may not be open to that user.
            paths.vmferry = lab.dir().join("vmferry");
            std::fs::copy(&lab.paths.vmferry, &paths.vmferry)?;
        }
        let credentials = Credentials::create(&lab.paths, lab.dir())?;
        let mut agents = Vec::new();
        for (host, peer) in [(&net.alpha, &net.bravo), (&net.bravo, &net.alpha)] {
            let mut spec = AgentSpec { user, ..AgentSpec::default() }.peer(peer);
            let create = create.filter(|_| host.name == "bravo");
            if let Some(lines) = create {
                let (dir, qemu_img) = (host.dir.display(), lab.paths.qemu_img());
                let qemu_img = qemu_img.get_program().display();
                spec.end_lines = format!(
                    "[create]\npath = \"{dir}/{{vm}}/{{disk}}.{{format}}\"\nqemu_img = \"{qemu_img}\"\n{}\n",
                    lines.replace("DIR", &dir.to_string())
                );
            }
            for name in names {
                let dir = host.dir.join(name);
                let (name, qmp) = ((*name).to_owned(), dir.join("agent.qmp"));
                let start = create.map(|_| dir.join("start"));
                spec = spec.vm(VmEntry { name, qmp, start, before_start: None });
            }
            let issued = credentials.issue(&host.name)?;
            let credentials = user.map_or(Ok(issued.clone()), |user| given(host, &issued, user))?;
            agents.push(Agent::start(&paths, host, &spec, &credentials)?);
        }
        let shared = lab.dir().join("both");
        std::fs::create_dir(&shared)?;
        let bravo = agents.pop().context("no agent")?;
        let alpha = agents.pop().context("no agent")?;
        Ok(Self { net, alpha, bravo, shared })
    }

    /// The guest's folders at the source and at the destination.
    fn places(&self, lab: &Lab, name: &str, version: Version) -> Result<[Place; 2]> {
        let place = |host: &crate::support::Host| -> Result<Place> {
            let dir = host.dir.join(name);
            std::fs::create_dir(&dir)?;
            let shared = self.shared.clone();
            Ok(Place { paths: lab.paths.clone(), host: host.clone(), version, arch: Arch::X86, dir, shared })
        };
        Ok([place(&self.net.alpha)?, place(&self.net.bravo)?])
    }

    fn check(&self, name: &str, more: &[&str]) -> Result<(i32, Vec<Value>)> {
        let words = [&["check", name, "--to", "bravo", "--json"], more].concat();
        let outcome = self.alpha.vmferry(&words)?;
        let report: Value = serde_json::from_str(&outcome.stdout).with_context(|| format!("{outcome:?}"))?;
        Ok((outcome.code, report["problems"].as_array().cloned().unwrap_or_default()))
    }

    /// The last line of what `migrate` prints.
    fn migrate(&self, name: &str, more: &[&str]) -> Result<(i32, Value)> {
        let outcome = self.alpha.vmferry(&[&["migrate", name, "--to", "bravo", "--json"], more].concat())?;
        let last = outcome.stdout.lines().last().with_context(|| format!("{outcome:?}"))?;
        Ok((outcome.code, serde_json::from_str(last)?))
    }
}

/// A host's certificate as this user's own.
fn given(host: &crate::support::Host, issued: &std::path::Path, user: u32) -> Result<PathBuf> {
    let own = host.dir.join("tls");
    std::fs::create_dir(&own)?;
    for file in ["ca-cert.pem", "cert.pem", "key.pem"] {
        std::fs::copy(issued.join(file), own.join(file))?;
        std::os::unix::fs::chown(own.join(file), Some(user), Some(user))?;
    }
    Ok(own)
}

fn tells(problems: &[Value], kind: &str, severity: &str, words: &[&str]) -> Result<()> {
    let all = || Value::from(problems.to_vec());
    let found = problems.iter().find(|p| {
        let text = p["text"].as_str().unwrap_or_default();
        p["kind"] == kind && p["severity"] == severity && words.iter().all(|word| text.contains(word))
    });
    let found = found.with_context(|| format!("no {severity} {kind} with {words:?} in {}", all()))?;
    ensure!(found["remedy"].as_str().is_some_and(|remedy| !remedy.is_empty()), "{found}");
    Ok(())
}

fn refuses(stage: &Stage, lab: &Lab, version: Version, case: &Case) -> Result<()> {
    let [source, target] = stage.places(lab, case.name, version)?;
    let at_source = source.start(&(case.source)(&source)?, false)?;
    let at_target = target.start(&(case.target)(&target)?, true)?;
    if let Some(prepare) = case.prepare {
        prepare(&mut at_source.qmp()?, &source)?;
    }
    let before = [at_source.snapshot()?, at_target.snapshot()?];
    let (code, problems) = stage.check(case.name, &[])?;
    ensure!(code == 1, "check gave {code}: {problems:?}");
    tells(&problems, case.kind, "problem", case.words).context("check")?;
    let unchanged = |when: &str| -> Result<()> {
        let after = [at_source.snapshot()?, at_target.snapshot()?];
        ensure!(after == before, "{when}: {before:#?} became {after:#?}");
        Ok(())
    };
    unchanged("after check")?;
    let (code, last) = stage.migrate(case.name, &[])?;
    let outcome = &last["outcome"];
    ensure!(code == 1 && outcome["result"] == "failed" && outcome["leftovers"] == json!([]), "{last}");
    let told = outcome["problems"].as_array().cloned().unwrap_or_default();
    tells(&told, case.kind, "problem", case.words).context("migrate")?;
    unchanged("after migrate")
}

fn what_must_not_be_moved_is_refused(version: Version, name: &str) -> Result<()> {
    with_lab(name, |lab| {
        let cases = || refused::ALL.iter().chain(refused_more::ALL);
        let names: Vec<&str> = cases().map(|case| case.name).collect();
        let stage = Stage::set_up(lab, &names)?;
        let play = |case: &Case| refuses(&stage, lab, version, case).with_context(|| case.name.to_owned());
        let failures: Vec<String> =
            cases().filter_map(|case| play(case).err()).map(|e| format!("{e:#}")).collect();
        ensure!(failures.is_empty(), "{} of {}:\n{}", failures.len(), names.len(), failures.join("\n"));
        Ok(())
    })
}

#[test]
fn disks_that_must_not_be_moved_are_refused_on_qemu_10() -> Result<()> {
    what_must_not_be_moved_is_refused(Version::V10, "disks_that_must_not_be_moved_are_refused_on_qemu_10")
}

#[test]
fn disks_that_must_not_be_moved_are_refused_on_qemu_7_2() -> Result<()> {
    what_must_not_be_moved_is_refused(Version::V72, "disks_that_must_not_be_moved_are_refused_on_qemu_7_2")
}

/// Moves a guest and ends both QEMUs, so that the images can be read.
fn moves(stage: &Stage, name: &str, at_source: Machine, at_target: Machine, more: &[&str]) -> Result<Value> {
    let (code, last) = stage.migrate(name, more)?;
    ensure!(code == 0 && last["outcome"]["result"] == "moved", "{last}");
    ensure!(last["outcome"]["leftovers"] == json!([]), "{last}");
    ensure!(at_target.qmp()?.status()? == "paused", "the guest was paused");
    at_source.quit()?;
    at_target.quit()?;
    Ok(last)
}
