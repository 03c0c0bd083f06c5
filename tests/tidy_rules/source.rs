//! Rust text, read just well enough to know which paths of ours it uses. Knows no rules.

/// What marks an item that only tests have.
const TEST_ONLY: &str = "#[cfg(test)]";

/// The code of a file without what is for tests alone, with comments and the insides of strings blanked.
pub(crate) fn code_of(text: &str) -> String {
    let mut code = blanked(text);
    while let Some(at) = code.find(TEST_ONLY) {
        let end = at + item_len(&code[at..]);
        code.replace_range(at..end, "");
    }
    code
}

/// Bytes of an item with the attributes before it: to its closing brace, or its semicolon.
fn item_len(item: &str) -> usize {
    let mut depth = 0;
    for (at, c) in item.char_indices() {
        match c {
            '{' | '(' | '[' => depth += 1,
            '}' | ')' | ']' => depth -= 1,
            _ => {}
        }
        if depth == 0 && matches!(c, '}' | ';') {
            return at + 1;
        }
    }
    item.len()
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
        } else if let Some(len) = char_literal_len(rest) {
            code.push_str("' '");
            len
        } else {
            code.push(c);
            c.len_utf8()
        };
        rest = &rest[skipped..];
    }
    code
}

/// Bytes of a character literal; a lifetime is none.
fn char_literal_len(rest: &str) -> Option<usize> {
    let inside = rest.strip_prefix('\'')?;
    let (first, escaped) = (inside.chars().next()?, inside.starts_with('\\'));
    let closing = if escaped { 2 + inside[2..].find('\'')? } else { first.len_utf8() };
    inside[closing..].starts_with('\'').then_some(closing + 2)
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

/// A name that a `use` brings into a module: `path` is as written, `name` is `*` for all of them.
pub(crate) struct Import {
    pub(crate) path: String,
    pub(crate) name: String,
    /// Whether other modules may take it from here.
    pub(crate) is_public: bool,
}

/// The imports of `code`, groups expanded, and the code without them.
pub(crate) fn imports_of(code: &str) -> (Vec<Import>, String) {
    let (mut imports, mut other, mut rest) = (Vec::new(), String::new(), code);
    while let Some(at) = find_word(rest, "use") {
        let (before, statement) = rest.split_at(at);
        let visibility = before.trim_end().rsplit(['\n', ';', '{', '}']).next().unwrap_or("");
        let len = statement.find(';').map_or(statement.len(), |semicolon| semicolon + 1);
        if statement[3..].starts_with(char::is_whitespace) {
            let is_public = visibility.trim_start().starts_with("pub");
            let body = statement[3..len].trim_end_matches(';');
            expand("", body, &mut |path, name| imports.push(Import { path, name, is_public }));
            other.push_str(before);
            rest = &statement[len..];
        } else {
            other.push_str(&rest[..at + 3]);
            rest = &statement[3..];
        }
    }
    other.push_str(rest);
    (imports, other)
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn find_word(code: &str, word: &str) -> Option<usize> {
    let stands_alone = |at: &usize| {
        let end = at + word.len();
        !code[..*at].ends_with(is_word) && !code[end..].starts_with(is_word)
    };
    code.match_indices(word).map(|(at, _)| at).find(stands_alone)
}

/// Every path in `code`, single words too; methods and fields are none.
pub(crate) fn paths_of(code: &str) -> Vec<&str> {
    let (mut paths, mut at) = (Vec::new(), 0);
    while let Some(start) = code[at..].find(is_word).map(|n| at + n) {
        let mut end = start + word_len(&code[start..]);
        while let Some(next) = code[end..].strip_prefix("::").filter(|next| next.starts_with(is_word)) {
            end += 2 + word_len(next);
        }
        if !code[..start].ends_with(['.', ':', '\'']) || code[..start].ends_with("..") {
            paths.push(&code[start..end]);
        }
        at = end;
    }
    paths
}

fn word_len(text: &str) -> usize {
    text.find(|c| !is_word(c)).unwrap_or(text.len())
}

fn expand(prefix: &str, tail: &str, found: &mut impl FnMut(String, String)) {
    let tail = tail.trim_start();
    if let Some(group) = tail.strip_prefix('{') {
        return members(group).into_iter().for_each(|member| expand(prefix, member, found));
    }
    let end = if tail.starts_with('*') { 1 } else { word_len(tail) };
    let (word, after) = (&tail[..end], tail[end..].trim());
    let path = match (prefix, word) {
        ("", word) => word.to_owned(),
        (prefix, "self") => prefix.to_owned(),
        (prefix, word) => format!("{prefix}::{word}"),
    };
    match (after.strip_prefix("::"), after.strip_prefix("as ")) {
        (Some(further), _) => expand(&path, further, found),
        (None, Some(alias)) => found(path, alias.trim().to_owned()),
        (None, None) => {
            let name = path.rsplit("::").next().unwrap_or(&path).to_owned();
            found(path, name);
        }
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
    let in_group = word.starts_with("std::")
        && code.match_indices("use std::{").any(|(at, _)| {
            let group = code[at..].split(';').next().unwrap_or("");
            find_word(group, last).is_some()
        });
    in_group || find_word(code, word).is_some()
}
