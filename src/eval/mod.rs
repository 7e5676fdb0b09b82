//! A model on data: accuracy with its confidence interval, and how far its outputs are from a reference's.
//!
//! Example: 1,965 of 2,000 digits right are 98.25 % with the interval 97.58 % to 98.74 % (Wilson, 95 %).
//! In: a session of the model, perhaps one of a reference, and data. Out: [`Evaluation`], numbers only.

mod measure;

pub use measure::{Accuracy, argmax, kl_divergence, wilson};

use crate::data::{self, Array, Batch, BatchOrder, DataError, Dataset};
use crate::graph::{DeclaredDim, Graph};
use crate::infer::Facts;
use crate::runtime::{self, Session};
use std::sync::atomic::{AtomicBool, Ordering};

/// Why a model could not be evaluated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The engine.
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
    /// No output holds class scores.
    #[error("the model has no float output [batch, classes]; its outputs are {outputs}")]
    NoClasses {
        /// Names and shapes.
        outputs: String,
    },
    /// The output asked for is not there, or has another shape than the reference's.
    #[error("output '{output}': {reason}")]
    Output {
        /// Its name.
        output: String,
        /// What is wrong.
        reason: String,
    },
    /// The stop flag was set.
    #[error("interrupted")]
    Interrupted,
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Samples.
    pub n: u64,
    /// Top-1 against the labels, where there are labels.
    pub accuracy: Option<Accuracy>,
    /// Mean over samples of KL(reference || model) of the class probabilities, where there is a reference; NaN where an output is
    /// not finite. Unit: nats.
    pub kl: Option<f64>,
    /// Samples on which model and reference name the same class, where there is a reference.
    pub agreement: Option<Accuracy>,
}

/// How to evaluate.
#[derive(Clone, Debug)]
pub struct EvalOptions {
    /// Samples of one run.
    pub batch: usize,
    /// Whether every run must have exactly that many, because the model's batch is fixed: the last is filled up with repeats, which
    /// do not count.
    pub is_batch_fixed: bool,
    /// Threads that load data.
    pub loaders: usize,
    /// The output with class scores; else the first float output [batch, classes].
    pub output: Option<String>,
}

impl Default for EvalOptions {
    fn default() -> Self {
        Self { batch: 64, is_batch_fixed: false, loaders: 2, output: None }
    }
}

/// Runs the model, and the reference beside it, over all of the data in its order.
///
/// Errors: [`EvalError`].
pub fn evaluate(
    model: &mut dyn Session,
    mut reference: Option<&mut dyn Session>,
    data: &Dataset,
    options: &EvalOptions,
    stop: &AtomicBool,
) -> Result<Evaluation, EvalError> {
    let mut right = Accuracy { correct: 0, n: 0 };
    let mut agree = right;
    let (mut n, mut kl) = (0u64, 0.0f64);
    for batch in data.batches(BatchOrder::default(), options.batch, options.loaders, None) {
        if stop.load(Ordering::Relaxed) {
            return Err(EvalError::Interrupted);
        }
        let batch = batch?;
        let feeds = if options.is_batch_fixed { filled(&batch, options.batch) } else { batch.inputs.clone() };
        let scores = class_scores(model.run(&feeds)?, options.output.as_deref())?;
        n += batch.count as u64;
        if let Some(labels) = &batch.labels {
            right.n += batch.count as u64;
            right.correct += scores.rows(batch.count).zip(labels).filter(|(row, l)| argmax(row) as i64 == **l).count() as u64;
        }
        if let Some(reference) = reference.as_deref_mut() {
            let other = class_scores(reference.run(&feeds)?, options.output.as_deref())?;
            if other.classes != scores.classes {
                let reason = format!("{} classes, the reference has {}", scores.classes, other.classes);
                return Err(EvalError::Output { output: scores.name, reason });
            }
            agree.n += batch.count as u64;
            for (row, wanted) in scores.rows(batch.count).zip(other.rows(batch.count)) {
                kl += kl_divergence(wanted, row);
                agree.correct += u64::from(argmax(row) == argmax(wanted));
            }
        }
    }
    let has_reference = reference.is_some() && n > 0;
    Ok(Evaluation {
        n,
        accuracy: (right.n > 0).then_some(right),
        // Rounding can leave a sum of zeros slightly negative; `max` would hide NaN.
        kl: has_reference.then(|| kl / n as f64).map(|kl| if kl < 0.0 { 0.0 } else { kl }),
        agreement: has_reference.then_some(agree),
    })
}

/// Class scores of a batch, row by row.
struct Scores {
    name: String,
    classes: usize,
    values: Vec<f64>,
}

