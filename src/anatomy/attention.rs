//! Attention layers: the products of two activations that reach a softmax, and the products of its result with another activation.
//!
//! Either may be missing: outlook attention computes its logits by one weight, and factorized attention normalizes keys alone.

use crate::axes::relation::{At, Slot};
use crate::axes::{Axes, CarrierId, ClassId, depends_on_data};
use crate::graph::{Graph, Id, NodeId, SideMap, Use, ValueId};
use crate::infer::Facts;
use crate::ops::{self, quantize::operands};
use std::collections::BTreeSet;

/// One attention layer.
#[derive(Clone, Debug)]
pub struct AttentionLayer {
    /// Nodes whose outputs add up to the logits (or the fused operator): queries times keys, and queries times tables of relative
    /// positions. Empty where logits are no product of two activations.
    pub logits: Vec<NodeId>,
    /// The softmax (or the fused operator).
    pub softmax: NodeId,
    /// Nodes that multiply the softmax's result with the values (or the fused operator).
    pub mixes: Vec<NodeId>,
    /// Place of the first of these nodes in the order of the graph.
    pub place: usize,
    /// Classes contracted in the logits, or between the result and another activation.
    pub qk: Vec<ClassId>,
    /// Classes carried from the values to the result, or from the queries to the result and into a weight (cross-covariance).
    pub vo: Vec<ClassId>,
    /// Classes of the attention matrix that start in weights and are neither queries nor keys. There are several where heads are
    /// mixed before or after the softmax, or where queries come in groups.
    pub head: Vec<ClassId>,
    /// Of a fused operator: query heads that share a key head. They are not cut: spelled out, they are one value stretched.
    pub sharers: Vec<ClassId>,
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
    "DynamicQuantizeLinear",
];

/// Those of com.microsoft.
const PASSED_QUANTIZED: &[&str] =
    &["QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearWhere", "QLinearSoftmax", "QuantizeLinear", "DequantizeLinear"];

/// Finds all attention layers, from the input on.
pub fn attention_layers(graph: &Graph, facts: &Facts, axes: &Axes) -> Vec<AttentionLayer> {
    let depends = depends_on_data(graph);
    let weights = super::group::grown_from_weights(graph, axes);
    let places = super::places(graph);
    let mut layers: Vec<AttentionLayer> = Vec::new();
    for (id, node) in graph.nodes() {
        let found = if ops::attention::is_fused_attention(node.domain(), node.op()) {
            Some(fused(graph, axes, id, places[id.index()]))
        } else if is_softmax(node.op()) {
            spelled_out(graph, facts, axes, &weights, &depends, &places, id)
        } else {
            None
        };
        let Some(layer) = found else { continue };
        match layers.iter_mut().find(|l| l.logits.iter().any(|p| layer.logits.contains(p))) {
            Some(known) => known.merge(layer),
            None => layers.push(layer),
        }
    }
    layers.sort_by_key(|l| l.place);
    layers
}

impl AttentionLayer {
    fn new(logits: Vec<NodeId>, softmax: NodeId, mixes: Vec<NodeId>, place: usize) -> Self {
        Self { logits, softmax, mixes, place, qk: Vec::new(), vo: Vec::new(), head: Vec::new(), sharers: Vec::new() }
    }

    fn merge(&mut self, other: Self) {
        fn add<T: Ord>(mine: &mut Vec<T>, theirs: Vec<T>) {
            mine.extend(theirs);
            mine.sort_unstable();
            mine.dedup();
        }
        add(&mut self.qk, other.qk);
        add(&mut self.vo, other.vo);
        add(&mut self.head, other.head);
        add(&mut self.mixes, other.mixes);
        add(&mut self.logits, other.logits);
    }
}

