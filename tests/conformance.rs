//! Every operator record against ONNX Runtime, from tests/fixtures/ops/*.json: one object is one use of one operator.
//!
//! `infer`: types, shapes and contents that the record infers are those that ONNX Runtime computes, with all sizes known, and
//! with the first axis a symbol. `grad`: gradients of a random weighting of the outputs equal central differences.
//! An operator without a fixture fails, and so does a gradient rule whose fixtures never ask for `grad`.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "these are tests")]

#[path = "harness/case.rs"]
mod case;
mod harness;

use case::{Batch, Case};
use harness::{Random, dtype_of, has_ort, output, session};
use std::collections::BTreeSet;
use std::path::Path;
use vitrim::autodiff::cuda;
use vitrim::autodiff::differentiate;
use vitrim::autodiff::interface::{add_output, declare};
use vitrim::data::array::{Array, ArrayData};
use vitrim::graph::build::Builder;
use vitrim::graph::{DType, Declared, Graph, NodeId, Tensor, ValueId};
use vitrim::infer::{self, Facts, Known};
use vitrim::ops::{self, Grad};
use vitrim::supernet::decompose;

fn cases() -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ops");
    let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|f| f.unwrap().path()).collect();
    files.sort();
    let mut cases = Vec::new();
    for path in files.iter().filter(|p| p.extension().is_some_and(|e| e == "json")) {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let list: Vec<serde_json::Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        for (number, json) in list.iter().enumerate() {
            cases.push(Case::read(&name, number, json).unwrap_or_else(|e| panic!("{name}[{number}]: {e}")));
        }
    }
    cases
}

