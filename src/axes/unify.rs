//! Unites equal factors over the whole graph, once per combination of cells.
//!
//! A value whose factors fall into cells is looked at once per combination of cells (a *case*): the value `[B, N, 3, H, E]` of a
//! fused projection has three, in which `H` and `E` are those of q, of k and of v. Inside a case factors may be products again
//! (the cell of q in a fused axis of `H*E + 2*KV*E` is `H x E`), so they are refined once more, and then united.

use super::apart::Apart;
use super::cases::{Case, Part, Together, Unified};
use super::collect::{AxisOf, Barrier, CarrierId, Collected, Ends, Of, Relation};
use super::partition::Partition;
use super::refine::{FactorPair, Refiner};
use crate::graph::NodeId;
use crate::infer::Dim;
use std::collections::{BTreeMap, BTreeSet};

/// The cases of one carrier.
#[derive(Clone, Debug)]
struct Cases {
    first_slot: usize,
    factors: Vec<usize>,
    /// Number of cells of each factor.
    radix: Vec<usize>,
    count: usize,
}

impl Cases {
    /// Cell of each factor in case number `case`.
    fn cells(&self, case: usize) -> Vec<usize> {
        let mut rest = case;
        let mut cells = vec![0; self.radix.len()];
        for (cell, radix) in cells.iter_mut().zip(&self.radix).rev() {
            *cell = rest % radix;
            rest /= radix;
        }
        cells
    }

    fn slot(&self, case: usize, local: usize) -> usize {
        self.first_slot + case * self.factors.len() + local
    }
}

struct Union(Vec<usize>);

impl Union {
    fn find(&mut self, mut x: usize) -> usize {
        while self.0[x] != x {
            self.0[x] = self.0[self.0[x]];
            x = self.0[x];
        }
        x
    }
    fn unite(&mut self, a: usize, b: usize) {
        let (a, b) = (self.find(a), self.find(b));
        self.0[a.max(b)] = a.min(b);
    }
}

/// Relations between two slots of one node, whose carriers may be the same.
#[derive(Default)]
struct Between<'a> {
    equal: Vec<(usize, usize)>,
    selects: Vec<&'a Relation>,
}

pub(super) fn unify(
    all: &Collected,
    p: &Partition,
    product_pairs: &[(Ends, FactorPair)],
    axis_number: &dyn Fn(AxisOf) -> usize,
) -> Unified {
    let mut barriers: Vec<(AxisOf, Barrier)> = all.barriers.clone();
    let cases = enumerate_cases(all, p, axis_number);
    let factor_home = factor_homes(all, p, axis_number);
    let slot_sizes = slot_sizes(p, &cases, all, axis_number);
    let mut refiner = Refiner::new(slot_sizes.into_iter());
    let mut relation_homes: Vec<(AxisOf, AxisOf, Option<NodeId>)> = Vec::new();

    // A block is one tensor: what holds of an axis holds whatever part of its other axes is looked at.
    let blocks = Apart::new(all, p, &factor_home, product_pairs).blocks();
    for (c, carrier) in all.carriers.iter().enumerate().filter(|(c, _)| blocks[*c]) {
        let k = &cases[c];
        for case in 1..k.count {
            let cells = k.cells(case);
            for (local, factor) in k.factors.iter().enumerate() {
                let axis = factor_home[factor].1;
                let base: Vec<usize> =
                    k.factors.iter().zip(&cells).map(|(f, cell)| if factor_home[f].1 == axis { *cell } else { 0 }).collect();
                let base = base.iter().zip(&k.radix).fold(0, |n, (cell, radix)| n * radix + cell);
                if base != case {
                    refiner.relate(vec![k.slot(base, local)], vec![k.slot(case, local)]);
                    relation_homes.push(((c, axis), (c, axis), None));
                }
            }
        }
        debug_assert!(carrier.shape.len() < 64);
    }

    let mut between: BTreeMap<(Ends, CarrierId, CarrierId), Between<'_>> = BTreeMap::new();
    for (ends, ((axis_a, ka), (axis_b, kb))) in product_pairs {
        let (fa, fb) = (p.factors(*axis_a).start + ka, p.factors(*axis_b).start + kb);
        let (a, b) = (factor_home[&fa].0, factor_home[&fb].0);
        let pair = if a <= b { (fa, fb) } else { (fb, fa) };
        between.entry((*ends, a.min(b), a.max(b))).or_default().equal.push(pair);
    }
    for (ends, relation) in &all.relations {
        if let Relation::Select { from, to, .. } = relation {
            between.entry((*ends, from.0.min(to.0), from.0.max(to.0))).or_default().selects.push(relation);
        }
    }
    let mut together = Together::new();
    for ((ends, a, b), links) in &between {
        let pairs = relate_cases(
            ends.node,
            (*a, *b),
            links,
            p,
            &cases,
            axis_number,
            &factor_home,
            &mut refiner,
            &mut relation_homes,
            &mut barriers,
        );
        if cases[*a].count > 1 || cases[*b].count > 1 {
            together.entry((ends.node, *a, *b)).or_default().extend(pairs);
        }
    }
    refiner.run();
    for number in &refiner.broken {
        let (a, b, node) = &relation_homes[*number];
        for axis in [a, b] {
            let reason = "its parts are grouped differently on both sides".to_string();
            barriers.push((*axis, Barrier { node: *node, axis: axis.1, reason }));
        }
    }
    classes_of(all, p, &cases, &factor_home, &refiner, barriers, together)
}

