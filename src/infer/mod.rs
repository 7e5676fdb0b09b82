//! Graph -> Facts: the element type and shape of every value, and the content of small integer and float values.
//!
//! In: a checked [`Graph`]. Out: [`Facts`], complete for every operator that has a rule. Example: `Shape(x)` of a
//! `[batch, 197, 192]` value has the known content `(batch, 197, 192)`, so a `Reshape` whose target is
//! `Concat(Gather(Shape(x), 0), 197, 3, 64)` gets the shape `[batch, 197, 3, 64]`.
//! Invariant: a fact that is present is true for every run; what is not known is absent, never guessed.

pub mod content;
pub mod dim;

use crate::graph::{DType, DeclaredDim, Graph, Node, NodeId, SideMap, Tensor, ValueId};
use crate::ops;
pub use dim::Dim;

/// Content of a value of at most [`KNOWN_MAX`] elements, row-major.
#[derive(Clone, Debug, PartialEq)]
pub enum Known {
    /// Integers and booleans.
    Ints(Vec<Dim>),
    /// Floats, all of them numbers.
    Floats(Vec<f64>),
}

impl Known {
    /// The integers, where it holds integers.
    pub fn ints(&self) -> Option<&[Dim]> {
        match self {
            Known::Ints(v) => Some(v),
            Known::Floats(_) => None,
        }
    }

    /// The integers as numbers, where all of them are known.
    pub fn numbers(&self) -> Option<Vec<i64>> {
        self.ints()?.iter().map(Dim::known).collect()
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Known::Ints(v) => v.len(),
            Known::Floats(v) => v.len(),
        }
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Values with more elements than this have no known content.
pub const KNOWN_MAX: usize = 4096;

/// What is known of a value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fact {
    /// Element type.
    pub dtype: Option<DType>,
    /// Shape; `None` where even the rank is unknown.
    pub shape: Option<Vec<Dim>>,
    /// Content.
    pub known: Option<Known>,
}

impl Fact {
    /// A fact without content.
    pub fn new(dtype: Option<DType>, shape: Option<Vec<Dim>>) -> Self {
        Self { dtype, shape, known: None }
    }

    /// The same with content.
    pub fn with_known(self, known: Option<Known>) -> Self {
        Self { known, ..self }
    }

    /// Rank, where it is known.
    pub fn rank(&self) -> Option<usize> {
        self.shape.as_ref().map(Vec::len)
    }

    /// The fact of a constant.
    pub fn of_tensor(t: &Tensor) -> Self {
        let content = |t: &Tensor| match t.to_i64s() {
            Some(ints) => Some(Known::Ints(ints.into_iter().map(Dim::from).collect())),
            None => t.to_f32s().map(|v| Known::Floats(v.into_iter().map(f64::from).collect())),
        };
        let count = t.element_count();
        // A graph whose sizes are only counted has constants without their elements.
        let known = if count > KNOWN_MAX { None } else { content(t).filter(|k| k.len() == count) };
        Self { dtype: Some(t.dtype), shape: Some(t.dims.iter().map(|d| Dim::from(*d)).collect()), known }
    }
}

/// Facts of all values of a graph.
#[derive(Clone, Debug)]
pub struct Facts {
    values: SideMap<ValueId, Fact>,
}

impl Facts {
    /// The fact of a value; an empty one of a value that was added since.
    pub fn get(&self, id: ValueId) -> &Fact {
        self.values.get(id).unwrap_or(&NOTHING)
    }

    /// Number of values that there are facts of.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The shape of a value, where its rank is known.
    pub fn shape(&self, id: ValueId) -> Option<&[Dim]> {
        self.get(id).shape.as_deref()
    }
}

/// Why shapes could not be inferred: the model contradicts itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("node {node} ({op}): {what}")]
pub struct InferError {
    /// The node's label.
    pub node: String,
    /// Its operator.
    pub op: String,
    /// What does not fit.
    pub what: String,
}

/// What an operator's `infer` rule sees.
pub struct InferCx<'a> {
    /// The node.
    pub node: &'a Node,
    /// Its number, for names of sizes that depend on data.
    pub id: NodeId,
    /// Opset of the node's domain.
    pub opset: i64,
    /// The graph, for attributes that hold constants.
    pub graph: &'a Graph,
    inputs: Vec<Option<&'a Fact>>,
}

