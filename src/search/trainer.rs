//! A training session: the step graph in ONNX Runtime, its state, and the teacher that makes targets.
//!
//! Only batches, labels, targets and scalars go in, and a few numbers come out; see [`BoundSession`].

use super::SearchError;
use super::step::{StateTensor, StepGraph};
use crate::data::{Array, ArrayData, Batch};
use crate::graph::Graph;
use crate::runtime::{self, BoundSession, DeviceInUse, RuntimeName, Session, SessionOptions, StateSpec};
use crate::supernet::{GateInput, Param};
use std::collections::BTreeMap;

/// Numbers of one step.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct StepNumbers {
    pub(crate) loss: f64,
    pub(crate) task: f64,
    pub(crate) l1: f64,
    pub(crate) norm: f64,
    /// Share of gates near zero by kind, after the step.
    pub(crate) near_zero: BTreeMap<String, f64>,
}

/// Makes the targets of a batch.
pub(crate) struct Teacher {
    session: Box<dyn Session>,
    /// Share of the labels in the targets: above 0, targets are probabilities, else the teacher's outputs as they are.
    label_share: f64,
}

impl Teacher {
    pub(crate) fn open(graph: &Graph, options: &SessionOptions, label_share: f64) -> Result<Self, SearchError> {
        let session = runtime::open_graph(RuntimeName::Ort, graph, options)?;
        Ok(Self { session, label_share })
    }

    /// The target of each name `target.<output>`.
    fn targets(&mut self, batch: &Batch, names: &[String]) -> Result<Vec<(String, Array)>, SearchError> {
        let outputs = self.session.run(&batch.inputs)?;
        let mut targets = Vec::with_capacity(names.len());
        for name in names {
            let output = name.strip_prefix("target.").unwrap_or(name);
            let found = outputs.iter().find(|(n, _)| n == output);
            let (_, array) =
                found.ok_or_else(|| SearchError::Unsuitable { what: format!("the teacher has no output '{output}'") })?;
            let mut values = array.as_f32();
            if self.label_share > 0.0 {
                let labels = batch.labels.as_deref().unwrap_or_default();
                mix_labels(&mut values, array.dims.last().copied().unwrap_or(1), labels, self.label_share);
            }
            targets.push((name.clone(), Array { dims: array.dims.clone(), data: ArrayData::F32(values) }));
        }
        Ok(targets)
    }
}

/// Rows of logits become `(1 - share) softmax(logits) + share onehot(label)`.
fn mix_labels(rows: &mut [f32], classes: usize, labels: &[i64], share: f64) {
    for (i, row) in rows.chunks_exact_mut(classes.max(1)).enumerate() {
        let most = row.iter().fold(f64::NEG_INFINITY, |a, x| a.max(f64::from(*x)));
        let exps: Vec<f64> = row.iter().map(|x| (f64::from(*x) - most).exp()).collect();
        let sum: f64 = exps.iter().sum();
        let label = labels.get(i).and_then(|l| usize::try_from(*l).ok());
        for (c, (x, e)) in row.iter_mut().zip(&exps).enumerate() {
            *x = ((1.0 - share) * e / sum + if label == Some(c) { share } else { 0.0 }) as f32;
        }
    }
}

/// State by name, as float32.
pub(crate) type State = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A training graph that runs.
pub(crate) struct Trainer {
    bound: BoundSession,
    teacher: Option<Teacher>,
    state: Vec<StateTensor>,
    pub(crate) gates: Vec<GateInput>,
    pub(crate) params: Vec<Param>,
    fetch: Vec<String>,
    pub(crate) accumulate: usize,
    targets: Vec<String>,
    has_labels: bool,
}

fn scalar(value: f64) -> Array {
    Array { dims: Vec::new(), data: ArrayData::F32(vec![value as f32]) }
}

