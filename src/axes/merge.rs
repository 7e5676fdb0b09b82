//! Cells that nothing tells apart after all are one again.
//!
//! The factor `E` of a fused projection `3 x H x E` falls into halves because the rotation of q and k slices it; the cells of a
//! factor are the same in all cases, so that v, which nothing rotates, falls into halves, too. Their two classes stand beside each
//! other wherever one of them occurs: they become one class of `E`, and v has one case. The halves of q and k are not merged: they
//! are one class already (pairs).

use super::cases::{Case, ClassId, Part, Together};
use super::collect::CarrierId;
use std::collections::{BTreeMap, BTreeSet};

/// One occurrence of a class: carrier, case, axis, number among the classes of the axis.
type Place = (CarrierId, usize, usize, usize);

/// For each coordinate of a merged class: whether it is of the second, and which one.
type Order = Vec<(bool, usize)>;

/// A case, and the one beside it that becomes a part of it.
struct Join {
    carrier: CarrierId,
    into: usize,
    gone: usize,
    merged: Case,
}

/// Merges until nothing more can be.
pub(super) fn merge(carriers: &mut [Vec<Case>], together: &mut Together) {
    let classes = carriers.iter().flatten().flatten().flat_map(|part| &part.classes).map(|(c, _)| *c);
    let mut next: ClassId = classes.max().map_or(0, |c| c + 1);
    loop {
        let places = places_of(carriers);
        let mut touched: BTreeSet<ClassId> = BTreeSet::new();
        let mut busy: BTreeSet<(CarrierId, usize)> = BTreeSet::new();
        let mut joins: Vec<Join> = Vec::new();
        for (a, b) in candidates(carriers) {
            if touched.contains(&a) || touched.contains(&b) {
                continue;
            }
            let Some(found) = joins_of(carriers, &places, (a, b), next) else { continue };
            if found.iter().any(|j| busy.contains(&(j.carrier, j.into)) || busy.contains(&(j.carrier, j.gone))) {
                continue;
            }
            busy.extend(found.iter().flat_map(|j| [(j.carrier, j.into), (j.carrier, j.gone)]));
            touched.extend([a, b]);
            joins.extend(found);
            next += 1;
        }
        if joins.is_empty() {
            return;
        }
        apply(carriers, together, joins);
    }
}

fn places_of(carriers: &[Vec<Case>]) -> BTreeMap<ClassId, Vec<Place>> {
    let mut places: BTreeMap<ClassId, Vec<Place>> = BTreeMap::new();
    for (carrier, cases) in carriers.iter().enumerate() {
        for (case, parts) in cases.iter().enumerate() {
            for (axis, part) in parts.iter().enumerate() {
                for (n, (class, _)) in part.classes.iter().enumerate() {
                    places.entry(*class).or_default().push((carrier, case, axis, n));
                }
            }
        }
    }
    places
}

/// Classes that stand beside each other somewhere.
fn candidates(carriers: &[Vec<Case>]) -> BTreeSet<(ClassId, ClassId)> {
    let mut found = BTreeSet::new();
    for cases in carriers {
        for (i, a) in cases.iter().enumerate() {
            for b in &cases[i + 1..] {
                if let Some((axis, n)) = difference(a, b) {
                    let (x, y) = (a[axis].classes[n].0, b[axis].classes[n].0);
                    found.insert((x.min(y), x.max(y)));
                }
            }
        }
    }
    found
}

/// The axis and the number of the class on it, where two cases of a carrier differ in just that.
fn difference(a: &Case, b: &Case) -> Option<(usize, usize)> {
    let mut axes = (0..a.len()).filter(|axis| a[*axis] != b[*axis]);
    let (axis, None) = (axes.next()?, axes.next()) else { return None };
    let (x, y) = (&a[axis].classes, &b[axis].classes);
    if x.len() != y.len() || a[axis].outer != b[axis].outer || a[axis].inner != b[axis].inner {
        return None;
    }
    let mut numbers = (0..x.len()).filter(|n| x[*n] != y[*n]);
    let (n, None) = (numbers.next()?, numbers.next()) else { return None };
    (n >= a[axis].inner && x[n].0 != y[n].0).then_some((axis, n))
}

