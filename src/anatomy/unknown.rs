//! Layers that cannot be seen because an operator in them is not understood.
//!
//! Behind such an operator not even shapes are known, so no attention and no second weight is found there. What a user would expect
//! is told from the way on: to a softmax go queries and keys, to a product with the softmax's result go values, to a weight goes an
//! MLP.

use super::{Kind, Refusal, group};
use crate::axes::relation::Slot;
use crate::axes::{Axes, depends_on_data};
use crate::graph::{Graph, NodeId, SideMap, ValueId};
use crate::ops;
use std::collections::BTreeSet;

/// One refusal for each operator without axes that stands behind a weight and before something that ends a layer.
pub(super) fn refusals(graph: &Graph, axes: &Axes) -> Vec<Refusal> {
    let depends = depends_on_data(graph);
    let mut found = Vec::new();
    for (id, node) in graph.nodes() {
        let is_understood = ops::rule_of(graph, node).is_some_and(|r| !matches!(r.axes, ops::Axes::Barrier(_)));
        if is_understood {
            continue;
        }
        let (Some((axis, reason)), Some(kind)) = (behind_weight(graph, axes, id), purpose(graph, &depends, id)) else { continue };
        found.push(Refusal { kind, node: graph.label(id), op: node.op().to_string(), axis, reason });
    }
    found
}

/// The axis of an input that is a weight or comes from the columns of one, and why it ends here.
fn behind_weight(graph: &Graph, axes: &Axes, id: NodeId) -> Option<(usize, String)> {
    let carriers = (0..graph.node(id).inputs().len()).filter_map(|slot| axes.carrier_at(graph, id, Slot::In(slot)));
    let mut sides = carriers.flat_map(|c| (0..axes.carriers()[c].shape.len()).map(move |axis| (c, axis)));
    sides.find_map(|at| {
        let classes = axes.classes_on(at).into_iter().map(|c| &axes.classes()[c]);
        let carrier = &axes.carriers()[at.0];
        let is_weight = carrier.constant && carrier.shape.iter().filter(|d| !d.is(1)).count() > 1;
        let mut born = classes.filter(|c| is_weight || c.size.is_some_and(|s| s > 1) && group::is_born(axes, c));
        let barrier = born.find_map(|c| c.barriers.iter().find(|b| b.node == Some(id)))?;
        Some((at.1, barrier.reason.clone()))
    })
}

/// What the node's results are for.
fn purpose(graph: &Graph, depends: &SideMap<ValueId, bool>, id: NodeId) -> Option<Kind> {
    let mut seen = BTreeSet::new();
    let mut next: Vec<NodeId> = readers(graph, id);
    while let Some(at) = next.pop() {
        if !seen.insert(at) {
            continue;
        }
        let node = graph.node(at);
        let is_product = matches!(node.op(), "MatMul" | "Gemm" | "Einsum");
        let is_weighted = node.inputs().iter().flatten().any(|v| !depends[*v] && is_matrix(graph, *v));
        if node.op().contains("Softmax") {
            return Some(Kind::Qk);
        } else if is_weighted && node.op().contains("Conv") {
            return Some(Kind::Channel);
        } else if is_weighted && (is_product || ops::rule_of(graph, node).is_none()) {
            return Some(Kind::Mlp);
        } else if is_product {
            return Some(if purpose(graph, depends, at) == Some(Kind::Qk) { Kind::Qk } else { Kind::Vo });
        }
        next.extend(readers(graph, at));
    }
    None
}

/// Whether a constant may be a weight: two or more axes of more than one position, where they can be seen.
fn is_matrix(graph: &Graph, v: ValueId) -> bool {
    graph.constant(v).is_none_or(|t| t.dims.iter().filter(|d| **d > 1).count() > 1)
}

/// Nodes that read a result of the node, the first in the graph last.
fn readers(graph: &Graph, id: NodeId) -> Vec<NodeId> {
    let users = graph.node(id).outputs().iter().flatten().flat_map(|v| graph.value(*v).users());
    let found: BTreeSet<NodeId> = users.map(|u| u.node).collect();
    found.into_iter().rev().collect()
}
