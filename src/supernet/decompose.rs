//! Fused operators of ONNX Runtime (com.microsoft) written out in standard ones, so that a training graph runs everywhere and
//! every gradient is known.
//!
//! Example: `BiasGelu(x, b)` becomes Add, and GELU by Erf; `Attention` becomes MatMul, Add, Split, and the products and softmax
//! of every head. It is done before the anatomy is taken: groups then have the same ids and units as in the fused model.
//! Invariant: graph inputs and outputs keep name and content. A use that is not written here (past keys, packed queries) is left
//! as it is, and the gradient sweep names it; so is an operator without a kernel for processors, which there is nothing to hold
//! against. Source: docs/ContribOperators.md of microsoft/onnxruntime.

use super::decompose_attention as attention;
use crate::anatomy::FusedKeys;
use crate::graph::build::{Builder, attr};
use crate::graph::{AttrValue, DType, Graph, Id, Node, NodeId, Tensor, Use, ValueId};
use crate::infer::{self, Dim, Facts, InferError};
use crate::ops::microsoft::matmul;
use std::collections::BTreeMap;
use std::f32::consts::FRAC_1_SQRT_2;

/// What was written out.
#[derive(Clone, Debug, Default)]
pub struct Apart {
    /// Labels of the nodes.
    pub labels: Vec<String>,
    /// The fused node of the model that each new node stands for a part of.
    origin: BTreeMap<NodeId, NodeId>,
    /// Copies of constants that other nodes read too.
    copies: BTreeMap<ValueId, ValueId>,
}

/// Whether there is anything to write out.
pub fn applies(graph: &Graph) -> bool {
    graph.nodes().any(|(_, node)| is_fused(node))
}

fn is_fused(node: &Node) -> bool {
    node.domain() == "com.microsoft" || (node.domain().is_empty() && node.op() == "SimplifiedLayerNormalization")
}

/// Writes out every fused operator that has a form here.
///
/// Errors: the model's shapes contradict each other.
pub fn run(graph: &mut Graph) -> Result<Apart, InferError> {
    let mut apart = Apart::default();
    // What stands behind a fused node without a record has no known rank before that node is written out.
    loop {
        let facts = infer::facts(graph)?;
        let before = apart.labels.len();
        for id in graph.order().to_vec() {
            let (label, first) = (graph.label(id), graph.node_capacity());
            if write_out(graph, &facts, id, &mut apart.copies).is_some() {
                apart.labels.push(label);
                apart.origin.extend((first..graph.node_capacity()).map(|new| (NodeId::new(new), id)));
            }
        }
        // Nodes of an attempt that was given up are dead too.
        graph.remove_dead(&|_, _| false);
        graph.sort();
        if apart.labels.len() == before {
            return Ok(apart);
        }
    }
}

/// Gives every fused attention that stays so something that is added to its logits, so that a token mask can be added there: zeros, or
/// what the node has, as numbers of the full size. Says whether anything changed.
pub fn open_masks<'a>(graph: &mut Graph, facts: &Facts, fused: impl Iterator<Item = &'a FusedKeys>) -> bool {
    let mut changed = false;
    for f in fused {
        let size = |(v, axis): (ValueId, usize)| facts.shape(v).and_then(|s| s.get(axis)).and_then(Dim::size);
        let (Some(queries), Some(keys)) = (size(f.queries), size(f.keys)) else { continue };
        let dtype = facts.get(f.queries.0).dtype.unwrap_or(DType::F32);
        let given = graph.node(f.node).input(f.bias);
        let is_whole = |v: ValueId| facts.shape(v).and_then(<[_]>::last).is_some_and(|d| d.size() == Some(keys));
        let is_bool = |v: ValueId| facts.get(v).dtype == Some(DType::Bool);
        if given.is_some_and(|v| is_whole(v) && !is_bool(v)) {
            continue;
        }
        let mut b = Builder::new(graph, "apart.");
        let shape = b.ints(&[1, 1, queries as i64, keys as i64]);
        // Computed, so that it is nobody's weight.
        let zero = Tensor::new(dtype, vec![1], Default::default()).with_f32s(&[0.0]);
        let zeros = b.op("ConstantOfShape", &[shape], vec![attr("value", AttrValue::Tensor(zero))]);
        let bias = match given {
            None => zeros,
            Some(v) if is_bool(v) => {
                let hidden = b.scalar(dtype, if dtype == DType::F16 { -3e4 } else { -1e30 });
                b.op("Where", &[v, zeros, hidden], vec![])
            }
            Some(v) => b.add(v, zeros),
        };
        graph.set_input(Use { node: f.node, slot: f.bias }, Some(bias));
        changed = true;
    }
    graph.sort();
    changed
}

