//! Attention as hierarchical, windowed and hybrid models spell it: what is found is read off the structure.

use bytes::Bytes;
use vitrim::anatomy::{Anatomy, Kind};
use vitrim::graph::build::{Builder, attr};
use vitrim::graph::{AttrValue, DType, Declared, DeclaredDim, Graph, Tensor, ValueId};
use vitrim::pipeline::analyse;

const D: usize = 6;
const H: usize = 2;
const E: usize = 4;

/// A network `x + block(normed x)` between an input and an output of the same shape.
fn residual(dims: &[i64], block: impl FnOnce(&mut Layer<'_>, ValueId) -> ValueId) -> Anatomy {
    let mut graph = Graph::new(8, vec![(String::new(), 17)], Bytes::new());
    let batch = std::iter::once(DeclaredDim::Symbol("batch".into()));
    let dims = batch.chain(dims.iter().map(|d| DeclaredDim::Size(*d))).collect();
    let declared = Declared { dtype: Some(DType::F32), dims: Some(dims), extra: Bytes::new() };
    let x = graph.add_value("x");
    graph.add_input(x, declared.clone());
    let mut layer = Layer { b: Builder::new(&mut graph, "v."), seed: 0 };
    let (scale, shift) = (layer.weight(&[D]), layer.weight(&[D]));
    let normed = layer.b.op("LayerNormalization", &[x, scale, shift], vec![]);
    let out = block(&mut layer, normed);
    let y = layer.b.add(x, out);
    graph.add_output(y, declared);
    graph.sort();
    analyse(&graph).unwrap().1
}

struct Layer<'a> {
    b: Builder<'a>,
    seed: usize,
}

impl Layer<'_> {
    fn weight(&mut self, dims: &[usize]) -> ValueId {
        self.seed += 1;
        let count = dims.iter().product::<usize>();
        let values: Vec<f32> = (0..count).map(|i| ((i * 7 + self.seed * 3) % 11) as f32 - 5.0).collect();
        self.b.constant(Tensor::f32(dims, &values))
    }

    fn linear(&mut self, x: ValueId, from: usize, to: usize) -> ValueId {
        let weight = self.weight(&[from, to]);
        self.b.matmul(x, weight)
    }

    fn softmax(&mut self, x: ValueId) -> ValueId {
        self.b.op("Softmax", &[x], vec![attr("axis", AttrValue::Int(-1))])
    }

    fn heads(&mut self, x: ValueId, tokens: i64) -> ValueId {
        let split = self.b.reshape(x, &[-1, tokens, H as i64, E as i64]);
        self.b.transpose(split, &[0, 2, 1, 3])
    }

    /// q, k and v of a fused projection, each `[rows, H, tokens, E]`.
    fn qkv(&mut self, x: ValueId, tokens: i64) -> [ValueId; 3] {
        let packed = self.linear(x, D, 3 * H * E);
        let split = self.b.reshape(packed, &[-1, tokens, 3, H as i64, E as i64]);
        let first = self.b.transpose(split, &[2, 0, 3, 1, 4]);
        [0, 1, 2].map(|i| {
            let index = self.b.constant(Tensor::i64_scalar(i));
            self.b.gather(first, index, 0)
        })
    }

    fn logits(&mut self, q: ValueId, k: ValueId) -> ValueId {
        let turned = self.b.transpose(k, &[0, 1, 3, 2]);
        self.b.matmul(q, turned)
    }

    /// The output projection of `[rows, H, tokens, E]`.
    fn merged(&mut self, x: ValueId, tokens: i64) -> ValueId {
        let back = self.b.transpose(x, &[0, 2, 1, 3]);
        let flat = self.b.reshape(back, &[-1, tokens, (H * E) as i64]);
        self.linear(flat, H * E, D)
    }

    /// The axis rolled by two positions.
    fn rolled(&mut self, x: ValueId, axis: i64) -> ValueId {
        let (head, tail) = (self.b.slice(x, &[2], &[i64::MAX], &[axis]), self.b.slice(x, &[0], &[2], &[axis]));
        self.b.concat(&[head, tail], axis)
    }
}

