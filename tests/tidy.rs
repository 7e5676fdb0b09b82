//! What holds of the sources as text: who may import whom, what is deliberately absent, sizes, module docs, generated pages.
//!
//! Modules of one crate see each other freely, so the compiler does not keep the stages apart; this file does. A rule that is broken
//! for a good reason is broken in a table below, beside the reason; a line of such a table that is not needed any more fails too.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

#[path = "tidy/operators.rs"]
mod operators;
#[path = "tidy/source.rs"]
mod source;

use source::{Source, files_below, module_paths, modules, root, sources};
use std::collections::{BTreeMap, BTreeSet};

/// What a folder may import of the crate: `graph`, everything; `infer*`, types and constants only, so that no function is called.
///
/// In the order of the data flow; `all` is every folder. All stages speak about `graph` and `ops`; the contexts that operator records see (`InferCx`, `AxesCx`,
/// `GradCx`, `RefitCx`) belong to the stages that ask, so ops and those stages know each other's types. Not stages but tools, and
/// therefore called by whoever needs them: `onnx` (files), `infer` for who rewrites a graph and must know it again, `data`, `runtime`,
/// `eval` (numbers of class scores).
const MAY_IMPORT: &[(&str, &str)] = &[
    ("graph", ""),
    ("onnx", "graph"),
    ("ops", "graph infer axes* autodiff* slice*"),
    ("infer", "graph ops"),
    ("axes", "graph ops infer*"),
    ("anatomy", "graph ops infer* axes*"),
    ("cost", "graph ops infer* axes* anatomy*"),
    ("score", "graph ops infer* axes* anatomy* autodiff* supernet* data* runtime"),
    ("plan", "graph infer* axes* anatomy* cost* score* exact*"),
    // The result is inferred afresh and compared with what the plan says.
    ("slice", "graph ops infer axes* anatomy* plan*"),
    // Shortens axes as a cut does, and counts whether that saves.
    ("exact", "graph ops infer axes* cost slice"),
    ("autodiff", "graph ops infer*"),
    // A training graph is one artefact: gates, losses, gradients and update are put into it in one place.
    ("supernet", "graph ops infer axes* anatomy* autodiff"),
    ("data", ""),
    ("runtime", "graph onnx data*"),
    ("eval", "graph infer* data runtime"),
    ("bench", "graph infer* data* runtime"),
    // A step graph is the supernet with state around it; it is built, run and evaluated within one command.
    ("search", "graph onnx infer* anatomy* score* supernet autodiff data runtime eval"),
    ("stats", "graph onnx infer* data runtime eval"),
    ("fold", "graph ops infer axes* anatomy* score* plan* slice*"),
    // Where a weight meets its operand is found by the walk that folds gates into weights.
    ("compensate", "graph infer* anatomy* fold stats*"),
    ("basis", "graph infer* axes* anatomy* fold compensate*"),
    ("curves", "graph onnx infer* data runtime eval"),
    ("verify", "graph ops onnx infer anatomy* cost* plan* slice* data runtime eval"),
    // The one place that calls stages.
    ("pipeline", "all"),
    ("cli", "pipeline onnx data runtime all*"),
    ("lib", ""),
    ("main", ""),
];

/// Imports beyond that table: file or folder, path, reason.
const EXCEPTIONS: &[(&str, &str, &str)] = &[
    ("anatomy", "axes::depends_on_data", "what is constant is decided once, where relations are collected"),
    ("exact", "axes::depends_on_data", "what is constant is decided once, where relations are collected"),
];

/// Where names of operators are expected: they are what these files are about.
const OPERATOR_NAMES: &[&str] = &[
    "ops/",           // the records
    "graph/build.rs", // spells new nodes
    "anatomy/",       // knows attention and pooling by structure: softmax, product, mean
    "supernet/",      // rewrites, and writes out fused attention
    "fold/",          // follows a gate back to a weight that can take it
    "exact/",         // knows attention by structure, and which operators count positions
    "basis/",         // knows products of queries and keys, and of values, by structure
    "autodiff/",      // losses and updates are made of nodes; the table of CUDA kernels
];

