//! Predicted losses of cuts: against the exact divergence where it can be computed, and against measured ones.
//!
//! Tests that need ONNX Runtime find it as the command does; where there is none they say that they skip.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "these are tests")]

#[path = "command/mod.rs"]
mod command;
mod harness;

use command::{Sandbox, digits, npy, npz, ort, some};
use harness::Random;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use vitrim::anatomy::Kind;
use vitrim::autodiff::interface::declare;
use vitrim::curves::{self, How, Point};
use vitrim::data::{Dataset, Options};
use vitrim::eval::{self, data_inputs};
use vitrim::graph::build::Builder;
use vitrim::graph::{DType, DeclaredDim, Graph, Tensor, ValueId};
use vitrim::pipeline::{self, BasisChoice, CalibrateAsk, CurveTime, Predicted};
use vitrim::runtime::SessionOptions;
use vitrim::score::{self, Images};
use vitrim::supernet::Squares;

static GO: AtomicBool = AtomicBool::new(false);

const HIDDEN: usize = 8;

/// `relu(x W) V` with x `[batch, 4]`, and its value `x W`.
fn softmax_model(w: &[f32], v: &[f32]) -> (Graph, ValueId) {
    let mut g = Graph::new(9, vec![(String::new(), 17)], bytes::Bytes::new());
    let x = g.add_value("x");
    g.add_input(x, declare(DType::F32, vec![DeclaredDim::Symbol("batch".into()), DeclaredDim::Size(4)]));
    let mut b = Builder::new(&mut g, "n");
    let (w, v) = (b.constant(Tensor::f32(&[4, HIDDEN], w)), b.constant(Tensor::f32(&[HIDDEN, 3], v)));
    let inner = b.matmul(x, w);
    let hidden = b.op("Relu", &[inner], vec![]);
    let y = b.matmul(hidden, v);
    g.add_output(y, declare(DType::F32, vec![DeclaredDim::Symbol("batch".into()), DeclaredDim::Size(3)]));
    (g, inner)
}

/// The logits of one image from its value of `x W`.
fn logits(inner: &[f64], v: &[f32]) -> Vec<f64> {
    (0..3).map(|c| (0..HIDDEN).map(|j| inner[j].max(0.0) * f64::from(v[j * 3 + c])).sum()).collect()
}

#[test]
fn a_weight_is_that_of_the_exact_divergence_for_small_errors() {
    const IMAGES: usize = 1000;
    const SIZE: f64 = 1e-3;
    if !harness::has_ort() {
        return;
    }
    let scaled = |count: usize, by: f32| some(count).into_iter().map(|x| by * x).collect::<Vec<f32>>();
    let (w, v) = (scaled(4 * HIDDEN, 2.0), scaled(HIDDEN * 3, 3.0));
    let mut random = Random(5);
    let x = random.f32s(IMAGES * 4, -1.0, 1.0);
    let (graph, inner) = softmax_model(&w, &v);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.npz");
    let content: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
    std::fs::write(&path, npz(&[("x", npy("<f4", &[IMAGES, 4], &content))])).unwrap();
    let data = Dataset::open(&path, &Options { inputs: data_inputs(&graph), ..Options::default() }).unwrap();
    let squares = Squares::new(&graph, Some(graph.outputs()[0]), &[inner]).unwrap();
    let (mut forward, mut step) = (harness::session(&graph).unwrap(), harness::session(&squares.graph).unwrap());
    let images = Images { data: &data, batch: 64, is_batch_fixed: false, loaders: 1, stop: &GO };
    let found = score::squares(&squares, (forward.as_mut(), step.as_mut()), &images, 3, &mut |_, _| {}).unwrap();
    let weight = 0.5 * found[0].unwrap() / HIDDEN as f64;
    // Errors alike in all directions, on every image several.
    let (mut exact, mut error) = (0.0, 0.0);
    const DRAWS: usize = 20;
    for x in x.chunks_exact(4) {
        let unit = |j: usize| (0..4).map(|i| f64::from(x[i]) * f64::from(w[i * HIDDEN + j])).sum::<f64>();
        let inner: Vec<f64> = (0..HIDDEN).map(unit).collect();
        for _ in 0..DRAWS {
            let d: Vec<f64> = random.f32s(HIDDEN, -1.0, 1.0).into_iter().map(|d| SIZE * f64::from(d)).collect();
            let moved: Vec<f64> = inner.iter().zip(&d).map(|(x, d)| x + d).collect();
            exact += eval::kl_divergence(&logits(&inner, &v), &logits(&moved, &v));
            error += d.iter().map(|d| d * d).sum::<f64>();
        }
    }
    let n = (IMAGES * DRAWS) as f64;
    let predicted = curves::predicted(&[(1, error / n)], weight)[0].loss;
    let ratio = predicted / (exact / n);
    println!("predicted {predicted:.4e}, exact {:.4e}", exact / n);
    // 1,000 squares of a Gaussian, of sizes that differ by image, are known to about 6 %.
    assert!((ratio - 1.0).abs() < 0.2, "{ratio}");
}

