//! The command line of a running QEMU, made into that of one which waits for its guest on another host. Pure:
//! looks at words, and at what was asked of that QEMU. What it makes is for a person to read and to put into
//! place, never to be run as a peer has sent it.

mod option;

use std::collections::{BTreeMap, BTreeSet};

use option::{Opt, Values, parse};

/// What is known of the QEMU besides its words.
#[derive(Debug, Clone, Default)]
pub struct Running {
    pub vm: String,
    /// The machine's type with its version.
    pub kind: String,
    /// Devices that have an id, and their types; none if QEMU does not say.
    pub devices: Option<BTreeMap<String, String>>,
    pub disks: Vec<DiskImage>,
}

/// A disk, and the file that it stands on.
#[derive(Debug, Clone)]
pub struct DiskImage {
    pub name: String,
    pub format: String,
    pub path: String,
}

/// What is to be otherwise on the other host.
#[derive(Debug, Clone, Default)]
pub struct Elsewhere {
    pub program: Option<String>,
    /// Where a disk's image is there: `{vm}`, `{disk}` and `{format}` stand for their names.
    pub images: Option<String>,
    /// Paths, or what they begin with, and what is there instead.
    pub paths: Vec<(String, String)>,
}

/// The other command line, and what is to be said of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Adapted {
    pub words: Vec<String>,
    /// What is not as it was.
    pub changed: Vec<String>,
    /// What could not be decided.
    pub undecided: Vec<String>,
    /// Paths that it needs there.
    pub paths: Vec<String>,
}

/// Options that only the first start needs, and why they are left out.
const LEFT_OUT: [(&str, &str); 5] = [
    ("daemonize", "who starts it keeps it"),
    ("pidfile", "the agent knows its QEMU by its monitor"),
    ("loadvm", "the guest comes by the migration"),
    ("incoming", "the guest comes by the migration"),
    ("preconfig", "the machine is made at once"),
];
/// Parts of an option that name a descriptor of the process that started QEMU.
const DESCRIPTORS: [&str; 4] = ["fd", "fds", "vhostfd", "vhostfds"];

/// Makes it. The first word is the program.
#[must_use]
pub fn adapt(words: &[String], running: &Running, elsewhere: &Elsewhere) -> Adapted {
    let mut made = Adapted::default();
    let program = words.first().cloned().unwrap_or_default();
    made.words.push(elsewhere.program.clone().unwrap_or(program));
    let mut options = parse(words.get(1..).unwrap_or_default());
    let all: String = words.join("\n");
    pin_machine(&mut options, &running.kind, &mut made);
    compare_devices(&mut options, running, &mut made);
    for disk in &running.disks {
        let is_told = options.iter().any(|option| option.values().strings().iter().any(|v| *v == disk.path));
        if !is_told {
            made.undecided.push(format!(
                "disk {} stands on {} now, which the command line does not name: it was plugged in, or a snapshot was made, since the start",
                disk.name, disk.path
            ));
        }
    }
    let images = images_elsewhere(running, elsewhere);
    for option in options {
        adapt_option(option, &images, elsewhere, &mut made);
    }
    if all.contains("/dev/fdset/") {
        made.undecided.push("/dev/fdset/ is a descriptor that it was given; name the file".into());
    }
    made.words.extend(["-incoming", "defer", "-S"].map(str::to_owned));
    made.paths.sort();
    made.paths.dedup();
    made
}

fn images_elsewhere(running: &Running, elsewhere: &Elsewhere) -> BTreeMap<String, String> {
    let there = |disk: &DiskImage| {
        let pattern = elsewhere.images.as_ref()?;
        let path = pattern.replace("{vm}", &running.vm).replace("{disk}", &disk.name);
        Some((disk.path.clone(), path.replace("{format}", &disk.format)))
    };
    running.disks.iter().filter_map(there).collect()
}

