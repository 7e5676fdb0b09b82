//! Verification and latency on tiny models built here, and on the digits model with its data.
//!
//! Tests that need ONNX Runtime find it as the command does; where there is none they say that they skip.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "these are tests")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use vitrim::bench;
use vitrim::cost::Sizes;
use vitrim::data::array::{Array, ArrayData, ArrayKind};
use vitrim::data::{Batch, BatchOrder, DataError, Dataset, InputSpec, Options};
use vitrim::graph::build::{Builder, attr};
use vitrim::graph::{AttrValue, DType, Declared, DeclaredDim, Graph, NewNode, Tensor, ValueId};
use vitrim::infer;
use vitrim::onnx::read;
use vitrim::pipeline;
use vitrim::plan::{Edited, KeptUnits, Plan};
use vitrim::runtime::{RuntimeName, SessionOptions, find};
use vitrim::verify::feeds::{self, InputSource, Tried};
use vitrim::verify::{AccuracyError, Edits, Error, FeedError, Floors, Settings, Subject, Verdict, compare, weights};

fn has_ort() -> bool {
    if !RuntimeName::Ort.is_built() {
        println!("skipped for ONNX Runtime: built without it");
        return false;
    }
    match find(&SessionOptions::default().library) {
        Ok(_) => true,
        Err(error) => {
            assert!(std::env::var_os("VITRIM_ORT_LIB").is_none(), "VITRIM_ORT_LIB is set, and: {error}");
            println!("skipped for ONNX Runtime: {error}");
            false
        }
    }
}

/// The engines of this build that can be used here.
fn engines() -> Vec<RuntimeName> {
    let ort = has_ort().then_some(RuntimeName::Ort);
    ort.into_iter().chain(RuntimeName::Tract.is_built().then_some(RuntimeName::Tract)).collect()
}

fn settings(runtimes: Vec<RuntimeName>) -> Settings {
    let session = SessionOptions { threads: 1, ..SessionOptions::default() };
    Settings { runtimes, session, ..Settings::default() }
}

fn declared(dtype: DType, dims: &[&str]) -> Declared {
    let dim = |d: &&str| d.parse().map_or_else(|_| DeclaredDim::Symbol(d.to_string()), DeclaredDim::Size);
    Declared { dtype: Some(dtype), dims: Some(dims.iter().map(dim).collect()), extra: bytes::Bytes::new() }
}

fn graph(inputs: &[(&str, DType, &[&str])]) -> (Graph, Vec<ValueId>) {
    let mut graph = Graph::new(8, vec![(String::new(), 17), ("com.microsoft".into(), 1)], bytes::Bytes::new());
    let ids = inputs.iter().map(|(name, dtype, dims)| {
        let id = graph.add_value(name);
        graph.add_input(id, declared(*dtype, dims));
        id
    });
    let ids = ids.collect();
    (graph, ids)
}

fn output(graph: &mut Graph, id: ValueId, name: &str, dims: &[&str]) {
    if graph.value(id).name() != name {
        graph.rename(id, name);
    }
    graph.add_output(id, declared(DType::F32, dims));
}

fn ramp(dims: &[usize]) -> Tensor {
    let count: usize = dims.iter().product();
    Tensor::f32(dims, &(0..count).map(|i| ((i * 37 % 23) as f32 - 11.0) / 11.0).collect::<Vec<_>>())
}

/// y = relu(x w1) w2, x \[batch, 4\], 8 hidden units.
fn mlp() -> Graph {
    let (mut graph, x) = graph(&[("x", DType::F32, &["batch", "4"])]);
    let w1 = graph.add_initializer("w1", ramp(&[4, 8]));
    let w2 = graph.add_initializer("w2", ramp(&[8, 3]));
    let mut b = Builder::new(&mut graph, "n");
    let hidden = b.matmul(x[0], w1);
    let hidden = b.op("Relu", &[hidden], vec![]);
    let y = b.matmul(hidden, w2);
    output(&mut graph, y, "y", &["batch", "3"]);
    graph
}

/// The same graph with `change` added to one element of a weight.
fn tampered(graph: &Graph, name: &str, element: usize, change: f32) -> Graph {
    let mut graph = graph.clone();
    let id = graph.find(name).unwrap();
    let tensor = graph.constant(id).unwrap();
    let mut values = tensor.to_f32s().unwrap();
    values[element] += change;
    graph.set_constant(id, tensor.with_f32s(&values));
    graph
}

fn verify(original: &Graph, twin: &Graph, out: &Graph, settings: &Settings) -> Result<Verdict, Error> {
    verify_with(original, twin, out, settings, None, false)
}

