//! Second moments of values over images, against the same computed by hand from the values themselves.
//!
//! Tests that need ONNX Runtime find it as the command does; where there is none they say that they skip.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "these are tests")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use vitrim::data::{BatchOrder, Dataset, Options};
use vitrim::eval::data_inputs;
use vitrim::graph::build::Builder;
use vitrim::graph::{DType, Declared, DeclaredDim, Graph, Tensor, ValueId};
use vitrim::infer::{self, Facts};
use vitrim::runtime::{LibraryChoice, RuntimeName, SessionOptions, find};
use vitrim::stats::{Job, Moments, Probe, Stats, StatsError, collect, held_every, probe_graph};
use vitrim::{onnx, runtime};

const SHA: &str = "63793635f9ea0387de4f4731ab059f1e59ea057348dc5bd66a8e0c0a3e909230";

fn has_ort() -> bool {
    if !RuntimeName::Ort.is_built() {
        println!("skipped: built without ONNX Runtime");
        return false;
    }
    match find(&LibraryChoice::default()) {
        Ok(_) => true,
        Err(error) => {
            assert!(std::env::var_os("VITRIM_ORT_LIB").is_none(), "VITRIM_ORT_LIB is set, and: {error}");
            println!("skipped: {error}");
            false
        }
    }
}

fn digits(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/digits").join(name)
}

/// A graph, where it is probed, and images.
struct Case {
    graph: Graph,
    facts: Facts,
    probes: Vec<Probe>,
    data: Dataset,
}

fn probe(name: &str, value: ValueId, axes: &[usize], centre: Option<usize>) -> Probe {
    Probe { name: name.to_string(), value, axes: axes.to_vec(), centre }
}

impl Case {
    fn new(graph: Graph, probes: Vec<Probe>, images: usize) -> Self {
        let facts = infer::facts(&graph).unwrap();
        let options = Options { inputs: data_inputs(&graph), ..Options::default() };
        let data = Dataset::open(&digits("train.npz"), &options).unwrap();
        let data = data.select(&(0..images).collect::<Vec<_>>());
        Self { graph, facts, probes, data }
    }

    /// Heads [B, 4, 7, 5] made of digits, the same about 1,000, and as float16.
    fn built(opset: i64, batch: DeclaredDim, images: usize) -> Self {
        let mut graph = Graph::new(7, vec![(String::new(), opset)], bytes::Bytes::new());
        let input = graph.add_value("input");
        let dims = [1, 28, 28].map(DeclaredDim::Size);
        let dims = Some([batch].into_iter().chain(dims).collect());
        graph.add_input(input, Declared { dtype: Some(DType::F32), dims, extra: bytes::Bytes::new() });
        let mut b = Builder::new(&mut graph, "");
        let weight: Vec<f32> = (0..140u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 16) as f32 / 65_536.0 - 0.5).collect();
        let weight = b.constant(Tensor::f32(&[28, 5], &weight));
        let x = b.reshape(input, &[0, 4, 7, 28]);
        let heads = b.matmul(x, weight);
        let (small, far) = (b.scalar(DType::F32, 0.01), b.scalar(DType::F32, 1000.0));
        let far_heads = b.mul(heads, small);
        let far_heads = b.add(far_heads, far);
        let half = b.cast(heads, DType::F16);
        // Nothing that a probe needs.
        let unused = b.neg(half);
        graph.add_output(unused, Declared { dtype: Some(DType::F16), dims: None, extra: bytes::Bytes::new() });
        let probes = vec![
            probe("heads", heads, &[1, 3], None),
            probe("turned", heads, &[3, 1], None),
            probe("centred", heads, &[1, 3], Some(2)),
            probe("far", far_heads, &[1, 3], None),
            probe("half", half, &[3], None),
        ];
        Self::new(graph, probes, images)
    }

    fn digits(images: usize) -> Self {
        let graph = onnx::read(&digits("vit-digits.onnx")).unwrap().graph;
        let hidden = graph.find("/blocks/blocks.0/mlp/act/Mul_1_output_0").unwrap();
        Self::new(graph, vec![probe("mlp.0", hidden, &[2], None)], images)
    }

    fn collect(&self, batch: usize, images: Option<usize>) -> Result<Stats, StatsError> {
        let session = SessionOptions { threads: 1, ..SessionOptions::default() };
        let (mut seen, stop) = (0, AtomicBool::new(false));
        let job = Job {
            graph: &self.graph,
            facts: &self.facts,
            model_sha256: SHA,
            probes: &self.probes,
            data: &self.data,
            images,
            seed: 7,
            batch,
            loaders: 2,
            session: &session,
        };
        let stats = collect(&job, &mut |p| seen = p.images, &stop)?;
        assert_eq!(seen, stats.images);
        Ok(stats)
    }

    /// The moments of a probe, in f64, from the values themselves: of images fitted to and of those held out.
    fn by_hand(&self, probe: &Probe) -> [Moments; 2] {
        let mut graph = self.graph.clone();
        graph.outputs().to_vec().into_iter().for_each(|v| graph.remove_output(v));
        graph.add_output(probe.value, Declared { dtype: None, dims: None, extra: bytes::Bytes::new() });
        let declared = Declared { dtype: self.facts.get(probe.value).dtype, dims: None, extra: bytes::Bytes::new() };
        graph.set_declared(probe.value, declared);
        graph.remove_dead(&|_, _| false);
        let batch = vitrim::eval::fixed_batch(&self.graph, &self.facts).unwrap_or(1);
        let mut session = runtime::open_graph(RuntimeName::Ort, &graph, &SessionOptions::default()).unwrap();
        let every = held_every(self.data.len());
        let mut rows = [Vec::new(), Vec::new()];
        for i in 0..self.data.len() {
            // A model of a fixed batch sees the image that many times, and one of them counts.
            let one = self.data.select(&vec![i; batch]);
            let fed = one.batches(BatchOrder::default(), batch, 1, None).next().unwrap().unwrap();
            let (_, value) = session.run(&fed.inputs).unwrap().remove(0);
            let part = usize::from(i % every == every - 1);
            rows[part].extend(rows_of(&value.dims, &value.as_f32(), probe).into_iter().filter(|(b, _)| *b == 0).map(|(_, r)| r));
        }
        rows.map(|rows| moments(&rows))
    }
}

