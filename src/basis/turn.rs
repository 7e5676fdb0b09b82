//! The bases themselves, in double precision, and their products with stored weights.

use crate::fold::Source;
use crate::graph::Tensor;
use faer::{Mat, Side};
use std::collections::BTreeMap;

/// The matrices of a group, one per head, `[E, E]`: rows are old dims, columns new ones.
#[derive(Clone, Debug)]
pub struct Basis {
    /// For q, or v.
    pub first: Vec<Mat<f64>>,
    /// For k, or (inverted and transposed) for the rows of the output projection.
    pub second: Vec<Mat<f64>>,
    /// What each new dim carries, head by head, falling within a head: the error of going without it.
    pub carried: Vec<f64>,
}

/// Eigenvalues are at least this share of the largest.
const FLOOR: f64 = 1e-9;

/// The symmetric root of a second moment, and its inverse.
fn roots(moment: &Mat<f64>) -> Option<(Mat<f64>, Mat<f64>)> {
    let eigen = moment.self_adjoint_eigen(Side::Lower).ok()?;
    let (vectors, values) = (eigen.U(), eigen.S().column_vector());
    let n = moment.nrows();
    let largest = (0..n).map(|i| values[i]).fold(0.0, f64::max);
    let floor = if largest > 0.0 { largest * FLOOR } else { 1.0 };
    let scaled = |power: f64| {
        let columns = Mat::from_fn(n, n, |i, j| vectors[(i, j)] * values[j].max(floor).powf(power));
        &columns * vectors.transpose()
    };
    Some((scaled(0.5), scaled(-0.5)))
}

/// Bases of queries and keys from their second moments by head, keys about their mean of each image: with `Rq Rk = U S V^T`,
/// `A = Rq^-1 U S^1/2` and `A^-T = Rk^-1 V S^1/2`. The error of rank r is the sum of the squares behind the first r of S.
pub fn of_logits(q: &[Mat<f64>], k: &[Mat<f64>]) -> Option<Basis> {
    let mut basis = Basis { first: Vec::new(), second: Vec::new(), carried: Vec::new() };
    for (q, k) in q.iter().zip(k) {
        let ((rq, rq_inverse), (rk, _)) = (roots(q)?, roots(k)?);
        let svd = (&rq * &rk).svd().ok()?;
        let (u, s) = (svd.U(), svd.S().column_vector());
        let n = q.nrows();
        // A singular value of zero would leave a matrix without an inverse.
        let floor = (s[0] * FLOOR).max(f64::MIN_POSITIVE);
        let root = |j: usize| s[j].max(floor).sqrt();
        let first = &rq_inverse * Mat::from_fn(n, n, |i, j| u[(i, j)] * root(j));
        // Inverted as it is, so that the function stays even where a floor was needed.
        basis.second.push(inverse(&first)?.transpose().to_owned());
        basis.first.push(first);
        basis.carried.extend((0..n).map(|j| s[j] * s[j]));
    }
    Some(basis)
}

/// Bases of values: of each head the second moment (or covariance, where a bias behind it can be refitted) of what enters the output
/// projection, and the rows of the projection. With `R = C^1/2` and `R W = U S V^T`, `A = R^-1 U` and `A^-1 = U^T R`.
pub fn of_values(moments: &[Mat<f64>], weights: &[Mat<f64>]) -> Option<Basis> {
    let mut basis = Basis { first: Vec::new(), second: Vec::new(), carried: Vec::new() };
    for (moment, weight) in moments.iter().zip(weights) {
        let (r, r_inverse) = roots(moment)?;
        let product = &r * weight;
        // The left singular vectors of a wide matrix, by its small Gram matrix.
        let eigen = (&product * product.transpose()).self_adjoint_eigen(Side::Lower).ok()?;
        let n = moment.nrows();
        let falling: Vec<usize> = (0..n).rev().collect();
        let u = Mat::from_fn(n, n, |i, j| eigen.U()[(i, falling[j])]);
        let values = eigen.S().column_vector();
        basis.carried.extend(falling.iter().map(|j| values[*j].max(0.0)));
        basis.first.push(&r_inverse * &u);
        // Rows of the projection are multiplied by the inverse: `new[e'] = sum_e (A^-1)[e', e] old[e]`.
        basis.second.push((u.transpose() * &r).transpose().to_owned());
    }
    Some(basis)
}

fn inverse(m: &Mat<f64>) -> Option<Mat<f64>> {
    use faer::linalg::solvers::DenseSolveCore;
    let inverse = m.partial_piv_lu().inverse();
    let is_finite = (0..m.ncols()).all(|j| (0..m.nrows()).all(|i| inverse[(i, j)].is_finite()));
    is_finite.then_some(inverse)
}

/// Multiplies the dims of every head: `new[e'] = sum_e old[e] M[e, e']`. `None` where a head is not whole there.
pub(super) fn multiply(tensor: &Tensor, source: &Source, width: usize, matrices: &[Mat<f64>]) -> Option<Tensor> {
    let mut values = tensor.to_f32s()?;
    let runs = runs(source, width, matrices.len())?;
    let (starts, offsets) = strides(tensor, source);
    let (mut old, mut new) = (vec![0.0; width], vec![0.0; width]);
    for start in starts {
        for (head, positions) in &runs {
            let matrix = &matrices[*head];
            old.iter_mut().zip(positions).for_each(|(x, p)| *x = f64::from(values[start + offsets[*p]]));
            for (j, new) in new.iter_mut().enumerate() {
                *new = (0..width).map(|i| old[i] * matrix[(i, j)]).sum();
            }
            new.iter().zip(positions).for_each(|(x, p)| values[start + offsets[*p]] = *x as f32);
        }
    }
    Some(tensor.with_f32s(&values))
}

