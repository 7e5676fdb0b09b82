//! What the loss of a gradient compares with: drawn from the model's own outputs, so that no label of the data is needed.
//!
//! What is drawn for an image depends on the seed, the image and the output, not on the batch that the image falls to.

use crate::data::{Array, ArrayData};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Draws labels and targets.
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

    /// A class for each row of class scores `[B, C]`, with the probability that its softmax gives it. `samples` are the images.
    pub(super) fn labels(&self, scores: &Array, samples: &[usize]) -> Array {
        let classes = scores.dims.get(1).copied().unwrap_or(1).max(1);
        let values = scores.as_f32();
        let rows = values.chunks_exact(classes).zip(samples);
        let labels: Vec<i64> = rows.map(|(row, s)| draw_class(row, uniform(&mut self.generator(*s, 0)))).collect();
        Array { dims: vec![labels.len()], data: ArrayData::I64(labels) }
    }

    /// `y + e` for an output `[B, ..]` of n elements per image, e Gaussian with variance n / 2: the gradient of the mean squared error
    /// then has that error's Hessian as its second moment.
    pub(super) fn target(&self, output: &Array, number: u64, samples: &[usize]) -> Array {
        let mut values = output.as_f32();
        let size = values.len() / samples.len().max(1);
        let scale = (size as f64 / 2.0).sqrt();
        for (row, sample) in values.chunks_exact_mut(size.max(1)).zip(samples) {
            let mut generator = self.generator(*sample, 1 + number);
            for pair in row.chunks_mut(2) {
                for (y, e) in pair.iter_mut().zip(gaussians(&mut generator)) {
                    *y = (f64::from(*y) + scale * e) as f32;
                }
            }
        }
        Array { dims: output.dims.clone(), data: ArrayData::F32(values) }
    }
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

/// The class at `position` in 0..1 of the softmax, laid end to end.
fn draw_class(scores: &[f32], position: f64) -> i64 {
    let top = scores.iter().fold(f32::NEG_INFINITY, |m, s| m.max(*s));
    let weights: Vec<f64> = scores.iter().map(|s| f64::from(s - top).exp()).collect();
    let mut left = position * weights.iter().sum::<f64>();
    for (class, weight) in weights.iter().enumerate() {
        left -= weight;
        if left < 0.0 {
            return class as i64;
        }
    }
    // Rounding may leave a little of the last class that has any weight.
    weights.iter().rposition(|w| *w > 0.0).unwrap_or(0) as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_drawn_as_often_as_the_softmax_says() {
        let n = 20_000;
        let logits = [0.0f32, 1.0, -1.0];
        let scores = Array { dims: vec![n, 3], data: ArrayData::F32((0..n).flat_map(|_| logits).collect()) };
        let samples: Vec<usize> = (0..n).collect();
        let ArrayData::I64(labels) = Draw { seed: 3 }.labels(&scores, &samples).data else { panic!("labels are integers") };
        let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        for (class, logit) in logits.iter().enumerate() {
            let p = f64::from(*logit).exp() / total;
            let found = labels.iter().filter(|l| **l == class as i64).count() as f64 / n as f64;
            // Five standard errors.
            assert!((found - p).abs() < 5.0 * (p * (1.0 - p) / n as f64).sqrt(), "{class}: {found} against {p}");
        }
        // What is drawn for an image does not depend on its batch.
        let half = Array { dims: vec![2, 3], data: ArrayData::F32([logits, logits].concat()) };
        let again = Draw { seed: 3 }.labels(&half, &[7, 9]);
        assert_eq!(again.data, ArrayData::I64(vec![labels[7], labels[9]]));
    }

    #[test]
    fn noise_has_the_variance_that_makes_the_hessian() {
        let (rows, size) = (50, 400);
        let output = Array { dims: vec![rows, size], data: ArrayData::F32(vec![2.0; rows * size]) };
        let samples: Vec<usize> = (0..rows).collect();
        let e: Vec<f64> = Draw { seed: 1 }.target(&output, 0, &samples).as_f32().iter().map(|t| f64::from(*t) - 2.0).collect();
        let n = e.len() as f64;
        let (mean, square) = (e.iter().sum::<f64>() / n, e.iter().map(|x| x * x).sum::<f64>() / n);
        let variance = size as f64 / 2.0;
        assert!(mean.abs() < 5.0 * (variance / n).sqrt(), "{mean}");
        assert!((square / variance - 1.0).abs() < 5.0 * (2.0 / n).sqrt(), "{square}");
    }
}
