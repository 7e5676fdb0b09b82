//! What exporters write around layers, each in a graph of a few nodes: it must neither hide a layer nor make a cut wrong.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

use vitrim::anatomy::{Anatomy, Kind};
use vitrim::autodiff::interface::declare;
use vitrim::graph::build::{Builder, attr};
use vitrim::graph::{AttrValue, DType, Declared, DeclaredDim, Graph, Tensor, ValueId};
use vitrim::infer::Facts;
use vitrim::pipeline::analyse;
use vitrim::slice::{self, Sliced};

type Found = (Graph, Facts, Anatomy);

/// A graph with an input `x` of this shape, 0 for the batch.
fn net(dims: &[i64], make: impl Fn(&mut Builder<'_>, ValueId) -> ValueId) -> Found {
    let mut graph = Graph::new(8, vec![(String::new(), 17)], Default::default());
    let x = graph.add_value("x");
    let size = |d: &i64| if *d == 0 { DeclaredDim::Symbol("batch".into()) } else { DeclaredDim::Size(*d) };
    graph.add_input(x, declare(DType::F32, dims.iter().map(size).collect()));
    let y = make(&mut Builder::new(&mut graph, ""), x);
    graph.add_output(y, Declared { dtype: None, dims: None, extra: Default::default() });
    graph.sort();
    let (facts, anatomy) = analyse(&graph).unwrap();
    (graph, facts, anatomy)
}

fn weight(b: &mut Builder<'_>, dims: &[usize]) -> ValueId {
    let values: Vec<f32> = (0..dims.iter().product()).map(|i| ((i * 7 + dims.len()) % 11) as f32 - 5.5).collect();
    b.constant(Tensor::f32(dims, &values))
}

fn units(found: &Found) -> Vec<(Kind, usize)> {
    found.2.groups.iter().map(|g| (g.kind, g.units())).collect()
}

fn cut((graph, facts, anatomy): &Found, kept: &[usize]) -> Sliced {
    slice::apply(graph, facts, anatomy, &[(anatomy.groups[0].id.clone(), kept.to_vec())].into(), &analyse).unwrap()
}

fn slice_to(b: &mut Builder<'_>, v: ValueId, start: i64, end: i64) -> ValueId {
    let (start, end, axis) = (b.ints(&[start]), b.ints(&[end]), b.ints(&[-1]));
    b.op("Slice", &[v, start, end, axis], vec![])
}

#[test]
fn the_rest_of_a_head_that_is_rotated_whole_is_nothing() {
    // Concat(x[.. 6], x[6 ..]) of a width of 6, as partial rotation is written.
    let found = net(&[0, 4], |b, x| {
        let (w, v) = (weight(b, &[4, 6]), weight(b, &[6, 4]));
        let hidden = b.matmul(x, w);
        let parts = [slice_to(b, hidden, 0, 6), slice_to(b, hidden, 6, i64::MAX)];
        let whole = b.concat(&parts, -1);
        b.matmul(whole, v)
    });
    assert_eq!(units(&found), [(Kind::Mlp, 6)]);
    assert_eq!(cut(&found, &[1, 4]).cuts.len(), 2);
}

#[test]
fn layers_that_share_weights_share_biases() {
    // q k^T of two layers with one weight and one bias for both.
    let found = net(&[0, 5, 4], |b, x| {
        let (wq, wk, bias, wv) = (weight(b, &[4, 6]), weight(b, &[4, 6]), weight(b, &[6]), weight(b, &[4, 4]));
        let mut x = x;
        for _ in 0..2 {
            let q = b.matmul(x, wq);
            let q = b.add(q, bias);
            let k = b.matmul(x, wk);
            let k = b.transpose(k, &[0, 2, 1]);
            let logits = b.matmul(q, k);
            let p = b.op("Softmax", &[logits], vec![attr("axis", AttrValue::Int(-1))]);
            let v = b.matmul(x, wv);
            let mixed = b.matmul(p, v);
            x = b.add(x, mixed);
        }
        x
    });
    let qk: Vec<_> = units(&found).into_iter().filter(|(kind, _)| *kind == Kind::Qk).collect();
    assert_eq!(qk, [(Kind::Qk, 6)]);
    let group = found.2.groups.iter().find(|g| g.kind == Kind::Qk).unwrap();
    let (graph, facts, anatomy) = &found;
    let sliced = slice::apply(graph, facts, anatomy, &[(group.id.clone(), vec![0, 5])].into(), &analyse).unwrap();
    assert!(sliced.cuts.iter().any(|c| c.of == 6 && c.axis == 0), "the bias is cut for both layers: {:?}", sliced.cuts);
    assert!(sliced.cloned.is_empty());
}

#[test]
fn pointwise_convolutions_over_a_map_are_an_mlp() {
    let conv = |b: &mut Builder<'_>, x: ValueId, dims: [usize; 4]| {
        let w = weight(b, &dims);
        let pad = (dims[2] / 2) as i64;
        b.op("Conv", &[x, w], vec![attr("pads", AttrValue::Ints(vec![pad; 4]))])
    };
    let between = |size: i64, kernel: usize| {
        net(&[0, 4, size, size], |b, x| {
            let hidden = conv(b, x, [8, 4, 1, 1]);
            let hidden = b.op("Relu", &[hidden], vec![]);
            conv(b, hidden, [4, 8, kernel, kernel])
        })
    };
    assert_eq!(units(&between(6, 1)), [(Kind::Mlp, 8)]);
    assert_eq!(units(&between(6, 3)), [(Kind::Channel, 8)]);
    assert_eq!(units(&between(1, 1)), [(Kind::Channel, 8)], "squeezed to one position");
}

