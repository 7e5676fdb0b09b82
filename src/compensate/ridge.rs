//! Ridge regression of a consumer on the units that stay, anchored at its old weights (METHOD 3d; the optimal bias makes the matrix of
//! the regression the covariance).

use faer::linalg::solvers::Solve;
use faer::{Mat, Side};

/// What is known of the rows of an operand: their mean and their covariance.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// Mean of each feature.
    pub mean: &'a [f64],
    /// Covariance, `[F, F]`.
    pub cov: &'a Mat<f64>,
}

/// A weight `[F, O]`, zero in the rows of removed features, with what is added to the bias.
#[derive(Clone, Debug)]
pub struct Refit {
    /// The weight.
    pub weight: Mat<f64>,
    /// What the bias gains; zeros where there is none.
    pub shift: Vec<f64>,
    /// The share of the mean variance that was added to the diagonal.
    pub ridge: f64,
}

/// The first share of the mean variance that is added to the diagonal.
const RIDGE_FIRST: f64 = 1e-4;
/// Beyond this share there is nothing left of the fit.
const RIDGE_LAST: f64 = 1e4;
/// The largest weight may grow this many times.
pub(super) const GROWTH_MAX: f64 = 10.0;

/// The weight without the removed rows, nothing made up for.
pub fn plain(weight: &Mat<f64>, stays: &[bool]) -> Refit {
    let cut = Mat::from_fn(weight.nrows(), weight.ncols(), |f, o| if stays[f] { weight[(f, o)] } else { 0.0 });
    Refit { weight: cut, shift: vec![0.0; weight.ncols()], ridge: 0.0 }
}

/// `W'_S = W_S + (C_SS + lambda)^-1 C_SP W_P`, `b' = b + W_P^T mu_P - (W'_S - W_S)^T mu_S`. Without a bias the second moment stands
/// for the covariance. The ridge grows until the solution is found and no weight grows tenfold.
pub fn refit(rows: Rows<'_>, weight: &Mat<f64>, stays: &[bool], has_bias: bool) -> Refit {
    let kept: Vec<usize> = (0..stays.len()).filter(|f| stays[*f]).collect();
    let gone: Vec<usize> = (0..stays.len()).filter(|f| !stays[*f]).collect();
    let outputs = weight.ncols();
    let moment = |a: usize, b: usize| rows.cov[(a, b)] + if has_bias { 0.0 } else { rows.mean[a] * rows.mean[b] };
    let removed = Mat::from_fn(gone.len(), outputs, |i, o| weight[(gone[i], o)]);
    let cross = Mat::from_fn(kept.len(), gone.len(), |i, j| moment(kept[i], gone[j]));
    let wanted = &cross * &removed;
    let largest = |m: &Mat<f64>| (0..m.ncols()).flat_map(|o| (0..m.nrows()).map(move |f| m[(f, o)].abs())).fold(0.0, f64::max);
    let limit = GROWTH_MAX * largest(weight);
    let trace: f64 = kept.iter().map(|f| moment(*f, *f)).sum();
    let mean_variance = trace / kept.len().max(1) as f64;
    let mut result = plain(weight, stays);
    let mut ridge = RIDGE_FIRST;
    while !kept.is_empty() && mean_variance > 0.0 && ridge <= RIDGE_LAST {
        let lambda = ridge * mean_variance;
        let c = Mat::from_fn(kept.len(), kept.len(), |i, j| moment(kept[i], kept[j]) + if i == j { lambda } else { 0.0 });
        let added = c.llt(Side::Lower).ok().map(|c| c.solve(&wanted));
        if let Some(added) = added.filter(|a| largest(a).is_finite() && largest(a) <= limit) {
            for (i, f) in kept.iter().enumerate() {
                (0..outputs).for_each(|o| result.weight[(*f, o)] += added[(i, o)]);
            }
            result.ridge = ridge;
            break;
        }
        ridge *= 10.0;
    }
    if has_bias {
        result.shift = mean_shift(rows.mean, weight, &result.weight);
    }
    result
}

/// What the bias must gain so that the mean of the output stays: `(W - W')^T mu`.
fn mean_shift(mean: &[f64], before: &Mat<f64>, after: &Mat<f64>) -> Vec<f64> {
    (0..before.ncols()).map(|o| (0..before.nrows()).map(|f| (before[(f, o)] - after[(f, o)]) * mean[f]).sum()).collect()
}

