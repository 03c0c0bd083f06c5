//! Replicas that a host keeps for peers: only who has made one may end it, and only what the agent has made for it, as
//! it was left, is removed.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde_json::{Value, json};
use uuid::Uuid;
use vmferry::migrate::message::{EndReplica, EndedReplica, Request, Response};
use vmferry::net::session::Session;

use super::victim::{Attacker, Victim, ask};
use crate::api::schema::Description;

/// What an agent has written of a replica with one image, as that is now.
fn record(vm: &str, peer: &str, image: &Path) -> Value {
    let file = fs::metadata(image).unwrap();
    let born = file.created().ok().and_then(|born| born.duration_since(UNIX_EPOCH).ok());
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let stamp = json!({"disk": "vda", "device": file.dev(), "inode": file.ino(), "bytes": file.len(),
        "written_s": file.mtime(), "written_ns": file.mtime_nsec()});
    let made =
        json!({"device": file.dev(), "inode": file.ino(), "born_ns": born.map(|b| b.as_nanos() as u64)});
    json!({"format": 1, "replica": {"vm": vm, "peer": peer,
        "left": {"after": Uuid::new_v4(), "began_at": 1, "stamp": {"boot_id": boot.trim(), "files": [stamp]}},
        "made": [{"image": {"path": image, "made": made}}]}})
}

/// A replica of bravo's in a victim's state folder.
struct Kept {
    record: PathBuf,
    image: PathBuf,
}

impl Kept {
    fn new(victim: &Victim, vm: &str) -> Self {
        let folder = victim.folder.path().join("state/replicas");
        fs::create_dir_all(&folder).unwrap();
        let image = victim.folder.path().join(format!("{vm}.raw"));
        fs::write(&image, vm).unwrap();
        let path = folder.join(format!("kept.{vm}@bravo.json"));
        fs::write(&path, record(vm, "bravo", &image).to_string()).unwrap();
        Self { record: path, image }
    }

    fn is_there(&self) -> [bool; 2] {
        [self.record.exists(), self.image.exists()]
    }
}

async fn end(session: &Session, vm: &str, images: bool) -> Result<EndedReplica, String> {
    match ask(session, Request::EndReplica(EndReplica { vm: vm.into(), images })).await {
        Response::ReplicaEnded(ended) => Ok(ended),
        Response::Refused(refusal) => Err(refusal.text),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_is_ended_by_its_peer_alone() {
    let victim = Victim::start_with(|text| {
        text.replace("identity = 'charlie'\n", "identity = 'charlie'\nreceive = ['web*']\n")
    });
    let (kept, other) = (Kept::new(&victim, "web1"), Kept::new(&victim, "web2"));
    let (a, b) = (Attacker::new(&victim, "bravo"), Attacker::new(&victim, "charlie"));
    let (bravo, charlie) = (a.session(&victim).await, b.session(&victim).await);
    // charlie may send it here, and has no replica.
    let none = end(&charlie, "web1", true).await.unwrap();
    assert!(!none.was_kept && none.left.is_empty(), "{none:?}");
    let refused = end(&bravo, "db1", true).await.unwrap_err();
    assert!(refused.contains("does not permit bravo to send VM db1"), "{refused}");
    for name in ["../web1", "web1@bravo", "web1.json", ""] {
        end(&bravo, name, true).await.unwrap_err();
    }
    assert_eq!(kept.is_there(), [true, true]);
    let listed = victim.get("/v1/replicas");
    assert_eq!(listed.as_array().map(Vec::len), Some(2), "{listed}");
    Description::load().accepts("get", "/v1/replicas", &(200, "application/json".into(), listed.to_string()));

    let ended = end(&bravo, "web1", false).await.unwrap();
    assert!(ended.was_kept && ended.left.is_empty(), "{ended:?}");
    assert_eq!(kept.is_there(), [false, true], "its image was not to go");
    assert_eq!(other.is_there(), [true, true]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_an_image_that_nobody_has_used_goes_with_its_replica() {
    let victim = Victim::start();
    let attacker = Attacker::new(&victim, "bravo");
    let bravo = attacker.session(&victim).await;
    let stays = async |kept: &Kept, why: &str| {
        let ended = end(&bravo, "web1", true).await.unwrap();
        let said = ended.left.join("\n");
        assert!(said.contains(&format!("{} stays: ", kept.image.display())) && said.contains(why), "{said}");
        assert_eq!(kept.is_there(), [true, true], "{why}");
    };
    let changed = |change: &dyn Fn(&mut Value)| {
        let kept = Kept::new(&victim, "web1");
        let mut written: Value = serde_json::from_slice(&fs::read(&kept.record).unwrap()).unwrap();
        change(&mut written["replica"]);
        fs::write(&kept.record, written.to_string()).unwrap();
        kept
    };
    let touched = changed(&|replica| {
        let then = &mut replica["left"]["stamp"]["files"][0]["written_ns"];
        *then = json!(then.as_i64().unwrap() ^ 1);
    });
    stays(&touched, "it was changed since it was copied").await;
    let another = changed(&|replica| replica["made"][0]["image"]["made"]["inode"] = json!(1));
    stays(&another, "it is another file than the one that was made").await;
    let booted = changed(&|replica| replica["left"]["stamp"]["boot_id"] = json!("another"));
    stays(&booted, "the host was booted since").await;
    let unseen = changed(&|replica| replica["left"] = json!(null));
    stays(&unseen, "nobody saw how its last run left it").await;
    let kept = Kept::new(&victim, "web1");
    let monitor = std::os::unix::net::UnixListener::bind(victim.folder.path().join("web1.qmp")).unwrap();
    // Whatever answers there, or does not.
    std::thread::spawn(move || monitor.incoming().for_each(drop));
    stays(&kept, "a QEMU of the VM is there").await;
    fs::remove_file(victim.folder.path().join("web1.qmp")).unwrap();

    let ended = end(&bravo, "web1", true).await.unwrap();
    assert!(ended.was_kept && ended.left.is_empty(), "{ended:?}");
    assert_eq!(kept.is_there(), [false, false]);
}
