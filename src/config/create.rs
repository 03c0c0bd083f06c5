//! `[create]`: the images that an agent makes for guests that come here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// QEMU's smallest and largest cluster of a qcow2 image.
const CLUSTER_KIB_MAX: u32 = 2048;
/// The longest name of a disk that becomes a part of a file's name.
const DISK_NAME_BYTES_MAX: usize = 64;

/// How images are made that are not there yet.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateConfig {
    /// Where a disk's image is: `{vm}`, `{disk}` and `{format}` stand for their names.
    pub path: String,
    #[serde(default)]
    pub format: CreateFormat,
    /// What an image stands on whose disk is copied by its topmost image alone; as `path`, but for `{format}`.
    #[serde(default)]
    pub backing: Option<String>,
    #[serde(default = "default_backing_format")]
    pub backing_format: BackingFormat,
    /// Of qcow2 images; QEMU's own size by default.
    pub cluster_kib: Option<u32>,
    #[serde(default)]
    pub preallocation: Preallocation,
    /// Of the files, in octal.
    #[serde(default = "default_mode")]
    pub mode: String,
    /// An image stays although its guest did not come.
    #[serde(default)]
    pub keep: bool,
    #[serde(default = "default_qemu_img")]
    pub qemu_img: PathBuf,
    /// Makes what is to be at `path` instead, with its arguments.
    #[serde(default)]
    pub command: Vec<String>,
    /// Removes what `command` has made.
    #[serde(default)]
    pub remove: Vec<String>,
}

/// An image's format.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CreateFormat {
    #[default]
    Raw,
    Qcow2,
    /// As the source has it; raw for what is neither of the two.
    Source,
}

/// The format of what an image stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackingFormat {
    Raw,
    Qcow2,
}

impl BackingFormat {
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

fn default_backing_format() -> BackingFormat {
    BackingFormat::Qcow2
}

/// What an image occupies from the beginning, as QEMU names it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preallocation {
    #[default]
    Off,
    Metadata,
    Falloc,
    Full,
}

impl Preallocation {
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
    }
}

fn default_mode() -> String {
    "0600".into()
}

fn default_qemu_img() -> PathBuf {
    "qemu-img".into()
}

impl CreateConfig {
    pub(super) fn check(&self, key: &str) -> Result<(), (String, String)> {
        let problem = |field: &str, problem: String| Err((format!("{key}.{field}"), problem));
        let values = BTreeMap::from([("{vm}", "v"), ("{disk}", "d"), ("{format}", "f")]);
        let known = filled(&self.path, &values);
        if known.contains(['{', '}']) {
            return problem(
                "path",
                format!("{:?} has other braces than {{vm}}, {{disk}}, {{format}}", self.path),
            );
        }
        let is_file = Path::new(&known).file_name().is_some() && !known.ends_with('/');
        if !is_file || Path::new(&known).components().any(|part| part.as_os_str() == "..") {
            return problem("path", format!("{:?} is no path of a file", self.path));
        }
        if let Some(backing) = &self.backing {
            let known = filled(backing, &BTreeMap::from([("{vm}", "v"), ("{disk}", "d")]));
            if known.contains(['{', '}']) || known.is_empty() || known == filled(&self.path, &values) {
                return problem(
                    "backing",
                    format!("{backing:?} is no path of another file, with {{vm}}, {{disk}}"),
                );
            }
        }
        if key == "create" && !self.path.contains("{vm}") {
            return problem("path", "all VMs would have one file: write {vm} into it".into());
        }
        if self.cluster_kib.is_some_and(|kib| !kib.is_power_of_two() || kib > CLUSTER_KIB_MAX) {
            return problem("cluster_kib", format!("a power of 2 up to {CLUSTER_KIB_MAX} is expected"));
        }
        if self.format == CreateFormat::Raw && self.preallocation == Preallocation::Metadata {
            return problem("preallocation", "a raw image has no metadata; write off, falloc or full".into());
        }
        if self.command.is_empty() != self.remove.is_empty() {
            return problem("remove", "what `command` makes `remove` removes: there are both or none".into());
        }
        if [&self.command, &self.remove].iter().any(|words| words.first().is_some_and(String::is_empty)) {
            return problem("command", "a command begins with a program".into());
        }
        match self.mode_bits() {
            Some(_) => Ok(()),
            None => problem("mode", format!("{:?} is no mode of a file; write 0600 or 0660", self.mode)),
        }
    }

    pub(super) fn resolve(&mut self, base: &Path) {
        for path in std::iter::once(&mut self.path).chain(&mut self.backing) {
            *path = base.join(&path).to_string_lossy().into_owned();
        }
        if self.qemu_img.components().count() > 1 {
            self.qemu_img = base.join(&self.qemu_img);
        }
    }