fn units(anatomy: &Anatomy, kind: Kind) -> Vec<usize> {
    anatomy.groups.iter().filter(|g| g.kind == kind).map(|g| g.units()).collect()
}

fn found(anatomy: &Anatomy) -> [Vec<usize>; 4] {
    [Kind::Qk, Kind::Vo, Kind::Head, Kind::Mlp].map(|kind| units(anatomy, kind))
}

#[test]
fn rolled_windows_keep_queries_keys_and_values_apart() {
    // A grid of 16 x 16 in windows of 4 x 4, rolled by 2: more parts than are told apart, none of which can be cut. The mask has an
    // entry for each window, stretched over heads.
    let anatomy = residual(&[16, 16, D as i64], |l, x| {
        let rows = l.rolled(x, 1);
        let rolled = l.rolled(rows, 2);
        let grid = l.b.reshape(rolled, &[-1, 4, 4, 4, 4, D as i64]);
        let apart = l.b.transpose(grid, &[0, 1, 3, 2, 4, 5]);
        let windows = l.b.reshape(apart, &[-1, 16, D as i64]);
        let [q, k, v] = l.qkv(windows, 16);
        let logits = l.logits(q, k);
        let mask = l.weight(&[1, 16, 1, 16, 16]);
        let target = l.b.ints(&[1, 16, H as i64, 16, 16]);
        let mask = l.b.op("Expand", &[mask, target], vec![]);
        let by_image = l.b.reshape(logits, &[-1, 16, H as i64, 16, 16]);
        let masked = l.b.add(by_image, mask);
        let by_window = l.b.reshape(masked, &[-1, H as i64, 16, 16]);
        let p = l.softmax(by_window);
        let mixed = l.b.matmul(p, v);
        let out = l.merged(mixed, 16);
        let windows = l.b.reshape(out, &[-1, 4, 4, 4, 4, D as i64]);
        let grid = l.b.transpose(windows, &[0, 1, 3, 2, 4, 5]);
        l.b.reshape(grid, &[-1, 16, 16, D as i64])
    });
    assert_eq!(found(&anatomy), [vec![H * E], vec![H * E], vec![H], vec![]]);
    let refused: Vec<Kind> = anatomy.refused.iter().map(|r| r.kind).collect();
    assert_eq!(refused, [Kind::Token], "windows are no heads");
}

#[test]
fn mixed_heads_are_three_groups() {
    let anatomy = residual(&[5, D as i64], |l, x| {
        let [q, k, v] = l.qkv(x, 5);
        let logits = l.logits(q, k);
        let last = l.b.transpose(logits, &[0, 2, 3, 1]);
        let before = l.linear(last, H, 3);
        let p = l.b.op("Softmax", &[before], vec![attr("axis", AttrValue::Int(2))]);
        let after = l.linear(p, 3, H);
        let first = l.b.transpose(after, &[0, 3, 1, 2]);
        let mixed = l.b.matmul(first, v);
        l.merged(mixed, 5)
    });
    let [qk, vo, mut head, mlp] = found(&anatomy);
    head.sort_unstable();
    assert_eq!([qk, vo, head, mlp], [vec![H * E], vec![H * E], vec![H, H, 3], vec![]]);
}

#[test]
fn logits_may_come_from_one_weight() {
    // Outlook attention: a weight says how each token mixes its 5 neighbours.
    let anatomy = residual(&[5, D as i64], |l, x| {
        let (values, logits) = (l.linear(x, D, H * E), l.linear(x, D, H * 5));
        let (v, logits) = (l.heads(values, 5), l.b.reshape(logits, &[-1, 5, H as i64, 5]));
        let logits = l.b.transpose(logits, &[0, 2, 1, 3]);
        let p = l.softmax(logits);
        let mixed = l.b.matmul(p, v);
        l.merged(mixed, 5)
    });
    assert_eq!(found(&anatomy), [vec![], vec![H * E], vec![H], vec![]]);
}

