//! Values that stop being a block.
//!
//! A fused projection `[B, N, 3*H*E]` is reshaped to `[B, N, 3, H, E]` and q, k, v are picked from the axis of 3. Where q and v keep
//! different numbers of dims no such value exists any more: the projection's output is split into its parts, and the chain of
//! Reshape and Transpose up to each pick is copied for its part, with 1 in the place of 3.
//!
//! Where heads of a layer keep different numbers of dims, no value `[B, H, N, E]` exists either: the nodes from where heads get an axis
//! of their own to where they lie on a flat one again are copied for each width, and the copies joined there.

use super::cutset::{CutSet, HeadsOf, Stays};
use super::refit::{Edit, RefitCx, RefitError};
use super::shapes::gather;
use super::widths::{self, Split};
use super::{Cloned, constants};
use crate::axes::relation::Slot;
use crate::axes::{CarrierId, ClassId};
use crate::graph::build::Builder;
use crate::graph::{Graph, Id, NewNode, NodeId, Use, ValueId};
use crate::infer::Facts;
use crate::ops::{self, Refit};
use std::collections::{BTreeMap, BTreeSet};

/// What copying one part needs.
pub(super) struct Brancher<'a> {
    pub(super) graph: &'a mut Graph,
    original: &'a Graph,
    pub(super) facts: &'a Facts,
    pub(super) axes: &'a crate::axes::Axes,
    pub(super) cut: &'a CutSet<'a>,
    /// Carriers with an axis that is ragged.
    pub(super) ragged: &'a BTreeSet<CarrierId>,
    /// Carriers that fall apart by the width of their heads.
    split: &'a Split,
    /// Patches that copied nodes asked for.
    pub(super) patches: Vec<(Use, Vec<(usize, i64)>)>,
    /// Constants that copied nodes read a part of.
    pub(super) cloned: Vec<Cloned>,
    /// Edits of constants that they asked for.
    pub(super) edits: Vec<(Use, Edit)>,
    made: BTreeMap<(CarrierId, Part), ValueId>,
    /// What stands in the place of values that are blocks again.
    whole: BTreeMap<CarrierId, ValueId>,
}

type Cases = BTreeSet<usize>;

/// Which part of a value: some of its cases, and of its heads those of one width.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Part {
    cases: Cases,
    heads: Option<HeadsOf>,
}

impl<'a> Brancher<'a> {
    pub(super) fn new(
        graph: &'a mut Graph,
        original: &'a Graph,
        facts: &'a Facts,
        axes: &'a crate::axes::Axes,
        cut: &'a CutSet<'a>,
        ragged: &'a BTreeSet<CarrierId>,
        split: &'a Split,
    ) -> Self {
        let (patches, cloned, edits) = (Vec::new(), Vec::new(), Vec::new());
        let (made, whole) = (BTreeMap::new(), BTreeMap::new());
        Self { graph, original, facts, axes, cut, ragged, split, patches, cloned, edits, made, whole }
    }

    /// Replaces every value that is a block again behind one that is not.
    pub(super) fn run(&mut self) -> Result<(), RefitError> {
        let alive: BTreeSet<NodeId> = self.graph.order().iter().copied().collect();
        for (id, node) in self.original.nodes().filter(|(id, _)| alive.contains(id)) {
            let mut inputs = (0..node.inputs().len()).filter_map(|s| self.carrier(id, s));
            let split = inputs.clone().find_map(|c| self.split.get(&c).copied());
            if split.is_none() && !inputs.any(|c| self.ragged.contains(&c)) {
                continue;
            }
            if matches!(ops::lookup(node.domain(), node.op()).map(|r| &r.axes), Some(ops::Axes::ShapeOnly)) {
                self.read_shape_of_part(id)?;
                continue;
            }
            for out in node.outputs().iter().flatten() {
                if !self.is_block(out.index()) {
                    continue;
                }
                let all = self.all_of(out.index(), None);
                let picked = match split {
                    Some(class) if self.has(out.index(), class) => None,
                    _ => self.picked_from(id, out.index(), &all),
                };
                let whole = match (picked, split) {
                    (Some(slot), _) => {
                        let picked = self.pick(id, slot, out.index(), &all)?;
                        picked.ok_or_else(|| self.error(id, "it reads parts of unlike width together"))?
                    }
                    (None, Some(class)) => self.join(id, *out, class)?,
                    (None, None) => continue,
                };
                if self.graph.outputs().contains(out) {
                    return Err(self.error(id, "parts of unlike width reach a graph output"));
                }
                self.graph.replace_uses(*out, whole);
                self.whole.insert(out.index(), whole);
            }
        }
        Ok(())
    }

