//! Training graphs of whole models: gradients against PyTorch's, gates against central differences, the optimizer against a plain
//! computation, and every node against the table of CUDA kernels.
//!
//! Fixtures: tests/fixtures/gradients, tiny Vision Transformers from two exporters with PyTorch's float64 gradients.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "these are tests")]

mod harness;

use harness::{Random, f32s, has_ort, output, relative_error, session};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use vitrim::autodiff::cuda;
use vitrim::autodiff::loss::Loss;
use vitrim::autodiff::update::AdamW;
use vitrim::data::array::{Array, ArrayData};
use vitrim::graph::{Graph, check};
use vitrim::infer::{self, Facts};
use vitrim::supernet::{self, GateGroup, Options, Supernet, TokenGate, Train};
use vitrim::{anatomy, axes};

/// Weights and activations are float32 and of size 1, sums have at most a few thousand terms: 2^-24 sqrt(1000) is 2e-6, and what
/// PyTorch recorded was computed in float64. Ten times that.
const TOLERANCE: f64 = 2e-5;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gradients").join(name)
}

const MODELS: [&str; 4] = ["plain-ts17", "plain-dynamo18", "layerscale-ts17", "layerscale-dynamo18"];

struct Model {
    graph: Graph,
    facts: Facts,
    groups: Vec<GateGroup>,
    tokens: Vec<TokenGate>,
    recorded: BTreeMap<String, Array>,
}

fn model(name: &str) -> Model {
    let graph = vitrim::onnx::read(&fixture(&format!("{name}.onnx"))).unwrap().graph;
    let facts = infer::facts(&graph).unwrap();
    let anatomy = anatomy::name(&graph, &facts, axes::classes(&graph, &facts));
    let (groups, tokens) = supernet::gates_of(&graph, &facts, &anatomy);
    let bytes = std::fs::read(fixture(&format!("{name}.safetensors"))).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let recorded = file.tensors().into_iter().map(|(name, view)| {
        let data = match view.dtype() {
            safetensors::Dtype::I64 => {
                ArrayData::I64(view.data().as_chunks::<8>().0.iter().map(|c| i64::from_le_bytes(*c)).collect())
            }
            _ => ArrayData::F32(view.data().as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect()),
        };
        (name, Array { dims: view.shape().to_vec(), data })
    });
    Model { recorded: recorded.collect(), graph, facts, groups, tokens }
}

fn build(model: &Model, groups: &[GateGroup], tokens: &[TokenGate], options: &Options) -> Supernet {
    let net = supernet::build(&model.graph, &model.facts, groups, tokens, options).unwrap();
    assert_eq!(check::check(&net.graph), vec![]);
    let facts = infer::facts(&net.graph).unwrap();
    let without = cuda::nodes_without_kernel(&net.graph, &facts);
    let names: Vec<String> = without.iter().map(|id| format!("{} {}", net.graph.node(*id).op(), net.graph.label(*id))).collect();
    assert!(names.is_empty(), "no CUDA kernel for {names:?}");
    net
}

/// Feeds of the recorded batch: images, labels, all gates 1, weights of the model, moments 0, scalars as named.
fn feeds(model: &Model, net: &Supernet, batch: usize, scalars: &[(&str, f32)]) -> Vec<(String, Array)> {
    use vitrim::autodiff::Role;
    let sized = |spec: &vitrim::autodiff::InputSpec| -> Vec<usize> {
        let size = |d: &vitrim::graph::DeclaredDim| match d {
            vitrim::graph::DeclaredDim::Size(n) => *n as usize,
            vitrim::graph::DeclaredDim::Symbol(_) => batch,
        };
        spec.shape.iter().map(size).collect()
    };
    let fill = |dims: Vec<usize>, value: f32| f32s(&dims, vec![value; dims.iter().product()]);
    let one = |spec: &vitrim::autodiff::InputSpec| match spec.role {
        Role::Input => model.recorded["input"].clone(),
        Role::Labels => model.recorded["labels"].clone(),
        Role::Target => fill(sized(spec), 0.5),
        Role::Gate => fill(sized(spec), 1.0),
        Role::Moment => fill(sized(spec), 0.0),
        Role::Param => harness::array_of(&net.params.iter().find(|p| p.input == spec.name).unwrap().initial).unwrap(),
        Role::Scalar => fill(vec![], scalars.iter().find(|(n, _)| *n == spec.name).map_or(0.0, |(_, v)| *v)),
    };
    net.inputs.iter().map(|spec| (spec.name.clone(), one(spec))).collect()
}

