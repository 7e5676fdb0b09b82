//! What the property test found, each in a graph of a few nodes: structures that axis rules took for something simpler than they are.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

use vitrim::anatomy::{Anatomy, Kind};
use vitrim::autodiff::interface::declare;
use vitrim::graph::build::{Builder, attr};
use vitrim::graph::{AttrValue, DType, Declared, DeclaredDim, Graph, Tensor, ValueId};
use vitrim::infer::Facts;
use vitrim::pipeline::analyse;
use vitrim::slice::{self, Sliced};

/// An input `x` `[batch, 4, 6]`, and a way to say products with weights.
struct Net {
    graph: Graph,
    x: ValueId,
}

impl Net {
    fn new() -> Self {
        let mut graph = Graph::new(8, vec![(String::new(), 17)], Default::default());
        let x = graph.add_value("x");
        let dims = vec![DeclaredDim::Symbol("batch".into()), DeclaredDim::Size(4), DeclaredDim::Size(6)];
        graph.add_input(x, declare(DType::F32, dims));
        Self { graph, x }
    }

    fn b(&mut self) -> Builder<'_> {
        Builder::new(&mut self.graph, "")
    }

    fn constant(&mut self, name: &str, dims: &[usize]) -> ValueId {
        let values: Vec<f32> = (0..dims.iter().product()).map(|i| ((i * 7 + name.len()) % 11) as f32 - 5.5).collect();
        self.graph.add_initializer(name, Tensor::f32(dims, &values))
    }

    /// `v W` with a weight called `name`.
    fn dense(&mut self, name: &str, v: ValueId, k: usize, n: usize) -> ValueId {
        let w = self.constant(name, &[k, n]);
        self.b().matmul(v, w)
    }

    /// `[batch, 4, H*E]` as `[batch, H, 4, E]`, the heads stored outside or inside of the widths.
    fn heads(&mut self, v: ValueId, heads: i64, width: i64, inside: bool) -> ValueId {
        let sizes = if inside { [0, 4, width, heads] } else { [0, 4, heads, width] };
        let v = self.b().reshape(v, &sizes);
        self.b().transpose(v, if inside { &[0, 3, 1, 2] } else { &[0, 2, 1, 3] })
    }

    /// Attention of q, k, v in heads, and an output projection `wo`.
    fn attend(&mut self, [q, k, v]: [ValueId; 3], heads: usize, width: usize) -> ValueId {
        let k = self.b().transpose(k, &[0, 1, 3, 2]);
        let logits = self.b().matmul(q, k);
        let p = self.b().op("Softmax", &[logits], vec![attr("axis", AttrValue::Int(-1))]);
        let o = self.b().matmul(p, v);
        let o = self.b().transpose(o, &[0, 2, 1, 3]);
        let o = self.b().reshape(o, &[0, 4, (heads * width) as i64]);
        self.dense("wo", o, heads * width, 6)
    }

    /// The graph with this output, and what is found in it.
    fn found(mut self, y: ValueId) -> (Graph, Facts, Anatomy) {
        self.graph.add_output(y, Declared { dtype: None, dims: None, extra: Default::default() });
        self.graph.sort();
        let (facts, anatomy) = analyse(&self.graph).unwrap();
        (self.graph, facts, anatomy)
    }
}

fn cut((graph, facts, anatomy): &(Graph, Facts, Anatomy), id: &str, kept: &[usize]) -> Sliced {
    slice::apply(graph, facts, anatomy, &[(id.to_string(), kept.to_vec())].into(), &analyse).unwrap()
}

fn dims(sliced: &Sliced, name: &str) -> Vec<usize> {
    sliced.graph.constant(sliced.graph.find(name).unwrap()).unwrap().dims
}

fn units(anatomy: &Anatomy, kind: Kind) -> Vec<usize> {
    anatomy.groups.iter().filter(|g| g.kind == kind).map(|g| g.units()).collect()
}

#[test]
fn heads_inside_of_a_width_keep_the_same_dims() {
    for (inside, expected) in [(false, 6), (true, 3)] {
        let mut net = Net::new();
        let parts = ["wq", "wk", "wv"].map(|name| {
            let v = net.dense(name, net.x, 6, 6);
            net.heads(v, 2, 3, inside && name == "wv")
        });
        let y = net.attend(parts, 2, 3);
        let (.., anatomy) = net.found(y);
        // 2 heads of 3 dims; inside, a dim is that of both heads, or what stays would not be a block of `E' x H`.
        assert_eq!((units(&anatomy, Kind::Qk), units(&anatomy, Kind::Vo)), (vec![6], vec![expected]));
    }
}

#[test]
fn keys_that_a_concat_repeats_go_with_their_queries() {
    let mut net = Net::new();
    let q = net.dense("wq", net.x, 6, 6);
    let q = net.heads(q, 2, 3, false);
    let [k, v] = ["wk", "wv"].map(|name| {
        let v = net.dense(name, net.x, 6, 3);
        let v = net.heads(v, 1, 3, false);
        let one = net.b().unsqueeze(v, &[2]);
        let both = net.b().concat(&[one, one], 2);
        net.b().reshape(both, &[0, 2, 4, 3])
    });
    let y = net.attend([q, k, v], 2, 3);
    let all = net.found(y);
    assert_eq!((units(&all.2, Kind::Qk), units(&all.2, Kind::Vo)), (vec![3], vec![3]));
    let sliced = cut(&all, "qk.0", &[0, 2]);
    assert_eq!([dims(&sliced, "wq"), dims(&sliced, "wk")], [[6, 4], [6, 2]]);
}

