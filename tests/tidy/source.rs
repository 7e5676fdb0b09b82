//! Sources as text: which files there are, what of them is not a test, and what they import.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// One file of `src/`.
pub(crate) struct Source {
    /// Its path below `src/`, with `/`.
    pub(crate) path: String,
    /// All of it.
    pub(crate) text: String,
    /// All of it but comments and what is compiled for tests only, line by line.
    pub(crate) code: String,
}

impl Source {
    /// The folder of `src/` that it belongs to, or its own name where it lies in `src/` itself.
    pub(crate) fn folder(&self) -> &str {
        self.path.split('/').next().unwrap_or("").trim_end_matches(".rs")
    }

    /// Paths that begin with `crate::`, without it; one for each leaf of a use tree. A glob ends in `*`. Where a leaf is a module
    /// itself, what the file reaches through its name stands in its place: `use crate::cost;` and `cost::count(..)` give `cost::count`.
    pub(crate) fn crate_paths(&self, modules: &BTreeSet<String>) -> BTreeSet<Vec<String>> {
        let mut found = BTreeSet::new();
        for mut path in self.paths_behind("crate") {
            if path.last().is_some_and(|l| l == "self") {
                path.pop();
            }
            match path.last() {
                Some(name) if modules.contains(&path.join("/")) => {
                    found.extend(self.paths_behind(name).into_iter().map(|p| [path.as_slice(), &p].concat()));
                }
                _ => drop(found.insert(path)),
            }
        }
        found
    }

    /// Paths that begin with `name::`, without it.
    fn paths_behind(&self, name: &str) -> BTreeSet<Vec<String>> {
        let mut found = BTreeSet::new();
        let mut rest = self.code.as_str();
        let start = format!("{name}::");
        while let Some(at) = rest.find(&start) {
            let before = rest[..at].chars().next_back();
            rest = &rest[at + start.len()..];
            if !before.is_some_and(|c| c.is_alphanumeric() || "_$:".contains(c)) {
                tree(rest, &[], &mut found);
            }
        }
        found
    }
}

/// Reads one use tree, adds its leaves, and returns what comes behind it.
fn tree<'a>(text: &'a str, prefix: &[String], found: &mut BTreeSet<Vec<String>>) -> &'a str {
    let text = text.trim_start();
    if let Some(mut rest) = text.strip_prefix('{') {
        loop {
            rest = rest.trim_start().trim_start_matches(',').trim_start();
            if let Some(end) = rest.strip_prefix('}') {
                return end;
            }
            let left = tree(rest, prefix, found);
            if left.len() == rest.len() {
                return rest;
            }
            rest = left;
        }
    }
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_' && c != '*').unwrap_or(text.len());
    if end == 0 {
        return text;
    }
    let (name, rest) = text.split_at(end);
    let mut path = prefix.to_vec();
    path.push(name.to_string());
    match rest.strip_prefix("::") {
        Some(more) if more.starts_with(|c: char| c.is_alphabetic() || c == '_' || c == '{' || c == '*') => {
            tree(more, &path, found)
        }
        _ => {
            found.insert(path);
            let renamed = rest.strip_prefix(" as ").map(|r| r.trim_start_matches(|c: char| c.is_alphanumeric() || c == '_'));
            renamed.unwrap_or(rest)
        }
    }
}

/// The checkout.
pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every file with this ending below a folder, ascending.
pub(crate) fn files_below(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files_below(&path, ending));
        } else if path.extension().is_some_and(|e| e == ending) {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// All files of `src/`. The code of files that are for tests only is empty.
pub(crate) fn sources() -> Vec<Source> {
    let src = root().join("src");
    let mut all: Vec<Source> = files_below(&src, "rs")
        .into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let path = path.strip_prefix(&src).unwrap_or(&path).to_string_lossy().replace('\\', "/");
            Source { path, code: without_tests(&text), text }
        })
        .collect();
    let paths: BTreeSet<String> = all.iter().map(|s| s.path.clone()).collect();
    let of_tests: BTreeSet<String> = all
        .iter()
        .flat_map(|s| modules(&s.path, &s.text).into_iter().filter(|(_, test)| *test).map(|(m, _)| m))
        .flat_map(|m| m.into_iter().filter(|p| paths.contains(p)))
        .collect();
    for s in all.iter_mut().filter(|s| of_tests.contains(&s.path)) {
        s.code.clear();
    }
    all
}

/// All modules, as paths without ending: `axes`, `axes/relation`.
pub(crate) fn module_paths(sources: &[Source]) -> BTreeSet<String> {
    sources.iter().map(|s| s.path.trim_end_matches(".rs").trim_end_matches("/mod").to_string()).collect()
}

/// Files that a file declares as modules (each as `x.rs` and as `x/mod.rs`), and whether only for tests.
pub(crate) fn modules(path: &str, text: &str) -> Vec<([String; 2], bool)> {
    let folder = match path.rsplit_once('/') {
        Some((folder, "mod.rs")) => format!("{folder}/"),
        Some((folder, file)) => format!("{folder}/{}/", file.trim_end_matches(".rs")),
        None if path == "lib.rs" || path == "main.rs" => String::new(),
        None => format!("{}/", path.trim_end_matches(".rs")),
    };
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let declared = lines.iter().enumerate().filter_map(|(i, line)| {
        let name = line.rsplit_once("mod ")?.1.strip_suffix(';')?;
        let word = !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || c == '_');
        let start = line.starts_with("mod ") || line.starts_with("pub");
        (word && start).then(|| (name, i > 0 && lines[i - 1] == "#[cfg(test)]"))
    });
    declared.map(|(name, test)| ([format!("{folder}{name}.rs"), format!("{folder}{name}/mod.rs")], test)).collect()
}

/// Without comments, and without items under `#[cfg(test)]`, as rustfmt lays them out.
fn without_tests(text: &str) -> String {
    let mut out = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.trim() == "#[cfg(test)]" {
            let indent = &line[..line.len() - line.trim_start().len()];
            let item = lines.by_ref().find(|l| !l.trim_start().starts_with("#[")).unwrap_or("");
            if !item.ends_with(';') && !item.ends_with('}') {
                let end = format!("{indent}}}");
                lines.by_ref().find(|l| *l == end);
            }
            continue;
        }
        let comment = line.trim_start().starts_with("//");
        let code = line.split(" // ").next().unwrap_or("");
        out += if comment { "" } else { code };
        out.push('\n');
    }
    out
}
