//! How OUT does on data, beside MODEL: agreement with it, and accuracy where there are labels.
//!
//! Example: 500 labelled images give KL divergence and top-1 agreement of both models' outputs, top-1 accuracy of each, and 95 %
//! intervals, which the floors are then compared with. This is the other question than exactness: the weights were changed on
//! purpose, so no tolerance of arithmetic applies.
//!
//! Invariant: n counts samples that both models were run on in this call.

use serde::Serialize;

use crate::data::array::Array;
use crate::data::{Batch, DataError};
use crate::eval::{argmax, kl_divergence, wilson};
use crate::runtime::{Error as RuntimeError, Session};

/// What OUT must reach.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Floors {
    /// Least top-1 accuracy of OUT, as a fraction.
    pub min_accuracy: Option<f64>,
    /// Greatest loss of top-1 accuracy against MODEL. Unit: percentage points.
    pub max_drop_points: Option<f64>,
}

impl Floors {
    /// Whether there is any.
    pub fn is_some(&self) -> bool {
        self.min_accuracy.is_some() || self.max_drop_points.is_some()
    }
}

/// Agreement and accuracy on data.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Accuracy {
    /// Samples.
    pub n: usize,
    /// Mean KL divergence of OUT's softmax from MODEL's. Unit: nats. `None` where an output is not finite.
    pub kl: Option<f64>,
    /// Share of samples with the same greatest entry.
    pub top1_agreement: f64,
    /// Its 95 % interval (Wilson).
    pub top1_agreement_ci95: [f64; 2],
    /// Accuracies, where the data has labels and the output is one row per sample.
    pub top1: Option<Top1>,
    /// Whether the floors hold and all outputs are numbers.
    pub pass: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Top-1 accuracy of both models.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Top1 {
    /// MODEL's, as a fraction.
    pub before: f64,
    /// OUT's, as a fraction.
    pub after: f64,
    /// The 95 % interval of OUT's (Wilson).
    pub after_ci95: [f64; 2],
    /// What is lost. Unit: percentage points.
    pub drop_points: f64,
}

/// Why accuracy could not be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AccuracyError {
    /// The engine.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A floor is set, and nothing says what is right.
    #[error("--min-accuracy and --max-drop need labelled data and an output [n, classes]")]
    NoLabels,
    /// No samples.
    #[error("the data has no samples")]
    NoSamples,
    /// No output that could be compared.
    #[error("the model has no output '{name}' of floats with at least two entries a row")]
    NoOutput {
        /// The output asked for, or empty.
        name: String,
    },
}

/// Sums over samples.
#[derive(Default)]
struct Sums {
    n: usize,
    kl: f64,
    agree: f64,
    is_finite: bool,
    labelled: usize,
    right: [usize; 2],
}

/// Rows of one output: `rows` per sample, each of `classes`.
struct Logits {
    values: Vec<f64>,
    rows: usize,
    classes: usize,
}

/// Runs both models on all batches and compares their output `output` (the first that fits, where `None`).
///
/// `sessions`: MODEL's and OUT's. `fixed` is the batch size that the models insist on; smaller last parts are filled up with
/// copies, which are not counted.
///
/// Errors: of the engine and the data; floors without labels.
pub fn measure(
    sessions: [&mut dyn Session; 2],
    batches: &mut dyn Iterator<Item = Result<Batch, DataError>>,
    output: Option<&str>,
    fixed: Option<usize>,
    floors: &Floors,
) -> Result<Accuracy, AccuracyError> {
    let [model, out] = sessions;
    let mut sums = Sums { is_finite: true, ..Sums::default() };
    for batch in batches {
        let batch = batch?;
        let step = fixed.unwrap_or(batch.count).max(1);
        for start in (0..batch.count).step_by(step) {
            let count = step.min(batch.count - start);
            let feeds = part(&batch, start, count, step);
            let (a, b) = (logits(model.run(&feeds)?, output)?, logits(out.run(&feeds)?, output)?);
            sums.add(&a, &b, count, batch.labels.as_deref().and_then(|l| l.get(start..start + count)));
        }
    }
    sums.finish(floors)
}

/// Samples `start .. start + count`, filled up to `size` with copies of the last.
fn part(batch: &Batch, start: usize, count: usize, size: usize) -> Vec<(String, Array)> {
    let rows = |array: &Array| {
        let parts: Vec<Array> = (0..size).filter_map(|i| array.row(start + i.min(count - 1))).collect();
        Array::stack(parts).unwrap_or_else(|| array.clone())
    };
    batch.inputs.iter().map(|(name, array)| (name.clone(), rows(array))).collect()
}

