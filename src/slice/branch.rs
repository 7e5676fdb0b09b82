//! Values that stop being a block.
//!
//! A fused projection `[B, N, 3*H*E]` is reshaped to `[B, N, 3, H, E]` and q, k, v are picked from the axis of 3. Where q and v keep
//! different numbers of dims no such value exists any more: the projection's output is split into its parts, and the chain of
//! Reshape and Transpose up to each pick is copied for its part, with 1 in the place of 3.

use super::cutset::{CutSet, Stays};
use super::refit::{Edit, RefitCx, RefitError};
use super::shapes::gather;
use crate::axes::CarrierId;
use crate::axes::relation::Slot;
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
    /// Patches that copied nodes asked for.
    pub(super) patches: Vec<(Use, Vec<(usize, i64)>)>,
    /// Edits of constants that they asked for.
    pub(super) edits: Vec<(Use, Edit)>,
    made: BTreeMap<(CarrierId, Vec<usize>), ValueId>,
}

type Cases = BTreeSet<usize>;

impl<'a> Brancher<'a> {
    pub(super) fn new(
        graph: &'a mut Graph,
        original: &'a Graph,
        facts: &'a Facts,
        axes: &'a crate::axes::Axes,
        cut: &'a CutSet<'a>,
        ragged: &'a BTreeSet<CarrierId>,
    ) -> Self {
        Self { graph, original, facts, axes, cut, ragged, patches: Vec::new(), edits: Vec::new(), made: BTreeMap::new() }
    }

    /// Replaces every value that is picked from a ragged one.
    pub(super) fn run(&mut self) -> Result<(), RefitError> {
        for (id, node) in self.original.nodes() {
            let Some(slot) = (0..node.inputs().len()).find(|s| self.is_ragged(id, Slot::In(*s))) else { continue };
            let input = self.axes.carrier_at(self.graph, id, Slot::In(slot)).expect("found above");
            if matches!(ops::lookup(node.domain(), node.op()).map(|r| &r.axes), Some(ops::Axes::ShapeOnly)) {
                let part = self.part(id, slot, input, &Cases::from([0]))?;
                self.graph.set_input(Use { node: id, slot }, Some(part));
                continue;
            }
            for (n, out) in node.outputs().iter().enumerate() {
                let Some(out) = out.filter(|_| !self.is_ragged(id, Slot::Out(n))) else { continue };
                let all: Cases = (0..self.axes.case_count(out.index())).collect();
                let cases = self.axes.cases_with(id, input, out.index(), &all);
                let picked = self.part(id, slot, input, &cases)?;
                let drops_axis = self.facts.shape(out).map(<[_]>::len)
                    < self.facts.shape(node.inputs()[slot].expect("ragged")).map(<[_]>::len);
                let picked = match (node.op(), drops_axis) {
                    ("Gather", true) => {
                        let axis = node.attr_int("axis").unwrap_or(0);
                        Builder::new(self.graph, "cut.").squeeze(picked, &[axis])
                    }
                    ("Gather" | "Split" | "Slice" | "Identity", false) => picked,
                    _ => return Err(self.error(id, "it reads parts of unlike width together")),
                };
                if self.graph.outputs().contains(&out) {
                    return Err(self.error(id, "parts of unlike width reach a graph output"));
                }
                self.graph.replace_uses(out, picked);
            }
        }
        Ok(())
    }

    fn is_ragged(&self, id: NodeId, slot: Slot) -> bool {
        self.axes.carrier_at(self.graph, id, slot).is_some_and(|c| self.ragged.contains(&c))
    }

    fn error(&self, id: NodeId, what: &str) -> RefitError {
        RefitError { node: self.graph.label(id), op: self.graph.node(id).op().to_string(), what: what.to_string() }
    }

    /// The value at an input, narrowed to some of its cases.
    fn part(&mut self, reader: NodeId, slot: usize, carrier: CarrierId, cases: &Cases) -> Result<ValueId, RefitError> {
        let key = (carrier, cases.iter().copied().collect::<Vec<_>>());
        if let Some(v) = self.made.get(&key) {
            return Ok(*v);
        }
        let value = ValueId::new(carrier);
        let made = if self.ragged.contains(&carrier) {
            let Some((producer, _)) = self.original.value(value).producer() else {
                return Err(self.error(reader, "a constant of unlike parts"));
            };
            self.copy(producer, carrier, cases)?
        } else {
            self.narrow(reader, slot, value, cases)?
        };
        self.made.insert(key, made);
        Ok(made)
    }

