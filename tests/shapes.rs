//! Every inferred type, shape and content against what ONNX Runtime computes, on every value of every model of a corpus.
//!
//! VITRIM_CORPUS names a folder with models and a manifest.json: a list of `{name, files, inputs: [{name, shape, dtype, range}],
//! runs: [{sizes: {symbol: number}}]}`. Without it nothing is run, and the test says so.

#![cfg(feature = "ort")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "these are tests")]

use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use vitrim::data::array::{Array, ArrayData};
use vitrim::graph::{DType, Declared, Graph, ValueId};
use vitrim::infer::{self, Fact, Facts, Known};
use vitrim::runtime::{Optimize, RuntimeName, SessionOptions, find, open};

/// What was compared, and what could not be because nothing was inferred.
#[derive(Default)]
struct Counts {
    values: usize,
    sizes: usize,
    contents: usize,
    /// Values of which something is not known although it is of all inputs, by operator, with the model of the first.
    unknown: BTreeMap<String, (usize, String)>,
    faults: Vec<String>,
}

#[test]
fn facts_of_the_corpus_are_those_of_onnx_runtime() {
    let Some(folder) = std::env::var_os("VITRIM_CORPUS").map(PathBuf::from) else {
        println!("skipped: VITRIM_CORPUS is not set");
        return;
    };
    if let Err(e) = find(&SessionOptions::default().library) {
        println!("skipped: {e}");
        return;
    }
    let only = std::env::var("VITRIM_MODEL").ok();
    let manifest: Vec<Json> = serde_json::from_slice(&std::fs::read(folder.join("manifest.json")).unwrap()).unwrap();
    let mut counts = Counts::default();
    let mut model_count = 0;
    for entry in manifest.iter().filter(|e| only.as_ref().is_none_or(|o| e["name"] == o.as_str())) {
        let runs = entry["runs"].as_array().map(Vec::as_slice).unwrap_or_default();
        model_count += usize::from(!runs.is_empty());
        if let Err(e) = check_model(&folder, entry, runs, &mut counts) {
            counts.faults.push(format!("{}: {e}", entry["name"]));
        }
    }
    println!("{model_count} models: {} values, {} sizes, {} contents compared", counts.values, counts.sizes, counts.contents);
    println!("where sizes are first unknown: {:?}", counts.unknown);
    assert!(model_count > 0, "no model of the manifest can run");
    assert!(counts.faults.is_empty(), "{} faults:\n{}", counts.faults.len(), counts.faults.join("\n"));
}

fn check_model(folder: &Path, entry: &Json, runs: &[Json], counts: &mut Counts) -> Result<(), String> {
    let file = entry["files"].as_array().into_iter().flatten().filter_map(Json::as_str).find(|f| f.ends_with(".onnx"));
    let graph = vitrim::onnx::read(&folder.join(file.ok_or("no file")?)).map_err(|e| e.to_string())?.graph;
    let facts = infer::facts(&graph).map_err(|e| e.to_string())?;
    let (shown, values) = with_all_outputs(&graph);
    let bytes = vitrim::onnx::to_bytes(&shown).map_err(|e| e.to_string())?;
    let options = SessionOptions { threads: 1, optimize: Optimize::Off, ..SessionOptions::default() };
    if runs.is_empty() {
        return Ok(());
    }
    let mut session = open(RuntimeName::Ort, &bytes, &options).map_err(|e| e.to_string())?;
    for run in runs {
        let sizes = |name: &str| run["sizes"][name].as_i64();
        let outputs: BTreeMap<String, Array> =
            session.run(&feeds(entry, &sizes)?).map_err(|e| e.to_string())?.into_iter().collect();
        for v in &values {
            let name = graph.value(*v).name();
            let Some(array) = outputs.get(name) else { continue };
            note_unknown(&graph, &facts, *v, &sizes, entry, counts);
            compare(&facts, *v, array, &sizes, counts).unwrap_or_else(|e| {
                counts.faults.push(format!("{} {}: value {name} ({}): {e}", entry["name"], run["sizes"], op_of(&graph, *v)));
            });
        }
    }
    Ok(())
}

/// The model with every value of a node as an output.
fn with_all_outputs(graph: &Graph) -> (Graph, Vec<ValueId>) {
    let mut shown = graph.clone();
    let made: Vec<ValueId> = graph.nodes().flat_map(|(_, n)| n.outputs().iter().flatten().copied().collect::<Vec<_>>()).collect();
    for v in &made {
        if !graph.outputs().contains(v) {
            shown.add_output(*v, Declared { dtype: None, dims: None, extra: Default::default() });
        }
    }
    (shown, made)
}

fn op_of(graph: &Graph, v: ValueId) -> String {
    graph.value(v).producer().map_or_else(String::new, |(n, _)| graph.node(n).op().to_string())
}

