//! The fuzz targets on their committed corpora: `tests/fuzz`.

use std::path::Path;

#[path = "../fuzz/targets/mod.rs"]
mod targets;

/// Runs a target on all files of its corpus.
#[test]
fn every_input_of_the_corpus_does_what_its_target_promises() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
    // One alone for who counts lines.
    let only = std::env::var("VMFERRY_FUZZ").ok();
    let is_wanted = |name: &str| only.as_deref().is_none_or(|only| only == name);
    let failed = std::thread::scope(|scope| {
        let runs = targets::TARGETS.map(|(name, target)| {
            let folder = corpora.join(name);
            (name, is_wanted(name).then(|| scope.spawn(move || replay(&folder, target))))
        });
        let failed = runs.map(|(name, run)| run.is_some_and(|run| run.join().is_err()).then_some(name));
        failed.into_iter().flatten().collect::<Vec<_>>()
    });
    assert!(failed.is_empty(), "{failed:?}: the input's name is in the output above");
}

fn replay(folder: &Path, target: fn(&[u8])) {
    let files = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    assert!(paths.len() >= 5, "{}: {} inputs", folder.display(), paths.len());
    for path in paths {
        let input = std::fs::read(&path).unwrap();
        let fails = std::panic::catch_unwind(|| target(&input)).is_err();
        assert!(!fails, "{}", path.display());
    }
    target(&[]);
}
