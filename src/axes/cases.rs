//! What the axes of every carrier are made of, case by case: the classes, and where each of them occurs.

use super::collect::{AxisOf, Barrier, CarrierId, Collected, Relation, SinkSite};
use super::merge;
use crate::graph::NodeId;
use std::collections::{BTreeMap, BTreeSet};

/// Index of a class of united factors.
pub type ClassId = usize;

/// One occurrence of a class: a factor of an axis, in one case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Member {
    /// The carrier.
    pub carrier: CarrierId,
    /// Its axis.
    pub axis: usize,
    /// The case.
    pub case: usize,
}

/// Factors that are the same everywhere: what is cut of one is cut of all.
#[derive(Clone, Debug, Default)]
pub struct Class {
    /// Number of positions; `None` where symbolic.
    pub size: Option<usize>,
    /// Where it occurs.
    pub members: Vec<Member>,
    /// Where it is summed over.
    pub sinks: Vec<SinkSite>,
    /// Why it cannot be cut.
    pub barriers: Vec<Barrier>,
    /// Positions that stay or go together: `n * run` to `n * run + run - 1`. 1 where each is free.
    pub run: usize,
}

/// The factors of one axis in one case: the positions of the axis, row-major over the factors, and the class of each factor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// Positions on the axis, in order.
    pub positions: Vec<usize>,
    /// Class and size of each factor, outermost first; sizes multiply to `positions.len()`.
    pub factors: Vec<(ClassId, usize)>,
}

impl Region {
    /// Coordinate of each factor at the position number `offset`.
    pub fn coordinates(&self, offset: usize) -> BTreeMap<ClassId, usize> {
        let mut rest = offset;
        let mut at = BTreeMap::new();
        for (class, size) in self.factors.iter().rev() {
            at.insert(*class, rest % size);
            rest /= size;
        }
        at
    }

    /// Coordinate of one factor at the position number `offset`; of several of one class, the outermost.
    pub fn coordinate(&self, offset: usize, class: ClassId) -> Option<usize> {
        let (mut rest, mut found) = (offset, None);
        for (c, size) in self.factors.iter().rev() {
            if *c == class {
                found = Some(rest % size);
            }
            rest /= size;
        }
        found
    }
}

/// One axis of a carrier in one case. Only what lies behind the last symbolic factor has positions: the heads of `batch * heads`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Positions behind the symbolic factors.
    pub(super) positions: Vec<usize>,
    /// Positions between symbolic factors, and before the first: they tell cases apart.
    pub(super) outer: Vec<Vec<usize>>,
    /// Class and size of each factor, outermost first; the positions are row-major over those from `inner` on.
    pub(super) classes: Vec<(ClassId, Option<usize>)>,
    /// Number of classes up to the last symbolic factor.
    pub(super) inner: usize,
    /// Whether there is one.
    pub(super) symbolic: bool,
}

impl Part {
    /// Whether the first position of `anchor` is one of this part.
    fn overlaps(&self, anchor: &Part) -> bool {
        let among = |(own, of_anchor): (&Vec<usize>, &Vec<usize>)| of_anchor.first().is_none_or(|p| own.contains(p));
        among((&self.positions, &anchor.positions)) && self.outer.iter().zip(&anchor.outer).all(among)
    }
}

/// A combination of cells of all axes of a carrier.
pub(super) type Case = Vec<Part>;

/// Cases of two carriers that belong together at a node, where one of them has several.
pub(super) type Together = BTreeMap<(NodeId, CarrierId, CarrierId), Vec<(usize, usize)>>;

/// All classes, and how axes are made of them.
pub(super) struct Unified {
    /// The classes.
    pub(super) classes: Vec<Class>,
    /// Cases of each carrier.
    cases: Vec<Vec<Case>>,
    together: Together,
    virtual_carriers: BTreeSet<CarrierId>,
}

impl Unified {
    /// Merges cells that nothing tells apart, numbers the classes by first occurrence, and says of each what its axes say.
    pub(super) fn new(
        mut cases: Vec<Vec<Case>>,
        mut together: Together,
        virtual_carriers: BTreeSet<CarrierId>,
        barriers: Vec<(AxisOf, Barrier)>,
        sinks: &[(AxisOf, SinkSite)],
    ) -> Self {
        merge::merge(&mut cases, &mut together);
        let mut numbers: BTreeMap<usize, ClassId> = BTreeMap::new();
        let mut classes: Vec<Class> = Vec::new();
        for (carrier, cases) in cases.iter_mut().enumerate() {
            for (case, parts) in cases.iter_mut().enumerate() {
                for (axis, part) in parts.iter_mut().enumerate() {
                    for (class, size) in &mut part.classes {
                        *class = *numbers.entry(*class).or_insert_with(|| {
                            classes.push(Class { size: *size, run: 1, ..Class::default() });
                            classes.len() - 1
                        });
                        classes[*class].members.push(Member { carrier, axis, case });
                    }
                }
            }
        }
        let mut unified = Self { classes, cases, together, virtual_carriers };
        for (axis, barrier) in barriers {
            for class in unified.classes_on(axis) {
                if !unified.classes[class].barriers.contains(&barrier) {
                    unified.classes[class].barriers.push(barrier.clone());
                }
            }
        }
        for (axis, site) in sinks {
            for class in unified.classes_on(*axis) {
                if !unified.classes[class].sinks.contains(site) {
                    unified.classes[class].sinks.push(*site);
                }
            }
        }
        unified
    }