/// Names of operators elsewhere: file, reason.
const OPERATOR_NAME_EXCEPTIONS: &[(&str, &str)] = &[
    ("compensate/consumer.rs", "a bias is an input of Gemm and Conv, and an Add behind MatMul"),
    ("compensate/stream.rs", "follows an output through scale and bias to the residual sum"),
    ("pipeline/predict.rs", "its output is a product with a factor, that of other fused operators is more"),
    ("pipeline/calibrate.rs", "queries and keys of FusedMatMul can be seen, those of fused attention cannot"),
    ("cost/mod.rs", "a tensor in a Constant node counts as parameters"),
    ("graph/model.rs", "a Constant node is a constant, wherever its tensor is stored"),
    ("onnx/body.rs", "the same, in bodies of subgraphs"),
    ("onnx/branch.rs", "an initializer of a branch becomes a Constant node"),
    ("onnx/function.rs", "an input that a function passes on becomes an Identity"),
    ("onnx/read.rs", "a sparse initializer stands in the graph as a Constant node"),
    ("onnx/write.rs", "that Constant node is written back as the initializer it was"),
    ("search/step.rs", "the step graph is made of nodes, like the update in autodiff/"),
    ("slice/branch.rs", "asks which selections pick a part of a block, and spells new ones"),
    ("slice/empty.rs", "knows what operators give for nothing, and where it goes from there"),
    ("slice/shapes.rs", "patches shape arithmetic: a Concat of sizes, a Where over them"),
    ("verify/bounds.rs", "follows integer inputs to the tables that they index"),
    ("verify/feeds.rs", "an image that meets a convolution gets a size that it can take"),
    ("verify/nature.rs", "Dropout in training mode is random"),
];

/// `HashMap` or `HashSet`, whose order differs from run to run: file, reason.
const HASH_MAPS: &[(&str, &str)] = &[
    ("score/mod.rs", "the safetensors writer takes one; a single key has one order"),
    ("search/checkpoint.rs", "the safetensors writer takes one; a single key has one order"),
    ("stats/file.rs", "the safetensors writer takes one; a single key has one order"),
];

/// Files that are longer than they should be: file, reason.
const LONG_FILES: &[(&str, &str)] = &[];

/// Unit: lines.
const LONGEST_FILE: usize = 700;

fn fail_if_any(rule: &str, problems: &[String]) {
    assert!(problems.is_empty(), "{rule}\n  {}\n", problems.join("\n  "));
}

/// Lines of an exception table that nothing uses.
fn stale(name: &str, table: impl Iterator<Item = String>, used: &BTreeSet<String>) -> Vec<String> {
    table.filter(|t| !used.contains(t)).map(|t| format!("tests/tidy.rs, {name}: {t} is not needed any more")).collect()
}

/// Whether an imported path (without the folder) names a type, a constant or a trait, or something that belongs to one.
fn is_type(path: &[String]) -> bool {
    path.iter().any(|p| p.starts_with(char::is_uppercase))
}

#[test]
fn stages_import_types_of_earlier_stages_and_nothing_else() {
    let table: BTreeMap<&str, Vec<&str>> = MAY_IMPORT.iter().map(|(f, t)| (*f, t.split_whitespace().collect())).collect();
    let (mut problems, mut used) = (Vec::new(), BTreeSet::new());
    let all = sources();
    let modules = module_paths(&all);
    for s in &all {
        let folder = s.folder();
        let Some(allowed) = table.get(folder) else {
            problems.push(format!("{}: folder '{folder}' is not in the table MAY_IMPORT", s.path));
            continue;
        };
        for path in s.crate_paths(&modules) {
            let (target, rest) = path.split_first().unwrap();
            let types_only = format!("{target}*");
            let calls = |a: &str| a == "all" || a == target;
            let names = |a: &str| a == "all*" || a == types_only;
            let fine = target == folder || allowed.iter().any(|a| calls(a) || names(a) && is_type(rest));
            let text = path.join("::");
            let exception = EXCEPTIONS.iter().find(|(at, p, _)| (*at == s.path || *at == folder) && *p == text);
            match exception {
                _ if path.last().unwrap() == "*" => problems.push(format!("src/{}: glob crate::{text}", s.path)),
                _ if fine => {}
                Some((at, p, _)) => {
                    used.insert(format!("{at} {p}"));
                }
                None => problems.push(format!("src/{}: crate::{text}", s.path)),
            }
        }
    }
    problems.extend(stale("EXCEPTIONS", EXCEPTIONS.iter().map(|(at, p, _)| format!("{at} {p}")), &used));
    fail_if_any("imports that the table of tests/tidy.rs does not allow:", &problems);
}