impl Trainer {
    /// Opens the graph with its first state, or with `from` where a run goes on.
    pub(crate) fn new(
        mut graph: StepGraph,
        options: &SessionOptions,
        teacher: Option<Teacher>,
        mut from: Option<State>,
    ) -> Result<Self, SearchError> {
        let mut specs = Vec::with_capacity(graph.state.len());
        for t in &mut graph.state {
            let saved = from.as_mut().filter(|_| t.kept).map(|state| {
                let found = state.remove(&t.name).filter(|(dims, _)| *dims == t.dims);
                found.ok_or_else(|| SearchError::internal(format!("the checkpoint has no '{}' {:?}", t.name, t.dims)))
            });
            // Taken, not copied: the session is to hold the only one.
            let first = t.initial.take();
            let values = match saved {
                Some(saved) => saved?.1,
                None => first.unwrap_or_else(|| vec![0.0; t.dims.iter().product()]),
            };
            let initial = Array { dims: t.dims.clone(), data: ArrayData::F32(values) };
            specs.push(StateSpec { input: t.name.clone(), output: t.changes.then(|| format!("next.{}", t.name)), initial });
        }
        let bound = BoundSession::new(&graph.bytes, options, specs, &graph.fetch)?;
        let StepGraph { bytes: _, state, gates, params, fetch, accumulate, targets, has_labels } = graph;
        Ok(Self { bound, teacher, state, gates, params, fetch, accumulate, targets, has_labels })
    }

    /// Sets scalars that stay as they are: `l1.<kind>`.
    pub(crate) fn set_scalar(&mut self, name: &str, value: f64) -> Result<(), SearchError> {
        Ok(self.bound.set_feed(name, &scalar(value))?)
    }

    /// One step on `accumulate` batches.
    pub(crate) fn step(&mut self, batches: &[Batch], step: u64, lr: f64) -> Result<StepNumbers, SearchError> {
        self.set_scalar("lr", lr)?;
        self.set_scalar("step", step as f64)?;
        let mut sum = StepNumbers::default();
        for (i, batch) in batches.iter().enumerate() {
            if self.accumulate > 1 {
                self.set_scalar("keep", if i == 0 { 0.0 } else { 1.0 })?;
                self.set_scalar("apply", if i + 1 == batches.len() { 1.0 } else { 0.0 })?;
            }
            self.feed(batch)?;
            let fetched = self.bound.step()?;
            let share = 1.0 / batches.len() as f64;
            for (name, array) in fetched {
                let value = array.as_f32().first().copied().map_or(f64::NAN, f64::from);
                match name.as_str() {
                    "loss" => sum.loss += value * share,
                    "loss.task" => sum.task += value * share,
                    "loss.l1" => sum.l1 += value * share,
                    "grad.norm" => sum.norm = value,
                    other => {
                        let kind = other.strip_prefix("near_zero.").unwrap_or(other);
                        sum.near_zero.insert(kind.to_string(), value);
                    }
                }
            }
        }
        debug_assert!(self.fetch.len() >= 4, "the four losses are always fetched");
        Ok(sum)
    }

    fn feed(&mut self, batch: &Batch) -> Result<(), SearchError> {
        for (name, array) in &batch.inputs {
            self.bound.set_feed(name, array)?;
        }
        if self.has_labels {
            let labels = batch.labels.clone().ok_or_else(|| SearchError::internal("a batch has no labels"))?;
            self.bound.set_feed("labels", &Array { dims: vec![batch.count], data: ArrayData::I64(labels) })?;
        }
        if let Some(teacher) = &mut self.teacher {
            for (name, array) in teacher.targets(batch, &self.targets)? {
                self.bound.set_feed(&name, &array)?;
            }
        }
        Ok(())
    }

    /// One tensor of the state.
    pub(crate) fn read(&self, name: &str) -> Result<Vec<f32>, SearchError> {
        Ok(self.bound.read_state(name)?.as_f32())
    }

    /// Shapes of what a checkpoint holds, by name.
    pub(crate) fn kept(&self) -> BTreeMap<String, Vec<usize>> {
        self.state.iter().filter(|t| t.kept).map(|t| (t.name.clone(), t.dims.clone())).collect()
    }

    /// Whether a moving average of this gate or weight is kept.
    pub(crate) fn averaged(&self, name: &str) -> Option<String> {
        let ema = format!("ema.{name}");
        self.state.iter().any(|t| t.name == ema).then_some(ema)
    }

    /// Where it runs.
    pub(crate) fn device(&self) -> &DeviceInUse {
        self.bound.device()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_mixed_into_probabilities() {
        let mut rows = vec![0.0, 0.0, 1000.0, 0.0];
        mix_labels(&mut rows, 2, &[1, 1], 0.25);
        assert_eq!(rows, vec![0.375, 0.625, 0.75, 0.25]);
    }
}
