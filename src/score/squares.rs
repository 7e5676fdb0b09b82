//! How much the output feels of an error inside: the mean over images of the sum of squared gradients at a value.
//!
//! In: a graph, values of it, images without labels. What the loss compares with is drawn from the model itself ([`super::target`]), so
//! that to second order an error d at a value costs `1/2 E[(g . d)^2]` of what [`Curves`](crate::curves) count: KL divergence of class
//! scores, or squared errors of all float outputs over their variances. Where d has mean 0, is independent of g and alike in all its n
//! elements, that is `1/2 E[|g|^2] E[|d|^2] / n`.
//! Example: the attention logits `[B, 3, 197, 197]` of a layer give one number, squares summed over heads, queries and keys.
//! Squares are summed inside the graph, in float32 over a batch; the host adds batches up in f64.

use super::images::{Images, MeasureError};
use super::target::{Draw, Output, number_of};
use crate::data::{Array, ArrayData, Batch};
use crate::runtime::Session;
use crate::supernet::Squares;

/// The mean over images of the sum of squares of the loss's gradient with respect to each value, `None` where no output depends on it.
/// `progress` gets images done and images of all.
///
/// Errors: [`MeasureError`].
pub fn squares(
    net: &Squares,
    (forward, step): (&mut dyn Session, &mut dyn Session),
    images: &Images<'_>,
    seed: u64,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Option<f64>>, MeasureError> {
    Run { net }.measure(forward, step, images, seed, progress)
}

/// The graph that is run.
struct Run<'a> {
    net: &'a Squares,
}

impl Run<'_> {
    /// Means over images, in the order of the values; `None` where nothing that counts depends on the value.
    ///
    /// `forward` runs the model, `step` the graph of this. `seed` decides what is drawn. Errors: [`MeasureError`].
    fn measure(
        &self,
        forward: &mut dyn Session,
        step: &mut dyn Session,
        images: &Images<'_>,
        seed: u64,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<Option<f64>>, MeasureError> {
        let scales = if self.net.is_classes { vec![1.0] } else { self.variances(forward, images)? };
        let draw = Draw { seed };
        let mut sums = vec![0.0; self.net.is_felt.len()];
        let n = images.each(progress, &mut |batch| {
            let outputs = forward.run(&batch.inputs)?;
            let mut feeds = batch.inputs.clone();
            for (name, scale) in self.net.outputs.iter().zip(&scales) {
                feeds.push((format!("target.{name}"), self.target(&draw, &outputs, name, batch, *scale)?));
            }
            let found = step.run(&feeds)?;
            for (n, sum) in sums.iter_mut().enumerate().filter(|(n, _)| self.net.is_felt[*n]) {
                let name = Squares::name_of(n);
                let fault = |reason: &str| MeasureError::Output { name: name.clone(), reason: reason.to_string() };
                let (_, array) = found.iter().find(|(f, _)| *f == name).ok_or_else(|| fault("the graph does not have it"))?;
                let square = array.as_f32().first().copied().filter(|s| s.is_finite());
                *sum += f64::from(square.ok_or_else(|| fault("is not finite"))?);
            }
            Ok(())
        })?;
        Ok(sums.iter().zip(&self.net.is_felt).map(|(sum, is_felt)| is_felt.then_some(sum / n.max(1) as f64)).collect())
    }

    /// What the loss of one output compares with. Squared errors count over the output's variance, so noise has its inverse.
    fn target(
        &self,
        draw: &Draw,
        outputs: &[(String, Array)],
        name: &str,
        batch: &Batch,
        variance: f64,
    ) -> Result<Array, MeasureError> {
        let number = number_of(outputs, name, batch.count)?;
        let output = &outputs[number].1;
        if self.net.is_classes {
            return Ok(draw.target(output, Output::ClassScores, number as u64, &batch.samples));
        }
        let target = draw.target(output, Output::Numbers, number as u64, &batch.samples);
        let scale = variance.sqrt().recip() as f32;
        let values = output.as_f32().iter().zip(target.as_f32()).map(|(y, t)| y + (t - y) * scale).collect();
        Ok(Array { dims: target.dims, data: ArrayData::F32(values) })
    }

    /// The variance of each output that counts, over images and positions; 1 for one that never varies.
    fn variances(&self, forward: &mut dyn Session, images: &Images<'_>) -> Result<Vec<f64>, MeasureError> {
        let mut sums = vec![(0.0f64, 0.0f64, 0.0f64, None); self.net.outputs.len()];
        images.each(&mut |_, _| {}, &mut |batch| {
            let outputs = forward.run(&batch.inputs)?;
            for ((count, sum, square, first), name) in sums.iter_mut().zip(&self.net.outputs) {
                let values = outputs[number_of(&outputs, name, batch.count)?].1.as_f32();
                // About the first value, so that a large mean does not hide a small variance.
                let origin = *first.get_or_insert(values.first().map_or(0.0, |v| f64::from(*v)));
                for x in values.iter().map(|v| f64::from(*v) - origin) {
                    (*count, *sum, *square) = (*count + 1.0, *sum + x, *square + x * x);
                }
            }
            Ok(())
        })?;
        let variance = |(count, sum, square, _): &(f64, f64, f64, Option<f64>)| square / count - (sum / count).powi(2);
        Ok(sums.iter().map(variance).map(|v| if v > 0.0 { v } else { 1.0 }).collect())
    }
}