#[test]
fn nothing_reaches_two_levels_up_or_imports_all() {
    let mut problems = Vec::new();
    for s in sources() {
        for (i, line) in s.code.lines().enumerate() {
            let up = line.contains("super::super");
            let glob = line.trim_start().starts_with("use super::*") || line.trim_start().starts_with("pub use super::*");
            if up || glob {
                problems.push(format!("src/{}:{}: {}", s.path, i + 1, line.trim()));
            }
        }
    }
    fail_if_any("use crate::stage::Name instead:", &problems);
}

/// Every line of code outside `home` that contains one of the words.
fn lines_with(words: &[&str], home: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for s in sources().iter().filter(|s| !home.iter().any(|h| s.path.starts_with(h))) {
        let hits = numbered(s).filter(|(_, line)| words.iter().any(|w| has_word(line, w)));
        found.extend(hits.map(|(n, line)| format!("src/{}:{n}: {}", s.path, line.trim())));
    }
    found
}

/// Lines of code with their numbers in the file. Test items are cut out, so numbers are those of the file only before them.
fn numbered(s: &Source) -> impl Iterator<Item = (usize, &str)> {
    s.code.lines().enumerate().map(|(i, line)| (i + 1, line))
}

/// Whether `word` stands in the line, not as the end of a longer name.
fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
}

#[test]
fn protobuf_engines_and_printing_stay_in_their_folders() {
    fail_if_any("protobuf outside onnx/:", &lines_with(&["prost::", "onnx_proto"], &["onnx/"]));
    fail_if_any("an engine outside runtime/:", &lines_with(&["ort::", "tract_onnx", "libloading::"], &["runtime/"]));
    let printing = ["println!", "print!", "eprintln!", "eprint!"];
    fail_if_any("printing outside cli/:", &lines_with(&printing, &["cli/"]));
    fail_if_any("arguments and exit codes outside cli/:", &lines_with(&["anyhow::", "clap::", "process::exit"], &["cli/"]));
    fail_if_any("unsafe outside its modules:", &lines_with(&["unsafe {", "unsafe fn"], &["onnx/map.rs", "runtime/"]));
}

#[test]
fn nothing_is_left_undone() {
    let words = ["todo", "unimplemented", "dbg"].map(|w| format!("{w}!("));
    let mut problems = Vec::new();
    for folder in ["src", "tests", "examples", "benches", "onnx-proto/src"] {
        for path in files_below(&root().join(folder), "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let hits = text.lines().enumerate().filter(|(_, l)| words.iter().any(|w| l.contains(w.as_str())));
            problems.extend(hits.map(|(i, l)| format!("{}:{}: {}", path.display(), i + 1, l.trim())));
        }
    }
    fail_if_any("unfinished code:", &problems);
}

#[test]
fn engines_know_no_operator_by_name() {
    let names: BTreeSet<&str> = vitrim::ops::all().map(|r| r.name).collect();
    let (mut problems, mut used) = (Vec::new(), BTreeSet::new());
    for s in sources().iter().filter(|s| !OPERATOR_NAMES.iter().any(|home| s.path.starts_with(home))) {
        for (n, line) in numbered(s) {
            for name in line.split('"').skip(1).step_by(2).filter(|t| names.contains(t)) {
                match OPERATOR_NAME_EXCEPTIONS.iter().find(|(at, _)| *at == s.path) {
                    Some((at, _)) => drop(used.insert(at.to_string())),
                    None => problems.push(format!("src/{}:{n}: \"{name}\"", s.path)),
                }
            }
        }
    }
    problems.extend(stale("OPERATOR_NAME_EXCEPTIONS", OPERATOR_NAME_EXCEPTIONS.iter().map(|(at, _)| at.to_string()), &used));
    fail_if_any("operators named outside ops/ and the files listed in OPERATOR_NAMES:", &problems);
}