fn set(feeds: &mut [(String, Array)], name: &str, array: Array) {
    feeds.iter_mut().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no input '{name}'")).1 = array;
}

fn run(net: &Supernet, feeds: &[(String, Array)]) -> Vec<(String, Array)> {
    session(&net.graph).unwrap().run(feeds).unwrap()
}

#[test]
fn gradients_of_all_weights_are_those_of_pytorch() {
    if !has_ort() {
        return;
    }
    for name in MODELS {
        let model = model(name);
        let net = build(&model, &[], &[], &Options { train: Train::All, ..Options::default() });
        let outputs = run(&net, &feeds(&model, &net, 4, &[]));
        for what in ["logits", "loss"] {
            let error = relative_error(&output(&outputs, what).as_f32(), &model.recorded[what].as_f32());
            assert!(error < TOLERANCE, "{name} {what}: {error:.1e}");
        }
        let mut worst = 0f64;
        let expected: Vec<_> = model.recorded.iter().filter_map(|(k, v)| Some((k.strip_prefix("grad.")?, v))).collect();
        assert_eq!(net.params.len(), expected.len(), "{name}: frozen {:?}", net.frozen);
        for (initializer, grad) in expected {
            let found = output(&outputs, &format!("grad.param.{initializer}"));
            assert_eq!(found.dims, grad.dims, "{name} {initializer}");
            let error = relative_error(&found.as_f32(), &grad.as_f32());
            assert!(error < TOLERANCE, "{name} {initializer}: {error:.1e}");
            worst = worst.max(error);
        }
        println!("{name}: {} weights, {} nodes, worst {worst:.1e}", net.params.len(), net.graph.order().len());
    }
}

#[test]
fn a_supernet_with_all_gates_one_is_the_model() {
    if !has_ort() {
        return;
    }
    for name in MODELS {
        let model = model(name);
        assert!(model.groups.len() >= 6, "{name}: {} groups", model.groups.len());
        for (per_sample, train) in [(false, Train::Gates), (true, Train::Gates), (false, Train::All), (true, Train::All)] {
            let net = build(&model, &model.groups, &model.tokens, &Options { per_sample, train, ..Options::default() });
            let outputs = run(&net, &feeds(&model, &net, 4, &[]));
            let error = relative_error(&output(&outputs, "logits").as_f32(), &model.recorded["logits"].as_f32());
            assert!(error < TOLERANCE, "{name} per_sample={per_sample} {train:?}: {error:.1e}");
        }
    }
}

/// Slopes of the loss along random directions, of gates around 0.8, with l1 on.
#[test]
fn gate_gradients_equal_central_differences() {
    if !has_ort() {
        return;
    }
    let l1 = [("l1.qk", 0.01), ("l1.vo", 0.02), ("l1.mlp", 0.005), ("l1.head", 0.03), ("l1.token", 0.01)];
    // Where weights train, gates multiply weights instead of activations.
    for (name, train) in MODELS.into_iter().flat_map(|name| [(name, Train::Gates), (name, Train::All)]) {
        let model = model(name);
        let net = build(&model, &model.groups, &model.tokens, &Options { train, ..Options::default() });
        let mut session = session(&net.graph).unwrap();
        let mut feeds = feeds(&model, &net, 4, &l1);
        let mut random = Random(5);
        for gate in &net.gates {
            set(&mut feeds, &gate.input, f32s(&[gate.units], random.f32s(gate.units, 0.6, 1.0)));
        }
        let outputs = session.run(&feeds).unwrap();
        for gate in &net.gates {
            let centre = feeds.iter().find(|(n, _)| *n == gate.input).unwrap().1.as_f32();
            let direction = random.f32s(gate.units, -1.0, 1.0);
            let grad = output(&outputs, &format!("grad.{}", gate.input)).as_f32();
            let step = 0.02f32;
            let mut loss = |sign: f32| {
                let moved = centre.iter().zip(&direction).map(|(c, d)| c + sign * step * d).collect();
                set(&mut feeds, &gate.input, f32s(&[gate.units], moved));
                f64::from(output(&session.run(&feeds).unwrap(), "loss").as_f32()[0])
            };
            let wide = (loss(1.0) - loss(-1.0)) / (2.0 * f64::from(step));
            let narrow = (loss(0.5) - loss(-0.5)) / f64::from(step);
            // Extrapolated, so that the step can be wide enough for a float32 loss.
            let numeric = (4.0 * narrow - wide) / 3.0;
            set(&mut feeds, &gate.input, f32s(&[gate.units], centre));
            let terms: Vec<f64> = grad.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).collect();
            let size = terms.iter().map(|t| t * t).sum::<f64>().sqrt();
            let analytic: f64 = terms.iter().sum();
            // The loss is about 2 and rounded to 1e-7: a slope is known to 2e-5.
            let allowed = 5e-3 * size + 5e-5;
            assert!((numeric - analytic).abs() < allowed, "{name} {train:?} {}: {analytic} against {numeric}", gate.input);
        }
    }
}

