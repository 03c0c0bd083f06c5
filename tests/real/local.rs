//! A hostile process of another user on the destination's host, while a guest comes: it tries every socket and
//! every descriptor that it can find. And what both hosts' audit records say of that migration.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::faults::{Migration, Plan, Stage};
use crate::support::process::{SHORT, run, start, wait_for};
use crate::support::proof::field;
use crate::support::with_lab;

/// Tries everything until a file is there, or the descriptors of one process once, then says how often, and what
/// let it in. What it looks for greets with
/// `NBDMAGIC`. Monitors are left alone: who may use them is the bed's affair, and they serve one client.
const PROBE: &str = r#"
use strict; use IO::Socket::UNIX; use IO::Socket::INET; use Socket;
my ($run, $stop, $only) = @ARGV; my %tried = map { $_ => 0 } qw(names tcp folders descriptors denied);
sub hear {
    my ($socket, $what) = @_;
    if (!$socket) { $tried{denied}++; return }
    my $ready = ''; vec($ready, fileno($socket), 1) = 1;
    my $said = '';
    sysread($socket, $said, 64) if select($ready, undef, undef, 0.2);
    print "REACHED $what\n" if $said =~ /NBDMAGIC/;
    close $socket;
}
sub unix { my ($path) = @_; IO::Socket::UNIX->new(Type => SOCK_STREAM, Peer => $path) }
sub descriptors {
    my ($process) = @_; $tried{descriptors}++;
    opendir my $folder, "$process/fd" or do { $tried{denied}++; return };
    -S "$process/fd/$_" and hear(unix("$process/fd/$_"), "$process/fd/$_") for grep { /^\d+$/ } readdir $folder;
}
while (1) {
    if ($only) { descriptors("/proc/$only"); last }
    open my $names, '<', '/proc/net/unix'; my %seen;
    while (<$names>) {
        my $name = (split)[7]; next if !defined $name || $seen{$name}++ || $name =~ /\.qmp$/;
        $tried{names}++;
        (my $path = $name) =~ s/^@/\0/;
        hear(unix($path), $name);
    }
    for my $table ('/proc/net/tcp', '/proc/net/tcp6') {
        open my $ports, '<', $table or next;
        while (<$ports>) {
            my ($local, $state) = (split)[1, 3]; next unless $state eq '0A';
            my $port = hex((split /:/, $local)[1]); $tried{tcp}++;
            hear(IO::Socket::INET->new(PeerAddr => "127.0.0.1:$port", Timeout => 1), "port $port");
        }
    }
    $tried{folders}++;
    if (opendir my $folder, "$run/nbd") { hear(unix("$run/nbd/$_"), "$run/nbd/$_") for grep { !/^\./ } readdir $folder }
    else { $tried{denied}++ }
    descriptors($_) for glob '/proc/[0-9]*';
    last if -e $stop;
}
print "$_ $tried{$_}\n" for sort keys %tried;
"#;

/// The probe on the destination's host, by this user; it ends when the file is there.
fn probe(stage: &Stage, user: u32) -> (Command, std::path::PathBuf) {
    let stop = stage.net.bravo.dir.join("probed");
    let run = stage.bravo.socket().parent().map(std::path::Path::to_owned).unwrap_or_default();
    let mut command = stage.net.bravo.command("setpriv");
    let ids = [format!("--reuid={user}"), format!("--regid={user}"), "--clear-groups".to_owned()];
    command.args(ids).args(["perl", "-e", PROBE]).arg(run).arg(&stop);
    (command, stop)
}

