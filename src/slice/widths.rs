//! Heads of unlike width: where a value can no longer be one block.
//!
//! On a flat axis of `H x E` heads of unlike width still lie beside each other, those of one width together. Where heads have an axis
//! of their own (`[B, H, N, E]`, and the logits `[B, H, N, N]`) there is one value per width from then on: `branch.rs` copies the
//! nodes between, and joins the copies where heads lie on a flat axis again.

use super::cutset::{CutError, CutSet};
use crate::anatomy::{Anatomy, Kind};
use crate::axes::{Axes, CarrierId, ClassId, Of};
use crate::graph::{Graph, Id, NodeId, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// Values that fall apart by the width of their heads: the class of heads of each.
pub(super) type Split = BTreeMap<CarrierId, ClassId>;

/// Finds the values that fall apart, and refuses where they cannot.
pub(super) fn split(graph: &Graph, anatomy: &Anatomy, cut: &CutSet<'_>) -> Result<Split, CutError> {
    let (mut split, mut inside) = (Split::new(), Vec::new());
    let axes = &anatomy.axes;
    let nested = anatomy.groups.iter().filter(|g| matches!(g.kind, Kind::Qk | Kind::Vo));
    let leaves: BTreeSet<ClassId> = nested.map(|g| g.leaf).collect();
    for class in cut.widths().keys() {
        let error = |why: String| CutError::Apart { group: cut.name_of_heads(*class), why };
        for member in &axes.classes()[*class].members {
            let (carrier, at) = (member.carrier, (member.carrier, member.axis));
            if is_source(graph, axes, carrier) {
                continue;
            }
            // An axis that heads share with the batch is known at run time only.
            let factors = axes.region(at, member.case).map(|r| r.factors).unwrap_or_default();
            let is_flat = factors.iter().any(|(c, _)| c != class && leaves.contains(c));
            if let (Of::Virtual(id, _), false) = (axes.carriers()[carrier].of, is_flat) {
                inside.push((id, *class));
                continue;
            }
            if !is_flat && split.insert(carrier, *class).is_some_and(|other| other != *class) {
                return Err(error(format!("in {} they meet the heads of another layer", name(graph, axes, carrier))));
            }
        }
    }
    // What a node computes inside itself follows where it is copied; where heads are nowhere apart outside, it cannot be.
    let copied = copied(graph, &split);
    for (id, class) in inside {
        let node = graph.node(id);
        let is_constant = node.outputs().iter().flatten().all(|v| axes.carriers()[v.index()].constant);
        if !is_constant && !copied.contains(&id) {
            let why = format!("node {} ({}) computes all of them with one width", graph.label(id), node.op());
            return Err(CutError::Apart { group: cut.name_of_heads(class), why });
        }
    }
    Ok(split)
}

/// Whether a carrier is a constant of which each reader gets its own part. What is computed from constants for one reader alone is
/// cut where it comes from, like data.
pub(super) fn is_source(graph: &Graph, axes: &Axes, carrier: CarrierId) -> bool {
    let carrier = &axes.carriers()[carrier];
    carrier.constant
        && match carrier.of {
            Of::Value(v) => graph.is_constant(v),
            Of::Private(..) => true,
            Of::Virtual(..) => false,
        }
}

fn name(graph: &Graph, axes: &Axes, carrier: CarrierId) -> String {
    match axes.carriers()[carrier].of {
        Of::Value(v) | Of::Private(v, _) => format!("'{}'", graph.value(v).name()),
        Of::Virtual(node, _) => format!("node {}", graph.label(node)),
    }
}

/// Nodes that read or make a value that falls apart: they are copied for each width.
pub(super) fn copied(graph: &Graph, split: &Split) -> BTreeSet<NodeId> {
    let falls = |v: &ValueId| split.contains_key(&v.index());
    let touches = |id: &NodeId| {
        let node = graph.node(*id);
        node.inputs().iter().chain(node.outputs()).flatten().any(falls)
    };
    graph.order().iter().copied().filter(|id| !split.is_empty() && touches(id)).collect()
}