    /// Lets a node that reads shapes only read that of one part: the sizes in which parts differ are constants by now.
    fn read_shape_of_part(&mut self, id: NodeId) -> Result<(), RefitError> {
        for slot in 0..self.original.node(id).inputs().len() {
            let Some(carrier) = self.carrier(id, slot).filter(|c| !self.is_block(*c)) else { continue };
            let class = self.split.get(&carrier).copied();
            let first = Part { cases: Cases::from([0]), heads: class.map(|c| (c, 0)) };
            let part = self.part(id, slot, carrier, &first)?;
            self.graph.set_input(Use { node: id, slot }, Some(part));
        }
        Ok(())
    }

    fn carrier(&self, id: NodeId, slot: usize) -> Option<CarrierId> {
        self.axes.carrier_at(self.original, id, Slot::In(slot))
    }

    /// Whether a value is still one array.
    fn is_block(&self, carrier: CarrierId) -> bool {
        !self.ragged.contains(&carrier) && !self.split.contains_key(&carrier)
    }

    fn all_of(&self, carrier: CarrierId, heads: Option<HeadsOf>) -> Part {
        Part { cases: (0..self.axes.case_count(carrier)).collect(), heads }
    }

    fn error(&self, id: NodeId, what: &str) -> RefitError {
        RefitError { node: self.original.label(id), op: self.original.node(id).op().to_string(), what: what.to_string() }
    }

    /// The result of a node that lays heads of several widths beside each other: a copy of the node for each, joined.
    fn join(&mut self, id: NodeId, out: ValueId, class: ClassId) -> Result<ValueId, RefitError> {
        let rank = self.facts.shape(out).map_or(0, <[_]>::len);
        let axis = (0..rank).find(|axis| self.axes.classes_on((out.index(), *axis)).contains(&class));
        let Some(axis) = axis else {
            if self.axes.classes()[class].sinks.iter().any(|s| s.node == id) {
                return Err(self.error(id, "heads of unlike width meet here"));
            }
            // Only the type of the value is read: that of the first part is as good.
            return self.copy(id, out.index(), &self.all_of(out.index(), Some((class, 0))));
        };
        let count = self.cut.widths().get(&class).map_or(0, Vec::len);
        let size = self.facts.shape(out).and_then(|s| s[axis].size()).unwrap_or(0);
        let (mut parts, mut order) = (Vec::new(), Vec::new());
        for n in 0..count {
            let part = self.all_of(out.index(), Some((class, n)));
            order.extend(self.kept_in(id, out.index(), axis, &part)?.unwrap_or_else(|| (0..size).collect()));
            parts.push(self.copy(id, out.index(), &part)?);
        }
        let name = self.graph.value(out).name().to_string();
        let joined = Builder::new(self.graph, &format!("{name}_joined.")).concat(&parts, axis as i64);
        let wanted = match self.cut.stays((out.index(), axis)) {
            Stays::Positions(p) => p,
            Stays::Whole => (0..size).collect(),
            Stays::Scaled | Stays::Ragged => return Err(self.error(id, "heads of unlike width meet here")),
        };
        if wanted == order {
            return Ok(joined);
        }
        // Where nothing else is cut along the axis its order is that of the model.
        let places: BTreeMap<usize, usize> = order.iter().enumerate().map(|(i, p)| (*p, i)).collect();
        let positions: Option<Vec<usize>> = wanted.iter().map(|p| places.get(p).copied()).collect();
        let positions = positions.ok_or_else(|| self.error(id, "the parts keep other positions than the whole"))?;
        Ok(self.take(joined, axis, &positions))
    }

