//! Factors on their way, and gates in small graphs.

use super::factor::Factor;
use super::group;
use crate::anatomy::{Group, Kind, Site};
use crate::graph::build::{Builder, attr};
use crate::graph::{AttrValue, DType, Declared, DeclaredDim, Graph, Tensor, Use, ValueId};
use crate::infer::{self, Dim};
use bytes::Bytes;
use std::collections::BTreeSet;

fn sizes(list: &[i64]) -> Vec<Dim> {
    list.iter().map(|n| Dim::from(*n)).collect()
}

#[test]
fn a_factor_goes_back_through_a_reshape() {
    let b = Dim::named("b");
    let factor = Factor::new(vec![1, 1, 2, 2], vec![1.0, 2.0, 3.0, 4.0]);
    let output = [vec![b.clone()], sizes(&[5, 2, 2])].concat();
    let input = [vec![b.clone()], sizes(&[5, 4])].concat();
    let before = factor.before_reshape(&input, &output).expect("runs match");
    assert_eq!((before.dims, before.values), (vec![1, 1, 4], vec![1.0, 2.0, 3.0, 4.0]));
    // One of three in a fused axis: q of qkv.
    let picked = Factor::new(vec![1, 1, 1, 2, 2], vec![1.0, 2.0, 3.0, 4.0]).before_pick(2, 3, &[0], false).expect("it fits");
    let output = [vec![b.clone()], sizes(&[5, 3, 2, 2])].concat();
    let input = [vec![b], sizes(&[5, 12])].concat();
    let before = picked.before_reshape(&input, &output).expect("runs match");
    assert_eq!(before.values, [1.0, 2.0, 3.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
}

#[test]
fn a_factor_goes_back_through_a_transpose() {
    let factor = Factor::new(vec![1, 2, 1, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let before = factor.before_transpose(&[0, 2, 1, 3]);
    assert_eq!(before, Factor::new(vec![1, 1, 2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
    let turned = Factor::new(vec![2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).before_transpose(&[1, 0]);
    assert_eq!(turned, Factor::new(vec![3, 2], vec![1.0, 4.0, 2.0, 5.0, 3.0, 6.0]));
}

/// `softmax-free attention`: q = reshape(x W + c), k = x V, y = q k^T summed by a MatMul over E.
fn graph() -> (Graph, Use, [ValueId; 3]) {
    let mut graph = Graph::new(8, vec![(String::new(), 17)], Bytes::new());
    let x = graph.add_value("x");
    let dims = vec![DeclaredDim::Symbol("b".into()), DeclaredDim::Size(5), DeclaredDim::Size(3)];
    graph.add_input(x, Declared { dtype: Some(DType::F32), dims: Some(dims), extra: Bytes::new() });
    let w = graph.add_initializer("w", Tensor::f32(&[3, 4], &[1.0; 12]));
    let c = graph.add_initializer("c", Tensor::f32(&[4], &[1.0, 2.0, 3.0, 4.0]));
    let k = graph.add_initializer("k", Tensor::f32(&[4, 2], &[1.0; 8]));
    let mut b = Builder::new(&mut graph, "n.");
    let p = b.op("MatMul", &[x, w], vec![]);
    let q = b.add(p, c);
    let turned = b.op("Transpose", &[q], vec![attr("perm", AttrValue::Ints(vec![1, 0, 2]))]);
    let y = b.op("MatMul", &[turned, k], vec![]);
    graph.add_output(y, Declared { dtype: Some(DType::F32), dims: None, extra: Bytes::new() });
    let (sink, _) = graph.value(y).producer().expect("a node makes it");
    (graph, Use { node: sink, slot: 0 }, [w, c, k])
}

fn one_group(at: Use) -> Group {
    let site = Site { at, axes: vec![2], index: (0..4).map(Some).collect() };
    Group {
        id: "mlp.0".into(),
        kind: Kind::Mlp,
        layer: 0,
        nest: vec![],
        leaf: 0,
        sharers: vec![],
        stored: (0..4).collect(),
        run: 1,
        heads: None,
        aside: BTreeSet::new(),
        spread: vec![],
        sites: vec![site],
        cuts: vec![],
    }
}

#[test]
fn a_gate_goes_into_the_weight_of_its_sink() {
    let (mut graph, at, [w, _, k]) = graph();
    let facts = infer::facts(&graph).expect("it is sound");
    let names = group(&mut graph, &facts, &one_group(at), &[0.5, 1.0, 2.0, 0.0]).expect("it can be folded");
    assert_eq!(names.into_iter().collect::<Vec<_>>(), ["k"]);
    let scaled = graph.constant(k).and_then(|t| t.to_f32s()).expect("floats");
    assert_eq!(scaled, [0.5, 0.5, 1.0, 1.0, 2.0, 2.0, 0.0, 0.0]);
    assert_eq!(graph.constant(w).and_then(|t| t.to_f32s()), Some(vec![1.0; 12]));
}

#[test]
fn where_the_sink_has_no_weight_of_its_own_the_gate_goes_back() {
    let (mut graph, at, [w, c, k]) = graph();
    // Another reader of the sink's weight: it must stay as it is.
    let mut b = Builder::new(&mut graph, "m.");
    let other = b.op("Neg", &[k], vec![]);
    graph.add_output(other, Declared { dtype: Some(DType::F32), dims: None, extra: Bytes::new() });
    let facts = infer::facts(&graph).expect("it is sound");
    let names = group(&mut graph, &facts, &one_group(at), &[0.5, 1.0, 2.0, 0.0]).expect("it can be folded");
    assert_eq!(names.into_iter().collect::<Vec<_>>(), ["c", "w"]);
    let of = |v| graph.constant(v).and_then(|t| t.to_f32s()).expect("floats");
    assert_eq!(of(w), [0.5, 1.0, 2.0, 0.0, 0.5, 1.0, 2.0, 0.0, 0.5, 1.0, 2.0, 0.0]);
    assert_eq!(of(c), [0.5, 2.0, 6.0, 0.0]);
    assert_eq!(of(k), [1.0; 8]);
}

#[test]
fn what_cannot_be_folded_changes_nothing() {
    let (mut graph, at, [w, _, k]) = graph();
    let mut b = Builder::new(&mut graph, "m.");
    let others = [b.op("Neg", &[k], vec![]), b.op("Neg", &[w], vec![])];
    for other in others {
        graph.add_output(other, Declared { dtype: Some(DType::F32), dims: None, extra: Bytes::new() });
    }
    let facts = infer::facts(&graph).expect("it is sound");
    let before = graph.clone();
    let reason = group(&mut graph, &facts, &one_group(at), &[0.5, 1.0, 2.0, 0.0]).expect_err("both weights are shared");
    assert!(reason.contains("is also read by"), "{reason}");
    for v in [w, k] {
        assert_eq!(graph.constant(v), before.constant(v));
    }
}