fn logits(outputs: Vec<(String, Array)>, wanted: Option<&str>) -> Result<Logits, AccuracyError> {
    let fits =
        |a: &Array| a.data.kind().is_float() && a.dims.len() >= 2 && a.dims.last().is_some_and(|c| *c >= 2) && !a.is_empty();
    let found = outputs.into_iter().find(|(name, array)| wanted.is_none_or(|w| w == name) && fits(array));
    let Some((_, array)) = found else {
        return Err(AccuracyError::NoOutput { name: wanted.unwrap_or_default().to_string() });
    };
    let classes = array.dims[array.dims.len() - 1];
    let rows = array.dims[1..array.dims.len() - 1].iter().product();
    Ok(Logits { values: array.as_f32().into_iter().map(f64::from).collect(), rows, classes })
}

impl Sums {
    fn add(&mut self, a: &Logits, b: &Logits, count: usize, labels: Option<&[i64]>) {
        let size = a.rows * a.classes;
        self.is_finite &= a.values.iter().chain(&b.values).all(|x| x.is_finite()) && a.values.len() == b.values.len();
        if size == 0 || a.values.len() < count * size || b.values.len() != a.values.len() {
            self.is_finite = false;
            return;
        }
        let samples = a.values.chunks_exact(size).zip(b.values.chunks_exact(size)).take(count);
        for (i, (p, q)) in samples.enumerate() {
            self.n += 1;
            for (p, q) in p.chunks_exact(a.classes).zip(q.chunks_exact(a.classes)) {
                self.kl += kl_divergence(p, q) / a.rows as f64;
                self.agree += f64::from(u8::from(argmax(p) == argmax(q))) / a.rows as f64;
            }
            if let Some(label) = labels.and_then(|l| l.get(i)).filter(|_| a.rows == 1) {
                self.labelled += 1;
                self.right[0] += usize::from(argmax(p) as i64 == *label);
                self.right[1] += usize::from(argmax(q) as i64 == *label);
            }
        }
    }

    fn finish(self, floors: &Floors) -> Result<Accuracy, AccuracyError> {
        if self.n == 0 && self.is_finite {
            return Err(AccuracyError::NoSamples);
        }
        let n = self.n as f64;
        let top1 = (self.labelled > 0 && self.labelled == self.n).then(|| {
            let [before, after] = self.right.map(|r| r as f64 / n);
            Top1 { before, after, after_ci95: wilson(after, self.n as u64).into(), drop_points: (before - after) * 100.0 }
        });
        let top1_agreement = if self.n > 0 { (self.agree / n).min(1.0) } else { 0.0 };
        let reason = match (&top1, self.is_finite) {
            (_, false) => Some("an output is not finite, or has other dims".to_string()),
            (None, true) if floors.is_some() => return Err(AccuracyError::NoLabels),
            (None, true) => None,
            (Some(top1), true) => below(top1, floors, self.n),
        };
        Ok(Accuracy {
            n: self.n,
            // Rounding can leave a sum of zeros slightly negative.
            kl: self.is_finite.then(|| (self.kl / n).max(0.0)),
            top1_agreement,
            top1_agreement_ci95: wilson(top1_agreement, self.n as u64).into(),
            top1,
            pass: reason.is_none(),
            reason,
        })
    }
}

/// Which floor is missed, in numbers.
fn below(top1: &Top1, floors: &Floors, n: usize) -> Option<String> {
    let [low, high] = top1.after_ci95.map(|x| x * 100.0);
    let measured = format!("{:.2} % of {n} (95 %: {low:.2} to {high:.2})", top1.after * 100.0);
    if let Some(floor) = floors.min_accuracy.filter(|f| top1.after < *f) {
        return Some(format!("top-1 accuracy is {measured}, the floor is {:.2} %", floor * 100.0));
    }
    let most = floors.max_drop_points.filter(|p| top1.drop_points > *p)?;
    Some(format!("top-1 accuracy fell by {:.2} points to {measured}, at most {most:.2} are allowed", top1.drop_points))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums(right: [usize; 2]) -> Sums {
        Sums { n: 100, is_finite: true, labelled: 100, right, agree: 97.0, kl: 1.0 }
    }

    #[test]
    fn floors_are_compared_with_the_measured_numbers() {
        let cases = [
            (None, None, true),
            (Some(0.9), None, true),
            (Some(0.91), None, false),
            (None, Some(5.0), true),
            (None, Some(4.9), false),
        ];
        for (min_accuracy, max_drop_points, pass) in cases {
            let found = sums([95, 90]).finish(&Floors { min_accuracy, max_drop_points }).unwrap();
            assert_eq!(found.pass, pass, "{min_accuracy:?} {max_drop_points:?} {:?}", found.reason);
            assert_eq!((found.n, found.kl, found.top1_agreement), (100, Some(0.01), 0.97));
        }
        let floors = Floors { min_accuracy: Some(0.5), max_drop_points: None };
        assert!(matches!(Sums { labelled: 0, ..sums([0, 0]) }.finish(&floors), Err(AccuracyError::NoLabels)));
        assert!(matches!(Sums { is_finite: true, ..Sums::default() }.finish(&floors), Err(AccuracyError::NoSamples)));
        assert!(!Sums { is_finite: false, ..sums([1, 1]) }.finish(&Floors::default()).unwrap().pass);
    }
}
