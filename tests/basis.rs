//! Which heads may be rotated, and that a rotation of all dims leaves the function as it is.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "these are tests")]

use bytes::Bytes;
use faer::Mat;
use vitrim::anatomy::Anatomy;
use vitrim::basis::{self, Basis, Rotatable};
use vitrim::compensate;
use vitrim::graph::build::{Builder, attr};
use vitrim::graph::{AttrValue, DType, Declared, DeclaredDim, Graph, Tensor, ValueId};
use vitrim::infer::Facts;
use vitrim::pipeline::analyse;

mod harness;
use harness::{Random, f32s, has_ort, relative_error, session};

const N: usize = 5;
const D: usize = 6;
const E: usize = 4;

/// What stands between the projections and the products.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Between {
    Nothing,
    /// One weight for q, k and v.
    Fused,
    /// A number per head multiplies q.
    ScaleOfHeads,
    /// A table `[N, E]` multiplies q, as positions do.
    TableOnQueries,
    /// A table `[N, E]` is added to k.
    TableAddedToKeys,
    /// q is normalized over its dims.
    NormOfQueries,
    /// Heads are mixed behind the softmax.
    HeadsMixed,
    /// What enters the output projection is normalized.
    NormBehind,
    /// What enters the output projection is multiplied by a gate.
    GateBehind,
    /// Two heads of queries share one of keys and values.
    SharedKeys,
}

struct Net {
    graph: Graph,
    facts: Facts,
    anatomy: Anatomy,
}

fn weights(b: &mut Builder<'_>, r: &mut Random, dims: &[usize]) -> ValueId {
    let count = dims.iter().product();
    b.constant(Tensor::f32(dims, &r.f32s(count, -0.7, 0.7)))
}

fn linear(b: &mut Builder<'_>, r: &mut Random, x: ValueId, from: usize, to: usize) -> ValueId {
    let (w, bias) = (weights(b, r, &[from, to]), weights(b, r, &[to]));
    let y = b.matmul(x, w);
    b.add(y, bias)
}

fn norm(b: &mut Builder<'_>, r: &mut Random, x: ValueId, width: usize) -> ValueId {
    let (scale, bias) = (weights(b, r, &[width]), weights(b, r, &[width]));
    b.op("LayerNormalization", &[x, scale, bias], vec![])
}

fn net(between: Between) -> Net {
    use Between::*;
    let mut r = Random(7);
    let (heads, key_heads) = (2usize, if between == SharedKeys { 1 } else { 2 });
    let mut g = Graph::new(9, vec![(String::new(), 17)], Bytes::new());
    let x = g.add_value("x");
    let dims = vec![DeclaredDim::Symbol("batch".into()), DeclaredDim::Size(N as i64), DeclaredDim::Size(D as i64)];
    let declared = Declared { dtype: Some(DType::F32), dims: Some(dims), extra: Bytes::new() };
    g.add_input(x, declared.clone());
    let mut b = Builder::new(&mut g, "n");
    let split = |b: &mut Builder<'_>, v: ValueId, heads: usize| {
        let v = b.reshape(v, &[0, N as i64, heads as i64, E as i64]);
        b.transpose(v, &[0, 2, 1, 3])
    };
    let [mut q, mut k, mut v] = if between == Fused {
        let packed = linear(&mut b, &mut r, x, D, 3 * heads * E);
        let packed = b.reshape(packed, &[0, N as i64, 3, heads as i64, E as i64]);
        let packed = b.transpose(packed, &[2, 0, 3, 1, 4]);
        [0, 1, 2].map(|i| {
            let i = b.constant(Tensor::i64_scalar(i));
            b.gather(packed, i, 0)
        })
    } else {
        [heads, key_heads, key_heads].map(|heads| {
            let y = linear(&mut b, &mut r, x, D, heads * E);
            split(&mut b, y, heads)
        })
    };
    match between {
        ScaleOfHeads => {
            let scale = weights(&mut b, &mut r, &[heads, 1, 1]);
            q = b.mul(q, scale);
        }
        TableOnQueries => {
            let table = weights(&mut b, &mut r, &[N, E]);
            q = b.mul(q, table);
        }
        TableAddedToKeys => {
            let table = weights(&mut b, &mut r, &[N, E]);
            k = b.add(k, table);
        }
        NormOfQueries => q = norm(&mut b, &mut r, q, E),
        SharedKeys => {
            for v in [&mut k, &mut v] {
                let shape = b.ints(&[1, heads as i64, N as i64, E as i64]);
                *v = b.op("Expand", &[*v, shape], vec![]);
            }
        }
        Nothing | Fused | HeadsMixed | NormBehind | GateBehind => {}
    }
    let k = b.transpose(k, &[0, 1, 3, 2]);
    let logits = b.matmul(q, k);
    let half = b.scalar(DType::F32, 0.5);
    let logits = b.mul(logits, half);
    let mut p = b.op("Softmax", &[logits], vec![attr("axis", AttrValue::Int(3))]);
    if between == HeadsMixed {
        let mix = weights(&mut b, &mut r, &[heads, heads]);
        let rows = b.transpose(p, &[0, 2, 3, 1]);
        let rows = b.matmul(rows, mix);
        p = b.transpose(rows, &[0, 3, 1, 2]);
    }
    let mixed = b.matmul(p, v);
    let mixed = b.transpose(mixed, &[0, 2, 1, 3]);
    let mut merged = b.reshape(mixed, &[0, N as i64, (heads * E) as i64]);
    match between {
        NormBehind => merged = norm(&mut b, &mut r, merged, heads * E),
        GateBehind => {
            let gate = linear(&mut b, &mut r, x, D, heads * E);
            let gate = b.op("Sigmoid", &[gate], vec![]);
            merged = b.mul(merged, gate);
        }
        _ => {}
    }
    let y = linear(&mut b, &mut r, merged, heads * E, D);
    let y = b.add(y, x);
    g.add_output(y, declared);
    g.sort();
    let (facts, anatomy) = analyse(&g).unwrap();
    Net { graph: g, facts, anatomy }
}

