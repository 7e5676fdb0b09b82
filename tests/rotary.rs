//! Rotary attention, spelled in several ways: dims go in pairs, and heads keep dims of their own wherever they can.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

use bytes::Bytes;
use std::collections::BTreeMap;
use vitrim::anatomy::{Anatomy, Group, Kind};
use vitrim::graph::build::{Builder, attr};
use vitrim::graph::{AttrValue, DType, Declared, DeclaredDim, Graph, Tensor, ValueId};
use vitrim::pipeline::analyse;
use vitrim::slice::{self, Sliced};

const D: usize = 6;
const E: usize = 8;
const N: usize = 5;

/// How q and k are rotated.
#[derive(Clone, Copy, PartialEq)]
enum Rotation {
    /// `x cos + (-b, a) sin` of the halves `x = (a, b)`.
    Halves,
    /// The same with neighbours: `(-x1, x0, -x3, x2, ..)`.
    Neighbours,
    /// The first four dims only.
    FirstHalf,
    /// `RotaryEmbedding`, one operator for all heads.
    Fused,
}

/// What a layer looks like.
#[derive(Clone, Copy)]
struct Shape {
    rotation: Rotation,
    heads: usize,
    key_heads: usize,
    /// Tokens in front that are not rotated.
    prefix: usize,
    /// Angles from position ids that are fed in.
    ids: bool,
    layers: usize,
    /// Heads joined with the batch before the products.
    joined: bool,
}

const PLAIN: Shape =
    Shape { rotation: Rotation::Halves, heads: 2, key_heads: 2, prefix: 0, ids: false, layers: 1, joined: false };

fn weights(b: &mut Builder<'_>, shape: &[usize]) -> ValueId {
    let count = shape.iter().product::<usize>();
    let values: Vec<f32> = (0..count).map(|i| ((i * 7 + count) % 11) as f32 - 5.0).collect();
    b.constant(Tensor::f32(shape, &values))
}

/// Tables of cosines and sines of `width` columns, one row per rotated token.
fn tables(b: &mut Builder<'_>, width: usize, ids: Option<ValueId>, prefix: usize) -> [ValueId; 2] {
    if let Some(ids) = ids {
        let frequencies = b.constant(Tensor::f32(&[1, 1, width], &vec![0.5; width]));
        let at = b.cast(ids, DType::F32);
        let at = b.unsqueeze(at, &[2]);
        let angles = b.mul(at, frequencies);
        // [B, N, R] -> [B, 1, N, R]
        let angles = b.unsqueeze(angles, &[1]);
        return ["Cos", "Sin"].map(|f| b.op(f, &[angles], vec![]));
    }
    [0, 1].map(|seed| {
        let values: Vec<f32> = (0..(N - prefix) * width).map(|i| ((i + seed) % 5) as f32 / 5.0).collect();
        b.constant(Tensor::f32(&[N - prefix, width], &values))
    })
}

fn rotated(b: &mut Builder<'_>, x: ValueId, how: Rotation, [cos, sin]: [ValueId; 2], width: usize) -> ValueId {
    let swapped = match how {
        Rotation::Fused => return b.op("RotaryEmbedding", &[x, cos, sin], vec![]),
        Rotation::FirstHalf => {
            let half = width as i64 / 2;
            let (front, rest) = (b.slice(x, &[0], &[half], &[3]), b.slice(x, &[half], &[width as i64], &[3]));
            let front = rotated(b, front, Rotation::Halves, [cos, sin], width / 2);
            return b.concat(&[front, rest], 3);
        }
        Rotation::Halves => {
            let half = width as i64 / 2;
            let (first, second) = (b.slice(x, &[0], &[half], &[3]), b.slice(x, &[half], &[width as i64], &[3]));
            let second = b.neg(second);
            b.concat(&[second, first], 3)
        }
        Rotation::Neighbours => {
            let two = b.ints(&[2]);
            let every_second = |b: &mut Builder<'_>, start: i64| {
                let (start, end, axis) = (b.ints(&[start]), b.ints(&[i64::MAX]), b.ints(&[3]));
                let part = b.op("Slice", &[x, start, end, axis, two], vec![]);
                b.unsqueeze(part, &[4])
            };
            let (even, odd) = (every_second(b, 0), every_second(b, 1));
            let odd = b.neg(odd);
            let pairs = b.concat(&[odd, even], 4);
            b.reshape(pairs, &[0, 0, 0, -1])
        }
    };
    let (straight, crossed) = (b.mul(x, cos), b.mul(swapped, sin));
    b.add(straight, crossed)
}