/// Mean squared difference of the outputs, summed over outputs: `tr(D^T C D) + |D^T mu - shift|^2` with `D = W - W'`.
pub fn error(rows: Rows<'_>, before: &Mat<f64>, after: &Refit) -> f64 {
    let difference = before - &after.weight;
    let product = rows.cov * &difference;
    let mut sum = 0.0;
    for o in 0..difference.ncols() {
        let spread: f64 = (0..difference.nrows()).map(|f| difference[(f, o)] * product[(f, o)]).sum();
        let offset: f64 = (0..difference.nrows()).map(|f| difference[(f, o)] * rows.mean[f]).sum::<f64>() - after.shift[o];
        sum += spread + offset * offset;
    }
    sum
}

/// Variance of the outputs, summed: what an error is a share of.
pub fn output_variance(rows: Rows<'_>, weight: &Mat<f64>) -> f64 {
    let product = rows.cov * weight;
    (0..weight.ncols()).map(|o| (0..weight.nrows()).map(|f| weight[(f, o)] * product[(f, o)]).sum::<f64>()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(n: usize, f: usize) -> Mat<f64> {
        let mut state = 9u64;
        let noise = Mat::from_fn(n, f, |_, _| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f64 / f64::from(1u32 << 30) - 1.0
        });
        // Features that say nearly the same, with means that are not zero.
        Mat::from_fn(n, f, |i, j| noise[(i, j)] * 0.1 + noise[(i, j % 3)] + j as f64)
    }

    fn moments(x: &Mat<f64>) -> (Vec<f64>, Mat<f64>) {
        let n = x.nrows() as f64;
        let mean: Vec<f64> = (0..x.ncols()).map(|j| (0..x.nrows()).map(|i| x[(i, j)]).sum::<f64>() / n).collect();
        let centred = Mat::from_fn(x.nrows(), x.ncols(), |i, j| x[(i, j)] - mean[j]);
        let cov =
            Mat::from_fn(x.ncols(), x.ncols(), |a, b| (0..x.nrows()).map(|i| centred[(i, a)] * centred[(i, b)]).sum::<f64>() / n);
        (mean, cov)
    }

    /// Mean squared difference of the outputs, row by row.
    fn measured(x: &Mat<f64>, before: &Mat<f64>, after: &Refit) -> f64 {
        let difference = x * (before - &after.weight);
        let square = |i: usize, o: usize| (difference[(i, o)] - after.shift[o]).powi(2);
        (0..x.nrows()).map(|i| (0..before.ncols()).map(|o| square(i, o)).sum::<f64>()).sum::<f64>() / x.nrows() as f64
    }

    #[test]
    fn errors_are_those_of_the_rows_and_a_refit_makes_them_small() {
        let x = rows(200, 7);
        let (mean, cov) = moments(&x);
        let known = Rows { mean: &mean, cov: &cov };
        let weight = Mat::from_fn(7, 4, |i, j| ((i * 5 + j * 3) % 7) as f64 / 7.0 - 0.4);
        let stays = [true, false, false, true, true, true, false];
        for has_bias in [true, false] {
            let (cut, refitted) = (plain(&weight, &stays), refit(known, &weight, &stays, has_bias));
            for r in [&cut, &refitted] {
                let (told, found) = (error(known, &weight, r), measured(&x, &weight, r));
                assert!((told - found).abs() < 1e-9 * found.max(1e-9), "told {told}, measured {found}");
            }
            assert!(error(known, &weight, &refitted) < 0.02 * error(known, &weight, &cut), "bias: {has_bias}");
            assert!((0..7).filter(|f| !stays[*f]).all(|f| (0..4).all(|o| refitted.weight[(f, o)] == 0.0)));
        }
    }

    #[test]
    fn what_says_nothing_of_the_rest_leaves_the_weights_alone() {
        let (mean, cov) = (vec![0.0; 3], Mat::identity(3, 3));
        let weight = Mat::from_fn(3, 2, |i, j| (i + j) as f64);
        let refitted = refit(Rows { mean: &mean, cov: &cov }, &weight, &[true, true, false], true);
        assert_eq!(refitted.weight, plain(&weight, &[true, true, false]).weight);
        let none = refit(Rows { mean: &[1.0, 2.0, 3.0], cov: &cov }, &weight, &[false; 3], true);
        assert_eq!(none.shift, [2.0 + 6.0, 1.0 + 4.0 + 9.0]);
    }
}
