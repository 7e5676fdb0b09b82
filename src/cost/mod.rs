//! Parameters, bytes and multiply-accumulates (MACs; one multiply-add = 1), of a graph as it is and of a graph under a plan.
//!
//! MACs are products of loop factors, so [`Model`] keeps, per operator, which classes its loops run over; the cost of any plan is
//! then exact without slicing (C3). Counts are per run at batch 1: the leading symbol of every graph input is taken as 1.
//! Invariant: the MACs that [`Model::under`] gives are what [`count`] finds on the sliced graph.

use crate::anatomy::{Anatomy, Kind};
use crate::axes::relation::Slot;
use crate::axes::{Axes, ClassId};
use crate::graph::{AttrValue, DType, DeclaredDim, Graph, Id, NodeId, Tensor, Use, ValueId};
use crate::infer::{Dim, Facts};
use crate::ops::{self, CostCx};
use serde::Serialize;
use std::collections::BTreeMap;

/// What a model costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cost {
    /// Elements of all floating-point constants, and of quantized ones of more than one element.
    pub params: u64,
    /// Unit: MACs per sample; `None` where a size is not known.
    pub macs: Option<u64>,
}

/// Sizes given for symbols, such as `height=224`.
pub type Sizes = BTreeMap<String, i64>;

/// Whether a constant of this type and size counts as parameters.
pub fn is_param(dtype: DType, element_count: usize) -> bool {
    dtype.is_float() || (dtype.is_small_int() && element_count > 1)
}

/// Parameters of a graph: initializers, tensors of Constant nodes, constants of subgraphs.
pub fn params(graph: &Graph) -> u64 {
    let counted = |t: &Tensor| if is_param(t.dtype, t.element_count()) { t.element_count() as u64 } else { 0 };
    let initializers: u64 = graph.initializers().iter().filter_map(|v| graph.value(*v).initializer()).map(counted).sum();
    let in_nodes = graph.nodes().flat_map(|(_, n)| n.attrs().iter().map(move |a| (n, a))).map(|(node, a)| match &a.value {
        AttrValue::Tensor(t) if node.op() == "Constant" => counted(t),
        AttrValue::Graph(g) => g.param_count,
        AttrValue::Graphs(g) => g.iter().map(|g| g.param_count).sum(),
        _ => 0,
    });
    initializers + in_nodes.sum::<u64>()
}

/// The size of a symbol: as given, or 1 where it leads a graph input (the batch).
fn symbol_size(graph: &Graph, sizes: &Sizes, name: &str) -> Option<i64> {
    let leads = |v: &ValueId| {
        let dims = graph.value(*v).declared().and_then(|d| d.dims.as_ref());
        matches!(dims.and_then(|d| d.first()), Some(DeclaredDim::Symbol(s)) if s == name || s.is_empty() && name == format!("{}.0", graph.value(*v).name()))
    };
    sizes.get(name).copied().or_else(|| graph.inputs().iter().any(leads).then_some(1))
}

/// Counts a graph as it is.
pub fn count(graph: &Graph, facts: &Facts, sizes: &Sizes) -> Cost {
    let shape = |v: ValueId| facts.shape(v).map(<[_]>::to_vec);
    Cost { params: params(graph), macs: macs(graph, &shape, sizes) }
}

/// MACs per sample with the shapes that `shape` gives.
fn macs(graph: &Graph, shape: &dyn Fn(ValueId) -> Option<Vec<Dim>>, sizes: &Sizes) -> Option<u64> {
    let mut total = 0u64;
    for (id, node) in graph.nodes() {
        let Some(rule) = ops::rule_of(graph, node) else { continue };
        let ops::Cost::Rule(cost) = rule.cost else { continue };
        total += node_macs(graph, id, cost, shape, sizes)?;
    }
    Some(total)
}

fn node_macs(
    graph: &Graph,
    id: NodeId,
    cost: CostRule,
    shape: &dyn Fn(ValueId) -> Option<Vec<Dim>>,
    sizes: &Sizes,
) -> Option<u64> {
    let node = graph.node(id);
    let inputs: Vec<Option<Vec<Dim>>> = node.inputs().iter().map(|v| v.and_then(shape)).collect();
    let outputs: Vec<Option<Vec<Dim>>> = node.outputs().iter().map(|v| v.and_then(shape)).collect();
    let cx = CostCx {
        node,
        inputs: inputs.iter().map(Option::as_deref).collect(),
        outputs: outputs.iter().map(Option::as_deref).collect(),
    };
    let dim = cost(&cx)?;
    dim.eval(&|name| symbol_size(graph, sizes, name)).and_then(|n| u64::try_from(n).ok())
}

/// The cost rule of an operator.
type CostRule = fn(&CostCx<'_>) -> Option<Dim>;

/// An axis as a sum of products of class sizes.
type AxisTerms = Vec<Vec<(ClassId, usize)>>;

/// Cost as a function of class sizes: what a plan promises, without slicing.
pub struct Model<'a> {
    graph: &'a Graph,
    facts: &'a Facts,
    sizes: Sizes,
    terms: BTreeMap<(usize, usize), AxisTerms>,
    /// Axes that hold tokens: the last site before them (by layer), the axis' length, the number of tokens at the site.
    tokens: BTreeMap<(ValueId, usize), (usize, usize, usize)>,
    /// MACs of the operators that no class of `classes` touches.
    fixed_macs: Option<u64>,
    moving: Vec<(NodeId, CostRule)>,
    fixed_params: u64,
    /// Constants with a cut axis, and the carrier that their first reader sees.
    constants: Vec<(Vec<usize>, usize)>,
}

