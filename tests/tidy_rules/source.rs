//! Rust text, read just well enough to know which paths of ours it uses. Knows no rules.

/// The code before the file's test module, with comments and the insides of strings blanked.
pub(crate) fn code_of(text: &str) -> String {
    let blank = blanked(text);
    let end = blank.find("#[cfg(test)]").unwrap_or(blank.len());
    blank[..end].to_owned()
}

fn blanked(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if c == '"' {
            code.push('"');
            string_len(rest, "\"", 1)
        } else if let Some(hashes) = raw_string(rest) {
            code.push_str("\"\"");
            string_len(rest, &format!("\"{}", "#".repeat(hashes)), 2 + hashes)
        } else if rest.starts_with("'\"'") || rest.starts_with("'\\\"'") {
            rest[1..].find("'").map_or(1, |n| n + 2)
        } else {
            code.push(c);
            c.len_utf8()
        };
        rest = &rest[skipped..];
    }
    code
}

fn raw_string(rest: &str) -> Option<usize> {
    let after = rest.strip_prefix('r')?;
    let hashes = after.len() - after.trim_start_matches('#').len();
    after[hashes..].starts_with('"').then_some(hashes)
}

/// Bytes of a string literal that opens with `open` bytes and ends with `end`.
fn string_len(rest: &str, end: &str, open: usize) -> usize {
    let escapes = open == 1;
    let mut at = open;
    while at < rest.len() {
        if escapes && rest[at..].starts_with('\\') {
            at += 1 + rest[at + 1..].chars().next().map_or(0, char::len_utf8);
        } else if rest[at..].starts_with(end) {
            return at + end.len();
        } else {
            at += rest[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

/// Every path of this crate that `code` in `module` uses, from the crate's root, groups expanded.
pub(crate) fn paths_used(code: &str, module: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = code;
    let mut before = ' ';
    while let Some(c) = rest.chars().next() {
        let starts = !(before.is_alphanumeric() || "_:".contains(before));
        let root = ["crate::", "super::"].iter().find(|r| starts && rest.starts_with(**r));
        if let Some(root) = root {
            let up = if *root == "super::" { 1 } else { usize::MAX };
            let (up, tail) = climb(&rest[root.len()..], up);
            expand(&ancestor(module, up), tail, &mut found);
        }
        before = c;
        rest = &rest[c.len_utf8()..];
    }
    found
}

/// Further `super::` after the first.
fn climb(mut tail: &str, mut up: usize) -> (usize, &str) {
    while let Some(next) = tail.strip_prefix("super::") {
        up = up.saturating_add(1);
        tail = next;
    }
    (up, tail)
}

/// `mod.rs` counts as the folder's module, so `super` in it is one level less than it looks: the
/// callers pass the module's own path, and a path that leaves its top module is found all the same.
fn ancestor(module: &str, up: usize) -> String {
    let parts: Vec<&str> = module.split("::").collect();
    parts[..parts.len().saturating_sub(up)].join("::")
}

fn expand(prefix: &str, tail: &str, found: &mut Vec<String>) {
    let tail = tail.trim_start();
    let join = |word: &str| if prefix.is_empty() { word.to_owned() } else { format!("{prefix}::{word}") };
    if let Some(group) = tail.strip_prefix('{') {
        return members(group).into_iter().for_each(|member| expand(prefix, member, found));
    }
    let end = tail.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(tail.len());
    let word = &tail[..end];
    match tail[end..].trim_start().strip_prefix("::") {
        Some(further) if !word.is_empty() => expand(&join(word), further, found),
        _ if word.is_empty() || word == "self" => found.push(prefix.to_owned()),
        _ => found.push(join(word)),
    }
}

/// The parts of a group between its braces.
fn members(group: &str) -> Vec<&str> {
    let (mut depth, mut from, mut all) = (0, 0, Vec::new());
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => {
                all.push(&group[from..at]);
                break;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                all.push(&group[from..at]);
                from = at + 1;
            }
            _ => {}
        }
    }
    all.retain(|member| !member.trim().is_empty());
    all
}

/// Whether `code` names `word`, alone or inside a group of its path.
pub(crate) fn has_word(code: &str, word: &str) -> bool {
    let last = word.rsplit("::").next().unwrap_or(word);
    let stands_alone = |at: usize, len: usize| {
        let edge = |c: Option<char>| c.is_none_or(|c| !(c.is_alphanumeric() || c == '_'));
        edge(code[..at].chars().next_back()) && edge(code[at + len..].chars().next())
    };
    let whole = code.match_indices(word).any(|(at, _)| stands_alone(at, word.len()));
    let in_group = word.starts_with("std::")
        && code.match_indices("use std::{").any(|(at, _)| {
            let group = code[at..].split(';').next().unwrap_or("");
            group.split(|c: char| !(c.is_alphanumeric() || c == '_')).any(|w| w == last)
        });
    whole || in_group
}