/// An alias is another machine on another host.
fn pin_machine(options: &mut Vec<Opt>, kind: &str, made: &mut Adapted) {
    if kind.is_empty() {
        made.undecided
            .push("QEMU does not say which machine it is: write its version, as in pc-q35-7.2".into());
        return;
    }
    let machine = options.iter_mut().filter(|option| ["machine", "M"].contains(&option.name.as_str()));
    for option in machine {
        let Values::Parts(mut parts) = option.values() else { continue };
        let is_kind = |(at, (key, value)): (usize, &(Option<String>, String))| {
            key.as_deref() == Some("type") || (at == 0 && key.is_none() && !value.is_empty())
        };
        let Some(at) = parts.iter().enumerate().position(is_kind) else { continue };
        let was = std::mem::replace(&mut parts[at].1, kind.to_owned());
        if was != kind {
            made.changed.push(format!("machine {was} is {kind}"));
            option.set(&Values::Parts(parts));
        }
        return;
    }
    made.changed.push(format!("the machine, which was not named, is {kind}"));
    options.insert(0, Opt { name: "machine".into(), value: Some(kind.to_owned()) });
}

/// What was plugged in or pulled since the start.
fn compare_devices(options: &mut Vec<Opt>, running: &Running, made: &mut Adapted) {
    let Some(present) = &running.devices else {
        made.undecided.push("QEMU does not say which devices it has: compare them yourself".into());
        return;
    };
    let mut told = BTreeSet::new();
    options.retain(|option| {
        let id = if option.name == "device" { option.values().get("id").map(str::to_owned) } else { None };
        let Some(id) = id else { return true };
        let is_there = present.contains_key(&id);
        if !is_there {
            made.changed.push(format!("device {id} was pulled since the start, and is left out"));
        }
        told.insert(id);
        is_there
    });
    let from_file =
        if options.iter().any(|option| option.name == "readconfig") { ", or -readconfig has it" } else { "" };
    for (id, kind) in present.iter().filter(|(id, _)| !told.contains(*id)) {
        made.undecided.push(format!(
            "device {id} ({kind}) is not in the command line: it was plugged in since the start{from_file}; add a -device, with its back end, at the same address"
        ));
    }
}

fn adapt_option(
    mut option: Opt,
    images: &BTreeMap<String, String>,
    elsewhere: &Elsewhere,
    made: &mut Adapted,
) {
    let name = option.name.clone();
    if let Some((_, why)) = LEFT_OUT.iter().find(|(left_out, _)| *left_out == name) {
        made.changed.push(format!("-{name} is left out: {why}"));
        return;
    }
    match name.as_str() {
        "S" => return,
        "add-fd" => {
            let what = option.value.unwrap_or_default();
            made.undecided.push(format!("-add-fd {what} is left out: that descriptor is not there"));
            return;
        }
        "snapshot" => made.undecided.push("-snapshot: what the guest writes is gone when QEMU ends".into()),
        _ => {}
    }
    let mut values = option.values();
    let mut is_changed = drop_descriptors(&name, &mut values, made);
    if name == "object" && values.get("data").is_some() && values.strings().contains(&"secret") {
        let id = values.get("id").unwrap_or("?").to_owned();
        made.undecided.push(format!("secret {id} is here in clear: use `file=` and keep it from others"));
    }
    values.each_path(&mut |path| {
        let mapped = images.get(path.as_str()).cloned().or_else(|| moved(path, &elsewhere.paths));
        if let Some(there) = mapped.filter(|there| there != path) {
            made.changed.push(format!("{path} is {there}"));
            *path = there;
            is_changed = true;
        }
        made.paths.push(path.clone());
    });
    if is_changed {
        option.set(&values);
    }
    made.words.extend(option.into_words());
}

fn drop_descriptors(name: &str, values: &mut Values, made: &mut Adapted) -> bool {
    let gone: Vec<&str> = DESCRIPTORS.into_iter().filter(|key| values.remove(key)).collect();
    if gone.is_empty() {
        return false;
    }
    let id = values.get("id").unwrap_or("without an id").to_owned();
    made.undecided.push(format!(
        "-{name} {id} had a descriptor of the program that started it ({}): say what it is there, as `ifname=` of a tap or `path=` of a socket",
        gone.join(", ")
    ));
    true
}