fn attention(b: &mut Builder<'_>, x: ValueId, s: Shape, tables: [ValueId; 2]) -> ValueId {
    let project = |b: &mut Builder<'_>, heads: usize| {
        let w = weights(b, &[D, heads * E]);
        let y = b.matmul(x, w);
        let y = b.reshape(y, &[0, 0, heads as i64, E as i64]);
        b.transpose(y, &[0, 2, 1, 3])
    };
    let rotate = |b: &mut Builder<'_>, x: ValueId| {
        if s.prefix == 0 {
            return rotated(b, x, s.rotation, tables, E);
        }
        let at = s.prefix as i64;
        let (front, rest) = (b.slice(x, &[0], &[at], &[2]), b.slice(x, &[at], &[i64::MAX], &[2]));
        let rest = rotated(b, rest, s.rotation, tables, E);
        b.concat(&[front, rest], 2)
    };
    let q = project(b, s.heads);
    let (k, v) = (project(b, s.key_heads), project(b, s.key_heads));
    let (mut q, mut k, mut v) = (rotate(b, q), rotate(b, k), v);
    if s.key_heads < s.heads {
        let sharing = (s.heads / s.key_heads) as i64;
        for x in [&mut k, &mut v] {
            let apart = b.unsqueeze(*x, &[2]);
            let shape = b.ints(&[1, 1, sharing, 1, 1]);
            let many = b.op("Expand", &[apart, shape], vec![]);
            *x = b.reshape(many, &[0, s.heads as i64, N as i64, E as i64]);
        }
    }
    if s.joined {
        for x in [&mut q, &mut k, &mut v] {
            *x = b.reshape(*x, &[-1, N as i64, E as i64]);
        }
    }
    let k = b.transpose(k, if s.joined { &[0, 2, 1] } else { &[0, 1, 3, 2] });
    let logits = b.matmul(q, k);
    let shares = b.op("Softmax", &[logits], vec![attr("axis", AttrValue::Int(-1))]);
    let mut y = b.matmul(shares, v);
    if s.joined {
        y = b.reshape(y, &[-1, s.heads as i64, N as i64, E as i64]);
    }
    let y = b.transpose(y, &[0, 2, 1, 3]);
    let y = b.reshape(y, &[0, 0, -1]);
    let w = weights(b, &[s.heads * E, D]);
    b.matmul(y, w)
}

fn network(s: Shape) -> Graph {
    let mut g = Graph::new(10, vec![(String::new(), 23)], Bytes::new());
    let declared = |dims: &[usize], dtype: DType| {
        let sizes = dims.iter().map(|d| DeclaredDim::Size(*d as i64));
        let dims = std::iter::once(DeclaredDim::Symbol("batch".into())).chain(sizes).collect();
        Declared { dtype: Some(dtype), dims: Some(dims), extra: Bytes::new() }
    };
    let mut x = g.add_value("x");
    g.add_input(x, declared(&[N, D], DType::F32));
    let ids = s.ids.then(|| {
        let ids = g.add_value("ids");
        g.add_input(ids, declared(&[N - s.prefix], DType::I64));
        ids
    });
    let mut b = Builder::new(&mut g, "n.");
    let width = match s.rotation {
        Rotation::Halves | Rotation::Neighbours => E,
        Rotation::FirstHalf | Rotation::Fused => E / 2,
    };
    let mut both = tables(&mut b, width, ids, s.prefix);
    if s.rotation == Rotation::Fused {
        both = both.map(|t| b.unsqueeze(t, &[0]));
    }
    for _ in 0..s.layers {
        let scale = b.constant(Tensor::f32(&[D], &[1.0; D]));
        let normed = b.op("LayerNormalization", &[x, scale, scale], vec![]);
        let y = attention(&mut b, normed, s, both);
        x = b.add(x, y);
    }
    g.add_output(x, declared(&[N, D], DType::F32));
    g.sort();
    g
}

fn group<'a>(anatomy: &'a Anatomy, id: &str) -> &'a Group {
    anatomy.groups.iter().find(|g| g.id == id).unwrap_or_else(|| panic!("no {id}"))
}

fn cut(graph: &Graph, kept: &[(&str, &[usize])]) -> Sliced {
    let (facts, anatomy) = analyse(graph).unwrap();
    let kept: BTreeMap<String, Vec<usize>> = kept.iter().map(|(id, k)| (id.to_string(), k.to_vec())).collect();
    slice::apply(graph, &facts, &anatomy, &kept, &analyse).unwrap()
}

/// Pairs of the first head, in the order of their first dim.
fn pairs(group: &Group) -> Vec<Vec<usize>> {
    let mut all: Vec<Vec<usize>> = (0..group.width()).map(|u| group.bundle(u)).collect();
    all.sort();
    all.dedup();
    all
}

