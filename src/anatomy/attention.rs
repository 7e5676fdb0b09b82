//! Attention layers: a product of two activations that reaches a softmax, and the product of the softmax's result with a third.

use crate::axes::relation::Slot;
use crate::axes::{Axes, CarrierId, ClassId, depends_on_data};
use crate::graph::{Graph, Id, NodeId, SideMap, Use, ValueId};
use crate::infer::Facts;
use crate::ops::{self, quantize::operands};
use std::collections::BTreeSet;

/// One attention layer.
#[derive(Clone, Debug)]
pub struct AttentionLayer {
    /// The node whose output are the logits (or the fused operator).
    pub logits: NodeId,
    /// The softmax (or the fused operator).
    pub softmax: NodeId,
    /// Nodes that multiply the softmax's result with the values (or the fused operator).
    pub mixes: Vec<NodeId>,
    /// Place of `logits` in the order of the graph.
    pub place: usize,
    /// Classes contracted in the logits.
    pub qk: Vec<ClassId>,
    /// Classes carried from the values to the result.
    pub vo: Vec<ClassId>,
    /// Classes around both.
    pub head: Vec<ClassId>,
}

/// Operators that pass logits or probabilities on, position by position.
const PASSED: &[&str] = &[
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Where",
    "Cast",
    "CastLike",
    "Identity",
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Dropout",
    "Clip",
    "Tanh",
    "Min",
    "Max",
    "IsNaN",
    "Expand",
    "Softmax",
    "Split",
    "Gather",
    "Slice",
    "Concat",
    "DequantizeLinear",
    "QuantizeLinear",
    "Relu",
    "Exp",
    "Abs",
    "Neg",
    "Conv",
    "BatchNormalization",
    "ReduceMax",
    "DynamicQuantizeLinear",
];

/// Those of com.microsoft.
const PASSED_QUANTIZED: &[&str] =
    &["QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearWhere", "QLinearSoftmax", "QuantizeLinear", "DequantizeLinear"];

/// Finds all attention layers, from the input on.
pub fn attention_layers(graph: &Graph, facts: &Facts, axes: &Axes) -> Vec<AttentionLayer> {
    let depends = depends_on_data(graph);
    let mut layers: Vec<AttentionLayer> = Vec::new();
    for (place, (id, node)) in graph.nodes().enumerate() {
        let found = if ops::attention::is_fused_attention(node.domain(), node.op()) {
            vec![fused(graph, axes, id, place)]
        } else if matches!(node.op(), "Softmax" | "QLinearSoftmax") {
            spelled_out(graph, facts, axes, &depends, id)
        } else {
            vec![]
        };
        for layer in found {
            match layers.iter_mut().find(|l| l.logits == layer.logits) {
                Some(known) => known.merge(layer),
                None => layers.push(layer),
            }
        }
    }
    layers.sort_by_key(|l| l.place);
    layers
}

impl AttentionLayer {
    fn merge(&mut self, other: Self) {
        for (mine, theirs) in [(&mut self.qk, other.qk), (&mut self.vo, other.vo), (&mut self.head, other.head)] {
            mine.extend(theirs);
            mine.sort_unstable();
            mine.dedup();
        }
        self.mixes.extend(other.mixes);
        self.mixes.sort_unstable();
        self.mixes.dedup();
    }
}

fn fused(graph: &Graph, axes: &Axes, id: NodeId, place: usize) -> AttentionLayer {
    let on = |slot| axes.carrier_at(graph, id, slot).map_or_else(BTreeSet::new, |c| classes_of(axes, c));
    let (keys, values, result) = (on(Slot::In(1)), on(Slot::In(2)), on(Slot::Out(0)));
    let qk = sinks_at(axes, id, &keys);
    let head = difference(&intersection(&intersection(&keys, &values), &result), &qk);
    let vo = difference(&difference(&intersection(&values, &result), &keys), &qk);
    layer(axes, id, id, vec![id], place, qk, vo, head)
}

fn spelled_out(
    graph: &Graph,
    facts: &Facts,
    axes: &Axes,
    depends: &SideMap<ValueId, bool>,
    softmax: NodeId,
) -> Vec<AttentionLayer> {
    let mixes = products_behind(graph, facts, depends, softmax);
    let place_of = |id: NodeId| graph.order().iter().position(|n| *n == id).unwrap_or(0);
    let (mut values, mut results) = (BTreeSet::new(), BTreeSet::new());
    for (mix, probabilities) in &mixes {
        for slot in (0..graph.node(*mix).inputs().len()).filter(|s| s != probabilities) {
            values.extend(axes.carrier_at(graph, *mix, Slot::In(slot)).map(|c| classes_of(axes, c)).unwrap_or_default());
        }
        results.extend(axes.carrier_at(graph, *mix, Slot::Out(0)).map(|c| classes_of(axes, c)).unwrap_or_default());
    }
    let mixed = intersection(&values, &results);
    let logits = products_before(graph, facts, depends, softmax);
    let nodes: Vec<NodeId> = mixes.iter().map(|(n, _)| *n).collect();
    logits
        .into_iter()
        .map(|product| {
            let side = |slot| axes.carrier_at(graph, product, Slot::In(slot)).map_or_else(BTreeSet::new, |c| classes_of(axes, c));
            let (left, right) = operands(graph.node(product).op());
            let (a, b) = (side(left), side(right));
            let both = intersection(&a, &b);
            let qk = sinks_at(axes, product, &both);
            // Tokens are around both products too, but the softmax is normalized over them.
            let normalized = |c: &ClassId| axes.classes()[*c].barriers.iter().any(|b| b.node == Some(softmax));
            let mut head = difference(&intersection(&both, &mixed), &qk);
            head.retain(|c| !normalized(c));
            let either = a.union(&b).copied().collect();
            let vo = difference(&difference(&mixed, &either), &qk);
            layer(axes, product, softmax, nodes.clone(), place_of(product), qk, vo, head)
        })
        .collect()
}

