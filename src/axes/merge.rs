//! Cells that nothing tells apart after all are one again.
//!
//! The factor `E` of a fused projection `3 x H x E` falls into halves because the rotation of q and k slices it; the cells of a
//! factor are the same in all cases, so that v, which nothing rotates, falls into halves, too. Their two classes stand beside each
//! other wherever one of them occurs: they become one class of `E`, and v has one case. The halves of q and k are not merged: they
//! are one class already (pairs).

use super::cases::{Carried, Case, ClassId, Together};
use super::collect::CarrierId;
use std::collections::{BTreeMap, BTreeSet};

/// One occurrence of a class: carrier, case, factor of the carrier, number among the classes of that factor's cell.
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
pub(super) fn merge(carried: &mut [Carried], together: &mut Together) {
    let mut next: ClassId = classes(carried).max().map_or(0, |c| c + 1);
    loop {
        let places = places_of(carried);
        let mut touched: BTreeSet<ClassId> = BTreeSet::new();
        let mut joins: Vec<Join> = Vec::new();
        let mut busy: BTreeSet<(CarrierId, usize)> = BTreeSet::new();
        for (a, b) in candidates(carried) {
            if touched.contains(&a) || touched.contains(&b) {
                continue;
            }
            let Some(found) = joins_of(carried, &places, (a, b), next) else { continue };
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
        apply(carried, together, joins);
    }
}

fn classes(carried: &[Carried]) -> impl Iterator<Item = ClassId> {
    carried.iter().flat_map(|k| &k.cases).flat_map(|p| &p.classes).flatten().map(|(c, _)| *c)
}

fn places_of(carried: &[Carried]) -> BTreeMap<ClassId, Vec<Place>> {
    let mut places: BTreeMap<ClassId, Vec<Place>> = BTreeMap::new();
    for (carrier, k) in carried.iter().enumerate() {
        for (case, part) in k.cases.iter().enumerate() {
            for (local, list) in part.classes.iter().enumerate() {
                for (n, (class, _)) in list.iter().enumerate() {
                    places.entry(*class).or_default().push((carrier, case, local, n));
                }
            }
        }
    }
    places
}

/// Classes that stand beside each other somewhere.
fn candidates(carried: &[Carried]) -> BTreeSet<(ClassId, ClassId)> {
    let mut found = BTreeSet::new();
    for k in carried {
        for (i, a) in k.cases.iter().enumerate() {
            for b in &k.cases[i + 1..] {
                if let Some((local, n)) = difference(a, b) {
                    let (x, y) = (a.classes[local][n].0, b.classes[local][n].0);
                    found.insert((x.min(y), x.max(y)));
                }
            }
        }
    }
    found
}

/// The factor and the number of the class in its cell, where two cases of a carrier differ in just that.
fn difference(a: &Case, b: &Case) -> Option<(usize, usize)> {
    let differs = |l: &usize| a.positions[*l] != b.positions[*l] || a.classes[*l] != b.classes[*l];
    let mut locals = (0..a.classes.len()).filter(differs);
    let (local, None) = (locals.next()?, locals.next()) else { return None };
    let (x, y) = (&a.classes[local], &b.classes[local]);
    let mut numbers = (0..x.len()).filter(|n| x.get(*n) != y.get(*n));
    let (n, None) = (numbers.next()?, numbers.next()) else { return None };
    (x.len() == y.len() && x[n].0 != y[n].0).then_some((local, n))
}

/// How all cases with `a` join those with `b`; `None` where one of the two stands alone, or they lie differently somewhere.
fn joins_of(
    carried: &[Carried],
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
    for (carrier, case, local, n) in of_a {
        let cases = &carried[*carrier].cases;
        let is_beside = |p: &&Place| {
            (p.0, p.2, p.3) == (*carrier, *local, *n) && difference(&cases[*case], &cases[p.1]) == Some((*local, *n))
        };
        let other = *of_b.iter().find(is_beside)?;
        if !beside.insert(other) || out.iter().any(|j| j.carrier == *carrier && j.into == *case) {
            return None;
        }
        let (part, lies) = joined(&cases[*case], &cases[other.1], *local, *n, merged)?;
        if order.get_or_insert_with(|| lies.clone()) != &lies {
            return None;
        }
        out.push(Join { carrier: *carrier, into: *case, gone: other.1, merged: part });
    }
    Some(out)
}

/// Both cases as one, and how the coordinates of their classes lie in each other.
fn joined(a: &Case, b: &Case, local: usize, n: usize, merged: ClassId) -> Option<(Case, Order)> {
    let sizes: Vec<usize> = a.classes[local].iter().map(|(_, s)| *s).collect::<Option<_>>()?;
    let (size_a, size_b) = (sizes[n], b.classes[local][n].1?);
    let (outer, inner): (usize, usize) = (sizes[..n].iter().product(), sizes[n + 1..].iter().product());
    let (cell_a, cell_b) = (a.positions[local].as_ref()?, b.positions[local].as_ref()?);
    let position = |(second, coordinate): (bool, usize), o: usize, i: usize| {
        let (cell, size) = if second { (cell_b, size_b) } else { (cell_a, size_a) };
        cell.get((o * size + coordinate) * inner + i).copied()
    };
    let lies = |o: usize, i: usize| -> Option<Order> {
        let both = (0..size_a).map(|c| (false, c)).chain((0..size_b).map(|c| (true, c)));
        let mut at: Vec<(usize, (bool, usize))> = both.map(|c| position(c, o, i).map(|p| (p, c))).collect::<Option<_>>()?;
        at.sort_unstable();
        Some(at.into_iter().map(|(_, c)| c).collect())
    };
    let order = lies(0, 0)?;
    let mut positions = Vec::with_capacity(cell_a.len() + cell_b.len());
    for o in 0..outer {
        if (0..inner).any(|i| lies(o, i).as_ref() != Some(&order)) {
            return None;
        }
        for coordinate in &order {
            positions.extend((0..inner).filter_map(|i| position(*coordinate, o, i)));
        }
    }
    let mut part = a.clone();
    part.positions[local] = Some(positions);
    part.classes[local][n] = (merged, Some(size_a + size_b));
    Some((part, order))
}

fn apply(carried: &mut [Carried], together: &mut Together, joins: Vec<Join>) {
    let mut gone: BTreeMap<CarrierId, BTreeMap<usize, usize>> = BTreeMap::new();
    for join in joins {
        carried[join.carrier].cases[join.into] = join.merged;
        gone.entry(join.carrier).or_default().insert(join.gone, join.into);
    }
    let mut renumbered: BTreeMap<CarrierId, Vec<usize>> = BTreeMap::new();
    for (carrier, gone) in &gone {
        let cases = &mut carried[*carrier].cases;
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

    fn case(cells: &[(&[usize], &[(ClassId, usize)])]) -> Case {
        Case {
            positions: cells.iter().map(|(p, _)| Some(p.to_vec())).collect(),
            classes: cells.iter().map(|(_, c)| c.iter().map(|(c, n)| (*c, Some(*n))).collect()).collect(),
        }
    }

    fn carrier(sizes: &[usize], cases: Vec<Case>) -> Carried {
        Carried { axes: (0..sizes.len()).collect(), sizes: sizes.iter().map(|s| Some(*s)).collect(), cases }
    }

    #[test]
    fn halves_that_are_always_together_are_one() {
        // q | v of heads of width 4: the halves of q are one class, those of v are two.
        let (low, high): (&[usize], &[usize]) = (&[0, 1], &[2, 3]);
        let fused = vec![
            case(&[(&[0], &[]), (low, &[(7, 2)])]),
            case(&[(&[0], &[]), (high, &[(7, 2)])]),
            case(&[(&[1], &[]), (low, &[(8, 2)])]),
            case(&[(&[1], &[]), (high, &[(9, 2)])]),
        ];
        let value = vec![case(&[(low, &[(8, 2)])]), case(&[(high, &[(9, 2)])])];
        let mut all = [carrier(&[2, 4], fused), carrier(&[4], value)];
        let mut together = Together::from([((crate::graph::Id::new(0), 0, 1), vec![(2, 0), (3, 1)])]);
        merge(&mut all, &mut together);
        assert_eq!(all[0].cases.len(), 3);
        assert_eq!(all[0].cases[2], case(&[(&[1], &[]), (&[0, 1, 2, 3], &[(10, 4)])]));
        assert_eq!(all[1].cases, [case(&[(&[0, 1, 2, 3], &[(10, 4)])])]);
        assert_eq!(together.into_values().collect::<Vec<_>>(), [[(2, 0)]]);
    }

    #[test]
    fn what_stands_alone_somewhere_stays_apart() {
        let both = vec![case(&[(&[0, 1], &[(0, 2)])]), case(&[(&[2, 3], &[(1, 2)])])];
        let mut all = [carrier(&[4], both.clone()), carrier(&[2], vec![case(&[(&[0, 1], &[(0, 2)])])])];
        merge(&mut all, &mut Together::new());
        assert_eq!(all[0].cases, both);
    }

    #[test]
    fn what_lies_differently_stays_apart() {
        let halves = vec![case(&[(&[0, 1], &[(0, 2)])]), case(&[(&[2, 3], &[(1, 2)])])];
        let neighbours = vec![case(&[(&[0, 2], &[(0, 2)])]), case(&[(&[1, 3], &[(1, 2)])])];
        let mut all = [carrier(&[4], halves.clone()), carrier(&[4], neighbours)];
        merge(&mut all, &mut Together::new());
        assert_eq!(all[0].cases, halves);
    }

    #[test]
    fn factors_around_the_halves_stay() {
        // Flat `heads x width` of 2 x 4, cut into halves of the width.
        let flat = vec![case(&[(&[0, 1, 4, 5], &[(5, 2), (0, 2)])]), case(&[(&[2, 3, 6, 7], &[(5, 2), (1, 2)])])];
        let mut all = [carrier(&[8], flat)];
        merge(&mut all, &mut Together::new());
        assert_eq!(all[0].cases, [case(&[(&[0, 1, 2, 3, 4, 5, 6, 7], &[(5, 2), (6, 4)])])]);
    }
}