/// One array per input: integers inside the range that the manifest gives, else numbers between -1 and 1.
fn feeds(entry: &Json, sizes: &dyn Fn(&str) -> Option<i64>) -> Result<Vec<(String, Array)>, String> {
    let mut state = 1u64;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let inputs = entry["inputs"].as_array().ok_or("no inputs")?;
    let feed = |input: &Json| -> Result<(String, Array), String> {
        let name = input["name"].as_str().ok_or("an input without name")?;
        let size = |d: &Json| d.as_i64().or_else(|| sizes(d.as_str()?)).map(|n| n as usize);
        let dims: Vec<usize> =
            input["shape"].as_array().into_iter().flatten().map(size).collect::<Option<_>>().ok_or("no size")?;
        let count = dims.iter().product();
        let range = |at: usize, default: f32| input["range"][at].as_f64().map_or(default, |v| v as f32);
        let (low, high) = (range(0, 0.0), range(1, 2.0));
        let mut ints = || (0..count).map(|_| (low + next() * (high - low)).floor().min(high - 1.0)).collect::<Vec<f32>>();
        let data = match input["dtype"].as_str().unwrap_or("float32") {
            "int64" => ArrayData::I64(ints().into_iter().map(|v| v as i64).collect()),
            "int32" => ArrayData::I32(ints().into_iter().map(|v| v as i32).collect()),
            "bool" => ArrayData::Bool(ints().into_iter().map(|v| v as u8).collect()),
            "float32" => ArrayData::F32((0..count).map(|_| next() * 2.0 - 1.0).collect()),
            "float16" => ArrayData::F16((0..count).map(|_| half::f16::from_f32(next() * 2.0 - 1.0).to_bits()).collect()),
            other => return Err(format!("an input of type {other}")),
        };
        Ok((name.to_string(), Array::new(dims, data).ok_or("sizes")?))
    };
    inputs.iter().map(feed).collect()
}

/// Counts a value of which something is not known although it is of all inputs of its node.
fn note_unknown(
    graph: &Graph,
    facts: &Facts,
    v: ValueId,
    sizes: &dyn Fn(&str) -> Option<i64>,
    entry: &Json,
    counts: &mut Counts,
) {
    let known = |v: ValueId| {
        let fact = facts.get(v);
        fact.dtype.is_some() && fact.shape.as_ref().is_some_and(|s| s.iter().all(|d| d.eval(sizes).is_some()))
    };
    let Some((node, _)) = graph.value(v).producer() else { return };
    if !known(v) && graph.node(node).inputs().iter().flatten().all(|i| known(*i)) {
        let first = || (0, format!("{} {}: {:?}", entry["name"], graph.value(v).name(), facts.get(v).shape));
        counts.unknown.entry(op_of(graph, v)).or_insert_with(first).0 += 1;
    }
}

fn compare(
    facts: &Facts,
    v: ValueId,
    array: &Array,
    sizes: &dyn Fn(&str) -> Option<i64>,
    counts: &mut Counts,
) -> Result<(), String> {
    let fact: &Fact = facts.get(v);
    counts.values += 1;
    match fact.dtype {
        Some(d) if !same_type(d, &array.data) => return Err(format!("type {}, runtime {:?}", d.name(), array.data.kind())),
        _ => {}
    }
    let Some(shape) = &fact.shape else { return Ok(()) };
    let found: Vec<Option<i64>> = shape.iter().map(|d| d.eval(sizes)).collect();
    let wrong = |(a, b): (&Option<i64>, &usize)| a.is_some_and(|a| a != *b as i64);
    if found.len() != array.dims.len() || found.iter().zip(&array.dims).any(wrong) {
        return Err(format!("shape {shape:?}, runtime {:?}", array.dims));
    }
    counts.sizes += found.iter().flatten().count();
    if fact.known.as_ref().is_some_and(|k| !same_content(k, &array.data, sizes)) {
        return Err(format!("content {:?}, runtime {:?}", fact.known, array.data));
    }
    counts.contents += usize::from(fact.known.is_some());
    Ok(())
}

fn same_type(dtype: DType, data: &ArrayData) -> bool {
    match data {
        ArrayData::F32(_) => dtype == DType::F32,
        ArrayData::F16(_) => dtype == DType::F16,
        ArrayData::BF16(_) => dtype == DType::BF16,
        ArrayData::F64(_) => dtype == DType::F64,
        ArrayData::I64(_) => dtype == DType::I64,
        ArrayData::I32(_) => dtype == DType::I32,
        ArrayData::U8(_) => dtype == DType::U8,
        ArrayData::I8(_) => dtype == DType::I8,
        ArrayData::Bool(_) => dtype == DType::Bool,
    }
}

/// Elements with names of sizes that this run does not have count as right.
fn same_content(known: &Known, data: &ArrayData, sizes: &dyn Fn(&str) -> Option<i64>) -> bool {
    match known {
        Known::Ints(v) => {
            let Some(run) = data.to_i64().or_else(|| Some(data.to_f32().iter().map(|x| *x as i64).collect())) else {
                return false;
            };
            v.len() == run.len() && v.iter().zip(run).all(|(d, n)| d.eval(sizes).is_none_or(|d| d == n))
        }
        Known::Floats(v) => {
            let run = data.to_f32();
            // Constant arithmetic is done in float64 here and in float32 there.
            let near = |(a, b): (&f64, &f32)| (*a as f32) == *b || (*a as f32 - b).abs() <= 1e-5 * b.abs().max(1e-3);
            v.len() == run.len() && v.iter().zip(&run).all(near)
        }
    }
}
