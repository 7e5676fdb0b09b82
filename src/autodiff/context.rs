//! What an operator's `grad` rule sees: the forward node, the gradients of its outputs, and a builder for more nodes.
//!
//! Example, `y = a * b` with numpy broadcasting: `da = sum_to(dy * b, a)`, `db = sum_to(dy * a, b)`.

use crate::graph::build::Builder;
use crate::graph::{DType, Graph, Node, NodeId, ValueId};
use crate::infer::{Dim, Facts, Known};

/// The context of one `grad` rule.
pub struct GradCx<'a> {
    /// Appends nodes to the training graph.
    pub b: Builder<'a>,
    facts: &'a Facts,
    node: Node,
    opset: i64,
    grads: Vec<Option<ValueId>>,
    wanted: Vec<bool>,
    given: Vec<Option<ValueId>>,
    zero: Vec<bool>,
}

impl<'a> GradCx<'a> {
    /// The context of node `id`, whose outputs have the gradients `grads`, and whose inputs want one where `wanted`.
    pub fn new(graph: &'a mut Graph, facts: &'a Facts, id: NodeId, grads: Vec<Option<ValueId>>, wanted: Vec<bool>) -> Self {
        let node = graph.node(id).clone();
        let opset = graph.opset(node.domain()).unwrap_or(0);
        let (given, zero) = (vec![None; node.inputs().len()], vec![false; node.inputs().len()]);
        Self { b: Builder::new(graph, "grad."), facts, node, opset, grads, wanted, given, zero }
    }

    /// The forward node.
    pub fn node(&self) -> &Node {
        &self.node
    }
    /// Opset of the node's domain.
    pub fn opset(&self) -> i64 {
        self.opset
    }
    /// The forward value at input `slot`, which must be there.
    pub fn input(&self, slot: usize) -> ValueId {
        self.node.input(slot).expect("rules ask for inputs that are there")
    }
    /// The forward value at output `slot`, which must be there.
    pub fn output(&self, slot: usize) -> ValueId {
        self.node.output(slot).expect("rules ask for outputs that are there")
    }
    /// Shape of a forward value; empty where unknown.
    pub fn shape(&self, forward: ValueId) -> &'a [Dim] {
        self.facts.shape(forward).unwrap_or(&[])
    }
    /// Element type of a forward value; float32 where unknown.
    pub fn dtype(&self, forward: ValueId) -> DType {
        self.facts.get(forward).dtype.unwrap_or(DType::F32)
    }
    /// Known integers of a forward value, where all are numbers.
    pub fn numbers(&self, forward: ValueId) -> Option<Vec<i64>> {
        self.facts.get(forward).known.as_ref()?.numbers()
    }
    /// Content of a forward value, where it is known; sizes may be symbols.
    pub fn known(&self, forward: ValueId) -> Option<&'a Known> {
        self.facts.get(forward).known.as_ref()
    }
    /// The gradient of output `slot`, where the loss depends on it.
    pub fn grad(&self, slot: usize) -> Option<ValueId> {
        self.grads.get(slot).copied().flatten()
    }
    /// The gradient of output 0. The sweep calls a rule only where some output has a gradient.
    pub fn dy(&self) -> Result<ValueId, String> {
        self.grad(0).ok_or_else(|| "only a secondary output has a gradient".to_string())
    }
    /// Whether input `slot` wants a gradient.
    pub fn wants(&self, slot: usize) -> bool {
        self.wanted.get(slot).copied().unwrap_or(false)
    }
    /// Gives the gradient of input `slot`; its shape must be the input's.
    pub fn give(&mut self, slot: usize, grad: ValueId) {
        self.given[slot] = Some(grad);
    }
    /// Says that the output does not depend on the content of input `slot`. What gets neither this nor a gradient is an error.
    pub fn give_zero(&mut self, slot: usize) {
        self.zero[slot] = true;
    }
    /// Whether the rule said so of input `slot`.
    pub fn is_zero(&self, slot: usize) -> bool {
        self.zero[slot]
    }
    /// Ends the rule: the gradients given, by input slot.
    pub fn into_given(self) -> Vec<Option<ValueId>> {
        self.given
    }

    /// A scalar constant of the element type of the forward value `like`.
    pub fn scalar(&mut self, value: f32, like: ValueId) -> ValueId {
        let dtype = self.dtype(like);
        self.b.scalar(dtype, value)
    }

    /// Sums `grad`, which has the shape of output 0, over the axes along which input `slot` was broadcast.
    pub fn sum_to(&mut self, grad: ValueId, slot: usize) -> ValueId {
        let output = self.shape(self.output(0));
        self.sum_from(grad, output, slot)
    }

    /// Sums `grad` of shape `from` over the axes along which input `slot` is broadcast to it.
    pub fn sum_from(&mut self, grad: ValueId, from: &[Dim], slot: usize) -> ValueId {
        let input = self.shape(self.input(slot));
        let extra = from.len().saturating_sub(input.len());
        let stretched = |axis: &usize| *axis >= extra && input[axis - extra].is(1) && !from[*axis].is(1);
        let leading: Vec<i64> = (0..extra as i64).collect();
        let kept: Vec<i64> = (0..from.len()).filter(stretched).map(|a| a as i64).collect();
        let mut out = grad;
        if !kept.is_empty() {
            out = self.b.reduce_sum(out, &kept, true);
        }
        if !leading.is_empty() {
            out = self.b.reduce_sum(out, &leading, false);
        }
        out
    }
}