impl Scores {
    fn rows(&self, count: usize) -> impl Iterator<Item = &[f64]> {
        self.values.chunks_exact(self.classes.max(1)).take(count)
    }
}

fn class_scores(outputs: Vec<(String, Array)>, wanted: Option<&str>) -> Result<Scores, EvalError> {
    let holds_scores = |array: &Array| array.dims.len() == 2 && array.data.kind().is_float();
    let shapes = || outputs.iter().map(|(n, a)| format!("{n} {:?}", a.dims)).collect::<Vec<_>>().join(", ");
    let found = match wanted {
        None => outputs.iter().find(|(_, a)| holds_scores(a)).ok_or_else(|| EvalError::NoClasses { outputs: shapes() })?,
        Some(name) => {
            let error = |reason: String| EvalError::Output { output: name.to_string(), reason };
            let found = outputs
                .iter()
                .find(|(n, _)| n == name)
                .ok_or_else(|| error(format!("is not there; the model has {}", shapes())))?;
            if !holds_scores(&found.1) {
                return Err(error(format!("is {:?}, expected floats [batch, classes]", found.1.dims)));
            }
            found
        }
    };
    Ok(Scores { name: found.0.clone(), classes: found.1.dims[1], values: found.1.as_f32().into_iter().map(f64::from).collect() })
}

/// The batch filled up to `size` with repeats of its first sample.
pub(crate) fn filled(batch: &Batch, size: usize) -> Vec<(String, Array)> {
    let missing = size.saturating_sub(batch.count);
    let fill = |array: &Array| {
        let rows = (0..batch.count).chain(std::iter::repeat_n(0, missing)).filter_map(|i| array.row(i));
        Array::stack(rows.collect()).unwrap_or_else(|| array.clone())
    };
    batch.inputs.iter().map(|(name, array)| (name.clone(), if missing == 0 { array.clone() } else { fill(array) })).collect()
}

/// A model's inputs, as data is opened for them. Types that data cannot have are left out.
pub fn data_inputs(graph: &Graph) -> Vec<data::InputSpec> {
    let inputs = graph.inputs().iter().filter_map(|v| {
        let value = graph.value(*v);
        let declared = value.declared()?;
        let kind = runtime::kind_of(declared.dtype?)?;
        let size = |d: &DeclaredDim| match d {
            DeclaredDim::Size(n) => usize::try_from(*n).ok(),
            DeclaredDim::Symbol(_) => None,
        };
        let dims = declared.dims.as_ref()?.iter().map(size).collect();
        Some(data::InputSpec { name: value.name().to_string(), dims, kind })
    });
    inputs.collect()
}

/// The batch that a model is fixed to: the leading size of its first input that has one; `None` where that is a symbol.
pub fn fixed_batch(graph: &Graph, facts: &Facts) -> Option<usize> {
    graph.inputs().iter().find_map(|v| facts.shape(*v)?.first())?.size()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ArrayData;
    use crate::runtime::{Device, DeviceInUse};

    /// Gives logits that are the input, [B, 2].
    struct Echo(DeviceInUse);

    impl Session for Echo {
        fn run(&mut self, feeds: &[(String, Array)]) -> Result<Vec<(String, Array)>, runtime::Error> {
            Ok(vec![("y".to_string(), feeds[0].1.clone())])
        }
        fn version(&self) -> String {
            "0".to_string()
        }
        fn device(&self) -> &DeviceInUse {
            &self.0
        }
    }

    #[test]
    fn a_batch_is_filled_to_the_size_that_a_model_is_fixed_to() {
        let input = Array { dims: vec![2, 2], data: ArrayData::F32(vec![1.0, 2.0, 3.0, 4.0]) };
        let batch = Batch {
            inputs: vec![("x".to_string(), input)],
            labels: None,
            count: 2,
            samples: vec![0, 1],
            next_slot: 2,
            skipped: Vec::new(),
        };
        let full = filled(&batch, 3);
        assert_eq!((full[0].1.dims.clone(), full[0].1.as_f32()), (vec![3, 2], vec![1.0, 2.0, 3.0, 4.0, 1.0, 2.0]));
        let mut echo = Echo(DeviceInUse { device: Device::Cpu, why_not_cuda: None });
        let scores = class_scores(echo.run(&full).expect("it runs"), None).expect("it has classes");
        assert_eq!(scores.rows(batch.count).count(), 2);
        assert!(matches!(class_scores(echo.run(&full).expect("it runs"), Some("z")), Err(EvalError::Output { .. })));
    }
}