fn verify_with(
    original: &Graph,
    twin: &Graph,
    out: &Graph,
    settings: &Settings,
    data: Option<&mut dyn Iterator<Item = Result<Batch, DataError>>>,
    is_edited: bool,
) -> Result<Verdict, Error> {
    let facts = infer::facts(original).unwrap();
    let subject = Subject { graph: original, facts: &facts, twin, out, is_edited, weights: None };
    compare(&subject, data, settings)
}

#[test]
fn equal_models_pass_in_every_runtime_for_both_batches() {
    let model = mlp();
    let verdict = verify(&model, &model, &model, &settings(engines())).unwrap();
    assert!(verdict.pass && verdict.skipped.is_empty(), "{verdict:?}");
    let seen: Vec<_> = verdict.checks.iter().map(|c| (c.runtime, c.batch, c.output.as_str(), c.max_abs)).collect();
    let expected: Vec<_> = engines().iter().flat_map(|r| [1, 3].map(|n| (r.feature(), n, "y", Some(0.0)))).collect();
    assert_eq!(seen, expected);
    assert!(
        verdict.checks.iter().all(|c| c.tolerance > 0.0 && c.argmax_agree == Some(true) && c.input == Some(InputSource::Random))
    );
    assert!(verdict.checks.iter().filter(|c| c.runtime == "ort").all(|c| c.noise.is_some()));
}

#[test]
fn a_changed_weight_fails_in_every_runtime() {
    let model = mlp();
    for out in [tampered(&model, "w2", 4, 0.01), tampered(&model, "w2", 4, f32::NAN), tampered(&model, "w2", 4, f32::INFINITY)] {
        let verdict = verify(&model, &model, &out, &settings(engines())).unwrap();
        assert!(!verdict.pass);
        for engine in engines() {
            let failed = verdict.checks.iter().filter(|c| c.runtime == engine.feature() && !c.pass && c.reason.is_some());
            assert!(failed.count() > 0, "{engine}: {verdict:?}");
        }
    }
    // Against the original it is another model, against its own twin it is right.
    let cut = tampered(&model, "w1", 0, 1.0);
    assert!(verify(&model, &cut, &cut, &settings(engines())).unwrap().pass);
}

#[test]
fn a_result_that_does_not_load_fails() {
    let model = mlp();
    let mut out = model.clone();
    let node = out.order()[1];
    out.set_attr(node, "unknown_attribute", AttrValue::Int(1));
    if !has_ort() {
        return;
    }
    let verdict = verify(&model, &model, &out, &settings(vec![RuntimeName::Ort])).unwrap();
    assert!(!verdict.pass && verdict.skipped.is_empty());
    assert!(verdict.checks[0].reason.as_ref().unwrap().starts_with("the result: cannot be loaded: "), "{verdict:?}");
    assert_eq!((verdict.checks[0].max_abs, verdict.checks[0].output.as_str()), (None, "y"));
}

/// y = x w by com.microsoft FusedMatMul, which tract does not know.
fn fused() -> Graph {
    let (mut graph, x) = graph(&[("x", DType::F32, &["batch", "4"])]);
    let w = graph.add_initializer("w", ramp(&[4, 3]));
    let y = graph.add_value("y");
    graph.add_node(NewNode {
        op: "FusedMatMul".into(),
        domain: "com.microsoft".into(),
        inputs: vec![Some(x[0]), Some(w)],
        outputs: vec![Some(y)],
        ..NewNode::default()
    });
    output(&mut graph, y, "y", &["batch", "3"]);
    graph
}

#[test]
fn a_runtime_that_cannot_load_the_model_is_skipped_and_none_is_a_failure() {
    let model = fused();
    if RuntimeName::Tract.is_built() {
        let alone = verify(&model, &model, &model, &settings(vec![RuntimeName::Tract])).unwrap();
        assert!(!alone.pass && alone.checks.is_empty());
        assert_eq!(alone.skipped.len(), 1);
        let reason = &alone.skipped[0].reason;
        assert!(reason.contains("cannot") && reason.contains("FusedMatMul"), "{reason}");
    }
    if has_ort() {
        let verdict = verify(&model, &model, &model, &settings(engines())).unwrap();
        assert!(verdict.pass && verdict.checks.iter().all(|c| c.runtime == "ort"), "{verdict:?}");
        assert_eq!(verdict.skipped.len(), engines().len() - 1);
    }
    let nothing = verify(&model, &model, &model, &settings(vec![])).unwrap();
    assert!(!nothing.pass);
}

