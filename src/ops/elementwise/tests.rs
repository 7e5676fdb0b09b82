//! Shapes, contents and axis relations of pointwise operators; the small graphs here also serve the tests of other families.

use bytes::Bytes;

use crate::axes::relation::{At, AxesCx, Link, Slot};
use crate::graph::build::attr;
use crate::graph::{AttrValue, DType, Declared, DeclaredDim, Graph, NewNode, Tensor, ValueId};
use crate::infer::{Fact, Facts, InferError, Known, facts};
use crate::ops::{Axes, lookup};

/// A graph of one node.
pub(crate) struct OneNode {
    graph: Graph,
    inputs: Vec<Option<ValueId>>,
}

impl OneNode {
    pub(crate) fn new(opset: i64) -> Self {
        Self { graph: Graph::new(10, vec![(String::new(), opset)], Bytes::new()), inputs: Vec::new() }
    }

    /// An input of the node with sizes such as `"b 197 n"`.
    pub(crate) fn input(mut self, dtype: DType, sizes: &str) -> Self {
        let value = self.graph.add_value("x");
        let dim = |s: &str| s.parse().map_or(DeclaredDim::Symbol(s.to_string()), DeclaredDim::Size);
        let dims = Some(sizes.split_whitespace().map(dim).collect());
        self.graph.add_input(value, Declared { dtype: Some(dtype), dims, extra: Bytes::new() });
        self.inputs.push(Some(value));
        self
    }

    /// A float32 input of the node.
    pub(crate) fn floats(self, sizes: &str) -> Self {
        self.input(DType::F32, sizes)
    }

    /// A constant input of the node.
    pub(crate) fn constant(mut self, tensor: Tensor) -> Self {
        let value = self.graph.add_initializer("c", tensor);
        self.inputs.push(Some(value));
        self
    }

    /// Adds the node and gives the facts of its outputs.
    pub(crate) fn run(mut self, op: &str, attrs: &[(&str, AttrValue)], outputs: usize) -> Result<Done, InferError> {
        let outputs: Vec<ValueId> = (0..outputs).map(|_| self.graph.add_value("y")).collect();
        self.graph.add_node(NewNode {
            op: op.to_string(),
            inputs: self.inputs.clone(),
            outputs: outputs.iter().map(|v| Some(*v)).collect(),
            attrs: attrs.iter().map(|(name, value)| attr(name, value.clone())).collect(),
            ..NewNode::default()
        });
        let facts = facts(&self.graph)?;
        Ok(Done { graph: self.graph, facts, outputs })
    }
}

/// The node and what was inferred of it.
pub(crate) struct Done {
    graph: Graph,
    facts: Facts,
    outputs: Vec<ValueId>,
}

impl Done {
    pub(crate) fn fact(&self, output: usize) -> &Fact {
        self.facts.get(self.outputs[output])
    }

    /// Sizes of an output, such as `"b 197 n"`.
    pub(crate) fn shape(&self, output: usize) -> String {
        let shape = self.fact(output).shape.as_deref().expect("the rank is known");
        shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    }

    /// Relations such as `"in0.1=out0.2 in0.2! in1.0+"`: same, barrier, sum.
    pub(crate) fn links(&self) -> String {
        let (id, node) = self.graph.nodes().next().expect("there is one node");
        let opset = self.graph.opset("").expect("set when made");
        let cx = AxesCx { graph: &self.graph, facts: &self.facts, node, id, opset };
        let Axes::Rule(rule) = lookup("", node.op()).expect("the operator has a record").axes else { panic!("no rule") };
        let at = |(slot, axis): &At| match slot {
            Slot::In(n) => format!("in{n}.{axis}"),
            Slot::Out(n) => format!("out{n}.{axis}"),
            Slot::Virtual(n) => format!("virtual{n}.{axis}"),
        };
        let link = |link: &Link| match link {
            Link::Same(a, b) => format!("{}={}", at(a), at(b)),
            Link::Barrier(a, _) => format!("{}!", at(a)),
            Link::Sum(a) => format!("{}+", at(a)),
            Link::Unread(a) => format!("{}?", at(a)),
            Link::Vanish(a, _) => format!("{}=0", at(a)),
            Link::Blocks(a, b) => format!("{}#{}", at(a), b.size),
            other => panic!("{other:?} is not a relation of these families"),
        };
        rule(&cx).links.iter().map(link).collect::<Vec<_>>().join(" ")
    }
}

fn ints(values: &[i64]) -> Option<Known> {
    Some(Known::Ints(values.iter().map(|v| (*v).into()).collect()))
}

