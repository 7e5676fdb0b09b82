//! Sums over rows of one probe, in f64, about a shift.

use super::Moments;
use faer::Mat;

/// Entries of the upper triangle of `[F, F]`, the diagonal with it; `None` where there are too many.
pub(super) fn triangle(features: usize) -> Option<usize> {
    features.checked_mul(features.checked_add(1)?).map(|n| n / 2)
}

/// Where entry (i, j), i at most j, of `[F, F]` stands in its upper triangle, packed row by row.
fn at(features: usize, i: usize, j: usize) -> usize {
    i * (2 * features + 1 - i) / 2 + (j - i)
}

/// The whole of a symmetric matrix from its packed upper triangle.
pub(super) fn unpacked(features: usize, packed: &[f64]) -> Mat<f64> {
    Mat::from_fn(features, features, |i, j| packed[at(features, i.min(j), i.max(j))])
}

/// The upper triangle of a symmetric matrix, row by row.
pub(super) fn packed(matrix: &Mat<f64>) -> impl Iterator<Item = f64> + '_ {
    let features = matrix.nrows();
    (0..features).flat_map(move |i| (i..features).map(move |j| matrix[(i, j)]))
}

/// Sums of `x - shift` and of their products.
pub(super) struct Sums {
    features: usize,
    rows: u64,
    sum: Vec<f64>,
    /// Upper triangle: half of the memory, which at 4,096 features and twelve layers is 800 MB.
    gram: Vec<f64>,
}

impl Sums {
    pub(super) fn new(features: usize) -> Self {
        let gram = vec![0.0; triangle(features).unwrap_or(0)];
        Self { features, rows: 0, sum: vec![0.0; features], gram }
    }

    pub(super) fn add_rows(&mut self, rows: u64) {
        self.rows += rows;
    }

    /// Adds `weight` times the sum `[F]` of a run; `false` where it does not fit or is not finite.
    pub(super) fn add_sum(&mut self, run: &[f32], weight: f64) -> bool {
        self.sum.iter_mut().zip(run).for_each(|(sum, x)| *sum += weight * f64::from(*x));
        run.len() == self.features && run.iter().all(|x| x.is_finite())
    }

    /// Adds `weight` times the products `[F, F]` of a run; `false` where they do not fit or are not finite.
    pub(super) fn add_gram(&mut self, run: &[f32], weight: f64) -> bool {
        let mut rest = self.gram.as_mut_slice();
        let mut is_finite = true;
        for (i, row) in run.chunks_exact(self.features).enumerate().take(self.features) {
            // What is not finite in a column is not finite on the diagonal.
            is_finite &= row[i].is_finite();
            let (line, after) = rest.split_at_mut(self.features - i);
            line.iter_mut().zip(&row[i..]).for_each(|(sum, x)| *sum += weight * f64::from(*x));
            rest = after;
        }
        is_finite && run.len() == self.features * self.features
    }

    /// The mean of the rows, as float32, where `shift` was subtracted from them.
    pub(super) fn mean(&self, shift: &[f32]) -> Vec<f64> {
        let rows = self.rows.max(1) as f64;
        self.sum.iter().zip(shift).map(|(sum, shift)| f64::from(*shift) + sum / rows).collect()
    }

    /// The moments, where `shift` was subtracted from the rows.
    pub(super) fn moments(mut self, shift: &[f32]) -> Moments {
        let mean = self.mean(shift);
        let rows = self.rows.max(1) as f64;
        self.sum.iter_mut().for_each(|sum| *sum /= rows);
        let mut rest = self.gram.as_mut_slice();
        for (i, d) in self.sum.iter().enumerate() {
            let (line, after) = rest.split_at_mut(self.features - i);
            line.iter_mut().zip(&self.sum[i..]).for_each(|(gram, other)| *gram = *gram / rows - d * other);
            // Rounding can leave the variance of a constant slightly negative.
            line[0] = line[0].max(0.0);
            rest = after;
        }
        Moments { rows: self.rows, mean, cov: unpacked(self.features, &self.gram) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_triangle_is_unpacked_to_both_sides() {
        let whole = unpacked(3, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let expected = [[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]];
        assert_eq!(whole, Mat::from_fn(3, 3, |i, j| expected[i][j]));
        assert_eq!(packed(&whole).collect::<Vec<_>>(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!((triangle(3), triangle(usize::MAX)), (Some(6), None));
    }

    #[test]
    fn moments_are_about_the_mean_whatever_the_shift() {
        // Rows (1, 2), (3, 8) about the shift (1, 1): (0, 1), (2, 7).
        let mut sums = Sums::new(2);
        sums.add_rows(2);
        assert!(sums.add_sum(&[2.0, 8.0], 1.0) && sums.add_gram(&[4.0, 14.0, 14.0, 50.0], 1.0));
        let found = sums.moments(&[1.0, 1.0]);
        assert_eq!((found.rows, found.mean), (2, vec![2.0, 5.0]));
        assert_eq!((found.cov[(0, 0)], found.cov[(0, 1)], found.cov[(1, 0)], found.cov[(1, 1)]), (1.0, 3.0, 3.0, 9.0));
        assert!(!Sums::new(2).add_sum(&[1.0, f32::NAN], 1.0) && !Sums::new(1).add_gram(&[f32::INFINITY], 1.0));
    }
}
