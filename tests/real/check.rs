//! What keeps a guest from being moved is found before anything is changed, by `vmferry check` and
//! by `vmferry migrate` alike, and said in words that name the object and lead to the remedy.
//!
//! One guest runs on alpha. It is configured there under many names, one for each case; bravo has
//! under each name a QEMU that fits, or fails to fit, in one way.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::agent::PORT;
use crate::support::pair::{journals, journals_ended};
use crate::support::process::{LONG, SHORT, run, wait_for};
use crate::support::{
    Agent, AgentSpec, Credentials, DiskFormat, Lab, Net, Paths, PeerEntry, Qmp, Version, Vm, VmEntry, VmSpec,
    with_lab,
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const LUKS_BYTES: u64 = 4 << 20;
/// A file of one line.
const SECRET: &str = "not a secret at all";
/// Where nobody listens.
const DEAF_PORT: u16 = 9999;

/// One thing that is wrong, and how it must be told.
#[derive(Debug, Clone, Copy)]
struct Case {
    vm: &'static str,
    to: &'static str,
    kind: &'static str,
    text: &'static [&'static str],
    remedy: &'static [&'static str],
}

const fn case(
    vm: &'static str,
    kind: &'static str,
    text: &'static [&'static str],
    remedy: &'static [&'static str],
) -> Case {
    Case { vm, to: "bravo", kind, text, remedy }
}

const TARGETS: &[Case] = &[
    case("missing", "disk-missing", &["disk1", "disk0, disk2"], &["same devices", "ids"]),
    case("small", "disk-too-small", &["disk1", "66060288", "67108864"], &["qemu-img resize", "67108864"]),
    case("large", "disk-too-large", &["disk1", "68157440", "67108864"], &["67108864"]),
    case("locked", "disk-read-only", &["disk1"], &["read-only"]),
    case("clear", "disk-format", &["disk2", "luks", "raw"], &["luks"]),
    case("cached", "disk-cache", &["disk2", "no write cache", "power cut"], &["write-cache=off"]),
    case("running", "target-not-waiting", &["VM running", "state running"], &["-incoming defer -S"]),
    case("used", "target-not-waiting", &["VM used", "failed"], &["-incoming defer -S", "one migration only"]),
    case("absent", "target-not-waiting", &["VM absent", "nobody.qmp"], &["-incoming defer -S", "`start`"]),
    case("startable", "disk-too-small", &["disk0", "66060288"], &["qemu-img resize"]),
];

const NAMES: &[Case] = &[
    case("ghost", "vm-unknown", &["source alpha", "ghost"], &["[vm.ghost]", "configuration of alpha"]),
    case("stranger", "vm-unknown", &["destination bravo", "stranger"], &["[vm.stranger]", "of bravo"]),
    case("private", "not-permitted", &["bravo", "alpha", "private"], &["`receive`", "\"alpha\"", "of bravo"]),
    Case { to: "charlie", ..case("fits", "peer-unknown", &["alpha", "charlie"], &["[peer.charlie]"]) },
    Case {
        to: "deaf",
        ..case(
            "fits",
            "peer-unreachable",
            &["deaf", "10.77.0.2:9999"],
            &["agent runs", "`address`", "firewall"],
        )
    },
    Case {
        to: "mistaken",
        ..case("fits", "peer-not-trusted", &["mistaken"], &["certs check", "`identity`"])
    },
];

const FEW_DESCRIPTORS: Case =
    case("fits", "too-few-descriptors", &["source's QEMU may open", "needs up to"], &["`LimitNOFILE`"]);
const BUSY: Case = case("fits", "busy", &["VM fits", "mirror errand"], &["block-job-cancel"]);
const OTHER_CA: Case = case("fits", "peer-not-trusted", &["bravo", "CA"], &["certs check"]);
const UNKNOWN_HERE: Case = case(
    "fits",
    "not-permitted",
    &["bravo", "identity"],
    &["`identity` \"alpha\"", "configuration of bravo"],
);
const AGENT_DOWN: Case = case("fits", "peer-unreachable", &["bravo", "10.77.0.2:9907"], &["agent runs"]);