    /// What a node picks from a value that is ragged, as a part of that value; `None` where it does more than pick.
    fn pick(&mut self, id: NodeId, slot: usize, out: CarrierId, part: &Part) -> Result<Option<ValueId>, RefitError> {
        let node = self.original.node(id);
        let (Some(input), Some(value)) = (self.carrier(id, slot), node.input(slot)) else { return Ok(None) };
        let cases = self.axes.cases_with(id, input, out, &part.cases);
        let rank = |v: ValueId| self.facts.shape(v).map(<[_]>::len);
        let drops_axis = rank(ValueId::new(out)) < rank(value);
        if !matches!((node.op(), drops_axis), ("Gather", _) | ("Split" | "Slice" | "Identity", false)) {
            return Ok(None);
        }
        let picked = self.part(id, slot, input, &Part { cases, heads: part.heads })?;
        let axis = node.attr_int("axis").unwrap_or(0);
        Ok(Some(if drops_axis { Builder::new(self.graph, "cut.").squeeze(picked, &[axis]) } else { picked }))
    }

    /// The value at an input, narrowed to a part.
    fn part(&mut self, reader: NodeId, slot: usize, carrier: CarrierId, part: &Part) -> Result<ValueId, RefitError> {
        let key = (carrier, part.clone());
        if let Some(v) = self.made.get(&key) {
            return Ok(*v);
        }
        let value = ValueId::new(carrier);
        let made = if self.is_block(carrier) {
            self.narrow(reader, slot, value, part)?
        } else {
            let Some((producer, _)) = self.original.value(value).producer() else {
                return Err(self.error(reader, "a constant of unlike parts"));
            };
            let picked = match self.picked_from(producer, carrier, part) {
                Some(slot) => self.pick(producer, slot, carrier, part)?,
                None => None,
            };
            match picked {
                Some(v) => v,
                None => self.copy(producer, carrier, part)?,
            }
        };
        self.made.insert(key, made);
        Ok(made)
    }

    /// The input of which a node passes on only some cases.
    fn picked_from(&self, id: NodeId, out: CarrierId, part: &Part) -> Option<usize> {
        let node = self.original.node(id);
        (0..node.inputs().len()).find(|slot| {
            let Some(input) = self.carrier(id, *slot).filter(|c| !self.is_block(*c)) else { return false };
            let cases = self.axes.cases_with(id, input, out, &part.cases);
            if self.ragged.contains(&input) && !self.ragged.contains(&out) {
                return true;
            }
            // Of an axis that tells parts apart (q, k and v) one position; slices of the dims themselves are copied like any node.
            let shapes = node.input(*slot).and_then(|v| self.facts.shape(v)).zip(self.facts.shape(ValueId::new(out)));
            let one = shapes.is_some_and(|(a, b)| {
                a.len() > b.len() || a.len() == b.len() && a.iter().zip(b).filter(|(x, y)| x != y).all(|(_, y)| y.is(1))
            });
            one && cases.len() < self.axes.case_count(input)
        })
    }