    /// Puts a barrier on classes that stand twice on one axis (`E x E`, the product of a value with itself laid flat): no position there
    /// belongs to one unit.
    pub(super) fn bar_repeated(&mut self, all: &Collected) {
        let meets = |carrier: CarrierId, relation: &Relation| match relation {
            Relation::Product(a, b) => a.iter().chain(b).any(|at| at.0 == carrier),
            Relation::Select { from, to, .. } => from.0 == carrier || to.0 == carrier,
        };
        for carrier in 0..self.cases.len() {
            let mut twice: BTreeSet<(ClassId, usize)> = BTreeSet::new();
            for (axis, part) in self.cases[carrier].iter().flat_map(|parts| parts.iter().enumerate()) {
                let mut on: Vec<ClassId> = part.classes.iter().map(|(c, _)| *c).collect();
                on.sort_unstable();
                twice.extend(on.windows(2).filter(|w| w[0] == w[1]).map(|w| (w[0], axis)));
            }
            for (class, axis) in twice {
                let node = all.relations.iter().find(|(_, r)| meets(carrier, r)).map(|(ends, _)| ends.node);
                let barrier = Barrier { node, axis, reason: "stands twice on this axis".to_string() };
                if !self.classes[class].barriers.contains(&barrier) {
                    self.classes[class].barriers.push(barrier);
                }
            }
        }
    }

    /// Classes that occur on an axis, in any case.
    pub(super) fn classes_on(&self, (carrier, axis): AxisOf) -> Vec<ClassId> {
        let found: BTreeSet<ClassId> = self.cases[carrier].iter().flat_map(|c| &c[axis].classes).map(|(c, _)| *c).collect();
        found.into_iter().collect()
    }

    /// Cases of `a` that belong together with the cases `of_b` of `b` at a node, directly or by way of values inside the node.
    pub(super) fn cases_with(&self, node: NodeId, a: CarrierId, b: CarrierId, of_b: &BTreeSet<usize>) -> BTreeSet<usize> {
        let direct = |x: CarrierId, y: CarrierId, of_y: &BTreeSet<usize>| -> Option<BTreeSet<usize>> {
            if let Some(pairs) = self.together.get(&(node, x, y)) {
                return Some(pairs.iter().filter(|(_, c)| of_y.contains(c)).map(|(c, _)| *c).collect());
            }
            let pairs = self.together.get(&(node, y, x))?;
            Some(pairs.iter().filter(|(c, _)| of_y.contains(c)).map(|(_, c)| *c).collect())
        };
        if let Some(found) = direct(a, b, of_b) {
            return found;
        }
        let inside =
            self.together.range((node, 0, 0)..=(node, CarrierId::MAX, CarrierId::MAX)).flat_map(|((_, x, y), _)| [*x, *y]);
        for v in inside.filter(|v| self.virtual_carriers.contains(v)) {
            // Pairs of single cases are not recorded.
            let of_v = direct(v, b, of_b).or_else(|| (self.case_count(v) == 1).then(|| BTreeSet::from([0])));
            if let Some(found) = of_v.and_then(|of_v| direct(a, v, &of_v)) {
                return found;
            }
        }
        (0..self.case_count(a)).collect()
    }

    /// Number of cases of a carrier.
    pub(super) fn case_count(&self, carrier: CarrierId) -> usize {
        self.cases[carrier].len()
    }

    /// Classes of all axes of a carrier in one case, with the axis of each.
    pub(super) fn classes_in_case(&self, carrier: CarrierId, case: usize) -> Vec<(usize, ClassId)> {
        let parts = self.cases[carrier][case].iter().enumerate();
        parts.flat_map(|(axis, part)| part.classes.iter().map(move |(c, _)| (axis, *c))).collect()
    }

    /// The axis in one case: which positions it covers there, and what they are made of. `None` where a size is symbolic.
    pub(super) fn region(&self, at: AxisOf, case: usize) -> Option<Region> {
        if self.cases[at.0][case][at.1].symbolic { None } else { self.inner_region(at, case) }
    }

    /// The same for what lies behind the last symbolic factor of the axis: the heads of `batch * heads`.
    pub(super) fn inner_region(&self, (carrier, axis): AxisOf, case: usize) -> Option<Region> {
        let part = &self.cases[carrier][case][axis];
        let factors = part.classes[part.inner..].iter().map(|(class, size)| Some((*class, (*size)?)));
        Some(Region { positions: part.positions.clone(), factors: factors.collect::<Option<_>>()? })
    }

    /// The axis in all cases, cases that look alike on it taken once.
    pub(super) fn regions(&self, at: AxisOf) -> Vec<Region> {
        let mut out: Vec<Region> = Vec::new();
        for region in (0..self.case_count(at.0)).filter_map(|case| self.region(at, case)) {
            if !out.contains(&region) {
                out.push(region);
            }
        }
        out
    }

    /// The whole axis as it looks along each combination of cells of the other axes: regions that share no position and leave
    /// none out. Nothing where the size is symbolic.
    pub(super) fn sections(&self, (carrier, axis): AxisOf) -> Vec<Vec<Region>> {
        let cases = &self.cases[carrier];
        let mut seen: BTreeSet<Vec<usize>> = BTreeSet::new();
        let mut out = Vec::new();
        for anchor in cases {
            let beside = |case: &Case| {
                let mut others = case.iter().zip(anchor).enumerate().filter(|(other, _)| *other != axis);
                others.all(|(_, (part, of_anchor))| part.overlaps(of_anchor))
            };
            let section: Vec<usize> = (0..cases.len()).filter(|c| beside(&cases[*c])).collect();
            let regions: Option<Vec<Region>> = section.iter().map(|case| self.region((carrier, axis), *case)).collect();
            if seen.insert(section) {
                out.extend(regions);
            }
        }
        out
    }
}
