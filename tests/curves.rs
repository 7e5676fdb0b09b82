//! Losses of edits with the front of the graph computed once are those of the whole edited graph; curves and their files.
//!
//! Tests that need ONNX Runtime find it as the command does; where there is none they say that they skip.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "these are tests")]

mod command;
mod harness;

use harness::Random;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use vitrim::autodiff::interface::declare;
use vitrim::curves::{CurveError, Curves, CurvesFileError, How, Measure, Point, Settings, Time, Trial, images_within};
use vitrim::data::{BatchOrder, Dataset, Options};
use vitrim::eval::{self, data_inputs};
use vitrim::graph::build::{Builder, attr};
use vitrim::graph::{AttrValue, DType, DeclaredDim, Graph, Tensor, ValueId};
use vitrim::infer::{self, Facts};
use vitrim::runtime::SessionOptions;
use vitrim::{onnx, pipeline};

static GO: AtomicBool = AtomicBool::new(false);

fn settings(batch: usize) -> Settings {
    Settings { session: SessionOptions { threads: 2, ..Default::default() }, batch, ..Settings::default() }
}

/// The loss of one trial from whole runs of both graphs: KL of the first output, or squared errors of all over their variances.
fn whole(graph: &Graph, trial: &Trial, data: &Dataset, is_class: bool) -> f64 {
    let mut edited = graph.clone();
    trial.edits.iter().for_each(|(v, t)| edited.set_constant(*v, t.clone()));
    let (wanted, found) = (outputs(graph, data), outputs(&edited, data));
    if is_class {
        let rows = wanted[0].iter().zip(&found[0]);
        return rows.map(|(p, q)| eval::kl_divergence(p, q)).sum::<f64>() / data.len() as f64;
    }
    let mut loss = 0.0;
    for (wanted, found) in wanted.iter().map(|v| v.concat()).zip(found.iter().map(|v| v.concat())) {
        let n = wanted.len() as f64;
        let mean = wanted.iter().sum::<f64>() / n;
        let variance = wanted.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
        loss += wanted.iter().zip(&found).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / n / variance;
    }
    loss
}

/// Values by output and sample.
fn outputs(graph: &Graph, data: &Dataset) -> Vec<Vec<Vec<f64>>> {
    let mut session = harness::session(graph).unwrap();
    let size = eval::fixed_batch(graph, &infer::facts(graph).unwrap()).unwrap_or(16);
    let mut all = vec![Vec::new(); graph.outputs().len()];
    for batch in data.batches(BatchOrder::default(), size, 1, None) {
        let batch = batch.unwrap();
        let results = session.run(&eval::filled(&batch, size)).unwrap();
        for (all, (_, array)) in all.iter_mut().zip(results) {
            all.extend((0..batch.count).map(|n| array.row(n).unwrap().as_f32().into_iter().map(f64::from).collect()));
        }
    }
    all
}

/// The constant with a part of its values, from `share` on along the first axis, set to zero.
fn cut(graph: &Graph, v: ValueId, share: f64) -> Trial {
    let tensor = graph.constant(v).unwrap();
    let mut values = tensor.to_f32s().unwrap();
    let first = (values.len() as f64 * share) as usize;
    values[first..].fill(0.0);
    Trial { edits: vec![(v, tensor.with_f32s(&values))] }
}

fn close(found: f64, expected: f64, what: &str) {
    assert!((found - expected).abs() <= 1e-6 + 1e-4 * expected.abs(), "{what}: {found} instead of {expected}");
}