static NOTHING: Fact = Fact { dtype: None, shape: None, known: None };

impl<'a> InferCx<'a> {
    /// The context of a node with the given facts of its inputs.
    pub(crate) fn with_inputs(graph: &'a Graph, id: NodeId, inputs: Vec<Option<&'a Fact>>) -> Self {
        let node = graph.node(id);
        Self { node, id, opset: graph.opset(node.domain()).unwrap_or(0), graph, inputs }
    }

    /// The fact of input `slot`; an empty fact where the input is left out.
    pub fn input(&self, slot: usize) -> &'a Fact {
        self.inputs.get(slot).copied().flatten().unwrap_or(&NOTHING)
    }

    /// Whether input `slot` is there.
    pub fn has_input(&self, slot: usize) -> bool {
        self.inputs.get(slot).is_some_and(Option::is_some)
    }

    /// Number of input slots.
    pub fn input_count(&self) -> usize {
        self.inputs.len()
    }

    /// Shape of input `slot`.
    pub fn shape(&self, slot: usize) -> Option<&'a [Dim]> {
        self.input(slot).shape.as_deref()
    }

    /// Element type of input `slot`.
    pub fn dtype(&self, slot: usize) -> Option<DType> {
        self.input(slot).dtype
    }

    /// Known integers of input `slot`.
    pub fn ints(&self, slot: usize) -> Option<&'a [Dim]> {
        self.input(slot).known.as_ref()?.ints()
    }

    /// Known integers of input `slot` as numbers.
    pub fn numbers(&self, slot: usize) -> Option<Vec<i64>> {
        self.input(slot).known.as_ref()?.numbers()
    }

    /// A new size that depends on data; the same in every inference of the same graph.
    pub fn fresh(&self, what: &str) -> Dim {
        Dim::named(&format!("{what}.{}", self.id_text()))
    }

    fn id_text(&self) -> String {
        format!("{:?}", self.id)
    }

    /// The error of this node.
    pub fn error(&self, what: impl Into<String>) -> InferError {
        InferError { node: self.graph.label(self.id), op: self.node.op().to_string(), what: what.into() }
    }
}

/// `axis` of a tensor of rank `rank`, counted from the end where negative; `None` outside.
pub fn normalize_axis(axis: i64, rank: usize) -> Option<usize> {
    let rank_i = i64::try_from(rank).ok()?;
    let a = if axis < 0 { axis + rank_i } else { axis };
    usize::try_from(a).ok().filter(|a| *a < rank)
}

/// Infers the facts of every value.
///
/// Errors: the model contradicts itself, for example a MatMul of unequal inner sizes.
pub fn facts(graph: &Graph) -> Result<Facts, InferError> {
    let mut values = SideMap::filled(graph.value_count(), Fact::default());
    for (id, value) in graph.values() {
        if let Some(t) = value.initializer() {
            values[id] = Fact::of_tensor(t);
        } else if let Some(d) = value.declared()
            && value.producer().is_none()
        {
            let shape = d.dims.as_ref().map(|dims| declared_shape(value.name(), dims));
            values[id] = Fact::new(d.dtype, shape);
        }
    }
    for (id, node) in graph.nodes() {
        let outputs = {
            let cx = InferCx::with_inputs(graph, id, node.inputs().iter().map(|v| v.map(|v| &values[v])).collect());
            match ops::rule_of(graph, node) {
                Some(rule) => (rule.infer)(&cx)?,
                None => Vec::new(),
            }
        };
        for (out, fact) in node.outputs().iter().zip(outputs) {
            if let Some(v) = out {
                values[*v] = fact;
            }
        }
    }
    Ok(Facts { values })
}

fn declared_shape(name: &str, dims: &[DeclaredDim]) -> Vec<Dim> {
    dims.iter()
        .enumerate()
        .map(|(axis, d)| match d {
            DeclaredDim::Size(n) if *n >= 0 => Dim::from(*n),
            DeclaredDim::Symbol(s) if !s.is_empty() => Dim::named(s),
            _ => Dim::named(&format!("{name}.{axis}")),
        })
        .collect()
}
