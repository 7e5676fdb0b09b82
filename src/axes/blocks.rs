//! Axes that are stored in blocks: which runs of a class's positions go together, and where blocks do not fall on factors.
//!
//! Example: a weight with 3 x 64 rows in blocks of 32 gives the class of 64 runs of 32, so that a head loses half of its dims or none;
//! heads may go one by one, because each is two blocks. In blocks of 128 neither could be cut.

use super::cases::{ClassId, Region, Unified};
use super::collect::{Barrier, Collected};

/// Gives every class that lies on an axis of blocks its run, or a barrier.
pub(super) fn apply(all: &Collected, unified: &mut Unified) {
    for (at, node, blocks) in &all.blocks {
        let regions = unified.regions(*at);
        for class in unified.classes_on(*at) {
            let runs: Vec<Option<usize>> = regions
                .iter()
                .filter(|r| r.factors.iter().any(|(c, _)| *c == class))
                .map(|r| run(r, class, blocks.size))
                .collect();
            match (runs.iter().copied().collect::<Option<Vec<usize>>>().filter(|r| !r.is_empty()), &blocks.else_barrier) {
                (Some(runs), _) => {
                    let run = runs.into_iter().fold(unified.classes[class].run, common_multiple);
                    unified.classes[class].run = run;
                }
                (None, Some(reason)) => {
                    let barrier = Barrier { node: Some(*node), axis: at.1, reason: reason.clone() };
                    unified.classes[class].barriers.push(barrier);
                }
                (None, None) => {}
            }
        }
    }
}

/// Positions of a class that fill whole blocks; `None` where blocks do not fall on it.
fn run(region: &Region, class: ClassId, block: usize) -> Option<usize> {
    let first = *region.positions.first()?;
    let contiguous = region.positions.iter().enumerate().all(|(n, p)| *p == first + n);
    let at = region.factors.iter().position(|(c, _)| *c == class)?;
    let inner: usize = region.factors[at + 1..].iter().map(|(_, n)| n).product();
    let size = region.factors[at].1;
    let once = region.factors.iter().filter(|(c, _)| *c == class).count() == 1;
    if !contiguous || !once || !first.is_multiple_of(block) {
        return None;
    }
    if inner.is_multiple_of(block) {
        return Some(1);
    }
    let run = block / inner;
    (block.is_multiple_of(inner) && size.is_multiple_of(run) && size > run).then_some(run)
}

fn common_multiple(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a / x.max(1) * b
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_fall_on_factors_or_do_not() {
        let region = |first: usize, factors: &[(ClassId, usize)]| Region {
            positions: (first..first + factors.iter().map(|(_, n)| n).product::<usize>()).collect(),
            factors: factors.to_vec(),
        };
        let heads = region(0, &[(7, 3), (8, 64)]);
        assert_eq!((run(&heads, 7, 32), run(&heads, 8, 32)), (Some(1), Some(32)));
        assert_eq!((run(&heads, 7, 128), run(&heads, 8, 128)), (None, None));
        let narrow = region(0, &[(7, 4), (8, 16)]);
        assert_eq!((run(&narrow, 7, 32), run(&narrow, 8, 32)), (Some(2), None));
        assert_eq!(run(&region(16, &[(7, 96)]), 7, 32), None);
        assert_eq!(run(&region(32, &[(7, 96)]), 7, 32), Some(32));
        assert_eq!(run(&region(0, &[(7, 32)]), 7, 32), None);
    }

    #[test]
    fn runs_of_several_blocks_meet() {
        assert_eq!((common_multiple(1, 32), common_multiple(32, 16), common_multiple(4, 6)), (32, 32, 12));
    }
}