/// What an agent's record has of a migration; it is whole.
fn recorded(agent: &crate::support::Agent, id: &str) -> Result<Vec<Value>> {
    let folder = agent.host().dir.join("state/audit");
    let folder = folder.to_str().context("a folder's name")?;
    let judged = agent.vmferry(&["audit", "verify", "--dir", folder])?;
    ensure!(judged.code == 0 && judged.stdout.contains("the running agent's word"), "{judged:?}");
    let lines = agent.vmferry(&["audit", "--json", "--migration", id, "--dir", folder])?;
    lines.stdout.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// Fills the disk of the destination's state until there is room for journals and not for the record.
fn leave_no_room_for_the_record(stage: &Stage) -> Result<std::path::PathBuf> {
    let state = stage.bravo.host().dir.join("state");
    let disk = nix::sys::statvfs::statvfs(&state)?;
    let left = disk.blocks() * disk.fragment_size() / 20 * 3 / 4;
    let filler = state.join("filler");
    let bytes = (disk.blocks_available() * disk.fragment_size()).saturating_sub(left);
    std::fs::write(&filler, vec![1; bytes as usize])?;
    // Whatever is recorded next finds no room.
    let _ = stage.bravo.vmferry(&["migrate", "nobody", "--to", "alpha"])?;
    wait_for("a record that cannot be written", SHORT, || {
        let is_failing = stage.bravo.metrics()?.sum("vmferry_audit_failing", &[])? == 1.0;
        Ok(is_failing.then_some(()))
    })?;
    let log = std::fs::read_to_string(stage.bravo.log())?;
    ensure!(log.contains("the audit record cannot be written"), "{log}");
    Ok(filler)
}

/// Both sides under one id, each with the other's certificate and the head of the other's record.
fn both_have_recorded(stage: &Stage, id: &str) -> Result<()> {
    let (source, destination) = (recorded(&stage.alpha, id)?, recorded(&stage.bravo, id)?);
    for (lines, grant, other) in
        [(&source, "obtained", &stage.bravo), (&destination, "granted", &stage.alpha)]
    {
        let of = |event: &str| lines.iter().filter(|line| line["event"] == event).collect::<Vec<_>>();
        let phases: Vec<_> = of("migration").iter().filter_map(|line| line["phase"].as_str()).collect();
        ensure!(phases.contains(&"mirror") && phases.contains(&"device"), "{phases:?}");
        ensure!(of("migration").last().is_some_and(|line| line["result"] == "moved"), "{lines:#?}");
        let [grant] = of(grant)[..] else { anyhow::bail!("not one {grant}: {lines:#?}") };
        ensure!(grant["certificate"].as_str().is_some_and(|hash| hash.len() == 64), "{grant}");
        ensure!(grant["disks"].as_array().is_some_and(|disks| !disks.is_empty()), "{grant}");
        // The other's record is held to what it said then.
        let anchor = grant["peers_head"].as_str().context("no anchor")?;
        let folder = other.host().dir.join("state/audit");
        let words = ["audit", "verify", "--anchor", anchor, "--dir", folder.to_str().unwrap_or_default()];
        let judged = other.vmferry(&words)?;
        ensure!(judged.code == 0, "{judged:?}");
    }
    let asked = source.iter().find(|line| line["event"] == "answered").context("nobody asked")?;
    ensure!(asked["status"] == 201, "{asked}");
    Ok(())
}

/// Each side's record has the digest of what it hashed of each disk, and the source's also that of the other.
fn both_have_hashed(stage: &Stage, id: &str) -> Result<()> {
    let hashed = |agent, digest: &'static str| {
        wait_for("digests in the record", SHORT, || {
            let lines = recorded(agent, id)?.into_iter().filter(|line| line["event"] == "hashed");
            let of =
                |line: Value| ["/disk", "/pieces", "/bytes", digest].map(|name| line.pointer(name).cloned());
            let digests: Vec<_> = lines.map(of).collect();
            Ok((!digests.is_empty()).then_some(digests))
        })
    };
    let (told, destination) = (hashed(&stage.alpha, "/told/digest")?, hashed(&stage.bravo, "/digest")?);
    ensure!(told == destination, "{told:?}, {destination:?}");
    ensure!(told.iter().all(|values| values.iter().all(Option::is_some)), "{told:?}");
    let own = hashed(&stage.alpha, "/digest")?;
    let different = hashed(&stage.alpha, "/told/different")?;
    for ([.., own], ([.., told], [.., different])) in own.iter().zip(told.iter().zip(&different)) {
        ensure!((own == told) == (*different == Some(0.into())), "{own:?}, {told:?}, {different:?}");
    }
    Ok(())
}

#[test]
fn another_user_does_not_reach_the_exports_and_both_sides_are_recorded() -> Result<()> {
    with_lab("another_user_does_not_reach_the_exports_and_both_sides_are_recorded", |lab| {
        let stage = Stage::set_up(lab, Plan { rate: 60, state_volume_mib: Some(8), ..Plan::ORDINARY })?;
        let filler = leave_no_room_for_the_record(&stage)?;
        for agent in [&stage.alpha, &stage.bravo] {
            let confined = agent.metrics()?.sum("vmferry_sandbox", &[("by", "seccomp")])?;
            ensure!(confined == 1.0, "no seccomp: {}", agent.api("/v1/status")?);
        }
        // From before the listener is there until it is gone.
        let (mut command, stop) = probe(&stage, 61_236);
        let probing = start(&mut command)?;
        let migration = Migration::begin(
            &stage.alpha,
            "web1",
            "bravo",
            &["--limit", "1MiB/s", "--keep-source", "--verify"],
        )?;
        migration
            .reach(&stage.alpha.socket(), "mirror", |p| p["disks"][0]["stream_bytes"].as_u64() > Some(0))?;
        // Root reaches them: the probe finds what there is to find.
        let agent = stage.bravo.pid().context("no agent")?.to_string();
        let by_root = run(probe(&stage, 0).0.arg(agent), SHORT)?;
        ensure!(by_root.contains("REACHED /proc/"), "the probe does not find what is there: {by_root}");
        let free = stage.alpha.vmferry(&["limit", &migration.id, "--rate", "none"])?;
        ensure!(free.code == 0, "{free:?}");
        let report = migration.ended(&stage.alpha)?;
        std::fs::write(stop, "")?;
        ensure!(field(&report, "/outcome/result")? == "moved", "{report}");
        let probed = probing.wait(SHORT)?;
        ensure!(probed.code == 0 && !probed.stdout.contains("REACHED"), "{probed:?}");
        for kind in ["names", "tcp", "folders", "descriptors", "denied"] {
            let tried = probed.stdout.lines().find_map(|line| line.strip_prefix(kind)?.trim().parse().ok());
            ensure!(tried.unwrap_or(0) > 0, "no {kind} were tried: {probed:?}");
        }
        stage.is_moved()?;
        // Its record could not be written all the while, and nothing is missing in it.
        ensure!(stage.bravo.metrics()?.sum("vmferry_audit_failing", &[])? == 1.0);
        std::fs::remove_file(filler)?;
        wait_for("the destination's end in its record", SHORT, || {
            let is_failing = stage.bravo.metrics()?.sum("vmferry_audit_failing", &[])? == 1.0;
            let lines = if is_failing { Vec::new() } else { recorded(&stage.bravo, &migration.id)? };
            Ok(lines.iter().any(|line| line["result"] == "moved").then_some(()))
        })?;
        both_have_hashed(&stage, &migration.id)?;
        both_have_recorded(&stage, &migration.id)
    })
}