/// How all cases with `a` join those with `b`; `None` where one of the two stands alone, or they lie differently somewhere.
fn joins_of(
    carriers: &[Vec<Case>],
    places: &BTreeMap<ClassId, Vec<Place>>,
    (a, b): (ClassId, ClassId),
    merged: ClassId,
) -> Option<Vec<Join>> {
    let (of_a, of_b) = (&places[&a], &places[&b]);
    if of_a.len() != of_b.len() {
        return None;
    }
    let mut order: Option<Order> = None;
    let mut out: Vec<Join> = Vec::with_capacity(of_a.len());
    let mut beside: BTreeSet<Place> = BTreeSet::new();
    for (carrier, case, axis, n) in of_a {
        let cases = &carriers[*carrier];
        let is_beside =
            |p: &&Place| (p.0, p.2, p.3) == (*carrier, *axis, *n) && difference(&cases[*case], &cases[p.1]) == Some((*axis, *n));
        // Places are in the order of carriers.
        let first = of_b.partition_point(|p| p.0 < *carrier);
        let other = *of_b[first..].iter().take_while(|p| p.0 == *carrier).find(is_beside)?;
        if !beside.insert(other) || out.iter().rev().any(|j| j.carrier == *carrier && j.into == *case) {
            return None;
        }
        let (part, lies) = joined(&cases[*case][*axis], &cases[other.1][*axis], *n, merged)?;
        if order.get_or_insert_with(|| lies.clone()) != &lies {
            return None;
        }
        let mut merged = cases[*case].clone();
        merged[*axis] = part;
        out.push(Join { carrier: *carrier, into: *case, gone: other.1, merged });
    }
    Some(out)
}

/// Both parts as one, and how the coordinates of their classes lie in each other.
fn joined(a: &Part, b: &Part, n: usize, merged: ClassId) -> Option<(Part, Order)> {
    let sizes: Vec<usize> = a.classes[a.inner..].iter().map(|(_, s)| *s).collect::<Option<_>>()?;
    let (size_a, size_b) = (a.classes[n].1?, b.classes[n].1?);
    let at = n - a.inner;
    let (outer, inner): (usize, usize) = (sizes[..at].iter().product(), sizes[at + 1..].iter().product());
    let position = |(second, coordinate): (bool, usize), o: usize, i: usize| {
        let (positions, size) = if second { (&b.positions, size_b) } else { (&a.positions, size_a) };
        positions.get((o * size + coordinate) * inner + i).copied()
    };
    let lies = |o: usize, i: usize| -> Option<Order> {
        let both = (0..size_a).map(|c| (false, c)).chain((0..size_b).map(|c| (true, c)));
        let mut at: Vec<(usize, (bool, usize))> = both.map(|c| position(c, o, i).map(|p| (p, c))).collect::<Option<_>>()?;
        at.sort_unstable();
        Some(at.into_iter().map(|(_, c)| c).collect())
    };
    let order = lies(0, 0)?;
    let mut positions = Vec::with_capacity(a.positions.len() + b.positions.len());
    for o in 0..outer {
        if (0..inner).any(|i| lies(o, i).as_ref() != Some(&order)) {
            return None;
        }
        for coordinate in &order {
            positions.extend((0..inner).filter_map(|i| position(*coordinate, o, i)));
        }
    }
    let mut part = Part { positions, ..a.clone() };
    part.classes[n] = (merged, Some(size_a + size_b));
    Some((part, order))
}

