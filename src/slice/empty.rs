//! Layers that lose all units.
//!
//! What sums over the units of such a group sums over nothing: the product is zero, and what is left of a Gemm or Conv is its bias.
//! [`detach`] puts that in the place of every sink, before anything is cut, so that what led there is dead. [`settle`] then carries
//! the small value forward, without writing it out in full, to where it meets the rest: a block `x + (h W + b)` becomes `x + b`.
//! Only where a node needs the whole block (a product, a normalization) is it expanded to its shape.

use super::cutset::{CutError, CutSet};
use super::shapes::size_vector;
use crate::axes::relation::Slot;
use crate::axes::{Axes, CarrierId};
use crate::graph::build::Builder;
use crate::graph::{DType, Graph, Id, Node, NodeId, Tensor, Use, ValueId};
use crate::infer::{Dim, Facts, normalize_axis};
use std::collections::{BTreeMap, BTreeSet};

/// A value that stands for a larger one, which is it in every position.
#[derive(Clone, Debug)]
struct Small {
    /// The value; its shape is `shape` without leading ones.
    value: ValueId,
    /// As many axes as the larger one, each of its size or 1.
    shape: Vec<Dim>,
    /// Shape of the larger one.
    full: Vec<Dim>,
    /// Whether it is a scalar zero.
    is_zero: bool,
}

impl Small {
    /// The one axis of another size than 1; `Ok(None)` of a scalar, `Err` where there are several.
    fn axis(&self) -> Result<Option<usize>, ()> {
        let mut axes = (0..self.shape.len()).filter(|a| !self.shape[*a].is(1));
        match (axes.next(), axes.next()) {
            (first, None) => Ok(first),
            _ => Err(()),
        }
    }

    fn is_full(&self) -> bool {
        self.shape == self.full
    }
}

/// What stands in the place of the results of emptied sinks.
#[derive(Default)]
pub(super) struct Detached {
    /// The stand-in, and the result that it stands for.
    results: Vec<(ValueId, ValueId)>,
}

impl Detached {
    pub(super) fn is_empty(&self) -> bool {
        self.results.is_empty()
    }
}

/// Replaces the results of all sinks of groups that lose everything by what a sum of nothing is.
pub(super) fn detach(out: &mut Graph, facts: &Facts, axes: &Axes, cut: &CutSet<'_>) -> Result<Detached, CutError> {
    let mut done = BTreeSet::new();
    let mut detached = Detached::default();
    for group in cut.emptied() {
        for sink in &axes.classes()[group.leaf].sinks {
            // A sum over several parts, of which others stay, only gets shorter.
            let summed = axes.carrier_at(out, sink.node, sink.a.0).map(|carrier| (carrier, sink.a.1));
            if !summed.is_some_and(|at| cut.is_emptied(at)) || !done.insert(sink.node) {
                continue;
            }
            let inside = [Some(sink.a), sink.b].into_iter().flatten().any(|(slot, _)| matches!(slot, Slot::Virtual(_)));
            let node = out.node(sink.node).clone();
            let dtype = |v: ValueId| facts.get(v).dtype;
            let dtype = node.output(0).and_then(dtype).or_else(|| node.inputs().iter().flatten().find_map(|v| dtype(*v)));
            let result = node.output(0).filter(|v| !inside && facts.shape(*v).is_some()).zip(dtype);
            let Some((result, dtype)) = result else {
                return Err(needed(out, sink.node, &group.id, "it sums over the units inside itself"));
            };
            let stand_in = sum_of_nothing(out, facts, sink.node, result, dtype, &group.id)?;
            out.replace_uses(result, stand_in);
            if out.outputs().contains(&result) {
                // The output itself is expanded where it is settled.
                let name = format!("{}_nothing", out.value(result).name());
                let passed = out.add_op("Identity", &[stand_in], vec![], &name);
                out.move_output(result, passed);
            }
            detached.results.push((stand_in, result));
        }
    }
    Ok(detached)
}

