//! Which axes must be cut together: Graph + Facts -> Axes.
//!
//! Every operator states how the axes of its inputs and outputs relate ([`relation`]). An axis is a product of factors
//! (`144 = 3 x 3 x 16`), found by `refine`; a factor that is selected from by constant index is a sum of cells (q | k | v),
//! found by `partition`; then equal factors are united (`unify`). Worked example, one fused attention layer: the weight
//! `[48, 144]` ends as axis 0 = D and axis 1 = three cells of `H x E`, whose E of q and of k are one class (the product of both
//! sums over it), and whose E of v is another, which also is the inner factor of the rows of the output projection.
//! Invariant: refining is finished before anything is united. What no rule speaks of is a barrier.

mod apart;
mod blocks;
mod cases;
mod collect;
mod merge;
mod partition;
mod refine;
pub mod relation;
mod unify;
mod vanish;

pub use cases::{Class, ClassId, Member, Region};
pub use collect::{AxisOf, Barrier, Carrier, CarrierId, Of, SinkSite, depends_on_data};

use crate::axes::relation::{FusedAttention, Slot};
use crate::graph::{Graph, NodeId};
use crate::infer::Facts;
use cases::Unified;
use collect::{Collected, Relation};
use refine::Refiner;

/// The result: carriers, the classes of factors their axes are made of, and what stands in the way of cutting them.
pub struct Axes {
    collected: Collected,
    unified: Unified,
}

/// Finds all classes of a graph.
pub fn classes(graph: &Graph, facts: &Facts) -> Axes {
    let mut collected = collect::collect(graph, facts);
    let mut first_axis = vec![0];
    for carrier in &collected.carriers {
        first_axis.push(first_axis.last().copied().unwrap_or(0) + carrier.shape.len());
    }
    let axis_number = |(carrier, axis): AxisOf| first_axis[carrier] + axis;
    let mut refiner = Refiner::new(collected.carriers.iter().flat_map(|c| c.shape.iter().cloned()));
    let mut homes = Vec::new();
    for (ends, relation) in &collected.relations {
        if let Relation::Product(a, b) = relation {
            refiner.relate(a.iter().map(|x| axis_number(*x)).collect(), b.iter().map(|x| axis_number(*x)).collect());
            homes.push((*ends, a.clone(), b.clone()));
        }
    }
    refiner.run();
    for number in &refiner.broken {
        let (ends, a, b) = &homes[*number];
        for axis in a.iter().chain(b) {
            let reason = "is regrouped across its parts".to_string();
            collected.barriers.push((*axis, Barrier { node: Some(ends.node), axis: axis.1, reason }));
        }
    }
    let whole = (0..refiner.relation_count()).filter(|n| refiner.broken.binary_search(n).is_err());
    let pairs: Vec<_> = whole.flat_map(|n| refiner.pairs(n).into_iter().map(move |pair| (n, pair))).collect();
    let plain: Vec<_> = pairs.iter().map(|(_, pair)| *pair).collect();
    let selects: Vec<&Relation> =
        collected.relations.iter().map(|(_, r)| r).filter(|r| matches!(r, Relation::Select { .. })).collect();
    let carriers: Vec<_> = first_axis.windows(2).map(|w| w[0]..w[1]).collect();
    let barred: Vec<usize> = collected.barriers.iter().map(|(at, _)| axis_number(*at)).collect();
    let parts = partition::Parts { refiner: &refiner, pairs: &plain, selects: &selects, carriers: &carriers, barred: &barred };
    let partition = partition::partition(&parts, &axis_number);
    let with_ends: Vec<_> = pairs.into_iter().map(|(n, pair)| (homes[n].0, pair)).collect();
    let mut unified = unify::unify(&collected, &partition, &with_ends, &axis_number);
    unified.bar_repeated(&collected);
    blocks::apply(&collected, &mut unified);
    vanish::apply(graph, &collected, &mut unified);
    Axes { collected, unified }
}

impl Axes {
    /// All classes.
    pub fn classes(&self) -> &[Class] {
        &self.unified.classes
    }

    /// All carriers.
    pub fn carriers(&self) -> &[Carrier] {
        &self.collected.carriers
    }

    /// The carrier behind a slot of a node.
    pub fn carrier_at(&self, graph: &Graph, node: NodeId, slot: Slot) -> Option<CarrierId> {
        self.collected.carrier(graph, node, slot)
    }

    /// The carrier that a node reads or has inside itself at a slot.
    pub fn carrier_read(&self, node: NodeId, slot: Slot) -> Option<CarrierId> {
        match slot {
            Slot::In(i) => self.collected.inputs[node].get(i).copied().flatten(),
            Slot::Virtual(v) => Some(self.collected.virtuals[node] + v),
            Slot::Out(_) => None,
        }
    }

    /// The parts of a node that computes the whole of attention.
    pub fn fused_attention(&self, node: NodeId) -> Option<FusedAttention> {
        self.collected.attention.get(&node).copied()
    }

    /// Classes that occur on an axis.
    pub fn classes_on(&self, at: AxisOf) -> Vec<ClassId> {
        self.unified.classes_on(at)
    }

    /// Classes of all axes of a carrier in one case, with the axis of each.
    pub fn classes_in_case(&self, carrier: CarrierId, case: usize) -> Vec<(usize, ClassId)> {
        self.unified.classes_in_case(carrier, case)
    }

    /// Number of cases of a carrier: combinations of cells of its factors.
    pub fn case_count(&self, carrier: CarrierId) -> usize {
        self.unified.case_count(carrier)
    }

    /// Cases of `a` that belong together with the cases `of_b` of `b` at a node that relates both.
    pub fn cases_with(
        &self,
        node: NodeId,
        a: CarrierId,
        b: CarrierId,
        of_b: &std::collections::BTreeSet<usize>,
    ) -> std::collections::BTreeSet<usize> {
        self.unified.cases_with(node, a, b, of_b)
    }

    /// The axis in one case.
    pub fn region(&self, at: AxisOf, case: usize) -> Option<Region> {
        self.unified.region(at, case)
    }

    /// The axis in one case, behind its last symbolic factor.
    pub fn inner_region(&self, at: AxisOf, case: usize) -> Option<Region> {
        self.unified.inner_region(at, case)
    }

    /// The whole axis, as disjoint regions, along each combination of cells of the other axes.
    pub fn sections(&self, at: AxisOf) -> Vec<Vec<Region>> {
        self.unified.sections(at)
    }

    /// The axis in all cases, cases that look alike on it taken once.
    pub fn regions(&self, at: AxisOf) -> Vec<Region> {
        self.unified.regions(at)
    }
}
