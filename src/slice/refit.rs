//! What an operator's `refit` rule sees and may do: the node's axes were cut, its attributes and shape constants follow.

use super::shapes::gather;
use crate::graph::{AttrValue, DType, Graph, Node, NodeId, Tensor, Use, ValueId};
use crate::infer::{Dim, Facts};

/// Why a node could not follow a cut. Reaching this is a fault of the axis rules: the plan should have been refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("node {node} ({op}) cannot follow the cut: {what}")]
pub struct RefitError {
    /// The node's label.
    pub node: String,
    /// Its operator.
    pub op: String,
    /// What does not fit.
    pub what: String,
}

/// What becomes of a constant that is not cut by its own axes alone: packed or blocked weights and what belongs to their blocks.
pub enum Edit {
    /// These positions of an axis stay.
    Take {
        /// The axis.
        axis: usize,
        /// Positions, in order.
        kept: Vec<usize>,
    },
    /// Stored anew.
    Repack(Box<dyn Fn(&Tensor) -> Tensor>),
}

/// What a `refit` rule sees: the node as it was, with all shapes from before the cut, and what stays of them.
pub struct RefitCx<'a> {
    pub(crate) graph: &'a mut Graph,
    /// The graph as it was analysed.
    pub(crate) original: &'a Graph,
    /// The node as it was analysed.
    pub(crate) origin: NodeId,
    /// The node to change: the same, or a copy of it that handles one part of a value.
    pub(crate) id: NodeId,
    pub(crate) facts: &'a Facts,
    /// Positions of the old axis that stay, in order, for axes that lost some; no positions where the axis lost some but its size
    /// is only known at run time (`batch * heads`).
    pub(crate) kept: &'a dyn Fn(ValueId, usize) -> Option<&'a [usize]>,
    /// Constants that the operator asked to replace: (input slot, new integers where they change).
    pub(crate) patches: Vec<(usize, Vec<(usize, i64)>)>,
    /// Constants that the operator asked to edit, after they were cut along the axes that the plan cuts.
    pub(crate) edits: Vec<(usize, Edit)>,
}

impl<'a> RefitCx<'a> {
    /// The node as it was.
    pub fn node(&self) -> &'a Node {
        self.original.node(self.origin)
    }

    /// Opset of the node's domain.
    pub fn opset(&self) -> i64 {
        self.original.opset(self.node().domain()).unwrap_or(0)
    }

    /// Shape of input `slot` before the cut; empty where it is left out or unknown.
    pub fn old_input(&self, slot: usize) -> &'a [Dim] {
        self.node().input(slot).and_then(|v| self.facts.shape(v)).unwrap_or(&[])
    }

    /// Shape of output `slot` before the cut; empty where it is left out or unknown.
    pub fn old_output(&self, slot: usize) -> &'a [Dim] {
        self.node().output(slot).and_then(|v| self.facts.shape(v)).unwrap_or(&[])
    }

    /// Integers that input `slot` held before the cut, where known (entries may be symbols).
    pub fn old_ints(&self, slot: usize) -> Option<&'a [Dim]> {
        self.facts.get(self.node().input(slot)?).known.as_ref()?.ints()
    }

    /// Positions that stay of an input's axis; `None` where the axis is whole, empty where its size is only known at run time.
    pub fn kept_input(&self, slot: usize, axis: usize) -> Option<&'a [usize]> {
        (self.kept)(self.node().input(slot)?, axis)
    }

    /// Positions that stay of an output's axis; `None` where the axis is whole, empty where its size is only known at run time.
    pub fn kept_output(&self, slot: usize, axis: usize) -> Option<&'a [usize]> {
        (self.kept)(self.node().output(slot)?, axis)
    }

    /// Element type of input `slot`.
    pub fn input_dtype(&self, slot: usize) -> Option<DType> {
        self.facts.get(self.node().input(slot)?).dtype
    }

    /// Has a constant at an input edited once the plan's cuts are done; only for this node, where others read it.
    pub fn edit_constant(&mut self, slot: usize, edit: Edit) {
        self.edits.push((slot, edit));
    }

    /// Sets an attribute.
    pub fn set_attr(&mut self, name: &str, value: AttrValue) {
        self.graph.set_attr(self.id, name, value);
    }

    /// Gives some entries of the integer vector at input `slot` new values: `(entry, value)`.
    ///
    /// The engine finds the cheapest form: the constant is replaced (cloned first where others read it), or the piece of the
    /// Concat that the entry comes from is, or a Where behind the run-time arithmetic puts the numbers in.
    pub fn patch_ints(&mut self, slot: usize, entries: Vec<(usize, i64)>) {
        if !entries.is_empty() {
            self.patches.push((slot, entries));
        }
    }

    /// Lets the node read these positions of an input's axis, counted after the cut, by a Gather before it.
    pub fn take_input(&mut self, slot: usize, axis: usize, positions: &[usize]) {
        if let Some(v) = self.graph.node(self.id).input(slot) {
            let taken = gather(self.graph, v, axis, positions, "cut");
            self.graph.set_input(Use { node: self.id, slot }, Some(taken));
        }
    }

    /// The error of this node.
    pub fn error(&self, what: impl Into<String>) -> RefitError {
        RefitError { node: self.original.label(self.origin), op: self.node().op().to_string(), what: what.into() }
    }
}
