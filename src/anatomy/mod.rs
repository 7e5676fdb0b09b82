//! Gives classes of factors their names: Axes -> Anatomy.
//!
//! In: the classes of [`crate::axes`]. Out: groups of kind `mlp`, `qk`, `vo`, `head`, `channel`, and refusals with node and
//! reason. Kinds are read off the structure, never off names: what is contracted between two activations whose product passes a
//! softmax is `qk`; what is carried through the product with the softmax's result is `vo`; the factor around both is `head`;
//! what lies between two weights is `mlp`, or `channel` where they are convolutions.
//! Example: a ViT block with H = 3, E = 16, M = 192 has `qk` of 48 units (3 heads x 16), `vo` of 48, `head` of 3, `mlp` of 192.
//! Invariant: removing a unit equals zeroing it at every sink of its group.

mod attention;
mod group;
mod nest;
mod tokens;
mod unknown;

pub use attention::{AttentionLayer, attention_layers};
pub use group::{Cut, Group, Kind, Site};
pub use tokens::{FIXED, FusedKeys, Stretch, TokenSite, TokenSites};

use crate::axes::{Axes, Class, ClassId, depends_on_data};
use crate::graph::{Graph, Id, NodeId, ValueId};
use crate::infer::Facts;
use crate::ops;
use std::collections::{BTreeMap, BTreeSet};

/// Something that a user might expect to be cut, and why it is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What it would have been.
    pub kind: Kind,
    /// Label of the node that stands in the way; empty where it is a graph input or output.
    pub node: String,
    /// That node's operator.
    pub op: String,
    /// The axis there.
    pub axis: usize,
    /// The reason.
    pub reason: String,
}

/// All groups and refusals of a graph.
pub struct Anatomy {
    /// Groups, by layer and kind, in the order of the graph.
    pub groups: Vec<Group>,
    /// What was refused.
    pub refused: Vec<Refusal>,
    /// The classes underneath.
    pub axes: Axes,
    /// Attention layers, from the input on.
    pub attention: Vec<AttentionLayer>,
    /// Places where the sequence can be shortened, from the input on.
    pub tokens: TokenSites,
}

/// Names the classes of a graph.
pub fn name(graph: &Graph, facts: &Facts, axes: Axes) -> Anatomy {
    let attention = attention_layers(graph, facts, &axes);
    let grown = group::grown_from_weights(graph, &axes);
    let convolutional = group::convolutional(graph, facts, &axes);
    let place = places(graph);
    let mut found: Vec<(Kind, usize, ClassId, usize)> = Vec::new();
    let mut taken = BTreeSet::new();
    for (layer, a) in attention.iter().enumerate() {
        for (kind, classes) in [(Kind::Qk, &a.qk), (Kind::Vo, &a.vo), (Kind::Head, &a.head)] {
            for class in classes {
                if taken.insert(*class) {
                    found.push((kind, layer, *class, a.place));
                }
            }
        }
    }
    let depends = depends_on_data(graph);
    let is_matrix = |v: ValueId| !depends[v] && facts.shape(v).is_some_and(|s| s.iter().filter(|d| !d.is(1)).count() > 1);
    taken.extend(attention.iter().flat_map(|a| &a.sharers));
    let mut rest: Vec<(usize, ClassId)> = (0..axes.classes().len())
        .filter(|c| !taken.contains(c) && is_hidden(graph, &axes, &axes.classes()[*c], &is_matrix))
        .map(|c| (axes.classes()[c].sinks.iter().map(|s| place[s.node.index()]).min().unwrap_or(0), c))
        .collect();
    rest.sort_unstable();
    for (at, class) in rest {
        let kind = if convolutional.contains(&class) { Kind::Channel } else { Kind::Mlp };
        // Counted below, where it is known which of them are groups.
        found.push((kind, 0, class, at));
    }
    let layers: Vec<_> = attention.iter().map(|a| (a.logits.first().copied().unwrap_or(a.softmax), a.softmax)).collect();
    let (tokens, without) = tokens::token_sites(graph, facts, &layers);
    let mut anatomy = Anatomy { groups: Vec::new(), refused: Vec::new(), axes, attention, tokens };
    found.sort_by_key(|(kind, layer, class, at)| (*at, *kind, *layer, *class));
    let mut counted: BTreeMap<Kind, usize> = BTreeMap::new();
    for (kind, layer, class, _) in found {
        match refusal(graph, &anatomy.axes, kind, class, &grown) {
            Some(Some(refused)) if !anatomy.refused.contains(&refused) => anatomy.refused.push(refused),
            Some(_) => {}
            None => {
                let count = counted.entry(kind).or_insert(0);
                let layer = if matches!(kind, Kind::Mlp | Kind::Channel) { *count } else { layer };
                let group = group::build(graph, facts, &anatomy.axes, kind, layer, class);
                *count += usize::from(group.is_some());
                anatomy.groups.extend(group);
            }
        }
    }
    anatomy.groups.extend(anatomy.tokens.sites.iter().map(group::of_tokens));
    for (_, node, reason) in without {
        let refused =
            Refusal { kind: Kind::Token, node: graph.label(node), op: graph.node(node).op().to_string(), axis: 1, reason };
        if !anatomy.refused.contains(&refused) {
            anatomy.refused.push(refused);
        }
    }
    for refused in unknown::refusals(graph, &anatomy.axes) {
        let is_told = anatomy.refused.iter().any(|r| r.kind == refused.kind && r.node == refused.node);
        if !is_told {
            anatomy.refused.push(refused);
        }
    }
    group::number(&mut anatomy.groups);
    anatomy
}

