//! Losses, appended behind the model's outputs.
//!
//! Every loss is first one number per sample and then the mean over the batch, or the sum with [`Reduction::Sum`]: that is what
//! per-sample gradients need, since then row b of a gate's gradient is the gradient of sample b alone.
//! Example, ce on logits [B, C]: `mean_b -sum_c onehot(labels)[b, c] * log_softmax(logits)[b, c]`.
//! Invariant: every operator has a CUDA kernel for float32; no size of the batch is written anywhere.

use super::AutodiffError;
use super::interface::{self, Role, declared_dims};
use crate::graph::build::{Builder, attr};
use crate::graph::{AttrValue, DType, Graph, Tensor, ValueId};
use crate::infer::{Dim, Facts};

/// What is minimized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Cross entropy against `labels`, int64 `[B]`.
    Ce,
    /// Cross entropy against the probabilities `target.<output>` `[B, C]`.
    SoftCe,
    /// KL(teacher || student) against the teacher's logits `target.<output>` `[B, C]`.
    Kd,
    /// Squared error against `target.<output>`: mean over each float output, summed over outputs.
    Mse,
    /// 1 - cosine of each row (last axis) with that of `target.<output>`: mean over rows, summed over outputs.
    Cosine,
}

impl Loss {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Loss::Ce | Loss::SoftCe => "ce",
            Loss::Kd => "kd",
            Loss::Mse => "mse",
            Loss::Cosine => "cosine",
        }
    }

    /// Whether it compares class scores [B, C] of one output; the others compare all float outputs.
    fn is_of_classes(self) -> bool {
        matches!(self, Loss::Ce | Loss::SoftCe | Loss::Kd)
    }
}

/// How the samples of a batch make one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// Their mean.
    Mean,
    /// Their sum: then gradients of per-sample gates are those of each sample alone.
    Sum,
}

/// A loss in the graph.
#[derive(Clone, Debug)]
pub struct LossNodes {
    /// Shape: [].
    pub loss: ValueId,
    /// New graph inputs, with what they are for.
    pub inputs: Vec<(ValueId, Role)>,
}

/// Keeps the quotient of the cosine finite for rows of zeros; far below the square of any float32 activation that matters.
const COSINE_EPSILON: f32 = 1e-12;

/// Appends a loss on `outputs`; where that is empty, on the first float output [B, C], or on all float outputs (mse, cosine).
///
/// `facts` hold shapes of the outputs. Errors: an output does not fit, or none does.
pub fn add(
    graph: &mut Graph,
    facts: &Facts,
    loss: Loss,
    outputs: &[ValueId],
    reduction: Reduction,
) -> Result<LossNodes, AutodiffError> {
    let outputs = if outputs.is_empty() { default_outputs(graph, facts, loss)? } else { outputs.to_vec() };
    let mut inputs = Vec::new();
    let mut terms = Vec::new();
    for output in outputs {
        let shape = fitting_shape(graph, facts, loss, output)?;
        let (target, role) = add_target(graph, loss, output, &shape)?;
        inputs.push((target, role));
        let mut b = Builder::new(graph, "loss.");
        let half = facts.get(output).dtype != Some(DType::F32);
        let y = if half { b.cast(output, DType::F32) } else { output };
        let per_sample = match loss {
            Loss::Ce => hard_ce(&mut b, y, target, &shape),
            Loss::SoftCe => soft_ce(&mut b, y, target),
            Loss::Kd => kd(&mut b, y, target),
            Loss::Mse => mse(&mut b, y, target, shape.len()),
            Loss::Cosine => cosine(&mut b, y, target, shape.len()),
        };
        terms.push(match reduction {
            Reduction::Mean => b.reduce_mean(per_sample, &[0], false),
            Reduction::Sum => b.reduce_sum(per_sample, &[0], false),
        });
    }
    let mut b = Builder::new(graph, "loss.");
    let total = terms.into_iter().reduce(|a, t| b.add(a, t)).expect("there is at least one output");
    Ok(LossNodes { loss: total, inputs })
}

fn default_outputs(graph: &Graph, facts: &Facts, loss: Loss) -> Result<Vec<ValueId>, AutodiffError> {
    let float = |v: &&ValueId| facts.get(**v).dtype.is_some_and(DType::is_float);
    let fits = |v: &&ValueId| {
        let rank = facts.get(**v).rank();
        float(v) && if loss.is_of_classes() { rank == Some(2) } else { rank != Some(0) }
    };
    let found = graph.outputs().iter().filter(fits).copied();
    let found: Vec<ValueId> = if loss.is_of_classes() { found.take(1).collect() } else { found.collect() };
    let needs = if loss.is_of_classes() { "a float output of shape [batch, classes]" } else { "a float output" };
    if found.is_empty() { Err(AutodiffError::NoOutput { loss: loss.name(), needs }) } else { Ok(found) }
}

