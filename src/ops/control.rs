//! If, Loop, Scan: their bodies are not analysed. An If whose condition is known is no If any more when it comes here: see
//! [`known_branches`].
//!
//! What a body captures is a use like an input; the barrier holds for inputs, captures and outputs alike.

use super::{Axes, Cost, Grad, OpRule, Refit};
use crate::graph::{Graph, Node, NodeId};
use crate::infer::{Fact, Facts, InferCx, InferError};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    record("If", "the branches of If are not analysed"),
    record("Loop", "the body of Loop is not analysed"),
    record("Scan", "the body of Scan is not analysed"),
];

const fn record(name: &'static str, reason: &'static str) -> OpRule {
    OpRule {
        name,
        domain: "",
        opsets: (1, 24),
        infer: unknown,
        axes: Axes::Barrier(reason),
        grad: Grad::No(reason),
        cost: Cost::Free,
        refit: Refit::Nothing,
    }
}

/// Nothing is known of the outputs.
fn unknown(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    Ok(vec![Fact::default(); cx.node.outputs().len()])
}

/// Whether there is an If that might be opened.
pub fn has_branches(graph: &Graph) -> bool {
    graph.nodes().any(|(_, node)| is_open_if(node))
}

/// What is inlined from a call stays as it is.
fn is_open_if(node: &Node) -> bool {
    node.op() == "If" && node.domain().is_empty() && node.call().is_none()
}

/// The Ifs whose condition is known without running the graph, and the conditions.
pub fn known_branches(graph: &Graph, facts: &Facts) -> Vec<(NodeId, bool)> {
    let condition = |node: &Node| {
        let numbers = facts.get(node.input(0)?).known.as_ref()?.numbers()?;
        match numbers.as_slice() {
            [n] => Some(*n != 0),
            _ => None,
        }
    };
    graph.nodes().filter(|(_, n)| is_open_if(n)).filter_map(|(id, n)| Some((id, condition(n)?))).collect()
}

#[cfg(test)]
mod tests {
    use crate::ops::probe::Probe;

    #[test]
    fn bodies_are_barriers_of_unknown_shape() {
        let mut p = Probe::new(17);
        let x = p.input("x", "2 3");
        for op in ["If", "Loop", "Scan"] {
            let y = p.op(op, &[x], vec![]);
            assert_eq!(p.shape(y), "?");
            assert!(p.axes(y)[0].starts_with("all | "), "{op}");
            assert!(p.facts().get(y).dtype.is_none());
        }
    }
}