/// By the longest beginning, in whole parts of the path.
fn moved(path: &str, paths: &[(String, String)]) -> Option<String> {
    let rest = |from: &str| {
        let rest = path.strip_prefix(from.trim_end_matches('/'))?;
        (rest.is_empty() || rest.starts_with('/')).then(|| rest.to_owned())
    };
    let matching = paths.iter().filter_map(|(from, to)| Some((from.len(), to, rest(from)?)));
    let (_, to, rest) = matching.max_by_key(|(length, ..)| *length)?;
    Some(format!("{}{rest}", to.trim_end_matches('/')))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split('|').map(str::to_owned).collect()
    }

    fn running(devices: &[(&str, &str)], disks: &[(&str, &str)]) -> Running {
        Running {
            vm: "web1".into(),
            kind: "pc-q35-7.2".into(),
            devices: Some(devices.iter().map(|(id, kind)| ((*id).into(), (*kind).into())).collect()),
            disks: disks
                .iter()
                .map(|(name, path)| DiskImage {
                    name: (*name).into(),
                    format: "raw".into(),
                    path: (*path).into(),
                })
                .collect(),
        }
    }

    #[test]
    fn what_is_of_the_first_start_or_of_its_host_alone_is_not_taken_along() {
        let line = "/usr/bin/qemu|-M|q35,accel=kvm|-daemonize|-pidfile|/run/x.pid|--loadvm|s1|-S\
            |-qmp|unix:/run/qemu/web1/agent.qmp,server=on,wait=off|-append|root=/dev/vda, x=/y|-m|2G\
            |-netdev|tap,id=net0,fd=33,vhost=on,vhostfd=34|-add-fd|fd=5,set=1|-incoming|tcp:0:1";
        let adapted = adapt(&words(line), &running(&[], &[]), &Elsewhere::default());
        let expected = "/usr/bin/qemu|-M|pc-q35-7.2,accel=kvm|-qmp|unix:/run/qemu/web1/agent.qmp,server=on,wait=off\
            |-append|root=/dev/vda, x=/y|-m|2G|-netdev|tap,id=net0,vhost=on|-incoming|defer|-S";
        assert_eq!(adapted.words.join("|"), expected);
        assert_eq!(adapted.paths, ["/run/qemu/web1/agent.qmp"]);
        for said in
            ["-daemonize is left out", "-pidfile", "-loadvm", "-incoming", "machine q35 is pc-q35-7.2"]
        {
            assert!(adapted.changed.iter().any(|line| line.contains(said)), "{said}: {adapted:?}");
        }
        for said in ["-netdev net0 had a descriptor", "-add-fd fd=5,set=1"] {
            assert!(adapted.undecided.iter().any(|line| line.contains(said)), "{said}: {adapted:?}");
        }
    }

    #[test]
    fn disks_are_where_the_other_host_has_them() {
        let line = "qemu|-machine|pc-q35-7.2|-blockdev|{\"driver\":\"raw\",\"node-name\":\"n\",\"file\":{\"driver\":\"file\",\"filename\":\"/a/0.raw\"}}\
            |-drive|file=/a/x,,y.raw,if=none,id=d1|-hdc|/a/2.raw|-kernel|/lab/vmlinuz\
            |-object|secret,id=s0,data=abc|-chardev|socket,id=c,path=/run/a/web1.sock";
        let disks = [("vda", "/a/0.raw"), ("vdb", "/a/x,y.raw"), ("vdc", "/a/2.raw"), ("vdd", "/a/snapshot")];
        let elsewhere = Elsewhere {
            program: Some("/opt/qemu".into()),
            images: Some("/b/{vm}-{disk}.{format}".into()),
            paths: vec![
                ("/run".into(), "/x".into()),
                ("/run/a/".into(), "/run/b".into()),
                ("/la".into(), "/".into()),
            ],
        };
        let adapted = adapt(&words(line), &running(&[], &disks), &elsewhere);
        let expected = "/opt/qemu|-machine|pc-q35-7.2\
            |-blockdev|{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"/b/web1-vda.raw\"},\"node-name\":\"n\"}\
            |-drive|file=/b/web1-vdb.raw,if=none,id=d1|-hdc|/b/web1-vdc.raw|-kernel|/lab/vmlinuz\
            |-object|secret,id=s0,data=abc|-chardev|socket,id=c,path=/run/b/web1.sock|-incoming|defer|-S";
        let normal = |text: &str| {
            text.split('|')
                .map(|word| {
                    serde_json::from_str::<serde_json::Value>(word).map_or(word.to_owned(), |v| v.to_string())
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(normal(&adapted.words.join("|")), normal(expected));
        let undecided = adapted.undecided.join("\n");
        assert!(
            undecided.contains("disk vdd stands on /a/snapshot") && undecided.contains("secret s0"),
            "{undecided}"
        );
        assert!(!undecided.contains("vdb"), "{undecided}");
    }

    /// QEMU brings neither along: a guest that has been told of no write cache must not come to one.
    #[test]
    fn the_write_cache_stays_as_it_is() {
        let line = "qemu|-machine|pc-q35-7.2|-device|virtio-blk-pci,id=disk0,drive=n,write-cache=off\
            |-device|{\"driver\":\"scsi-hd\",\"id\":\"disk1\",\"write-cache\":\"off\"}\
            |-drive|if=none,id=d2,cache=directsync,file=/a/2.raw|-hda|/a/3.raw";
        let now = running(&[("disk0", "virtio-blk-pci"), ("disk1", "scsi-hd")], &[("disk2", "/a/2.raw")]);
        let elsewhere = Elsewhere { images: Some("/b/{disk}".into()), ..Elsewhere::default() };
        let adapted = adapt(&words(line), &now, &elsewhere);
        let expected = format!("{}|-incoming|defer|-S", line.replace("/a/2.raw", "/b/disk2"));
        assert_eq!(adapted.words.join("|"), expected);
    }

    #[test]
    fn what_was_plugged_in_or_pulled_since_is_said() {
        let line = "qemu|-device|virtio-net-pci,id=net0|-device|{\"driver\":\"virtio-rng-pci\",\"id\":\"rng0\"}|-device|usb-tablet";
        let now = running(&[("net0", "virtio-net-pci"), ("disk9", "virtio-blk-pci")], &[]);
        let adapted = adapt(&words(line), &now, &Elsewhere::default());
        assert_eq!(
            adapted.words.join("|"),
            "qemu|-machine|pc-q35-7.2|-device|virtio-net-pci,id=net0|-device|usb-tablet|-incoming|defer|-S"
        );
        assert!(adapted.changed.iter().any(|line| line.contains("device rng0 was pulled")), "{adapted:?}");
        assert!(adapted.undecided.iter().any(|line| line.contains("disk9 (virtio-blk-pci)")), "{adapted:?}");
        let blind = Running { devices: None, kind: String::new(), ..now };
        assert_eq!(adapt(&words(line), &blind, &Elsewhere::default()).undecided.len(), 2);
    }

    #[test]
    fn whatever_the_words_are_nothing_breaks() {
        for line in [
            "",
            "qemu",
            "qemu|-",
            "qemu|--",
            "qemu|-device",
            "qemu|disk.img",
            "qemu|-M|",
            "qemu|-drive|,,,|-blockdev|{",
            "qemu|-object|=,=x",
        ] {
            let adapted = adapt(&words(line), &running(&[], &[]), &Elsewhere::default());
            assert!(adapted.words.ends_with(&["-incoming", "defer", "-S"].map(str::to_owned)), "{line}");
        }
    }
}