/// `model` with the constants that `after` has where `before`, its written-out form, has those of the model.
///
/// Errors: a constant that the model reads in one place would have to be two.
pub fn put_back(model: &Graph, apart: &Apart, before: &Graph, after: &Graph) -> Result<Graph, String> {
    let mut out = model.clone();
    let constants: Vec<ValueId> = model.values().map(|(v, _)| v).filter(|v| model.is_constant(*v)).collect();
    for v in constants {
        let reads = reads_of(model, apart, before, after, v)?;
        let mut made: Vec<ValueId> = Vec::new();
        for now in reads.values().filter(|now| **now != v) {
            if !made.contains(now) {
                made.push(*now);
            }
        }
        let all = reads.len() == model.value(v).users().len() && !model.outputs().contains(&v);
        if let ([now], true) = (&made[..], all && reads.values().all(|now| *now != v)) {
            set_changed(&mut out, v, after.constant(*now));
            continue;
        }
        set_changed(&mut out, v, after.constant(v).filter(|_| reads.values().any(|now| *now == v)));
        for now in made {
            let Some(tensor) = after.constant(now) else { return Err("a constant is computed".to_string()) };
            let copy = out.add_initializer(model.value(v).name(), tensor);
            for (at, _) in reads.iter().filter(|(_, x)| **x == now) {
                out.set_input(*at, Some(copy));
            }
        }
    }
    Ok(out)
}

fn set_changed(graph: &mut Graph, v: ValueId, tensor: Option<Tensor>) {
    if let Some(tensor) = tensor
        && graph.constant(v).is_none_or(|old| old.bytes != tensor.bytes)
    {
        graph.set_constant(v, tensor);
    }
}

/// The constant of `after` that each reader of a constant of the model reads, those with the content of `v` being `v`.
fn reads_of(model: &Graph, apart: &Apart, before: &Graph, after: &Graph, v: ValueId) -> Result<BTreeMap<Use, ValueId>, String> {
    let copies = apart.copies.iter().filter(|(_, source)| **source == v).map(|(copy, _)| *copy);
    let mut reads: BTreeMap<Use, ValueId> = BTreeMap::new();
    for source in std::iter::once(v).chain(copies) {
        for at in before.value(source).users() {
            let Some(mut now) = after.node(at.node).input(at.slot) else { continue };
            if now != v && after.constant(now).map(|t| t.bytes) == model.constant(v).map(|t| t.bytes) {
                now = v;
            }
            let node = apart.origin.get(&at.node).copied().unwrap_or(at.node);
            let slots = (0..model.node(node).inputs().len()).filter(|slot| model.node(node).input(*slot) == Some(v));
            for at in slots.map(|slot| Use { node, slot }) {
                if reads.insert(at, now).is_some_and(|other| other != now) {
                    return Err(format!("'{}' would be two constants in {}", model.value(v).name(), model.label(node)));
                }
            }
        }
    }
    Ok(reads)
}

/// A fused node and the builder of what replaces it.
pub(super) struct Fused<'a> {
    pub(super) b: Builder<'a>,
    pub(super) facts: &'a Facts,
    pub(super) node: Node,
    copies: &'a mut BTreeMap<ValueId, ValueId>,
}