#[test]
fn heads_that_a_gather_repeats_stay_one_block() {
    let mut net = Net::new();
    let q = net.dense("wq", net.x, 6, 12);
    let q = net.heads(q, 4, 3, false);
    let [k, v] = ["wk", "wv"].map(|name| {
        let v = net.dense(name, net.x, 6, 6);
        let v = net.heads(v, 2, 3, false);
        let index = net.b().ints(&[0, 0, 1, 1]);
        net.b().gather(v, index, 1)
    });
    let y = net.attend([q, k, v], 4, 3);
    let all = net.found(y);
    // No head may keep another number of dims than the others: there would be no product of all at once.
    let (qk, vo) = (units(&all.2, Kind::Qk), units(&all.2, Kind::Vo));
    assert_eq!((qk.len(), vo.len()), (1, 1), "{qk:?} {vo:?}");
}

#[test]
fn a_slice_of_irregular_positions_becomes_a_gather() {
    let mut net = Net::new();
    let h = net.dense("w1", net.x, 6, 8);
    let lists = [1, i64::MAX, 2, 2].map(|n| net.b().ints(&[n]));
    let odd = net.b().op("Slice", &[h, lists[0], lists[1], lists[2], lists[3]], vec![]);
    let odd = net.b().op("Relu", &[odd], vec![]);
    let a = net.dense("w2", odd, 4, 6);
    let b = net.dense("w3", h, 8, 6);
    let y = net.b().add(a, b);
    let all = net.found(y);
    let group = all.2.groups.iter().find(|g| g.cuts.iter().any(|c| all.0.value(c.value).name() == "w2")).unwrap();
    let sliced = cut(&all, &group.id.clone(), &[0, 1, 3]);
    // Of `e o e o e o e o` one odd position is gone, so that the others are not every second one any more.
    assert_eq!([dims(&sliced, "w1"), dims(&sliced, "w2"), dims(&sliced, "w3")], [[6, 7], [3, 6], [7, 6]]);
    assert!(sliced.graph.nodes().any(|(_, n)| n.op() == "Gather"));
}

#[test]
fn what_is_summed_must_be_zero_without_the_unit() {
    for (function, is_offered) in [("Relu", true), ("Sigmoid", false)] {
        let mut net = Net::new();
        let h = net.dense("w1", net.x, 6, 8);
        let h = net.b().op(function, &[h], vec![]);
        let sum = net.b().reduce_sum(h, &[2], true);
        let scaled = net.b().mul(h, sum);
        let y = net.dense("w2", scaled, 8, 6);
        let (.., anatomy) = net.found(y);
        assert_eq!(units(&anatomy, Kind::Mlp) == [8], is_offered, "{function}");
        assert_eq!(anatomy.refused.iter().any(|r| r.op == "ReduceSum"), !is_offered);
    }
}

#[test]
fn nothing_is_divided_by_what_the_twin_zeroes() {
    let mut net = Net::new();
    let h = net.dense("w1", net.x, 6, 8);
    let scale = net.constant("scale", &[8]);
    let h = net.b().div(h, scale);
    let y = net.dense("w2", h, 8, 6);
    let (.., anatomy) = net.found(y);
    assert!(anatomy.groups.is_empty());
    assert!(anatomy.refused.iter().any(|r| r.op == "Div" && r.reason.contains("zero")), "{:?}", anatomy.refused);
}

#[test]
fn a_product_of_a_value_with_itself_laid_flat_is_refused() {
    let mut net = Net::new();
    let h = net.dense("w1", net.x, 6, 3);
    let turned = net.b().transpose(h, &[0, 2, 1]);
    let gram = net.b().matmul(turned, h);
    let flat = net.b().reshape(gram, &[0, 9]);
    let y = net.dense("w2", flat, 9, 6);
    let (.., anatomy) = net.found(y);
    assert!(anatomy.groups.is_empty());
    assert!(anatomy.refused.iter().any(|r| r.reason.contains("twice")), "{:?}", anatomy.refused);
}

#[test]
fn a_weight_that_is_contracted_once_is_one_weight_for_all() {
    let mut net = Net::new();
    let (x, w) = (net.x, net.constant("w", &[6, 8]));
    let h = net.b().matmul(x, w);
    let h = net.b().op("Relu", &[h], vec![]);
    let turned = net.b().transpose(w, &[1, 0]);
    let y = net.b().matmul(h, turned);
    let all = net.found(y);
    for group in all.2.groups.iter() {
        let sliced = cut(&all, &group.id, &[0, 3]);
        assert!(sliced.cloned.is_empty(), "{:?}", sliced.cloned);
        assert_eq!(dims(&sliced, "w"), [6, 2]);
    }
    assert!(all.2.groups.len() <= 1);
}
