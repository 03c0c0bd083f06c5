//! Words of others: texts that are shown, names of targets, patterns, rates, sockets.

use vmferry::config::{LocalSocket, SocketMode, TargetName, TargetPattern, glob_matches};
use vmferry::printable::{TEXT_BYTES_MAX, bounded, printable};
use vmferry::rate::Rate;

/// A pattern and a name, between them a line's end.
pub(crate) fn words(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    shown(&text);
    let (pattern, name) = text.split_once('\n').unwrap_or((&text, "vnc-web1"));
    if pattern.len() + name.len() < 200 {
        assert_eq!(glob_matches(pattern, name), matches_slowly(pattern.as_bytes(), name.as_bytes()));
    }
    target(pattern, name);
    if let Ok(rate) = text.parse::<Rate>() {
        assert!(rate.get().get() >= Rate::MIN);
        assert_eq!(rate.get().to_string().parse(), Ok(rate));
        assert!(!rate.to_string().is_empty());
    }
    if let Ok(socket) = text.parse::<LocalSocket>() {
        match &socket {
            LocalSocket::Unix(path) => assert!(path.is_absolute() && path.as_os_str().len() <= 107),
            LocalSocket::Tcp(address) => assert!(address.ip().is_loopback()),
        }
        assert_eq!(String::from(socket.clone()).parse(), Ok(socket));
    }
    if let Ok(mode) = SocketMode::try_from(text.clone().into_owned()) {
        assert_eq!(SocketMode::try_from(String::from(mode)), Ok(mode));
    }
}

fn shown(text: &str) {
    let clean = printable(text);
    assert!(
        !clean.chars().any(|c| c.is_control() || c == '\u{2028}' || ('\u{202a}'..='\u{202e}').contains(&c))
    );
    assert_eq!(clean.chars().count(), text.chars().count());
    assert_eq!(printable(&clean), clean);
    assert!(bounded(&text.repeat(9)).chars().count() <= TEXT_BYTES_MAX + 1);
}

/// A name and what a pattern's `*` stands for are steps of a path.
fn target(pattern: &str, name: &str) {
    let is_step =
        |word: &str| !word.is_empty() && !word.starts_with('.') && !word.contains(['/', '\0', '\n']);
    let Ok(name) = name.parse::<TargetName>() else { return };
    assert!(is_step(name.as_str()) && name.as_str().len() <= 128);
    let Some(parsed) = TargetPattern::parse(pattern) else { return };
    let part = parsed.part_of(&name);
    if let Some(part) = part.filter(|_| parsed.has_part()) {
        assert!(is_step(part));
        assert_eq!(pattern.replacen('*', part, 1), name.as_str());
    }
    assert!(part.is_none() || matches_slowly(pattern.as_bytes(), name.as_str().as_bytes()));
}

/// By the definition of a pattern.
fn matches_slowly(pattern: &[u8], name: &[u8]) -> bool {
    let mut ends = vec![false; name.len() + 1];
    ends[0] = true;
    for step in pattern {
        if *step == b'*' {
            let first = ends.iter().position(|end| *end).unwrap_or(ends.len());
            ends.iter_mut().skip(first).for_each(|end| *end = true);
        } else {
            for at in (1..ends.len()).rev() {
                ends[at] = ends[at - 1] && name[at - 1] == *step;
            }
            ends[0] = false;
        }
    }
    ends[name.len()]
}
