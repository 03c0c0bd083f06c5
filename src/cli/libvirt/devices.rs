//! What of a domain's devices libvirt or QEMU does not migrate, and what of them must be at the destination as well.
//! By libvirt's `qemuMigrationSrcIsAllowed` and QEMU's blockers.

use super::finding::{Finding, refused, warning};
use super::xml::Xml;

/// From this one on QEMU migrates a PCI device of the host if its driver can.
const QEMU_WITH_VFIO: (u32, u32) = (8, 1);

/// `qemu` runs the domain, if that is known.
pub(super) fn findings(xml: &str, qemu: Option<(u32, u32)>) -> Vec<Finding> {
    let domain = Xml::new(xml);
    let mut found = of_the_host(domain, qemu);
    found.extend(of_memory_and_processor(domain));
    found.extend(of_disks(domain));
    found.extend(of_the_destination(domain));
    found
}

/// Devices of the host itself.
fn of_the_host(domain: Xml<'_>, qemu: Option<(u32, u32)>) -> Vec<Finding> {
    let is_paired =
        |device: Xml<'_>| device.first("teaming").is_some_and(|teaming| teaming.is("type", "transient"));
    let mut found = Vec::new();
    for device in domain.all("hostdev") {
        let kind = device.attribute("type").or_else(|| device.attribute("mode")).unwrap_or_default();
        match kind.as_str() {
            "usb" => found.push(warning(
                "it has a USB device of the host, which libvirt moves as if it were at the destination",
                "detach it first (virsh detach-device), or have one with the same address or number there",
            )),
            "pci" if is_paired(device) => {}
            "pci" | "mdev" => found.push(vfio(&format!("<hostdev type='{kind}'>"), qemu)),
            _ => found.push(refused(
                format!("it has a device of the host (<hostdev type='{kind}'>), which does not move"),
                "detach it first: virsh detach-device",
            )),
        }
    }
    let cards = domain.all("interface").into_iter();
    let of_host = cards.filter(|card| card.is("type", "hostdev") && !is_paired(*card));
    found.extend(of_host.map(|_| vfio("<interface type='hostdev'>", qemu)));
    for tpm in domain.all("tpm") {
        found.push(match tpm.first("backend").is_some_and(|backend| backend.is("type", "passthrough")) {
            true => warning(
                "its TPM is the host's: what the guest has sealed with it stays here",
                "detach it first, or give it an emulated one",
            ),
            false => warning(
                "it has a TPM: its state goes along with the RAM",
                "the destination needs swtpm; leave this as it is if it is there",
            ),
        });
    }
    found
}

/// A PCI device of the host.
fn vfio(what: &str, qemu: Option<(u32, u32)>) -> Finding {
    let text = format!("it has a device of the host ({what})");
    match qemu {
        Some(version) if version >= QEMU_WITH_VFIO => warning(
            format!("{text}, which QEMU migrates only if the device and its driver can"),
            "detach it first (virsh detach-device), or know that they can",
        ),
        _ => refused(
            format!("{text}, which QEMU before {}.{} does not migrate", QEMU_WITH_VFIO.0, QEMU_WITH_VFIO.1),
            "detach it first: virsh detach-device",
        ),
    }
}

fn of_memory_and_processor(domain: Xml<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    if domain.has("launchSecurity") {
        found.push(refused(
            "its memory is encrypted (<launchSecurity>), which QEMU does not migrate",
            "shut it down and start it there",
        ));
    }
    if domain.all("shmem").into_iter().any(|shmem| !shmem.is("role", "master")) {
        found.push(refused(
            "it has shared memory (<shmem>), which libvirt migrates only where its role is `master`",
            "detach it first",
        ));
    }
    let requires = |feature: Xml<'_>| feature.is("name", "invtsc") && feature.is("policy", "require");
    let has_frequency = |timer: Xml<'_>| timer.is("name", "tsc") && timer.attribute("frequency").is_some();
    if domain.all("feature").into_iter().any(requires) && !domain.all("timer").into_iter().any(has_frequency)
    {
        found.push(refused(
            "its CPU has an invariant TSC, which libvirt migrates only with a fixed frequency",
            "set <timer name='tsc' frequency=…/>",
        ));
    }
    if domain.first("cpu").is_some_and(|cpu| cpu.is("mode", "host-passthrough")) {
        found.push(warning(
            "its CPU is the host's (host-passthrough)",
            "the destination's must be the same model, with the same microcode and QEMU",
        ));
    }
    if domain.has("hugepages") {
        found.push(warning("its RAM is of huge pages", "the destination needs as many free ones"));
    }
    found
}

fn of_disks(domain: Xml<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    for disk in domain.all("disk") {
        let name = disk.first("target").and_then(|target| target.attribute("dev")).unwrap_or_default();
        for (kind, what) in [("nvme", "an NVMe disk of the host"), ("vhostvdpa", "a vhost-vdpa disk")] {
            if disk.is("type", kind) {
                found.push(refused(format!("disk {name} is {what}, which does not move"), "detach it first"));
            }
        }
        if disk.has("mirror") {
            found.push(refused(format!("a block job runs on disk {name}"), "end it first: virsh blockjob"));
        }
        if disk.has("transient") {
            found.push(refused(
                format!("disk {name} is transient: libvirt does not migrate what is to be forgotten"),
                "detach it first: virsh detach-disk",
            ));
        }
    }
    found
}

