//! Weights that train: constants of the model that become inputs `param.<initializer>`.
//!
//! An exporter merges equal constants: all zero biases of an untrained network may be one tensor. Trained as one they would stay
//! equal for ever, so every such constant is first split, one copy per consumer. A contracted weight that two nodes read is a
//! tied weight and stays one, and so does a bias that stands behind one and the same tied weight.
//! What never trains, with its reason in [`Frozen`]: single numbers, other types than float32, attention masks, position tables that multiply (rotary), what
//! prepares the image, running statistics, and a class token that a static export repeated over the batch.

use super::{SupernetError, Train};
use crate::autodiff::{interface, sweep};
use crate::graph::{DType, DeclaredDim, Graph, NodeId, Tensor, Use, ValueId};
use crate::infer::{self, Dim, Facts};
use crate::ops::{self, Cost};

/// A trained weight.
#[derive(Clone, Debug, PartialEq)]
pub struct Param {
    /// Name of the input: `param.<initializer>`, with `@<n>` behind it for the copies of a merged constant.
    pub input: String,
    /// Name of the constant in the model.
    pub initializer: String,
    /// The places of the model that read it.
    pub uses: Vec<Use>,
    /// Its value in the model.
    pub initial: Tensor,
    /// Whether weight decay applies: it is contracted, and neither bias, norm, table nor scale.
    pub decay: bool,
}

/// A constant that does not train, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frozen {
    /// Name of the constant in the model.
    pub initializer: String,
    /// Why.
    pub reason: &'static str,
}

/// A weight before it is known whether the loss depends on it.
pub(super) struct Candidate {
    value: ValueId,
    param: Param,
}

impl Candidate {
    /// The constant.
    pub(super) fn value(&self) -> ValueId {
        self.value
    }
}

/// A weight as a graph input.
pub(super) struct ParamInput {
    pub(super) value: ValueId,
    pub(super) param: Param,
}