#[test]
fn what_would_fail_is_found_before_anything_is_changed() -> Result<()> {
    with_lab("what_would_fail_is_found_before_anything_is_changed", |lab| {
        let mut stage = Stage::set_up(lab)?;
        stage.finds_nothing_wrong()?;
        TARGETS.iter().chain(NAMES).try_for_each(|case| stage.play(case))?;
        stage.accepts_by_name()?;
        stage.few_descriptors()?;
        stage.busy()?;
        stage.other_destinations(lab)?;
        no_agent(stage.alpha)
    })
}

struct Stage {
    net: Net,
    source: Vm,
    targets: Vec<Vm>,
    alpha: Agent,
    bravo: Option<Agent>,
}

impl Stage {
    fn set_up(lab: &Lab) -> Result<Self> {
        let net = lab.two_hosts()?;
        let source = define(&lab.paths, &net.alpha, "source", Third::Luks)?;
        let targets = targets(&lab.paths, &net)?;
        source.boot()?;
        let credentials = Credentials::create(&lab.paths, lab.dir())?;
        let alpha =
            Agent::start(&lab.paths, &net.alpha, &on_alpha(&net, &source), &credentials.issue("alpha")?)?;
        let on_bravo = on_bravo(&net, &targets);
        let bravo = Agent::start(&lab.paths, &net.bravo, &on_bravo, &credentials.issue("bravo")?)?;
        Ok(Self { net, source, targets, alpha, bravo: Some(bravo) })
    }

    /// Without this, nothing that the cases find would mean anything.
    fn finds_nothing_wrong(&self) -> Result<()> {
        let checked = self.alpha.vmferry(&["check", "fits", "--to", "bravo", "--json"])?;
        ensure!(checked.code == 0, "{checked:?}");
        let report: Value = serde_json::from_str(&checked.stdout)?;
        ensure!(report["schema"] == 1 && but_this_machines(&report["problems"]) == json!([]), "{report}");
        let plan = self.alpha.vmferry(&["migrate", "fits", "--to", "bravo", "--dry-run", "--json"])?;
        let foretold = serde_json::from_str::<Value>(&plan.stdout)?["foretold"].take();
        let (guest, prediction) = (&foretold["guest"], &foretold["prediction"]);
        let copied = guest["disks"][0]["allocated_bytes"].as_u64().context("no disk")?;
        let expected = copied + guest["ram_bytes"].as_u64().context("no RAM")?;
        ensure!(plan.code == 0 && guest["ram_dirty_bytes_per_s"].is_u64(), "{plan:?}");
        ensure!(prediction["bytes"].as_u64() >= Some(expected) && prediction["outruns"] == false, "{plan:?}");
        let plain = self.alpha.vmferry(&["migrate", "fits", "--to", "bravo", "--dry-run"])?;
        ensure!(
            plain.stdout.contains("nothing was begun") && plain.stdout.contains("a pause of about"),
            "{plain:?}"
        );
        let plain = self.alpha.vmferry(&["check", "fits", "--to", "bravo"])?;
        ensure!(plain.code == 0 && plain.stdout.contains("fits can be moved to bravo"), "{plain:?}");
        Ok(())
    }

    /// The source's QEMU may hardly open anything more.
    fn few_descriptors(&self) -> Result<()> {
        let pid = self.source.pid().context("no QEMU")?;
        let open = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
        let limit = |soft: &str| {
            let words = [format!("--pid={pid}"), format!("--nofile={soft}:")];
            run(std::process::Command::new("prlimit").args(words), SHORT).map(drop)
        };
        let before = run(
            std::process::Command::new("prlimit").args([
                &format!("--pid={pid}"),
                "--nofile",
                "--noheadings",
                "--output=SOFT",
            ]),
            SHORT,
        )?;
        limit(&(open + 10).to_string())?;
        let played = self.play(&FEW_DESCRIPTORS);
        limit(before.trim())?;
        played
    }

    /// A problem that only a human can judge is a warning once it is accepted; others cannot be.
    fn accepts_by_name(&self) -> Result<()> {
        let words = |vm, kind| ["check", vm, "--to", "bravo", "--json", "--accept", kind];
        for (vm, kind) in [("clear", "disk-format"), ("cached", "disk-cache")] {
            let accepted = self.alpha.vmferry(&words(vm, kind))?;
            let report: Value = serde_json::from_str(&accepted.stdout)?;
            let found = report["problems"].as_array().context("no problems")?;
            let weight =
                found.iter().find(|p| p["kind"] == kind && p["severity"] != "note").map(|p| &p["severity"]);
            ensure!(accepted.code == 0 && weight == Some(&json!("warning")), "{accepted:?}");
        }
        let refused = self.alpha.vmferry(&words("clear", "disk-too-small"))?;
        ensure!(refused.code == 2 && refused.stderr.contains("docs/check.md"), "{refused:?}");
        Ok(())
    }

