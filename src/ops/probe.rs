//! Test support: a graph of one node under test, and short texts for what its rules say.

use crate::autodiff::GradCx;
use crate::axes::relation::{AxesCx, Link, Relations, Slot};
use crate::graph::build::attr;
use crate::graph::{Attr, AttrValue, DType, Declared, DeclaredDim, Graph, NewNode, NodeId, Tensor, ValueId};
use crate::infer::{self, Facts, InferError, Known};
use crate::ops::{self, Axes, Grad, Refit};
use crate::slice::refit::RefitCx;
use bytes::Bytes;
use std::collections::BTreeMap;

/// A graph under construction.
pub(crate) struct Probe {
    pub(crate) graph: Graph,
}

impl Probe {
    pub(crate) fn new(opset: i64) -> Self {
        Self { graph: Graph::new(10, vec![(String::new(), opset)], Bytes::new()) }
    }

    /// A float32 graph input; dims are numbers or symbols between spaces.
    pub(crate) fn input(&mut self, name: &str, dims: &str) -> ValueId {
        self.typed_input(name, dims, DType::F32)
    }

    pub(crate) fn typed_input(&mut self, name: &str, dims: &str, dtype: DType) -> ValueId {
        let dim = |d: &str| d.parse().map_or_else(|_| DeclaredDim::Symbol(d.to_string()), DeclaredDim::Size);
        let dims = dims.split_whitespace().map(dim).collect();
        let id = self.graph.add_value(name);
        self.graph.add_input(id, Declared { dtype: Some(dtype), dims: Some(dims), extra: Bytes::new() });
        id
    }

    pub(crate) fn ints(&mut self, values: &[i64]) -> ValueId {
        self.graph.add_initializer("ints", Tensor::i64s(values))
    }

    pub(crate) fn int(&mut self, value: i64) -> ValueId {
        self.graph.add_initializer("int", Tensor::i64_scalar(value))
    }

    /// An int64 constant of any shape.
    pub(crate) fn ints_of(&mut self, dims: &[usize], values: &[i64]) -> ValueId {
        self.graph.add_initializer("ints", Tensor { dims: dims.to_vec(), ..Tensor::i64s(values) })
    }

    /// A node with `outputs` outputs.
    pub(crate) fn node(&mut self, op: &str, inputs: &[Option<ValueId>], attrs: Vec<Attr>, outputs: usize) -> NodeId {
        let outputs = (0..outputs).map(|_| Some(self.graph.add_value("out"))).collect();
        self.graph.add_node(NewNode { op: op.into(), inputs: inputs.to_vec(), outputs, attrs, ..NewNode::default() })
    }

    /// A node with one output, which is returned.
    pub(crate) fn op(&mut self, op: &str, inputs: &[ValueId], attrs: Vec<Attr>) -> ValueId {
        let inputs: Vec<_> = inputs.iter().map(|v| Some(*v)).collect();
        let id = self.node(op, &inputs, attrs, 1);
        self.out(id, 0)
    }

    pub(crate) fn out(&self, id: NodeId, slot: usize) -> ValueId {
        self.graph.node(id).output(slot).expect("the output was made")
    }

    pub(crate) fn producer(&self, v: ValueId) -> NodeId {
        self.graph.value(v).producer().expect("a node made it").0
    }

    pub(crate) fn facts(&self) -> Facts {
        infer::facts(&self.graph).expect("the graph is consistent")
    }

    pub(crate) fn error(&self) -> InferError {
        infer::facts(&self.graph).expect_err("the graph contradicts itself")
    }

    /// `b 16 48`, or `?` where the rank is unknown.
    pub(crate) fn shape(&self, v: ValueId) -> String {
        match self.facts().shape(v) {
            Some(dims) => dims.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
            None => "?".into(),
        }
    }

    /// The content, elements between spaces; `?` where unknown.
    pub(crate) fn content(&self, v: ValueId) -> String {
        match &self.facts().get(v).known {
            Some(Known::Ints(v)) => v.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
            Some(Known::Floats(v)) => v.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
            None => "?".into(),
        }
    }

    /// The relations of the node that makes `v`, one text per link.
    pub(crate) fn axes(&self, v: ValueId) -> Vec<String> {
        let facts = self.facts();
        let id = self.producer(v);
        let node = self.graph.node(id);
        let opset = self.graph.opset("").expect("set in new");
        match &ops::lookup("", node.op()).expect("the operator has a record").axes {
            Axes::Rule(rule) => show(&rule(&AxesCx { graph: &self.graph, facts: &facts, node, id, opset })),
            Axes::Barrier(reason) => vec![format!("all | {reason}")],
            Axes::ShapeOnly => vec!["shape only".into()],
        }
    }