#[test]
fn order_never_comes_from_a_hash_map() {
    let (mut problems, mut used) = (Vec::new(), BTreeSet::new());
    for s in sources() {
        for (n, line) in numbered(&s).filter(|(_, l)| l.contains("HashMap") || l.contains("HashSet")) {
            match HASH_MAPS.iter().find(|(at, _)| *at == s.path) {
                Some((at, _)) => drop(used.insert(at.to_string())),
                None => problems.push(format!("src/{}:{n}: {}", s.path, line.trim())),
            }
        }
    }
    problems.extend(stale("HASH_MAPS", HASH_MAPS.iter().map(|(at, _)| at.to_string()), &used));
    fail_if_any("use BTreeMap, BTreeSet or Vec:", &problems);
}

#[test]
fn every_file_belongs_to_the_crate_says_what_it_is_and_is_short() {
    let all = sources();
    let by_path: BTreeMap<&str, &Source> = all.iter().map(|s| (s.path.as_str(), s)).collect();
    let mut reached: BTreeSet<String> = BTreeSet::from(["main.rs".into()]);
    let mut next = vec!["lib.rs".to_string()];
    while let Some(path) = next.pop() {
        let declared = by_path.get(path.as_str()).map(|s| modules(&s.path, &s.text)).unwrap_or_default();
        next.extend(declared.into_iter().flat_map(|(m, _)| m).filter(|m| by_path.contains_key(m.as_str())));
        reached.insert(path);
    }
    let (mut problems, mut used) = (Vec::new(), BTreeSet::new());
    for s in &all {
        if !reached.contains(&s.path) {
            problems.push(format!("src/{}: not reachable from lib.rs", s.path));
        }
        if !s.text.starts_with("//! ") {
            problems.push(format!("src/{}: begins without a module doc", s.path));
        }
        let lines = s.text.lines().count();
        if lines > LONGEST_FILE {
            match LONG_FILES.iter().find(|(at, _)| *at == s.path) {
                Some((at, _)) => drop(used.insert(at.to_string())),
                None => problems.push(format!("src/{}: {lines} lines, {LONGEST_FILE} are enough: split it", s.path)),
            }
        }
    }
    problems.extend(stale("LONG_FILES", LONG_FILES.iter().map(|(at, _)| at.to_string()), &used));
    fail_if_any("files:", &problems);
}

#[test]
fn the_page_of_operators_is_current() {
    let page = std::fs::read_to_string(root().join("docs/operators.md")).unwrap_or_default();
    assert!(page == operators::page(), "docs/operators.md is out of date: cargo run --example operators > docs/operators.md");
}

#[test]
fn the_code_map_names_every_folder() {
    let map = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let folders: BTreeSet<String> =
        sources().iter().filter(|s| s.path.contains('/')).map(|s| format!("`{}/`", s.folder())).collect();
    let missing: Vec<String> = folders.into_iter().filter(|f| !map.contains(f.as_str())).collect();
    fail_if_any("folders of src/ that ARCHITECTURE.md does not name:", &missing);
}

#[test]
fn use_trees_are_read_to_their_leaves() {
    let code = "use crate::infer::{self, dim::{Dim, Known as K}, Facts};
        let x = crate::graph::Tensor::to_f32s(mycrate::y(infer::facts()));";
    let code = code.to_string();
    let s = Source { path: "x.rs".into(), text: code.clone(), code };
    let modules = BTreeSet::from(["infer".to_string(), "infer/dim".to_string()]);
    let paths: Vec<String> = s.crate_paths(&modules).iter().map(|p| p.join("::")).collect();
    assert_eq!(paths, ["graph::Tensor::to_f32s", "infer::Facts", "infer::dim::Dim", "infer::dim::Known", "infer::facts"]);
}