/// Runs `check` on every case that asks for it; all failures are shown together.
fn check_all(name: &str, check: impl Fn(&Case) -> Result<(), String>) {
    let (mut failed, mut count) = (Vec::new(), 0);
    for case in cases().iter().filter(|c| c.asks(name)) {
        count += 1;
        if let Err(e) = check(case) {
            failed.push(format!("{}: {e}", case.label));
        }
    }
    println!("{name}: {count} cases");
    assert!(failed.is_empty(), "{} of {count} cases fail:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn every_operator_has_a_fixture_for_each_of_its_rules() {
    let cases = cases();
    let with = |check: &str| -> BTreeSet<(String, String)> {
        cases.iter().filter(|c| c.asks(check)).map(|c| (c.domain.clone(), c.op.clone())).collect()
    };
    let (infer, grad) = (with("infer"), with("grad"));
    let mut missing = Vec::new();
    // Their bodies are graphs, which a fixture cannot hold, and nothing is inferred of them.
    let with_bodies = ["If", "Loop", "Scan"];
    for rule in ops::all().filter(|r| !with_bodies.contains(&r.name)) {
        let key = (rule.domain.to_string(), rule.name.to_string());
        if !infer.contains(&key) {
            missing.push(format!("{}: infer", rule.name));
        }
        if matches!(rule.grad, Grad::Rule(_)) && !grad.contains(&key) {
            missing.push(format!("{}: grad", rule.name));
        }
    }
    assert!(missing.is_empty(), "no fixture for:\n{}", missing.join("\n"));
}

#[test]
fn inferred_shapes_and_contents_are_those_of_onnx_runtime() {
    if has_ort() {
        check_all("infer", check_infer);
    }
}

fn check_infer(case: &Case) -> Result<(), String> {
    let graph = case.graph(Batch::Fixed);
    let feeds = case.feeds();
    if let Some(shapes) = &case.shapes {
        return check_shapes(&graph, &feeds, shapes);
    }
    let outputs = session(&graph)?.run(&feeds).map_err(|e| e.to_string())?;
    compare(&graph, &infer::facts(&graph).map_err(|e| e.to_string())?, &outputs, 0)?;
    let first = case.inputs.first().and_then(Option::as_ref).filter(|i| !i.constant);
    let Some(batch) = first.and_then(|i| i.tensor.dims.first()) else { return Ok(()) };
    let symbolic = case.graph(Batch::Symbol);
    let facts = infer::facts(&symbolic).map_err(|e| format!("with a symbol: {e}"))?;
    compare(&symbolic, &facts, &outputs, *batch as i64).map_err(|e| format!("with a symbol: {e}"))
}

/// Of an operator without a kernel for processors: shapes are those that the fixture names, and the runtime says that it has none.
fn check_shapes(graph: &Graph, feeds: &[(String, Array)], shapes: &[Vec<usize>]) -> Result<(), String> {
    if session(graph).is_ok_and(|mut s| s.run(feeds).is_ok()) {
        return Err("ONNX Runtime runs it: take the shapes from there".into());
    }
    let facts = infer::facts(graph).map_err(|e| e.to_string())?;
    for (y, expected) in graph.outputs().iter().zip(shapes) {
        let shape = facts.shape(*y).ok_or_else(|| format!("{}: no shape", graph.value(*y).name()))?;
        let right = |(d, n): (&infer::Dim, &usize)| d.size().is_none_or(|d| d == *n);
        if shape.len() != expected.len() || !shape.iter().zip(expected).all(right) {
            return Err(format!("{}: shape {shape:?}, not {expected:?}", graph.value(*y).name()));
        }
    }
    Ok(())
}

fn compare(graph: &Graph, facts: &Facts, outputs: &[(String, Array)], batch: i64) -> Result<(), String> {
    for y in graph.outputs() {
        let name = graph.value(*y).name();
        let (fact, array) = (facts.get(*y), output(outputs, name));
        if fact.dtype.is_some_and(|d| d != dtype_of(array)) {
            return Err(format!("{name}: type {:?}, runtime {:?}", fact.dtype, dtype_of(array)));
        }
        let sizes = |s: &str| (s == "batch").then_some(batch);
        if let Some(shape) = &fact.shape {
            // A size that depends on data has a name of its own, which does not evaluate, and counts as right.
            let right = |(d, n): (&infer::Dim, &usize)| d.eval(&sizes).is_none_or(|d| d == *n as i64);
            if shape.len() != array.dims.len() || !shape.iter().zip(&array.dims).all(right) {
                return Err(format!("{name}: shape {shape:?}, runtime {:?}", array.dims));
            }
        }
        let same = match &fact.known {
            None => true,
            Some(Known::Ints(v)) => {
                let found: Option<Vec<i64>> = v.iter().map(|d| d.eval(&sizes)).collect();
                found.is_none_or(|f| match &array.data {
                    ArrayData::Bool(b) => b.iter().map(|b| i64::from(*b)).eq(f),
                    data => data.to_i64() == Some(f),
                })
            }
            Some(Known::Floats(v)) => {
                let near = |(a, b): (&f64, &f32)| (*a as f32 - b).abs() <= 1e-6 * b.abs().max(1e-6) || (*a as f32) == *b;
                v.len() == array.len() && v.iter().zip(&array.as_f32()).all(near)
            }
        };
        if !same {
            return Err(format!("{name}: content {:?}, runtime {:?}", fact.known, array.data));
        }
    }
    Ok(())
}

#[test]
fn fused_operators_written_out_compute_the_same() {
    if has_ort() {
        check_all("fused", check_fused);
    }
}

fn check_fused(case: &Case) -> Result<(), String> {
    let mut graph = case.graph(Batch::Fixed);
    let feeds = case.feeds();
    let expected = session(&graph)?.run(&feeds).map_err(|e| e.to_string())?;
    let apart = decompose::run(&mut graph).map_err(|e| e.to_string())?;
    if apart.labels != ["node"] || graph.nodes().any(|(_, n)| !n.domain().is_empty()) {
        return Err(format!("written out: {:?}", apart.labels));
    }
    let found = session(&graph)?.run(&feeds).map_err(|e| e.to_string())?;
    for (name, y) in &expected {
        let z = output(&found, name);
        let error = harness::relative_error(&z.as_f32(), &y.as_f32());
        if z.dims != y.dims || error > 1e-5 {
            return Err(format!("{name}: {:?} against {:?}, {error:.1e}", z.dims, y.dims));
        }
    }
    Ok(())
}

#[test]
fn gradients_equal_central_differences() {
    if has_ort() {
        check_all("grad", |case| {
            let all = case.graph(Batch::Fixed).outputs().len();
            check_grad(case, all)?;
            if all > 1 { check_grad(case, 1).map_err(|e| format!("of output 0 alone: {e}")) } else { Ok(()) }
        });
    }
}

/// Half the step of a central difference. float32 outputs of size 1 carry 1e-7 of noise, so slopes are known to about 1e-4, and
/// the curvature's share is of the order 1e-6; the tolerance is 20 times the first.
const STEP: f64 = 1e-3;
const TOLERANCE: f64 = 2e-3;
const NOISE: f64 = 4.0 / (1 << 24) as f64;
const DIRECTIONS: usize = 2;

/// `loss = sum(r * y)` over the first `output_count` outputs that are floats.
fn check_grad(case: &Case, output_count: usize) -> Result<(), String> {
    let mut graph = case.graph(Batch::Fixed);
    let mut forward = session(&graph)?;
    let mut feeds = case.feeds();
    let outputs = forward.run(&feeds).map_err(|e| e.to_string())?;
    if !outputs.iter().take(output_count).any(|(_, y)| dtype_of(y).is_float()) {
        return Err("no output is a float".into());
    }
    let mut random = Random(99);
    let weights: Vec<(String, Vec<f32>)> = outputs
        .iter()
        .take(output_count)
        .filter(|(_, y)| dtype_of(y).is_float())
        .map(|(n, y)| {
            (n.clone(), random.f32s(y.len(), 0.5, 1.5).into_iter().map(|r| if random.bits() & 1 == 0 { r } else { -r }).collect())
        })
        .collect();
    let wanted: Vec<usize> = (0..feeds.len()).filter(|i| dtype_of(&feeds[*i].1) == DType::F32).collect();
    let grads = run_gradients(&mut graph, &outputs, &weights, &feeds, &wanted)?;
    for (input, grad) in wanted.iter().zip(grads) {
        let name = feeds[*input].0.clone();
        if grad.dims != feeds[*input].1.dims {
            return Err(format!("gradient of {name} has shape {:?}, the input {:?}", grad.dims, feeds[*input].1.dims));
        }
        let centre = feeds[*input].1.clone();
        for _ in 0..DIRECTIONS {
            let direction = random.f32s(centre.len(), -1.0, 1.0);
            let mut slopes = [0f64; 2];
            let mut moved = Vec::new();
            for (side, sign) in [1.0, -1.0].into_iter().enumerate() {
                let x = centre.as_f32().iter().zip(&direction).map(|(x, d)| x + (sign * STEP) as f32 * d).collect::<Vec<f32>>();
                feeds[*input].1 = harness::f32s(&centre.dims, x.clone());
                slopes[side] = weighted(&forward.run(&feeds).map_err(|e| e.to_string())?, &weights);
                moved.push(x);
            }
            feeds[*input].1 = centre.clone();
            let numeric = (slopes[0] - slopes[1]) / (2.0 * STEP);
            let steps = moved[0].iter().zip(&moved[1]).map(|(a, b)| (f64::from(*a) - f64::from(*b)) / (2.0 * STEP));
            let terms: Vec<f64> = steps.zip(grad.as_f32()).map(|(s, g)| s * f64::from(g)).collect();
            let analytic: f64 = terms.iter().sum();
            let size = terms.iter().map(|t| t * t).sum::<f64>().sqrt();
            let allowed = TOLERANCE * size + NOISE * magnitude(&outputs, &weights) / STEP;
            let off = (numeric - analytic).abs();
            if off.is_nan() || off > allowed {
                return Err(format!(
                    "gradient of {name}: slope {analytic:.6}, central difference {numeric:.6}, allowed {allowed:.1e}"
                ));
            }
        }
    }
    Ok(())
}

fn weighted(outputs: &[(String, Array)], weights: &[(String, Vec<f32>)]) -> f64 {
    let one = |(name, r): &(String, Vec<f32>)| -> f64 {
        output(outputs, name).as_f32().iter().zip(r).map(|(y, r)| f64::from(*y) * f64::from(*r)).sum()
    };
    weights.iter().map(one).sum()
}

fn magnitude(outputs: &[(String, Array)], weights: &[(String, Vec<f32>)]) -> f64 {
    let squares = weights.iter().flat_map(|(name, _)| output(outputs, name).as_f32()).map(|y| f64::from(y).powi(2));
    squares.sum::<f64>().sqrt()
}

fn run_gradients(
    graph: &mut Graph,
    outputs: &[(String, Array)],
    weights: &[(String, Vec<f32>)],
    feeds: &[(String, Array)],
    wanted: &[usize],
) -> Result<Vec<Array>, String> {
    let loss = add_loss(graph, outputs, weights);
    let facts = infer::facts(graph).map_err(|e| e.to_string())?;
    let wrt: Vec<ValueId> = wanted.iter().map(|i| graph.find(&feeds[*i].0).unwrap()).collect();
    let grads = differentiate(graph, &facts, loss, &wrt).map_err(|e| e.to_string())?;
    let mut names = Vec::new();
    for (v, grad) in wrt.iter().zip(grads) {
        let name = graph.value(*v).name().to_string();
        // No gradient means zero: then the central difference must be zero too.
        let zeros = |graph: &mut Graph| {
            let zero = graph.add_initializer("zero", Tensor::f32(&[], &[0.0]));
            graph.add_op("Mul", &[*v, zero], vec![], "zeros")
        };
        let grad = grad.unwrap_or_else(|| zeros(graph));
        names.push(format!("grad.{name}"));
        add_output(graph, grad, names.last().unwrap(), vec![]).map_err(|e| e.to_string())?;
        let undeclared = Declared { dtype: None, dims: None, extra: Default::default() };
        let out = graph.find(names.last().unwrap()).unwrap();
        graph.set_declared(out, undeclared);
    }
    graph.remove_dead(&|_, _| false);
    let after = infer::facts(graph).map_err(|e| format!("gradient graph: {e}"))?;
    let of_gradient = |id: &NodeId| graph.node(*id).name() != "node";
    if let Some(id) = cuda::nodes_without_kernel(graph, &after).into_iter().find(of_gradient) {
        return Err(format!("CUDA has no kernel for {} of the gradient", graph.node(id).op()));
    }
    let found = session(graph)?.run(feeds).map_err(|e| e.to_string())?;
    Ok(names.iter().map(|n| output(&found, n).clone()).collect())
}

fn add_loss(graph: &mut Graph, outputs: &[(String, Array)], weights: &[(String, Vec<f32>)]) -> ValueId {
    let mut terms = Vec::new();
    for (name, r) in weights {
        let y = graph.find(name).unwrap();
        let dims = &output(outputs, name).dims;
        let mut b = Builder::new(graph, "loss.");
        let r = b.constant(Tensor::f32(dims, r));
        let is_f32 = dtype_of(output(outputs, name)) == DType::F32;
        let y = if is_f32 { y } else { b.cast(y, DType::F32) };
        let product = b.mul(y, r);
        let axes: Vec<i64> = (0..dims.len() as i64).collect();
        terms.push(if axes.is_empty() { product } else { b.reduce_sum(product, &axes, false) });
    }
    let mut b = Builder::new(graph, "loss.");
    let loss = terms.into_iter().reduce(|a, t| b.add(a, t)).expect("an output is a float");
    graph.add_output(loss, declare(DType::F32, vec![]));
    loss
}
