//! Exact savings: equal outputs with less computed, on built graphs, on the network of models/digits, and on every model of the folder
//! that VITRIM_CORPUS names.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

#[path = "harness/mod.rs"]
mod harness;

use std::path::{Path, PathBuf};
use vitrim::autodiff::interface::declare;
use vitrim::cost::{self, Sizes};
use vitrim::data::array::Array;
use vitrim::exact;
use vitrim::graph::build::{Builder, attr};
use vitrim::graph::{AttrValue, DType, Declared, DeclaredDim, Graph, Tensor, ValueId};
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

const D: usize = 12;
const H: usize = 3;
const N: usize = 9;
const M: usize = 20;

/// How queries, keys and values are made.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Projection {
    /// `[B, N, 3, H, E]`, transposed, and picked by Gather.
    Fused,
    /// One product, a Split of its columns.
    Split,
    /// Three products, over tokens of all samples in one axis.
    Separate,
}

/// What reads the last block.
#[derive(Clone, Copy, Debug)]
enum Head {
    Gather(&'static [i64]),
    Slice(i64, i64),
    Mean,
    All,
}

struct Net {
    graph: Graph,
    seed: usize,
}

impl Net {
    fn b(&mut self) -> Builder<'_> {
        Builder::new(&mut self.graph, "")
    }

    fn constant(&mut self, name: &str, dims: &[usize]) -> ValueId {
        self.seed += 1;
        let seed = self.seed;
        let values: Vec<f32> = (0..dims.iter().product()).map(|i| (((i * 37 + seed * 11) % 101) as f32 - 50.0) / 120.0).collect();
        self.graph.add_initializer(name, Tensor::f32(dims, &values))
    }

    fn dense(&mut self, name: &str, v: ValueId, k: usize, n: usize) -> ValueId {
        let (w, bias) = (self.constant(&format!("{name}.weight"), &[k, n]), self.constant(&format!("{name}.bias"), &[n]));
        let product = self.b().matmul(v, w);
        self.b().add(product, bias)
    }

    /// A linear layer over `[B * N, k]`.
    fn flat(&mut self, name: &str, v: ValueId, k: usize, n: usize) -> ValueId {
        let (w, bias) = (self.constant(&format!("{name}.weight"), &[k, n]), self.constant(&format!("{name}.bias"), &[n]));
        let flat = self.b().reshape(v, &[-1, k as i64]);
        let y = self.b().op("Gemm", &[flat, w, bias], vec![]);
        self.b().reshape(y, &[-1, N as i64, n as i64])
    }

    fn norm(&mut self, name: &str, v: ValueId) -> ValueId {
        let (w, bias) = (self.constant(&format!("{name}.weight"), &[D]), self.constant(&format!("{name}.bias"), &[D]));
        self.b().op("LayerNormalization", &[v, w, bias], vec![attr("axis", AttrValue::Int(-1))])
    }

    fn qkv(&mut self, name: &str, x: ValueId, how: Projection) -> [ValueId; 3] {
        let (n, h, e) = (N as i64, H as i64, (D / H) as i64);
        match how {
            Projection::Fused => {
                let all = self.dense(&format!("{name}.qkv"), x, D, 3 * D);
                let all = self.b().reshape(all, &[-1, n, 3, h, e]);
                let all = self.b().transpose(all, &[2, 0, 3, 1, 4]);
                [0, 1, 2].map(|i| {
                    let index = self.graph.add_initializer("index", Tensor::i64_scalar(i));
                    self.b().gather(all, index, 0)
                })
            }
            Projection::Split => {
                let all = self.dense(&format!("{name}.qkv"), x, D, 3 * D);
                let sizes = self.b().ints(&[D as i64; 3]);
                let parts = self.b().ops("Split", &[all, sizes], vec![attr("axis", AttrValue::Int(-1))], 3);
                [0, 1, 2].map(|i| self.heads(parts[i]))
            }
            Projection::Separate => ["q", "k", "v"].map(|part| {
                let v = self.flat(&format!("{name}.{part}"), x, D, D);
                self.heads(v)
            }),
        }
    }