/// The refusal to do without a group.
pub(super) fn needed(graph: &Graph, id: NodeId, group: &str, why: impl Into<String>) -> CutError {
    CutError::Needed { group: group.to_string(), node: graph.label(id), op: graph.node(id).op().to_string(), why: why.into() }
}

/// The ids of all emptied groups, for a message.
pub(super) fn ids(cut: &CutSet<'_>) -> String {
    cut.emptied().iter().map(|g| g.id.as_str()).collect::<Vec<_>>().join("', '")
}

/// The carrier of an input of a node, where nothing is left of one of its axes.
fn emptied_input(out: &Graph, axes: &Axes, cut: &CutSet<'_>, id: NodeId, slot: usize) -> Option<CarrierId> {
    let carrier = axes.carrier_at(out, id, Slot::In(slot))?;
    (0..axes.carriers()[carrier].shape.len()).any(|axis| cut.is_emptied((carrier, axis))).then_some(carrier)
}

/// Sizes that are read off values that will not be there, as one array, are read off others.
///
/// Error: the node for which that is not possible, and why.
pub(super) fn read_sizes_elsewhere(
    out: &mut Graph,
    original: &Graph,
    facts: &Facts,
    unreadable: &BTreeSet<CarrierId>,
) -> Result<(), (NodeId, String)> {
    let old: BTreeSet<NodeId> = original.order().iter().copied().collect();
    for id in out.order().to_vec() {
        let node = out.node(id).clone();
        let reads = original_input(original, &old, id).is_some_and(|v| unreadable.contains(&v.index()));
        if node.op() != "Shape" || !reads {
            continue;
        }
        let sizes = node.output(0).and_then(|v| facts.get(v).known.as_ref()?.ints().map(<[_]>::to_vec));
        let (Some(sizes), Some(result)) = (sizes, node.output(0)) else {
            return Err((id, "the sizes that it reads are not known".into()));
        };
        let may_ask = |g: &Graph, v: ValueId| {
            facts.shape(v).filter(|_| !unreadable.contains(&v.index()) && !g.is_constant(v)).map(<[_]>::to_vec)
        };
        let vector =
            size_vector(out, id, &sizes, &may_ask).map_err(|size| (id, format!("no other value has the size {size}")))?;
        out.replace_uses(result, vector);
    }
    out.sort();
    Ok(())
}

fn original_input(original: &Graph, old: &BTreeSet<NodeId>, id: NodeId) -> Option<ValueId> {
    old.contains(&id).then(|| original.node(id).input(0)).flatten()
}

/// Nothing reads a value any more of which nothing is left.
pub(super) fn check_dead(out: &Graph, original: &Graph, axes: &Axes, cut: &CutSet<'_>) -> Result<(), CutError> {
    let old: BTreeSet<NodeId> = original.order().iter().copied().collect();
    for (id, node) in out.nodes().filter(|(id, _)| old.contains(id)) {
        if (0..node.inputs().len()).any(|slot| emptied_input(out, axes, cut, id, slot).is_some()) {
            return Err(needed(out, id, &ids(cut), "it reads what would be left"));
        }
    }
    Ok(())
}

/// A value that stands for the result of a node that has nothing to sum over: a scalar zero, or its bias.
fn sum_of_nothing(
    out: &mut Graph,
    facts: &Facts,
    id: NodeId,
    result: ValueId,
    dtype: DType,
    group: &str,
) -> Result<ValueId, CutError> {
    let node = out.node(id).clone();
    let name = out.value(result).name().to_string();
    let bias = match (node.domain(), node.op()) {
        ("", "MatMul" | "Einsum" | "ReduceSum" | "ReduceL1" | "ReduceL2" | "MatMulInteger" | "ConvInteger")
        | ("com.microsoft", "FusedMatMul") => None,
        ("com.microsoft", "MatMulNBits") => node.input(5),
        ("", "Gemm") if node.input(2).is_none() || node.attr_float("beta").unwrap_or(1.0) == 1.0 => node.input(2),
        ("", "Conv" | "ConvTranspose") => node.input(2),
        _ => {
            return Err(needed(out, id, group, "what it gives for no units is not known"));
        }
    };
    let Some(bias) = bias else {
        let bytes = vec![0u8; dtype.bits() / 8];
        return Ok(out.add_initializer(&format!("{name}_nothing"), Tensor::new(dtype, Vec::new(), bytes.into())));
    };
    let trailing = facts.shape(result).map_or(0, |s| s.len().saturating_sub(2));
    let mut b = Builder::new(out, &format!("{name}_nothing."));
    if trailing > 0 && node.op().starts_with("Conv") {
        let shape: Vec<i64> = std::iter::once(-1).chain(std::iter::repeat_n(1, trailing)).collect();
        return Ok(b.reshape(bias, &shape));
    }
    // A value of its own, so that what else reads the bias is told apart.
    Ok(b.op("Identity", &[bias], vec![]))
}