/// Sets of positions that hold one head each: several where heads of queries share one of keys.
fn runs(source: &Source, width: usize, heads: usize) -> Option<Vec<(usize, Vec<usize>)>> {
    let mut at: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (position, unit) in source.units.iter().enumerate() {
        if let Some(unit) = unit {
            at.entry(*unit).or_default().push(position);
        }
    }
    let mut runs = Vec::new();
    for head in 0..heads {
        let Some(first) = at.get(&(head * width)) else { continue };
        for n in 0..first.len() {
            let positions: Option<Vec<usize>> = (0..width).map(|e| at.get(&(head * width + e))?.get(n).copied()).collect();
            runs.push((head, positions?));
        }
    }
    (runs.len() * width == at.values().map(Vec::len).sum::<usize>()).then_some(runs)
}

/// Flat starts of everything that the units do not number, and the flat offset of each position of the units.
fn strides(tensor: &Tensor, source: &Source) -> (Vec<usize>, Vec<usize>) {
    let (mut starts, mut offsets) = (vec![0], vec![0]);
    for axis in 0..tensor.dims.len() {
        let stride: usize = tensor.dims[axis + 1..].iter().product();
        let list = if source.axes.contains(&axis) { &mut offsets } else { &mut starts };
        *list = list.iter().flat_map(|b| (0..tensor.dims[axis]).map(move |i| b + i * stride)).collect();
    }
    (starts, offsets)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(rows: usize, columns: usize, seed: u64) -> Mat<f64> {
        let mut state = seed;
        Mat::from_fn(rows, columns, |_, _| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f64 / f64::from(1u32 << 30) - 1.0
        })
    }

    fn moment(x: &Mat<f64>) -> Mat<f64> {
        x.transpose() * x
    }

    fn distance(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
        (0..a.ncols()).flat_map(|j| (0..a.nrows()).map(move |i| (a[(i, j)] - b[(i, j)]).powi(2))).sum::<f64>().sqrt()
    }

    fn columns(m: &Mat<f64>, count: usize) -> Mat<f64> {
        Mat::from_fn(m.nrows(), count, |i, j| m[(i, j)])
    }

    #[test]
    fn all_dims_give_the_logits_and_the_first_ones_the_best_of_their_rank() {
        let (q, k) = (noise(40, 6, 1) * noise(6, 6, 2), noise(50, 6, 3) * noise(6, 6, 4));
        let basis = of_logits(&[moment(&q)], &[moment(&k)]).expect("moments are positive");
        let exact = &q * k.transpose();
        let (turned_q, turned_k) = (&q * &basis.first[0], &k * &basis.second[0]);
        assert!(distance(&exact, &(&turned_q * turned_k.transpose())) < 1e-9 * exact.norm_l2());
        // With all rows as weights, the error of rank r is that of the best matrix of rank r: nothing in q or k does better.
        let singular = exact.thin_svd().expect("it is finite");
        for rank in 1..6 {
            let cut = columns(&turned_q, rank) * columns(&turned_k, rank).transpose();
            let best: f64 = (rank..6).map(|i| singular.S().column_vector()[i].powi(2)).sum::<f64>().sqrt();
            let found = distance(&exact, &cut);
            assert!((found - best).abs() < 1e-6 * best, "rank {rank}: {found}, best {best}");
            let promised: f64 = basis.carried[rank..].iter().sum::<f64>().sqrt();
            assert!((promised - best).abs() < 1e-6 * best, "rank {rank}: promised {promised}");
        }
    }

    #[test]
    fn all_dims_give_the_projection_and_the_first_ones_the_best_of_their_rank() {
        let (x, w) = (noise(60, 5, 5) * noise(5, 5, 6), noise(5, 9, 7));
        let basis = of_values(&[moment(&x)], std::slice::from_ref(&w)).expect("moments are positive");
        let exact = &x * &w;
        let turned = &x * &basis.first[0];
        let rows = basis.second[0].transpose() * &w;
        assert!(distance(&exact, &(&turned * &rows)) < 1e-9 * exact.norm_l2());
        let singular = exact.thin_svd().expect("it is finite");
        for rank in 1..5 {
            let cut = columns(&turned, rank) * Mat::from_fn(rank, 9, |i, j| rows[(i, j)]);
            let best: f64 = (rank..5).map(|i| singular.S().column_vector()[i].powi(2)).sum::<f64>().sqrt();
            assert!((distance(&exact, &cut) - best).abs() < 1e-6 * best, "rank {rank}");
        }
    }

    #[test]
    fn weights_that_see_nothing_of_the_data_stay_invertible() {
        let zero = Mat::zeros(4, 4);
        let basis = of_logits(std::slice::from_ref(&zero), std::slice::from_ref(&zero)).expect("zeros have a basis");
        let product = &basis.first[0] * basis.second[0].transpose();
        assert!(distance(&product, &Mat::identity(4, 4)) < 1e-9);
    }
}
