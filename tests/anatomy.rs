//! What is found in a graph does not depend on who exported it: how constants are shared, how q, k and v are spelled, which opset,
//! what was simplified or fused afterwards.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "these are tests")]

#[path = "anatomy/layers.rs"]
mod layers;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use vitrim::anatomy::{Anatomy, Kind};
use vitrim::graph::build::{Builder, attr};
use vitrim::graph::{AttrValue, DType, Declared, DeclaredDim, Graph, Tensor, ValueId};
use vitrim::pipeline::analyse;
use vitrim::slice;

const D: usize = 6;
const M: usize = 8;

/// How the two layers hold their equal zero biases.
#[derive(Clone, Copy)]
enum Biases {
    Apart,
    Merged,
    MergedBehindIdentity,
}

/// Two residual MLP blocks `x + relu(x W1 + b1) W2` with a normalization before each.
fn two_blocks(biases: Biases) -> Graph {
    blocks(biases, false)
}

/// The same; with `merged`, the second block has the weights of the first, each behind an Identity.
fn blocks(biases: Biases, merged: bool) -> Graph {
    let mut g = Graph::new(8, vec![(String::new(), 17)], Bytes::new());
    let dims = vec![DeclaredDim::Symbol("batch".into()), DeclaredDim::Size(5), DeclaredDim::Size(D as i64)];
    let declared = Declared { dtype: Some(DType::F32), dims: Some(dims), extra: Bytes::new() };
    let mut x = g.add_value("x");
    g.add_input(x, declared.clone());
    let weight = |g: &mut Graph, name: &str, shape: [usize; 2], seed: usize| -> ValueId {
        let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| ((i * 7 + seed * 3) % 11) as f32 - 5.0).collect();
        g.add_initializer(name, Tensor::f32(&shape, &values))
    };
    let shared = g.add_initializer("zeros", Tensor::f32(&[M], &[0.0; M]));
    let (scale, shift) =
        (g.add_initializer("scale", Tensor::f32(&[D], &[1.0; D])), g.add_initializer("shift", Tensor::f32(&[D], &[0.0; D])));
    for layer in 0..2 {
        let bias = match biases {
            Biases::Apart => g.add_initializer(&format!("b{layer}"), Tensor::f32(&[M], &[0.0; M])),
            Biases::Merged => shared,
            Biases::MergedBehindIdentity => g.add_op("Identity", &[shared], vec![], &format!("b{layer}")),
        };
        let side = |g: &mut Graph, name: &str, shape: [usize; 2], seed: usize| match g.find(&format!("{name}.0")) {
            Some(first) if merged => g.add_op("Identity", &[first], vec![], name),
            _ => weight(g, &format!("{name}.{layer}"), shape, layer + seed),
        };
        let (w1, w2) = (side(&mut g, "w1", [D, M], 0), side(&mut g, "w2", [M, D], 5));
        let normed = g.add_op("LayerNormalization", &[x, scale, shift], vec![], "normed");
        let hidden = g.add_op("MatMul", &[normed, w1], vec![], "hidden");
        let hidden = g.add_op("Add", &[hidden, bias], vec![], "biased");
        let hidden = g.add_op("Relu", &[hidden], vec![], "active");
        let out = g.add_op("MatMul", &[hidden, w2], vec![], "out");
        x = g.add_op("Add", &[x, out], vec![], "residual");
    }
    g.add_output(x, declared);
    g.sort();
    g
}

#[test]
fn equal_biases_do_not_tie_layers() {
    for biases in [Biases::Apart, Biases::Merged, Biases::MergedBehindIdentity] {
        let (_, anatomy) = analyse(&two_blocks(biases)).unwrap();
        let mlps: Vec<(usize, usize)> =
            anatomy.groups.iter().filter(|g| g.kind == Kind::Mlp).map(|g| (g.layer, g.units())).collect();
        assert_eq!(mlps, [(0, M), (1, M)]);
    }
}