/// Operators beside products and normalizations in which a constant is a weight: bias, scale, table, or part of the sequence.
const AFFINE: [&str; 8] = ["Add", "Sub", "Mul", "Div", "Sum", "Concat", "Gather", "PRelu"];
/// Operators whose first input keeps its content: the weight is what stands behind them.
const LAYOUT: [&str; 8] = ["Expand", "Tile", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Flatten"];
/// A mean or a scale of an image has at most this many channels.
const CHANNELS_MAX: usize = 4;

/// A mask holds at least one value below this: no trained table of a network does.
const MASK_BELOW: f32 = -50.0;

/// Finds what may train, and gives each its own constant. The graph must be the model's own, without gates.
pub(super) fn choose(graph: &mut Graph, facts: &Facts, train: Train) -> (Vec<Candidate>, Vec<Frozen>) {
    let (mut found, mut frozen) = (Vec::new(), Vec::new());
    if train == Train::Gates {
        return (found, frozen);
    }
    let constants: Vec<ValueId> = graph.values().map(|(v, _)| v).filter(|v| graph.is_constant(*v)).collect();
    for v in constants {
        let Some(tensor) = graph.constant(v) else { continue };
        let name = graph.value(v).name().to_string();
        if !tensor.dtype.is_float() || graph.value(v).users().is_empty() {
            continue;
        }
        if let Some(reason) = why_frozen(graph, facts, v, &tensor) {
            frozen.push(Frozen { initializer: name, reason });
            continue;
        }
        let parts = split_uses(graph, v);
        let copies = parts.len();
        for (n, uses) in parts.into_iter().enumerate() {
            if train == Train::Norm && !uses.iter().all(|u| is_norm(graph, *u)) {
                continue;
            }
            let input = if copies == 1 { format!("param.{name}") } else { format!("param.{name}@{n}") };
            let decay = uses.iter().any(|u| is_contracted(graph, *u, &tensor, 0));
            let whole = copies == 1 && graph.value(v).producer().is_none();
            let value = if whole { v } else { own_copy(graph, &name, &tensor, &uses) };
            found.push(Candidate {
                value,
                param: Param { input, initializer: name.clone(), uses, initial: tensor.clone(), decay },
            });
        }
    }
    (found, frozen)
}

fn own_copy(graph: &mut Graph, name: &str, tensor: &Tensor, uses: &[Use]) -> ValueId {
    let copy = graph.add_initializer(name, tensor.clone());
    for at in uses {
        graph.set_input(*at, Some(copy));
    }
    copy
}

/// Makes graph inputs of the candidates on which the loss depends.
pub(super) fn make_inputs(
    graph: &mut Graph,
    loss: ValueId,
    candidates: Vec<Candidate>,
) -> Result<Vec<ParamInput>, SupernetError> {
    let values: Vec<ValueId> = candidates.iter().map(|c| c.value).collect();
    let facts = infer::facts(graph)?;
    let needed = sweep::needed_values(graph, &facts, loss, &values);
    let mut inputs = Vec::new();
    for Candidate { value, param } in candidates {
        if needed[value] && graph.take_initializer(value).is_some() {
            let dims = param.initial.dims.iter().map(|d| DeclaredDim::Size(*d as i64)).collect();
            interface::make_input(graph, value, &param.input, DType::F32, dims)?;
            inputs.push(ParamInput { value, param });
        }
    }
    Ok(inputs)
}

fn why_frozen(graph: &Graph, facts: &Facts, v: ValueId, tensor: &Tensor) -> Option<&'static str> {
    if tensor.element_count() < 2 {
        return Some("a single number");
    }
    if tensor.dtype != DType::F32 {
        return Some("not float32");
    }
    if graph.outputs().contains(&v) {
        return Some("a graph output");
    }
    if tensor.to_f32s()?.iter().any(|x| !x.is_finite() || *x < MASK_BELOW) {
        return Some("an attention mask");
    }
    let batch = graph.inputs().first().and_then(|i| facts.shape(*i)).and_then(<[Dim]>::first).and_then(Dim::size);
    let repeated = tensor.dims.len() >= 3 && batch.is_some_and(|b| b > 1 && tensor.dims[0] == b);
    if repeated && !graph.value(v).users().iter().any(|u| is_contracted(graph, *u, tensor, 0)) {
        return Some("repeated over a static batch by the exporter");
    }
    graph.value(v).users().iter().find_map(|at| frozen_at(graph, *at, tensor, 0))
}

/// Why a constant cannot train at one of its uses, looking through nodes that only rearrange it.
fn frozen_at(graph: &Graph, at: Use, tensor: &Tensor, depth: usize) -> Option<&'static str> {
    let node = graph.node(at.node);
    if at.slot >= node.inputs().len() {
        return Some("read inside a subgraph");
    }
    if let Some(outputs) = rearranged(graph, at.node, at.slot, depth) {
        return outputs.into_iter().find_map(|u| frozen_at(graph, u, tensor, depth + 1));
    }
    if is_contracted(graph, at, tensor, depth) {
        return None;
    }
    if !costs(graph, at.node) && !node.op().ends_with("Normalization") && !AFFINE.contains(&node.op()) {
        return Some("not a weight of its reader");
    }
    let wide = tensor.dims.iter().filter(|d| **d > 1).count() >= 2;
    let others = || node.inputs().iter().enumerate().filter(|(slot, _)| *slot != at.slot).filter_map(|(_, v)| *v);
    if node.op() == "Mul" && wide {
        return Some("a table that multiplies");
    }
    if node.op() == "BatchNormalization" && at.slot >= 3 {
        return Some("running statistics");
    }
    let arithmetic = ["Add", "Sub", "Mul", "Div"].contains(&node.op());
    let small = tensor.element_count() <= CHANNELS_MAX;
    if arithmetic && small && others().any(|v| graph.inputs().contains(&v)) {
        return Some("prepares a model input");
    }
    None
}