#[test]
fn whole_axes_may_be_repeated() {
    // A hidden axis of 3, twice in a row, into a weight of 6 rows.
    let found = net(&[0, 4], |b, x| {
        let (w, v) = (weight(b, &[4, 3]), weight(b, &[6, 4]));
        let hidden = b.matmul(x, w);
        let repeats = b.ints(&[1, 2]);
        let twice = b.op("Tile", &[hidden, repeats], vec![]);
        b.matmul(twice, v)
    });
    assert_eq!(units(&found), [(Kind::Mlp, 3)]);
    let sliced = cut(&found, &[0, 2]);
    let rows = sliced.cuts.iter().find(|c| c.of == 6).unwrap();
    assert_eq!((rows.axis, rows.removed.as_slice()), (0, [1, 4].as_slice()));
}

#[test]
fn tables_computed_from_the_length_of_a_sequence_stay_when_it_is_shortened() {
    // A bias `[5, 5]` of distances, from the length that is read off the sequence itself, and a class token at the end.
    let found = net(&[0, 5, 4], |b, x| {
        let embedding = weight(b, &[4, 4]);
        let x = b.matmul(x, embedding);
        let sizes = b.shape_of(x);
        let (one, zero, step) = (b.constant(Tensor::i64s(&[1])), b.constant(scalar(0)), b.constant(scalar(1)));
        let length = b.gather(sizes, one, 0);
        let none = b.ints(&[0]);
        let length = b.op("Squeeze", &[length, none], vec![]);
        let positions = b.op("Range", &[zero, length, step], vec![]);
        let (rows, columns) = (b.unsqueeze(positions, &[1]), b.unsqueeze(positions, &[0]));
        let distance = b.sub(rows, columns);
        let distance = b.cast(distance, DType::F32);
        let w: Vec<ValueId> = (0..3).map(|_| weight(b, &[4, 4])).collect();
        let (q, k, v) = (b.matmul(x, w[0]), b.matmul(x, w[1]), b.matmul(x, w[2]));
        let k = b.transpose(k, &[0, 2, 1]);
        let logits = b.matmul(q, k);
        let logits = b.add(logits, distance);
        let p = b.op("Softmax", &[logits], vec![attr("axis", AttrValue::Int(-1))]);
        let mixed = b.matmul(p, v);
        let x = b.add(x, mixed);
        let class = b.constant(scalar(0));
        b.gather(x, class, 1)
    });
    let (graph, facts, anatomy) = &found;
    let group = anatomy.groups.iter().find(|g| g.kind == Kind::Token).unwrap();
    let sliced = slice::apply(graph, facts, anatomy, &[(group.id.clone(), vec![0, 2, 4])].into(), &analyse).unwrap();
    // Were the range as long as what is left, positions 2 and 4 would be 1 and 2.
    let after = &sliced.graph;
    let mut above = vec![after.nodes().find(|(_, n)| n.op() == "Cast").unwrap().0];
    while let Some(id) = above.pop() {
        assert_ne!(after.node(id).op(), "Shape", "the table follows the length");
        above.extend(after.node(id).inputs().iter().flatten().filter_map(|v| after.value(*v).producer()).map(|(id, _)| id));
    }
}

fn scalar(n: i64) -> Tensor {
    Tensor { dims: Vec::new(), ..Tensor::i64s(&[n]) }
}
