//! Parameters, bytes and multiply-accumulates (MACs; one multiply-add = 1), of a graph as it is and of a graph under a plan.
//!
//! MACs are products of loop factors, so [`Model`] keeps, per operator, which classes its loops run over; the cost of any plan is
//! then exact without slicing (C3). Counts are per run at batch 1: the leading symbol of every graph input is taken as 1.
//! Invariant: the MACs that [`Model::under`] gives are what [`count`] finds on the sliced graph.

use crate::anatomy::{Anatomy, Group, Kind};
use crate::axes::relation::Slot;
use crate::axes::{Axes, ClassId};
use crate::graph::{AttrValue, DType, DeclaredDim, Graph, Id, NodeId, Tensor, Use, ValueId};
use crate::infer::{Dim, Facts};
use crate::ops::{self, CostCx};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// What a model costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cost {
    /// Elements of all floating-point constants, and of quantized ones of more than one element.
    pub params: u64,
    /// Unit: MACs per sample; `None` where a size is not known.
    pub macs: Option<u64>,
    /// Unit: bytes of all constants as they are stored, those of subgraphs left out.
    pub bytes: u64,
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

/// Unit: bytes that a constant takes in the file.
fn stored_bytes(tensor: &Tensor) -> u64 {
    match tensor.dtype.bits() {
        0 => tensor.bytes.len() as u64,
        bits => (tensor.element_count() * bits).div_ceil(8) as u64,
    }
}

/// Unit: bytes of initializers and tensors of Constant nodes.
fn bytes(graph: &Graph) -> u64 {
    graph.values().filter_map(|(v, _)| graph.constant(v)).map(|t| stored_bytes(&t)).sum()
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
    Cost { params: params(graph), macs: macs(graph, &shape, sizes), bytes: bytes(graph) }
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

/// An axis as a function of class sizes, each with its whole size.
enum AxisSize {
    /// A sum of products.
    Sum(Vec<Vec<(ClassId, usize)>>),
    /// A multiple of sizes that are only known at run time (`batch * heads`): it shrinks as these classes do.
    Multiple(Vec<(ClassId, usize)>),
}

impl AxisSize {
    fn classes(&self) -> impl Iterator<Item = ClassId> {
        let (sum, multiple): (&[_], &[_]) = match self {
            AxisSize::Sum(terms) => (terms, &[]),
            AxisSize::Multiple(factors) => (&[], factors),
        };
        sum.iter().flatten().chain(multiple).map(|(class, _)| *class)
    }
}

/// Sizes that classes have under a plan; those that are not named stay whole.
pub type ClassSizes = BTreeMap<ClassId, usize>;

/// Tokens that stay from a layer on.
pub type TokenCounts = BTreeMap<usize, usize>;

/// An operator whose MACs depend on a plan.
struct Moving {
    node: NodeId,
    rule: CostRule,
    whole: Option<u64>,
}

/// A constant with a cut axis.
struct Stored {
    dims: Vec<usize>,
    /// The carrier that its first reader sees.
    carrier: usize,
    is_param: bool,
    /// Unit: bits of one element.
    bits: usize,
}

/// What a class bears on: numbers of operators and of constants.
#[derive(Default)]
struct Touched {
    moving: BTreeSet<usize>,
    constants: BTreeSet<usize>,
}

/// Cost as a function of class sizes: what a plan promises, without slicing. A question costs what it touches.
pub struct Model<'a> {
    graph: &'a Graph,
    facts: &'a Facts,
    sizes: Sizes,
    axes: BTreeMap<(usize, usize), AxisSize>,
    /// Axes that hold tokens: the last site before them (by layer), the axis' length, the number of tokens at the site.
    tokens: BTreeMap<(ValueId, usize), (usize, usize, usize)>,
    whole: Cost,
    moving: Vec<Moving>,
    constants: Vec<Stored>,
    by_class: BTreeMap<ClassId, Touched>,
    /// Operators with an axis that holds tokens, by the last site before it.
    by_layer: BTreeMap<usize, BTreeSet<usize>>,
    /// MACs that go with the first token of each site, by layer.
    per_token: BTreeMap<usize, Option<u64>>,
}

