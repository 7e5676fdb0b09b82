//! The way of a factor from an operand to constants: into the weight that it meets in the sink, or back to where the operand is made.

use super::factor::Factor;
use crate::graph::{AttrValue, Graph, Node, NodeId, Use, ValueId};
use crate::infer::{Dim, Facts, normalize_axis};
use std::cell::Cell;

/// Constants and what multiplies each.
type Found = Vec<(ValueId, Factor)>;

/// Longest way back.
const DEEPEST: usize = 64;

/// What a way must commute with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Map {
    /// Numbers that multiply positions.
    Scale,
    /// A matrix over the positions: nothing on the way may treat them differently.
    Basis,
}

/// A walk over a graph that stays as it is.
pub(super) struct Walk<'a> {
    graph: &'a Graph,
    facts: &'a Facts,
    map: Map,
    /// Nodes at whose outputs the way ends, instead of at constants.
    ends: &'a [NodeId],
    depth: Cell<usize>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(graph: &'a Graph, facts: &'a Facts) -> Self {
        Self { graph, facts, map: Map::Scale, ends: &[], depth: Cell::new(0) }
    }

    /// A walk that commutes with a change of basis and may end at nodes.
    pub(super) fn of_basis(graph: &'a Graph, facts: &'a Facts, ends: &'a [NodeId]) -> Self {
        Self { graph, facts, map: Map::Basis, ends, depth: Cell::new(0) }
    }

    fn shape(&self, v: ValueId) -> Result<&'a [Dim], String> {
        self.facts.shape(v).ok_or_else(|| format!("the shape of '{}' is unknown", self.graph.value(v).name()))
    }

    fn refuse(&self, at: Use) -> String {
        let node = self.graph.node(at.node);
        format!("{} at {}", node.op(), self.graph.label(at.node))
    }

    /// Into the other operand of the sink, which contracts what the factor multiplies: `(x g) W = x (g W)`.
    pub(super) fn to_sink(&self, at: Use, factor: &Factor) -> Result<Found, String> {
        let node = self.graph.node(at.node);
        let rank = factor.dims.len();
        let other = node.input(1 - at.slot.min(1)).ok_or_else(|| self.refuse(at))?;
        let other_rank = self.shape(other)?.len();
        let (from, to) = match (node.op(), at.slot) {
            ("MatMul", 0) if rank >= 1 && other_rank >= 2 => (rank - 1, other_rank - 2),
            ("MatMul", 1) if rank >= 2 && other_rank >= 1 => (rank - 2, other_rank - 1),
            ("Gemm", 0) if !is_set(node, "transA") => (1, usize::from(is_set(node, "transB"))),
            ("Conv", 0) if int(node, "group").is_none_or(|g| g == 1) => (1, 1),
            _ => return Err(self.refuse(at)),
        };
        let moved = factor.moved(from, other_rank, to).ok_or_else(|| self.refuse(at))?;
        self.back(other, &moved, Use { node: at.node, slot: 1 - at.slot })
    }

    /// Back to the constants that make `v`, which the input `from` reads.
    pub(super) fn back(&self, v: ValueId, factor: &Factor, from: Use) -> Result<Found, String> {
        if factor.is_one() {
            return Ok(Vec::new());
        }
        self.depth.set(self.depth.get() + 1);
        if self.depth.get() > DEEPEST {
            return Err("the way back is too long".to_string());
        }
        if self.map == Map::Basis && self.is_zero(v) {
            return Ok(Vec::new());
        }
        self.only_reader(v, factor, from)?;
        if self.graph.is_constant(v) {
            return Ok(vec![(v, factor.clone())]);
        }
        let Some((id, output)) = self.graph.value(v).producer() else { return Err("it comes from a graph input".to_string()) };
        if self.ends.contains(&id) {
            return Ok(Vec::new());
        }
        let node = self.graph.node(id);
        let at = |slot: usize| Use { node: id, slot };
        let refused = || self.refuse(at(0));
        let input = |slot: usize| node.input(slot).ok_or_else(refused);
        let x = input(0)?;
        match node.op() {
            "Identity" | "Cast" | "Neg" | "Dropout" => self.back(x, factor, at(0)),
            "Transpose" => {
                let rank = factor.dims.len();
                let perm = match node.attr("perm") {
                    Some(AttrValue::Ints(p)) => p.iter().map(|p| usize::try_from(*p).ok()).collect::<Option<Vec<_>>>(),
                    _ => Some((0..rank).rev().collect()),
                };
                let perm = perm.filter(|p| p.len() == rank).ok_or_else(refused)?;
                self.back(x, &factor.before_transpose(&perm), at(0))
            }
            "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" => {
                let before = factor.before_reshape(self.shape(x)?, self.shape(v)?).ok_or_else(refused)?;
                self.back(x, &before, at(0))
            }
            "Split" | "Slice" | "Gather" => {
                let (axis, picks, is_gone) = self.picks(at(0), output).ok_or_else(refused)?;
                let size = self.shape(x)?.get(axis).and_then(Dim::size).ok_or_else(refused)?;
                let before = factor.before_pick(axis, size, &picks, is_gone).ok_or_else(refused)?;
                self.back(x, &before, at(0))
            }
            "Add" | "Sub" => {
                let y = input(1)?;
                let mut found = self.back(x, &self.operand(x, factor).ok_or_else(refused)?, at(0))?;
                found.extend(self.back(y, &self.operand(y, factor).ok_or_else(refused)?, at(1))?);
                Ok(found)
            }
            "Mul" | "Div" => {
                let slots = if node.op() == "Mul" { 0..2 } else { 0..1 };
                let mut reason = refused();
                for slot in slots {
                    let operand = input(slot)?;
                    if self.map == Map::Basis && !self.is_uniform(input(1 - slot)?, factor) {
                        continue;
                    }
                    match self.operand(operand, factor).map(|f| self.back(operand, &f, at(slot))) {
                        Some(Ok(found)) => return Ok(found),
                        Some(Err(r)) => reason = r,
                        None => {}
                    }
                }
                Err(reason)
            }
            "Expand" => {
                let before = factor.before_expand(self.shape(x)?).ok_or_else(refused)?;
                self.back(x, &before, at(0))
            }
            "MatMul" => {
                let w = input(1)?;
                let rank = self.shape(w)?.len();
                let moved = factor.moved(factor.dims.len() - 1, rank, rank.max(1) - 1).filter(|_| rank >= 2);
                self.back(w, &moved.ok_or_else(refused)?, at(1))
            }
            "Gemm" => {
                let moved = factor.moved(1, 2, usize::from(!is_set(node, "transB"))).ok_or_else(refused)?;
                let mut found = self.back(input(1)?, &moved, at(1))?;
                if let Some(bias) = node.input(2) {
                    found.extend(self.back(bias, &self.operand(bias, factor).ok_or_else(refused)?, at(2))?);
                }
                Ok(found)
            }
            "Conv" if self.map == Map::Scale || int(node, "group").is_none_or(|g| g == 1) => {
                let w = input(1)?;
                let moved = factor.moved(1, self.shape(w)?.len(), 0).ok_or_else(refused)?;
                let mut found = self.back(w, &moved, at(1))?;
                if let Some(bias) = node.input(2) {
                    found.extend(self.back(bias, &factor.moved(1, 1, 0).ok_or_else(refused)?, at(2))?);
                }
                Ok(found)
            }
            "LayerNormalization" if self.map == Map::Scale => {
                let last = factor.dims.len() - 1;
                let moved = factor.moved(last, 1, 0).ok_or_else(refused)?;
                let mut found = self.back(input(1)?, &moved, at(1))?;
                if let Some(bias) = node.input(2) {
                    found.extend(self.back(bias, &moved, at(2))?);
                }
                Ok(found)
            }
            _ => Err(refused()),
        }
    }

    /// The factor of one operand of an elementwise operator; zeros need none.
    fn operand(&self, v: ValueId, factor: &Factor) -> Option<Factor> {
        let shape = self.facts.shape(v)?;
        factor.trailing(shape).or_else(|| self.is_zero(v).then(|| Factor::new(vec![1; shape.len()], vec![1.0])))
    }

    fn is_zero(&self, v: ValueId) -> bool {
        self.graph.constant(v).and_then(|t| t.to_f32s()).is_some_and(|x| x.iter().all(|x| *x == 0.0))
    }

    /// Whether an operand is the same at all positions along which the factor changes.
    fn is_uniform(&self, v: ValueId, factor: &Factor) -> bool {
        let Some(shape) = self.facts.shape(v) else { return false };
        let mut axes = factor.axes();
        axes.all(|axis| (axis + shape.len()).checked_sub(factor.dims.len()).is_none_or(|a| shape[a].is(1)))
    }

    /// Everything else that reads `v` must read only what the factor leaves as it is.
    fn only_reader(&self, v: ValueId, factor: &Factor, from: Use) -> Result<(), String> {
        let name = || self.graph.value(v).name();
        if self.graph.outputs().contains(&v) {
            return Err(format!("'{}' is a graph output", name()));
        }
        for at in self.graph.value(v).users().iter().filter(|u| **u != from) {
            // The shape of a value does not depend on its elements.
            if matches!(self.graph.node(at.node).op(), "Shape" | "Size") {
                continue;
            }
            let spared = |output: usize| self.picks(*at, output).is_some_and(|(axis, picks, _)| factor.is_one_at(axis, &picks));
            let is_reader = at.slot < self.graph.node(at.node).inputs().len();
            let outputs = self.graph.node(at.node).outputs().len();
            if !(is_reader && at.slot == 0 && (0..outputs).all(spared)) {
                return Err(format!("'{}' is also read by {}", name(), self.graph.label(at.node)));
            }
        }
        Ok(())
    }

    /// Which positions of an axis of its input an operator picks, and whether the axis is gone then.
    fn picks(&self, at: Use, output: usize) -> Option<(usize, Vec<usize>, bool)> {
        let node = self.graph.node(at.node);
        let shape = self.facts.shape(node.input(0)?)?;
        let axis_of = |axis: i64| normalize_axis(axis, shape.len());
        let numbers = |slot: usize| self.facts.get(node.input(slot)?).known.as_ref()?.numbers();
        match node.op() {
            "Split" => {
                let axis = axis_of(int(node, "axis").unwrap_or(0))?;
                let width = |o: usize| self.facts.shape(node.output(o)?)?.get(axis)?.size();
                let start: usize = (0..output).map(width).sum::<Option<usize>>()?;
                Some((axis, (start..start + width(output)?).collect(), false))
            }
            "Gather" => {
                let axis = axis_of(int(node, "axis").unwrap_or(0))?;
                let size = i64::try_from(shape[axis].size()?).ok()?;
                let rank = self.facts.shape(node.input(1)?)?.len();
                let wrap = |i: i64| usize::try_from(if i < 0 { i + size } else { i }).ok();
                let picks = numbers(1)?.into_iter().map(wrap).collect::<Option<Vec<_>>>()?;
                (rank <= 1).then_some((axis, picks, rank == 0))
            }
            "Slice" => {
                let [axis] = numbers(3)?[..] else { return None };
                let axis = axis_of(axis)?;
                let ([start], [end]) = (&numbers(1)?[..], &numbers(2)?[..]) else { return None };
                let size = i64::try_from(shape[axis].size()?).ok()?;
                let step = numbers(4).map_or(Some(1), |s| s.first().copied()).filter(|s| *s > 0)?;
                let clamp = |i: i64| if i < 0 { i.saturating_add(size).max(0) } else { i.min(size) };
                let picks = (clamp(*start)..clamp(*end)).step_by(usize::try_from(step).ok()?);
                Some((axis, picks.map(|i| usize::try_from(i).ok()).collect::<Option<Vec<_>>>()?, false))
            }
            _ => None,
        }
    }
}

fn int(node: &Node, name: &str) -> Option<i64> {
    match node.attr(name) {
        Some(AttrValue::Int(v)) => Some(*v),
        _ => None,
    }
}

fn is_set(node: &Node, name: &str) -> bool {
    int(node, name).is_some_and(|v| v != 0)
}
