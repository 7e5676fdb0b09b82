//! The one place of mutation: every change of a graph is one of these methods, each of which keeps use-def both ways.
//!
//! Nodes may be added in any order; [`Graph::sort`] restores the topological order and moves nothing that need not move.

use bytes::Bytes;

use super::elements::Elements;
use super::id::{Id, NodeId, ValueId};
use super::model::{Attr, AttrValue, Call, Declared, Graph, Node, Use, Value};
use super::tensor::Tensor;

/// A node to be added: operator, inputs and attributes; see [`Graph::add_node`].
#[derive(Clone, Debug, Default)]
pub struct NewNode {
    /// Its name; may be empty.
    pub name: String,
    /// Operator type.
    pub op: String,
    /// Operator domain.
    pub domain: String,
    /// Inputs; `None` where an optional one is left out.
    pub inputs: Vec<Option<ValueId>>,
    /// Outer values that its subgraphs read.
    pub captures: Vec<ValueId>,
    /// Outputs, which no other node makes; `None` where an optional one is left out.
    pub outputs: Vec<Option<ValueId>>,
    /// Attributes.
    pub attrs: Vec<Attr>,
    /// Encoded rest of the record.
    pub extra: Bytes,
    /// The inlined call that the node belongs to.
    pub call: Option<usize>,
}

impl Graph {
    /// An empty graph for the given opset imports.
    pub fn new(ir_version: i64, opsets: Vec<(String, i64)>, shell: Bytes) -> Self {
        Self { ir_version, opsets, shell, ..Self::default() }
    }

    /// A new value; `name` is made unique by a number where it is taken (or empty).
    pub fn add_value(&mut self, name: &str) -> ValueId {
        let mut unique = name.to_string();
        if unique.is_empty() || self.names.contains_key(&unique) {
            let base = if name.is_empty() { "value" } else { name };
            let mut n = self.numbers.get(base).copied().unwrap_or(0);
            while unique.is_empty() || self.names.contains_key(&unique) {
                n += 1;
                unique = format!("{base}_{n}");
            }
            self.numbers.insert(base.to_string(), n);
        }
        let id = ValueId::new(self.values.len());
        self.names.insert(unique.clone(), id);
        self.values.push(Value { name: unique, producer: None, users: Vec::new(), initializer: None, declared: None });
        id
    }

    /// A new initializer, at the end of the list.
    pub fn add_initializer(&mut self, name: &str, tensor: Tensor) -> ValueId {
        let id = self.add_value(name);
        self.make_initializer(id, tensor);
        id
    }

    /// Makes a value that nothing produces an initializer.
    pub fn make_initializer(&mut self, id: ValueId, tensor: Tensor) {
        if self.values[id.index()].initializer.replace(tensor).is_none() {
            self.initializers.push(id);
        }
    }

    /// The same graph with the elements of large floating-point constants left out: enough to count what a cut would leave.
    pub fn hollow(&self) -> Self {
        let mut out = self.clone();
        for v in out.initializers.clone() {
            if let Some(t) = &mut out.values[v.index()].initializer
                && t.dtype.is_float()
                && t.element_count() > 4096
            {
                t.bytes = Elements::default();
            }
        }
        out
    }

    /// Takes an initializer's content away: the value may then become a graph input.
    pub fn take_initializer(&mut self, id: ValueId) -> Option<Tensor> {
        self.initializers.retain(|v| *v != id);
        self.values[id.index()].initializer.take()
    }

    /// Makes a value a graph input, at the end of the list.
    pub fn add_input(&mut self, id: ValueId, declared: Declared) {
        self.values[id.index()].declared = Some(declared);
        self.inputs.push(id);
    }

    /// Makes a value a graph output, at the end of the list.
    pub fn add_output(&mut self, id: ValueId, declared: Declared) {
        self.values[id.index()].declared.get_or_insert(declared);
        self.outputs.push(id);
    }

    /// Changes what is declared of a graph input or output.
    pub fn set_declared(&mut self, id: ValueId, declared: Declared) {
        self.values[id.index()].declared = Some(declared);
    }

    /// Sets an opset import.
    pub fn set_opset(&mut self, domain: &str, version: i64) {
        match self.opsets.iter_mut().find(|(d, _)| d == domain) {
            Some(entry) => entry.1 = version,
            None => self.opsets.push((domain.to_string(), version)),
        }
    }

    /// Replaces the encoded shell of the model; only `onnx/` reads and makes it.
    pub fn set_shell(&mut self, shell: Bytes) {
        self.shell = shell;
    }

