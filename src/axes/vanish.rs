//! Axes whose removed positions must hold zero in the twin.
//!
//! The twin zeroes the constants of a removed unit. A sink that contracts a weight makes the rest exact, whatever a nonlinearity makes of
//! that zero on the way. Where two activations are contracted one of them must be zero, and what is summed without a partner must be:
//! a sum of `Sigmoid(0) = 0.5` is not what is left without them. Nothing may be divided by that zero. Where an operator reads the
//! range of the whole value (dynamic quantization), or has rows for the unit that nothing zeroes (packed blocks), the unit itself
//! must be zero there: `GELU(0) = 0` passes, `Sigmoid(0) = 0.5` does not.
//! This is followed back from the value to the constants, operator by operator ([`crate::ops::zeros`]); what is not listed is not zero.

use super::cases::{ClassId, Unified};
use super::collect::{Barrier, CarrierId, Collected, Of, SinkSite};
use super::relation::Slot;
use crate::graph::{Graph, Id, NodeId, Tensor, Use, ValueId};
use crate::ops::zeros;
use std::collections::BTreeMap;

/// Puts a barrier on every class that must vanish somewhere and is not known to.
pub(super) fn apply(graph: &Graph, all: &Collected, unified: &mut Unified) {
    let mut found = Vec::new();
    let mut walk = Walk { graph, all, unified, known: BTreeMap::new() };
    for (at, barrier) in &all.vanishing {
        for class in walk.unified.classes_on(*at) {
            if walk.is_open(class) && !walk.is_zero(at.0, class) {
                found.push((class, barrier.clone()));
            }
        }
    }
    for (at, site) in &all.sinks {
        for class in walk.unified.classes_on(*at) {
            if walk.is_open(class) && !walk.is_zero_at_sink(site, class) {
                let reason = "a removed unit is not zero where it is summed".to_string();
                found.push((class, Barrier { node: Some(site.node), axis: at.1, reason }));
            }
        }
    }
    for (id, node) in graph.nodes() {
        for slot in zeros::poles(graph, node) {
            found.extend(walk.poles_at(id, *slot));
        }
    }
    for (class, barrier) in found {
        unified.classes[class].barriers.push(barrier);
    }
}

struct Walk<'a> {
    graph: &'a Graph,
    all: &'a Collected,
    unified: &'a Unified,
    known: BTreeMap<(CarrierId, ClassId), bool>,
}