impl<'a> Model<'a> {
    /// Prepares the cost of plans that cut some groups of an anatomy.
    pub fn new(graph: &'a Graph, facts: &'a Facts, anatomy: &Anatomy, sizes: &Sizes) -> Self {
        let axes = &anatomy.axes;
        let classes: Vec<ClassId> = anatomy.groups.iter().filter(|g| g.kind != Kind::Token).map(|g| g.leaf).collect();
        let mut tokens = BTreeMap::new();
        for site in &anatomy.tokens {
            tokens.extend(site.reach.iter().map(|(at, list)| (*at, (site.layer, list.len(), site.count))));
        }
        let mut terms: BTreeMap<(usize, usize), AxisTerms> = BTreeMap::new();
        for class in &classes {
            for m in &axes.classes()[*class].members {
                terms.entry((m.carrier, m.axis)).or_insert_with(|| {
                    let mut seen: BTreeMap<Vec<usize>, Vec<(ClassId, usize)>> = BTreeMap::new();
                    for r in axes.regions((m.carrier, m.axis)) {
                        seen.entry(r.positions).or_insert(r.factors);
                    }
                    seen.into_values().collect()
                });
            }
        }
        let touched = |v: ValueId, rank: usize| {
            (0..rank).any(|axis| terms.contains_key(&(v.index(), axis)) || tokens.contains_key(&(v, axis)))
        };
        let mut moving = Vec::new();
        let mut fixed_macs = Some(0u64);
        for (id, node) in graph.nodes() {
            let Some(rule) = ops::rule_of(graph, node) else { continue };
            let ops::Cost::Rule(cost) = rule.cost else { continue };
            let values = node.inputs().iter().chain(node.outputs()).flatten();
            if values.into_iter().any(|v| touched(*v, facts.shape(*v).map_or(0, <[_]>::len))) {
                moving.push((id, cost));
            } else {
                let shape = |v: ValueId| facts.shape(v).map(<[_]>::to_vec);
                fixed_macs = fixed_macs.zip(node_macs(graph, id, cost, &shape, sizes)).map(|(a, b)| a + b);
            }
        }
        let mut model = Self {
            graph,
            facts,
            sizes: sizes.clone(),
            terms,
            tokens,
            fixed_macs,
            moving,
            fixed_params: params(graph),
            constants: Vec::new(),
        };
        model.find_constants(axes);
        model
    }

    fn find_constants(&mut self, axes: &Axes) {
        for (v, value) in self.graph.values().filter(|(v, _)| self.graph.is_constant(*v)) {
            let Some(t) = self.graph.constant(v).filter(|t| is_param(t.dtype, t.element_count())) else { continue };
            let carriers = value.users().iter().filter_map(|u: &Use| axes.carrier_at(self.graph, u.node, Slot::In(u.slot)));
            let is_cut = |c: &usize| (0..t.dims.len()).any(|axis| self.terms.contains_key(&(*c, axis)));
            if let Some(carrier) = carriers.into_iter().find(is_cut) {
                self.constants.push((t.dims, carrier));
            }
        }
    }

    /// Size of an axis of a carrier.
    fn size(&self, carrier: usize, axis: usize, class_size: &dyn Fn(ClassId) -> Option<usize>) -> Option<usize> {
        let terms = self.terms.get(&(carrier, axis))?;
        Some(terms.iter().map(|t| t.iter().map(|(c, n)| class_size(*c).unwrap_or(*n)).product::<usize>()).sum())
    }

    /// The cost where classes have the sizes that `class_size` gives, and `token_counts` tokens stay from a layer on. MACs are exact;
    /// parameters leave out copies that a cut may need of constants shared by several readers.
    pub fn under(&self, class_size: &dyn Fn(ClassId) -> Option<usize>, token_counts: &BTreeMap<usize, usize>) -> Cost {
        let tokens_left = |layer: usize| token_counts.range(..=layer).map(|(_, n)| *n).min();
        let shape = |v: ValueId| {
            let mut shape = self.facts.shape(v)?.to_vec();
            for (axis, d) in shape.iter_mut().enumerate() {
                if let Some(n) = self.size(v.index(), axis, class_size) {
                    *d = n.into();
                }
                if let Some((layer, len, count)) = self.tokens.get(&(v, axis))
                    && let Some(left) = tokens_left(*layer)
                {
                    *d = len.saturating_sub(count.saturating_sub(left)).into();
                }
            }
            Some(shape)
        };
        let moving = self.moving.iter().map(|(id, cost)| node_macs(self.graph, *id, *cost, &shape, &self.sizes));
        let macs = self.fixed_macs.zip(moving.sum::<Option<u64>>()).map(|(a, b)| a + b);
        let mut params = self.fixed_params;
        for (dims, carrier) in &self.constants {
            let whole: usize = dims.iter().product();
            let after: usize =
                dims.iter().enumerate().map(|(axis, d)| self.size(*carrier, axis, class_size).unwrap_or(*d)).product();
            params -= (whole - after) as u64;
        }
        Cost { params, macs }
    }
}
