//! Exact savings: equal outputs with less computed, on built graphs, on the network of models/digits, and on every model of the folder
//! that VITRIM_CORPUS names.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

#[path = "harness/mod.rs"]
mod harness;

use std::path::{Path, PathBuf};
use vitrim::cost::{self, Sizes};
use vitrim::data::array::Array;
use vitrim::exact;
use vitrim::graph::Graph;
use vitrim::infer;
use vitrim::pipeline;
use vitrim::runtime::{RuntimeName, SessionOptions, open_graph};

fn options() -> SessionOptions {
    SessionOptions { threads: 1, ..SessionOptions::default() }
}

/// The greatest difference of any output, as a share of its range.
fn difference(a: &Graph, b: &Graph, feeds: &[(String, Array)]) -> Result<f64, String> {
    let run = |g: &Graph| {
        let mut session = open_graph(RuntimeName::Ort, g, &options()).map_err(|e| e.to_string())?;
        session.run(feeds).map_err(|e| e.to_string())
    };
    let (a, b) = (run(a)?, run(b)?);
    let mut worst = 0.0f64;
    for ((name, x), (other, y)) in a.iter().zip(&b) {
        assert_eq!((name, &x.dims), (other, &y.dims));
        let (x, y) = (x.as_f32(), y.as_f32());
        let range = x.iter().fold(1e-30, |m: f64, v| m.max(f64::from(v.abs())));
        let largest = x.iter().zip(&y).map(|(p, q)| f64::from((p - q).abs())).fold(0.0, f64::max);
        worst = worst.max(largest / range);
    }
    Ok(worst)
}

fn models(folder: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path());
    let mut all: Vec<PathBuf> = files.filter(|p| p.extension().is_some_and(|e| e == "onnx")).collect();
    all.sort();
    all
}

#[test]
fn corpus_models_stay_what_they_are() {
    let Some(folder) = std::env::var_os("VITRIM_CORPUS").map(PathBuf::from) else {
        println!("skipped: VITRIM_CORPUS is not set");
        return;
    };
    if !harness::has_ort() {
        return;
    }
    let (mut saved, mut problems) = (0, Vec::new());
    for path in models(&folder) {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let Ok(model) = pipeline::load(&path, &Sizes::new()) else { continue };
        let found = exact::tokens(model.graph(), &model.facts, &model.sizes);
        for r in &found.refused {
            println!("{name}: {} | {}", r.node, r.reason);
        }
        if found.savings.is_empty() {
            continue;
        }
        saved += 1;
        let facts = infer::facts(&found.graph).unwrap();
        let after = cost::count(&found.graph, &facts, &model.sizes).macs;
        println!("{name}: SAVED {:?} of {:?} at {}", found.savings[0].macs_saved, model.cost().macs, found.savings[0].node);
        assert_eq!(found.savings[0].macs_saved, model.cost().macs.zip(after).map(|(a, b)| a - b), "{name}");
        let feeds = match pipeline::bench_feeds(&model, 2, 0, RuntimeName::Ort, &options()) {
            Ok(feeds) => feeds,
            Err(error) => {
                println!("{name}: not run: {error}");
                continue;
            }
        };
        match difference(model.graph(), &found.graph, &feeds) {
            Ok(d) if d <= 1e-5 => {}
            Ok(d) => problems.push(format!("{name}: differs by {d:e}")),
            Err(error) => problems.push(format!("{name}: {error}")),
        }
    }
    println!("{saved} models saved");
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