impl<'a> Model<'a> {
    /// Prepares the cost of plans that cut some groups of an anatomy.
    pub fn new(graph: &'a Graph, facts: &'a Facts, anatomy: &Anatomy, sizes: &Sizes) -> Self {
        let mut tokens = BTreeMap::new();
        let sites: Vec<_> = anatomy.tokens.sites.iter().collect();
        for (number, stretch) in anatomy.tokens.last_before(&sites) {
            for (at, list) in &stretch.reach {
                tokens.entry(*at).or_insert((sites[number].layer, list.len(), sites[number].count));
            }
        }
        let mut model = Self {
            graph,
            facts,
            sizes: sizes.clone(),
            axes: axis_sizes(anatomy),
            tokens,
            whole: Cost { params: params(graph), macs: Some(0), bytes: bytes(graph) },
            moving: Vec::new(),
            constants: Vec::new(),
            by_class: BTreeMap::new(),
            by_layer: BTreeMap::new(),
            per_token: BTreeMap::new(),
        };
        model.find_moving();
        model.find_constants(&anatomy.axes);
        model.count_tokens(anatomy);
        model
    }

    fn find_moving(&mut self) {
        let shape = |v: ValueId| self.facts.shape(v).map(<[_]>::to_vec);
        for (node, record) in self.graph.nodes() {
            let Some(ops::Cost::Rule(rule)) = ops::rule_of(self.graph, record).map(|r| &r.cost) else { continue };
            let rule = *rule;
            let whole = node_macs(self.graph, node, rule, &shape, &self.sizes);
            self.whole.macs = self.whole.macs.zip(whole).map(|(a, b)| a + b);
            let number = self.moving.len();
            let mut moves = false;
            for v in record.inputs().iter().chain(record.outputs()).flatten() {
                for axis in 0..self.facts.shape(*v).map_or(0, <[_]>::len) {
                    for class in self.axes.get(&(v.index(), axis)).into_iter().flat_map(AxisSize::classes) {
                        moves |= self.by_class.entry(class).or_default().moving.insert(number);
                    }
                    if let Some((layer, ..)) = self.tokens.get(&(*v, axis)) {
                        moves |= self.by_layer.entry(*layer).or_default().insert(number);
                    }
                }
            }
            if moves {
                self.moving.push(Moving { node, rule, whole });
            }
        }
    }

    fn find_constants(&mut self, axes: &Axes) {
        for (v, value) in self.graph.values().filter(|(v, _)| self.graph.is_constant(*v)) {
            let Some(t) = self.graph.constant(v) else { continue };
            let carriers = value.users().iter().filter_map(|u: &Use| axes.carrier_at(self.graph, u.node, Slot::In(u.slot)));
            let is_cut = |c: &usize| (0..t.dims.len()).any(|axis| self.axes.contains_key(&(*c, axis)));
            let Some(carrier) = carriers.into_iter().find(is_cut) else { continue };
            for axis in 0..t.dims.len() {
                for class in self.axes.get(&(carrier, axis)).into_iter().flat_map(AxisSize::classes) {
                    self.by_class.entry(class).or_default().constants.insert(self.constants.len());
                }
            }
            let is_param = is_param(t.dtype, t.element_count());
            self.constants.push(Stored { dims: t.dims, carrier, is_param, bits: t.dtype.bits() });
        }
    }

