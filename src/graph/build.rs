//! Fluent building of nodes, spelled for the model's own opset: axes as attribute or input, no operator before its opset.
//!
//! Example: `b.mul(x, y)`, `b.reduce_sum(x, &[0, 1], true)`. All nodes are of the default domain.

use super::edit::NewNode;
use super::id::ValueId;
use super::model::{Attr, AttrValue, Graph};
use super::tensor::{DType, Tensor};
use bytes::Bytes;

/// Appends nodes to a graph; new names start with `prefix`.
pub struct Builder<'a> {
    /// The graph.
    pub graph: &'a mut Graph,
    prefix: String,
}

/// An attribute of a node to be built.
pub fn attr(name: &str, value: AttrValue) -> Attr {
    Attr { name: name.to_string(), value, extra: Bytes::new() }
}

impl<'a> Builder<'a> {
    /// A builder whose nodes and values get names that start with `prefix`.
    pub fn new(graph: &'a mut Graph, prefix: &str) -> Self {
        Self { graph, prefix: prefix.to_string() }
    }

    /// Opset of the default domain.
    pub fn opset(&self) -> i64 {
        self.graph.opset("").unwrap_or(0)
    }

    /// A node with one output.
    pub fn op(&mut self, op: &str, inputs: &[ValueId], attrs: Vec<Attr>) -> ValueId {
        self.ops(op, inputs, attrs, 1)[0]
    }

    /// A node with several outputs.
    pub fn ops(&mut self, op: &str, inputs: &[ValueId], attrs: Vec<Attr>, output_count: usize) -> Vec<ValueId> {
        let name = format!("{}{}", self.prefix, op);
        let outputs: Vec<ValueId> = (0..output_count).map(|_| self.graph.add_value(&name)).collect();
        self.graph.add_node(NewNode {
            // The number keeps it unique: the name of its output may be changed, and then be taken again.
            name: format!("{name}.{}", self.graph.node_capacity()),
            op: op.to_string(),
            inputs: inputs.iter().map(|v| Some(*v)).collect(),
            outputs: outputs.iter().map(|v| Some(*v)).collect(),
            attrs,
            ..NewNode::default()
        });
        outputs
    }

    /// A constant.
    pub fn constant(&mut self, tensor: Tensor) -> ValueId {
        let name = format!("{}constant", self.prefix);
        self.graph.add_initializer(&name, tensor)
    }

    /// An int64 vector.
    pub fn ints(&mut self, values: &[i64]) -> ValueId {
        self.constant(Tensor::i64s(values))
    }

    /// A scalar of a floating-point type.
    pub fn scalar(&mut self, dtype: DType, value: f32) -> ValueId {
        let like = Tensor::new(dtype, Vec::new(), Bytes::new());
        self.constant(like.with_f32s(&[value]))
    }