    /// A copy of the producer of a value for a part of it.
    fn copy(&mut self, id: NodeId, out: CarrierId, part: &Part) -> Result<ValueId, RefitError> {
        let node = self.original.node(id).clone();
        let is_whole = part.cases.len() == self.axes.case_count(out);
        if node.outputs().iter().flatten().count() > 1 && !is_whole {
            return Err(self.error(id, "it makes several values of unlike parts"));
        }
        let mut inputs = self.graph.node(id).inputs().to_vec();
        let mut narrowed: BTreeMap<ValueId, (CarrierId, Part)> = BTreeMap::new();
        for (slot, input) in inputs.iter_mut().enumerate() {
            let (Some(carrier), Some(value)) = (self.carrier(id, slot), node.input(slot)) else { continue };
            // A node that selects from all parts of a block, or makes several, is refitted to select from all parts of the copy.
            let cases = if is_whole && !self.is_block(carrier) && !self.ragged.contains(&carrier) {
                self.all_of(carrier, None).cases
            } else {
                self.axes.cases_with(id, carrier, out, &part.cases)
            };
            let of_input = Part { cases, heads: part.heads.filter(|(class, _)| self.has(carrier, *class)) };
            let is_source = widths::is_source(self.original, self.axes, carrier);
            let is_all = of_input == self.all_of(carrier, None);
            *input = if is_source && (part.heads.is_some() || !is_all) {
                Some(self.part_of_constant(id, slot, carrier, &of_input)?)
            } else if self.is_block(carrier) && is_all {
                continue;
            } else {
                Some(self.part(id, slot, carrier, &of_input)?)
            };
            narrowed.insert(value, (carrier, of_input));
        }
        let mut outputs = Vec::new();
        for v in node.outputs() {
            outputs.push(v.map(|v| {
                let name = format!("{}_part", self.graph.value(v).name());
                self.graph.add_value(&name)
            }));
        }
        let first = outputs.iter().flatten().next().map(|v| self.graph.value(*v).name().to_string());
        let copy = self.graph.add_node(NewNode {
            name: first.unwrap_or_default(),
            op: node.op().to_string(),
            domain: node.domain().to_string(),
            inputs,
            outputs: outputs.clone(),
            attrs: node.attrs().to_vec(),
            ..NewNode::default()
        });
        let mut made = None;
        for (old, new) in node.outputs().iter().zip(outputs) {
            let (Some(old), Some(new)) = (old, new) else { continue };
            let own = if old.index() == out { part.clone() } else { self.all_of(old.index(), part.heads) };
            narrowed.insert(*old, (old.index(), own.clone()));
            self.made.insert((old.index(), own), new);
            made = made.or((old.index() == out).then_some(new));
        }
        let mut kept: BTreeMap<(ValueId, usize), Vec<usize>> = BTreeMap::new();
        for (value, (carrier, part)) in &narrowed {
            for axis in 0..self.axes.carriers()[*carrier].shape.len() {
                if let Some(k) = self.kept_in(id, *carrier, axis, part)? {
                    kept.insert((*value, axis), k);
                }
            }
        }
        self.refit(id, copy, &kept)?;
        made.ok_or_else(|| self.error(id, "a value is not made where it is thought to be"))
    }

    /// Whether a class occurs on an axis of a carrier.
    fn has(&self, carrier: CarrierId, class: ClassId) -> bool {
        let rank = self.axes.carriers()[carrier].shape.len();
        (0..rank).any(|axis| self.axes.classes_on((carrier, axis)).contains(&class))
    }

    /// A constant for a copied node: what the heads of one width need of it.
    fn part_of_constant(&mut self, id: NodeId, slot: usize, carrier: CarrierId, part: &Part) -> Result<ValueId, RefitError> {
        let value = self.original.node(id).input(slot).ok_or_else(|| self.error(id, "an input is missing"))?;
        if part.heads.is_none() && *part != self.all_of(carrier, None) {
            return Err(self.error(id, "a constant is combined with parts of unlike width"));
        }
        if let Some(v) = self.made.get(&(carrier, part.clone())) {
            return Ok(*v);
        }
        let mut keeps = BTreeMap::new();
        for axis in 0..self.axes.carriers()[carrier].shape.len() {
            if let Some(k) = self.kept_in(id, carrier, axis, part)? {
                keeps.insert(axis, k);
            }
        }
        let made = match self.original.constant(value) {
            _ if keeps.is_empty() => self.graph.node(id).input(slot).unwrap_or(value),
            None => keeps.iter().fold(value, |v, (axis, kept)| gather(self.graph, v, *axis, kept, "cut")),
            Some(tensor) => {
                let name = self.graph.value(value).name().to_string();
                let (copy, cloned) = constants::copy(self.graph, &name, &tensor, &keeps);
                self.cloned.extend(cloned);
                copy
            }
        };
        self.made.insert((carrier, part.clone()), made);
        Ok(made)
    }