impl Walk<'_> {
    /// Whether a class would be cut but for what is found here.
    fn is_open(&self, class: ClassId) -> bool {
        self.unified.classes[class].barriers.is_empty() && self.unified.classes[class].size.is_some()
    }

    /// Whether what is removed adds nothing to a sum. An operator that sums inside itself is asked for its inputs.
    fn is_zero_at_sink(&mut self, site: &SinkSite, class: ClassId) -> bool {
        let carrier = |slot: Slot| match slot {
            Slot::In(_) => self.all.carrier(self.graph, site.node, slot),
            Slot::Out(_) | Slot::Virtual(_) => None,
        };
        let operands: Vec<Option<CarrierId>> = std::iter::once(site.a).chain(site.b).map(|(slot, _)| carrier(slot)).collect();
        let operands: Vec<CarrierId> = if operands.contains(&None) {
            self.all.inputs[site.node].iter().flatten().copied().collect()
        } else {
            operands.into_iter().flatten().collect()
        };
        operands.into_iter().any(|c| self.is_zero(c, class))
    }

    /// Classes that would make a node divide by zero at this input, with the barrier. Copies of constants count as zeroed.
    fn poles_at(&mut self, id: NodeId, slot: usize) -> Vec<(ClassId, Barrier)> {
        let Some(carrier) = self.all.carrier(self.graph, id, Slot::In(slot)) else { return Vec::new() };
        let is_copy = matches!(self.all.carriers[carrier].of, Of::Private(v, _) if self.graph.is_constant(v));
        let mut found = Vec::new();
        for axis in 0..self.all.carriers[carrier].shape.len() {
            for class in self.unified.classes_on((carrier, axis)) {
                if self.is_open(class) && (is_copy || self.is_zero(carrier, class)) {
                    let reason = "a removed unit would divide by zero".to_string();
                    found.push((class, Barrier { node: Some(id), axis, reason }));
                }
            }
        }
        found
    }

    /// Whether a carrier is zero at the removed units of a class.
    fn is_zero(&mut self, carrier: CarrierId, class: ClassId) -> bool {
        if let Some(known) = self.known.get(&(carrier, class)) {
            return *known;
        }
        // Graphs have no cycles; the entry only keeps a value from being walked twice.
        let found = self.holds(carrier, class)
            && match self.all.carriers[carrier].of {
                Of::Virtual(..) => false,
                // What is cut for one reader alone is not zeroed in the twin.
                Of::Private(v, _) => {
                    self.graph.constant(v).is_some_and(|t| is_all_zero(&t)) || self.is_cut_for_all(carrier, v, class)
                }
                Of::Value(v) if self.graph.is_constant(v) => true,
                Of::Value(v) => match self.graph.value(v).producer() {
                    Some((id, _)) => self.keeps_zero(id, class),
                    None => false,
                },
            };
        self.known.insert((carrier, class), found);
        found
    }

    /// Whether all readers of a constant lose the same of it: layers that share their weights share their biases too.
    fn is_cut_for_all(&self, carrier: CarrierId, v: ValueId, class: ClassId) -> bool {
        let sees = |carrier: CarrierId| -> Vec<_> {
            (0..self.all.carriers[carrier].shape.len()).map(|axis| self.unified.regions((carrier, axis))).collect()
        };
        let reader = |at: &Use| self.all.carrier(self.graph, at.node, Slot::In(at.slot));
        let mine = sees(carrier);
        self.graph.is_constant(v)
            && self.unified.case_count(carrier) == 1
            && self
                .graph
                .value(v)
                .users()
                .iter()
                .all(|at| reader(at).is_some_and(|c| self.unified.case_count(c) == 1 && self.holds(c, class) && sees(c) == mine))
    }

    fn holds(&self, carrier: CarrierId, class: ClassId) -> bool {
        let axes = 0..self.all.carriers[carrier].shape.len();
        axes.into_iter().any(|axis| self.unified.classes_on((carrier, axis)).contains(&class))
    }

    /// Whether a node's output is zero at the removed units, because of its inputs.
    fn keeps_zero(&mut self, id: NodeId, class: ClassId) -> bool {
        let node = self.graph.node(id);
        let Some(zeros) = zeros::of(node.domain(), node.op(), node.inputs().len()) else { return false };
        // A class that the node sums over and carries on as well is not looked into.
        if self.unified.classes[class].sinks.iter().any(|s| s.node == id) {
            return false;
        }
        let inputs = node.inputs().to_vec();
        let mut zero_at = |slot: &usize| {
            let v = inputs.get(*slot).copied().flatten()?;
            Some(self.is_zero_input(id, *slot, v, class))
        };
        let factors: Vec<bool> = zeros.factors.iter().filter_map(&mut zero_at).collect();
        let terms: Vec<bool> = zeros.terms.iter().filter_map(&mut zero_at).collect();
        let parts: Vec<bool> = zeros.parts.iter().filter_map(&mut zero_at).collect();
        let has = |slot: &usize| self.all.carrier(self.graph, id, Slot::In(*slot)).is_some_and(|c| self.holds(c, class));
        let parts = zeros.parts.iter().zip(parts).filter(|(slot, _)| has(slot)).all(|(_, zero)| zero);
        (zeros.factors.is_empty() || factors.contains(&true)) && terms.iter().all(|zero| *zero) && parts
    }

    fn is_zero_input(&mut self, id: NodeId, slot: usize, v: ValueId, class: ClassId) -> bool {
        let carrier = self.all.carrier(self.graph, id, Slot::In(slot)).unwrap_or(v.index());
        self.is_zero(carrier, class) || self.graph.constant(v).is_some_and(|t| is_all_zero(&t))
    }
}

/// Whether a constant is zero everywhere. One without its elements is not known to be.
fn is_all_zero(t: &Tensor) -> bool {
    !t.bytes.is_empty() && t.bytes.iter().all(|b| *b == 0) && (t.dtype.is_float() || t.dtype.bits() >= 32)
}
