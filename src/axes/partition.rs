//! Sums: which positions of a factor are told apart by selections (Split, Slice, Gather, Concat)?
//!
//! Example: the factor `3` of a fused qkv axis `3 x H x E`, from which q, k and v are gathered, falls into the cells `{0} {1} {2}`;
//! the factor `E` of a rotary q, which is sliced in halves, into `{0..E/2} {E/2..E}`. Cells travel along all relations.
//! A factor with more than [`CELLS_MAX`] cells (table look-ups) is given up: selections of it are barriers. So is one that would
//! make a carrier fall into more than [`CASES_MAX`] combinations of cells: a window that is rolled along both of its axes has 64
//! parts, and telling them apart would only hide that q, k and v are three.

use super::collect::{AxisOf, Relation};
use super::refine::{FactorPair, Refiner};

/// More cells than this are not worth telling apart.
pub(super) const CELLS_MAX: usize = 16;
/// Of a carrier no more combinations of cells than this are looked at.
const CASES_MAX: usize = 64;

/// Cells of the factors of every axis.
pub(super) struct Partition {
    /// Number of the first factor of each axis (by axis number), and the total at the end.
    first: Vec<usize>,
    /// Size of each factor; `None` where symbolic.
    pub(super) sizes: Vec<Option<usize>>,
    /// Cell of each position of each factor, cells numbered by first occurrence; `None` where there is one cell.
    labels: Vec<Option<Vec<u32>>>,
    /// Factors that were given up.
    pub(super) dead: Vec<bool>,
}

impl Partition {
    /// Numbers of the factors of an axis, outermost first.
    pub(super) fn factors(&self, axis_number: usize) -> std::ops::Range<usize> {
        self.first[axis_number]..self.first[axis_number + 1]
    }

    /// Positions of each cell of a factor.
    pub(super) fn cells(&self, factor: usize) -> Vec<Vec<usize>> {
        let size = self.sizes[factor].unwrap_or(0);
        match &self.labels[factor] {
            None => vec![(0..size).collect()],
            Some(labels) => {
                let count = labels.iter().max().map_or(1, |m| *m as usize + 1);
                let mut cells = vec![Vec::new(); count];
                for (position, label) in labels.iter().enumerate() {
                    cells[*label as usize].push(position);
                }
                cells
            }
        }
    }

    /// Number of cells of a factor.
    pub(super) fn cell_count(&self, factor: usize) -> usize {
        self.labels[factor].as_ref().map_or(1, |l| l.iter().max().map_or(1, |m| *m as usize + 1))
    }

    /// Sizes of the factors of an axis, where all are known.
    pub(super) fn axis_sizes(&self, axis_number: usize) -> Option<Vec<usize>> {
        self.factors(axis_number).map(|f| self.sizes[f]).collect()
    }

    /// Labels of the positions of a whole axis: equal where all factors' cells are.
    fn axis_labels(&self, axis_number: usize, sizes: &[usize]) -> Vec<u32> {
        let mut labels = vec![0u32];
        for (k, f) in self.factors(axis_number).enumerate() {
            let cells = u32::try_from(self.cell_count(f)).unwrap_or(u32::MAX);
            let own = |p: usize| self.labels[f].as_ref().map_or(0, |l| l[p]);
            labels = labels.iter().flat_map(|l| (0..sizes[k]).map(move |p| (*l, p))).map(|(l, p)| l * cells + own(p)).collect();
        }
        labels
    }

    /// Refines the labels of one factor; says whether they changed.
    fn refine(&mut self, factor: usize, new: Vec<u32>) -> bool {
        // Most labels come back to where they came from.
        if self.dead[factor] || self.labels[factor].as_ref() == Some(&new) {
            return false;
        }
        let merged = match &self.labels[factor] {
            Some(old) => canonical(old.iter().zip(&new)),
            None => canonical(new.iter()),
        };
        let count = merged.iter().max().map_or(1, |m| *m as usize + 1);
        if count == self.cell_count(factor) {
            return false;
        }
        if count > CELLS_MAX {
            self.dead[factor] = true;
            self.labels[factor] = None;
        } else {
            self.labels[factor] = Some(merged);
        }
        true
    }