    /// What the node that makes `v` patches when the axes `(value, axis, kept positions)` are cut.
    pub(crate) fn refit(&mut self, v: ValueId, cut: &[(ValueId, usize, &[usize])]) -> Result<Patches, String> {
        let facts = self.facts();
        let id = self.producer(v);
        let kept = |value: ValueId, axis: usize| cut.iter().find(|c| c.0 == value && c.1 == axis).map(|c| c.2);
        let op = self.graph.node(id).op().to_string();
        let original = self.graph.clone();
        let mut cx = RefitCx {
            graph: &mut self.graph,
            original: &original,
            origin: id,
            id,
            facts: &facts,
            kept: &kept,
            patches: Vec::new(),
            edits: Vec::new(),
        };
        match ops::lookup("", &op).expect("the operator has a record").refit {
            Refit::Nothing => {}
            Refit::Rule(rule) => rule(&mut cx).map_err(|e| e.what)?,
        }
        Ok(cx.patches)
    }

    /// Runs the gradient rule of the node that makes `v`, all inputs wanting a gradient, and checks that every gradient given
    /// has the shape of its input. Returns the operators of the nodes added.
    pub(crate) fn grad(&mut self, v: ValueId) -> Result<Vec<String>, String> {
        let facts = self.facts();
        let id = self.producer(v);
        let node = self.graph.node(id).clone();
        let before = self.graph.order().len();
        let mut dys = Vec::new();
        let mut sizes = BTreeMap::new();
        for out in node.outputs().iter().flatten() {
            let dims = facts.shape(*out).expect("ranks are known").iter();
            sizes.extend(dims.clone().filter_map(|d| Some((d.to_string(), d.eval(&letter)?))));
            let dims: Vec<_> = dims.map(|d| d.known().map_or(DeclaredDim::Symbol(d.to_string()), DeclaredDim::Size)).collect();
            let dy = self.graph.add_value("dy");
            self.graph.add_input(dy, Declared { dtype: Some(DType::F32), dims: Some(dims), extra: Bytes::new() });
            dys.push(Some(dy));
        }
        let wanted = vec![true; node.inputs().len()];
        let mut cx = GradCx::new(&mut self.graph, &facts, id, dys, wanted);
        match ops::lookup("", node.op()).expect("the operator has a record").grad {
            Grad::Rule(rule) => rule(&mut cx)?,
            Grad::Zero => return Ok(vec!["zero".into()]),
            Grad::No(reason) => return Err(reason.into()),
        }
        let given = cx.into_given();
        let after = self.facts();
        for (input, grad) in node.inputs().iter().zip(given) {
            if let (Some(input), Some(grad)) = (input, grad) {
                let (got, wanted) = (after.shape(grad).unwrap_or(&[]), facts.shape(*input).unwrap_or(&[]));
                assert!(got.is_empty() || got.len() == wanted.len(), "gradient of {input:?}: {got:?}, not {wanted:?}");
                for (a, b) in got.iter().zip(wanted) {
                    // A size that another family computes at run time has no number here.
                    let a = a.eval(&|name| sizes.get(name).copied().or(letter(name)));
                    assert!(a.is_none() || a == b.eval(&letter), "gradient of {input:?}: {got:?}, not {wanted:?}");
                }
            }
        }
        Ok(self.graph.order()[before..].iter().map(|n| self.graph.node(*n).op().to_string()).collect())
    }
}

/// A size for every symbol of one letter.
fn letter(name: &str) -> Option<i64> {
    match name.as_bytes() {
        [c] => Some(i64::from(*c)),
        _ => None,
    }
}

/// `(input slot, (entry, value))`, as a refit rule asks for.
pub(crate) type Patches = Vec<(usize, Vec<(usize, i64)>)>;

pub(crate) fn int_attr(name: &str, value: i64) -> Attr {
    attr(name, AttrValue::Int(value))
}

pub(crate) fn ints_attr(name: &str, values: &[i64]) -> Attr {
    attr(name, AttrValue::Ints(values.to_vec()))
}

fn show(relations: &Relations) -> Vec<String> {
    relations.links.iter().map(show_link).collect()
}

fn show_link(link: &Link) -> String {
    let slot = |s: &Slot| match s {
        Slot::In(i) => format!("in{i}"),
        Slot::Out(i) => format!("out{i}"),
        Slot::Virtual(i) => format!("v{i}"),
    };
    let at = |(s, a): &(Slot, usize)| format!("{}.{a}", slot(s));
    match link {
        Link::Same(a, b) => format!("{} = {}", at(a), at(b)),
        Link::Contract(a, b) => format!("{} x {}", at(a), at(b)),
        Link::Sum(a) => format!("sum {}", at(a)),
        Link::Unread(a) => format!("{} unread", at(a)),
        Link::Vanish(a, _) => format!("{} vanishes", at(a)),
        Link::Blocks(a, b) => format!("{} in blocks of {}", at(a), b.size),
        Link::Regroup((a, x), (b, y)) => format!("{}{x:?} ~ {}{y:?}", slot(a), slot(b)),
        Link::Select { from, to, index, at: first } => format!("{}{index:?} -> {}@{first}", at(from), at(to)),
        Link::Barrier(a, reason) => format!("{} | {reason}", at(a)),
    }
}