fn decided(net: &Net) -> (Vec<Rotatable>, Vec<basis::Refused>) {
    let (consumers, _) = compensate::consumers(&net.graph, &net.facts, &net.anatomy);
    basis::rotatable(&net.graph, &net.facts, &net.anatomy, &consumers)
}

fn run(graph: &Graph) -> Vec<f32> {
    let feeds = [("x".to_string(), f32s(&[3, N, D], Random(11).f32s(3 * N * D, -1.0, 1.0)))];
    session(graph).unwrap().run(&feeds).unwrap()[0].1.as_f32()
}

/// Matrices that are far from orthogonal, with what undoes them.
fn any_basis(r: &Rotatable, seed: u64) -> Basis {
    let mut random = Random(seed);
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for _ in 0..r.heads {
        let moments = Mat::from_fn(r.width, 3 * r.width, |_, _| random.uniform(-1.0, 1.0));
        let moment = &moments * moments.transpose();
        let other = Mat::from_fn(r.width, 3 * r.width, |_, _| random.uniform(-1.0, 1.0));
        let basis = match r.pair {
            basis::Pair::Logits { .. } => basis::of_logits(&[moment], &[&other * other.transpose()]),
            basis::Pair::Values { .. } => basis::of_values(&[moment], &[other]),
        };
        let basis = basis.unwrap();
        first.extend(basis.first);
        second.extend(basis.second);
    }
    Basis { first, second, carried: Vec::new() }
}

#[test]
fn what_commutes_is_rotated_and_what_does_not_is_refused_by_name() {
    use Between::*;
    let cases: [(Between, &[&str]); 10] = [
        (Nothing, &["qk.0", "vo.0"]),
        (Fused, &["qk.0", "vo.0"]),
        // It would commute; a walk that told heads from dims would have to see that.
        (ScaleOfHeads, &["vo.0"]),
        (TableOnQueries, &["vo.0"]),
        (TableAddedToKeys, &["qk.0", "vo.0"]),
        (NormOfQueries, &["vo.0"]),
        (HeadsMixed, &["qk.0", "vo.0"]),
        (NormBehind, &["qk.0"]),
        (GateBehind, &["qk.0"]),
        (SharedKeys, &["qk.0", "vo.0"]),
    ];
    for (between, expected) in cases {
        let net = net(between);
        let (found, refused) = decided(&net);
        let ids: Vec<&str> = found.iter().map(|r| r.group.as_str()).collect();
        assert_eq!(ids, expected, "{between:?}: {refused:?}");
        assert!(refused.iter().all(|r| !r.reason.is_empty()), "{between:?}: {refused:?}");
        if !has_ort() {
            continue;
        }
        let bases: Vec<Basis> = found.iter().zip(1..).map(|(r, seed)| any_basis(r, seed)).collect();
        let mut turned = net.graph.clone();
        let left = basis::rotate(&mut turned, &found.iter().zip(&bases).collect::<Vec<_>>());
        assert!(left.is_empty(), "{between:?}: {left:?}");
        let error = relative_error(&run(&turned), &run(&net.graph));
        assert!(error < 1e-5, "{between:?}: {error:.1e}");
        assert_ne!(vitrim::onnx::to_bytes(&turned).unwrap(), vitrim::onnx::to_bytes(&net.graph).unwrap(), "{between:?}");
    }
}