#[test]
fn layers_behind_a_merged_bias_keep_different_numbers_of_units() {
    for biases in [Biases::Merged, Biases::MergedBehindIdentity] {
        let graph = two_blocks(biases);
        let (facts, anatomy) = analyse(&graph).unwrap();
        let kept = [("mlp.0".to_string(), vec![0, 2, 5]), ("mlp.1".to_string(), vec![1, 2, 3, 4, 7])].into();
        let sliced = slice::apply(&graph, &facts, &anatomy, &kept, &analyse).unwrap();
        let dims = |name: &str| sliced.graph.constant(sliced.graph.find(name).unwrap()).unwrap().dims;
        assert_eq!([dims("w1.0"), dims("w2.0"), dims("w1.1"), dims("w2.1")], [[D, 3], [3, D], [D, 5], [5, D]]);
        assert!(sliced.cloned.iter().chain([]).all(|c| c.initializer == "zeros"), "{:?}", sliced.cloned);
        assert_eq!(sliced.cloned.len(), 2);
    }
}

/// Groups of attention and MLPs, in words: `qk 0: 3 x 16`, `mlp 0: 96`.
fn in_words(anatomy: &Anatomy) -> Vec<String> {
    let groups = anatomy.groups.iter().filter(|g| !matches!(g.kind, Kind::Token | Kind::Channel));
    let size = |g: &vitrim::anatomy::Group| match g.heads {
        Some(heads) => format!("{heads} x {}", g.stored.len()),
        None => g.units().to_string(),
    };
    groups.map(|g| format!("{} {}: {}", g.kind.as_str(), g.layer, size(g))).collect()
}

/// How an attention layer of 2 heads of 3 dims is spelled.
#[derive(Clone, Copy, Debug)]
enum Spelling {
    /// One projection, `[B, N, 3, H, E]`, picked from by Gather.
    Gathered,
    /// One projection, split in three, then heads.
    Split,
    /// Three projections; the key is transposed in one step.
    Apart,
    /// Three projections whose weights are stored the other way round, behind Transpose and Identity.
    BehindNodes,
    /// The product of queries and keys is an Einsum over heads that are never moved to the front.
    Einsum,
}

const N: usize = 5;
const H: usize = 2;
const E: usize = 3;

fn split_three(b: &mut Builder<'_>, packed: ValueId) -> Vec<ValueId> {
    let axis = attr("axis", AttrValue::Int(2));
    if b.opset() < 13 {
        return b.ops("Split", &[packed], vec![axis, attr("split", AttrValue::Ints(vec![6, 6, 6]))], 3);
    }
    let sizes = b.ints(&[6, 6, 6]);
    b.ops("Split", &[packed, sizes], vec![axis], 3)
}

fn attention(spelling: Spelling, opset: i64, batch: DeclaredDim) -> Graph {
    let mut g = Graph::new(8, vec![(String::new(), opset)], Bytes::new());
    let dims = vec![batch, DeclaredDim::Size(N as i64), DeclaredDim::Size((H * E) as i64)];
    let declared = Declared { dtype: Some(DType::F32), dims: Some(dims), extra: Bytes::new() };
    let x = g.add_value("x");
    g.add_input(x, declared.clone());
    let mut b = Builder::new(&mut g, "");
    let weight = |b: &mut Builder<'_>, rows: usize, columns: usize| {
        let values: Vec<f32> = (0..rows * columns).map(|i| ((i * 7) % 11) as f32 - 5.0).collect();
        b.constant(Tensor::f32(&[rows, columns], &values))
    };
    let heads = [0, N as i64, H as i64, E as i64];
    let parts: Vec<ValueId> = match spelling {
        Spelling::Gathered => {
            let w = weight(&mut b, 6, 18);
            let packed = b.matmul(x, w);
            let packed = b.reshape(packed, &[0, N as i64, 3, H as i64, E as i64]);
            let packed = b.transpose(packed, &[2, 0, 3, 1, 4]);
            (0..3)
                .map(|i| {
                    let i = b.constant(Tensor::i64_scalar(i));
                    b.gather(packed, i, 0)
                })
                .collect()
        }
        Spelling::Split | Spelling::Einsum => {
            let w = weight(&mut b, 6, 18);
            let packed = b.matmul(x, w);
            let parts = split_three(&mut b, packed);
            let moved = matches!(spelling, Spelling::Split);
            let part = |v: ValueId, b: &mut Builder<'_>| {
                let v = b.reshape(v, &heads);
                if moved { b.transpose(v, &[0, 2, 1, 3]) } else { v }
            };
            parts.into_iter().map(|v| part(v, &mut b)).collect()
        }
        Spelling::Apart | Spelling::BehindNodes => (0..3)
            .map(|_| {
                let mut w = weight(&mut b, 6, 6);
                if matches!(spelling, Spelling::BehindNodes) {
                    w = b.transpose(w, &[1, 0]);
                    w = b.op("Identity", &[w], vec![]);
                }
                let v = b.matmul(x, w);
                let v = b.reshape(v, &heads);
                b.transpose(v, &[0, 2, 1, 3])
            })
            .collect(),
    };
    let (q, k, v) = (parts[0], parts[1], parts[2]);
    let equation = |text: &str| vec![attr("equation", AttrValue::Str(Bytes::copy_from_slice(text.as_bytes())))];
    let mixed = if matches!(spelling, Spelling::Einsum) {
        let logits = b.op("Einsum", &[q, k], equation("bnhe,bmhe->bhnm"));
        let p = b.op("Softmax", &[logits], vec![attr("axis", AttrValue::Int(3))]);
        b.op("Einsum", &[p, v], equation("bhnm,bmhe->bnhe"))
    } else {
        let k = b.transpose(k, &[0, 1, 3, 2]);
        let logits = b.matmul(q, k);
        let p = b.op("Softmax", &[logits], vec![attr("axis", AttrValue::Int(3))]);
        let mixed = b.matmul(p, v);
        b.transpose(mixed, &[0, 2, 1, 3])
    };
    let merged = b.reshape(mixed, &[0, N as i64, (H * E) as i64]);
    let w = weight(&mut b, 6, 6);
    let out = b.matmul(merged, w);
    let out = b.add(x, out);
    g.add_output(out, declared);
    g.sort();
    g
}