fn apply(carriers: &mut [Vec<Case>], together: &mut Together, joins: Vec<Join>) {
    let mut gone: BTreeMap<CarrierId, BTreeMap<usize, usize>> = BTreeMap::new();
    for join in joins {
        carriers[join.carrier][join.into] = join.merged;
        gone.entry(join.carrier).or_default().insert(join.gone, join.into);
    }
    let mut renumbered: BTreeMap<CarrierId, Vec<usize>> = BTreeMap::new();
    for (carrier, gone) in &gone {
        let cases = &mut carriers[*carrier];
        let mut left = 0;
        let mut numbers = vec![0; cases.len()];
        for (case, number) in numbers.iter_mut().enumerate().filter(|(case, _)| !gone.contains_key(case)) {
            *number = left;
            cases.swap(left, case);
            left += 1;
        }
        cases.truncate(left);
        for (case, into) in gone {
            numbers[*case] = numbers[*into];
        }
        renumbered.insert(*carrier, numbers);
    }
    for ((_, a, b), pairs) in together.iter_mut() {
        let (of_a, of_b) = (renumbered.get(a), renumbered.get(b));
        if of_a.is_none() && of_b.is_none() {
            continue;
        }
        for (x, y) in pairs.iter_mut() {
            *x = of_a.map_or(*x, |n| n[*x]);
            *y = of_b.map_or(*y, |n| n[*y]);
        }
        pairs.sort_unstable();
        pairs.dedup();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{Id, NodeId};

    /// Positions and classes of an axis.
    type Axis<'a> = (&'a [usize], &'a [(ClassId, usize)]);

    fn case(axes: &[Axis<'_>]) -> Case {
        let part = |(positions, classes): &Axis<'_>| Part {
            positions: positions.to_vec(),
            classes: classes.iter().map(|(c, n)| (*c, Some(*n))).collect(),
            outer: Vec::new(),
            inner: 0,
            symbolic: false,
        };
        axes.iter().map(part).collect()
    }

    const LOW: &[usize] = &[0, 1];
    const HIGH: &[usize] = &[2, 3];
    const WHOLE: &[usize] = &[0, 1, 2, 3];

    #[test]
    fn halves_that_are_always_together_are_one() {
        // q | v of width 4: the halves of q are one class, those of v are two.
        let fused = vec![
            case(&[(&[0], &[]), (LOW, &[(7, 2)])]),
            case(&[(&[0], &[]), (HIGH, &[(7, 2)])]),
            case(&[(&[1], &[]), (LOW, &[(8, 2)])]),
            case(&[(&[1], &[]), (HIGH, &[(9, 2)])]),
        ];
        let value = vec![case(&[(LOW, &[(8, 2)])]), case(&[(HIGH, &[(9, 2)])])];
        let mut all = [fused, value];
        let mut together = Together::from([((NodeId::new(0), 0, 1), vec![(2, 0), (3, 1)])]);
        merge(&mut all, &mut together);
        assert_eq!(all[0].len(), 3);
        assert_eq!(all[0][2], case(&[(&[1], &[]), (WHOLE, &[(10, 4)])]));
        assert_eq!(all[1], [case(&[(WHOLE, &[(10, 4)])])]);
        assert_eq!(together.into_values().collect::<Vec<_>>(), [[(2, 0)]]);
    }

    #[test]
    fn what_stands_alone_somewhere_stays_apart() {
        let both = vec![case(&[(LOW, &[(0, 2)])]), case(&[(HIGH, &[(1, 2)])])];
        let mut all = [both.clone(), vec![case(&[(LOW, &[(0, 2)])])]];
        merge(&mut all, &mut Together::new());
        assert_eq!(all[0], both);
    }

    #[test]
    fn what_lies_differently_stays_apart() {
        let halves = vec![case(&[(LOW, &[(0, 2)])]), case(&[(HIGH, &[(1, 2)])])];
        let neighbours = vec![case(&[(&[0, 2], &[(0, 2)])]), case(&[(&[1, 3], &[(1, 2)])])];
        let mut all = [halves.clone(), neighbours.clone()];
        merge(&mut all, &mut Together::new());
        assert_eq!(all, [halves, neighbours.clone()]);
        let mut all = [neighbours];
        merge(&mut all, &mut Together::new());
        assert_eq!(all[0], [case(&[(WHOLE, &[(2, 4)])])]);
    }

    #[test]
    fn factors_around_the_halves_stay() {
        // Flat `heads x width` of 2 x 4, in halves of the width.
        let flat = vec![case(&[(&[0, 1, 4, 5], &[(5, 2), (0, 2)])]), case(&[(&[2, 3, 6, 7], &[(5, 2), (1, 2)])])];
        let mut all = [flat];
        merge(&mut all, &mut Together::new());
        assert_eq!(all[0], [case(&[(&[0, 1, 2, 3, 4, 5, 6, 7], &[(5, 2), (6, 4)])])]);
    }
}
