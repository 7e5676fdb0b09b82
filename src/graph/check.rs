//! Invariants of a graph, checked on load, after every rewriting stage and before save.
//!
//! I1 every id exists; I2 a value has one source; I3 nodes are in topological order; I4 users and inputs agree;
//! I5 names are unique and not empty; I6 initializer bytes fit type and dims; I7 opset imports cover all domains used.

use super::id::{Id, NodeId};
use super::model::Graph;
use super::tensor::DType;

/// One broken invariant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{rule}: {what}")]
pub struct Violation {
    /// `I1` to `I7`.
    pub rule: &'static str,
    /// What was found.
    pub what: String,
}

/// All violations, not only the first.
pub fn check(graph: &Graph) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut say = |rule, what| found.push(Violation { rule, what });
    let mut place = vec![usize::MAX; graph.node_capacity()];
    for (i, id) in graph.order().iter().enumerate() {
        if graph.nodes.get(id.index()).is_none_or(Option::is_none) {
            say("I1", format!("order names node {id:?}, which does not exist"));
            return found;
        }
        place[id.index()] = i;
    }
    let known = known_uses(graph);
    let mut is_input = vec![false; graph.value_count()];
    graph.inputs().iter().for_each(|v| is_input[v.index()] = true);
    for (id, node) in graph.nodes() {
        for (slot, v) in node.inputs().iter().enumerate().filter_map(|(s, v)| v.map(|v| (s, v))) {
            let value = graph.value(v);
            if !known[id.index()][slot] {
                say("I4", format!("'{}' does not know its user {}", value.name(), graph.label(id)));
            }
            let sourced = value.producer().is_some() || value.initializer().is_some() || is_input[v.index()];
            if !sourced {
                say("I2", format!("node {} reads '{}', which nothing produces", graph.label(id), value.name()));
            }
            if value.producer().is_some_and(|(p, _)| place[p.index()] >= place[id.index()]) {
                say("I3", format!("node {} stands before what it reads, '{}'", graph.label(id), value.name()));
            }
        }
        for (slot, v) in node.outputs().iter().enumerate().filter_map(|(s, v)| v.map(|v| (s, v))) {
            if graph.value(v).producer() != Some((id, slot)) || graph.value(v).initializer().is_some() {
                say("I2", format!("'{}' has more than one source", graph.value(v).name()));
            }
        }
        if graph.opset(node.domain()).is_none() {
            say("I7", format!("node {} is of domain '{}', which is not imported", graph.label(id), node.domain()));
        }
    }
    for (id, value) in graph.values() {
        if value.name().is_empty() || graph.find(value.name()) != Some(id) {
            say("I5", format!("name '{}' is empty or not unique", value.name()));
        }
        for at in value.users() {
            if !reads(graph, at.node, at.slot, id) {
                say("I4", format!("'{}' lists a user that does not read it", value.name()));
            }
        }
        if let Some(t) = value.initializer() {
            let need = (t.element_count() * t.dtype.bits()).div_ceil(8);
            let held = if t.dtype == DType::String { usize::from(t.strings.len() != t.element_count()) } else { t.bytes.len() };
            if held != need {
                say(
                    "I6",
                    format!("initializer '{}': {held} bytes, shape {:?} {} needs {need}", value.name(), t.dims, t.dtype.name()),
                );
            }
        }
    }
    for v in graph.outputs() {
        let value = graph.value(*v);
        if value.producer().is_none() && value.initializer().is_none() && !is_input[v.index()] {
            say("I2", format!("graph output '{}' is made by nothing", value.name()));
        }
    }
    found
}

/// For each input of each node, whether the value there lists it among its users.
fn known_uses(graph: &Graph) -> Vec<Vec<bool>> {
    let mut known: Vec<Vec<bool>> = graph.nodes.iter().map(|n| vec![false; n.as_ref().map_or(0, |n| n.inputs().len())]).collect();
    for (id, value) in graph.values() {
        for at in value.users().iter().filter(|at| reads(graph, at.node, at.slot, id)) {
            if let Some(slot) = known[at.node.index()].get_mut(at.slot) {
                *slot = true;
            }
        }
    }
    known
}

fn reads(graph: &Graph, node: NodeId, slot: usize, value: super::id::ValueId) -> bool {
    let Some(Some(n)) = graph.nodes.get(node.index()) else { return false };
    match slot.checked_sub(n.inputs().len()) {
        None => n.inputs()[slot] == Some(value),
        Some(c) => n.captures().get(c) == Some(&value),
    }
}