/// Goes through the sites in the order of the graph and holds each loss against whole runs.
fn compare(graph: &Graph, facts: &Facts, output: Option<&str>, data: &Dataset, sites: &[ValueId], settings: &Settings) {
    let mut m = Measure::new(graph, facts, output, data, settings, &GO).unwrap();
    assert_eq!(m.images(), data.len() as u64);
    let mut sites = sites.to_vec();
    sites.sort_by_key(|v| m.order(&[*v]));
    for v in sites {
        let name = graph.value(v).name();
        let trials = [Trial::default(), cut(graph, v, 0.5), cut(graph, v, 1.0)];
        m.advance_to(&[v]).unwrap();
        let mut heard = Vec::new();
        let losses = m.losses(&[v], &trials, &mut |done, total| heard.push((done, total)), &GO).unwrap();
        assert!(losses[0].abs() < 1e-9 && losses[2].abs() < 1e-9, "{name}: {losses:?}");
        for (trial, loss) in trials.iter().zip(&losses) {
            close(*loss, whole(graph, trial, data, output.is_some()), name);
        }
        assert!(losses[1] > 1e-6, "{name}: the comparison says nothing: {losses:?}");
        assert!(heard.iter().enumerate().all(|(i, h)| *h == (i + 1, heard.len())), "{heard:?}");
        // Nothing was used up.
        assert_eq!(m.losses(&[v], &trials, &mut |_, _| {}, &GO).unwrap(), losses);
    }
}

fn digits(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/digits").join(name)
}

fn digits_data(graph: &Graph, images: usize) -> Dataset {
    let options = Options { inputs: data_inputs(graph), ..Options::default() };
    let data = Dataset::open(&digits("train.npz"), &options).unwrap();
    data.select(&(0..images).collect::<Vec<_>>())
}

/// Weights of products, in the order of the graph.
fn weights(graph: &Graph) -> Vec<ValueId> {
    let products = graph.nodes().filter(|(_, n)| ["MatMul", "Gemm"].contains(&n.op()));
    products
        .flat_map(|(_, n)| n.inputs())
        .flatten()
        .copied()
        .filter(|v| graph.constant(*v).is_some_and(|t| t.dims.len() == 2))
        .collect()
}

#[test]
fn losses_on_the_digits_network_are_those_of_whole_runs() {
    if !harness::has_ort() {
        return;
    }
    let graph = onnx::read(&digits("vit-digits.onnx")).unwrap().graph;
    let (facts, _) = pipeline::analyse(&graph).unwrap();
    let data = digits_data(&graph, 20);
    let all = weights(&graph);
    let some: Vec<ValueId> = all.iter().copied().step_by(4).chain(all.last().copied()).collect();
    let output = graph.value(graph.outputs()[0]).name();
    compare(&graph, &facts, Some(output), &data, &some, &settings(16));
    // No room for anything: the narrowest place.
    let narrow = Settings { cache_bytes: 0, ..settings(16) };
    compare(&graph, &facts, Some(output), &data, &some[..2], &narrow);
    compare(&graph, &facts, None, &data, &some[1..3], &settings(16));
}

/// `x [batch, 3, 8]`, a skip connection around two products of which the second has its weight transposed by a node, and a Reshape to
/// a shape that is computed from the shape of x behind them; what is between the products is an output too.
struct Small {
    graph: Graph,
    facts: Facts,
    weights: Vec<ValueId>,
    data: Dataset,
    _folder: tempfile::TempDir,
}

