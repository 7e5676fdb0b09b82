//! The intermediate representation: a graph as a value, without operator meaning and without input or output.
//!
//! A value is a graph input, an initializer, or an output of a node. Both ways of use-def are kept: a value knows its producer
//! and its users, a node its inputs and outputs. All changes go through [`super::edit`], so the two never disagree.

use bytes::Bytes;
use std::collections::BTreeMap;

use super::id::{Id, NodeId, ValueId};
use super::tensor::{DType, Tensor};

/// A dimension as a file declares it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeclaredDim {
    /// A fixed size.
    Size(i64),
    /// A symbol; empty where the file says nothing.
    Symbol(String),
}

/// What the file declares of a graph input or output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declared {
    /// Element type, where it is a tensor of a known type.
    pub dtype: Option<DType>,
    /// Shape, where it is declared.
    pub dims: Option<Vec<DeclaredDim>>,
    /// The rest (doc string, metadata, denotations), encoded; only `onnx/` reads it.
    pub extra: Bytes,
}

/// One use of a value: input number `slot` of `node`. Slots behind the node's inputs are values that a subgraph of it captures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Use {
    /// The node that reads.
    pub node: NodeId,
    /// Which of its inputs.
    pub slot: usize,
}

/// A value of the graph.
#[derive(Clone, Debug)]
pub struct Value {
    pub(super) name: String,
    pub(super) producer: Option<(NodeId, usize)>,
    pub(super) users: Vec<Use>,
    pub(super) initializer: Option<Tensor>,
    pub(super) declared: Option<Declared>,
}

impl Value {
    /// Its name in the file.
    pub fn name(&self) -> &str {
        &self.name
    }
    /// The node and output number that makes it.
    pub fn producer(&self) -> Option<(NodeId, usize)> {
        self.producer
    }
    /// Everything that reads it, in the order in which the uses were made.
    pub fn users(&self) -> &[Use] {
        &self.users
    }
    /// Its content, where it is an initializer.
    pub fn initializer(&self) -> Option<&Tensor> {
        self.initializer.as_ref()
    }
    /// What the file declares of it, where it is a graph input or output.
    pub fn declared(&self) -> Option<&Declared> {
        self.declared.as_ref()
    }
}

/// A subgraph attribute (If, Loop, Scan). Its body is not analysed: what it captures is a barrier.
#[derive(Clone, Debug, PartialEq)]
pub struct Subgraph {
    /// The encoded body.
    pub encoded: Bytes,
    /// Elements of its constants that count as parameters.
    pub param_count: u64,
}

/// The content of an attribute.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the names are those of AttributeProto.AttributeType")]
pub enum AttrValue {
    Int(i64),
    Float(f32),
    Str(Bytes),
    Tensor(Tensor),
    Ints(Vec<i64>),
    Floats(Vec<f32>),
    Strs(Vec<Bytes>),
    Graph(Subgraph),
    Graphs(Vec<Subgraph>),
    /// Any other type, as the file encodes the attribute.
    Other(Bytes),
}

/// A named attribute of a node.
#[derive(Clone, Debug, PartialEq)]
pub struct Attr {
    /// Its name.
    pub name: String,
    /// Its content.
    pub value: AttrValue,
    /// The rest (doc string), encoded; only `onnx/` reads it.
    pub extra: Bytes,
}

/// A node of the graph.
#[derive(Clone, Debug)]
pub struct Node {
    pub(super) name: String,
    pub(super) op: String,
    pub(super) domain: String,
    pub(super) inputs: Vec<Option<ValueId>>,
    pub(super) captures: Vec<ValueId>,
    pub(super) outputs: Vec<Option<ValueId>>,
    pub(super) attrs: Vec<Attr>,
    pub(super) extra: Bytes,
    pub(super) call: Option<usize>,
}

impl Node {
    /// Its name; may be empty.
    pub fn name(&self) -> &str {
        &self.name
    }
    /// Operator type.
    pub fn op(&self) -> &str {
        &self.op
    }
    /// Operator domain; the default domain is the empty string.
    pub fn domain(&self) -> &str {
        &self.domain
    }
    /// Inputs; `None` where an optional one is left out.
    pub fn inputs(&self) -> &[Option<ValueId>] {
        &self.inputs
    }
    /// Input number `slot`, if it is there.
    pub fn input(&self, slot: usize) -> Option<ValueId> {
        self.inputs.get(slot).copied().flatten()
    }
    /// Outer values that its subgraphs read.
    pub fn captures(&self) -> &[ValueId] {
        &self.captures
    }
    /// Outputs; `None` where an optional one is left out.
    pub fn outputs(&self) -> &[Option<ValueId>] {
        &self.outputs
    }
    /// Output number `slot`, if it is there.
    pub fn output(&self, slot: usize) -> Option<ValueId> {
        self.outputs.get(slot).copied().flatten()
    }
    /// All attributes in file order.
    pub fn attrs(&self) -> &[Attr] {
        &self.attrs
    }
    /// The rest of the node's record (doc string, metadata, overload), encoded; only `onnx/` reads it.
    pub fn extra(&self) -> &Bytes {
        &self.extra
    }
    /// The call of a model-local function, or the If, that this node was inlined from: an index into [`Graph::calls`].
    pub fn call(&self) -> Option<usize> {
        self.call
    }
    /// The attribute `name`.
    pub fn attr(&self, name: &str) -> Option<&AttrValue> {
        self.attrs.iter().find(|a| a.name == name).map(|a| &a.value)
    }
    /// The integer attribute `name`.
    pub fn attr_int(&self, name: &str) -> Option<i64> {
        match self.attr(name) {
            Some(AttrValue::Int(v)) => Some(*v),
            _ => None,
        }
    }
    /// The float attribute `name`.
    pub fn attr_float(&self, name: &str) -> Option<f32> {
        match self.attr(name) {
            Some(AttrValue::Float(v)) => Some(*v),
            _ => None,
        }
    }
    /// The integer-list attribute `name`.
    pub fn attr_ints(&self, name: &str) -> Option<&[i64]> {
        match self.attr(name) {
            Some(AttrValue::Ints(v)) => Some(v),
            _ => None,
        }
    }
    /// The string attribute `name`, where it is valid UTF-8.
    pub fn attr_str(&self, name: &str) -> Option<&str> {
        match self.attr(name) {
            Some(AttrValue::Str(v)) => std::str::from_utf8(v).ok(),
            _ => None,
        }
    }
}

