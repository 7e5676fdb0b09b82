//! What the loss of a gradient compares with: drawn from the model's own outputs, so that no label of the data is needed.
//!
//! Class scores: a label y drawn from their softmax p gives the cross entropy the gradient `u = p - onehot(y)`, of covariance
//! `diag(p) - p p^T`, which is the Hessian of KL(p || .) there. Drawn labels are a poor estimate where the model is sure of itself: the
//! rare other label has all the weight. So u is drawn from the Gaussian of the same covariance, `u = sqrt(p) e - p (sqrt(p) . e)`, and
//! the soft label is `p - u`, of which the cross entropy's gradient at the logits is `p - (p - u) = u`.
//! Other outputs of n numbers: `y + e` with variance n / 2, since the mean squared error has the gradient `-2 e / n` and the Hessian
//! `2 / n` there.
//! What is drawn for an image depends on the seed, the image and the output, not on the batch that the image falls to.

use super::images::MeasureError;
use crate::data::{Array, ArrayData};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What an output holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    /// Scores of classes, whose softmax counts.
    ClassScores,
    /// Numbers of any meaning.
    Numbers,
}

/// Draws targets.
pub(super) struct Draw {
    pub(super) seed: u64,
}

impl Draw {
    fn generator(&self, sample: usize, purpose: u64) -> ChaCha8Rng {
        let mut key = [0u8; 32];
        for (part, value) in key.as_chunks_mut::<8>().0.iter_mut().zip([self.seed, sample as u64, purpose]) {
            *part = value.to_le_bytes();
        }
        ChaCha8Rng::from_seed(key)
    }

    /// Targets for an output `[B, ..]`, one row per image of `samples`. `number` tells outputs apart.
    pub(super) fn target(&self, output: &Array, of: Output, number: u64, samples: &[usize]) -> Array {
        let mut values = output.as_f32();
        let size = (values.len() / samples.len().max(1)).max(1);
        for (row, sample) in values.chunks_exact_mut(size).zip(samples) {
            let mut generator = self.generator(*sample, number);
            let noise: Vec<f64> = (0..size.div_ceil(2)).flat_map(|_| gaussians(&mut generator)).collect();
            match of {
                Output::ClassScores => soft_labels(row, &noise),
                Output::Numbers => shift(row, &noise),
            }
        }
        Array { dims: output.dims.clone(), data: ArrayData::F32(values) }
    }
}

/// The place of an output by its name.
///
/// Errors: it is not there, or its first axis does not go by images.
pub(super) fn number_of(outputs: &[(String, Array)], name: &str, count: usize) -> Result<usize, MeasureError> {
    let fault = |reason: String| MeasureError::Output { name: name.to_string(), reason };
    let missing = || fault("the model does not have it".into());
    let number = outputs.iter().position(|(n, _)| n == name).ok_or_else(missing)?;
    let dims = &outputs[number].1.dims;
    if dims.first() == Some(&count) {
        return Ok(number);
    }
    Err(fault(format!("is {dims:?}, expected one entry of its first axis per image")))
}

/// Class scores become soft labels `p - u`, where u is Gaussian with the covariance `diag(p) - p p^T`.
fn soft_labels(row: &mut [f32], noise: &[f64]) {
    let top = row.iter().fold(f32::NEG_INFINITY, |m, s| m.max(*s));
    let weights: Vec<f64> = row.iter().map(|s| f64::from(s - top).exp()).collect();
    let total: f64 = weights.iter().sum();
    let p: Vec<f64> = weights.iter().map(|w| w / total).collect();
    let along: f64 = p.iter().zip(noise).map(|(p, e)| p.sqrt() * e).sum();
    for ((y, p), e) in row.iter_mut().zip(&p).zip(noise) {
        *y = (p - (p.sqrt() * e - p * along)) as f32;
    }
}

/// n numbers y become `y + e`, where e is Gaussian with the variance n / 2.
fn shift(row: &mut [f32], noise: &[f64]) {
    let scale = (row.len() as f64 / 2.0).sqrt();
    row.iter_mut().zip(noise).for_each(|(y, e)| *y = (f64::from(*y) + scale * e) as f32);
}

/// In [0, 1).
fn uniform(generator: &mut ChaCha8Rng) -> f64 {
    (generator.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Two independent numbers of mean 0 and variance 1. Source: Box and Muller 1958.
fn gaussians(generator: &mut ChaCha8Rng) -> [f64; 2] {
    let (a, b) = (uniform(generator), uniform(generator));
    let radius = (-2.0 * (1.0 - a).ln()).sqrt();
    let angle = std::f64::consts::TAU * b;
    [radius * angle.cos(), radius * angle.sin()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(row: &[f32], of: Output, n: usize) -> Vec<f32> {
        let output = Array { dims: vec![n, row.len()], data: ArrayData::F32(row.repeat(n)) };
        let samples: Vec<usize> = (0..n).collect();
        Draw { seed: 3 }.target(&output, of, 0, &samples).as_f32()
    }

    #[test]
    fn noise_on_class_scores_has_the_covariance_of_a_drawn_label() {
        let (logits, n) = ([0.0f32, 1.0, -1.0], 20_000);
        let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        let p = logits.map(|l| f64::from(l).exp() / total);
        let drawn = drawn(&logits, Output::ClassScores, n);
        let u = |row: &[f32], c: usize| p[c] - f64::from(row[c]);
        for (a, b) in [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)] {
            let found = drawn.chunks_exact(3).map(|r| u(r, a) * u(r, b)).sum::<f64>() / n as f64;
            let wanted = if a == b { p[a] - p[a] * p[a] } else { -p[a] * p[b] };
            // A product of Gaussians of variance at most 1/4 varies by at most 1/8; five standard errors.
            assert!((found - wanted).abs() < 5.0 * (0.125 / n as f64).sqrt(), "{a} {b}: {found} against {wanted}");
        }
        // Soft labels sum to 1, so that the gradient at the logits is u.
        assert!(drawn.chunks_exact(3).all(|r| (r.iter().sum::<f32>() - 1.0).abs() < 1e-5));
    }

    #[test]
    fn what_is_drawn_for_an_image_does_not_depend_on_its_batch() {
        let row = [0.5f32, 0.0, 2.0];
        let all = drawn(&row, Output::ClassScores, 10);
        let two = Array { dims: vec![2, 3], data: ArrayData::F32(row.repeat(2)) };
        let two = Draw { seed: 3 }.target(&two, Output::ClassScores, 0, &[7, 9]).as_f32();
        assert_eq!(two, [&all[21..24], &all[27..30]].concat());
    }

    #[test]
    fn noise_on_numbers_has_the_variance_that_makes_the_hessian() {
        let (rows, size) = (50, 401);
        let e: Vec<f64> = drawn(&vec![2.0; size], Output::Numbers, rows).iter().map(|t| f64::from(*t) - 2.0).collect();
        let n = e.len() as f64;
        let (mean, square) = (e.iter().sum::<f64>() / n, e.iter().map(|x| x * x).sum::<f64>() / n);
        let variance = size as f64 / 2.0;
        assert!(mean.abs() < 5.0 * (variance / n).sqrt(), "{mean}");
        assert!((square / variance - 1.0).abs() < 5.0 * (2.0 / n).sqrt(), "{square}");
    }
}