#[test]
fn per_sample_gradients_are_those_of_each_sample_alone() {
    if !has_ort() {
        return;
    }
    for name in ["plain-ts17", "layerscale-dynamo18"] {
        let model = model(name);
        let per_sample = build(&model, &model.groups, &model.tokens, &Options { per_sample: true, ..Options::default() });
        let all = run(&per_sample, &feeds(&model, &per_sample, 4, &[]));
        let single = build(&model, &model.groups, &model.tokens, &Options::default());
        for row in 0..4 {
            let mut feeds = feeds(&model, &single, 1, &[]);
            for key in ["input", "labels"] {
                let alone = model.recorded[key].row(row).unwrap();
                set(&mut feeds, key, Array { dims: [&[1], &alone.dims[..]].concat(), ..alone });
            }
            let outputs = run(&single, &feeds);
            for gate in &single.gates {
                let key = format!("grad.{}", gate.input);
                let found = &output(&all, &key).as_f32()[row * gate.units..(row + 1) * gate.units];
                let error = relative_error(found, &output(&outputs, &key).as_f32());
                assert!(error < 10.0 * TOLERANCE, "{name} {key} row {row}: {error:.1e}");
            }
        }
    }
}

/// Each loss on its own formula in float64, and its gradient along the gradient by a central difference.
#[test]
fn losses_are_their_formulas() {
    if !has_ort() {
        return;
    }
    let model = model("plain-dynamo18");
    let logits: Vec<Vec<f64>> =
        model.recorded["logits"].as_f32().chunks(5).map(|r| r.iter().map(|v| f64::from(*v)).collect()).collect();
    let labels = model.recorded["labels"].data.to_i64().unwrap();
    let mut random = Random(3);
    let other = random.f32s(20, -1.0, 1.0);
    let soft: Vec<f32> = other.chunks(5).flat_map(softmax).collect();
    let rows = |v: &[f32]| -> Vec<Vec<f64>> { v.chunks(5).map(|r| r.iter().map(|x| f64::from(*x)).collect()).collect() };
    let mean = |f: &dyn Fn(usize) -> f64| (0..4).map(f).sum::<f64>() / 4.0;
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let (y, t, p) = (&logits, rows(&other), rows(&soft));
    let cases: [(Loss, &[f32], f64); 5] = [
        (Loss::Ce, &[], mean(&|b| -log_softmax(&y[b])[labels[b] as usize])),
        (Loss::SoftCe, &soft, mean(&|b| -dot(&p[b], &log_softmax(&y[b])))),
        (
            Loss::Kd,
            &other,
            mean(&|b| (0..5).map(|c| (log_softmax(&t[b])[c]).exp() * (log_softmax(&t[b])[c] - log_softmax(&y[b])[c])).sum()),
        ),
        (Loss::Mse, &other, mean(&|b| (0..5).map(|c| (y[b][c] - t[b][c]).powi(2)).sum::<f64>() / 5.0)),
        (Loss::Cosine, &other, mean(&|b| 1.0 - dot(&y[b], &t[b]) / (dot(&y[b], &y[b]) * dot(&t[b], &t[b])).sqrt())),
    ];
    for (loss, target, expected) in cases {
        let net = build(&model, &model.groups, &[], &Options { loss, ..Options::default() });
        let mut feeds = feeds(&model, &net, 4, &[]);
        if !target.is_empty() {
            set(&mut feeds, "target.logits", f32s(&[4, 5], target.to_vec()));
        }
        let mut session = session(&net.graph).unwrap();
        let outputs = session.run(&feeds).unwrap();
        let found = f64::from(output(&outputs, "loss").as_f32()[0]);
        assert!((found - expected).abs() < 1e-5 * expected.abs().max(1.0), "{loss:?}: {found} against {expected}");
        let grads: Vec<(String, Vec<f32>)> =
            net.gates.iter().map(|g| (g.input.clone(), output(&outputs, &format!("grad.{}", g.input)).as_f32())).collect();
        let norm = grads.iter().flat_map(|(_, g)| g).map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let mut at = |sign: f64| {
            for (name, grad) in &grads {
                let moved = grad.iter().map(|g| (1.0 + sign * 0.01 * f64::from(*g) / norm) as f32).collect();
                set(&mut feeds, name, f32s(&[grad.len()], moved));
            }
            f64::from(output(&session.run(&feeds).unwrap(), "loss").as_f32()[0])
        };
        let slope = (at(1.0) - at(-1.0)) / 0.02;
        assert!((slope / norm - 1.0).abs() < 1e-2, "{loss:?}: slope {slope} against {norm}");
    }
}