#[test]
fn shapes_are_broadcast() {
    for (a, b, expected) in [
        ("b 197 n", "n", "b 197 n"),
        ("3 1", "b 1 4", "b 3 4"),
        ("", "b", "b"),
        ("n", "7", "7"),
        ("n", "m", "max(n,m)"),
        ("n", "1", "n"),
    ] {
        let done = OneNode::new(17).floats(a).floats(b).run("Add", &[], 1).expect("the shapes fit");
        assert_eq!((done.shape(0).as_str(), done.fact(0).dtype), (expected, Some(DType::F32)), "{a} + {b}");
    }
    let error = OneNode::new(17).floats("2 3").floats("4").run("Mul", &[], 1).err().expect("3 and 4 do not fit");
    assert_eq!(error.what, "sizes 3 and 4 cannot be broadcast together");
}

#[test]
fn types_follow_the_operator() {
    let like = |op: &str, attrs: &[(&str, AttrValue)]| {
        let node = OneNode::new(19).floats("2").input(DType::F16, "2");
        node.run(op, attrs, 1).expect("the shapes fit").fact(0).dtype
    };
    assert_eq!(like("Less", &[]), Some(DType::Bool));
    assert_eq!(like("CastLike", &[]), Some(DType::F16));
    assert_eq!(like("Pow", &[]), Some(DType::F32));
    let cast = OneNode::new(19).floats("2").run("Cast", &[("to", AttrValue::Int(7))], 1).expect("no shape to fit");
    assert_eq!(cast.fact(0).dtype, Some(DType::I64));
    let select = OneNode::new(19).input(DType::Bool, "3 1").input(DType::F16, "b").input(DType::F16, "");
    let select = select.run("Where", &[], 1).expect("the shapes fit");
    assert_eq!((select.shape(0).as_str(), select.fact(0).dtype), ("3 b", Some(DType::F16)));
}

#[test]
fn contents_are_broadcast_and_stay_in_their_type() {
    let (column, row) = (Tensor { dims: vec![2, 1], ..Tensor::i64s(&[10, 20]) }, Tensor::i64s(&[1, 2, 3]));
    let sum = OneNode::new(17).constant(column).constant(row).run("Add", &[], 1).expect("the shapes fit");
    assert_eq!((sum.shape(0).as_str(), sum.fact(0).known.clone()), ("2 3", ints(&[11, 12, 13, 21, 22, 23])));
    let root = OneNode::new(17).constant(Tensor::f32(&[], &[64.0])).run("Sqrt", &[], 1).expect("no shape to fit");
    assert_eq!(root.fact(0).known, Some(Known::Floats(vec![8.0])));
    let third = OneNode::new(17).constant(Tensor::f32(&[], &[3.0])).run("Reciprocal", &[], 1).expect("no shape to fit");
    assert_eq!(third.fact(0).known, Some(Known::Floats(vec![f64::from(1.0f32 / 3.0)])));
    let nothing = OneNode::new(17).constant(Tensor::i64s(&[0])).constant(Tensor::i64s(&[0]));
    assert_eq!(nothing.run("Div", &[], 1).expect("the shapes fit").fact(0).known, None, "0 / 0");
    let huge = OneNode::new(17).constant(Tensor::i64s(&[i64::MAX])).constant(Tensor::i64s(&[1]));
    assert_eq!(huge.run("Add", &[], 1).expect("the shapes fit").fact(0).known, None, "wraps around");
}

#[test]
fn every_axis_goes_with_the_one_it_is_broadcast_to() {
    let add = OneNode::new(17).floats("b 197 n").floats("n").run("Add", &[], 1).expect("the shapes fit");
    assert_eq!(add.links(), "in0.0=out0.0 in0.1=out0.1 in0.2=out0.2 in1.0=out0.2");
    let mul = OneNode::new(17).floats("b 1 n").floats("m n").run("Mul", &[], 1).expect("the shapes fit");
    assert_eq!(mul.links(), "in0.0=out0.0 in0.2=out0.2 in1.0=out0.1 in1.1=out0.2");
    let like = OneNode::new(17).floats("b n").floats("b").run("CastLike", &[], 1).expect("no shape to fit");
    assert_eq!(like.links(), "in0.0=out0.0 in0.1=out0.1 in1.0?");
    let dropout = OneNode::new(17).floats("b n").run("Dropout", &[], 2).expect("no shape to fit");
    assert_eq!(dropout.links(), "in0.0=out0.0 in0.1=out0.1 in0.0=out1.0 in0.1=out1.1");
}

#[test]
fn dropout_passes_contents_on_unless_it_trains() {
    let node = || OneNode::new(17).constant(Tensor::f32(&[1], &[2.0])).constant(Tensor::f32(&[], &[0.5]));
    let off = node().run("Dropout", &[], 1).expect("no shape to fit");
    assert_eq!(off.fact(0).known, Some(Known::Floats(vec![2.0])));
    let on = node().constant(Tensor { dims: vec![], ..Tensor::bools(&[true]) }).run("Dropout", &[], 1).expect("no shape to fit");
    assert_eq!(on.fact(0).known, None);
}