    fn play(&self, case: &Case) -> Result<()> {
        self.play_inner(case).with_context(|| format!("{case:?}"))
    }

    fn play_inner(&self, case: &Case) -> Result<()> {
        let before = self.snapshot(case.vm)?;
        let tries = self.journal_count()?;
        case.is_told(&self.checked(case)?)?;
        self.is_as(&before, case.vm).context("after check")?;
        ensure!(self.journal_count()? == tries, "check left a journal");
        case.is_told(&self.tried(case)?)?;
        self.is_as(&before, case.vm).context("after migrate")?;
        for agent in [Some(&self.alpha), self.bravo.as_ref()].into_iter().flatten() {
            journals_ended(agent)?;
        }
        self.source.wait_more(5).map(drop)
    }

    /// What check says, in JSON and in words.
    fn checked(&self, case: &Case) -> Result<Value> {
        let words = ["check", case.vm, "--to", case.to];
        let plain = self.alpha.vmferry(&words)?;
        let outcome = self.alpha.vmferry(&[&words[..], &["--json"]].concat())?;
        ensure!(outcome.code == 1 && plain.code == 1, "check gave {outcome:?} and {plain:?}");
        let report: Value = serde_json::from_str(&outcome.stdout)?;
        case.is_in_words(&plain.stdout)?;
        Ok(but_this_machines(&report["problems"]))
    }

    /// What migrate says, in JSON and in words.
    fn tried(&self, case: &Case) -> Result<Value> {
        let words = ["migrate", case.vm, "--to", case.to];
        let plain = self.alpha.vmferry(&words)?;
        let outcome = self.alpha.vmferry(&[&words[..], &["--json"]].concat())?;
        ensure!(outcome.code == 1 && plain.code == 1, "migrate gave {outcome:?} and {plain:?}");
        let last: Value = serde_json::from_str(outcome.stdout.lines().last().context("no line of JSON")?)?;
        let end = &last["outcome"];
        ensure!(end["result"] == "failed" && end["leftovers"] == json!([]), "{last}");
        case.is_in_words(&plain.stdout)?;
        Ok(but_this_machines(&end["problems"]))
    }

    /// Everything that the two QEMUs of a case tell of themselves.
    fn snapshot(&self, vm: &str) -> Result<Vec<Value>> {
        let target = self.targets.iter().find(|target| target.spec.name == vm && target.is_running());
        [Some(&self.source), target].into_iter().flatten().map(described).collect()
    }

    fn is_as(&self, before: &[Value], vm: &str) -> Result<()> {
        let unchanged = || Ok((self.snapshot(vm)? == before).then_some(()));
        wait_for("both QEMUs to be as they were", SHORT, unchanged)
            .with_context(|| format!("{:#?}", self.snapshot(vm).map(|after| differences(before, &after))))
    }

    fn journal_count(&self) -> Result<usize> {
        let bravo = self.bravo.as_ref().map_or(Ok(0), |bravo| journals(bravo).map(|found| found.len()))?;
        Ok(journals(&self.alpha)?.len() + bravo)
    }

    /// A job of somebody else's on one of the guest's disks.
    fn busy(&self) -> Result<()> {
        let mut qmp = self.source.qmp()?;
        let sink = json!({"driver": "null-co", "node-name": "sink", "size": 64 << 20, "read-zeroes": true});
        qmp.execute("blockdev-add", sink)?;
        let job = json!({"job-id": "errand", "device": "vda", "target": "sink", "sync": "full"});
        qmp.execute("blockdev-mirror", job)?;
        qmp.wait_event("BLOCK_JOB_READY", SHORT)?;
        drop(qmp);
        self.play(&BUSY)?;
        let mut qmp = self.source.qmp()?;
        qmp.execute("block-job-cancel", json!({"device": "errand"}))?;
        qmp.wait_event("BLOCK_JOB_COMPLETED", SHORT)?;
        qmp.execute("blockdev-del", json!({"node-name": "sink"}))?;
        drop(qmp);
        self.finds_nothing_wrong()
    }

