//! The judge of `make chaos` is judged: it sees a guest that runs twice, a write that is lost and a
//! dead guest that writes. Once with a real guest, which is let run on both hosts on purpose.

use std::fs::File;

use crate::support::block::{Head, forge};
use crate::support::process::{LONG, wait_for};
use crate::support::{Guest, Lab, Pair, Version, VmSpec, Watcher, with_lab};
use anyhow::{Result, ensure};

const VM: &str = "web1";
const BLOCKS: u64 = 2048;

fn guest(lab: &Lab, net: &crate::support::Net) -> Result<Guest> {
    let spec = |host: &str| VmSpec {
        rate: 60,
        blocks: BLOCKS,
        extra: vec!["-fw_cfg".to_owned(), format!("name=opt/vmferry/host,string={host}")],
        ..VmSpec::new(VM, Version::V10)
    };
    Guest::define(lab, net, &spec("alpha"), &spec("bravo"))
}

/// That the watcher says so within a while.
fn says(watcher: &Watcher, word: &str) -> Result<()> {
    let violation = wait_for(&format!("the watcher to say {word}"), LONG, || Ok(watcher.check().err()))?;
    ensure!(violation.to_string().contains(word), "it says {violation:#}");
    Ok(())
}

#[test]
fn a_real_guest_that_runs_twice_is_seen() -> Result<()> {
    with_lab("a_real_guest_that_runs_twice_is_seen", |lab| {
        let net = lab.two_hosts()?;
        let guest = guest(lab, &net)?;
        let watcher = Watcher::start([&guest.alpha, &guest.bravo])?;
        guest.alpha.boot()?;
        let pair = Pair::start(lab, net, &[&guest])?;
        let outcome = pair.alpha.vmferry(&["migrate", VM, "--to", "bravo", "--keep-source"])?;
        ensure!(outcome.code == 0, "{outcome:?}");
        pair_wrote(&watcher)?;
        guest.alpha.qmp()?.query("cont")?;
        says(&watcher, "TWO RUNNERS")
    })
}

/// The guest is known to have been on alpha and then on bravo, and nothing is wrong with that.
fn pair_wrote(watcher: &Watcher) -> Result<()> {
    wait_for("the guest to write on bravo", LONG, || {
        let life = watcher.now();
        Ok(life.filter(|l| l.host() == b'b' && l.stays.len() == 2).map(drop))
    })?;
    watcher.look().map(drop)
}

/// Images that are written by the test itself, with a watcher that looks at them.
struct Forged {
    images: [File; 2],
    watcher: Watcher,
}

impl Forged {
    fn new(lab: &Lab) -> Result<Self> {
        let net = lab.two_hosts()?;
        let guest = guest(lab, &net)?;
        let open = |vm: &crate::support::Vm| File::options().write(true).open(vm.disk(0));
        let images = [open(&guest.alpha)?, open(&guest.bravo)?];
        Ok(Self { images, watcher: Watcher::start([&guest.alpha, &guest.bravo])? })
    }

    /// Blocks that a boot made on a host, on the image of host `image`.
    fn write(&self, image: usize, generation: u64, host: u8, seqs: &[u64]) -> Result<()> {
        for seq in seqs {
            forge(&self.images[image], Head { seq: *seq, generation, host }, BLOCKS)?;
        }
        Ok(())
    }
}

#[test]
fn what_is_right_is_not_complained_of() -> Result<()> {
    with_lab("what_is_right_is_not_complained_of", |lab| {
        let forged = Forged::new(lab)?;
        forged.write(0, 7, b'a', &[1, 2, 3])?;
        // A mirror brings the same blocks, in any order.
        forged.write(1, 7, b'a', &[3, 1, 2])?;
        forged.write(1, 7, b'b', &[4, 5])?;
        let life = forged.watcher.look()?;
        ensure!(life.last == 5 && life.stays == [(1, b'a'), (4, b'b')], "{life:?}");
        forged.watcher.ended()?;
        forged.write(0, 8, b'a', &[1])?;
        ensure!(forged.watcher.look()?.generation == 8);
        Ok(())
    })
}

#[test]
fn what_is_wrong_is_seen() -> Result<()> {
    for (name, wrong, word) in [
        (
            "twice",
            Box::new(|f: &Forged| f.write(0, 7, b'a', &[4])) as Box<dyn Fn(&Forged) -> Result<()>>,
            "TWO RUNNERS",
        ),
        ("lost", Box::new(|f: &Forged| f.write(1, 7, b'b', &[7, 8])), "LOST WRITE: block 6"),
        ("second", Box::new(|f: &Forged| f.write(1, 9, b'b', &[1])), "a second guest"),
        (
            "dead",
            Box::new(|f: &Forged| {
                f.watcher.ended()?;
                f.write(1, 7, b'b', &[6])
            }),
            "was ended and yet wrote",
        ),
    ] {
        with_lab(name, |lab| {
            let forged = Forged::new(lab)?;
            forged.write(0, 7, b'a', &[1, 2, 3])?;
            forged.write(1, 7, b'b', &[4, 5])?;
            forged.watcher.look()?;
            wrong(&forged)?;
            says(&forged.watcher, word)
        })?;
    }
    Ok(())
}