fn small(batch: DeclaredDim) -> Small {
    let mut random = Random(7);
    let mut graph = Graph::new(8, vec![(String::new(), 17)], Default::default());
    let x = graph.add_value("x");
    graph.add_input(x, declare(DType::F32, vec![batch.clone(), DeclaredDim::Size(3), DeclaredDim::Size(8)]));
    let mut b = Builder::new(&mut graph, "small.");
    let mut weight =
        |b: &mut Builder<'_>, dims: &[usize]| b.constant(Tensor::f32(dims, &random.f32s(dims.iter().product(), -0.5, 0.5)));
    let (w1, w2, w3, w4) =
        (weight(&mut b, &[8, 8]), weight(&mut b, &[8, 16]), weight(&mut b, &[8, 16]), weight(&mut b, &[24, 5]));
    let h = b.matmul(x, w1);
    let inner = b.matmul(h, w2);
    let early = b.op("Relu", &[inner], vec![]);
    let turned = b.transpose(w3, &[1, 0]);
    let inner = b.matmul(early, turned);
    let sum = b.add(h, inner);
    let shape = b.shape_of(x);
    let zero = b.ints(&[0]);
    let first = b.gather(shape, zero, 0);
    let rest = b.ints(&[-1]);
    let target = b.concat(&[first, rest], 0);
    let flat = b.op("Reshape", &[sum, target], vec![attr("allowzero", AttrValue::Int(0))]);
    let y = b.matmul(flat, w4);
    graph.add_output(y, declare(DType::F32, vec![batch.clone(), DeclaredDim::Size(5)]));
    graph.add_output(early, declare(DType::F32, vec![batch, DeclaredDim::Size(3), DeclaredDim::Size(16)]));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.npz");
    let bytes: Vec<u8> = random.f32s(10 * 24, -2.0, 2.0).iter().flat_map(|v| v.to_le_bytes()).collect();
    std::fs::write(&path, command::npz(&[("x", command::npy("<f4", &[10, 3, 8], &bytes))])).unwrap();
    let data = Dataset::open(&path, &Options { inputs: data_inputs(&graph), ..Options::default() }).unwrap();
    let facts = infer::facts(&graph).unwrap();
    Small { graph, facts, weights: vec![w1, w2, w3, w4], data, _folder: folder }
}

#[test]
fn a_skip_connection_and_shapes_cross_the_place() {
    if !harness::has_ort() {
        return;
    }
    for batch in [DeclaredDim::Symbol("batch".into()), DeclaredDim::Size(4)] {
        let Small { graph, facts, weights, data, .. } = &small(batch);
        let output = graph.value(graph.outputs()[0]).name();
        for cache_bytes in [u64::MAX, 0] {
            let settings = Settings { cache_bytes, ..settings(4) };
            compare(graph, facts, Some(output), data, weights, &settings);
            compare(graph, facts, None, data, weights, &settings);
        }
    }
}

#[test]
fn a_trial_may_edit_some_of_the_constants() {
    if !harness::has_ort() {
        return;
    }
    let Small { graph, facts, weights, data, .. } = &small(DeclaredDim::Symbol("batch".into()));
    let mut m = Measure::new(graph, facts, None, data, &settings(4), &GO).unwrap();
    let both = Trial { edits: [cut(graph, weights[3], 0.5).edits, cut(graph, weights[2], 0.5).edits].concat() };
    let trials = [both, cut(graph, weights[3], 0.5), Trial::default()];
    m.advance_to(&weights[2..]).unwrap();
    let losses = m.losses(&[weights[3], weights[2], weights[3]], &trials, &mut |_, _| {}, &GO).unwrap();
    for (trial, loss) in trials.iter().zip(losses) {
        close(loss, whole(graph, trial, data, false), "both");
    }
}

#[test]
fn what_cannot_be_measured_is_refused() {
    if !harness::has_ort() {
        return;
    }
    let Small { graph, facts, weights, data, .. } = &small(DeclaredDim::Symbol("batch".into()));
    let mut m = Measure::new(graph, facts, None, data, &settings(4), &GO).unwrap();
    let ask = |m: &mut Measure<'_>, constants: &[ValueId], trial: Trial| m.losses(constants, &[trial], &mut |_, _| {}, &GO);
    assert!(m.order(&weights[..1]) < m.order(&weights[1..2]));
    let other = cut(graph, weights[1], 0.5);
    assert!(matches!(ask(&mut m, &weights[..1], other), Err(CurveError::NotListed { .. })));
    let twice = Trial { edits: [cut(graph, weights[1], 0.5).edits, cut(graph, weights[1], 0.9).edits].concat() };
    assert!(matches!(ask(&mut m, &weights[1..2], twice), Err(CurveError::Twice { .. })));
    let shape = Trial { edits: vec![(weights[0], Tensor::f32(&[4, 16], &[0.0; 64]))] };
    let error = ask(&mut m, &weights[..1], shape).unwrap_err();
    assert!(error.to_string().contains("float32 [8, 8], its edit is float32 [4, 16]"), "{error}");
    assert!(matches!(ask(&mut m, graph.inputs(), Trial::default()), Err(CurveError::NotConstant { .. })));
    m.advance_to(&weights[3..]).unwrap();
    let error = m.advance_to(&weights[..1]).unwrap_err();
    assert!(error.to_string().contains("order of the graph"), "{error}");
    assert!(matches!(ask(&mut m, &weights[..1], Trial::default()), Err(CurveError::Behind { .. })));
    let stop = AtomicBool::new(true);
    let trial = [cut(graph, weights[3], 0.5)];
    assert!(matches!(m.losses(&weights[3..], &trial, &mut |_, _| {}, &stop), Err(CurveError::Interrupted)));
    let losses = m.losses(&weights[3..], &trial, &mut |_, _| {}, &GO).unwrap();
    close(losses[0], whole(graph, &trial[0], data, false), "after an interruption");
    let missing = Measure::new(graph, facts, Some("z"), data, &settings(4), &GO);
    assert!(matches!(missing, Err(CurveError::Output { .. })));
}