    /// What the first token of each site costs. It costs the same at an operator whichever site before it takes it away, unless
    /// another site stands between two of the operator's values.
    fn count_tokens(&mut self, anatomy: &Anatomy) {
        let mut saved: BTreeMap<usize, Option<u64>> = anatomy.tokens.sites.iter().map(|s| (s.layer, Some(0))).collect();
        let layers: BTreeMap<usize, usize> = anatomy.tokens.sites.iter().map(|s| (s.layer, s.count)).collect();
        let mut add = |layer: usize, macs: Option<u64>| {
            saved.entry(layer).and_modify(|old| *old = old.zip(macs).map(|(a, b)| a + b));
        };
        let mut behind: BTreeMap<usize, Option<u64>> = BTreeMap::new();
        for m in &self.moving {
            let values = self.graph.node(m.node).inputs().iter().chain(self.graph.node(m.node).outputs()).flatten();
            let held: BTreeSet<usize> =
                values.flat_map(|v| self.tokens.range((*v, 0)..=(*v, usize::MAX))).map(|(_, t)| t.0).collect();
            let Some(first) = held.first().copied() else { continue };
            let without = |layer: usize| {
                let counts = TokenCounts::from([(layer, layers.get(&layer).map_or(0, |n| n - 1))]);
                m.whole.zip(self.macs_of(m, &ClassSizes::new(), &counts)).map(|(a, b)| a - b)
            };
            // From sites up to the first, all of it; from one between two, what lies behind that one.
            let entry = behind.entry(first).or_insert(Some(0));
            *entry = entry.zip(without(first)).map(|(a, b)| a + b);
            if let Some(last) = held.last().filter(|l| **l != first) {
                layers.range(first + 1..=*last).for_each(|(layer, _)| add(*layer, without(*layer)));
            }
        }
        let mut sum = Some(0);
        for (layer, _) in layers.iter().rev() {
            sum = sum.zip(behind.get(layer).copied().unwrap_or(Some(0))).map(|(a, b)| a + b);
            add(*layer, sum);
        }
        self.per_token = saved;
    }

    /// Size of an axis of a carrier, which is `whole` before any cut; `None` where no class that can be cut is on it.
    fn size(&self, carrier: usize, axis: usize, whole: &Dim, classes: &ClassSizes) -> Option<Dim> {
        let left = |(c, n): &(ClassId, usize)| classes.get(c).copied().unwrap_or(*n);
        match self.axes.get(&(carrier, axis))? {
            AxisSize::Sum(terms) => Some(terms.iter().map(|t| t.iter().map(left).product::<usize>()).sum::<usize>().into()),
            AxisSize::Multiple(factors) => {
                factors.iter().try_fold(whole.clone(), |d, f| Some(&d.exact_div(&Dim::from(f.1))? * &Dim::from(left(f))))
            }
        }
    }

    /// MACs of an operator under a plan.
    fn macs_of(&self, moving: &Moving, classes: &ClassSizes, tokens: &TokenCounts) -> Option<u64> {
        let tokens_left = |layer: usize| tokens.range(..=layer).map(|(_, n)| *n).min();
        let shape = |v: ValueId| {
            let mut shape = self.facts.shape(v)?.to_vec();
            for (axis, d) in shape.iter_mut().enumerate() {
                if let Some(n) = self.size(v.index(), axis, d, classes) {
                    *d = n;
                }
                if let Some((layer, len, count)) = self.tokens.get(&(v, axis))
                    && let Some(left) = tokens_left(*layer)
                {
                    *d = len.saturating_sub(count.saturating_sub(left)).into();
                }
            }
            Some(shape)
        };
        node_macs(self.graph, moving.node, moving.rule, &shape, &self.sizes)
    }

    /// The cost where classes and the sequence have the given sizes. MACs are exact; parameters and bytes leave out copies that a cut
    /// may need of constants shared by several readers.
    pub fn under(&self, classes: &ClassSizes, tokens: &TokenCounts) -> Cost {
        self.less(&self.touched(classes.keys().copied(), tokens.keys().copied()), classes, tokens)
    }

