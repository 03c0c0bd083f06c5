//! What libvirt's XML says of a domain, as far as a migration depends on it. libvirt writes its XML itself, one
//! element a line, so looking for elements is enough.

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Disk {
    pub(super) target: String,
    /// libvirt copies it: it has a source, and is neither read-only nor shared.
    pub(super) is_copied: bool,
    /// Written through the host's cache: libvirt calls that unsafe where the disk is not copied.
    pub(super) is_cached: bool,
}

/// What is known of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Domain {
    pub(super) disks: Vec<Disk>,
    /// What libvirt or QEMU does not migrate, with what to do about it.
    pub(super) hindrances: Vec<(&'static str, &'static str)>,
    /// What depends on the other host.
    pub(super) notes: Vec<(&'static str, &'static str)>,
}

/// What is looked for in the XML.
const HINDRANCES: &[(&str, &str, &str)] = &[
    (
        "<hostdev ",
        "it has a device of the host (<hostdev>), which does not move",
        "detach it first: virsh detach-device",
    ),
    (
        "<launchSecurity ",
        "its memory is encrypted (<launchSecurity>), which QEMU does not migrate",
        "shut it down and start it there",
    ),
    (
        "<shmem ",
        "it has shared memory (<shmem>), which libvirt migrates only where its role is `master`",
        "detach it first",
    ),
    ("<disk type='nvme'", "it has an NVMe disk of the host, which does not move", "detach it first"),
    ("<disk type='vhostvdpa'", "it has a vhost-vdpa disk, which does not move", "detach it first"),
    ("<mirror ", "a block job runs on one of its disks", "end it first: virsh blockjob"),
    ("<driver type='passthrough'", "it has a TPM of the host", "detach it first"),
    (
        "policy='require' name='invtsc'",
        "its CPU has an invariant TSC, which libvirt migrates only with a fixed frequency",
        "set <timer name='tsc' frequency=…/>",
    ),
];

const NOTES: &[(&str, &str, &str)] = &[
    (
        "<cpu mode='host-passthrough'",
        "its CPU is the host's (host-passthrough)",
        "the destination's must be the same model, with the same microcode and QEMU",
    ),
    (
        "<filesystem ",
        "it has a folder of the host (<filesystem>)",
        "libvirt 9 refuses that, newer ones migrate it where its driver can",
    ),
    ("<vsock ", "it has a vsock", "its connections end, and the destination's number must be free"),
    (
        "<graphics type='spice'",
        "it has a SPICE display",
        "viewers are sent to the other host; they go past the tunnel, by their own port",
    ),
];

impl Domain {
    /// Reads libvirt's XML.
    pub(super) fn parse(xml: &str) -> Self {
        let found = |table: &'static [(&str, &str, &str)]| {
            table
                .iter()
                .filter(|(element, ..)| xml.contains(element))
                .map(|(_, what, remedy)| (*what, *remedy))
        };
        let elements = xml.split("<disk ").skip(1).filter_map(|rest| rest.split("</disk>").next());
        Self {
            disks: elements.filter_map(disk).collect(),
            hindrances: found(HINDRANCES).collect(),
            notes: found(NOTES).collect(),
        }
    }

    /// Those that libvirt copies if it is told to copy all.
    pub(super) fn copied(&self) -> usize {
        self.disks.iter().filter(|disk| disk.is_copied).count()
    }
}

fn disk(element: &str) -> Option<Disk> {
    let target = element.split("<target dev='").nth(1)?.split('\'').next()?.to_owned();
    let has = |text: &str| element.contains(text);
    let is_medium = has("device='cdrom'") || has("device='floppy'");
    let is_copied = has("<source ") && !has("<readonly/>") && !has("<shareable/>") && !is_medium;
    let is_safe = has("cache='none'") || has("cache='directsync'");
    Some(Disk { target, is_copied, is_cached: !is_safe })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_told_apart_and_what_does_not_move_is_found() {
        let xml = "<domain type='kvm'>\n  <devices>\n    <disk type='file' device='disk'>\n      <driver name='qemu' type='raw' \
                   cache='none'/>\n      <source file='/a' index='2'/>\n      <target dev='vda' bus='virtio'/>\n    </disk>\n    \
                   <disk type='file' device='cdrom'>\n      <target dev='sda' bus='sata'/>\n      <readonly/>\n    </disk>\n    \
                   <disk type='block' device='disk'>\n      <driver name='qemu'/>\n      <source dev='/b'/>\n      <target dev='vdb'/>\n      \
                   <shareable/>\n    </disk>\n    <hostdev mode='subsystem' type='pci'>\n    </hostdev>\n  </devices>\n</domain>";
        let domain = Domain::parse(xml);
        let named: Vec<_> =
            domain.disks.iter().map(|d| (d.target.as_str(), d.is_copied, d.is_cached)).collect();
        assert_eq!(named, [("vda", true, false), ("sda", false, true), ("vdb", false, true)]);
        assert_eq!(domain.copied(), 1);
        assert!(domain.hindrances.len() == 1 && domain.hindrances[0].0.contains("hostdev"));
        assert_eq!(Domain::parse("<domain/>"), Domain::default());
    }
}
