//! Fisher by blocks: the order in which the units of a group go, when what they do together counts.
//!
//! Taking the units P away costs `C(P) = 1/n sum_b (sum_{j in P} g_bj)^2`, since `F = G^T G / n`; units that cancel cost little
//! together, units that do the same cost more than alone. The order is greedy: next goes the unit that makes C least. All heads lose a
//! unit before one loses the next, as they do in a plan (layout `equal`). F is not formed: with s the sum of the columns that are
//! gone, `|s + g_j|^2 = |s|^2 + 2 s.g_j + |g_j|^2`, and the products s.g_j are kept up to date.
//! Scores are the slopes of the greatest convex curve below C over this order: they rise along it, sum up to C, and compare with
//! scores of other groups.
//! Time: images x units^2. Memory: beside G, a few numbers per unit.
//! Source: the idea of blocks is Kwon et al. 2022, eq. 12, which swaps units at one width; an order serves all widths.

/// A score per column of `rows` `[images, columns]`, row-major, of which `heads` equal parts follow each other.
pub(super) fn scores(rows: &[f32], columns: usize, heads: usize) -> Vec<f32> {
    if columns == 0 {
        return Vec::new();
    }
    let images = rows.len() / columns;
    // By column, so that a product reads memory in order.
    let by_column: Vec<Vec<f32>> = (0..columns).map(|j| rows.iter().skip(j).step_by(columns).copied().collect()).collect();
    let (order, costs) = order(&by_column, heads);
    let slopes = convex(&costs.iter().map(|c| c / images.max(1) as f64).collect::<Vec<_>>());
    let mut out = vec![0f32; columns];
    let mut before = f32::NEG_INFINITY;
    for (unit, slope) in order.iter().zip(slopes) {
        // Of equal slopes the later one is told apart by the last bit, so that the order can be read off the scores.
        before = if slope as f32 > before { slope as f32 } else { before.next_up() };
        out[*unit] = before;
    }
    out
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

/// The columns in the order in which they go, and `|s|^2` after each.
fn order(columns: &[Vec<f32>], heads: usize) -> (Vec<usize>, Vec<f64>) {
    let per_head = columns.len() / heads.max(1);
    let own: Vec<f64> = columns.iter().map(|c| dot(c, c)).collect();
    let mut with_gone = vec![0f64; columns.len()];
    let mut is_gone = vec![false; columns.len()];
    // How many columns of each head are gone.
    let mut gone_of = vec![0usize; heads.max(1)];
    let (mut order, mut costs, mut cost) = (Vec::new(), Vec::new(), 0f64);
    for n in 0..columns.len() {
        let round = n / heads.max(1);
        let rise = |j: usize| 2.0 * with_gone[j] + own[j];
        let may_go = |j: &usize| !is_gone[*j] && gone_of[j / per_head] == round;
        let Some(next) = (0..columns.len()).filter(may_go).min_by(|a, b| rise(*a).total_cmp(&rise(*b))) else { break };
        cost += rise(next);
        is_gone[next] = true;
        gone_of[next / per_head] += 1;
        order.push(next);
        costs.push(cost);
        for j in (0..columns.len()).filter(|j| !is_gone[*j]) {
            with_gone[j] += dot(&columns[next], &columns[j]);
        }
    }
    (order, costs)
}

/// Slopes of the greatest convex curve through 0 that is nowhere above `curve`, which starts behind 0.
fn convex(curve: &[f64]) -> Vec<f64> {
    // Runs of one slope: (rise, steps). A run that is not steeper than the one before becomes one with it.
    let mut runs: Vec<(f64, usize)> = Vec::new();
    let mut before = 0.0;
    for c in curve {
        let mut run = (c - before, 1);
        before = *c;
        while let Some(last) = runs.pop_if(|last| last.0 * run.1 as f64 >= run.0 * last.1 as f64) {
            run = (last.0 + run.0, last.1 + run.1);
        }
        runs.push(run);
    }
    runs.into_iter().flat_map(|(rise, steps)| std::iter::repeat_n(rise / steps as f64, steps)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers around 0 from a seed: splitmix64.
    fn numbers(seed: u64, count: usize) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ (z >> 31)
        };
        (0..count).map(|_| (next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    /// `1_P^T F 1_P` with F written out.
    fn cost(rows: &[f32], columns: usize, gone: &[usize]) -> f64 {
        let n = (rows.len() / columns) as f64;
        let f = |i: usize, j: usize| rows.chunks_exact(columns).map(|r| f64::from(r[i]) * f64::from(r[j])).sum::<f64>() / n;
        gone.iter().map(|i| gone.iter().map(|j| f(*i, *j)).sum::<f64>()).sum()
    }

    fn order_of(scores: &[f32]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
        order
    }

    #[test]
    fn the_order_is_the_greedy_one_of_the_written_out_matrix() {
        for (seed, columns, heads) in [(1, 7, 1), (2, 8, 2), (3, 9, 3), (4, 1, 1), (5, 6, 6)] {
            let rows = numbers(seed, 5 * columns);
            let found = scores(&rows, columns, heads);
            assert!(found.iter().all(|s| *s >= 0.0), "{found:?}");
            let order = order_of(&found);
            let (mut gone, mut counts) = (Vec::new(), vec![0; heads]);
            for next in order {
                let least = *counts.iter().min().unwrap();
                let free = (0..columns).filter(|j| !gone.contains(j) && counts[j / (columns / heads)] == least);
                let with = |j: usize| cost(&rows, columns, &[&gone[..], &[j]].concat());
                let best = free.min_by(|a, b| with(*a).total_cmp(&with(*b))).unwrap();
                assert_eq!(next, best, "seed {seed}, behind {gone:?}");
                counts[next / (columns / heads)] += 1;
                gone.push(next);
            }
            let total: f64 = found.iter().map(|s| f64::from(*s)).sum();
            let all = cost(&rows, columns, &gone);
            assert!((total - all).abs() < 1e-5 * all.max(1.0), "{total} against {all}");
        }
    }

    #[test]
    fn a_pair_that_cancels_goes_first_and_twins_do_not_go_together() {
        // Columns: a, -a, b with |b| a little less than |a|, and b again.
        let rows = [1.0, -1.0, 0.9, 0.9, 2.0, -2.0, -1.8, -1.8];
        assert_eq!(order_of(&scores(&rows, 4, 1))[0], 2);
        let rows = [1.0, -1.0, 1.1, 1.1, 2.0, -2.0, -2.2, -2.2];
        assert_eq!(order_of(&scores(&rows, 4, 1)), [0, 1, 2, 3]);
        // Both of the pair cost nothing together: their slope is 0, and the second is the next number above it.
        assert_eq!(scores(&rows, 4, 1)[..2], [0.0, f32::from_bits(1)]);
    }

    #[test]
    fn slopes_rise_and_keep_the_last_point() {
        let slopes = convex(&[3.0, 4.0, 4.5, 9.0]);
        assert_eq!(slopes, [1.5, 1.5, 1.5, 4.5]);
        assert!(convex(&[]).is_empty());
    }
}
