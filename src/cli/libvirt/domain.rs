//! What libvirt's XML says of a domain's disks, as far as a migration depends on it.

use super::xml::Xml;

/// A disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Disk {
    pub(super) target: String,
    /// libvirt copies it: it has a source, and is neither read-only nor shared.
    pub(super) is_copied: bool,
    pub(super) is_read_only: bool,
    /// Both hosts may write it.
    pub(super) is_shared: bool,
    /// A CD-ROM or floppy drive.
    pub(super) is_drive: bool,
    /// The medium of a drive, if libvirt wants it at the destination.
    pub(super) medium: Option<String>,
    /// Where it is: a file, a device, or a name.
    pub(super) source: Option<String>,
    /// That is a file.
    pub(super) is_file: bool,
}

/// What is known of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Domain {
    pub(super) disks: Vec<Disk>,
}

impl Domain {
    /// Reads libvirt's XML.
    pub(super) fn parse(xml: &str) -> Self {
        Self { disks: Xml::new(xml).all("disk").into_iter().filter_map(disk).collect() }
    }

    /// Those that libvirt copies if it is told to copy all.
    pub(super) fn copied(&self) -> usize {
        self.disks.iter().filter(|disk| disk.is_copied).count()
    }
}

fn disk(element: Xml<'_>) -> Option<Disk> {
    let target = element.first("target")?.attribute("dev")?;
    // The first is its own; a backing file has another below <backingStore>.
    let source = element.first("source");
    let of = |name: &str| source.and_then(|source| source.attribute(name));
    let place = of("file").or_else(|| of("dev")).or_else(|| of("volume")).or_else(|| of("name"));
    let is_drive = element.is("device", "cdrom") || element.is("device", "floppy");
    let is_wanted = of("startupPolicy").is_none_or(|policy| policy != "optional");
    let (is_shared, is_read_only) = (element.has("shareable"), element.has("readonly"));
    Some(Disk {
        target,
        is_copied: source.is_some() && !is_read_only && !is_shared && !is_drive,
        is_read_only,
        is_shared,
        is_drive,
        medium: place.clone().filter(|_| is_drive && is_wanted),
        source: place,
        is_file: element.is("type", "file"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_told_apart() {
        let xml = "<domain type='kvm'>\n  <devices>\n    <disk type='file' device='disk'>\n      <driver name='qemu' type='raw' \
                   cache='none'/>\n      <source file='/a' index='2'/>\n      <target dev='vda' bus='virtio'/>\n    </disk>\n    \
                   <disk type='file' device='cdrom'>\n      <target dev='sda' bus='sata'/>\n      <readonly/>\n    </disk>\n    \
                   <disk type='file' device='cdrom'>\n      <source file='/d.iso' startupPolicy='optional'/>\n      \
                   <target dev='sdb' bus='sata'/>\n      <readonly/>\n    </disk>\n    \
                   <disk type='file' device='cdrom'>\n      <source file='/e.iso'/>\n      <target dev='sdc' bus='sata'/>\n      \
                   <readonly/>\n    </disk>\n    <disk type='block' device='disk'>\n      <driver name='qemu'/>\n      \
                   <source dev='/b'/>\n      <target dev='vdb'/>\n      <shareable/>\n    </disk>\n  </devices>\n</domain>";
        let domain = Domain::parse(xml);
        let named: Vec<_> = domain
            .disks
            .iter()
            .map(|d| (d.target.as_str(), d.is_copied, d.is_read_only, d.is_shared))
            .collect();
        let drive = |name| (name, false, true, false);
        assert_eq!(
            named,
            [
                ("vda", true, false, false),
                drive("sda"),
                drive("sdb"),
                drive("sdc"),
                ("vdb", false, false, true)
            ]
        );
        let media: Vec<_> = domain.disks.iter().map(|d| d.medium.as_deref()).collect();
        assert_eq!(media, [None, None, None, Some("/e.iso"), None]);
        assert_eq!(domain.disks[0].source.as_deref(), Some("/a"));
        assert!(domain.disks[0].is_file && !domain.disks[4].is_file);
        assert_eq!(domain.copied(), 1);
        assert_eq!(Domain::parse("<domain/>"), Domain::default());
    }
}
