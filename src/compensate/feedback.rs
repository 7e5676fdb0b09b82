//! Refit towards what the whole model said: features behind what was already cut, targets from the model as it was.
//!
//! With x the features that a cut prefix gives and Y what the layer must add so that its residual stream becomes the dense one's,
//! `W'_S = (C_SS + lambda)^-1 (Cov(x_S, Y) + lambda W_S)` and `b' = mean(Y) - W'^T mean(x)` (METHOD 3d, general target): errors of
//! earlier layers are made up for as far as the layer can, not only its own.

use super::ridge::GROWTH_MAX;
use crate::stats::Moments;
use faer::linalg::solvers::Solve;
use faer::{Mat, Side};

/// Moments of rows `[x, Y]`: features first, then outputs.
#[derive(Clone, Copy)]
pub struct Joint<'a> {
    /// Mean and covariance of all columns.
    pub moments: &'a Moments,
    /// Number of features.
    pub features: usize,
}

/// A weight `[F, O]` and a bias `[O]`.
#[derive(Clone, Debug)]
pub struct Affine {
    /// The weight, zero in the rows of removed features.
    pub weight: Mat<f64>,
    /// The bias; what there was where there is none to fit.
    pub bias: Vec<f64>,
    /// The share of the mean variance that was added to the diagonal in the fit.
    pub ridge: f64,
}

const RIDGE_FIRST: f64 = 1e-4;
const RIDGE_LAST: f64 = 1e4;

/// Fits the rows of `weight` that stay, anchored at what they are. Without a bias to fit, the given one is taken off the targets and
/// second moments stand for covariances. `None` where no ridge gives weights that stay below ten times the largest one.
pub fn fit(joint: Joint<'_>, weight: &Mat<f64>, bias: &[f64], stays: &[bool], has_bias: bool) -> Option<Affine> {
    let (m, n) = (joint.moments, joint.features);
    let kept: Vec<usize> = (0..n).filter(|f| stays[*f]).collect();
    let outputs = weight.ncols();
    let target = |o: usize| m.mean[n + o] - if has_bias { 0.0 } else { bias[o] };
    let about = |a: usize, mean_b: f64| if has_bias { 0.0 } else { m.mean[a] * mean_b };
    let mean_variance = kept.iter().map(|f| m.cov[(*f, *f)] + about(*f, m.mean[*f])).sum::<f64>() / kept.len().max(1) as f64;
    if kept.is_empty() || mean_variance <= 0.0 {
        return None;
    }
    let limit = GROWTH_MAX * elements(weight).fold(0.0, |a: f64, b| a.max(b.abs()));
    let mut ridge = RIDGE_FIRST;
    while ridge <= RIDGE_LAST {
        let lambda = ridge * mean_variance;
        let c = Mat::from_fn(kept.len(), kept.len(), |i, j| {
            m.cov[(kept[i], kept[j])] + about(kept[i], m.mean[kept[j]]) + if i == j { lambda } else { 0.0 }
        });
        let wanted = Mat::from_fn(kept.len(), outputs, |i, o| {
            m.cov[(kept[i], n + o)] + about(kept[i], target(o)) + lambda * weight[(kept[i], o)]
        });
        let found = c.llt(Side::Lower).ok().map(|c| c.solve(&wanted));
        if let Some(found) = found.filter(|w| elements(w).all(|x| x.is_finite() && x.abs() <= limit)) {
            let mut fitted = Mat::zeros(n, outputs);
            for (i, f) in kept.iter().enumerate() {
                (0..outputs).for_each(|o| fitted[(*f, o)] = found[(i, o)]);
            }
            let through = |o: usize| kept.iter().map(|f| fitted[(*f, o)] * m.mean[*f]).sum::<f64>();
            let bias = if has_bias { (0..outputs).map(|o| m.mean[n + o] - through(o)).collect() } else { bias.to_vec() };
            return Some(Affine { weight: fitted, bias, ridge });
        }
        ridge *= 10.0;
    }
    None
}

fn elements(m: &Mat<f64>) -> impl Iterator<Item = f64> + '_ {
    (0..m.ncols()).flat_map(move |j| (0..m.nrows()).map(move |i| m[(i, j)]))
}

/// Mean squared distance of `x W + b` from Y, summed over outputs.
pub fn error(joint: Joint<'_>, layer: &Affine) -> f64 {
    let (m, n) = (joint.moments, joint.features);
    let xx = Mat::from_fn(n, n, |i, j| m.cov[(i, j)]);
    let product = &xx * &layer.weight;
    let of = |o: usize| {
        let (mut spread, mut mean) = (m.cov[(n + o, n + o)], layer.bias[o] - m.mean[n + o]);
        for f in 0..n {
            let w = layer.weight[(f, o)];
            spread += w * (product[(f, o)] - 2.0 * m.cov[(f, n + o)]);
            mean += w * m.mean[f];
        }
        spread + mean * mean
    };
    (0..layer.weight.ncols()).map(of).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joint(rows: &Mat<f64>) -> Moments {
        let n = rows.nrows() as f64;
        let mean: Vec<f64> = (0..rows.ncols()).map(|j| (0..rows.nrows()).map(|i| rows[(i, j)]).sum::<f64>() / n).collect();
        let cov = Mat::from_fn(rows.ncols(), rows.ncols(), |a, b| {
            (0..rows.nrows()).map(|i| (rows[(i, a)] - mean[a]) * (rows[(i, b)] - mean[b])).sum::<f64>() / n
        });
        Moments { rows: rows.nrows() as u64, mean, cov }
    }

    #[test]
    fn a_layer_makes_up_for_what_came_before_it() {
        let mut state = 5u64;
        let mut noise = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f64 / f64::from(1u32 << 30) - 1.0
        };
        let truth = Mat::from_fn(4, 3, |i, j| (i as f64 - 1.5) * 0.4 + j as f64 * 0.2);
        // The prefix gives features that are half of what they were, and moved.
        let mut rows = Mat::zeros(300, 7);
        for i in 0..300 {
            let x: Vec<f64> = (0..4).map(|_| noise()).collect();
            for j in 0..4 {
                rows[(i, j)] = 0.5 * x[j] + 2.0;
            }
            for o in 0..3 {
                rows[(i, 4 + o)] = (0..4).map(|j| x[j] * truth[(j, o)]).sum::<f64>() + 1.0;
            }
        }
        let moments = joint(&rows);
        let joint = Joint { moments: &moments, features: 4 };
        let found = fit(joint, &truth, &[1.0; 3], &[true; 4], true).unwrap();
        let measured = |layer: &Affine| {
            let y = |i: usize, o: usize| (0..4).map(|f| rows[(i, f)] * layer.weight[(f, o)]).sum::<f64>() + layer.bias[o];
            (0..300).map(|i| (0..3).map(|o| (y(i, o) - rows[(i, 4 + o)]).powi(2)).sum::<f64>()).sum::<f64>() / 300.0
        };
        let before = Affine { weight: truth.clone(), bias: vec![1.0; 3], ridge: 0.0 };
        for layer in [&before, &found] {
            assert!((error(joint, layer) - measured(layer)).abs() < 1e-9);
        }
        assert!(measured(&found) < 1e-6 * measured(&before), "{} of {}", measured(&found), measured(&before));
        let without = fit(joint, &truth, &[1.0; 3], &[true, true, false, true], false).unwrap();
        assert_eq!(without.bias, [1.0; 3]);
        assert!((0..3).all(|o| without.weight[(2, o)] == 0.0) && measured(&without) < measured(&before));
    }
}