    fn heads(&mut self, v: ValueId) -> ValueId {
        let v = self.b().reshape(v, &[0, 0, H as i64, (D / H) as i64]);
        self.b().transpose(v, &[0, 2, 1, 3])
    }

    fn block(&mut self, name: &str, x: ValueId, how: Projection) -> ValueId {
        let normed = self.norm(&format!("{name}.norm1"), x);
        let [q, k, v] = self.qkv(name, normed, how);
        let k = self.b().transpose(k, &[0, 1, 3, 2]);
        let logits = self.b().matmul(q, k);
        // A table of relative positions, with a row for every query.
        let table = self.constant(&format!("{name}.table"), &[1, H, N, N]);
        let logits = self.b().add(logits, table);
        let p = self.b().op("Softmax", &[logits], vec![attr("axis", AttrValue::Int(-1))]);
        let o = self.b().matmul(p, v);
        let o = self.b().transpose(o, &[0, 2, 1, 3]);
        let o = self.b().reshape(o, &[0, 0, D as i64]);
        let o = if how == Projection::Separate { self.flat("proj", o, D, D) } else { self.dense("proj", o, D, D) };
        let x = self.b().add(x, o);
        let hidden = self.norm(&format!("{name}.norm2"), x);
        let hidden = self.dense(&format!("{name}.fc1"), hidden, D, M);
        let hidden = self.b().op("Relu", &[hidden], vec![]);
        let hidden = self.dense(&format!("{name}.fc2"), hidden, M, D);
        self.b().add(x, hidden)
    }
}

fn net(how: Projection, head: Head) -> Graph {
    let mut net = Net { graph: Graph::new(8, vec![(String::new(), 17)], Default::default()), seed: 0 };
    let x = net.graph.add_value("x");
    let dims = vec![DeclaredDim::Symbol("batch".into()), DeclaredDim::Size(N as i64), DeclaredDim::Size(D as i64)];
    net.graph.add_input(x, declare(DType::F32, dims));
    let x = net.block("a", x, how);
    let x = net.block("b", x, how);
    let x = net.norm("norm", x);
    let ys = match head {
        Head::Gather(tokens) => tokens
            .iter()
            .map(|t| {
                let index = net.graph.add_initializer("token", Tensor::i64_scalar(*t));
                net.b().gather(x, index, 1)
            })
            .collect(),
        Head::Slice(start, end) => vec![net.b().slice(x, &[start], &[end], &[1])],
        Head::Mean => vec![net.b().reduce_mean(x, &[1], false)],
        Head::All => vec![x],
    };
    for y in ys {
        let y = net.dense("head", y, D, 5);
        net.graph.add_output(y, Declared { dtype: Some(DType::F32), dims: None, extra: Default::default() });
    }
    net.graph
}

fn feed() -> Vec<(String, Array)> {
    let values = (0..2 * N * D).map(|i| ((i * 29 % 97) as f32 - 48.0) / 30.0).collect();
    vec![("x".to_string(), harness::f32s(&[2, N, D], values))]
}

/// MACs of the last block that go where `rows` of its tokens are read: queries, logits, mix, output projection, MLP.
fn last_block(rows: usize) -> u64 {
    let per_token = D * D + N * D + N * D + D * D + 2 * D * M;
    ((N - rows) * per_token) as u64
}

#[test]
fn the_last_block_works_for_tokens_that_are_read() {
    let one: &[i64] = &[0];
    let heads = [
        (Head::Gather(one), 1),
        (Head::Gather(&[-1]), 1),
        (Head::Gather(&[0, 4]), 2),
        (Head::Slice(0, 1), 1),
        (Head::Slice(2, 4), 2),
    ];
    for how in [Projection::Fused, Projection::Split, Projection::Separate] {
        for (head, rows) in heads {
            let graph = net(how, head);
            let facts = infer::facts(&graph).unwrap();
            let found = exact::tokens(&graph, &facts, &Sizes::new());
            let [saving] = &found.savings[..] else { panic!("{how:?} {head:?}: {:?}", found.refused) };
            let after = cost::count(&found.graph, &infer::facts(&found.graph).unwrap(), &Sizes::new());
            let before = cost::count(&graph, &facts, &Sizes::new());
            let saved = before.macs.unwrap() - after.macs.unwrap();
            assert_eq!(saving.macs_saved, Some(saved), "{how:?} {head:?}");
            assert!(saved >= last_block(rows), "{how:?} {head:?}: {saved} of {}", last_block(rows));
            assert!(after.params <= before.params, "{how:?} {head:?}: weights are split, not copied");
            if harness::has_ort() {
                let d = difference(&graph, &found.graph, &feed()).unwrap();
                assert!(d <= 1e-5, "{how:?} {head:?}: differs by {d:e}");
            }
        }
    }
}