/// What must be there as well.
fn of_the_destination(domain: Xml<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    if let Some(loader) = domain.first("loader").map(Xml::text).filter(|loader| !loader.is_empty()) {
        found.push(warning(
            format!("its firmware is {loader}: its NVRAM goes along with the RAM, the firmware does not"),
            "the destination must have the same; leave this as it is if it has",
        ));
    }
    let mut nets: Vec<String> = domain.all("interface").into_iter().filter_map(network).collect();
    nets.sort();
    nets.dedup();
    if !nets.is_empty() {
        found.push(warning(
            format!("its network cards need {}", nets.join(", ")),
            "the destination must have the same by these names; leave this as it is if it has",
        ));
    }
    if domain.has("filesystem") {
        found.push(warning(
            "it has a folder of the host (<filesystem>)",
            "libvirt 9 refuses that, newer ones migrate it where its driver can",
        ));
    }
    if domain.has("vsock") {
        found.push(warning(
            "it has a vsock",
            "its connections end, and the destination's number must be free",
        ));
    }
    if domain.all("graphics").into_iter().any(|graphics| graphics.is("type", "spice")) {
        found.push(warning(
            "it has a SPICE display",
            "viewers are sent to the other host; they go past the tunnel, by their own port",
        ));
    }
    found
}

fn network(card: Xml<'_>) -> Option<String> {
    let source = card.first("source")?;
    for (attribute, what) in [("network", "network"), ("bridge", "bridge"), ("dev", "the host's card")] {
        if let Some(name) = source.attribute(attribute) {
            return Some(format!("{what} {name}"));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is found of these lines: what is refused, and the rest.
    fn of(lines: &str, qemu: (u32, u32)) -> (Vec<String>, Vec<String>) {
        let xml = format!("<domain type='kvm'>\n  {lines}\n</domain>");
        let (refused, rest): (Vec<_>, Vec<_>) =
            findings(&xml, Some(qemu)).into_iter().partition(|finding| finding.refused);
        let texts = |found: Vec<Finding>| found.into_iter().map(|f| f.text).collect();
        (texts(refused), texts(rest))
    }

    #[test]
    fn what_does_not_move_is_refused() {
        for (lines, said) in [
            ("<hostdev mode='subsystem' type='scsi' managed='no'>\n</hostdev>", "type='scsi'"),
            ("<hostdev mode='subsystem' type='pci' managed='yes'>\n</hostdev>", "QEMU before 8.1"),
            ("<interface type='hostdev' managed='yes'>\n</interface>", "<interface type='hostdev'>"),
            ("<launchSecurity type='sev'>\n</launchSecurity>", "encrypted"),
            ("<shmem name='s' role='peer'>\n</shmem>", "shared memory"),
            ("<feature policy='require' name='invtsc'/>", "invariant TSC"),
            ("<disk type='nvme' device='disk'>\n<target dev='vda'/>\n</disk>", "disk vda is an NVMe"),
            (
                "<disk type='file'>\n<mirror type='file'/>\n<target dev='vdb'/>\n</disk>",
                "block job runs on disk vdb",
            ),
            ("<disk type='file'>\n<target dev='vdc'/>\n<transient/>\n</disk>", "disk vdc is transient"),
        ] {
            let (refused, _) = of(lines, (7, 2));
            assert!(refused.len() == 1 && refused[0].contains(said), "{lines}: {refused:?}");
        }
    }

    #[test]
    fn what_moves_is_not_refused() {
        for lines in [
            "<hostdev mode='subsystem' type='usb'>\n</hostdev>",
            "<hostdev mode='subsystem' type='pci'>\n<teaming type='transient' persistent='ua-b'/>\n</hostdev>",
            "<interface type='hostdev'>\n<teaming type='transient' persistent='ua-b'/>\n</interface>",
            "<shmem name='s' role='master'>\n</shmem>",
            "<feature policy='require' name='invtsc'/>\n<timer name='tsc' frequency='2400000000'/>",
            "<feature policy='disable' name='invtsc'/>",
            "<metadata>\n<hostdev type='scsi'/>\n</metadata>",
            "<description>&lt;hostdev type='scsi'/&gt;</description>",
        ] {
            assert_eq!(of(lines, (7, 2)).0, Vec::<String>::new(), "{lines}");
        }
        assert_eq!(of("<hostdev type='pci'>\n</hostdev>", (8, 1)).0, Vec::<String>::new());
    }

    /// A domain as virt-manager makes it.
    #[test]
    fn what_the_destination_needs_is_said() {
        let lines = "<os>\n<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>\n\
                     <nvram template='/t.fd'>/var/lib/libvirt/qemu/nvram/web1_VARS.fd</nvram>\n</os>\n\
                     <cpu mode='host-passthrough' check='none'/>\n<memoryBacking>\n<hugepages/>\n</memoryBacking>\n\
                     <interface type='network'>\n<source network='default' portid='x'/>\n</interface>\n\
                     <interface type='bridge'>\n<source bridge='br0'/>\n</interface>\n\
                     <tpm model='tpm-crb'>\n<backend type='emulator' version='2.0'/>\n</tpm>\n\
                     <graphics type='spice' autoport='yes'>\n</graphics>\n<filesystem type='mount'>\n</filesystem>";
        let (refused, rest) = of(lines, (7, 2));
        assert_eq!(refused, Vec::<String>::new());
        let all = rest.join("\n");
        for said in [
            "OVMF_CODE_4M.fd",
            "host-passthrough",
            "huge pages",
            "bridge br0, network default",
            "TPM",
            "SPICE",
            "<filesystem>",
        ] {
            assert!(all.contains(said), "{said}: {all}");
        }
        assert_eq!(rest.len(), 7, "{all}");
        let host_tpm = "<tpm model='tpm-tis'>\n<backend type='passthrough'>\n</backend>\n</tpm>";
        assert!(of(host_tpm, (7, 2)).1[0].contains("stays here"));
    }
}
