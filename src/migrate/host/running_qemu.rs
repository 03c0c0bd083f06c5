//! How the QEMU of a VM on this host was started, for an operator who is to start one like it elsewhere. Looks and
//! changes nothing; a migration that begins does not wait for it.

use std::time::Duration;

use tokio::time::timeout;

use crate::migrate::host::Host;
use crate::migrate::model::problem::{Problem, ProblemKind, chain};
use crate::qemu::command_line::{Adapted, DiskImage, Elsewhere, Running, adapt};
use crate::qemu::{Disk, Qmp, QmpError, QomGet, QomList};

/// How long its QEMU may take to answer everything.
const LOOK_DEADLINE: Duration = Duration::from_secs(20);

/// A QEMU, and the words that it was started with.
#[derive(Debug)]
struct RunningQemu {
    pid: i32,
    words: Vec<String>,
    running: Running,
}

/// Another program, the images' paths, other paths and what they are there.
type Differences = (Option<String>, Option<String>, Vec<(String, String)>);

/// Its process, and its command line made into that of one which waits for the VM elsewhere.
/// Errors: a problem in an operator's words.
pub async fn for_elsewhere(
    host: &Host,
    vm: &str,
    (program, images, paths): Differences,
) -> Result<(i32, Adapted), Problem> {
    let found = look(host, vm).await?;
    let elsewhere = Elsewhere { program, images, paths };
    Ok((found.pid, adapt(&found.words, &found.running, &elsewhere)))
}

async fn look(host: &Host, vm: &str) -> Result<RunningQemu, Problem> {
    let config = host.vm(vm, "host")?;
    let looking = host.look(vm)?;
    let looked = async {
        let (qmp, _events) = Qmp::connect(&config.qmp, LOOK_DEADLINE).await?;
        let (words, pid) = (qmp.process().command_line(), qmp.process().pid());
        Ok::<_, QmpError>((words, pid, ask(&qmp, vm).await?))
    };
    let seen = tokio::select! {
        biased;
        Some(migration) = looking.taken() => return Err(host.busy(vm, migration)),
        seen = timeout(LOOK_DEADLINE, looked) => seen,
    };
    let unseen = |why: &str, remedy: &str| {
        let text = format!("how the QEMU of VM {vm} was started is not known: {why}");
        Problem::new(ProblemKind::Other, text, remedy)
    };
    match seen {
        Err(_) => Err(unseen("its monitor has another client, or is slow to answer", "try again")),
        Ok(Err(e)) => Err(unseen(&chain(&e), "the VM has to run here, with a monitor for vmferry")),
        Ok(Ok((Some(words), Some(pid), running))) => Ok(RunningQemu { pid, words, running }),
        Ok(Ok(_)) => {
            let why = "the process behind its monitor is none of QEMU's, or this agent may not look at it";
            Err(unseen(why, "`ProtectProc=default` in the agent's unit, and no proxy between"))
        }
    }
}

async fn ask(qmp: &Qmp, vm: &str) -> Result<Running, QmpError> {
    let kind = told(qmp.execute(QomGet { path: "/machine".into(), property: "type".into() }).await)?;
    let kind = kind.as_ref().and_then(|kind| kind.as_str()).unwrap_or_default();
    let devices = told(qmp.execute(QomList { path: "/machine/peripheral".into() }).await)?;
    let device = |name: String, kind: &str| {
        kind.strip_prefix("child<")
            .and_then(|kind| kind.strip_suffix('>'))
            .map(|kind| (name, kind.to_owned()))
    };
    let devices = devices.map(|all| all.into_iter().filter_map(|p| device(p.name, &p.kind)).collect());
    let disks = crate::qemu::disks(qmp).await?;
    Ok(Running {
        vm: vm.to_owned(),
        kind: kind.strip_suffix("-machine").unwrap_or(kind).to_owned(),
        devices,
        disks: disks.iter().filter_map(image).collect(),
    })
}

/// What QEMU refuses to tell is none.
fn told<T>(answer: Result<T, QmpError>) -> Result<Option<T>, QmpError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.desc().is_some() => Ok(None),
        Err(e) => Err(e),
    }
}

fn image(disk: &Disk) -> Option<DiskImage> {
    let top = disk.images.iter().find(|image| !image.backing)?;
    Some(DiskImage { name: disk.name.clone(), format: disk.format.clone(), path: top.filename.clone() })
}