    /// A destination of another authority, one that does not know us, and none.
    fn other_destinations(&mut self, lab: &Lab) -> Result<()> {
        self.end_bravo()?;
        let elsewhere = lab.dir().join("elsewhere");
        fs::create_dir(&elsewhere)?;
        let others = Credentials::create_named(&lab.paths, &elsewhere, "somebody else's")?.issue("bravo")?;
        self.with_bravo(&lab.paths, &on_bravo(&self.net, &self.targets), &others)?;
        self.play(&OTHER_CA)?;

        self.end_bravo()?;
        let ours = lab.dir().join("certs/hosts/bravo");
        let mut spec = on_bravo(&self.net, &self.targets);
        spec.peers[0].name = "zulu".to_owned();
        self.with_bravo(&lab.paths, &spec, &ours)?;
        self.play(&UNKNOWN_HERE)?;
        let counted = self.bravo.as_ref().context("no agent on bravo")?.metrics()?;
        counted.sum("vmferry_connect_failures_total", &[("reason", "unknown_peer")])?;

        self.end_bravo()?;
        self.play(&AGENT_DOWN)
    }

    fn end_bravo(&mut self) -> Result<()> {
        self.bravo.take().context("no agent on bravo")?.terminate()
    }

    fn with_bravo(&mut self, paths: &Paths, spec: &AgentSpec, credentials: &Path) -> Result<()> {
        self.bravo = Some(Agent::start(paths, &self.net.bravo, spec, credentials)?);
        Ok(())
    }
}

impl Case {
    /// That the one problem found is ours.
    fn is_told(&self, problems: &Value) -> Result<()> {
        let [problem] = problems.as_array().map_or(&[][..], Vec::as_slice) else {
            anyhow::bail!("one problem was expected: {problems}");
        };
        ensure!(problem["kind"] == self.kind, "{problem}");
        for (part, words) in [("text", self.text), ("remedy", self.remedy)] {
            let said = problem[part].as_str().context("no text")?;
            let silent: Vec<_> = words.iter().filter(|word| !said.contains(**word)).collect();
            ensure!(silent.is_empty(), "{silent:?} not in {part}: {said}");
        }
        Ok(())
    }

    fn is_in_words(&self, printed: &str) -> Result<()> {
        let words = self.text.iter().chain(self.remedy);
        let silent: Vec<_> = words.filter(|word| !printed.contains(**word)).collect();
        ensure!(silent.is_empty(), "{silent:?} not in what was printed: {printed}");
        Ok(())
    }
}

/// The third disk: encrypted at the source, and without a write cache, which the guest's driver has read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Third {
    Luks,
    Raw,
    /// With a write cache.
    Cached,
}

fn spec(name: &str) -> VmSpec {
    VmSpec { rate: 200, ..VmSpec::new(name, Version::V10) }
}

/// A guest with a raw, a qcow2 and a third disk.
fn define(paths: &Paths, host: &crate::support::Host, name: &str, third: Third) -> Result<Vm> {
    define_with(paths, host, spec(name), third)
}

fn define_with(paths: &Paths, host: &crate::support::Host, mut spec: VmSpec, third: Third) -> Result<Vm> {
    let file = host.dir.join(format!("{}.third", spec.name));
    let secret = host.dir.join("secret");
    fs::write(&secret, SECRET)?;
    spec.extra.extend(third_disk(paths, &file, &secret, third)?);
    Vm::define(paths, host, &spec)
}

fn third_disk(paths: &Paths, file: &Path, secret: &Path, third: Third) -> Result<Vec<String>> {
    let object = format!("secret,id=key,file={}", secret.display());
    let mut create = paths.qemu_img();
    create.args(["create", "-q", "--object", &object]);
    match third {
        Third::Luks | Third::Cached => create.args(["-f", "luks", "-o", "key-secret=key,iter-time=10"]),
        Third::Raw => create.args(["-f", "raw"]),
    };
    run(create.arg(file).arg(LUKS_BYTES.to_string()), LONG)?;
    let mut node = json!({"driver": "raw", "node-name": "vdc", "file": {"driver": "file", "filename": file}});
    if third != Third::Raw {
        node["driver"] = json!("luks");
        node["key-secret"] = json!("key");
    }
    let cache = if third == Third::Cached { "on" } else { "off" };
    let device = format!("virtio-blk-pci,id=disk2,drive=vdc,write-cache={cache}");
    let words = ["-object", &object, "-blockdev", &node.to_string(), "-device", &device];
    Ok(words.map(str::to_owned).to_vec())
}

