//! QEMU's options as words: which have a value, and how a value is put together.

use serde_json::Value;

/// Options that have no value (QEMU's qemu-options.hx, 7.2 to 11).
const WITHOUT_VALUE: [&str; 36] = [
    "S",
    "async-teardown",
    "daemonize",
    "enable-kvm",
    "enable-sync-profile",
    "full-screen",
    "h",
    "help",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-hpet",
    "no-kvm",
    "no-quit",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nodefconfig",
    "nographic",
    "nouserconfig",
    "old-param",
    "only-migratable",
    "portrait",
    "preconfig",
    "s",
    "semihosting",
    "show-cursor",
    "singlestep",
    "snapshot",
    "usb",
    "version",
    "win2k-hack",
    "xen-attach",
    "xen-domid-restrict",
    "curses",
];
/// Options whose value is one text, commas and all.
const ONE_TEXT: [&str; 19] = [
    "", "D", "L", "append", "bios", "cdrom", "chroot", "dtb", "fda", "fdb", "hda", "hdb", "hdc", "hdd",
    "initrd", "kernel", "mtdblock", "pidfile", "sd",
];
/// What may stand before a path in a value's first part.
const SCHEMES: [&str; 4] = ["unix:", "file:", "pipe:", "vhost-user:"];

/// An option; a word that belongs to none has no name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Opt {
    pub(super) name: String,
    pub(super) value: Option<String>,
}

/// What a value is made of.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Values {
    Text(String),
    /// What lies between commas: a key, if there is one, and its value.
    Parts(Vec<(Option<String>, String)>),
    Json(Value),
}

pub(super) fn parse(words: &[String]) -> Vec<Opt> {
    let mut options = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let name = word.strip_prefix("--").or_else(|| word.strip_prefix('-')).filter(|name| !name.is_empty());
        options.push(match name {
            Some(name) if WITHOUT_VALUE.contains(&name) => Opt { name: name.to_owned(), value: None },
            Some(name) => Opt { name: name.to_owned(), value: words.next().cloned() },
            None => Opt { name: String::new(), value: Some(word.clone()) },
        });
    }
    options
}

impl Opt {
    pub(super) fn values(&self) -> Values {
        let value = self.value.clone().unwrap_or_default();
        if ONE_TEXT.contains(&self.name.as_str()) {
            return Values::Text(value);
        }
        let json = value.starts_with('{').then(|| serde_json::from_str(&value).ok()).flatten();
        json.map_or_else(|| Values::Parts(parts(&value)), Values::Json)
    }

    pub(super) fn set(&mut self, values: &Values) {
        let doubled = |text: &String| text.replace(',', ",,");
        self.value = Some(match values {
            Values::Text(text) => text.clone(),
            Values::Json(json) => json.to_string(),
            Values::Parts(parts) => {
                let part = |(key, value): &(Option<String>, String)| match key {
                    Some(key) => format!("{}={}", doubled(key), doubled(value)),
                    None => doubled(value),
                };
                parts.iter().map(part).collect::<Vec<_>>().join(",")
            }
        });
    }

    pub(super) fn into_words(self) -> Vec<String> {
        let name = if self.name.is_empty() { None } else { Some(format!("-{}", self.name)) };
        name.into_iter().chain(self.value).collect()
    }
}

/// Between commas, of which two stand for one.
fn parts(value: &str) -> Vec<(Option<String>, String)> {
    let mut all = vec![String::new()];
    let mut rest = value.chars().peekable();
    while let Some(c) = rest.next() {
        if c == ',' && rest.next_if_eq(&',').is_none() {
            all.push(String::new());
        } else if let Some(last) = all.last_mut() {
            last.push(c);
        }
    }
    let part = |text: String| match text.split_once('=') {
        Some((key, value)) => (Some(key.to_owned()), value.to_owned()),
        None => (None, text),
    };
    all.into_iter().map(part).collect()
}

impl Values {
    /// At the top.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        match self {
            Self::Text(_) => None,
            Self::Json(json) => json.get(key)?.as_str(),
            Self::Parts(parts) => {
                parts.iter().find(|(own, _)| own.as_deref() == Some(key)).map(|(_, value)| value.as_str())
            }
        }
    }

    /// Whether it was there.
    pub(super) fn remove(&mut self, key: &str) -> bool {
        match self {
            Self::Text(_) => false,
            Self::Json(json) => json.as_object_mut().is_some_and(|object| object.remove(key).is_some()),
            Self::Parts(parts) => {
                let before = parts.len();
                parts.retain(|(own, _)| own.as_deref() != Some(key));
                parts.len() < before
            }
        }
    }

    /// All values, however deep.
    pub(super) fn strings(&self) -> Vec<&str> {
        match self {
            Self::Text(text) => vec![text],
            Self::Parts(parts) => parts.iter().map(|(_, value)| value.as_str()).collect(),
            Self::Json(json) => {
                let (mut all, mut open) = (Vec::new(), vec![json]);
                while let Some(value) = open.pop() {
                    match value {
                        Value::String(text) => all.push(text.as_str()),
                        Value::Array(values) => open.extend(values),
                        Value::Object(values) => open.extend(values.values()),
                        _ => {}
                    }
                }
                all
            }
        }
    }

    /// Shows all absolute paths, to be changed.
    pub(super) fn each_path(&mut self, see: &mut dyn FnMut(&mut String)) {
        let mut text = |text: &mut String| {
            let scheme =
                SCHEMES.iter().find(|scheme| text.starts_with(**scheme)).copied().unwrap_or_default();
            let mut path = text[scheme.len()..].to_owned();
            if path.starts_with('/') {
                see(&mut path);
                *text = format!("{scheme}{path}");
            }
        };
        match self {
            Self::Text(one) => text(one),
            Self::Parts(parts) => parts.iter_mut().for_each(|(_, value)| text(value)),
            Self::Json(json) => {
                let mut open = vec![json];
                while let Some(value) = open.pop() {
                    match value {
                        Value::String(one) => text(one),
                        Value::Array(values) => open.extend(values),
                        Value::Object(values) => open.extend(values.values_mut()),
                        _ => {}
                    }
                }
            }
        }
    }
}