/// Carries the stand-ins forward. `shape` gives the shape of a value of the original after the cut. Returns the values whose shape
/// is smaller than the plan says, because they hold the same everywhere.
pub(super) fn settle(
    out: &mut Graph,
    detached: Detached,
    facts: &Facts,
    cut: &CutSet<'_>,
    shape: &dyn Fn(ValueId) -> Option<Vec<Dim>>,
) -> Result<BTreeSet<ValueId>, CutError> {
    let mut settler = Settler { facts, shape, small: BTreeMap::new(), loose: BTreeSet::new(), groups: ids(cut) };
    for (stand_in, result) in detached.results {
        let Some(full) = shape(result) else { continue }; // known, as detach asked for it
        let is_zero = out.is_constant(stand_in);
        let mut own = vec![Dim::from(1usize); full.len()];
        if !is_zero {
            // The bias of a Gemm or Conv: along the last axis, or along channels.
            let made = out.value(stand_in).producer().map(|(n, _)| out.node(n));
            let dims = made.and_then(|n| n.input(0)).and_then(shape).unwrap_or_default();
            let is_reshaped = made.is_some_and(|n| n.op() == "Reshape");
            let first = if is_reshaped { 1 } else { full.len().saturating_sub(dims.len()) };
            for (axis, d) in dims.into_iter().enumerate() {
                own[first + axis] = d;
            }
        }
        settler.small.insert(stand_in, Small { value: stand_in, shape: own, full, is_zero });
    }
    for id in out.order().to_vec() {
        settler.node(out, id)?;
    }
    drop_identities(out, &settler.small);
    Ok(settler.loose)
}

/// The biases that got a value of their own are read directly again.
fn drop_identities(out: &mut Graph, small: &BTreeMap<ValueId, Small>) {
    for v in small.keys() {
        let Some((id, _)) = out.value(*v).producer() else { continue };
        let node = out.node(id);
        if let ("Identity", Some(source)) = (node.op(), node.input(0))
            && out.value(*v).name().contains("_nothing.")
        {
            out.replace_uses(*v, source);
        }
    }
}

struct Settler<'a> {
    facts: &'a Facts,
    shape: &'a dyn Fn(ValueId) -> Option<Vec<Dim>>,
    /// What stands for a larger value, by the value that is read.
    small: BTreeMap<ValueId, Small>,
    /// Values of the original that are smaller now, or that nothing reads.
    loose: BTreeSet<ValueId>,
    /// The groups that are gone, for messages.
    groups: String,
}