/// The QEMUs on bravo. Each but `startable` has been started by its operator.
fn targets(paths: &Paths, net: &Net) -> Result<Vec<Vm>> {
    let bravo = &net.bravo;
    let plain = |name: &str| define(paths, bravo, name, Third::Luks);
    let one_disk = |name: &str| VmSpec { disks: vec![DiskFormat::Raw], ..spec(name) };
    let (small, large, startable) = (plain("small")?, plain("large")?, plain("startable")?);
    small.create_disk(1, 63)?;
    large.create_disk(1, 65)?;
    startable.create_disk(0, 63)?;
    let mut locked = one_disk("locked");
    locked.extra = locked_disk(paths, &bravo.dir.join("locked.raw"))?;
    let waiting = vec![
        plain("fits")?,
        define_with(paths, bravo, one_disk("missing"), Third::Luks)?,
        small,
        large,
        define_with(paths, bravo, locked, Third::Luks)?,
        define(paths, bravo, "clear", Third::Raw)?,
        define(paths, bravo, "cached", Third::Cached)?,
        used(plain("used")?)?,
    ];
    waiting.iter().filter(|vm| !vm.is_running()).try_for_each(Vm::start_incoming)?;
    let running = define_with(paths, bravo, VmSpec { rate: 1, ..spec("running") }, Third::Luks)?;
    run(bravo.command(running.start_script()).arg("boot"), SHORT)?;
    Ok(waiting.into_iter().chain([running, startable]).collect())
}

fn locked_disk(paths: &Paths, file: &Path) -> Result<Vec<String>> {
    run(paths.qemu_img().args(["create", "-q", "-f", "raw"]).arg(file).arg("64M"), SHORT)?;
    let node = json!({"driver": "raw", "node-name": "vdb", "read-only": true,
                      "file": {"driver": "file", "filename": file}});
    let words = ["-blockdev", &node.to_string(), "-device", "virtio-blk-pci,id=disk1,drive=vdb"];
    Ok(words.map(str::to_owned).to_vec())
}

/// A QEMU that has waited, and whose incoming migration came to nothing.
fn used(vm: Vm) -> Result<Vm> {
    vm.start_incoming()?;
    let mut qmp = vm.qmp()?;
    qmp.execute("migrate-incoming", json!({"uri": "exec:echo this is no guest", "exit-on-error": false}))?;
    wait_for("the incoming migration to fail", SHORT, || {
        Ok((qmp.query("query-migrate")?["status"] == "failed").then_some(()))
    })?;
    Ok(vm)
}

/// Every name of the cases is the one guest, but for `ghost`, which is none.
fn on_alpha(net: &Net, source: &Vm) -> AgentSpec {
    let names = TARGETS.iter().map(|case| case.vm).chain(["fits", "stranger", "private"]);
    let entry = |name: &str| VmEntry {
        name: name.to_owned(),
        qmp: source.agent_monitor(),
        start: None,
        before_start: None,
    };
    let peer = |name: &str, port: u16| PeerEntry {
        name: name.to_owned(),
        address: Some(format!("{}:{port}", net.bravo.v4)),
        receive: Vec::new(),
    };
    AgentSpec {
        peers: vec![peer("bravo", PORT), peer("mistaken", PORT), peer("deaf", DEAF_PORT)],
        vms: names.map(entry).collect(),
        ..AgentSpec::default()
    }
}

/// Any name may be received but `private`; `stranger` is not known.
fn on_bravo(net: &Net, targets: &[Vm]) -> AgentSpec {
    let names: Vec<&str> =
        targets.iter().map(|vm| vm.spec.name.as_str()).chain(["absent", "private"]).collect();
    let monitor = |name: &str| -> PathBuf {
        let target = targets.iter().find(|vm| vm.spec.name == name);
        target.map_or_else(|| net.bravo.dir.join("nobody.qmp"), Vm::agent_monitor)
    };
    let start = |name: &str| {
        targets.iter().find(|vm| vm.spec.name == name && name == "startable").map(Vm::start_script)
    };
    let entry = |name: &&str| VmEntry {
        name: (*name).to_owned(),
        qmp: monitor(name),
        start: start(name),
        before_start: None,
    };
    let receive = names.iter().chain(&["stranger"]).filter(|name| **name != "private");
    let receive = receive.map(|name| (*name).to_owned()).collect();
    AgentSpec {
        peers: vec![PeerEntry { name: "alpha".to_owned(), address: None, receive }],
        vms: names.iter().map(entry).collect(),
        ..AgentSpec::default()
    }
}

