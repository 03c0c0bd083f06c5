//! The fuzzer's lock file is the product's: what is fuzzed is what is shipped.

use std::collections::BTreeSet;

/// Packages of a lock file, each with its version.
fn packages(lock: &str) -> BTreeSet<(String, String)> {
    let value = |line: &str, key: &str| line.strip_prefix(key).map(|v| v.trim_matches('"').to_owned());
    let blocks = lock.split("[[package]]").skip(1);
    let of = |block: &str| {
        let name = block.lines().find_map(|l| value(l, "name = "))?;
        let version = block.lines().find_map(|l| value(l, "version = "))?;
        Some((name, version))
    };
    blocks.filter_map(of).collect()
}

/// What vmferry itself depends on by a lock file.
fn dependencies(lock: &str) -> BTreeSet<String> {
    let block = lock.split("[[package]]").find(|block| block.contains("\nname = \"vmferry\"\n"));
    let listed = block.unwrap_or_default().split("dependencies = [").nth(1).unwrap_or_default();
    let names = listed.split(']').next().unwrap_or_default().split('"').skip(1).step_by(2);
    names.filter_map(|name| name.split(' ').next()).map(str::to_owned).collect()
}

/// What the fuzzer's lock file lacks, or has in another version.
pub(crate) fn stale(product: &str, fuzzer: &str, dev_dependencies: &[&str]) -> Vec<String> {
    let (ours, theirs) = (packages(product), packages(fuzzer));
    let names: BTreeSet<_> = ours.iter().map(|(name, _)| name).collect();
    let other = theirs.iter().filter(|p| names.contains(&p.0) && !ours.contains(p));
    let other = other.map(|(name, version)| format!("{name} {version}"));
    let missing: BTreeSet<_> = dependencies(product).difference(&dependencies(fuzzer)).cloned().collect();
    other.chain(missing.into_iter().filter(|name| !dev_dependencies.contains(&name.as_str()))).collect()
}