impl Fused<'_> {
    /// The constant at an input as this node's own, so that it is not tied to other readers by what is picked from it.
    pub(super) fn own(&mut self, value: ValueId) -> ValueId {
        let graph = &mut self.b.graph;
        let Some(tensor) = graph.constant(value).filter(|_| graph.value(value).users().len() > 1) else { return value };
        let name = graph.value(value).name().to_string();
        let copy = graph.add_initializer(&name, tensor);
        self.copies.insert(copy, value);
        copy
    }

    pub(super) fn input(&self, slot: usize) -> Option<ValueId> {
        self.node.input(slot)
    }
    /// Whether something reads output `slot`.
    pub(super) fn is_read(&self, slot: usize) -> bool {
        let graph = &self.b.graph;
        self.node.output(slot).is_some_and(|v| !graph.value(v).users().is_empty() || graph.outputs().contains(&v))
    }
    pub(super) fn int(&self, name: &str, default: i64) -> i64 {
        self.node.attr_int(name).unwrap_or(default)
    }
    pub(super) fn float(&self, name: &str, default: f32) -> f32 {
        self.node.attr_float(name).unwrap_or(default)
    }
    /// Rank of a value, where it is known. Values made here have none.
    pub(super) fn rank(&self, value: ValueId) -> Option<usize> {
        self.facts.get(value).rank()
    }
    /// Element type of the node's first input.
    pub(super) fn dtype(&self) -> DType {
        let first = self.node.inputs().iter().flatten().find_map(|v| self.facts.get(*v).dtype.filter(|d| d.is_float()));
        first.unwrap_or(DType::F32)
    }
    pub(super) fn scalar(&mut self, value: f32) -> ValueId {
        let dtype = self.dtype();
        self.b.scalar(dtype, value)
    }
    pub(super) fn scaled(&mut self, x: ValueId, factor: f32) -> ValueId {
        let factor = self.scalar(factor);
        self.b.mul(x, factor)
    }
    pub(super) fn shifted(&mut self, x: ValueId, term: f32) -> ValueId {
        let term = self.scalar(term);
        self.b.add(x, term)
    }
    pub(super) fn unary(&mut self, op: &str, x: ValueId) -> ValueId {
        self.b.op(op, &[x], vec![])
    }
}

/// Replaces one fused node; `None` where it is none, or is used in a way that is not written here.
fn write_out(graph: &mut Graph, facts: &Facts, id: NodeId, copies: &mut BTreeMap<ValueId, ValueId>) -> Option<()> {
    let node = graph.node(id).clone();
    if !is_fused(&node) {
        return None;
    }
    let mut f = Fused { b: Builder::new(graph, "apart."), facts, node: node.clone(), copies };
    let outputs = match node.op() {
        "Gelu" => vec![Some(gelu(&mut f, node.input(0)?))],
        "BiasGelu" => {
            let x = f.b.add(node.input(0)?, node.input(1)?);
            vec![Some(gelu(&mut f, x))]
        }
        "FastGelu" => vec![Some(fast_gelu(&mut f)?)],
        "QuickGelu" => {
            let (x, alpha) = (node.input(0)?, f.float("alpha", 1.702));
            let inner = f.scaled(x, alpha);
            let gate = f.unary("Sigmoid", inner);
            vec![Some(f.b.mul(x, gate))]
        }
        "SkipLayerNormalization" => skip_norm(&mut f, Norm::Layer)?,
        "SkipSimplifiedLayerNormalization" => skip_norm(&mut f, Norm::Rms)?,
        "SimplifiedLayerNormalization" if !f.is_read(1) => {
            let (x, scale) = (node.input(0)?, node.input(1)?);
            vec![Some(rms_norm(&mut f, x, scale))]
        }
        "EmbedLayerNormalization" => embed_norm(&mut f)?,
        "FusedMatMul" | "TransposeMatMul" => vec![Some(fused_matmul(&mut f)?)],
        "FusedGemm" => vec![Some(fused_gemm(&mut f)?)],
        "FusedConv" => vec![Some(fused_conv(&mut f)?)],
        "Attention" => vec![Some(attention::attention(&mut f)?)],
        "MultiHeadAttention" => vec![Some(attention::multi_head(&mut f)?)],
        "GroupQueryAttention" => vec![Some(attention::grouped_query(&mut f)?)],
        "RotaryEmbedding" => vec![Some(attention::rotary_embedding(&mut f)?)],
        _ => return None,
    };
    replace(graph, id, &outputs);
    Some(())
}

