//! The reverse sweep: from the loss back to what needs a gradient, and nowhere else.
//!
//! Example: for `loss = sum(relu(x * w))` and `wrt = [w]` the sweep visits ReduceSum, Relu and Mul, asks each operator's
//! `grad` rule, and never computes a gradient of `x`. Where a value is read several times, its gradients are added.
//! Invariant: forward nodes are not touched; new nodes stand behind them and read forward values only.

use super::{AutodiffError, GradCx, interface};
use crate::graph::{Graph, NodeId, SideMap, ValueId};
use crate::infer::Facts;
use crate::ops::{self, Grad};

/// Appends the nodes that compute d `loss` / d v for each v of `wrt`; `None` where the loss does not depend on v.
///
/// `facts` are those of `graph` as it is given; `loss` is a float scalar. Nodes must be in topological order.
/// Errors: the loss is not a scalar; the gradient has to pass an operator that has none.
pub fn differentiate(
    graph: &mut Graph,
    facts: &Facts,
    loss: ValueId,
    wrt: &[ValueId],
) -> Result<Vec<Option<ValueId>>, AutodiffError> {
    let shape = facts.shape(loss);
    if shape.is_none_or(|s| !s.is_empty()) {
        let value = graph.value(loss).name().to_string();
        return Err(AutodiffError::NotScalar { value, found: shape.map_or("unknown".into(), |s| format!("{s:?}")) });
    }
    let needed = needed_values(graph, facts, loss, wrt);
    let grads = SideMap::filled(graph.value_count(), Vec::new());
    let order = graph.order().to_vec();
    let mut sweep = Sweep { graph, facts, needed, grads };
    if sweep.needed[loss] {
        let one = interface::scalar(sweep.graph, 1.0);
        sweep.grads[loss].push(one);
    }
    for id in order.into_iter().rev() {
        sweep.pass(id)?;
    }
    Ok(wrt.iter().map(|v| sweep.total(*v)).collect())
}

/// Values that depend on `wrt` and on which the loss depends, both through float values and smooth operators only.
///
/// Integers that stand for floats count as floats: a gradient that would have to pass a quantized value is refused there, not taken
/// for zero.
pub(crate) fn needed_values(graph: &Graph, facts: &Facts, loss: ValueId, wrt: &[ValueId]) -> SideMap<ValueId, bool> {
    let mut active = SideMap::filled(graph.value_count(), false);
    for v in wrt {
        active[*v] = true;
    }
    for (_, node) in graph.nodes() {
        let reads = node.inputs().iter().flatten().chain(node.captures()).any(|v| active[*v]);
        let smooth = !matches!(ops::rule_of(graph, node), Some(rule) if matches!(rule.grad, Grad::Zero));
        let is_float = |v: &ValueId| facts.get(*v).dtype.is_none_or(|d| d.is_float());
        let quantized = ops::quantize::is_quantized(node.domain(), node.op())
            || node.inputs().iter().flatten().any(|v| active[*v] && !is_float(v));
        for v in node.outputs().iter().flatten() {
            active[*v] |= reads && smooth && (quantized || is_float(v));
        }
    }
    let mut reached = SideMap::filled(graph.value_count(), false);
    reached[loss] = active[loss];
    for (_, node) in graph.nodes().collect::<Vec<_>>().into_iter().rev() {
        if node.outputs().iter().flatten().any(|v| reached[*v]) {
            for v in node.inputs().iter().flatten().chain(node.captures()) {
                reached[*v] |= active[*v];
            }
        }
    }
    reached
}

struct Sweep<'a> {
    graph: &'a mut Graph,
    facts: &'a Facts,
    needed: SideMap<ValueId, bool>,
    /// Gradients that arrived so far; after `total` at most one.
    grads: SideMap<ValueId, Vec<ValueId>>,
}

impl Sweep<'_> {
    /// The gradient of a value: the sum of what arrived.
    fn total(&mut self, value: ValueId) -> Option<ValueId> {
        let parts = std::mem::take(&mut self.grads[value]);
        let total = match parts[..] {
            [] => return None,
            [one] => one,
            [a, b] => self.graph.add_op("Add", &[a, b], vec![], "grad.Add"),
            _ => self.graph.add_op("Sum", &parts, vec![], "grad.Sum"),
        };
        self.grads[value] = vec![total];
        Some(total)
    }

    /// Sends the gradient through one node.
    fn pass(&mut self, id: NodeId) -> Result<(), AutodiffError> {
        let node = self.graph.node(id).clone();
        let is_needed = |v: &Option<ValueId>| v.is_some_and(|v| self.needed[v]);
        let wanted: Vec<bool> = node.inputs().iter().map(is_needed).collect();
        let captured = node.captures().iter().any(|v| self.needed[*v]);
        if !captured && !wanted.contains(&true) || !node.outputs().iter().any(is_needed) {
            return Ok(());
        }
        let grads: Vec<Option<ValueId>> = node.outputs().iter().map(|v| v.and_then(|v| self.total(v))).collect();
        if grads.iter().all(Option::is_none) {
            return Ok(());
        }
        let refuse = |graph: &Graph, reason: String| AutodiffError::NoGradient {
            node: graph.label(id),
            op: node.op().to_string(),
            reason,
        };
        let is_float = |v: &Option<ValueId>| v.is_none_or(|v| self.facts.get(v).dtype.is_none_or(|d| d.is_float()));
        if node.inputs().iter().zip(&wanted).any(|(v, wanted)| *wanted && !is_float(v)) {
            return Err(refuse(self.graph, "it reads quantized numbers, which have no gradient: train the model before".into()));
        }
        if captured {
            return Err(refuse(self.graph, "a subgraph reads a value that needs a gradient".into()));
        }
        let rule = match ops::rule_of(self.graph, &node).map(|r| &r.grad) {
            None => return Err(refuse(self.graph, ops::why_unknown(self.graph, &node))),
            Some(Grad::No(reason)) => return Err(refuse(self.graph, (*reason).into())),
            Some(Grad::Zero) => return Ok(()),
            Some(Grad::Rule(rule)) => rule,
        };
        let mut cx = GradCx::new(self.graph, self.facts, id, grads, wanted.clone());
        let result = rule(&mut cx);
        let zero: Vec<bool> = (0..wanted.len()).map(|slot| cx.is_zero(slot)).collect();
        let given = cx.into_given();
        result.map_err(|reason| refuse(self.graph, reason))?;
        for (slot, wanted) in wanted.into_iter().enumerate() {
            if !wanted || zero[slot] {
                continue;
            }
            let (Some(value), Some(grad)) = (node.input(slot), given[slot]) else {
                return Err(refuse(self.graph, format!("no gradient is defined for input {slot}")));
            };
            self.grads[value].push(grad);
        }
        Ok(())
    }
}