#[test]
fn what_needs_all_tokens_is_told() {
    for (head, reason) in [(Head::Mean, "ReduceMean"), (Head::All, "holds all tokens")] {
        let graph = net(Projection::Fused, head);
        let found = exact::tokens(&graph, &infer::facts(&graph).unwrap(), &Sizes::new());
        assert!(found.savings.is_empty() && found.parts.is_empty());
        assert!(found.refused[0].reason.contains(reason), "{:?}", found.refused);
    }
}

/// q, k, v `[B, N, D]` in one fused operator, of which one row is read.
fn fused(is_causal: i64) -> Graph {
    let mut net = Net { graph: Graph::new(10, vec![(String::new(), 23)], Default::default()), seed: 0 };
    let x = net.graph.add_value("x");
    let dims = vec![DeclaredDim::Symbol("batch".into()), DeclaredDim::Size(N as i64), DeclaredDim::Size(D as i64)];
    net.graph.add_input(x, declare(DType::F32, dims));
    let [q, k, v] = ["q", "k", "v"].map(|name| net.dense(name, x, D, D));
    let heads = |name: &str| attr(name, AttrValue::Int(H as i64));
    let attrs = vec![heads("q_num_heads"), heads("kv_num_heads"), attr("is_causal", AttrValue::Int(is_causal))];
    let o = net.b().op("Attention", &[q, k, v], attrs);
    let o = net.dense("proj", o, D, D);
    let index = net.graph.add_initializer("token", Tensor::i64_scalar(3));
    let y = net.b().gather(o, index, 1);
    net.graph.add_output(y, Declared { dtype: Some(DType::F32), dims: None, extra: Default::default() });
    net.graph
}

#[test]
fn a_fused_attention_is_narrowed_unless_queries_know_their_place() {
    let tokens = |g: &Graph| exact::tokens(g, &infer::facts(g).unwrap(), &Sizes::new());
    let graph = fused(0);
    let found = tokens(&graph);
    assert_eq!(found.savings.len(), 1, "{:?}", found.refused);
    if harness::has_ort() {
        assert!(difference(&graph, &found.graph, &feed()).unwrap() <= 1e-5);
    }
    let found = tokens(&fused(1));
    let narrowed = found.savings.iter().any(|s| s.node.contains("Attention"));
    assert!(!narrowed && !found.refused.is_empty(), "{:?}", found.savings);
}

#[test]
fn savings_of_a_graph_without_elements_are_the_same() {
    let graph = net(Projection::Fused, Head::Gather(&[0]));
    let facts = infer::facts(&graph).unwrap();
    let (full, hollow) = (exact::tokens(&graph, &facts, &Sizes::new()), exact::tokens(&graph.hollow(), &facts, &Sizes::new()));
    assert_eq!(full.savings, hollow.savings);
    assert_eq!(full.parts, hollow.parts);
    assert_eq!(cost::params(&full.graph), cost::params(&hollow.graph));
}

#[test]
fn constants_are_put_together_again() {
    let graph = net(Projection::Fused, Head::Gather(&[0]));
    let found = exact::tokens(&graph, &infer::facts(&graph).unwrap(), &Sizes::new());
    let weight = |g: &Graph| g.constant(g.find("b.qkv.weight").unwrap()).unwrap();
    assert_eq!(weight(&found.graph).dims, [D, 2 * D], "keys and values keep the name");
    let mut whole = found.graph.clone();
    exact::put_together(&mut whole, &graph, &found.parts);
    assert_eq!(weight(&whole), weight(&graph));
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