    /// Records an inlined call, or an inlined branch of an If with the condition given; nodes name it by the returned number.
    pub fn add_call(&mut self, encoded: Bytes, condition: Option<bool>) -> usize {
        self.calls.push(Call { encoded, condition, nodes: Vec::new(), is_inlined: false });
        self.calls.len() - 1
    }

    /// Lets a call or a branch stay inlined when the graph is written.
    pub fn keep_inlined(&mut self, call: usize) {
        self.calls[call].is_inlined = true;
    }

    /// Adds a node at the end of the order.
    pub fn add_node(&mut self, new: NewNode) -> NodeId {
        let id = NodeId::new(self.nodes.len());
        for (slot, value) in new.inputs.iter().enumerate() {
            if let Some(v) = value {
                self.values[v.index()].users.push(Use { node: id, slot });
            }
        }
        for (i, v) in new.captures.iter().enumerate() {
            self.values[v.index()].users.push(Use { node: id, slot: new.inputs.len() + i });
        }
        for (slot, value) in new.outputs.iter().enumerate() {
            if let Some(v) = value {
                self.values[v.index()].producer = Some((id, slot));
            }
        }
        if let Some(call) = new.call {
            self.calls[call].nodes.push(id);
        }
        let NewNode { name, op, domain, inputs, captures, outputs, attrs, extra, call } = new;
        self.nodes.push(Some(Node { name, op, domain, inputs, captures, outputs, attrs, extra, call }));
        self.order.push(id);
        id
    }

    /// Adds a node of the default domain with one output called `name`, and returns that output.
    pub fn add_op(&mut self, op: &str, inputs: &[ValueId], attrs: Vec<Attr>, name: &str) -> ValueId {
        let out = self.add_value(name);
        self.add_node(NewNode {
            op: op.to_string(),
            inputs: inputs.iter().map(|v| Some(*v)).collect(),
            outputs: vec![Some(out)],
            attrs,
            ..NewNode::default()
        });
        out
    }

    /// Makes input `slot` of a node read `value`.
    pub fn set_input(&mut self, at: Use, value: Option<ValueId>) {
        let node = self.nodes[at.node.index()].as_mut().expect("I1: ids name nodes that exist");
        while node.inputs.len() <= at.slot {
            assert!(node.captures.is_empty(), "slots of captures would move");
            node.inputs.push(None);
        }
        let old = std::mem::replace(&mut node.inputs[at.slot], value);
        if let Some(old) = old {
            self.values[old.index()].users.retain(|u| *u != at);
        }
        if let Some(new) = value {
            self.values[new.index()].users.push(at);
        }
    }

    /// Gives output `slot` of a node, which was left out, a value that nothing produces.
    pub fn set_output(&mut self, id: NodeId, slot: usize, value: ValueId) {
        let node = self.nodes[id.index()].as_mut().expect("I1: ids name nodes that exist");
        if node.outputs.len() <= slot {
            node.outputs.resize(slot + 1, None);
        }
        assert!(node.outputs[slot].is_none(), "I2: the value there would lose its source");
        node.outputs[slot] = Some(value);
        self.values[value.index()].producer = Some((id, slot));
    }

    /// Makes everything that reads `old` read `new`; graph outputs stay. Captures by subgraphs stay too, as they go by name.
    pub fn replace_uses(&mut self, old: ValueId, new: ValueId) {
        for at in self.values[old.index()].users.clone() {
            if at.slot < self.node(at.node).inputs.len() {
                self.set_input(at, Some(new));
            }
        }
    }

    /// Sets or replaces an attribute.
    pub fn set_attr(&mut self, id: NodeId, name: &str, value: AttrValue) {
        let node = self.nodes[id.index()].as_mut().expect("I1: ids name nodes that exist");
        match node.attrs.iter_mut().find(|a| a.name == name) {
            Some(attr) => attr.value = value,
            None => node.attrs.push(Attr { name: name.to_string(), value, extra: Bytes::new() }),
        }
    }

    /// Removes an attribute.
    pub fn remove_attr(&mut self, id: NodeId, name: &str) {
        let node = self.nodes[id.index()].as_mut().expect("I1: ids name nodes that exist");
        node.attrs.retain(|a| a.name != name);
    }