/// A call of a model-local function, or an If whose condition is known, that was inlined for analysis; written back as it was where
/// none of its nodes changed.
#[derive(Clone, Debug)]
pub struct Call {
    /// The calling node as the file encodes it; only `onnx/` reads it.
    pub encoded: Bytes,
    /// The condition, where it is an If.
    pub condition: Option<bool>,
    /// Nodes of the inlined body, in order.
    pub nodes: Vec<NodeId>,
    /// Whether it stays inlined: a value that it reads or makes has another shape now.
    pub is_inlined: bool,
}

/// A graph with the model around it.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    pub(super) nodes: Vec<Option<Node>>,
    pub(super) order: Vec<NodeId>,
    pub(super) values: Vec<Value>,
    pub(super) names: BTreeMap<String, ValueId>,
    /// The last number that was put behind each name that was taken already.
    pub(super) numbers: BTreeMap<String, usize>,
    pub(super) inputs: Vec<ValueId>,
    pub(super) outputs: Vec<ValueId>,
    pub(super) initializers: Vec<ValueId>,
    pub(super) opsets: Vec<(String, i64)>,
    pub(super) ir_version: i64,
    pub(super) calls: Vec<Call>,
    pub(super) shell: Bytes,
}

impl Graph {
    /// Node ids in topological (file) order.
    pub fn order(&self) -> &[NodeId] {
        &self.order
    }
    /// The node `id`.
    ///
    /// Panics where the node was removed: ids come from [`Graph::order`] or from users and producers, which never name one.
    pub fn node(&self, id: NodeId) -> &Node {
        self.nodes[id.index()].as_ref().expect("I1: ids name nodes that exist")
    }
    /// Nodes with their ids, in order.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        self.order.iter().map(|id| (*id, self.node(*id)))
    }
    /// One more than the largest node id, for side tables.
    pub fn node_capacity(&self) -> usize {
        self.nodes.len()
    }
    /// The value `id`.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.index()]
    }
    /// Number of values, unused ones included: the length of a side table.
    pub fn value_count(&self) -> usize {
        self.values.len()
    }
    /// All value ids.
    pub fn values(&self) -> impl Iterator<Item = (ValueId, &Value)> {
        self.values.iter().enumerate().map(|(i, v)| (ValueId::new(i), v))
    }
    /// The value called `name`.
    pub fn find(&self, name: &str) -> Option<ValueId> {
        self.names.get(name).copied()
    }
    /// Graph inputs in file order. Initializers that an old file also lists as inputs are not among them.
    pub fn inputs(&self) -> &[ValueId] {
        &self.inputs
    }
    /// Graph outputs in file order.
    pub fn outputs(&self) -> &[ValueId] {
        &self.outputs
    }
    /// Initializers in file order.
    pub fn initializers(&self) -> &[ValueId] {
        &self.initializers
    }
    /// Opset imports in file order.
    pub fn opsets(&self) -> &[(String, i64)] {
        &self.opsets
    }
    /// The opset of `domain`; the default domain is the empty string.
    pub fn opset(&self, domain: &str) -> Option<i64> {
        self.opsets.iter().find(|(d, _)| d == domain).map(|(_, v)| *v)
    }
    /// IR version of the file.
    pub fn ir_version(&self) -> i64 {
        self.ir_version
    }
    /// Inlined calls of model-local functions, and inlined branches.
    pub fn calls(&self) -> &[Call] {
        &self.calls
    }
    /// The model without its graph's tables, encoded; only `onnx/` reads it.
    pub fn shell(&self) -> &Bytes {
        &self.shell
    }
    /// The content of a value that is constant by itself: an initializer, or the output of a Constant node.
    pub fn constant(&self, id: ValueId) -> Option<Tensor> {
        let value = self.value(id);
        if let Some(t) = &value.initializer {
            return Some(t.clone());
        }
        let node = self.node(value.producer?.0);
        if node.op != "Constant" || !node.domain.is_empty() {
            return None;
        }
        let attr = node.attrs.first()?;
        Some(match &attr.value {
            AttrValue::Tensor(t) => t.clone(),
            AttrValue::Int(v) => Tensor::i64_scalar(*v),
            AttrValue::Ints(v) => Tensor::i64s(v),
            AttrValue::Float(v) => Tensor::f32(&[], &[*v]),
            AttrValue::Floats(v) => Tensor::f32(&[v.len()], v),
            _ => return None,
        })
    }
    /// Whether the value is constant by itself.
    pub fn is_constant(&self, id: ValueId) -> bool {
        let value = self.value(id);
        value.initializer.is_some() || value.producer.is_some_and(|(n, _)| self.node(n).op == "Constant")
    }
    /// How a message names the node: its name, or its number in the file and its operator.
    pub fn label(&self, id: NodeId) -> String {
        let node = self.node(id);
        if node.name.is_empty() { format!("#{} ({})", id.index(), node.op) } else { node.name.clone() }
    }
}