    /// A copy of the producer of a ragged value for some of its cases.
    fn copy(&mut self, id: NodeId, out: CarrierId, cases: &Cases) -> Result<ValueId, RefitError> {
        let node = self.original.node(id).clone();
        if node.outputs().iter().flatten().count() != 1 {
            return Err(self.error(id, "it makes several values of unlike parts"));
        }
        let mut inputs = node.inputs().to_vec();
        let mut narrowed: BTreeMap<ValueId, (CarrierId, Cases)> = BTreeMap::new();
        for (slot, input) in inputs.iter_mut().enumerate() {
            let Some(carrier) = self.axes.carrier_at(self.graph, id, Slot::In(slot)) else { continue };
            let of_input = self.axes.cases_with(id, carrier, out, cases);
            let all = of_input.len() == self.axes.case_count(carrier);
            if all && !self.ragged.contains(&carrier) {
                continue;
            }
            if self.axes.carriers()[carrier].constant {
                return Err(self.error(id, "a constant is combined with parts of unlike width"));
            }
            narrowed.insert(node.inputs()[slot].expect("has a carrier"), (carrier, of_input.clone()));
            *input = Some(self.part(id, slot, carrier, &of_input)?);
        }
        let name = self.graph.value(ValueId::new(out)).name().to_string();
        let made = self.graph.add_value(&format!("{name}_part"));
        let copy = self.graph.add_node(NewNode {
            name: self.graph.value(made).name().to_string(),
            op: node.op().to_string(),
            domain: node.domain().to_string(),
            inputs,
            outputs: vec![Some(made)],
            attrs: node.attrs().to_vec(),
            ..NewNode::default()
        });
        let mut kept: BTreeMap<(ValueId, usize), Vec<usize>> = BTreeMap::new();
        narrowed.insert(ValueId::new(out), (out, cases.clone()));
        for (value, (carrier, cases)) in &narrowed {
            for axis in 0..self.axes.carriers()[*carrier].shape.len() {
                if let Some(k) = self.kept_in_cases(*carrier, axis, cases) {
                    kept.insert((*value, axis), k);
                }
            }
        }
        self.refit(id, copy, &kept)?;
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

    /// Positions of an axis that stay in some cases; `None` where that is the whole axis.
    fn kept_in_cases(&self, carrier: CarrierId, axis: usize, cases: &Cases) -> Option<Vec<usize>> {
        let size = self.axes.carriers()[carrier].shape[axis].size()?;
        let mut kept = BTreeSet::new();
        for case in cases {
            kept.extend(self.cut.stays_in_case((carrier, axis), *case)?.0);
        }
        (kept.len() < size).then(|| kept.into_iter().collect())
    }

    /// A slice of a value that is still a block: the positions of some cases, counted after the cut.
    fn narrow(&mut self, reader: NodeId, slot: usize, value: ValueId, cases: &Cases) -> Result<ValueId, RefitError> {
        let carrier = self.axes.carrier_at(self.graph, reader, Slot::In(slot)).unwrap_or(value.index());
        let mut current = value;
        for axis in 0..self.axes.carriers()[carrier].shape.len() {
            let Some(wanted) = self.kept_in_cases(carrier, axis, cases) else { continue };
            let after = match self.cut.stays((carrier, axis)) {
                Stays::Positions(p) => p,
                Stays::Whole => (0..self.axes.carriers()[carrier].shape[axis].size().unwrap_or(0)).collect(),
                Stays::Ragged | Stays::Scaled => return Err(self.error(reader, "parts of unlike width on one axis")),
            };
            if after == wanted {
                continue;
            }
            let positions: Vec<usize> = wanted.iter().filter_map(|w| after.binary_search(w).ok()).collect();
            current = self.take(current, axis, &positions);
        }
        Ok(current)
    }

    /// Positions of an axis at run time: a Slice where they are a run, else a Gather.
    fn take(&mut self, v: ValueId, axis: usize, positions: &[usize]) -> ValueId {
        let run = positions.windows(2).all(|w| w[1] == w[0] + 1);
        let Some(first) = positions.first().filter(|_| run) else { return gather(self.graph, v, axis, positions, "part") };
        let name = self.graph.value(v).name().to_string();
        let mut b = Builder::new(self.graph, &format!("{name}_part."));
        b.slice(v, &[*first as i64], &[(*first + positions.len()) as i64], &[axis as i64])
    }
}