    fn refit(&mut self, origin: NodeId, id: NodeId, kept: &BTreeMap<(ValueId, usize), Vec<usize>>) -> Result<(), RefitError> {
        let node = self.original.node(origin);
        let Some(Refit::Rule(rule)) = ops::rule_of(self.original, node).map(|r| &r.refit) else { return Ok(()) };
        let look = |v: ValueId, axis: usize| kept.get(&(v, axis)).map(Vec::as_slice);
        let mut cx = RefitCx {
            graph: self.graph,
            original: self.original,
            origin,
            id,
            facts: self.facts,
            kept: &look,
            patches: Vec::new(),
            edits: Vec::new(),
        };
        rule(&mut cx)?;
        let patches = std::mem::take(&mut cx.patches);
        let edits = std::mem::take(&mut cx.edits);
        self.patches.extend(patches.into_iter().map(|(slot, entries)| (Use { node: id, slot }, entries)));
        self.edits.extend(edits.into_iter().map(|(slot, edit)| (Use { node: id, slot }, edit)));
        Ok(())
    }

    /// Positions of an axis that stay in a part; `None` where that is the whole axis.
    fn kept_in(&self, reader: NodeId, carrier: CarrierId, axis: usize, part: &Part) -> Result<Option<Vec<usize>>, RefitError> {
        let Some(size) = self.axes.carriers()[carrier].shape[axis].size() else {
            // What is left of an axis that is known at run time only has no positions.
            let loses = part.heads.is_some_and(|(class, _)| self.axes.classes_on((carrier, axis)).contains(&class));
            return Ok(loses.then(Vec::new));
        };
        let mut patterns: BTreeMap<Vec<usize>, Vec<usize>> = BTreeMap::new();
        for case in &part.cases {
            let Some((kept, positions)) = self.cut.stays_in_case((carrier, axis), *case, part.heads) else { return Ok(None) };
            match patterns.get(&positions) {
                Some(other) if other.len() != kept.len() => {
                    return Err(self.error(reader, "it reads parts of unlike width together"));
                }
                Some(_) => {}
                None => {
                    patterns.insert(positions, kept);
                }
            }
        }
        let kept: BTreeSet<usize> = patterns.into_values().flatten().collect();
        Ok((kept.len() < size).then(|| kept.into_iter().collect()))
    }

    /// A slice of a value that is still a block: the positions of a part, counted after the cut.
    fn narrow(&mut self, reader: NodeId, slot: usize, value: ValueId, part: &Part) -> Result<ValueId, RefitError> {
        let carrier = self.carrier(reader, slot).unwrap_or(value.index());
        let mut current = self.whole.get(&value.index()).copied().unwrap_or(value);
        for axis in 0..self.axes.carriers()[carrier].shape.len() {
            let Some(wanted) = self.kept_in(reader, carrier, axis, part)? else { continue };
            let after = match self.cut.stays((carrier, axis)) {
                Stays::Positions(p) => p,
                Stays::Whole => (0..self.axes.carriers()[carrier].shape[axis].size().unwrap_or(0)).collect(),
                Stays::Ragged | Stays::Scaled => return Err(self.error(reader, "parts of unlike width on one axis")),
            };
            let wanted: BTreeSet<usize> = wanted.into_iter().collect();
            let positions: Vec<usize> = (0..after.len()).filter(|i| wanted.contains(&after[*i])).collect();
            if positions.len() < after.len() {
                current = self.take(current, axis, &positions);
            }
        }
        Ok(current)
    }

    /// Positions of an axis at run time: Slices where they are one run or a few, else a Gather.
    fn take(&mut self, v: ValueId, axis: usize, positions: &[usize]) -> ValueId {
        const RUNS_MAX: usize = 8;
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for p in positions {
            match runs.last_mut() {
                Some((_, end)) if end == p => *end += 1,
                _ => runs.push((*p, p + 1)),
            }
        }
        if runs.is_empty() || runs.len() > RUNS_MAX {
            return gather(self.graph, v, axis, positions, "part");
        }
        let name = self.graph.value(v).name().to_string();
        let mut b = Builder::new(self.graph, &format!("{name}_part."));
        let run = |(start, end): &(usize, usize)| b.slice(v, &[*start as i64], &[*end as i64], &[axis as i64]);
        let parts: Vec<ValueId> = runs.iter().map(run).collect();
        if parts.len() == 1 { parts[0] } else { b.concat(&parts, axis as i64) }
    }
}