    /// As [`Model::under`] where of everything that the sizes change only what `group` bears on is counted: for comparing sizes of
    /// that group, at the sizes given for the others.
    pub fn around(&self, group: &Group, classes: &ClassSizes, tokens: &TokenCounts) -> Cost {
        let is_token = group.kind == Kind::Token;
        let touched = self.touched((!is_token).then_some(group.leaf), is_token.then_some(group.layer));
        self.less(&touched, classes, tokens)
    }

    fn touched(&self, classes: impl IntoIterator<Item = ClassId>, layers: impl IntoIterator<Item = usize>) -> Touched {
        let mut out = Touched::default();
        for touched in classes.into_iter().filter_map(|c| self.by_class.get(&c)) {
            out.moving.extend(&touched.moving);
            out.constants.extend(&touched.constants);
        }
        if let Some(first) = layers.into_iter().min() {
            out.moving.extend(self.by_layer.range(first..).flat_map(|(_, numbers)| numbers));
        }
        out
    }

    /// The whole cost, less what goes of some operators and constants.
    fn less(&self, touched: &Touched, classes: &ClassSizes, tokens: &TokenCounts) -> Cost {
        let mut cost = self.whole;
        for number in &touched.moving {
            let m = &self.moving[*number];
            let change = m.whole.zip(self.macs_of(m, classes, tokens));
            cost.macs = cost.macs.zip(change).map(|(all, (before, after))| all - before + after);
        }
        for number in &touched.constants {
            let stored = &self.constants[*number];
            let left = |(axis, d): (usize, &usize)| self.size(stored.carrier, axis, &Dim::from(*d), classes)?.size();
            let whole: usize = stored.dims.iter().product();
            let after: usize = stored.dims.iter().enumerate().map(|at| left(at).unwrap_or(*at.1)).product();
            let bytes = |elements: usize| (elements * stored.bits).div_ceil(8);
            cost.bytes -= (bytes(whole) - bytes(after)) as u64;
            if stored.is_param {
                cost.params -= (whole - after) as u64;
            }
        }
        cost
    }

    /// What the first step of a group saves: one coordinate of its class everywhere, or one token.
    pub fn first_step(&self, group: &Group) -> Cost {
        if group.kind == Kind::Token {
            return Cost { params: 0, macs: self.per_token.get(&group.layer).copied().flatten(), bytes: 0 };
        }
        let left = group.class_size().saturating_sub(group.run);
        let after = self.under(&[(group.leaf, left)].into(), &TokenCounts::new());
        Cost {
            params: self.whole.params - after.params,
            macs: self.whole.macs.zip(after.macs).map(|(whole, after)| whole - after),
            bytes: self.whole.bytes - after.bytes,
        }
    }
}

/// The axes that hold a class that can be cut, as functions of class sizes.
fn axis_sizes(anatomy: &Anatomy) -> BTreeMap<(usize, usize), AxisSize> {
    let axes = &anatomy.axes;
    let leaves: BTreeSet<ClassId> = anatomy.groups.iter().filter(|g| g.kind != Kind::Token).map(|g| g.leaf).collect();
    let size_of = |at: (usize, usize)| {
        if axes.carriers()[at.0].shape[at.1].known().is_none() {
            let cut = axes.classes_on(at).into_iter().filter(|c| leaves.contains(c));
            return AxisSize::Multiple(cut.filter_map(|c| Some((c, axes.classes()[c].size?))).collect());
        }
        // Any section: they differ in classes, but all of them keep the same number.
        let section = axes.sections(at).into_iter().next().unwrap_or_default();
        AxisSize::Sum(section.into_iter().map(|r| r.factors).collect())
    };
    let mut sizes = BTreeMap::new();
    for group in anatomy.groups.iter().filter(|g| g.kind != Kind::Token) {
        for m in axes.classes()[group.leaf].members.iter().filter(|m| !group.aside.contains(&m.carrier)) {
            sizes.entry((m.carrier, m.axis)).or_insert_with_key(|at| size_of(*at));
        }
    }
    sizes
}