#[test]
fn tables_of_relative_positions_belong_to_their_layer() {
    // Logits are the sum of two products; the second is with a table that an MLP makes of positions.
    let anatomy = residual(&[5, D as i64], |l, x| {
        let [q, k, v] = l.qkv(x, 5);
        let positions = l.weight(&[5, 2]);
        let hidden = l.linear(positions, 2, 7);
        let hidden = l.b.op("Relu", &[hidden], vec![]);
        let table = l.linear(hidden, 7, H);
        let table = l.b.transpose(table, &[1, 0]);
        let bias = l.b.reshape(table, &[1, H as i64, 1, 5]);
        let relative = l.weight(&[E, 5]);
        let (content, by_place) = (l.logits(q, k), l.b.matmul(q, relative));
        let sum = l.b.add(content, by_place);
        let logits = l.b.add(sum, bias);
        let p = l.softmax(logits);
        let mixed = l.b.matmul(p, v);
        l.merged(mixed, 5)
    });
    // One table for all heads: they keep the same dims of queries.
    assert_eq!(found(&anatomy), [vec![E], vec![H * E], vec![H], vec![7]]);
    assert_eq!(anatomy.attention.len(), 1);
}

#[test]
fn cross_covariance_has_free_query_rows() {
    // Softmax over E x E: rows of the matrix become the output, columns meet the values' dims.
    let anatomy = residual(&[5, D as i64], |l, x| {
        let [q, k, v] = l.qkv(x, 5).map(|t| l.b.transpose(t, &[0, 1, 3, 2]));
        let logits = l.logits(q, k);
        let p = l.softmax(logits);
        let mixed = l.b.matmul(p, v);
        let back = l.b.transpose(mixed, &[0, 3, 1, 2]);
        let flat = l.b.reshape(back, &[-1, 5, (H * E) as i64]);
        l.linear(flat, H * E, D)
    });
    assert_eq!(found(&anatomy), [vec![], vec![H * E], vec![H], vec![]]);
}

#[test]
fn heads_that_are_merged_inside_their_dims_keep_the_same_dims() {
    // The output projection reads `E x H`: dims of unlike rank in two heads would trade places.
    let anatomy = residual(&[5, D as i64], |l, x| {
        let [q, k, v] = l.qkv(x, 5);
        let logits = l.logits(q, k);
        let p = l.softmax(logits);
        let mixed = l.b.matmul(p, v);
        let back = l.b.transpose(mixed, &[0, 2, 3, 1]);
        let flat = l.b.reshape(back, &[-1, 5, (H * E) as i64]);
        l.linear(flat, H * E, D)
    });
    assert_eq!(found(&anatomy), [vec![H * E], vec![E], vec![H], vec![]]);
}

/// What stands around two convolutions of kernel 1 with an activation in between.
#[derive(Clone, Copy, Debug)]
enum Between {
    /// Nothing else.
    Nothing,
    /// A convolution of each channel with its neighbours.
    Depthwise,
    /// A mean over all positions in front, as in squeeze and excitation.
    Mean,
}

fn convolved(between: Between) -> Anatomy {
    const M: usize = 5;
    residual(&[D as i64, 4, D as i64], |layer, x| {
        let conv = |layer: &mut Layer<'_>, x, dims: [usize; 4], attrs| {
            let weight = layer.weight(&dims);
            layer.b.op("Conv", &[x, weight], attrs)
        };
        let x = if matches!(between, Between::Mean) { layer.b.op("GlobalAveragePool", &[x], vec![]) } else { x };
        let hidden = conv(layer, x, [M, D, 1, 1], vec![]);
        let hidden = layer.b.op("Relu", &[hidden], vec![]);
        let attrs = vec![attr("group", AttrValue::Int(M as i64)), attr("pads", AttrValue::Ints(vec![1; 4]))];
        let hidden = if matches!(between, Between::Depthwise) { conv(layer, hidden, [M, 1, 3, 3], attrs) } else { hidden };
        conv(layer, hidden, [D, M, 1, 1], vec![])
    })
}

#[test]
fn convolutions_of_one_position_are_the_linear_layers_of_an_mlp() {
    let cases = [(Between::Nothing, Kind::Mlp), (Between::Depthwise, Kind::Channel), (Between::Mean, Kind::Channel)];
    for (between, kind) in cases {
        let found: Vec<_> = convolved(between).groups.iter().map(|g| (g.kind, g.units())).collect();
        assert_eq!(found, [(kind, 5)], "{between:?}");
    }
}
