//! The edited graph beside the model as it was, and what a layer reads in the one and must give for the other.

use super::Consumer;
use crate::graph::build::Builder;
use crate::graph::{Graph, NewNode, NodeId, ValueId};
use crate::infer::Facts;
use std::collections::{BTreeMap, BTreeSet};

/// What a layer gives, and where it goes.
struct Stream {
    /// The layer's output with its bias.
    output: ValueId,
    /// A constant that multiplies it before it is added.
    scale: Option<ValueId>,
    /// What it is added to, and the sum.
    residual: Option<(ValueId, ValueId)>,
    /// Between output and sum there is a Reshape.
    is_reshaped: bool,
}

/// Follows a layer's output to the residual stream.
fn stream(graph: &Graph, facts: &Facts, consumer: &Consumer) -> Option<Stream> {
    let mut at = graph.node(consumer.site.at.node).output(0)?;
    if let Some(bias) = consumer.bias.filter(|b| b.at.node != consumer.site.at.node) {
        at = graph.node(bias.at.node).output(0)?;
    }
    let mut found = Stream { output: at, scale: None, residual: None, is_reshaped: false };
    for _ in 0..8 {
        let users: Vec<_> = graph.value(at).users().iter().filter(|u| u.slot < graph.node(u.node).inputs().len()).collect();
        let [user] = users[..] else { break };
        let node = graph.node(user.node);
        let other = node.input(1 - user.slot.min(1)).filter(|_| node.inputs().len() == 2);
        match (node.op(), other) {
            ("Identity" | "Dropout", _) => {}
            ("Reshape", _) if user.slot == 0 && same_last(facts, at, node.output(0)?) => found.is_reshaped = true,
            ("Mul", Some(scale)) if graph.is_constant(scale) && found.scale.is_none() => {
                let is_row = facts.shape(scale).is_some_and(|s| s.iter().rev().skip(1).all(|d| d.is(1)));
                if !is_row || graph.constant(scale)?.to_f32s()?.iter().any(|x| x.abs() < 1e-6) {
                    break;
                }
                found.scale = Some(scale);
            }
            ("Add", Some(other)) if !graph.is_constant(other) => {
                let sum = node.output(0)?;
                let same = facts.shape(other) == facts.shape(sum) && facts.shape(at) == facts.shape(sum);
                found.residual = same.then_some((other, sum));
                break;
            }
            _ => break,
        }
        at = node.output(0)?;
    }
    if found.residual.is_none() {
        (found.scale, found.is_reshaped) = (None, false);
    }
    Some(found)
}

fn same_last(facts: &Facts, a: ValueId, b: ValueId) -> bool {
    let last = |v: ValueId| facts.shape(v).and_then(|s| s.last()).cloned();
    last(a).is_some() && last(a) == last(b)
}

/// The edited graph with the model as it was beside it, and rows `[x, Y]` of a layer as its value.
pub fn both_streams((graph, facts): (&Graph, &Facts), edited: &Graph, consumer: &Consumer) -> Option<(Graph, ValueId)> {
    let [axis] = consumer.site.axes[..] else { return None };
    let x = graph.node(consumer.site.at.node).input(consumer.site.at.slot)?;
    let features = facts.shape(x)?;
    if axis + 1 != features.len() || features[axis].size()? != consumer.features() {
        return None;
    }
    let found = stream(graph, facts, consumer)?;
    let outputs = facts.shape(found.output)?.last()?.size()?;
    let mut both = edited.clone();
    let dense = copy_beside(graph, &mut both, found.residual.map_or(found.output, |(_, sum)| sum));
    let mut b = Builder::new(&mut both, "behind.");
    let mut y = match found.residual {
        Some((residual, _)) => b.sub(dense, residual),
        None => dense,
    };
    if let Some(scale) = found.scale {
        y = b.div(y, scale);
    }
    let (x, y) = (b.reshape(x, &[-1, consumer.features() as i64]), b.reshape(y, &[-1, outputs as i64]));
    let rows = b.concat(&[x, y], 1);
    both.sort();
    Some((both, rows))
}

/// Copies what a value depends on into another graph with the same ids; inputs and equal constants are shared.
fn copy_beside(from: &Graph, to: &mut Graph, wanted: ValueId) -> ValueId {
    let mut needed: BTreeSet<NodeId> = BTreeSet::new();
    let mut stack = vec![wanted];
    while let Some(v) = stack.pop() {
        if let Some((id, _)) = from.value(v).producer()
            && needed.insert(id)
        {
            stack.extend(from.node(id).inputs().iter().flatten().chain(from.node(id).captures()));
        }
    }
    let mut copies: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for id in from.order().iter().copied().filter(|id| needed.contains(id)) {
        let node = from.node(id).clone();
        let mut inputs = Vec::with_capacity(node.inputs().len());
        for input in node.inputs() {
            inputs.push(input.map(|v| *copies.entry(v).or_insert_with(|| constant_beside(from, to, v))));
        }
        let outputs: Vec<Option<ValueId>> = node
            .outputs()
            .iter()
            .map(|v| v.map(|v| *copies.entry(v).or_insert_with(|| to.add_value(&format!("{}_as_it_was", from.value(v).name())))))
            .collect();
        to.add_node(NewNode {
            name: format!("{}_as_it_was", node.name()),
            op: node.op().to_string(),
            domain: node.domain().to_string(),
            inputs,
            outputs,
            attrs: node.attrs().to_vec(),
            ..NewNode::default()
        });
    }
    copies.get(&wanted).copied().unwrap_or(wanted)
}

/// A value that no copied node makes: shared, unless it is a constant that was edited.
fn constant_beside(from: &Graph, to: &mut Graph, v: ValueId) -> ValueId {
    let (Some(old), Some(new)) = (from.value(v).initializer(), to.value(v).initializer()) else { return v };
    if old.bytes == new.bytes {
        return v;
    }
    let tensor = old.clone();
    to.add_initializer(&format!("{}_as_it_was", from.value(v).name()), tensor)
}