/// Uses behind a node that only rearranges the constant: a layout operator, or one all of whose inputs are constants.
fn rearranged(graph: &Graph, node: NodeId, slot: usize, depth: usize) -> Option<Vec<Use>> {
    let n = graph.node(node);
    let layout = slot == 0 && LAYOUT.contains(&n.op());
    let constant = |(s, v): (usize, &Option<ValueId>)| s == slot || v.is_none_or(|v| graph.is_constant(v));
    let content = slot == 0 || n.op() == "Concat";
    let fixed = content && n.inputs().iter().enumerate().all(constant) && !costs(graph, node);
    let only = depth < 8 && (layout || fixed);
    only.then(|| n.outputs().iter().flatten().flat_map(|v| graph.value(*v).users().to_vec()).collect())
}

fn costs(graph: &Graph, node: NodeId) -> bool {
    let n = graph.node(node);
    ops::rule_of(graph, n).is_some_and(|r| matches!(r.cost, Cost::Rule(_)))
}

/// Whether the constant is a factor of a matrix product or convolution: the first two inputs of an operator that has a cost.
fn is_contracted(graph: &Graph, at: Use, tensor: &Tensor, depth: usize) -> bool {
    if costs(graph, at.node) {
        return at.slot < 2 && tensor.dims.len() >= 2;
    }
    let behind = rearranged(graph, at.node, at.slot, depth);
    behind.is_some_and(|uses| uses.into_iter().any(|u| is_contracted(graph, u, tensor, depth + 1)))
}

/// Groups of uses that share one trained tensor.
fn split_uses(graph: &Graph, v: ValueId) -> Vec<Vec<Use>> {
    let users = graph.value(v).users().to_vec();
    let tensor = graph.constant(v);
    if users.len() < 2 || tensor.is_some_and(|t| users.iter().all(|u| is_contracted(graph, *u, &t, 0))) {
        return vec![users];
    }
    let mut parts: Vec<(Option<ValueId>, Vec<Use>)> = Vec::new();
    for at in users {
        let anchor = weight_before(graph, at);
        match parts.iter_mut().find(|(a, _)| anchor.is_some() && *a == anchor) {
            Some((_, uses)) => uses.push(at),
            None => parts.push((anchor, vec![at])),
        }
    }
    parts.into_iter().map(|(_, uses)| uses).collect()
}

/// The contracted constant that a bias belongs to: of its own node, or of the node that makes the other operand.
fn weight_before(graph: &Graph, at: Use) -> Option<ValueId> {
    let weight_of = |node: NodeId| {
        let inputs = graph.node(node).inputs().iter().enumerate();
        let mut constants = inputs.filter_map(|(slot, v)| v.filter(|v| graph.is_constant(*v)).map(|v| (slot, v)));
        constants.find(|(slot, v)| graph.constant(*v).is_some_and(|t| is_contracted(graph, Use { node, slot: *slot }, &t, 0)))
    };
    let before = || graph.node(at.node).inputs().iter().flatten().filter_map(|v| graph.value(*v).producer());
    weight_of(at.node).or_else(|| before().find_map(|(p, _)| weight_of(p))).map(|(_, v)| v)
}

/// Whether the constant is scale or bias of a normalization, as an operator or written out before opset 17.
fn is_norm(graph: &Graph, at: Use) -> bool {
    let node = graph.node(at.node);
    if node.op().ends_with("Normalization") {
        return at.slot == 1 || at.slot == 2;
    }
    let producer = |v: ValueId| graph.value(v).producer().map(|(p, _)| p);
    let is_scale = |node: NodeId| {
        let n = graph.node(node);
        n.op() == "Mul" && n.inputs().iter().flatten().filter_map(|v| producer(*v)).any(|p| is_quotient_by_root(graph, p))
    };
    let operands = || node.inputs().iter().flatten().filter_map(|v| producer(*v));
    is_scale(at.node) || (node.op() == "Add" && operands().any(is_scale))
}

fn is_quotient_by_root(graph: &Graph, node: NodeId) -> bool {
    let divisor = graph.node(node).input(1).and_then(|v| graph.value(v).producer());
    graph.node(node).op() == "Div" && divisor.is_some_and(|(p, _)| graph.node(p).op() == "Sqrt")
}