/// The parts that the operator's record names; none where its sizes are not known.
fn fused(graph: &Graph, axes: &Axes, id: NodeId, place: usize) -> AttentionLayer {
    let new = AttentionLayer::new(vec![id], id, vec![id], place);
    let Some(parts) = axes.fused_attention(id) else { return new };
    let on = |(slot, axis): At| -> BTreeSet<ClassId> {
        axes.carrier_at(graph, id, slot).map(|c| axes.classes_on((c, axis))).unwrap_or_default().into_iter().collect()
    };
    let qk = sinks_at(axes, id, &on(parts.qk));
    let head = difference(&on(parts.head), &qk);
    let vo = difference(&difference(&on(parts.vo), &head), &qk);
    let sharers = parts.sharers.map(on).unwrap_or_default().into_iter().collect();
    AttentionLayer { qk: sized(axes, qk), vo: sized(axes, vo), head: sized(axes, head), sharers, ..new }
}

fn spelled_out(
    graph: &Graph,
    facts: &Facts,
    axes: &Axes,
    weights: &BTreeSet<ClassId>,
    depends: &SideMap<ValueId, bool>,
    places: &[usize],
    softmax: NodeId,
) -> Option<AttentionLayer> {
    let walk = Walk { graph, facts, axes, depends, softmax };
    let (logits, mixes) = (walk.products_before(), walk.products_behind());
    let classes_at = |id, slot| axes.carrier_at(graph, id, slot).map_or_else(BTreeSet::new, |c| classes_of(axes, c));
    let (mut values, mut results) = (BTreeSet::new(), BTreeSet::new());
    let mut matrix = classes_at(softmax, Slot::In(0));
    for (mix, probabilities) in &mixes {
        for slot in (0..graph.node(*mix).inputs().len()).filter(|s| s != probabilities) {
            values.extend(classes_at(*mix, Slot::In(slot)));
        }
        matrix.extend(classes_at(*mix, Slot::In(*probabilities)));
        results.extend(classes_at(*mix, Slot::Out(0)));
    }
    let (mut qk, mut either) = (BTreeSet::new(), BTreeSet::new());
    for product in &logits {
        let (left, right) = operands(graph.node(*product).op());
        let (a, b) = (classes_at(*product, Slot::In(left)), classes_at(*product, Slot::In(right)));
        let both = intersection(&a, &b);
        let contracted = sinks_at(axes, *product, &both);
        matrix.extend(difference(&both, &contracted));
        qk.extend(contracted);
        either.extend(a);
        either.extend(b);
    }
    // What the result has of the attention matrix alone: its rows. Tokens, but for cross-covariance and factorized attention.
    let rows = intersection(&difference(&results, &values), weights);
    let into_weight = |c: &ClassId| super::group::ends_in_weight(axes, &axes.classes()[*c]);
    let (into_weights, others): (BTreeSet<_>, BTreeSet<_>) = rows.iter().copied().partition(into_weight);
    let into_activations = others.into_iter().filter(|c| !axes.classes()[*c].sinks.is_empty()).collect();
    let carried = intersection(&values, &results);
    let mut vo = difference(&difference(&difference(&carried, &either), &matrix), &qk);
    // Factorized attention may tie the dims of queries and keys to those of the values: such a class is no head.
    let (tied, mut head): (BTreeSet<_>, BTreeSet<_>) =
        difference(&intersection(&matrix, weights), &rows).into_iter().partition(|c| walk.ends_between_activations(*c));
    vo.extend(intersection(&tied, &carried).into_iter().filter(into_weight));
    head.retain(|c| !qk.contains(c) && !walk.is_token(*c) && (values.contains(c) || into_weight(c)));
    let ids: Vec<NodeId> = mixes.iter().map(|(n, _)| *n).collect();
    let place = logits.iter().map(|id| places[id.index()]).fold(places[softmax.index()], usize::min);
    let layer = AttentionLayer {
        qk: sized(axes, qk.union(&into_activations).copied().collect()),
        vo: sized(axes, vo.union(&into_weights).copied().collect()),
        head: sized(axes, head),
        ..AttentionLayer::new(logits, softmax, ids, place)
    };
    (!layer.logits.is_empty() || !layer.mixes.is_empty()).then_some(layer)
}