/// Whether a node reads shapes alone.
fn is_shape_only(graph: &Graph, id: NodeId) -> bool {
    let node = graph.node(id);
    ops::rule_of(graph, node).is_some_and(|r| matches!(r.axes, ops::Axes::ShapeOnly))
}

/// Position of each node in the order of the graph.
fn places(graph: &Graph) -> Vec<usize> {
    let mut place = vec![0; graph.node_capacity()];
    for (i, id) in graph.order().iter().enumerate() {
        place[id.index()] = i;
    }
    place
}

/// Starts in a weight and ends in another, and is more than one position.
fn between_weights(axes: &Axes, class: &Class) -> bool {
    class.size.is_some_and(|s| s > 1) && group::is_born(axes, class) && group::ends_in_weight(axes, class)
}

/// Between two weights, or between a weight and an operator that is not known with a weight somewhere behind it: of what such an
/// operator makes not even the shape is known.
fn is_hidden(graph: &Graph, axes: &Axes, class: &Class, is_matrix: &dyn Fn(ValueId) -> bool) -> bool {
    let is_unknown = |node: NodeId| ops::lookup(graph.node(node).domain(), graph.node(node).op()).is_none();
    let ends_unknown =
        || class.barriers.iter().filter_map(|b| b.node).any(|n| is_unknown(n) && leads_to_weight(graph, n, is_matrix));
    between_weights(axes, class) || class.size.is_some_and(|s| s > 1) && group::is_born(axes, class) && ends_unknown()
}

/// Whether a node behind this one reads a constant matrix.
fn leads_to_weight(graph: &Graph, node: NodeId, is_matrix: &dyn Fn(ValueId) -> bool) -> bool {
    let (mut seen, mut stack) = (BTreeSet::from([node]), vec![node]);
    while let Some(id) = stack.pop() {
        let outputs = graph.node(id).outputs().iter().flatten();
        for reader in outputs.flat_map(|v| graph.value(*v).users()).map(|u| u.node) {
            if graph.node(reader).inputs().iter().flatten().any(|v| is_matrix(*v)) {
                return true;
            }
            if seen.insert(reader) {
                stack.push(reader);
            }
        }
    }
    false
}

/// `None`: the class can be cut. `Some(None)`: it cannot, and nobody would expect it to. `Some(Some)`: a refusal to show.
fn refusal(graph: &Graph, axes: &Axes, kind: Kind, class: ClassId, grown: &BTreeSet<ClassId>) -> Option<Option<Refusal>> {
    let c = &axes.classes()[class];
    let Some(barrier) = c.barriers.iter().find(|b| b.node.is_some()).or(c.barriers.first()) else {
        let usable = c.size.is_some_and(|s| s > 1) && !c.sinks.is_empty() && group::is_born(axes, c);
        if let Some((reader, axis)) = group::read_apart(graph, axes, c).filter(|_| usable) {
            let reason = "reads for itself what is computed from constants and cut for others".to_string();
            let (node, op) = (graph.label(reader), graph.node(reader).op().to_string());
            return Some(Some(Refusal { kind, node, op, axis, reason }));
        }
        return if usable { None } else { Some(None) };
    };
    // The residual stream meets every layer; only what belongs to one layer would be expected to be cut.
    let local = match kind {
        Kind::Mlp | Kind::Channel => c.sinks.len() <= 2 && c.barriers.iter().all(|b| b.node.is_some()),
        Kind::Qk | Kind::Vo | Kind::Head | Kind::Token => c.size.is_none_or(|s| s > 1),
    };
    let local = local && grown.contains(&class);
    let (node, op) = match barrier.node {
        Some(n) => (graph.label(n), graph.node(n).op().to_string()),
        None => (String::new(), String::new()),
    };
    Some(local.then(|| Refusal { kind, node, op, axis: barrier.axis, reason: barrier.reason.clone() }))
}