fn enumerate_cases(all: &Collected, p: &Partition, axis_number: &dyn Fn(AxisOf) -> usize) -> Vec<Cases> {
    let mut first_slot = 0;
    let mut out = Vec::with_capacity(all.carriers.len());
    for (c, carrier) in all.carriers.iter().enumerate() {
        let factors: Vec<usize> = (0..carrier.shape.len()).flat_map(|axis| p.factors(axis_number((c, axis)))).collect();
        let radix: Vec<usize> = factors.iter().map(|f| p.cell_count(*f)).collect();
        let count = radix.iter().product();
        let cases = Cases { first_slot, factors, radix, count };
        first_slot += cases.factors.len() * count;
        out.push(cases);
    }
    out
}

/// Carrier and axis of each factor.
fn factor_homes(all: &Collected, p: &Partition, axis_number: &dyn Fn(AxisOf) -> usize) -> BTreeMap<usize, AxisOf> {
    let mut homes = BTreeMap::new();
    for (c, carrier) in all.carriers.iter().enumerate() {
        for axis in 0..carrier.shape.len() {
            homes.extend(p.factors(axis_number((c, axis))).map(|f| (f, (c, axis))));
        }
    }
    homes
}

fn slot_sizes(p: &Partition, cases: &[Cases], all: &Collected, axis_number: &dyn Fn(AxisOf) -> usize) -> Vec<Dim> {
    let mut symbolic: BTreeMap<usize, Dim> = BTreeMap::new();
    for (c, carrier) in all.carriers.iter().enumerate() {
        for (axis, size) in carrier.shape.iter().enumerate() {
            let range = p.factors(axis_number((c, axis)));
            // Symbolic factors only ever meet equal ones; any symbol that is equal where they are equal will do.
            for f in range.filter(|f| p.sizes[*f].is_none()) {
                symbolic.insert(f, Dim::named(&format!("symbolic {}", if size.known().is_some() { "?" } else { "size" })));
            }
        }
    }
    let mut out = Vec::new();
    for k in cases {
        for case in 0..k.count {
            let cells = k.cells(case);
            for (f, cell) in k.factors.iter().zip(&cells) {
                out.push(match symbolic.get(f) {
                    Some(d) => d.clone(),
                    None if p.cell_count(*f) == 1 => Dim::from(p.sizes[*f].unwrap_or(0)),
                    None => Dim::from(p.cells(*f)[*cell].len()),
                });
            }
        }
    }
    out
}

#[allow(clippy::too_many_arguments, reason = "one step of unify with all of its state")]
fn relate_cases(
    node: NodeId,
    (a, b): (CarrierId, CarrierId),
    links: &Between<'_>,
    p: &Partition,
    cases: &[Cases],
    axis_number: &dyn Fn(AxisOf) -> usize,
    factor_home: &BTreeMap<usize, AxisOf>,
    refiner: &mut Refiner,
    relation_homes: &mut Vec<(AxisOf, AxisOf, Option<NodeId>)>,
    barriers: &mut Vec<(AxisOf, Barrier)>,
) -> Vec<(usize, usize)> {
    let mut together = Vec::new();
    let (ka, kb) = (&cases[a], &cases[b]);
    let local = |k: &Cases, f: usize| k.factors.iter().position(|x| *x == f).expect("factors belong to their carrier");
    for case_a in 0..ka.count {
        let cells_a = ka.cells(case_a);
        for case_b in 0..kb.count {
            let cells_b = kb.cells(case_b);
            let agree = |(fa, fb): &(usize, usize)| {
                let (la, lb) = (local(ka, *fa), local(kb, *fb));
                cells_a[la] == cells_b[lb]
            };
            if !links.equal.iter().all(agree) {
                continue;
            }
            let mut sequences: Vec<(Vec<usize>, Vec<usize>, AxisOf, AxisOf)> = Vec::new();
            let mut compatible = true;
            for select in &links.selects {
                let Relation::Select { from, to, index, at } = select else { continue };
                let of = |axis: AxisOf| if axis.0 == a { (ka, &cells_a, case_a) } else { (kb, &cells_b, case_b) };
                let ((k_from, cells_from, case_from), (k_to, cells_to, case_to)) = (of(*from), of(*to));
                let box_from = axis_box(p, k_from, cells_from, axis_number(*from));
                let box_to = axis_box(p, k_to, cells_to, axis_number(*to));
                match (box_from, box_to) {
                    (Some(x), Some(y)) => match match_boxes(&x, &y, index, *at) {
                        Match::Apart => compatible = false,
                        Match::Equal => {
                            let slots = |k: &Cases, case: usize, axis: AxisOf| -> Vec<usize> {
                                p.factors(axis_number(axis)).map(|f| k.slot(case, local(k, f))).collect()
                            };
                            sequences.push((slots(k_from, case_from, *from), slots(k_to, case_to, *to), *from, *to));
                        }
                        Match::Crossed => bar_both(barriers, *from, *to, node),
                    },
                    _ => bar_both(barriers, *from, *to, node),
                }
            }
            if !compatible {
                continue;
            }
            together.push((case_a, case_b));
            for (fa, fb) in &links.equal {
                let (sa, sb) = (ka.slot(case_a, local(ka, *fa)), kb.slot(case_b, local(kb, *fb)));
                sequences.push((vec![sa], vec![sb], factor_home[fa], factor_home[fb]));
            }
            for (x, y, home_x, home_y) in sequences {
                refiner.relate(x, y);
                relation_homes.push((home_x, home_y, Some(node)));
            }
        }
    }
    together
}

