//! Which module of `src/` uses which, one file being one module. A name that a module only passes
//! on counts as the module's that defines it. Knows no rules.

use std::collections::{BTreeMap, BTreeSet};

use super::source::{Import, code_of, imports_of, paths_of};

/// Names passed on from module to module are followed this far.
const HOPS_MAX: usize = 8;

/// All modules by their paths (`net::tls`).
pub(crate) struct Modules(BTreeMap<String, Module>);

/// What one file says of others, in paths from the crate's root.
#[derive(Default)]
pub(crate) struct Module {
    /// What its imports stand for, by name.
    names: BTreeMap<String, String>,
    /// Modules of which it passes on everything.
    globs: Vec<String>,
    /// The items that it defines.
    items: BTreeSet<String>,
    /// Paths that its code uses.
    used: BTreeSet<String>,
    /// Paths that it passes on.
    passed_on: BTreeSet<String>,
}

impl Modules {
    /// From modules' paths and texts. A file that its parent has for tests alone is left out.
    pub(crate) fn read(files: &[(String, String)]) -> Self {
        let codes: BTreeMap<&str, String> =
            files.iter().map(|(m, text)| (m.as_str(), code_of(text))).collect();
        let is_declared = |module: &&str| {
            let Some((parent, name)) = module.rsplit_once("::") else { return true };
            codes.get(parent).is_none_or(|code| code.contains(&format!("mod {name};")))
        };
        let known: Vec<&str> = codes.keys().copied().filter(is_declared).collect();
        let mut all = Self(known.iter().map(|m| ((*m).to_owned(), Module::default())).collect());
        for module in known {
            let read = all.module(module, &codes[module]);
            all.0.insert(module.to_owned(), read);
        }
        all
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = (&str, &Module)> {
        self.0.iter().map(|(path, module)| (path.as_str(), module))
    }

    /// What `code`, being that of `module`, says of others.
    pub(crate) fn module(&self, module: &str, code: &str) -> Module {
        let (imports, code) = imports_of(code);
        let mut read = Module { items: items_of(&code), ..Module::default() };
        for Import { path, name, is_public } in imports {
            let Some(path) = self.absolute(module, &read.names, &path) else { continue };
            if is_public { &mut read.passed_on } else { &mut read.used }.insert(path.clone());
            match path.strip_suffix("::*") {
                Some(all_of) => read.globs.push(all_of.to_owned()),
                None => drop(read.names.insert(name, path)),
            }
        }
        let paths = paths_of(&code).into_iter();
        read.used.extend(paths.filter_map(|path| self.absolute(module, &read.names, path)));
        read
    }

    /// `path` in `module` from the crate's root; `None` if it is another crate's or nobody's.
    fn absolute(&self, module: &str, names: &BTreeMap<String, String>, path: &str) -> Option<String> {
        let (head, mut tail) = path.split_once("::").unwrap_or((path, ""));
        let mut base = match head {
            "crate" => "",
            "self" | "super" => module,
            name => match names.get(name) {
                Some(path) => return Some(join(path, tail)),
                None => return self.0.contains_key(&join(module, name)).then(|| join(module, path)),
            },
        };
        if head == "super" {
            base = parent(base);
            while let Some(further) = tail.strip_prefix("super::") {
                (base, tail) = (parent(base), further);
            }
        }
        (!tail.is_empty()).then(|| join(base, tail))
    }

    /// The module that defines what `path` names, and the path there; names are looked through.
    pub(crate) fn home(&self, path: &str) -> Option<(&str, String)> {
        self.followed(path, HOPS_MAX)
    }

    fn followed(&self, path: &str, hops: usize) -> Option<(&str, String)> {
        let (name, module) = self.longest_module(path)?;
        let rest = path.strip_prefix(name)?.trim_start_matches("::");
        let (first, further) = rest.split_once("::").unwrap_or((rest, ""));
        if hops > 0 && !module.items.contains(first) {
            if let Some(elsewhere) = module.names.get(first) {
                return self.followed(&join(elsewhere, further), hops - 1);
            }
            let globs = module.globs.iter().filter_map(|all_of| self.followed(&join(all_of, rest), hops - 1));
            let defines = |(home, _): &(&str, String)| self.0[*home].items.contains(first);
            if let Some(found) = globs.into_iter().find(defines) {
                return Some(found);
            }
        }
        Some((name, path.to_owned()))
    }

    fn longest_module(&self, path: &str) -> Option<(&str, &Module)> {
        let mut name = path;
        loop {
            if let Some((name, module)) = self.0.get_key_value(name) {
                return Some((name, module));
            }
            name = name.rsplit_once("::")?.0;
        }
    }

    /// The modules whose items `module` uses. A module that is only named is not used.
    fn uses<'a>(&'a self, module: &'a str) -> impl Iterator<Item = &'a str> {
        let homes = self.0[module].used.iter().filter_map(|path| self.home(path));
        homes.filter(move |(home, path)| *home != module && home != path).map(|(home, _)| home)
    }

    /// Sets of modules of which each uses all others, through one another.
    pub(crate) fn circles(&self) -> Vec<Vec<&str>> {
        let edges: BTreeMap<&str, Vec<&str>> =
            self.0.keys().map(|module| (module.as_str(), self.uses(module).collect())).collect();
        let reached: BTreeMap<&str, BTreeSet<&str>> =
            edges.keys().map(|module| (*module, reached_from(module, &edges))).collect();
        let mut circles: Vec<Vec<&str>> = Vec::new();
        for (module, others) in &reached {
            let circle: Vec<&str> = others.iter().copied().filter(|o| reached[o].contains(module)).collect();
            if !circle.is_empty() && !circles.contains(&circle) {
                circles.push(circle);
            }
        }
        circles
    }
}

fn reached_from<'a>(module: &str, edges: &BTreeMap<&str, Vec<&'a str>>) -> BTreeSet<&'a str> {
    let mut reached = BTreeSet::new();
    let mut next = edges[module].clone();
    while let Some(module) = next.pop() {
        if reached.insert(module) {
            next.extend(&edges[module]);
        }
    }
    reached
}

impl Module {
    /// Every path of ours that it names.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &str> {
        self.used.union(&self.passed_on).map(String::as_str)
    }
}

/// What follows a keyword that begins an item.
fn items_of(code: &str) -> BTreeSet<String> {
    const KEYWORDS: &[&str] =
        &["const", "enum", "fn", "macro_rules", "mod", "static", "struct", "trait", "type", "union"];
    let words = paths_of(code);
    let pairs = words.windows(2).filter(|pair| KEYWORDS.contains(&pair[0]));
    pairs.map(|pair| pair[1].to_owned()).collect()
}

fn join(base: &str, tail: &str) -> String {
    match (base, tail) {
        ("", path) | (path, "") => path.to_owned(),
        (base, tail) => format!("{base}::{tail}"),
    }
}

fn parent(module: &str) -> &str {
    module.rsplit_once("::").map_or("", |(parent, _)| parent)
}
