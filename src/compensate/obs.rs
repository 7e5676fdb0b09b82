//! Structured optimal brain surgeon: the order in which parts of an operand are best removed when the rest makes up for them
//! (METHOD 3d; Hassibi and Stork 1993, the structured form of ZipLM, arXiv 2302.04089).

use super::ridge::Rows;
use faer::linalg::solvers::DenseSolveCore;
use faer::{Mat, Side};

/// An order of removal.
#[derive(Clone, Debug, PartialEq)]
pub struct Order {
    /// Parts, the first to go first.
    pub parts: Vec<usize>,
    /// Mean squared error of the layer's output, summed over outputs, after each removal; never falls.
    pub errors: Vec<f64>,
}

/// Share of the mean variance on the diagonal.
const RIDGE: f64 = 1e-4;
/// How many parts go between two looks at what they cost: one in this many of those that are there.
const STEP: usize = 128;

/// Orders `parts`, sets of features that go together. Features of no part stay.
///
/// With `A = (C + lambda)^-1` a set J costs `tr(W_J^T (A_JJ)^-1 W_J)`; then `W -= A_:J (A_JJ)^-1 W_J` and `A -= A_:J (A_JJ)^-1 A_J:`.
/// Without a bias the second moment stands for the covariance. `None` where the covariance is not positive.
pub fn order(rows: Rows<'_>, weight: &Mat<f64>, parts: &[Vec<usize>], has_bias: bool) -> Option<Order> {
    let n = weight.nrows();
    let trace: f64 = (0..n).map(|f| rows.cov[(f, f)]).sum();
    let lambda = (RIDGE * trace / n as f64).max(f64::MIN_POSITIVE);
    let c = Mat::from_fn(n, n, |i, j| {
        let mean = if has_bias { 0.0 } else { rows.mean[i] * rows.mean[j] };
        rows.cov[(i, j)] + mean + if i == j { lambda } else { 0.0 }
    });
    let mut a = c.llt(Side::Lower).ok()?.inverse();
    let mut w = weight.clone();
    let mut parts = parts.to_vec();
    let mut gone = vec![false; n];
    let mut left: Vec<usize> = (0..parts.len()).collect();
    let mut order = Order { parts: Vec::with_capacity(parts.len()), errors: Vec::with_capacity(parts.len()) };
    let mut error = 0.0;
    while !left.is_empty() {
        let mut costs: Vec<(f64, usize)> = Vec::with_capacity(left.len());
        for part in &left {
            costs.push((cost(&a, &w, &parts[*part])?, *part));
        }
        costs.sort_by(|x, y| x.0.total_cmp(&y.0).then(y.1.cmp(&x.1)));
        let count = (left.len() / STEP).max(1);
        let chosen: Vec<usize> = costs.iter().take(count).map(|(_, p)| *p).collect();
        let together: Vec<usize> = chosen.iter().flat_map(|p| parts[*p].iter().copied()).collect();
        let before = error;
        error += remove(&mut a, &mut w, &together)?.max(0.0);
        for (i, part) in chosen.iter().enumerate() {
            order.parts.push(*part);
            order.errors.push(before + (error - before) * (i + 1) as f64 / chosen.len() as f64);
        }
        left.retain(|p| !chosen.contains(p));
        together.iter().for_each(|f| gone[*f] = true);
        if 4 * gone.iter().filter(|g| **g).count() > gone.len() {
            shrink(&mut a, &mut w, &mut parts, &mut gone);
        }
    }
    Some(order)
}

/// Drops the rows and columns of features that are gone: what is left of the work gets smaller.
fn shrink(a: &mut Mat<f64>, w: &mut Mat<f64>, parts: &mut [Vec<usize>], gone: &mut Vec<bool>) {
    let there: Vec<usize> = (0..gone.len()).filter(|f| !gone[*f]).collect();
    let mut place = vec![0; gone.len()];
    there.iter().enumerate().for_each(|(new, old)| place[*old] = new);
    *a = Mat::from_fn(there.len(), there.len(), |i, j| a[(there[i], there[j])]);
    *w = Mat::from_fn(there.len(), w.ncols(), |i, o| w[(there[i], o)]);
    for part in parts.iter_mut() {
        part.retain(|f| !gone[*f]);
        part.iter_mut().for_each(|f| *f = place[*f]);
    }
    *gone = vec![false; there.len()];
}