#[test]
fn one_attention_in_any_spelling_has_one_anatomy() {
    use Spelling::*;
    for spelling in [Gathered, Split, Apart, BehindNodes, Einsum] {
        for opset in [12, 13, 17, 20] {
            for batch in [DeclaredDim::Symbol("batch".into()), DeclaredDim::Size(1), DeclaredDim::Size(2)] {
                let (_, anatomy) = analyse(&attention(spelling, opset, batch.clone())).unwrap();
                let found = in_words(&anatomy);
                assert_eq!(found, ["qk 0: 2 x 3", "vo 0: 2 x 3", "head 0: 2"], "{spelling:?}, opset {opset}, {batch:?}");
            }
        }
    }
}

/// What one network of the corpus has, whoever exported it.
#[derive(Deserialize, Serialize)]
struct Snapshot {
    /// How the manifest names the network.
    base: String,
    /// A model of it; others have the same expectations in the manifest.
    like: String,
    groups: Vec<String>,
}

/// Expectations of a model: what distinguishes two networks of one base.
fn expected(entry: &Json) -> String {
    let items = entry["expect"]["list"].as_array().unwrap().iter();
    items.map(|i| format!("{} {} {} {};", i["kind"], i["count"], i["heads"], i["cut"])).collect()
}

fn count(words: &[String]) -> BTreeMap<(String, String), usize> {
    let mut counts = BTreeMap::new();
    for word in words {
        let (name, size) = word.split_once(": ").unwrap();
        let kind = name.split(' ').next().unwrap();
        *counts.entry((kind.to_string(), size.to_string())).or_insert(0) += 1;
    }
    counts
}

/// The anatomy of a model of the corpus in words, and whether something of an attention or MLP is refused.
fn found_in(folder: &Path, entry: &Json) -> (Vec<String>, bool) {
    let mut files = entry["files"].as_array().unwrap().iter().filter_map(Json::as_str);
    let file = folder.join(files.rfind(|f| f.ends_with(".onnx")).unwrap());
    let (_, anatomy) = analyse(&vitrim::onnx::read(&file).unwrap().graph).unwrap();
    (in_words(&anatomy), anatomy.refused.iter().any(|r| !matches!(r.kind, Kind::Token | Kind::Channel)))
}