fn fitting_shape(graph: &Graph, facts: &Facts, loss: Loss, output: ValueId) -> Result<Vec<Dim>, AutodiffError> {
    let misfit =
        |reason: String| AutodiffError::LossMisfit { loss: loss.name(), output: graph.value(output).name().to_string(), reason };
    let fact = facts.get(output);
    if !fact.dtype.is_some_and(DType::is_float) {
        return Err(misfit(format!("its type is {}", fact.dtype.map_or("unknown", DType::name))));
    }
    let Some(shape) = &fact.shape else { return Err(misfit("its rank is unknown".into())) };
    if loss.is_of_classes() && shape.len() != 2 {
        return Err(misfit(format!("its shape is {shape:?}, expected [batch, classes]")));
    }
    if shape.is_empty() {
        return Err(misfit("it is a scalar".into()));
    }
    Ok(shape.clone())
}

fn add_target(graph: &mut Graph, loss: Loss, output: ValueId, shape: &[Dim]) -> Result<(ValueId, Role), AutodiffError> {
    if loss == Loss::Ce {
        let labels = interface::add_input(graph, "labels", DType::I64, declared_dims(&shape[..1]))?;
        return Ok((labels, Role::Labels));
    }
    let name = format!("target.{}", graph.value(output).name());
    Ok((interface::add_input(graph, &name, DType::F32, declared_dims(shape))?, Role::Target))
}

fn along(op: &str, b: &mut Builder<'_>, x: ValueId, axis: i64) -> ValueId {
    b.op(op, &[x], vec![attr("axis", AttrValue::Int(axis))])
}

/// `-sum_c onehot(labels) * log_softmax(logits)`. Shape: [B].
fn hard_ce(b: &mut Builder<'_>, logits: ValueId, labels: ValueId, shape: &[Dim]) -> ValueId {
    let depth = match shape[1].known() {
        Some(classes) => b.constant(Tensor::i64_scalar(classes)),
        None => {
            let (sizes, last) = (b.shape_of(logits), b.constant(Tensor::i64_scalar(1)));
            b.gather(sizes, last, 0)
        }
    };
    let off_on = b.constant(Tensor::f32(&[2], &[0.0, 1.0]));
    let one_hot = b.op("OneHot", &[labels, depth, off_on], vec![attr("axis", AttrValue::Int(-1))]);
    soft_ce(b, logits, one_hot)
}

/// `-sum_c target * log_softmax(logits)`. Shape: [B].
fn soft_ce(b: &mut Builder<'_>, logits: ValueId, target: ValueId) -> ValueId {
    let log_p = along("LogSoftmax", b, logits, 1);
    let product = b.mul(target, log_p);
    let sum = b.reduce_sum(product, &[1], false);
    b.neg(sum)
}

/// `sum_c softmax(teacher) * (log_softmax(teacher) - log_softmax(student))`. Shape: [B].
fn kd(b: &mut Builder<'_>, student: ValueId, teacher: ValueId) -> ValueId {
    let (p, log_p) = (along("Softmax", b, teacher, 1), along("LogSoftmax", b, teacher, 1));
    let log_q = along("LogSoftmax", b, student, 1);
    let difference = b.sub(log_p, log_q);
    let product = b.mul(p, difference);
    b.reduce_sum(product, &[1], false)
}

/// `mean (y - target)^2` over all axes but the batch. Shape: [B].
fn mse(b: &mut Builder<'_>, y: ValueId, target: ValueId, rank: usize) -> ValueId {
    let difference = b.sub(y, target);
    let square = b.mul(difference, difference);
    mean_per_sample(b, square, rank)
}

/// `mean_rows 1 - x.t / (|x| |t|)` over the last axis. Shape: [B].
fn cosine(b: &mut Builder<'_>, x: ValueId, t: ValueId, rank: usize) -> ValueId {
    let last = [rank as i64 - 1];
    let mut dot = |a: ValueId, c: ValueId| {
        let product = b.mul(a, c);
        b.reduce_sum(product, &last, false)
    };
    let (xt, xx, tt) = (dot(x, t), dot(x, x), dot(t, t));
    let epsilon = b.scalar(DType::F32, COSINE_EPSILON);
    let squares = b.mul(xx, tt);
    let positive = b.add(squares, epsilon);
    let norms = b.op("Sqrt", &[positive], vec![]);
    let cosine = b.div(xt, norms);
    let one = b.scalar(DType::F32, 1.0);
    let distance = b.sub(one, cosine);
    if rank == 1 { b.unsqueeze(distance, &[0]) } else { mean_per_sample(b, distance, rank - 1) }
}

fn mean_per_sample(b: &mut Builder<'_>, x: ValueId, rank: usize) -> ValueId {
    let axes: Vec<i64> = (1..rank as i64).collect();
    if axes.is_empty() { x } else { b.reduce_mean(x, &axes, false) }
}