/// `tr(W_J^T (A_JJ)^-1 W_J)`.
fn cost(a: &Mat<f64>, w: &Mat<f64>, part: &[usize]) -> Option<f64> {
    let squares = |f: usize| (0..w.ncols()).map(|o| w[(f, o)] * w[(f, o)]).sum::<f64>();
    if let [one] = part {
        return (a[(*one, *one)] > 0.0).then(|| squares(*one) / a[(*one, *one)]);
    }
    let inverse = inverse_of(a, part)?;
    let mut sum = 0.0;
    for (i, f) in part.iter().enumerate() {
        for (j, g) in part.iter().enumerate() {
            let product: f64 = (0..w.ncols()).map(|o| w[(*f, o)] * w[(*g, o)]).sum();
            sum += inverse[(i, j)] * product;
        }
    }
    Some(sum)
}

fn inverse_of(a: &Mat<f64>, part: &[usize]) -> Option<Mat<f64>> {
    let block = Mat::from_fn(part.len(), part.len(), |i, j| a[(part[i], part[j])]);
    Some(block.llt(Side::Lower).ok()?.inverse())
}

/// Removes features; returns what that costs. Their rows and columns of `a` become those of the identity.
fn remove(a: &mut Mat<f64>, w: &mut Mat<f64>, part: &[usize]) -> Option<f64> {
    let (n, outputs) = (w.nrows(), w.ncols());
    let inverse = inverse_of(a, part)?;
    let of_part = Mat::from_fn(part.len(), outputs, |i, o| w[(part[i], o)]);
    let scaled = &inverse * &of_part;
    let cost = (0..outputs).map(|o| (0..part.len()).map(|i| of_part[(i, o)] * scaled[(i, o)]).sum::<f64>()).sum();
    let columns = Mat::from_fn(n, part.len(), |i, j| a[(i, part[j])]);
    *w -= &columns * &scaled;
    let taken = &columns * &inverse;
    *a -= &taken * columns.transpose();
    for f in part {
        for i in 0..n {
            a[(*f, i)] = 0.0;
            a[(i, *f)] = 0.0;
        }
        a[(*f, *f)] = 1.0;
        (0..outputs).for_each(|o| w[(*f, o)] = 0.0);
    }
    Some(cost)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compensate::ridge;

    fn problem() -> (Vec<f64>, Mat<f64>, Mat<f64>) {
        let mut state = 3u64;
        let mut noise = |rows: usize, columns: usize| {
            Mat::from_fn(rows, columns, |_, _| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) as f64 / f64::from(1u32 << 30) - 1.0
            })
        };
        let mixed = noise(6, 8) * 0.3;
        let cov = mixed.transpose() * &mixed + Mat::from_fn(8, 8, |i, j| if i == j { 0.05 * (i + 1) as f64 } else { 0.0 });
        let mean = (0..8).map(|i| i as f64).collect();
        (mean, cov, noise(8, 5))
    }

    #[test]
    fn the_error_is_that_of_the_best_refit_of_what_is_left() {
        let (mean, cov, weight) = problem();
        let known = Rows { mean: &mean, cov: &cov };
        let parts: Vec<Vec<usize>> = (0..8).map(|f| vec![f]).collect();
        let found = order(known, &weight, &parts, true).expect("the covariance is positive");
        let mut stays = [true; 8];
        for (part, told) in found.parts.iter().zip(&found.errors).take(7) {
            stays[*part] = false;
            let exact = ridge::error(known, &weight, &ridge::refit(known, &weight, &stays, true));
            assert!((told - exact).abs() < 0.02 * exact + 1e-6, "told {told}, refit {exact}");
        }
        assert!(found.errors.windows(2).all(|w| w[0] <= w[1] + 1e-12));
    }

    #[test]
    fn the_first_to_go_is_the_one_that_costs_least() {
        let (mean, cov, weight) = problem();
        let known = Rows { mean: &mean, cov: &cov };
        let pairs: Vec<Vec<usize>> = (0..4).map(|f| vec![f, f + 4]).collect();
        let found = order(known, &weight, &pairs, true).expect("the covariance is positive");
        let cost = |pair: &[usize]| {
            let stays: Vec<bool> = (0..8).map(|f| !pair.contains(&f)).collect();
            ridge::error(known, &weight, &ridge::refit(known, &weight, &stays, true))
        };
        let costs: Vec<f64> = pairs.iter().map(|p| cost(p)).collect();
        assert!(costs.iter().all(|c| costs[found.parts[0]] <= c + 1e-9), "{costs:?}, first {}", found.parts[0]);
    }
}