/// The loss at the width nearest to a share.
fn at(points: &[Point], share: f64) -> f64 {
    let units = points.last().unwrap().width as f64;
    let distance = |p: &Point| (p.width as f64 - share * units).abs();
    points.iter().min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap().loss
}

/// By kind and percent kept, the geometric mean over groups of predicted over measured losses.
fn compare(basis: BasisChoice) -> BTreeMap<(String, u32), f64> {
    let model = pipeline::load(Path::new(&digits("vit-digits.onnx")), &Default::default()).unwrap();
    let options = Options { inputs: data_inputs(model.graph()), ..Options::default() };
    let data = Dataset::open(Path::new(&digits("train.npz")), &options).unwrap();
    let session = SessionOptions { threads: 2, ..Default::default() };
    let ask =
        CalibrateAsk { data: Some(&data), images: 512, basis, batch: 64, seed: 1, output: None, session: &session, dir: None };
    let found = pipeline::calibrate(&model, &ask, &mut |_| {}, &GO).unwrap();
    let kinds = BTreeSet::from([Kind::Mlp, Kind::Qk, Kind::Vo]);
    let start = std::time::Instant::now();
    let Predicted::Curves(predicted) = found.predicted(&model, &ask, &kinds, &mut |_| {}, &GO).unwrap() else {
        panic!("no curves")
    };
    let middle = std::time::Instant::now();
    let time = CurveTime { how: How::Measured, seconds: 1e9, images: 128 };
    let measured = found.curves(&model, &ask, &time, &kinds, &mut |_| {}, &GO).unwrap();
    println!("predicted in {:?}, measured in {:?}", middle - start, middle.elapsed());
    assert_eq!((predicted.how, measured.how), (How::Predicted, How::Measured));
    assert_eq!(predicted.groups.keys().collect::<Vec<_>>(), measured.groups.keys().collect::<Vec<_>>());
    let mut logs: BTreeMap<(String, u32), Vec<f64>> = BTreeMap::new();
    for (id, points) in &predicted.groups {
        for percent in [87, 75, 50, 25] {
            let (p, m) = (at(points, f64::from(percent) / 100.0), at(&measured.groups[id], f64::from(percent) / 100.0));
            println!("{basis:?} {id:8} {percent:3} %: predicted {p:.3e} measured {m:.3e} ratio {:.2}", p / m);
            let kind = id.split('.').next().unwrap().to_string();
            logs.entry((kind, percent)).or_default().push((p.max(1e-12) / m.max(1e-12)).ln());
        }
    }
    logs.into_iter().map(|(k, l)| (k, (l.iter().sum::<f64>() / l.len() as f64).exp())).collect()
}

#[test]
fn predicted_losses_of_small_cuts_are_near_measured_ones() {
    if !harness::has_ort() {
        return;
    }
    let means = compare(BasisChoice::Auto);
    println!("{means:.3?}");
    for percent in [87, 75] {
        let mean = means[&("mlp".to_string(), percent)];
        assert!((1.0 / 3.0..3.0).contains(&mean), "{percent} %: {mean}");
    }
}

#[test]
fn a_plan_by_predicted_losses_keeps_the_accuracy() {
    let Some(library) = ort() else { return println!("skipped: VITRIM_ORT_LIB names no ONNX Runtime") };
    let sandbox = Sandbox::default();
    let (model, train, test) = (digits("vit-digits.onnx"), digits("train.npz"), digits("test.npz"));
    let args = ["slim", &model, "--data", &train, "--eval-data", &test, "--budget", "macs=0.5", "-o", "o.onnx", "--run", "r"];
    let args = [&args[..], &["--curves", "predicted", "--runtimes", "ort", "--json", "-q"]].concat();
    let ran = sandbox.run_with(&args, &[("VITRIM_ORT_LIB", &library)]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let report = ran.json();
    println!("{}", report["accuracy"]);
    assert_eq!(report["curves"], "predicted");
    let top1 = |when: &str| report["accuracy"][when]["top1"].as_f64().unwrap();
    assert!(top1("before") - top1("after") <= 0.005, "{}", report["accuracy"]);
    assert!(sandbox.at("r/curves-predicted-rotated.json").exists());
    let plan = std::fs::read(sandbox.at(report["plan"].as_str().unwrap())).unwrap();
    let plan: serde_json::Value = serde_json::from_slice(&plan).unwrap();
    assert_eq!(plan["budget"]["allocation"]["curves"], "predicted");
}
