//! What is found in a graph does not depend on how an exporter shares its constants.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

#[path = "anatomy/layers.rs"]
mod layers;

use bytes::Bytes;
use vitrim::anatomy::Kind;
use vitrim::graph::{DType, Declared, DeclaredDim, Graph, Tensor, ValueId};
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