fn softmax(row: &[f32]) -> Vec<f32> {
    let row: Vec<f64> = row.iter().map(|v| f64::from(*v)).collect();
    log_softmax(&row).into_iter().map(|v| v.exp() as f32).collect()
}

fn log_softmax(row: &[f64]) -> Vec<f64> {
    let sum = row.iter().map(|v| v.exp()).sum::<f64>().ln();
    row.iter().map(|v| v - sum).collect()
}

/// In the same memory, a new value may only be written when everything that reads the old one is done: no reader of a trained
/// value may be outside of what its update waits for.
#[test]
fn every_update_waits_for_all_readers_of_the_old_value() {
    for name in MODELS {
        let model = model(name);
        let options = Options { train: Train::All, optimizer: Some(AdamW::default()), ..Options::default() };
        let net = build(&model, &model.groups, &model.tokens, &options);
        let graph = &net.graph;
        for trained in net.inputs.iter().filter(|i| graph.find(&format!("next.{}", i.name)).is_some()) {
            let next = graph.find(&format!("next.{}", trained.name)).unwrap();
            let mut waited = std::collections::BTreeSet::new();
            let mut stack = vec![next];
            while let Some(v) = stack.pop() {
                if let Some((id, _)) = graph.value(v).producer()
                    && waited.insert(id)
                {
                    stack.extend(graph.node(id).inputs().iter().flatten());
                }
            }
            for reader in graph.value(graph.find(&trained.name).unwrap()).users() {
                assert!(waited.contains(&reader.node), "{name}: {} does not wait for {}", trained.name, graph.label(reader.node));
            }
        }
    }
}

/// The product that ends a GELU is read by the next layer only: the backward pass makes its own, and so frees this one early.
#[test]
fn gelu_is_computed_again_in_the_backward_pass() {
    for name in MODELS {
        let model = model(name);
        let net = build(&model, &model.groups, &[], &Options { train: Train::All, ..Options::default() });
        let graph = &net.graph;
        let product_of = |erf: &vitrim::graph::Node| {
            let one = graph.value(erf.output(0).unwrap()).users()[0].node;
            let above = graph.node(one).output(0).unwrap();
            let both = |id: &vitrim::graph::NodeId| {
                graph.node(*id).inputs().iter().flatten().all(|v| *v == above || Some(*v) == erf.input(0))
            };
            let products = graph.value(above).users().iter().map(|u| u.node).filter(both);
            products.map(|id| graph.value(graph.node(id).output(0).unwrap()).users().len()).collect::<Vec<_>>()
        };
        let readers: Vec<_> = graph.nodes().filter(|(_, n)| n.op() == "Erf").map(|(_, n)| product_of(n)).collect();
        assert_eq!(readers, [[1, 1], [1, 1]], "{name}: readers of u a, forward and backward");
    }
}

/// Between the linear layers only Erf, Add and Mul remain of GELU, whichever way the exporter wrote it.
#[test]
fn gelu_loses_its_scales() {
    for name in MODELS {
        let model = model(name);
        let mut graph = model.graph.clone();
        supernet::rewrite::run(&mut graph);
        graph.sort();
        assert_eq!(check::check(&graph), vec![]);
        let erfs: Vec<_> = graph.nodes().filter(|(_, n)| n.op() == "Erf").collect();
        assert_eq!(erfs.len(), 2, "{name}");
        for (_, erf) in erfs {
            let (bias, _) = graph.value(erf.input(0).unwrap()).producer().unwrap();
            let one = graph.value(erf.output(0).unwrap()).users()[0].node;
            let product = graph.value(graph.node(one).output(0).unwrap()).users()[0].node;
            let reader = graph.value(graph.node(product).output(0).unwrap()).users()[0].node;
            let ops = [bias, one, product, reader].map(|id| graph.node(id).op().to_string());
            assert_eq!(ops, ["Add", "Add", "Mul", "MatMul"], "{name}");
        }
    }
}