/// Rows of features with the image that they are of, which is on axis 0.
fn rows_of(dims: &[usize], values: &[f32], probe: &Probe) -> Vec<(usize, Vec<f64>)> {
    let stride = |axis: usize| dims[axis + 1..].iter().product::<usize>();
    let mut offsets = vec![0];
    for axis in &probe.axes {
        offsets = offsets.iter().flat_map(|o| (0..dims[*axis]).map(move |i| o + i * stride(*axis))).collect();
    }
    let first = |at: &usize| probe.axes.iter().all(|axis| (at / stride(*axis)).is_multiple_of(dims[*axis]));
    let centred = |at: usize| -> f64 {
        let Some(axis) = probe.centre else { return f64::from(values[at]) };
        let start = at - at / stride(axis) % dims[axis] * stride(axis);
        let sum: f64 = (0..dims[axis]).map(|i| f64::from(values[start + i * stride(axis)])).sum();
        f64::from(values[at]) - sum / dims[axis] as f64
    };
    let row = |at: usize| (at / stride(0), offsets.iter().map(|o| centred(at + o)).collect());
    (0..values.len()).filter(first).map(row).collect()
}

fn moments(rows: &[Vec<f64>]) -> Moments {
    let (n, features) = (rows.len() as f64, rows[0].len());
    let mean: Vec<f64> = (0..features).map(|i| rows.iter().map(|r| r[i]).sum::<f64>() / n).collect();
    let of = |i: usize, j: usize| rows.iter().map(|r| (r[i] - mean[i]) * (r[j] - mean[j])).sum::<f64>() / n;
    Moments { rows: rows.len() as u64, cov: faer::Mat::from_fn(features, features, of), mean }
}

/// The greatest difference of covariances as a share of the greatest variance, and of means as a share of its root.
fn distance(a: &Moments, b: &Moments) -> f64 {
    assert_eq!((a.rows, a.mean.len(), a.cov.nrows()), (b.rows, b.mean.len(), b.cov.nrows()));
    let n = a.mean.len();
    let variance = (0..n).map(|i| a.cov[(i, i)]).fold(0.0, f64::max);
    let pairs = (0..n).flat_map(|i| (0..n).map(move |j| (i, j)));
    let cov = pairs.map(|at| (a.cov[at] - b.cov[at]).abs()).fold(0.0, f64::max) / variance;
    let mean = a.mean.iter().zip(&b.mean).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max) / variance.sqrt();
    cov.max(mean)
}

