//! Common refinement of products: which factors must an axis be split into so that all regroupings speak of the same factors?
//!
//! Example: `[B, N, 144] -> [B, N, 3, 3, 16]` splits the axis of 144 into `3 x 3 x 16`; the split then travels along every
//! relation, down to the weight's axis of 144. Refinement ends because each step adds a factor to a finite product.

use crate::infer::Dim;

/// Two factors that are the same: slot and number of each.
pub(super) type FactorPair = ((usize, usize), (usize, usize));

/// Lists of factors of a number of slots, refined along relations between sequences of slots.
pub(super) struct Refiner {
    /// Factors of each slot, outermost first; factors of size 1 are left out.
    pub(super) factors: Vec<Vec<Dim>>,
    relations: Vec<(Vec<usize>, Vec<usize>)>,
    /// Relations of each slot.
    of_slot: Vec<Vec<usize>>,
    /// Relations whose sides have no common refinement.
    pub(super) broken: Vec<usize>,
}

impl Refiner {
    /// One slot per size.
    pub(super) fn new(sizes: impl Iterator<Item = Dim>) -> Self {
        let factors: Vec<Vec<Dim>> = sizes.map(|d| if d.is(1) { vec![] } else { vec![d] }).collect();
        let of_slot = vec![Vec::new(); factors.len()];
        Self { factors, relations: Vec::new(), of_slot, broken: Vec::new() }
    }

    /// The row-major product of the slots of `a` is that of `b`. Returns the relation's number.
    pub(super) fn relate(&mut self, a: Vec<usize>, b: Vec<usize>) -> usize {
        let number = self.relations.len();
        for slot in a.iter().chain(&b) {
            if self.of_slot[*slot].last() != Some(&number) {
                self.of_slot[*slot].push(number);
            }
        }
        self.relations.push((a, b));
        number
    }

    /// Refines until nothing changes.
    pub(super) fn run(&mut self) {
        let mut queued = vec![true; self.relations.len()];
        let mut queue: std::collections::VecDeque<usize> = (0..self.relations.len()).collect();
        while let Some(number) = queue.pop_front() {
            queued[number] = false;
            if self.broken.contains(&number) {
                continue;
            }
            let (a, b) = self.relations[number].clone();
            let Some(common) = common_refinement(&self.joined(&a), &self.joined(&b)) else {
                self.broken.push(number);
                continue;
            };
            for slot in self.assign(&a, &common).into_iter().chain(self.assign(&b, &common)) {
                for other in &self.of_slot[slot] {
                    if !queued[*other] {
                        queued[*other] = true;
                        queue.push_back(*other);
                    }
                }
            }
        }
        self.broken.sort_unstable();
    }

    /// Pairs of equal factors `((slot, factor), (slot, factor))` of a relation that is not broken.
    pub(super) fn pairs(&self, number: usize) -> Vec<FactorPair> {
        let (a, b) = &self.relations[number];
        let list = |side: &[usize]| -> Vec<(usize, usize)> {
            side.iter().flat_map(|s| (0..self.factors[*s].len()).map(move |k| (*s, k))).collect()
        };
        list(a).into_iter().zip(list(b)).collect()
    }

    /// Number of relations.
    pub(super) fn relation_count(&self) -> usize {
        self.relations.len()
    }

    fn joined(&self, side: &[usize]) -> Vec<Dim> {
        side.iter().flat_map(|s| self.factors[*s].iter().cloned()).collect()
    }

    /// Deals `common` out to the slots of one side; returns the slots that changed.
    fn assign(&mut self, side: &[usize], common: &[Dim]) -> Vec<usize> {
        let mut changed = Vec::new();
        let mut rest = common;
        for slot in side {
            let size: Dim = self.factors[*slot].iter().product();
            let (mut taken, mut product) = (0, Dim::from(1i64));
            while product != size && taken < rest.len() {
                product = &product * &rest[taken];
                taken += 1;
            }
            if taken > self.factors[*slot].len() {
                self.factors[*slot] = rest[..taken].to_vec();
                changed.push(*slot);
            }
            rest = &rest[taken..];
        }
        changed
    }
}

/// The coarsest list of factors that both lists are groupings of; `None` where their boundaries cross.
fn common_refinement(a: &[Dim], b: &[Dim]) -> Option<Vec<Dim>> {
    let (mut a, mut b) = (a.iter().cloned(), b.iter().cloned());
    let (mut x, mut y) = (a.next(), b.next());
    let mut out = Vec::new();
    loop {
        match (x.take(), y.take()) {
            (None, None) => return Some(out),
            (Some(p), Some(q)) if p == q => {
                out.push(p);
                (x, y) = (a.next(), b.next());
            }
            (Some(p), Some(q)) => {
                if let Some(inner) = p.exact_div(&q) {
                    out.push(q);
                    (x, y) = (Some(inner), b.next());
                } else {
                    let inner = q.exact_div(&p)?;
                    out.push(p);
                    (x, y) = (a.next(), Some(inner));
                }
            }
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dims(sizes: &[i64]) -> Vec<Dim> {
        sizes.iter().map(|s| Dim::from(*s)).collect()
    }

    #[test]
    fn products_are_refined_in_order() {
        assert_eq!(common_refinement(&dims(&[144]), &dims(&[3, 3, 16])), Some(dims(&[3, 3, 16])));
        assert_eq!(common_refinement(&dims(&[12, 6]), &dims(&[6, 12])), Some(dims(&[6, 2, 6])));
        assert_eq!(common_refinement(&dims(&[4, 3]), &dims(&[6, 2])), None);
    }

    #[test]
    fn symbolic_factors_split_off() {
        let b = Dim::named("b");
        let merged = &b * &Dim::from(3i64);
        assert_eq!(
            common_refinement(&[merged, Dim::from(16i64)], &[b.clone(), Dim::from(48i64)]),
            Some(vec![b, 3i64.into(), 16i64.into()])
        );
    }

    #[test]
    fn splits_travel_along_relations() {
        let mut r = Refiner::new([144, 144, 3, 48].into_iter().map(|s: i64| Dim::from(s)));
        r.relate(vec![0], vec![1]);
        r.relate(vec![1], vec![2, 3]);
        r.run();
        assert_eq!(r.factors[0], dims(&[3, 48]));
        assert!(r.broken.is_empty());
    }
}