fn replace(graph: &mut Graph, id: NodeId, outputs: &[Option<ValueId>]) {
    let old: Vec<Option<ValueId>> = graph.node(id).outputs().to_vec();
    for (old, new) in old.into_iter().zip(outputs) {
        let (Some(old), Some(new)) = (old, new) else { continue };
        graph.replace_uses(old, *new);
        if graph.outputs().contains(&old) {
            graph.move_output(old, *new);
        }
    }
    graph.remove_node(id);
}

/// `x/2 (1 + erf(x / sqrt 2))`
fn gelu(f: &mut Fused<'_>, x: ValueId) -> ValueId {
    let u = f.scaled(x, FRAC_1_SQRT_2);
    let erf = f.unary("Erf", u);
    let above = f.shifted(erf, 1.0);
    let product = f.b.mul(x, above);
    f.scaled(product, 0.5)
}

/// `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`
fn fast_gelu(f: &mut Fused<'_>) -> Option<ValueId> {
    let mut x = f.input(0)?;
    if let Some(bias) = f.input(1) {
        x = f.b.add(x, bias);
    }
    let square = f.b.mul(x, x);
    let part = f.scaled(square, 0.044_715);
    let factor = f.shifted(part, 1.0);
    let inner = f.b.mul(x, factor);
    let inner = f.scaled(inner, (2.0 / std::f32::consts::PI).sqrt());
    let tanh = f.unary("Tanh", inner);
    let above = f.shifted(tanh, 1.0);
    let product = f.b.mul(x, above);
    Some(f.scaled(product, 0.5))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Norm {
    Layer,
    Rms,
}

/// Outputs: normalized sum, nothing, nothing, sum. Inputs: input, skip, gamma, beta (of a layer norm), bias.
fn skip_norm(f: &mut Fused<'_>, norm: Norm) -> Option<Vec<Option<ValueId>>> {
    if f.is_read(1) || f.is_read(2) {
        return None;
    }
    let (x, skip, gamma) = (f.input(0)?, f.input(1)?, f.input(2)?);
    let (beta, bias) = if norm == Norm::Layer { (f.input(3), f.input(4)) } else { (None, f.input(3)) };
    let mut sum = f.b.add(x, skip);
    if let Some(bias) = bias {
        sum = f.b.add(sum, bias);
    }
    let y = if norm == Norm::Layer { layer_norm(f, sum, gamma, beta) } else { rms_norm(f, sum, gamma) };
    Some(vec![Some(y), None, None, Some(sum)])
}

/// One node where the opset has it or the model itself uses it; written out otherwise.
fn layer_norm(f: &mut Fused<'_>, x: ValueId, gamma: ValueId, beta: Option<ValueId>) -> ValueId {
    let epsilon = f.float("epsilon", 1e-12);
    let used = f.b.graph.nodes().any(|(_, n)| n.op() == "LayerNormalization" && n.domain().is_empty());
    if f.b.opset() >= 17 || used {
        let inputs: Vec<ValueId> = [Some(x), Some(gamma), beta].into_iter().flatten().collect();
        let attrs = vec![attr("axis", AttrValue::Int(-1)), attr("epsilon", AttrValue::Float(epsilon))];
        return f.b.op("LayerNormalization", &inputs, attrs);
    }
    let mean = f.b.reduce_mean(x, &[-1], true);
    let centred = f.b.sub(x, mean);
    let square = f.b.mul(centred, centred);
    let variance = f.b.reduce_mean(square, &[-1], true);
    let positive = f.shifted(variance, epsilon);
    let root = f.unary("Sqrt", positive);
    let normal = f.b.div(centred, root);
    let scaled = f.b.mul(normal, gamma);
    beta.map_or(scaled, |beta| f.b.add(scaled, beta))
}

/// `x / sqrt(mean(x^2) + eps) * gamma` over the last axis.
fn rms_norm(f: &mut Fused<'_>, x: ValueId, gamma: ValueId) -> ValueId {
    let epsilon = f.float("epsilon", 1e-5);
    let square = f.b.mul(x, x);
    let mean = f.b.reduce_mean(square, &[-1], true);
    let positive = f.shifted(mean, epsilon);
    let root = f.unary("Sqrt", positive);
    let normal = f.b.div(x, root);
    f.b.mul(normal, gamma)
}

/// Outputs: normalized sum of word, position and segment rows; number of ones in each row of the mask; the sum.
fn embed_norm(f: &mut Fused<'_>) -> Option<Vec<Option<ValueId>>> {
    let (ids, words, positions) = (f.input(0)?, f.input(2)?, f.input(3)?);
    let (gamma, beta) = (f.input(5)?, f.input(6)?);
    if f.int("mask_index_type", 1) != 1 && f.is_read(1) {
        return None;
    }
    let word = f.b.gather(words, ids, 0);
    let position = match f.input(8) {
        Some(places) => f.b.gather(positions, places, 0),
        None => {
            let shape = f.b.shape_of(ids);
            let length = f.b.slice(shape, &[1], &[2], &[0]);
            let (start, axis) = (f.b.ints(&[0]), f.b.ints(&[0]));
            f.b.op("Slice", &[positions, start, length, axis], vec![])
        }
    };
    let mut sum = f.b.add(word, position);
    if let (Some(kinds), Some(table)) = (f.input(1), f.input(4)) {
        let rows = f.b.gather(table, kinds, 0);
        sum = f.b.add(sum, rows);
    }
    let y = layer_norm(f, sum, gamma, Some(beta));
    let count = match f.input(7) {
        Some(mask) if f.is_read(1) => Some(f.b.reduce_sum(mask, &[1], false)),
        // Without a mask the count is 0, which is what the fused kernel writes.
        None if f.is_read(1) => {
            let nothing = f.b.sub(ids, ids);
            Some(f.b.reduce_sum(nothing, &[1], false))
        }
        _ => None,
    };
    Some(vec![Some(y), count, Some(sum)])
}

/// `alpha * op(A) x op(B)`
fn fused_matmul(f: &mut Fused<'_>) -> Option<ValueId> {
    let mut sides = [f.input(0)?, f.input(1)?];
    for (side, letter) in sides.iter_mut().zip(['A', 'B']) {
        let perm = matmul::order(&f.node, f.rank(*side)?, letter);
        if perm.windows(2).any(|w| w[0] > w[1]) {
            *side = f.b.transpose(*side, &perm);
        }
    }
    let product = f.b.matmul(sides[0], sides[1]);
    let alpha = f.float("alpha", 1.0);
    Some(if alpha == 1.0 { product } else { f.scaled(product, alpha) })
}

fn fused_gemm(f: &mut Fused<'_>) -> Option<ValueId> {
    let kept = ["alpha", "beta", "transA", "transB"];
    let attrs = f.node.attrs().iter().filter(|a| kept.contains(&a.name.as_str())).cloned().collect();
    let inputs: Vec<ValueId> = f.node.inputs().iter().flatten().copied().collect();
    let y = f.b.op("Gemm", &inputs, attrs);
    let parameter = |f: &Fused<'_>, name: &str| f.node.attr_float(name);
    let (alpha, beta) = (parameter(f, "activation_alpha"), parameter(f, "activation_beta"));
    activation(f, y, alpha, beta)
}

fn fused_conv(f: &mut Fused<'_>) -> Option<ValueId> {
    let extra = ["activation", "activation_params"];
    let attrs = f.node.attrs().iter().filter(|a| !extra.contains(&a.name.as_str())).cloned().collect();
    let inputs: Vec<ValueId> = f.node.inputs().iter().take(3).flatten().copied().collect();
    let mut y = f.b.op("Conv", &inputs, attrs);
    if let Some(sum) = f.input(3) {
        y = f.b.add(y, sum);
    }
    let parameters = match f.node.attr("activation_params") {
        Some(AttrValue::Floats(v)) => v.clone(),
        _ => Vec::new(),
    };
    activation(f, y, parameters.first().copied(), parameters.get(1).copied())
}

fn activation(f: &mut Fused<'_>, y: ValueId, alpha: Option<f32>, beta: Option<f32>) -> Option<ValueId> {
    let Some(name) = f.node.attr_str("activation").map(str::to_string).filter(|n| !n.is_empty()) else { return Some(y) };
    let named = |key: &str, value: Option<f32>| value.map(|v| attr(key, AttrValue::Float(v)));
    Some(match name.as_str() {
        "Relu" | "Tanh" | "Sigmoid" => f.unary(&name, y),
        "LeakyRelu" => f.b.op(&name, &[y], named("alpha", alpha).into_iter().collect()),
        "HardSigmoid" => f.b.op(&name, &[y], [named("alpha", alpha), named("beta", beta)].into_iter().flatten().collect()),
        "Clip" => {
            let (low, high) = (f.scalar(alpha?), f.scalar(beta?));
            f.b.op(&name, &[y, low, high], vec![])
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{Declared, DeclaredDim, NewNode};
    use bytes::Bytes;

    /// Two attentions over x [b, 3, 4], whose biases are one constant.
    fn two_layers() -> Graph {
        let mut g = Graph::new(8, vec![(String::new(), 17), ("com.microsoft".into(), 1)], Bytes::new());
        let dims = [DeclaredDim::Symbol("b".into()), DeclaredDim::Size(3), DeclaredDim::Size(4)];
        let mut x = g.add_value("x");
        g.add_input(x, Declared { dtype: Some(DType::F32), dims: Some(dims.to_vec()), extra: Bytes::new() });
        let bias = g.add_initializer("bias", Tensor::f32(&[12], &[0.0; 12]));
        for layer in 0..2 {
            let y = g.add_value(&format!("y{layer}"));
            g.add_node(NewNode {
                op: "MultiHeadAttention".into(),
                domain: "com.microsoft".into(),
                inputs: [x, x, x, bias].map(Some).to_vec(),
                outputs: vec![Some(y)],
                attrs: vec![attr("num_heads", AttrValue::Int(2))],
                ..NewNode::default()
            });
            x = y;
        }
        g.add_output(x, Declared { dtype: None, dims: None, extra: Bytes::new() });
        g
    }

    fn biases(g: &Graph) -> Vec<f32> {
        let bias = |id: &NodeId| g.constant(g.node(*id).input(3)?)?.to_f32s()?.first().copied();
        g.order().iter().filter_map(bias).collect()
    }

    #[test]
    fn constants_of_the_written_out_form_go_back_to_their_nodes() {
        let model = two_layers();
        let mut before = model.clone();
        let apart = run(&mut before).expect("the graph is sound");
        assert_eq!(apart.labels.len(), 2);
        assert!(before.nodes().all(|(_, n)| n.domain().is_empty()));
        let same = put_back(&model, &apart, &before, &before).expect("nothing changed");
        assert_eq!((biases(&same), same.value_count()), (vec![0.0, 0.0], model.value_count()));
        // Each layer was given a constant of its own, which trains apart.
        let mut after = before.clone();
        let own = *apart.copies.keys().next().expect("the first layer has a copy");
        after.set_constant(own, Tensor::f32(&[12], &[1.0; 12]));
        let trained = put_back(&model, &apart, &before, &after).expect("one use each");
        assert_eq!(biases(&trained), [1.0, 0.0]);
        let shared = after.find("bias").expect("the second layer reads it");
        after.set_constant(shared, Tensor::f32(&[12], &[2.0; 12]));
        assert_eq!(biases(&put_back(&model, &apart, &before, &after).expect("one use each")), [1.0, 2.0]);
    }
}