    /// Replaces the content of a constant by itself: of an initializer, or of a Constant node.
    pub fn set_constant(&mut self, id: ValueId, tensor: Tensor) {
        match self.values[id.index()].producer {
            Some((node, _)) => {
                let node = self.nodes[node.index()].as_mut().expect("I1: ids name nodes that exist");
                node.attrs = vec![Attr { name: "value".into(), value: AttrValue::Tensor(tensor), extra: Bytes::new() }];
            }
            None => self.make_initializer(id, tensor),
        }
    }

    /// Gives a value another name, which must be free.
    pub fn rename(&mut self, id: ValueId, name: &str) {
        assert!(!self.names.contains_key(name), "I5: names are unique");
        let old = std::mem::replace(&mut self.values[id.index()].name, name.to_string());
        self.names.remove(&old);
        self.names.insert(name.to_string(), id);
    }

    /// Makes `new` the graph output in the place of `old`, under the name of `old`; `old` gets a name made from it.
    pub fn move_output(&mut self, old: ValueId, new: ValueId) {
        let name = self.values[old.index()].name.clone();
        let mut n = 0;
        let mut free = format!("{name}_inner");
        while self.names.contains_key(&free) {
            n += 1;
            free = format!("{name}_inner_{n}");
        }
        self.rename(old, &free);
        self.rename(new, &name);
        let declared = self.values[old.index()].declared.take();
        self.values[new.index()].declared = declared;
        for output in &mut self.outputs {
            if *output == old {
                *output = new;
            }
        }
    }

    /// Removes a node; its outputs become values that nothing makes.
    pub fn remove_node(&mut self, id: NodeId) {
        self.unlink_node(id);
        self.order.retain(|n| *n != id);
    }

    /// Removes a node from everywhere but the order.
    fn unlink_node(&mut self, id: NodeId) {
        let Some(node) = self.nodes[id.index()].take() else { return };
        for v in node.inputs.iter().flatten().chain(&node.captures) {
            self.values[v.index()].users.retain(|u| u.node != id);
        }
        for v in node.outputs.iter().flatten() {
            self.values[v.index()].producer = None;
        }
    }

    /// Removes a graph output from the list.
    pub fn remove_output(&mut self, id: ValueId) {
        self.outputs.retain(|v| *v != id);
    }

    /// Removes what no output needs: nodes first, then initializers among `candidates` (or any, where `None`) without users.
    ///
    /// Returns the labels of the removed nodes.
    pub fn remove_dead(&mut self, keep_unused: &dyn Fn(&Graph, ValueId) -> bool) -> Vec<String> {
        let mut removed = Vec::new();
        for id in self.order.clone().into_iter().rev() {
            let alive = self
                .node(id)
                .outputs
                .iter()
                .flatten()
                .any(|v| !self.value(*v).users.is_empty() || self.outputs.contains(v) || keep_unused(self, *v));
            if !alive {
                removed.push(self.label(id));
                self.unlink_node(id);
            }
        }
        self.order.retain(|n| self.nodes[n.index()].is_some());
        let is_dead = |v: &ValueId| self.value(*v).users.is_empty() && !self.outputs.contains(v) && !keep_unused(self, *v);
        let (dead, alive): (Vec<_>, Vec<_>) = self.initializers.iter().partition(|v| is_dead(v));
        self.initializers = alive;
        dead.into_iter().for_each(|v| self.values[v.index()].initializer = None);
        removed.reverse();
        removed
    }

    /// Restores the topological order: each node keeps its place unless something that it reads stands behind it.
    pub fn sort(&mut self) {
        let mut done = vec![false; self.nodes.len()];
        let mut order = Vec::with_capacity(self.order.len());
        for start in self.order.clone() {
            let mut stack = vec![(start, false)];
            while let Some((id, ready)) = stack.pop() {
                if done[id.index()] {
                    continue;
                }
                if ready {
                    done[id.index()] = true;
                    order.push(id);
                    continue;
                }
                stack.push((id, true));
                let node = self.node(id);
                for v in node.inputs.iter().flatten().chain(&node.captures).rev_sorted() {
                    if let Some((p, _)) = self.value(*v).producer
                        && !done[p.index()]
                    {
                        stack.push((p, false));
                    }
                }
            }
        }
        self.order = order;
    }
}

/// Inputs pushed in reverse, so that the stack visits them in order.
trait RevSorted: Iterator + Sized {
    fn rev_sorted(self) -> std::iter::Rev<std::vec::IntoIter<Self::Item>> {
        self.collect::<Vec<_>>().into_iter().rev()
    }
}

impl<I: Iterator> RevSorted for I {}