/// Three steps of AdamW with clipping and weight decay, against the textbook formula in float64 on the graph's own gradients.
#[test]
fn steps_of_adamw_follow_the_formula() {
    if has_ort() {
        three_steps_of_adamw(Some(0.5));
        three_steps_of_adamw(None);
    }
}

/// Three steps of AdamW with weight decay, against the textbook formula in float64 on the graph's own gradients.
fn three_steps_of_adamw(clip_norm: Option<f32>) {
    let model = model("plain-ts17");
    let adam = AdamW { clip_norm, weight_decay: 0.1, ..AdamW::default() };
    let options = Options { train: Train::All, ..Options::default() };
    let with_grads = build(&model, &model.groups, &[], &options);
    let net = build(&model, &model.groups, &[], &Options { optimizer: Some(adam), ..options });
    let (lr, l1) = (0.01f32, ("l1.mlp", 0.001));
    let mut state = feeds(&model, &net, 4, &[("lr", lr), l1]);
    let names: Vec<String> =
        net.gates.iter().map(|g| g.input.clone()).chain(net.params.iter().map(|p| p.input.clone())).collect();
    let decay = |n: &str| net.params.iter().any(|p| p.input == n && p.decay);
    assert!(decay("param.onnx::MatMul_233") && !decay("param.pos_embed") && !decay("param.blocks.0.attn.qkv.bias"));
    let of = |state: &[(String, Array)], n: &str| state.iter().find(|(k, _)| k == n).unwrap().1.as_f32();
    let mut moments: BTreeMap<String, (Vec<f64>, Vec<f64>)> = BTreeMap::new();
    for step in 1..=3 {
        set(&mut state, "step", f32s(&[], vec![step as f32]));
        let known: Vec<_> = with_grads
            .inputs
            .iter()
            .map(|i| (i.name.clone(), state.iter().find(|(n, _)| *n == i.name).unwrap().1.clone()))
            .collect();
        let grads = run(&with_grads, &known);
        let grad = |n: &str| -> Vec<f64> { output(&grads, &format!("grad.{n}")).as_f32().into_iter().map(f64::from).collect() };
        let norm = names.iter().flat_map(|n| grad(n)).map(|g| g * g).sum::<f64>().sqrt();
        let outputs = run(&net, &state);
        let found_norm = f64::from(output(&outputs, "grad.norm").as_f32()[0]);
        assert!((found_norm / norm - 1.0).abs() < 1e-5, "norm {found_norm} against {norm}");
        let factor = clip_norm.map_or(1.0, |clip| f64::from(clip) / (norm + 1e-6)).min(1.0);
        assert_eq!(factor < 1.0, clip_norm.is_some(), "the clip must matter");
        for n in &names {
            let w = of(&state, n);
            let (m, v) = moments.entry(n.clone()).or_insert_with(|| (vec![0.0; w.len()], vec![0.0; w.len()]));
            let found = output(&outputs, &format!("next.{n}")).clone();
            let expected: Vec<f32> = grad(n)
                .into_iter()
                .enumerate()
                .map(|(i, g)| {
                    let g = g * factor;
                    m[i] = 0.9 * m[i] + 0.1 * g;
                    v[i] = 0.999 * v[i] + 0.001 * g * g;
                    let (mh, vh) = (m[i] / (1.0 - 0.9f64.powi(step)), v[i] / (1.0 - 0.999f64.powi(step)));
                    let kept = f64::from(w[i]) * (1.0 - if decay(n) { f64::from(lr) * 0.1 } else { 0.0 });
                    (kept - f64::from(lr) * mh / (vh.sqrt() + 1e-8)) as f32
                })
                .collect();
            // The k bias has gradients of pure rounding noise, whose sign AdamW turns into whole steps; everything else follows.
            let noisy = n.ends_with("qkv.bias");
            let error = if noisy { 0.0 } else { relative_error(&found.as_f32(), &expected) };
            assert!(error < 1e-4, "step {step} {n}: {error:.1e}");
            let next: Vec<(String, Array)> = ["", "adam.m.", "adam.v."]
                .iter()
                .map(|p| (format!("{p}{n}"), output(&outputs, &format!("next.{p}{n}")).clone()))
                .collect();
            for (key, array) in next {
                set(&mut state, &key, array);
            }
        }
    }
}