    /// The programs that make and remove.
    pub fn programs(&self) -> impl Iterator<Item = &Path> {
        let commands = [&self.command, &self.remove].into_iter().filter_map(|words| words.first());
        commands.map(Path::new).chain([self.qemu_img.as_path()])
    }

    /// The folder below which all images are.
    pub fn folder(&self) -> &Path {
        let fixed = self.path.split('{').next().unwrap_or_default();
        Path::new(fixed.rfind('/').map_or("/", |end| &fixed[..=end]))
    }

    /// Of the files; none for what is no mode.
    pub fn mode_bits(&self) -> Option<u32> {
        u32::from_str_radix(&self.mode, 8).ok().filter(|mode| mode & !0o666 == 0 && mode & 0o600 == 0o600)
    }

    /// QEMU's name of the format of a disk that has this one at the source.
    pub fn format_of(&self, at_source: &str) -> &'static str {
        match self.format {
            CreateFormat::Qcow2 => "qcow2",
            CreateFormat::Source if at_source == "qcow2" => "qcow2",
            CreateFormat::Raw | CreateFormat::Source => "raw",
        }
    }

    /// Where a disk's image is; none for a disk whose name cannot be a part of a file's name.
    pub fn path_of(&self, vm: &str, disk: &str, format: &str) -> Option<PathBuf> {
        let values = BTreeMap::from([("{vm}", vm), ("{disk}", disk), ("{format}", format)]);
        is_tame(disk).then(|| filled(&self.path, &values).into())
    }

    /// What a disk's image stands on, if that is configured and the disk's name can be a part of a file's name.
    pub fn backing_of(&self, vm: &str, disk: &str) -> Option<PathBuf> {
        let backing = self.backing.as_ref().filter(|_| is_tame(disk))?;
        Some(filled(backing, &BTreeMap::from([("{vm}", vm), ("{disk}", disk)])).into())
    }
}

/// Whether a disk's name can be a part of a file's name.
fn is_tame(disk: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let is_one = !disk.is_empty() && disk.len() <= DISK_NAME_BYTES_MAX && !disk.starts_with('.');
    is_one && disk.chars().all(legal)
}

fn filled(path: &str, values: &BTreeMap<&str, &str>) -> String {
    values.iter().fold(path.to_owned(), |path, (name, value)| path.replace(name, value))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;

    fn config(lines: &str) -> CreateConfig {
        toml::from_str(lines).unwrap()
    }

    #[test]
    fn a_peer_names_no_path() {
        let create = config(r#"path = "/srv/{vm}/{disk}.{format}""#);
        assert_eq!(create.path_of("web1", "vda", "raw"), Some("/srv/web1/vda.raw".into()));
        let on = config("path = \"/srv/{vm}\"\nbacking = \"/base/{vm}-{disk}\"");
        assert_eq!(on.backing_of("web1", "vda"), Some("/base/web1-vda".into()));
        assert_eq!((on.backing_of("web1", "../x"), create.backing_of("web1", "vda")), (None, None));
        for name in ["", "..", ".x", "a/b", "a\0", "{vm}", "ä", &"x".repeat(65)] {
            assert_eq!(create.path_of("web1", name, "raw"), None, "{name:?}");
        }
    }

    #[test]
    fn each_mistake_names_its_key() {
        for (lines, key) in [
            (r#"path = "/srv/{vm}/""#, "create.path"),
            (r#"path = "/srv/../{vm}""#, "create.path"),
            (r#"path = "/srv/{name}{vm}""#, "create.path"),
            (r#"path = "/srv/disk.raw""#, "create.path"),
            ("path = \"/srv/{vm}\"\nbacking = \"/srv/{format}\"", "create.backing"),
            ("path = \"/srv/{vm}\"\nbacking = \"/srv/{vm}\"", "create.backing"),
            ("path = \"/srv/{vm}\"\ncluster_kib = 3", "create.cluster_kib"),
            ("path = \"/srv/{vm}\"\npreallocation = \"metadata\"", "create.preallocation"),
            ("path = \"/srv/{vm}\"\nmode = \"0777\"", "create.mode"),
            ("path = \"/srv/{vm}\"\nmode = \"0400\"", "create.mode"),
            ("path = \"/srv/{vm}\"\ncommand = [\"x\"]", "create.remove"),
            ("path = \"/srv/{vm}\"\ncommand = [\"\"]\nremove = [\"x\"]", "create.command"),
        ] {
            assert_eq!(config(lines).check("create").unwrap_err().0, key, "{lines}");
        }
        assert_eq!(config(r#"path = "/srv/{vm}-{disk}""#).check("create"), Ok(()));
        assert_eq!(config(r#"path = "/srv/disk.raw""#).check("vm.web1.create"), Ok(()));
    }
}
