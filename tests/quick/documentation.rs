//! The documentation says what the program does: its commands are the program's, the messages that it explains
//! are in the sources, and the book has every page. Needs nothing but the checkout.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

const VMFERRY: &str = env!("CARGO_BIN_EXE_vmferry");

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Files below a folder of the checkout whose names end so.
fn files(folder: &str, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.to_string_lossy().ends_with(ending) {
                found.push(path);
            }
        }
    }
    found
}

/// What a reader is told to type: lines of blocks that begin with `vmferry`, also behind a prompt, with what
/// follows after a backslash.
fn commands(text: &str) -> Vec<Vec<String>> {
    let text = text.replace("\\\n", " ");
    let mut is_block = false;
    let mut commands = Vec::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            is_block = !is_block;
            continue;
        }
        let line = line.trim().trim_start_matches(['$', '#', ' ']);
        if is_block && line.starts_with("vmferry ") {
            commands.extend(words(line));
        }
    }
    commands
}

/// A line's words up to a comment or another program. None of a line with something left out.
fn words(line: &str) -> Option<Vec<String>> {
    let line = line.split(" #").next().unwrap_or(line);
    let line = line.split([';', '|', '>']).next().unwrap_or(line);
    if line.contains(['…', '[', '(']) || line.contains("&&") || line.contains("...") {
        return None;
    }
    Some(line.split_whitespace().skip(1).map(|word| word.trim_matches(['"', '\'']).to_owned()).collect())
}

/// With `--help` at its end a command does nothing, and is refused when what is before that is wrong.
#[test]
fn every_command_is_one_of_the_programs() {
    let mut pages = files("docs", ".md");
    pages.extend(["README.md", "deploy/README.md", "certs/README.md"].map(|page| root().join(page)));
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for page in pages {
        for words in commands(&read(&page)) {
            if words.first().is_some_and(|word| word == "is" || word.ends_with(':')) {
                continue;
            }
            seen += 1;
            let output = Command::new(VMFERRY).args(&words).arg("--help").output().unwrap();
            if !output.status.success() {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                wrong.push(format!("{}: vmferry {}: {said}", page.display(), words.join(" ")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(seen >= 20, "only {seen} commands");
}

#[test]
fn what_troubleshooting_quotes_is_said() {
    let page = read(&root().join("docs/troubleshooting.md"));
    let sources: Vec<_> = files("src", ".rs").iter().map(|path| read(path)).collect();
    // As they are compiled: a line that ends with a backslash goes on in the next.
    let joined = |text: &String| {
        let mut lines = text.split("\\\n");
        let first = lines.next().unwrap_or_default().to_owned();
        lines.fold(first, |whole, line| whole + line.trim_start())
    };
    let sources: Vec<_> = sources.iter().map(joined).collect();
    let cells = page.lines().filter(|l| l.starts_with("| ")).filter_map(|l| l.split(" | ").next());
    let quotes: Vec<_> = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect();
    // Kinds of findings are written as words of a type's name.
    let kind = |quote: &str| quote.split('-').map(|w| w[..1].to_uppercase() + &w[1..]).collect::<String>();
    let is_said = |quote: &str| sources.iter().any(|s| s.contains(quote) || s.contains(&kind(quote)));
    let unsaid: Vec<_> = quotes.iter().filter(|quote| !is_said(quote)).collect();
    assert!(unsaid.is_empty(), "not in the sources: {unsaid:?}");
    assert!(quotes.len() >= 20, "{quotes:?}");
}

/// Both ways: a page that is not in the summary is not in the book, and one that is not there stops it.
#[test]
fn the_book_has_every_page() {
    let folder = root().join("docs");
    let summary = read(&folder.join("SUMMARY.md"));
    let listed: BTreeSet<_> =
        summary.split("](").skip(1).filter_map(|rest| rest.split(')').next()).map(str::to_owned).collect();
    let missing: Vec<_> = listed.iter().filter(|page| !folder.join(page).is_file()).collect();
    assert!(missing.is_empty(), "not there: {missing:?}");
    let there = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut pages = there.filter(|name| name.ends_with(".md") && name != "SUMMARY.md");
    let unlisted: Vec<_> = pages.by_ref().filter(|page| !listed.contains(page)).collect();
    assert!(unlisted.is_empty(), "not in the book: {unlisted:?}");
}