    /// Gives a factor up; says whether that is new.
    fn kill(&mut self, factor: usize) -> bool {
        self.labels[factor] = None;
        !std::mem::replace(&mut self.dead[factor], true)
    }

    /// Lets labels of a whole axis refine its factors: two positions of a factor stay together where all else being equal they are.
    fn refine_axis(&mut self, axis_number: usize, sizes: &[usize], labels: &[u32]) -> bool {
        let mut changed = false;
        for (k, factor) in self.factors(axis_number).enumerate() {
            let inner: usize = sizes[k + 1..].iter().product();
            let outer: usize = sizes[..k].iter().product();
            let signature = |p: usize| -> Vec<u32> {
                let rows = (0..outer).flat_map(|o| (0..inner).map(move |i| (o * sizes[k] + p) * inner + i));
                rows.map(|at| labels[at]).collect()
            };
            let signatures: Vec<Vec<u32>> = (0..sizes[k]).map(signature).collect();
            changed |= self.refine(factor, canonical(signatures.iter()));
        }
        changed
    }
}

/// Numbers equal keys equally, by first occurrence.
fn canonical<K: Ord>(keys: impl Iterator<Item = K>) -> Vec<u32> {
    let mut seen = std::collections::BTreeMap::new();
    keys.map(|k| {
        let next = u32::try_from(seen.len()).unwrap_or(u32::MAX);
        *seen.entry(k).or_insert(next)
    })
    .collect()
}

/// What [`partition`] starts from.
pub(super) struct Parts<'a> {
    /// All factors, refined.
    pub(super) refiner: &'a Refiner,
    /// The equal factors `(axis number, factor)` of all product relations.
    pub(super) pairs: &'a [FactorPair],
    /// All selections.
    pub(super) selects: &'a [&'a Relation],
    /// Axis numbers of each carrier.
    pub(super) carriers: &'a [std::ops::Range<usize>],
    /// Axes that cannot be cut whatever the selections say.
    pub(super) barred: &'a [usize],
}

/// Finds the cells of all factors. Afterwards no carrier has more than [`CASES_MAX`] combinations of cells.
pub(super) fn partition(parts: &Parts<'_>, axis_number: &dyn Fn(AxisOf) -> usize) -> Partition {
    let mut first = vec![0];
    let mut sizes = Vec::new();
    for factors in &parts.refiner.factors {
        sizes.extend(factors.iter().map(|d| d.size()));
        first.push(sizes.len());
    }
    let count = sizes.len();
    let mut p = Partition { first, sizes, labels: vec![None; count], dead: vec![false; count] };
    let pairs: Vec<(usize, usize)> = parts.pairs.iter().map(|(a, b)| (p.first[a.0] + a.1, p.first[b.0] + b.1)).collect();
    let barred = barred_factors(&p, &pairs, parts.barred);
    loop {
        spread(&mut p, &pairs, parts.selects, axis_number);
        let given_up = too_many(&p, parts.carriers, &barred);
        if given_up.is_empty() {
            return p;
        }
        given_up.into_iter().for_each(|f| p.dead[f] = true);
        // What the cells of a factor that is given up did to others is forgotten with them.
        p.labels.fill(None);
    }
}

/// Lets cells travel until nothing changes.
fn spread(p: &mut Partition, pairs: &[(usize, usize)], selects: &[&Relation], axis_number: &dyn Fn(AxisOf) -> usize) {
    loop {
        let mut changed = spread_pairs(p, pairs);
        for select in selects {
            changed |= spread_select(p, select, axis_number);
        }
        if !changed {
            return;
        }
    }
}

