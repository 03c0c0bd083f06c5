//! A report without names: whatever tells who, where or what is replaced, the same one by the same word. What a
//! word is, is judged by its form; names that are known to be some go wherever they stand.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde_json::Value;
use uuid::Uuid;

use crate::api::Course;

/// Values of these are words of ours.
const OURS: [&str; 6] = ["phase", "role", "result", "kind", "cause_of_wait", "held_up_by"];

/// The same report, redacted.
pub(super) fn redacted(course: &Course) -> anyhow::Result<Course> {
    let mut words = Words::default();
    let migration = &course.migration;
    words.know(&migration.vm, "vm");
    words.know(&migration.host, "host");
    words.know(&migration.peer, "host");
    let disks = migration.disks.iter().map(|disk| &disk.name);
    for name in disks.chain(&course.streams).filter(|name| *name != "RAM") {
        words.know(name, "disk");
    }
    let mut value = serde_json::to_value(course)?;
    words.redact(&mut value, "", "");
    Ok(serde_json::from_value(value)?)
}

/// What was replaced, and by what.
#[derive(Default)]
struct Words {
    replaced: BTreeMap<String, String>,
    counts: BTreeMap<&'static str, u64>,
}

impl Words {
    fn know(&mut self, word: &str, kind: &'static str) -> String {
        if let Some(known) = self.replaced.get(word) {
            return known.clone();
        }
        let count = self.counts.entry(kind).or_default();
        *count += 1;
        let replacement = match kind {
            // It is still an id.
            "id" => Uuid::from_u128(u128::from(*count)).to_string(),
            _ => format!("{kind}-{count}"),
        };
        self.replaced.insert(word.to_owned(), replacement.clone());
        replacement
    }

    fn redact(&mut self, value: &mut Value, key: &str, parent: &str) {
        match value {
            Value::String(text) => {
                let is_ours = OURS.contains(&key) || (key, parent) == ("cause", "waits");
                if !is_ours && text != "RAM" {
                    *text = self.text(text);
                }
            }
            Value::Array(all) => all.iter_mut().for_each(|one| self.redact(one, key, key)),
            Value::Object(fields) => {
                fields
                    .iter_mut()
                    .for_each(|(field, value)| self.redact(value, field, parent_of(key, parent)));
            }
            _ => {}
        }
    }

    fn text(&mut self, text: &str) -> String {
        if let Some(whole) = self.replaced.get(text) {
            return whole.clone();
        }
        // Names that hold what parts words, longest first.
        let mut text = text.to_owned();
        let mut odd: Vec<(String, String)> = self.replaced.clone().into_iter().collect();
        odd.retain(|(name, _)| name.chars().any(|c| !is_of_word(c)));
        odd.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
        for (name, replacement) in odd {
            text = text.replace(&name, &replacement);
        }
        let mut redacted = String::new();
        let mut rest = text.as_str();
        while !rest.is_empty() {
            let end = rest.find(|c| !is_of_word(c)).unwrap_or(rest.len());
            let (word, after) = rest.split_at(end);
            redacted += &self.word(word);
            let between = after.find(is_of_word).unwrap_or(after.len());
            redacted += &after[..between];
            rest = &after[between..];
        }
        redacted
    }

    fn word(&mut self, word: &str) -> String {
        let bare = word.trim_end_matches(['.', ':', '-']);
        let end = &word[bare.len()..];
        if bare.is_empty() {
            return word.to_owned();
        }
        let known = self.replaced.get(bare).cloned();
        let replacement = known.or_else(|| kind_of(bare).map(|kind| self.know(bare, kind)));
        // A port, or the like, behind a name.
        let of_parts =
            || bare.split_once(':').and_then(|(name, port)| Some((self.replaced.get(name)?, port)));
        match replacement.or_else(|| of_parts().map(|(name, port)| format!("{name}:{port}"))) {
            Some(replacement) => replacement + end,
            None => word.to_owned(),
        }
    }
}

fn parent_of<'a>(key: &'a str, parent: &'a str) -> &'a str {
    if key.is_empty() { parent } else { key }
}

fn is_of_word(c: char) -> bool {
    c.is_alphanumeric() || "._:/@-+%~[]".contains(c)
}

/// What gives itself away by its form.
fn kind_of(word: &str) -> Option<&'static str> {
    let unbracketed = word.trim_matches(['[', ']']);
    if word.parse::<Uuid>().is_ok() {
        Some("id")
    } else if unbracketed.parse::<IpAddr>().is_ok() || word.parse::<SocketAddr>().is_ok() {
        Some("address")
    } else if word.starts_with('/') || word.starts_with("./") || word.contains("/") && !word.ends_with("/s") {
        Some("path")
    } else {
        let name = word.split(':').next().unwrap_or(word);
        let last = name.rsplit_once('.').map(|(_, last)| last);
        last.is_some_and(|last| last.chars().any(char::is_alphabetic)).then_some("name")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn whatever_tells_of_somebody_goes_and_stays_the_same_word() {
        let mut words = Words::default();
        words.know("web1", "vm");
        words.know("my vm <1>", "vm");
        let text = "cannot connect to [fd00::7]:9907 or 10.1.2.3 (bravo.example.org:9907): web1, my vm <1>. \
                    /var/lib/x/web1.raw of 0f8fad5b-d9cb-469f-a165-70867728950e; 10.1.2.3 again, 7 MiB/s, QEMU 10.0.2";
        let redacted = words.text(text);
        for secret in ["fd00", "10.1.2.3", "bravo", "web1", "my vm", "/var", "0f8fad5b"] {
            assert!(!redacted.contains(secret), "{secret} in {redacted}");
        }
        assert_eq!(redacted.matches("address-2").count(), 2, "{redacted}");
        assert!(redacted.ends_with("7 MiB/s, QEMU 10.0.2"), "{redacted}");
        assert!(redacted.contains("00000000-0000-0000-0000-000000000001"), "{redacted}");
    }
}