#[test]
fn pairs_follow_the_rotation_and_heads_keep_their_own() {
    for (rotation, expected) in
        [(Rotation::Halves, [[0, 4], [1, 5], [2, 6], [3, 7]]), (Rotation::Neighbours, [[0, 1], [2, 3], [4, 5], [6, 7]])]
    {
        let graph = network(Shape { rotation, ..PLAIN });
        let (_, anatomy) = analyse(&graph).unwrap();
        let qk = group(&anatomy, "qk.0");
        assert_eq!((qk.units(), qk.heads, qk.width(), qk.nest_count()), (16, Some(2), E, 2));
        assert_eq!(pairs(qk), expected);
        assert_eq!(group(&anatomy, "vo.0").units(), 16, "what nothing rotates is not parted");
        // Other pairs in each head.
        let ([a, b], [c, d]) = (expected[0], expected[2]);
        let kept = [a, b, E + c, E + d];
        let sliced = cut(&graph, &[("qk.0", &kept)]);
        let removed: Vec<usize> = (0..2 * E).filter(|u| !kept.contains(u)).collect();
        let weights: Vec<&[usize]> = sliced.cuts.iter().filter(|c| c.of == 2 * E).map(|c| &*c.removed).collect();
        assert_eq!(weights, [&removed[..], &removed[..]], "the columns of q and of k");
        assert!(sliced.cloned.is_empty(), "tables stay as they are");
    }
}

#[test]
fn a_pair_is_not_torn() {
    let graph = network(PLAIN);
    let (facts, anatomy) = analyse(&graph).unwrap();
    let kept = [("qk.0".to_string(), vec![0, 1, E, E + 1])].into();
    let error = slice::apply(&graph, &facts, &anatomy, &kept, &analyse).unwrap_err();
    assert_eq!(error.to_string(), "plan keeps unit 0 of group 'qk.0' without its partner 4");
}

#[test]
fn tokens_in_front_that_are_not_rotated_change_nothing() {
    let graph = network(Shape { prefix: 2, ..PLAIN });
    let (_, anatomy) = analyse(&graph).unwrap();
    assert_eq!((group(&anatomy, "qk.0").units(), group(&anatomy, "vo.0").units()), (16, 16));
    assert_eq!(cut(&graph, &[("qk.0", &[0, 4, 9, 13]), ("vo.0", &[0, 1, 2, 8, 10, 15])]).cuts.len(), 4);
}

#[test]
fn dims_that_are_not_rotated_are_free() {
    let graph = network(Shape { rotation: Rotation::FirstHalf, ..PLAIN });
    let (_, anatomy) = analyse(&graph).unwrap();
    let (rotated, free) = (group(&anatomy, "qk.0a"), group(&anatomy, "qk.0b"));
    assert_eq!((rotated.units(), pairs(rotated)), (8, vec![vec![0, 2], vec![1, 3]]));
    assert_eq!((free.units(), pairs(free).len()), (8, 4));
    assert_eq!(cut(&graph, &[("qk.0a", &[0, 2, 5, 7]), ("qk.0b", &[0, 6])]).cuts.len(), 2);
}

#[test]
fn one_rotation_for_all_heads_keeps_the_same_dims_in_each() {
    let graph = network(Shape { rotation: Rotation::Fused, ..PLAIN });
    let (_, anatomy) = analyse(&graph).unwrap();
    let qk = group(&anatomy, "qk.0");
    assert_eq!((qk.units(), qk.heads, qk.nest_count(), qk.sharing()), (16, Some(2), 1, 2));
    assert_eq!(qk.bundle(1), [1, 5, 9, 13]);
    let index: Vec<usize> = qk.sites[0].index.iter().map(|u| u.unwrap()).collect();
    assert_eq!(index, (0..16).collect::<Vec<_>>(), "each stored dim has a gate");
}

#[test]
fn query_heads_that_share_a_key_share_its_pairs() {
    let graph = network(Shape { heads: 4, ..PLAIN });
    let (_, anatomy) = analyse(&graph).unwrap();
    let qk = group(&anatomy, "qk.0");
    assert_eq!((qk.units(), qk.nest_count(), qk.sharing()), (32, 2, 2));
    assert_eq!(qk.bundle(0), [0, 4, 8, 12]);
    let sliced = cut(&graph, &[("qk.0", &[0, 4, 8, 12, 17, 21, 25, 29])]);
    assert_eq!(sliced.cuts.iter().map(|c| c.removed.len()).collect::<Vec<_>>(), [24, 12]);
}

#[test]
fn layers_that_rotate_by_the_same_position_ids_are_apart() {
    let graph = network(Shape { ids: true, layers: 2, ..PLAIN });
    let (_, anatomy) = analyse(&graph).unwrap();
    let qk: Vec<(usize, usize)> = anatomy.groups.iter().filter(|g| g.kind == Kind::Qk).map(|g| (g.layer, g.units())).collect();
    assert_eq!(qk, [(0, 16), (1, 16)]);
    assert_eq!(cut(&graph, &[("qk.0", &[0, 4, 8, 12]), ("qk.1", &[1, 5, 9, 13])]).cuts.len(), 4);
}

#[test]
fn heads_joined_with_the_batch_have_gates() {
    let graph = network(Shape { joined: true, ..PLAIN });
    let (_, anatomy) = analyse(&graph).unwrap();
    let qk = group(&anatomy, "qk.0");
    assert_eq!((qk.sites[0].axes.clone(), qk.sites[0].index.len()), (vec![0, 2], 16));
    assert_eq!(cut(&graph, &[("qk.0", &[0, 4, 9, 13])]).cuts.len(), 2);
}