/// All that a QEMU tells of itself and that an undisturbed guest does not change.
fn described(vm: &Vm) -> Result<Value> {
    const QUERIES: [&str; 8] = [
        "query-status",
        "query-jobs",
        "query-block-jobs",
        "query-block-exports",
        "query-migrate",
        "query-migrate-capabilities",
        "query-migrate-parameters",
        "query-fdsets",
    ];
    let mut qmp: Qmp = vm.qmp()?;
    let mut all = json!({"pid": vm.pid(), "starts": vm.starts()});
    for query in QUERIES {
        all[query] = qmp.query(query)?;
    }
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}))?;
    let node = |node: &Value| json!([node["node-name"], node["drv"], node["ro"]]);
    all["nodes"] = nodes.as_array().context("no nodes")?.iter().map(node).collect();
    // A trial was made, and taken back.
    let trial = all["query-migrate"].as_object_mut().context("no answer to query-migrate")?;
    let ended = trial.get("status").is_none_or(|status| status == "cancelled" || status == "failed");
    if ended {
        trial.clear();
    }
    // A job of somebody else's moves on.
    const MOVING: [&str; 7] =
        ["offset", "len", "current-progress", "total-progress", "status", "busy", "actively-synced"];
    for query in ["query-jobs", "query-block-jobs"] {
        MOVING.iter().for_each(|name| forget(&mut all[query], name));
    }
    let descriptors = fs::read_dir(format!("/proc/{}/fd", vm.pid().context("no QEMU")?))?.count();
    all["descriptors"] = json!(descriptors);
    Ok(all)
}

/// Where two snapshots differ: the source's, then the destination's.
fn differences(before: &[Value], after: &[Value]) -> Vec<String> {
    let mut found = Vec::new();
    compare("", &json!(before), &json!(after), &mut found);
    found
}

fn compare(at: &str, before: &Value, after: &Value, found: &mut Vec<String>) {
    match (before, after) {
        (Value::Object(b), Value::Object(a)) if b.keys().eq(a.keys()) => {
            b.keys().for_each(|key| compare(&format!("{at}/{key}"), &b[key], &a[key], found));
        }
        (Value::Array(b), Value::Array(a)) if b.len() == a.len() => {
            b.iter().zip(a).enumerate().for_each(|(n, (b, a))| compare(&format!("{at}/{n}"), b, a, found));
        }
        _ if before != after => found.push(format!("{at}: {before} became {after}")),
        _ => {}
    }
}

fn forget(value: &mut Value, name: &str) {
    match value {
        Value::Object(map) => {
            map.remove(name);
            map.values_mut().for_each(|inner| forget(inner, name));
        }
        Value::Array(list) => list.iter_mut().for_each(|inner| forget(inner, name)),
        _ => {}
    }
}

/// The command line without its agent says where it looked, and does not blame the guest.
fn no_agent(mut agent: Agent) -> Result<()> {
    agent.terminate()?;
    for words in [&["check", "fits", "--to", "bravo"][..], &["migrate", "fits", "--to", "bravo"], &["list"]] {
        let outcome = agent.vmferry(words)?;
        let socket = agent.socket().display().to_string();
        ensure!(outcome.code == 2, "{words:?}: {outcome:?}");
        for word in [&socket, "is it running", "systemctl status vmferry"] {
            ensure!(outcome.stderr.contains(word), "{word:?} not said: {outcome:?}");
        }
    }
    Ok(())
}

/// What was found, but for one note: this machine's own file system may not tell whether it is encrypted (an overlay).
fn but_this_machines(problems: &Value) -> Value {
    let is_others = |p: &&Value| p["severity"] != "note" || p["kind"] != "disk-format";
    problems.as_array().into_iter().flatten().filter(is_others).cloned().collect()
}