fn bar_both(barriers: &mut Vec<(AxisOf, Barrier)>, a: AxisOf, b: AxisOf, node: NodeId) {
    for axis in [a, b] {
        let reason = "a slice of it is not made of whole parts".to_string();
        barriers.push((axis, Barrier { node: Some(node), axis: axis.1, reason }));
    }
}

/// Positions of an axis in one case, row-major over its factors; `None` where a size is symbolic or a factor was given up.
fn axis_box(p: &Partition, k: &Cases, cells: &[usize], axis_number: usize) -> Option<Vec<usize>> {
    let mut positions = vec![0usize];
    for f in p.factors(axis_number) {
        let size = p.sizes[f]?;
        let local = k.factors.iter().position(|x| *x == f)?;
        if p.dead[f] {
            return None;
        }
        let cell = &p.cells(f)[cells[local]];
        positions = positions.iter().flat_map(|base| cell.iter().map(move |c| base * size + c)).collect();
    }
    Some(positions)
}

enum Match {
    /// The selection maps one onto the other, in order.
    Equal,
    /// They have nothing to do with each other.
    Apart,
    /// They overlap in part.
    Crossed,
}

fn match_boxes(from: &[usize], to: &[usize], index: &[usize], at: usize) -> Match {
    let source = |t: &usize| t.checked_sub(at).and_then(|j| index.get(j)).copied();
    let sources: Vec<Option<usize>> = to.iter().map(source).collect();
    if sources.len() == from.len() && sources.iter().zip(from).all(|(s, f)| *s == Some(*f)) {
        return Match::Equal;
    }
    let inside: BTreeSet<usize> = from.iter().copied().collect();
    if sources.iter().flatten().any(|s| inside.contains(s)) { Match::Crossed } else { Match::Apart }
}

/// Gives the factors of every case their classes, merges what is never told apart, and collects what is known of each class.
fn classes_of(
    all: &Collected,
    p: &Partition,
    cases: &[Cases],
    factor_home: &BTreeMap<usize, AxisOf>,
    refiner: &Refiner,
    barriers: Vec<(AxisOf, Barrier)>,
    together: Together,
) -> Unified {
    let mut first = vec![0];
    for f in &refiner.factors {
        first.push(first.last().copied().unwrap_or(0) + f.len());
    }
    let mut union = Union((0..*first.last().unwrap_or(&0)).collect());
    for number in (0..refiner.relation_count()).filter(|n| refiner.broken.binary_search(n).is_err()) {
        for ((sa, ka), (sb, kb)) in refiner.pairs(number) {
            union.unite(first[sa] + ka, first[sb] + kb);
        }
    }
    let mut classes: Vec<Vec<Case>> = Vec::with_capacity(cases.len());
    for (k, carrier) in cases.iter().zip(&all.carriers) {
        let parts_in = |case: usize| {
            let whole = Part { positions: vec![0], outer: Vec::new(), classes: Vec::new(), inner: 0, symbolic: false };
            let mut parts = vec![whole; carrier.shape.len()];
            let cells = k.cells(case);
            for (local, f) in k.factors.iter().enumerate() {
                let part = &mut parts[factor_home[f].1];
                let slot = k.slot(case, local);
                let sizes = refiner.factors[slot].iter().enumerate();
                part.classes.extend(sizes.map(|(n, size)| (union.find(first[slot] + n), size.size())));
                let Some(size) = p.sizes[*f] else {
                    part.outer.push(std::mem::replace(&mut part.positions, vec![0]));
                    (part.inner, part.symbolic) = (part.classes.len(), true);
                    continue;
                };
                let cell = if k.radix[local] > 1 { p.cells(*f)[cells[local]].clone() } else { (0..size).collect() };
                let bases = part.positions.iter();
                part.positions = bases.flat_map(|base| cell.iter().map(move |c| base * size + c)).collect();
            }
            parts
        };
        classes.push((0..k.count).map(parts_in).collect());
    }
    let virtuals = all.carriers.iter().enumerate().filter(|(_, c)| matches!(c.of, Of::Virtual(..)));
    Unified::new(classes, together, virtuals.map(|(c, _)| c).collect(), barriers, &all.sinks)
}