#[test]
fn models_that_draw_random_numbers_are_refused() {
    let mut model = mlp();
    let y = model.find("y").unwrap();
    let mut b = Builder::new(&mut model, "r");
    let noise = b.op("RandomNormalLike", &[y], vec![]);
    let noisy = b.add(y, noise);
    model.add_output(noisy, declared(DType::F32, &["batch", "3"]));
    let error = verify(&model, &model, &model, &settings(engines())).unwrap_err().to_string();
    assert!(error.contains("RandomNormalLike") && error.contains("without a seed"), "{error}");
}

/// Token ids and positions: y = table[ids] + places[cast(positions) + 2], masked by `mask`.
fn tokens() -> Graph {
    let inputs: [(&str, DType, &[&str]); 3] = [
        ("ids", DType::I64, &["batch", "seq"]),
        ("positions", DType::I32, &["batch", "seq"]),
        ("mask", DType::I64, &["batch", "seq"]),
    ];
    let (mut graph, v) = graph(&inputs);
    let table = graph.add_initializer("table", ramp(&[11, 4]));
    let places = graph.add_initializer("places", ramp(&[7, 4]));
    let mut b = Builder::new(&mut graph, "n");
    let a = b.gather(table, v[0], 0);
    let wide = b.cast(v[1], DType::I64);
    let two = b.ints(&[2]);
    let shifted = b.add(wide, two);
    let p = b.gather(places, shifted, 0);
    let sum = b.add(a, p);
    let mask = b.cast(v[2], DType::F32);
    let mask = b.unsqueeze(mask, &[2]);
    let y = b.mul(sum, mask);
    output(&mut graph, y, "y", &["batch", "seq", "4"]);
    graph
}

fn numbers(feeds: &feeds::Feeds, name: &str) -> (Vec<usize>, Vec<i64>) {
    let array = &feeds.iter().find(|(n, _)| n == name).unwrap().1;
    (array.dims.clone(), array.data.to_i64().unwrap())
}

#[test]
fn integers_lie_within_the_tables_that_they_index() {
    let model = tokens();
    let facts = infer::facts(&model).unwrap();
    let given = Sizes::from([("seq".to_string(), 64)]);
    let sets = feeds::random(&model, &facts, &given, 0, &mut |_| Tried::Finite).unwrap();
    assert_eq!(sets.iter().map(|s| s.batch).collect::<Vec<_>>(), [1, 3]);
    let (dims, ids) = numbers(&sets[1].feeds, "ids");
    assert_eq!((dims, ids.iter().min(), ids.iter().max()), (vec![3, 64], Some(&0), Some(&10)));
    let (_, positions) = numbers(&sets[1].feeds, "positions");
    assert_eq!((positions.iter().min(), positions.iter().max()), (Some(&0), Some(&4)));
    assert!(matches!(sets[1].feeds[1].1.data, ArrayData::I32(_)));
    assert!(numbers(&sets[1].feeds, "mask").1.iter().all(|m| *m == 1));
    let again = feeds::random(&model, &facts, &given, 0, &mut |_| Tried::Finite).unwrap();
    let other = feeds::random(&model, &facts, &given, 1, &mut |_| Tried::Finite).unwrap();
    assert!(again == sets && other != sets);
    let verdict = verify(&model, &model, &model, &settings(engines())).unwrap();
    assert!(verdict.pass && verdict.skipped.is_empty(), "{verdict:?}");
}

#[test]
fn sizes_are_the_smallest_that_run() {
    let (mut model, x) = graph(&[("x", DType::F32, &["batch", "3", "height", "width"])]);
    let w = model.add_initializer("w", ramp(&[5, 3, 14, 14]));
    let mut b = Builder::new(&mut model, "n");
    let y = b.op("Conv", &[x[0], w], vec![attr("strides", AttrValue::Ints(vec![14, 14]))]);
    output(&mut model, y, "y", &["batch", "5", "rows", "columns"]);
    let facts = infer::facts(&model).unwrap();
    let runs = |least: usize| {
        move |feeds: &feeds::Feeds| match feeds[0].1.dims.as_slice() {
            [n, 3, h, w] if *h >= least && *w >= least && *n < 3 => Tried::Finite,
            _ => Tried::Failed("too small".to_string()),
        }
    };
    let sets = feeds::random(&model, &facts, &Sizes::new(), 0, &mut runs(14)).unwrap();
    // Batch 3 does not run, so the batch is not really a symbol.
    assert_eq!(sets.iter().map(|s| s.feeds[0].1.dims.clone()).collect::<Vec<_>>(), [vec![1, 3, 14, 14]]);
    let wide = Sizes::from([("width".to_string(), 50), ("batch".to_string(), 2)]);
    let sets = feeds::random(&model, &facts, &wide, 0, &mut runs(20)).unwrap();
    assert_eq!(sets.iter().map(|s| s.feeds[0].1.dims.clone()).collect::<Vec<_>>(), [vec![2, 3, 20, 50]]);
    let error = feeds::random(&model, &facts, &Sizes::new(), 0, &mut |_| Tried::Failed("no".into())).unwrap_err();
    let expected = "cannot run the original: no (no size that was tried runs; give --size height=N --size width=N)";
    assert_eq!(error.to_string(), expected);
    for engine in engines() {
        let verdict = verify(&model, &model, &model, &settings(vec![engine])).unwrap();
        assert!(verdict.pass, "{verdict:?}");
        assert_eq!(verdict.checks.iter().map(|c| c.batch).collect::<Vec<_>>(), [1, 3], "{engine}");
    }
}