fn assert_by_hand(case: &Case, stats: &Stats, within: f64) {
    for probe in &case.probes {
        let found = &stats.probes[&probe.name];
        let [fit, held] = case.by_hand(probe);
        let worst = distance(&fit, &found.fit).max(distance(&held, &found.held));
        println!("{}: {worst:.2e} over {} and {} rows", probe.name, fit.rows, held.rows);
        assert!(worst < within, "{}: {worst:e}", probe.name);
    }
}

#[test]
fn moments_are_those_of_the_values() {
    if !has_ort() {
        return;
    }
    for opset in [11, 13, 18] {
        let case = Case::built(opset, DeclaredDim::Symbol("batch".into()), 45);
        let stats = case.collect(7, None).unwrap();
        assert_eq!((stats.images, stats.held_images, stats.seed), (45, 5, 7));
        // Sums of up to 196 rows in float32.
        assert_by_hand(&case, &stats, 3e-6);
    }
}

#[test]
fn a_fixed_batch_counts_every_image_once() {
    if !has_ort() {
        return;
    }
    // 40 images are fitted to and 5 held out: both leave a batch that is not full.
    let case = Case::built(17, DeclaredDim::Size(16), 45);
    let stats = case.collect(64, None).unwrap();
    assert_eq!((stats.images, stats.held_images), (45, 5));
    // The surplus images are taken off again, but their rounding stays.
    assert_by_hand(&case, &stats, 2e-5);
}

#[test]
fn the_batch_does_not_matter() {
    if !has_ort() {
        return;
    }
    let case = Case::digits(80);
    let one = case.collect(1, None).unwrap();
    assert_by_hand(&case, &one, 1e-6);
    for batch in [7, 64] {
        let other = case.collect(batch, None).unwrap();
        let (a, b) = (&one.probes["mlp.0"], &other.probes["mlp.0"]);
        let worst = distance(&a.fit, &b.fit).max(distance(&a.held, &b.held));
        println!("batch {batch}: {worst:.2e}");
        assert!(worst < 1e-6, "{batch}: {worst:e}");
        assert_eq!(other, case.collect(batch, None).unwrap(), "batch {batch}: not the same twice");
    }
}

#[test]
fn images_are_drawn_by_the_seed() {
    if !has_ort() {
        return;
    }
    let case = Case::digits(60);
    let stats = case.collect(16, Some(24)).unwrap();
    let drawn = Case { data: case.data.draw(24, 7), ..Case::digits(60) };
    assert_eq!((stats.images, stats.held_images), (24, 3));
    assert_eq!(stats, drawn.collect(16, None).unwrap());
    assert_ne!(stats, Case { data: case.data.draw(24, 8), ..Case::digits(60) }.collect(16, None).unwrap());
    let one = case.collect(16, Some(1));
    assert!(matches!(one, Err(StatsError::TooFewImages { images: 1, held: 0 })), "{one:?}");
}

#[test]
fn a_file_comes_back_and_a_stale_one_is_refused() {
    if !has_ort() {
        return;
    }
    let case = Case::built(17, DeclaredDim::Symbol("batch".into()), 20);
    let (graph, probes) = (&case.graph, &case.probes);
    let stats = case.collect(8, None).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stats.safetensors");
    stats.write(&path, graph, probes).unwrap();
    assert_eq!(Stats::read(&path, SHA, graph, probes).unwrap(), stats);
    let bytes = std::fs::read(&path).unwrap();
    stats.write(&path, graph, probes).unwrap();
    assert!(bytes == std::fs::read(&path).unwrap(), "equal statistics give equal bytes");
    let refused = |sha: &str, probes: &[Probe]| Stats::read(&path, sha, graph, probes).unwrap_err().to_string();
    let file = path.display();
    let other = refused("0123456789", probes);
    assert_eq!(
        other,
        format!("{file}: statistics do not fit: they belong to model sha256 63793635.., not 01234567..; gather them again")
    );
    let mut changed = probes.clone();
    changed[0].centre = Some(2);
    assert!(refused(SHA, &changed).contains("they were taken at other probes"));
    changed[0].name = "new".into();
    assert!(refused(SHA, &changed).contains("there is no probe 'new'"));
    for damage in [&bytes[..bytes.len() - 8], &bytes[..20], &[]] {
        std::fs::write(&path, damage).unwrap();
        let error = refused(SHA, probes);
        assert!(error.contains("damaged") && !error.contains('\n'), "{error}");
    }
    let mut nan = bytes.clone();
    let end = nan.len();
    nan[end - 8..].copy_from_slice(&f64::NAN.to_le_bytes());
    std::fs::write(&path, nan).unwrap();
    assert!(refused(SHA, probes).contains("holds invalid values"));
}