    /// `a + b`, broadcast.
    pub fn add(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.op("Add", &[a, b], vec![])
    }
    /// `a - b`, broadcast.
    pub fn sub(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.op("Sub", &[a, b], vec![])
    }
    /// `a * b`, broadcast.
    pub fn mul(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.op("Mul", &[a, b], vec![])
    }
    /// `a / b`, broadcast.
    pub fn div(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.op("Div", &[a, b], vec![])
    }
    /// `a` and `b`, both booleans, broadcast.
    pub fn and(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.op("And", &[a, b], vec![])
    }
    /// `-a`.
    pub fn neg(&mut self, a: ValueId) -> ValueId {
        self.op("Neg", &[a], vec![])
    }
    /// `a x b`, numpy rules.
    pub fn matmul(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.op("MatMul", &[a, b], vec![])
    }
    /// Axes in a new order.
    pub fn transpose(&mut self, a: ValueId, perm: &[usize]) -> ValueId {
        let perm = perm.iter().map(|p| *p as i64).collect();
        self.op("Transpose", &[a], vec![attr("perm", AttrValue::Ints(perm))])
    }
    /// `a` in the shape that the int64 vector `shape` holds at run time.
    pub fn reshape_to(&mut self, a: ValueId, shape: ValueId) -> ValueId {
        self.op("Reshape", &[a, shape], vec![])
    }
    /// `a` in a constant shape; 0 copies a size, -1 takes what is left.
    pub fn reshape(&mut self, a: ValueId, shape: &[i64]) -> ValueId {
        let shape = self.ints(shape);
        self.reshape_to(a, shape)
    }
    /// The shape of `a` as an int64 vector.
    pub fn shape_of(&mut self, a: ValueId) -> ValueId {
        self.op("Shape", &[a], vec![])
    }
    /// `a` in the element type `dtype`.
    pub fn cast(&mut self, a: ValueId, dtype: DType) -> ValueId {
        self.op("Cast", &[a], vec![attr("to", AttrValue::Int(dtype.to_onnx().into()))])
    }
    /// `a` joined with others along `axis`.
    pub fn concat(&mut self, parts: &[ValueId], axis: i64) -> ValueId {
        self.op("Concat", parts, vec![attr("axis", AttrValue::Int(axis))])
    }
    /// `a` at the positions `index` along `axis`.
    pub fn gather(&mut self, a: ValueId, index: ValueId, axis: i64) -> ValueId {
        self.op("Gather", &[a, index], vec![attr("axis", AttrValue::Int(axis))])
    }
    /// Sum over `axes` (axes as an input from opset 13 on).
    pub fn reduce_sum(&mut self, a: ValueId, axes: &[i64], keep: bool) -> ValueId {
        self.reduce("ReduceSum", 13, a, axes, keep)
    }
    /// Mean over `axes` (axes as an input from opset 18 on).
    pub fn reduce_mean(&mut self, a: ValueId, axes: &[i64], keep: bool) -> ValueId {
        self.reduce("ReduceMean", 18, a, axes, keep)
    }
    /// Maximum over `axes` (axes as an input from opset 18 on).
    pub fn reduce_max(&mut self, a: ValueId, axes: &[i64], keep: bool) -> ValueId {
        self.reduce("ReduceMax", 18, a, axes, keep)
    }
    fn reduce(&mut self, op: &str, as_input_since: i64, a: ValueId, axes: &[i64], keep: bool) -> ValueId {
        let keep = attr("keepdims", AttrValue::Int(keep.into()));
        if self.opset() >= as_input_since {
            let axes = self.ints(axes);
            self.op(op, &[a, axes], vec![keep])
        } else {
            self.op(op, &[a], vec![attr("axes", AttrValue::Ints(axes.to_vec())), keep])
        }
    }
    /// `a` with axes of size 1 put in (axes as an input from opset 13 on).
    pub fn unsqueeze(&mut self, a: ValueId, axes: &[i64]) -> ValueId {
        self.axes_op("Unsqueeze", a, axes)
    }
    /// `a` with axes of size 1 taken out (axes as an input from opset 13 on).
    pub fn squeeze(&mut self, a: ValueId, axes: &[i64]) -> ValueId {
        self.axes_op("Squeeze", a, axes)
    }
    fn axes_op(&mut self, op: &str, a: ValueId, axes: &[i64]) -> ValueId {
        if self.opset() >= 13 {
            let axes = self.ints(axes);
            self.op(op, &[a, axes], vec![])
        } else {
            self.op(op, &[a], vec![attr("axes", AttrValue::Ints(axes.to_vec()))])
        }
    }
    /// `a`, of rank `rank`, with one zero behind the last position of `axis` (pads as an input from opset 11 on).
    pub fn pad_end(&mut self, a: ValueId, rank: usize, axis: usize) -> ValueId {
        let pads: Vec<i64> = (0..2 * rank).map(|p| i64::from(p == rank + axis)).collect();
        if self.opset() >= 11 {
            let pads = self.ints(&pads);
            self.op("Pad", &[a, pads], vec![])
        } else {
            self.op("Pad", &[a], vec![attr("pads", AttrValue::Ints(pads))])
        }
    }
    /// `a[starts..ends]` along `axes`.
    pub fn slice(&mut self, a: ValueId, starts: &[i64], ends: &[i64], axes: &[i64]) -> ValueId {
        let (starts, ends, axes) = (self.ints(starts), self.ints(ends), self.ints(axes));
        self.op("Slice", &[a, starts, ends, axes], vec![])
    }
}