#[test]
fn inputs_of_types_without_numbers_are_named() {
    let (mut model, x) = graph(&[("text", DType::String, &["1"])]);
    output(&mut model, x[0], "y", &["1"]);
    let facts = infer::facts(&model).unwrap();
    let error = feeds::random(&model, &facts, &Sizes::new(), 0, &mut |_| Tried::Finite).unwrap_err();
    assert_eq!(error, FeedError::Type { input: "y".into(), dtype: "string" });
}

fn digits(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/digits").join(file)
}

fn digits_data(count: usize, is_labelled: bool) -> Vec<Result<Batch, DataError>> {
    let input = InputSpec { name: "input".into(), dims: vec![None, Some(1), Some(28), Some(28)], kind: ArrayKind::F32 };
    let data = Dataset::open(&digits("test.npz"), &Options { inputs: vec![input], ..Options::default() }).unwrap();
    let picks: Vec<usize> = (0..count).collect();
    let batches = data.select(&picks).batches(BatchOrder::default(), 16, 1, None);
    let unlabelled = |b: Batch| Batch { labels: b.labels.filter(|_| is_labelled), ..b };
    batches.map(|b| b.map(unlabelled)).collect()
}

#[test]
fn the_digits_model_equals_itself_and_not_a_changed_one() {
    let model = read(&digits("vit-digits.onnx")).unwrap().graph;
    let mut data = digits_data(40, true).into_iter();
    let settings = settings(engines());
    let verdict = verify_with(&model, &model, &model, &settings, Some(&mut data), true).unwrap();
    if engines().is_empty() {
        assert!(!verdict.pass);
        return;
    }
    assert!(verdict.pass && verdict.skipped.is_empty(), "{verdict:?}");
    let seen: BTreeSet<_> = verdict.checks.iter().map(|c| (c.runtime, c.batch, c.input == Some(InputSource::Data))).collect();
    assert_eq!(seen.len(), engines().len() * 4);
    assert_eq!(verdict.edits, Edits::Measured { n: 40, kl: Some(0.0), top1_agreement: 1.0 });
    let top1 = verdict.accuracy.as_ref().unwrap().top1.as_ref().unwrap();
    assert!(top1.before > 0.9 && top1.before == top1.after && top1.drop_points == 0.0, "{top1:?}");

    let weight = model.initializers().iter().map(|v| model.value(*v)).filter(|v| v.initializer().unwrap().dims.len() == 2);
    let name = weight.max_by_key(|v| v.initializer().unwrap().element_count()).unwrap().name();
    let wrong = tampered(&model, name, 7, 0.5);
    let verdict = verify(&model, &model, &wrong, &settings).unwrap();
    assert!(!verdict.pass && verdict.edits == Edits::None, "{verdict:?}");
    let facts = infer::facts(&model).unwrap();
    assert_eq!(weights::first_difference(&model, &wrong, &BTreeSet::new()).unwrap().name, name);
    let difference = weights::first_difference(&model, &wrong, &BTreeSet::new());
    let subject =
        Subject { graph: &model, facts: &facts, twin: &model, out: &model, is_edited: false, weights: difference.as_ref() };
    let verdict = compare(&subject, None, &settings).unwrap();
    assert!(!verdict.pass);
    assert_eq!((verdict.checks[0].runtime, verdict.checks[0].output.as_str()), ("weights", name));
}