#[test]
fn what_is_not_finite_is_named() {
    if !has_ort() {
        return;
    }
    let mut case = Case::built(17, DeclaredDim::Symbol("batch".into()), 20);
    let heads = case.probes[0].value;
    let mut b = Builder::new(&mut case.graph, "");
    let huge = b.scalar(DType::F32, 1e30);
    let huge = b.mul(heads, huge);
    case.facts = infer::facts(&case.graph).unwrap();
    case.probes = vec![probe("huge", huge, &[3], None)];
    let error = case.collect(8, None).unwrap_err();
    let StatsError::NotFinite { probe, value } = error else { panic!("{error}") };
    assert_eq!((probe.as_str(), value.as_str()), ("huge", case.graph.value(huge).name()));
}

#[test]
fn only_what_probes_need_is_left_and_the_rest_is_refused() {
    let case = Case::built(17, DeclaredDim::Symbol("batch".into()), 20);
    let built = probe_graph(&case.graph, &case.facts, &case.probes[3..4]).unwrap();
    let unused = case.graph.value(case.graph.outputs()[0]).name();
    assert!(built.graph.find(unused).is_some_and(|v| built.graph.value(v).producer().is_none()));
    let outputs: Vec<&str> = built.graph.outputs().iter().map(|v| built.graph.value(*v).name()).collect();
    assert_eq!(outputs, ["stats.rows.far", "stats.sum.far", "stats.gram.far"]);
    let heads = case.probes[0].value;
    let input = case.graph.inputs()[0];
    let weight = case.graph.initializers()[0];
    for (probes, reason) in [
        (vec![probe("a", heads, &[4], None)], "axis 4 is not among the 4 of"),
        (vec![probe("a", heads, &[1, 1], None)], "axis 1 is given twice"),
        (vec![probe("a", heads, &[], None)], "hold no features"),
        (vec![probe("a", heads, &[0], None)], "axis 0 of [batch, 4, 7, 5] has no fixed size"),
        (vec![probe("a", heads, &[1], Some(1))], "only rows are centred"),
        (vec![probe("a", heads, &[1], Some(0))], "centring there would mix images"),
        (vec![probe("a", weight, &[1], None)], "its 28 rows do not grow with the batch"),
        (vec![probe("a", heads, &[1], None), probe("a", input, &[3], None)], "its name is given twice"),
    ] {
        let error = probe_graph(&case.graph, &case.facts, &probes).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn a_stop_is_obeyed() {
    if !has_ort() {
        return;
    }
    let case = Case::digits(40);
    let session = SessionOptions::default();
    let stop = AtomicBool::new(false);
    let job = Job {
        graph: &case.graph,
        facts: &case.facts,
        model_sha256: SHA,
        probes: &case.probes,
        data: &case.data,
        images: None,
        seed: 0,
        batch: 8,
        loaders: 1,
        session: &session,
    };
    let mut runs = 0;
    let mut see = |_| {
        runs += 1;
        stop.store(true, Ordering::Relaxed);
    };
    assert!(matches!(collect(&job, &mut see, &stop), Err(StatsError::Interrupted)));
    assert_eq!(runs, 1);
}

/// Prints how long a pass over 1,024 digits takes: `cargo test --test stats timing -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, not a test"]
fn timing() {
    if !has_ort() {
        return;
    }
    let case = Case::digits(1024);
    let start = std::time::Instant::now();
    let stats = case.collect(64, None).unwrap();
    println!("{} images in {:.2} s", stats.images, start.elapsed().as_secs_f64());
    assert_eq!(stats.held_images, 128);
}