/// Where nothing of an attention or MLP is refused the anatomy is that of the snapshot; refusals may only take something away.
/// With `VITRIM_BLESS` set the snapshots are taken anew, each of the model that it names.
#[test]
fn one_network_of_the_corpus_has_one_anatomy_whoever_exported_it() {
    let Some(folder) = std::env::var_os("VITRIM_CORPUS").map(PathBuf::from) else {
        println!("skipped: VITRIM_CORPUS is not set");
        return;
    };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/anatomy.json");
    let mut snapshots: Vec<Snapshot> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let manifest: Vec<Json> = serde_json::from_slice(&std::fs::read(folder.join("manifest.json")).unwrap()).unwrap();
    if std::env::var_os("VITRIM_BLESS").is_some() {
        for snapshot in &mut snapshots {
            let like = manifest.iter().find(|e| e["name"] == snapshot.like.as_str()).expect("the model of the snapshot");
            snapshot.groups = found_in(&folder, like).0;
        }
        std::fs::write(&path, serde_json::to_string_pretty(&snapshots).unwrap() + "\n").unwrap();
    }
    let (mut whole, mut partial, mut faults) = (0, 0, Vec::new());
    for snapshot in &snapshots {
        let like = manifest.iter().find(|e| e["name"] == snapshot.like.as_str()).expect("the model of the snapshot");
        let same = manifest.iter().filter(|e| e["base"] == snapshot.base.as_str() && expected(e) == expected(like));
        for entry in same {
            let (found, is_refused) = found_in(&folder, entry);
            let less = || {
                let all = count(&snapshot.groups);
                count(&found).iter().all(|(what, n)| all.get(what).is_some_and(|m| n <= m))
            };
            match found == snapshot.groups {
                true => whole += 1,
                false if is_refused && less() => partial += 1,
                false => faults.push(format!("{}: {found:?}", entry["name"])),
            }
        }
    }
    println!("{} networks: {whole} models have their anatomy whole, {partial} less what they refuse", snapshots.len());
    assert!(faults.is_empty(), "{} models differ from their network:\n{}", faults.len(), faults.join("\n"));
    assert!(whole > 2 * partial, "{whole} whole, {partial} in part");
}

#[test]
fn a_weight_behind_identities_is_one_weight() {
    // What a parallel block of CoaT looks like: one MLP is used twice, each time through copies of its weights.
    let mut g = Graph::new(8, vec![(String::new(), 17)], Bytes::new());
    let dims = vec![DeclaredDim::Symbol("batch".into()), DeclaredDim::Size(5), DeclaredDim::Size(D as i64)];
    let declared = Declared { dtype: Some(DType::F32), dims: Some(dims), extra: Bytes::new() };
    let mut x = g.add_value("x");
    g.add_input(x, declared.clone());
    let w1 = g.add_initializer("w1", Tensor::f32(&[D, M], &[0.5; D * M]));
    let w2 = g.add_initializer("w2", Tensor::f32(&[M, D], &[0.5; D * M]));
    for _ in 0..2 {
        let copies = [w1, w2].map(|w| g.add_op("Identity", &[w], vec![], "copy"));
        let hidden = g.add_op("MatMul", &[x, copies[0]], vec![], "hidden");
        let hidden = g.add_op("Relu", &[hidden], vec![], "active");
        x = g.add_op("MatMul", &[hidden, copies[1]], vec![], "out");
    }
    g.add_output(x, declared);
    g.sort();
    let (facts, anatomy) = analyse(&g).unwrap();
    let mlps: Vec<(usize, usize)> =
        anatomy.groups.iter().filter(|g| g.kind == Kind::Mlp).map(|g| (g.units(), g.sites.len())).collect();
    assert_eq!(mlps[0], (M, 2));
    let kept = [(anatomy.groups[0].id.clone(), vec![0, 2, 5])].into();
    let sliced = slice::apply(&g, &facts, &anatomy, &kept, &analyse).unwrap();
    assert_eq!((sliced.cuts.len(), sliced.cloned.len()), (2, 0));
}

#[test]
fn layers_that_share_weights_are_cut_alike() {
    let graph = blocks(Biases::Apart, true);
    let (facts, anatomy) = analyse(&graph).unwrap();
    let mlps: Vec<&str> = anatomy.groups.iter().filter(|g| g.kind == Kind::Mlp).map(|g| g.id.as_str()).collect();
    assert_eq!(mlps, ["mlp.0"]);
    let kept = [("mlp.0".to_string(), vec![0, 2, 5])].into();
    let sliced = slice::apply(&graph, &facts, &anatomy, &kept, &analyse).unwrap();
    let cut: Vec<&str> = sliced.cuts.iter().map(|c| c.initializer.as_str()).collect();
    assert!(sliced.cloned.is_empty() && ["w1.0", "w2.0", "b0", "b1"].iter().all(|name| cut.contains(name)), "{cut:?}");
}