#[test]
fn a_sliced_model_equals_its_twin() {
    let path = digits("vit-digits.onnx");
    let model = pipeline::load(&path, &Sizes::new()).unwrap();
    let mut plan = Plan::empty(&model.sha256().unwrap());
    for group in model.anatomy.groups.iter().filter(|g| g.id.contains("mlp")) {
        plan.groups.insert(group.id.clone(), KeptUnits { kept: (0..group.units()).step_by(2).collect(), of: group.units() });
    }
    assert!(!plan.groups.is_empty());
    let sliced = pipeline::cut(&model, &path, &plan, None, false).unwrap().sliced;
    let twin = pipeline::make_twin(&model, &path, &plan, None).unwrap();
    let verdict = verify(model.graph(), &twin, &sliced.graph, &settings(engines())).unwrap();
    assert_eq!(verdict.pass, !engines().is_empty(), "{verdict:?}");
    // Not the original: the cut changed something.
    assert!(!verify(model.graph(), model.graph(), &sliced.graph, &settings(engines())).unwrap().pass);

    let out = tampered(&sliced.graph, &sliced.cuts[0].initializer, 0, 1e-6);
    let found = weights::first_difference(&sliced.graph, &out, &BTreeSet::new()).unwrap();
    assert_eq!(found.name, sliced.cuts[0].initializer);
    plan.edited.push(Edited { initializer: found.name, why: "trained".into() });
    let edited = weights::edited_names(plan.edited.iter().map(|e| e.initializer.as_str()), &sliced);
    assert_eq!(weights::first_difference(&sliced.graph, &out, &edited), None);
    let twin = pipeline::make_twin(&model, &path, &plan, Some(&out)).unwrap();
    let verdict = verify_with(model.graph(), &twin, &out, &settings(engines()), None, true).unwrap();
    assert_eq!((verdict.pass, verdict.edits), (!engines().is_empty(), Edits::Unproven));
}

#[test]
fn floors_need_labels_and_are_kept() {
    let Some(engine) = engines().first().copied() else { return };
    let model = read(&digits("vit-digits.onnx")).unwrap().graph;
    let measure = |floors, labelled| {
        let settings = Settings { floors, ..settings(vec![engine]) };
        verify_with(&model, &model, &model, &settings, Some(&mut digits_data(20, labelled).into_iter()), false)
    };
    let floors = |min_accuracy, max_drop_points| Floors { min_accuracy, max_drop_points };
    assert!(measure(floors(Some(0.5), Some(0.0)), true).unwrap().pass);
    let missed = measure(floors(Some(1.01), None), true).unwrap();
    assert!(!missed.pass && missed.checks.iter().all(|c| c.pass));
    assert!(missed.accuracy.unwrap().reason.unwrap().contains("the floor is 101.00 %"));
    assert!(matches!(measure(floors(Some(0.5), None), false), Err(Error::Accuracy(AccuracyError::NoLabels))));
    let without = verify(&model, &model, &model, &Settings { floors: floors(None, Some(1.0)), ..settings(vec![engine]) });
    assert!(matches!(without, Err(Error::FloorWithoutData)));
}

#[test]
fn latency_is_measured_for_both_models_in_turn() {
    let (model, unknown) = (mlp(), fused());
    let x = Array { dims: vec![2, 4], data: ArrayData::F32(vec![0.5; 8]) };
    let feeds = [("x".to_string(), x)];
    let contender = |name, graph| bench::Contender { name, graph, feeds: &feeds };
    let settings =
        bench::Settings { runtimes: engines(), threads: vec![1, 2], warmup: 2, iterations: 7, ..bench::Settings::default() };
    let report = bench::measure(&[contender("a", &model), contender("b", &model)], &settings).unwrap();
    let seen: Vec<_> = report.measurements.iter().map(|m| (m.runtime, m.threads, m.iterations)).collect();
    let threads = |e: &RuntimeName| if *e == RuntimeName::Ort { vec![1, 2] } else { vec![1] };
    let expected: Vec<_> = engines().iter().flat_map(|e| threads(e).into_iter().map(|t| (e.feature(), t, 7))).collect();
    assert_eq!((seen, report.batch), (expected, 2));
    for m in &report.measurements {
        let ratio = m.ratio.unwrap();
        assert!(ratio.p5 <= ratio.p50 && ratio.p50 <= ratio.p95 && ratio.p5 > 0.0);
        for l in &m.models {
            assert!(l.latency_ms_min > 0.0 && l.latency_ms_min <= l.latency_ms_p50 && l.latency_ms_p99 <= l.latency_ms_max);
        }
        let json = serde_json::to_value(m).unwrap();
        assert!(json["models"][1]["latency_ms_p50"].is_f64() && json["ratio"]["p50"].is_f64());
    }
    if RuntimeName::Tract.is_built() {
        let settings = bench::Settings { runtimes: vec![RuntimeName::Tract], ..settings };
        let report = bench::measure(&[contender("model.onnx", &unknown)], &settings).unwrap();
        assert!(report.measurements.is_empty() && report.skipped[0].reason.starts_with("model.onnx: tract could not"));
    }
}
