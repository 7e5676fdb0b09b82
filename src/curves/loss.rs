//! How far outputs are from those of the model as it is.

use super::CurveError;
use crate::data::Array;
use crate::eval;

/// The outputs of the model as it is, and what is measured of each.
pub(super) struct Dense {
    outputs: Vec<Reference>,
}

struct Reference {
    name: String,
    /// Entries of a row of class scores; `None` for an output that is compared by squared error.
    classes: Option<usize>,
    /// Values of each batch, those of repeated samples left out.
    batches: Vec<Vec<f64>>,
    /// What squared errors are divided by.
    scale: f64,
}

/// One run: outputs by name, samples in it, and samples of it that count.
pub(super) struct Run<'a> {
    pub(super) outputs: &'a [(String, Array)],
    pub(super) samples: usize,
    pub(super) count: usize,
}

impl Run<'_> {
    /// Values of the samples that count; all of them where axis 0 does not go by samples.
    fn values(&self, array: &Array) -> Vec<f64> {
        let mut values = array.as_f32();
        if array.dims.first().is_some_and(|n| self.samples > 0 && n.is_multiple_of(self.samples)) {
            values.truncate(values.len() / self.samples * self.count);
        }
        values.into_iter().map(f64::from).collect()
    }
}

impl Dense {
    /// For outputs of these names; a single one with class scores, or several that are compared by squared error.
    pub(super) fn new(names: Vec<String>, is_class: bool) -> Self {
        let reference = |name| Reference { name, classes: is_class.then_some(0), batches: Vec::new(), scale: 1.0 };
        Self { outputs: names.into_iter().map(reference).collect() }
    }

    /// Takes the outputs of the next batch.
    pub(super) fn push(&mut self, run: &Run<'_>) -> Result<(), CurveError> {
        for reference in &mut self.outputs {
            let Some((_, array)) = run.outputs.iter().find(|(name, _)| *name == reference.name) else {
                return Err(reference.error("is not there".into()));
            };
            if let Some(classes) = &mut reference.classes {
                if array.dims.len() != 2 || !array.data.kind().is_float() {
                    let reason = format!("is {:?}, expected floats [batch, classes]", array.dims);
                    return Err(reference.error(reason));
                }
                *classes = array.dims[1];
            }
            let values = run.values(array);
            if values.iter().any(|v| !v.is_finite()) {
                return Err(reference.error("is not finite on these images before anything is edited".into()));
            }
            reference.batches.push(values);
        }
        Ok(())
    }

    /// Takes the variances, when all batches are there.
    pub(super) fn finish(&mut self) {
        for reference in self.outputs.iter_mut().filter(|r| r.classes.is_none()) {
            let all = || reference.batches.iter().flatten();
            let n = all().count().max(1) as f64;
            let mean = all().sum::<f64>() / n;
            let variance = all().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
            reference.scale = if variance > 0.0 { variance } else { 1.0 };
        }
    }

    /// Sum over the samples of batch `number` that count.
    ///
    /// Outputs that are not among those of the run do not depend on what is edited.
    pub(super) fn loss(&self, number: usize, run: &Run<'_>) -> Result<f64, CurveError> {
        let mut sum = 0.0;
        for reference in &self.outputs {
            let Some((_, array)) = run.outputs.iter().find(|(name, _)| *name == reference.name) else { continue };
            let (found, wanted) = (run.values(array), &reference.batches[number]);
            if found.len() != wanted.len() {
                return Err(reference.error(format!("has {} values, {} before the edit", found.len(), wanted.len())));
            }
            sum += match reference.classes {
                Some(classes) => {
                    let rows = wanted.chunks_exact(classes.max(1)).zip(found.chunks_exact(classes.max(1)));
                    rows.map(|(p, q)| eval::kl_divergence(p, q)).sum::<f64>()
                }
                None => {
                    let squares: f64 = wanted.iter().zip(&found).map(|(a, b)| (a - b) * (a - b)).sum();
                    squares / reference.scale * run.count as f64 / wanted.len().max(1) as f64
                }
            };
        }
        Ok(sum)
    }
}

impl Reference {
    fn error(&self, reason: String) -> CurveError {
        CurveError::Output { output: self.name.clone(), reason }
    }
}