#[test]
fn images_fit_the_time() {
    if !harness::has_ort() {
        return;
    }
    let graph = onnx::read(&digits("vit-digits.onnx")).unwrap().graph;
    let (facts, _) = pipeline::analyse(&graph).unwrap();
    let data = digits_data(&graph, 300);
    let ask = |seconds, at_most| {
        let time = Time { sites: 18, trials: 6, seconds, at_most };
        images_within((&graph, &facts), None, &data, &settings(16), &time).unwrap()
    };
    assert_eq!((ask(0.0, 256), ask(1e9, 256), ask(1e9, 1000), ask(0.0, 20)), (32, 256, 300, 20));
}

#[test]
fn curves_come_back_from_their_file_and_others_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("curves.json");
    let mut curves = Curves::empty(How::Measured, 256, "0123456789abcdef");
    let points = vec![Point { width: 4, loss: 1.5e-3 }, Point { width: 2, loss: 0.1 }];
    curves.insert("blocks.0.mlp", 8, points).unwrap();
    curves.write(&path).unwrap();
    curves.write(&path).unwrap();
    assert_eq!(Curves::read(&path, "0123456789abcdef").unwrap(), curves);
    let error = Curves::read(&path, "fedcba9876543210").unwrap_err();
    assert!(matches!(error, CurvesFileError::OtherModel { .. }) && error.to_string().lines().count() == 1, "{error}");
    let text = std::fs::read_to_string(&path).unwrap();
    let long = format!("{text}{text}");
    let bad = [
        ("not JSON", "{".to_string()),
        ("twice", long),
        ("a later schema", text.replace("\"schema_version\": 1", "\"schema_version\": 2, \"new\": 0")),
        ("no schema", text.replace("\"schema_version\": 1,", "")),
        ("a negative loss", text.replace("0.1", "-0.1")),
        ("a width twice", text.replace("\"width\": 4", "\"width\": 2")),
        ("a loss of the whole group", text.replace("\"loss\": 0.0\n", "\"loss\": 0.5\n")),
        ("a number that is none", text.replace("0.1", "1e999")),
        ("another word", text.replace("measured", "guessed")),
    ];
    for (what, bad) in bad {
        assert_ne!(bad, text, "{what}");
        std::fs::write(&path, bad).unwrap();
        let error = Curves::read(&path, "0123456789abcdef").unwrap_err();
        assert!(matches!(error, CurvesFileError::Malformed { .. }), "{what}: {error}");
        assert_eq!(error.to_string().lines().count(), 1, "{what}: {error}");
    }
    assert!(matches!(Curves::read(&folder.path().join("none"), ""), Err(CurvesFileError::Io { .. })));
    curves.groups.get_mut("blocks.0.mlp").unwrap()[0].loss = f64::NAN;
    assert!(matches!(curves.write(&path), Err(CurvesFileError::Curve(_))));
}