#[allow(clippy::too_many_arguments, reason = "gathers the parts of one record")]
fn layer(
    axes: &Axes,
    logits: NodeId,
    softmax: NodeId,
    mixes: Vec<NodeId>,
    place: usize,
    qk: BTreeSet<ClassId>,
    vo: BTreeSet<ClassId>,
    head: BTreeSet<ClassId>,
) -> AttentionLayer {
    let sized = |set: BTreeSet<ClassId>| set.into_iter().filter(|c| axes.classes()[*c].size.is_some()).collect();
    AttentionLayer { logits, softmax, mixes, place, qk: sized(qk), vo: sized(vo), head: sized(head) }
}

fn classes_of(axes: &Axes, carrier: CarrierId) -> BTreeSet<ClassId> {
    (0..axes.carriers()[carrier].shape.len()).flat_map(|axis| axes.classes_on((carrier, axis))).collect()
}

fn intersection(a: &BTreeSet<ClassId>, b: &BTreeSet<ClassId>) -> BTreeSet<ClassId> {
    a.intersection(b).copied().collect()
}

fn difference(a: &BTreeSet<ClassId>, b: &BTreeSet<ClassId>) -> BTreeSet<ClassId> {
    a.difference(b).copied().collect()
}

/// Classes among `candidates` that are summed over at `node`.
fn sinks_at(axes: &Axes, node: NodeId, candidates: &BTreeSet<ClassId>) -> BTreeSet<ClassId> {
    candidates.iter().copied().filter(|c| axes.classes()[*c].sinks.iter().any(|s| s.node == node)).collect()
}

/// Whether the node multiplies two activations. One of them may be computed from constants (a learnt query), but is then no plain
/// matrix, as a weight is.
fn is_product(graph: &Graph, facts: &Facts, id: NodeId) -> bool {
    let node = graph.node(id);
    let rank = |slot| node.input(slot).and_then(|v| facts.shape(v)).map_or(0, <[_]>::len);
    let (left, right) = operands(node.op());
    let multiplies = matches!(node.op(), "MatMul" | "Einsum" | "Gemm" | "FusedMatMul" | "QLinearMatMul" | "MatMulInteger");
    multiplies && rank(left) > 2 && rank(right) > 2
}

/// Whether the node multiplies an activation of rank 4 or more with a small weight: heads mixed before or after the softmax.
fn mixes_heads(graph: &Graph, depends: &SideMap<ValueId, bool>, id: NodeId) -> bool {
    let node = graph.node(id);
    node.op() == "MatMul"
        && node.input(1).is_some_and(|w| !depends[w] && graph.constant(w).is_some_and(|t| t.dims.iter().all(|d| *d <= 64)))
}

/// Products of two activations that reach the softmax's input.
fn products_before(graph: &Graph, facts: &Facts, depends: &SideMap<ValueId, bool>, softmax: NodeId) -> Vec<NodeId> {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    let mut stack: Vec<ValueId> = graph.node(softmax).input(0).into_iter().collect();
    while let Some(v) = stack.pop() {
        let Some((id, _)) = graph.value(v).producer() else { continue };
        if !depends[v] || !seen.insert(id) {
            continue;
        }
        if is_product(graph, facts, id) {
            found.push(id);
        } else if passes(graph, depends, id) {
            stack.extend(graph.node(id).inputs().iter().flatten().filter(|v| depends[**v]));
        }
    }
    found.sort_unstable();
    found
}

/// Products of the softmax's result with another activation, and the slot that the result has there.
fn products_behind(graph: &Graph, facts: &Facts, depends: &SideMap<ValueId, bool>, softmax: NodeId) -> Vec<(NodeId, usize)> {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    let mut stack: Vec<Use> = graph.node(softmax).output(0).map(|v| graph.value(v).users().to_vec()).unwrap_or_default();
    while let Some(Use { node: id, slot }) = stack.pop() {
        if !seen.insert(id) {
            continue;
        }
        if is_product(graph, facts, id) {
            found.push((id, slot));
        } else if passes(graph, depends, id) {
            stack.extend(graph.node(id).outputs().iter().flatten().flat_map(|v| graph.value(*v).users().to_vec()));
        }
    }
    found.sort_unstable_by_key(|(id, _)| id.index());
    found
}

fn passes(graph: &Graph, depends: &SideMap<ValueId, bool>, id: NodeId) -> bool {
    let node = graph.node(id);
    let passed = if node.domain().is_empty() { PASSED.contains(&node.op()) } else { PASSED_QUANTIZED.contains(&node.op()) };
    passed || mixes_heads(graph, depends, id)
}