impl Settler<'_> {
    fn at(&self, node: &Node, slot: usize) -> Option<Small> {
        node.input(slot).and_then(|v| self.small.get(&v)).cloned()
    }

    /// Lets one node follow.
    fn node(&mut self, out: &mut Graph, id: NodeId) -> Result<(), CutError> {
        let node = out.node(id).clone();
        if !node.inputs().iter().flatten().any(|v| self.small.contains_key(v)) || self.small_made_by(&node) {
            return Ok(());
        }
        let to_output = node.outputs().iter().flatten().any(|v| out.outputs().contains(v));
        let first = self.at(&node, 0);
        let done = match (node.domain(), node.op(), first) {
            _ if to_output && !is_binary(node.op()) => false,
            ("", "Add" | "Sub" | "Mul" | "Div", _) => self.binary(out, &node, to_output),
            ("", "Identity" | "Dropout", Some(small)) if node.output(1).is_none_or(|v| out.value(v).users().is_empty()) => {
                self.pass(out, &node, small);
                true
            }
            ("", "Cast", Some(small)) if small.is_zero => self.zero(out, &node),
            ("", "Relu" | "Neg" | "Sqrt" | "Abs" | "Tanh", Some(small)) if small.is_zero => self.zero(out, &node),
            ("", "Transpose" | "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze", Some(small)) => self.moved(out, &node, small),
            ("", "Slice" | "Gather" | "Split" | "Expand", Some(small)) if small.is_zero => self.zero(out, &node),
            ("", "Slice" | "Split", Some(small)) => self.selected(out, &node, small),
            ("", "Concat", Some(small)) => self.joined(out, &node, small),
            ("", "Shape", Some(small)) => self.shape_of(out, id, &node, &small)?,
            ("", "Softmax", Some(small)) => self.softmax(out, &node, small),
            _ => false,
        };
        if !done {
            for slot in 0..node.inputs().len() {
                if let Some(small) = self.at(&node, slot) {
                    let whole = self.expand(out, id, &small)?;
                    out.set_input(Use { node: id, slot }, Some(whole));
                }
            }
        }
        Ok(())
    }

    /// The node that makes a stand-in of a bias is not behind it.
    fn small_made_by(&self, node: &Node) -> bool {
        node.output(0).is_some_and(|v| self.small.contains_key(&v))
    }

    /// An output of a node, and its shape after the cut.
    fn result(&self, node: &Node, slot: usize) -> Option<(ValueId, Vec<Dim>)> {
        let v = node.output(slot)?;
        Some((v, (self.shape)(v)?))
    }

    /// Whatever reads `old` reads `new`; `old` is not to be read for its size either.
    fn replace(&mut self, out: &mut Graph, old: ValueId, new: ValueId) {
        out.replace_uses(old, new);
        self.loose.insert(old);
    }

    /// Whatever reads the node's result reads `small`.
    fn pass(&mut self, out: &mut Graph, node: &Node, small: Small) {
        let Some((v, full)) = self.result(node, 0) else { return };
        self.replace(out, v, small.value);
        self.small.entry(small.value).or_insert(Small { full, ..small });
    }

    /// The results are zero too.
    fn zero(&mut self, out: &mut Graph, node: &Node) -> bool {
        for slot in 0..node.outputs().len() {
            let Some((v, full)) = self.result(node, slot) else { continue };
            let Some(dtype) = self.facts.get(v).dtype else { continue };
            let name = format!("{}_nothing", out.value(v).name());
            let zero = out.add_initializer(&name, Tensor::new(dtype, Vec::new(), vec![0u8; dtype.bits() / 8].into()));
            self.replace(out, v, zero);
            let shape = vec![Dim::from(1usize); full.len()];
            self.small.insert(zero, Small { value: zero, shape, full, is_zero: true });
        }
        true
    }

    /// A vector along one axis is moved to another place.
    fn moved(&mut self, out: &mut Graph, node: &Node, small: Small) -> bool {
        if small.is_zero {
            return self.zero(out, node);
        }
        let (Ok(axis), Some((v, full))) = (small.axis(), self.result(node, 0)) else { return false };
        let Some(axis) = axis else { return false };
        let behind = |dims: &[Dim], at: usize| -> Dim { dims[at + 1..].iter().product() };
        let target = if node.op() == "Transpose" {
            let perm = node.attr_ints("perm").map(<[i64]>::to_vec);
            let perm = perm.unwrap_or_else(|| (0..full.len() as i64).rev().collect());
            perm.iter().position(|p| usize::try_from(*p) == Ok(axis))
        } else {
            (0..full.len()).find(|a| full[*a] == small.full[axis] && behind(&full, *a) == behind(&small.full, axis))
        };
        let (Some(target), Some(size)) = (target, small.shape[axis].known()) else { return false };
        let mut shape = vec![Dim::from(1usize); full.len()];
        shape[target] = small.shape[axis].clone();
        let trailing = full.len() - 1 - target;
        let value = if small.shape.len() - 1 - axis == trailing {
            small.value
        } else {
            let name = format!("{}_nothing.", out.value(v).name());
            let dims: Vec<i64> = std::iter::once(size).chain(std::iter::repeat_n(1, trailing)).collect();
            Builder::new(out, &name).reshape(small.value, &dims)
        };
        // A value is known by one shape: what is read in two roles gets a name for each.
        let value = if self.small.contains_key(&value) {
            let name = format!("{}_nothing.", out.value(v).name());
            Builder::new(out, &name).op("Identity", &[value], vec![])
        } else {
            value
        };
        self.replace(out, v, value);
        self.small.insert(value, Small { value, shape, full, is_zero: false });
        true
    }

    /// Selections along axes on which the value is the same everywhere.
    fn selected(&mut self, out: &mut Graph, node: &Node, small: Small) -> bool {
        let rank = small.full.len();
        let axes: Option<Vec<usize>> = match node.op() {
            "Split" => normalize_axis(node.attr_int("axis").unwrap_or(0), rank).map(|a| vec![a]),
            _ => match node.input(3).and_then(|v| self.facts.get(v).known.as_ref()?.numbers()) {
                Some(axes) => axes.iter().map(|a| normalize_axis(*a, rank)).collect(),
                None => None,
            },
        };
        let same = axes.is_some_and(|axes| axes.iter().all(|a| small.shape[*a].is(1)));
        if !same || node.outputs().iter().flatten().count() > 1 {
            return false;
        }
        self.renamed(out, node, &small)
    }

    /// Pieces that are all the same value, joined along an axis on which it is the same everywhere.
    fn joined(&mut self, out: &mut Graph, node: &Node, small: Small) -> bool {
        let pieces: Option<Vec<Small>> = (0..node.inputs().len()).map(|slot| self.at(node, slot)).collect();
        let Some(pieces) = pieces else { return false };
        if pieces.iter().all(|p| p.is_zero) {
            return self.zero(out, node);
        }
        let axis = normalize_axis(node.attr_int("axis").unwrap_or(0), small.full.len());
        let source = |p: &Small| self.origin(out, p.value);
        let same = pieces.iter().all(|p| source(p) == source(&small) && p.shape == small.shape);
        same && axis.is_some_and(|a| small.shape[a].is(1)) && self.renamed(out, node, &small)
    }

    /// The value behind Identity nodes.
    fn origin(&self, out: &Graph, mut v: ValueId) -> ValueId {
        while let Some((id, _)) = out.value(v).producer() {
            match (out.node(id).op(), out.node(id).input(0)) {
                ("Identity", Some(source)) => v = source,
                _ => break,
            }
        }
        v
    }

    /// The result is `small` in another full shape of the same rank.
    fn renamed(&mut self, out: &mut Graph, node: &Node, small: &Small) -> bool {
        let Some((v, full)) = self.result(node, 0) else { return false };
        if full.len() != small.full.len() {
            return false;
        }
        let name = format!("{}_nothing.", out.value(v).name());
        let value = Builder::new(out, &name).op("Identity", &[small.value], vec![]);
        self.replace(out, v, value);
        self.small.insert(value, Small { value, shape: small.shape.clone(), full, is_zero: false });
        true
    }

    /// A softmax over an axis that is there in full is the same everywhere else.
    fn softmax(&mut self, out: &mut Graph, node: &Node, small: Small) -> bool {
        let Some((v, full)) = self.result(node, 0) else { return false };
        let whole_rank = (self.shape)(small.value).is_some_and(|s| s.len() == full.len());
        let axis = normalize_axis(node.attr_int("axis").unwrap_or(-1), full.len());
        let fine = axis.is_some_and(|a| small.shape[a] == full[a]) && whole_rank && out.opset("").unwrap_or(0) >= 13;
        if fine {
            self.loose.insert(v);
            self.small.insert(v, Small { value: v, shape: small.shape, full, is_zero: false });
        }
        fine
    }

    /// `a op b`, one of them or both small.
    fn binary(&mut self, out: &mut Graph, node: &Node, to_output: bool) -> bool {
        let Some((v, full)) = self.result(node, 0) else { return false };
        let zero = |slot: usize| self.at(node, slot).is_some_and(|s| s.is_zero);
        if (node.op() == "Mul" && (zero(0) || zero(1)) || node.op() == "Div" && zero(0)) && !to_output {
            return self.zero(out, node);
        }
        let rank = full.len();
        let aligned = |slot: usize| -> Option<Vec<Dim>> {
            let value = node.input(slot)?;
            let own = match self.small.get(&value) {
                Some(s) => s.shape.clone(),
                None => (self.shape)(value)?,
            };
            let missing = rank.checked_sub(own.len())?;
            Some(std::iter::repeat_n(Dim::from(1usize), missing).chain(own).collect())
        };
        let (Some(a), Some(b)) = (aligned(0), aligned(1)) else { return false };
        let wide: Vec<Dim> = a.iter().zip(&b).map(|(x, y)| if x.is(1) { y.clone() } else { x.clone() }).collect();
        let other = match node.op() {
            "Add" if zero(0) => Some(1),
            "Add" | "Sub" if zero(1) => Some(0),
            _ => None,
        };
        if let (Some(slot), false) = (other, to_output)
            && let Some(value) = node.input(slot)
        {
            // A sum with zero is the other summand.
            let is_small = self.small.contains_key(&value);
            let value = if is_small || wide == full || !self.is_needed_apart(out, value) {
                value
            } else {
                let name = format!("{}_nothing.", out.value(v).name());
                Builder::new(out, &name).op("Identity", &[value], vec![])
            };
            self.replace(out, v, value);
            if wide != full {
                let small = Small { value, shape: wide, full, is_zero: false };
                self.small.entry(value).or_insert(small);
            }
            return true;
        }
        if wide == full {
            return true;
        }
        if to_output {
            return false;
        }
        self.loose.insert(v);
        self.small.insert(v, Small { value: v, shape: wide, full, is_zero: false });
        true
    }

    /// Whether others read the value, who must not take it for a stand-in.
    fn is_needed_apart(&self, out: &Graph, v: ValueId) -> bool {
        out.value(v).users().len() > 1 || out.outputs().contains(&v)
    }

    /// The value written out in its full shape.
    fn expand(&mut self, out: &mut Graph, reader: NodeId, small: &Small) -> Result<ValueId, CutError> {
        if small.is_full() {
            return Ok(small.value);
        }
        let target = self.sizes(out, reader, &small.full)?;
        let name = format!("{}_whole.", out.value(small.value).name());
        Ok(Builder::new(out, &name).op("Expand", &[small.value, target], vec![]))
    }

    /// A vector of sizes, read off values that are there in full.
    fn sizes(&self, out: &mut Graph, reader: NodeId, sizes: &[Dim]) -> Result<ValueId, CutError> {
        let may_ask = |g: &Graph, v: ValueId| {
            (self.shape)(v).filter(|_| !self.small.contains_key(&v) && !self.loose.contains(&v) && !g.is_constant(v))
        };
        size_vector(out, reader, sizes, &may_ask).map_err(|size| {
            let why = format!("it needs the whole of a value, and no other value has the size {size}");
            needed(out, reader, &self.groups, why)
        })
    }

    /// What reads the shape of a value gets that of the value in full.
    fn shape_of(&mut self, out: &mut Graph, id: NodeId, node: &Node, small: &Small) -> Result<bool, CutError> {
        if node.attr("start").is_some() || node.attr("end").is_some() {
            return Ok(false);
        }
        let Some(result) = node.output(0) else { return Ok(false) };
        let vector = self.sizes(out, id, &small.full)?;
        out.replace_uses(result, vector);
        Ok(true)
    }
}

fn is_binary(op: &str) -> bool {
    matches!(op, "Add" | "Sub" | "Mul" | "Div")
}