/// Factors that are, or equal, a factor of a barred axis: no cell of them can be cut.
fn barred_factors(p: &Partition, pairs: &[(usize, usize)], axes: &[usize]) -> Vec<bool> {
    let mut equal = vec![Vec::new(); p.sizes.len()];
    for (a, b) in pairs {
        equal[*a].push(*b);
        equal[*b].push(*a);
    }
    let mut barred = vec![false; p.sizes.len()];
    let mut stack: Vec<usize> = axes.iter().flat_map(|a| p.factors(*a)).collect();
    while let Some(f) = stack.pop() {
        if !std::mem::replace(&mut barred[f], true) {
            stack.extend(&equal[f]);
        }
    }
    barred
}

/// Factors to give up so that carriers have fewer combinations of cells: those that cannot be cut anyway, else the one with the
/// most cells.
fn too_many(p: &Partition, carriers: &[std::ops::Range<usize>], barred: &[bool]) -> Vec<usize> {
    let mut out = Vec::new();
    for axes in carriers {
        let parted: Vec<usize> = axes.clone().flat_map(|a| p.factors(a)).filter(|f| p.cell_count(*f) > 1).collect();
        let cases = parted.iter().fold(1usize, |n, f| n.saturating_mul(p.cell_count(*f)));
        if cases <= CASES_MAX {
            continue;
        }
        let before = out.len();
        out.extend(parted.iter().copied().filter(|f| barred[*f]));
        if out.len() == before {
            // Of equals the outermost.
            out.extend(parted.iter().copied().max_by_key(|f| (p.cell_count(*f), std::cmp::Reverse(*f))));
        }
    }
    out
}

/// Makes equal factors have equal cells, until nothing changes.
fn spread_pairs(p: &mut Partition, pairs: &[(usize, usize)]) -> bool {
    let mut of_factor = vec![Vec::new(); p.sizes.len()];
    for (n, (a, b)) in pairs.iter().enumerate() {
        of_factor[*a].push(n);
        of_factor[*b].push(n);
    }
    let touched = |p: &Partition, f: usize| p.labels[f].is_some() || p.dead[f];
    let mut queue: std::collections::VecDeque<usize> =
        (0..pairs.len()).filter(|n| touched(p, pairs[*n].0) || touched(p, pairs[*n].1)).collect();
    let mut any = false;
    while let Some(n) = queue.pop_front() {
        let (a, b) = pairs[n];
        for (from, to) in [(a, b), (b, a)] {
            let changed =
                if p.dead[from] { p.kill(to) } else { p.labels[from].clone().is_some_and(|labels| p.refine(to, labels)) };
            if changed {
                any = true;
                queue.extend(of_factor[to].iter().copied());
            }
        }
    }
    any
}

/// Tells selected positions from others, and lets the cells of both axes refine each other.
fn spread_select(p: &mut Partition, select: &Relation, axis_number: &dyn Fn(AxisOf) -> usize) -> bool {
    let Relation::Select { from, to, index, at } = select else { return false };
    let (f, t) = (axis_number(*from), axis_number(*to));
    let (Some(from_sizes), Some(to_sizes)) = (p.axis_sizes(f), p.axis_sizes(t)) else { return false };
    if p.factors(f).chain(p.factors(t)).any(|x| p.dead[x]) {
        return false;
    }
    let (from_labels, to_labels) = (p.axis_labels(f, &from_sizes), p.axis_labels(t, &to_sizes));
    // Within one cell of `to` the read positions must ascend, so that a cell is read in its own order.
    let mut run = 0u32;
    let mut new_to: Vec<(u32, u32, u32)> = to_labels.iter().map(|l| (*l, u32::MAX, 0)).collect();
    for (j, source) in index.iter().enumerate() {
        if j > 0 && *source <= index[j - 1] {
            run += 1;
        }
        new_to[at + j] = (to_labels[at + j], from_labels[*source], run);
    }
    let new_to = canonical(new_to.iter());
    let mut new_from: Vec<(u32, Vec<u32>)> = from_labels.iter().map(|l| (*l, Vec::new())).collect();
    for (j, source) in index.iter().enumerate() {
        new_from[*source].1.push(new_to[at + j]);
    }
    let new_from = canonical(new_from.iter());
    let changed_to = p.refine_axis(t, &to_sizes, &new_to);
    p.refine_axis(f, &from_sizes, &new_from) || changed_to
}