fn sized(axes: &Axes, classes: BTreeSet<ClassId>) -> Vec<ClassId> {
    classes.into_iter().filter(|c| axes.classes()[*c].size.is_some()).collect()
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
    const PRODUCTS: &[&str] = &["MatMul", "Einsum", "Gemm", "FusedMatMul", "TransposeMatMul", "QLinearMatMul", "MatMulInteger"];
    PRODUCTS.contains(&node.op()) && rank(left) > 2 && rank(right) > 2
}

fn is_softmax(op: &str) -> bool {
    matches!(op, "Softmax" | "BiasSoftmax" | "QLinearSoftmax")
}

/// Looks for the products around a softmax.
struct Walk<'a> {
    graph: &'a Graph,
    facts: &'a Facts,
    axes: &'a Axes,
    depends: &'a SideMap<ValueId, bool>,
    softmax: NodeId,
}

impl Walk<'_> {
    /// Whether the softmax is normalized over the class: keys, or dims of keys.
    fn is_normalized(&self, class: ClassId) -> bool {
        self.axes.classes()[class].barriers.iter().any(|b| b.node == Some(self.softmax))
    }

    /// Whether any softmax is normalized over the class. Windows of one layer are parts of the keys of another.
    fn is_token(&self, class: ClassId) -> bool {
        let softmax = |id: NodeId| is_softmax(self.graph.node(id).op());
        self.axes.classes()[class].barriers.iter().any(|b| b.node.is_some_and(softmax))
    }

    /// Whether the class is contracted between two activations.
    fn ends_between_activations(&self, class: ClassId) -> bool {
        let data = |id, slot| self.axes.carrier_at(self.graph, id, slot).is_some_and(|c| !self.axes.carriers()[c].constant);
        self.axes.classes()[class].sinks.iter().any(|s| s.b.is_some_and(|b| data(s.node, s.a.0) && data(s.node, b.0)))
    }

    /// Products of two activations that reach the softmax's input.
    fn products_before(&self) -> Vec<NodeId> {
        let mut found = BTreeSet::new();
        let mut seen = BTreeSet::new();
        let mut stack: Vec<ValueId> = self.graph.node(self.softmax).input(0).into_iter().collect();
        while let Some(v) = stack.pop() {
            let Some((id, _)) = self.graph.value(v).producer() else { continue };
            if !self.depends[v] || !seen.insert(id) {
                continue;
            }
            if is_product(self.graph, self.facts, id) {
                found.insert(id);
            } else if self.passes(id) {
                stack.extend(self.graph.node(id).inputs().iter().flatten().filter(|v| self.depends[**v]));
            }
        }
        found.into_iter().collect()
    }

    /// Products of the softmax's result with another activation, and the slot that the result has there.
    fn products_behind(&self) -> Vec<(NodeId, usize)> {
        let mut found = BTreeSet::new();
        let mut seen = BTreeSet::new();
        let users = |v: &ValueId| self.graph.value(*v).users().to_vec();
        let mut stack: Vec<Use> = self.graph.node(self.softmax).output(0).iter().flat_map(users).collect();
        while let Some(Use { node: id, slot }) = stack.pop() {
            if !seen.insert(id) {
                continue;
            }
            if is_product(self.graph, self.facts, id) {
                found.insert((id, slot));
            } else if self.passes(id) {
                stack.extend(self.graph.node(id).outputs().iter().flatten().flat_map(users));
            }
        }
        found.into_iter().collect()
    }

    /// Whether a node passes logits or probabilities on: position by position, or mixing heads while it keeps the keys.
    fn passes(&self, id: NodeId) -> bool {
        let node = self.graph.node(id);
        let keeps_keys = || {
            let slots = (0..node.inputs().len()).filter(|s| node.input(*s).is_some_and(|v| self.depends[v]));
            let mut carriers = slots.filter_map(|s| self.axes.carrier_at(self.graph, id, Slot::In(s)));
            carriers.any(|c| classes_of(self.axes, c).into_iter().any(|class| self.is_normalized(class)))
        };
        let standard = node.domain().is_empty();
        let passed = if standard { PASSED } else { PASSED_QUANTIZED };
        passed.contains(&node.op()) || (standard && keeps_keys())
    }
}
