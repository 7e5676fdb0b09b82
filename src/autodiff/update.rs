//! AdamW in the graph, with scaled moments so that a step is few elementwise operators per tensor.
//!
//! With M = m / (1 - b1) and V = v / (1 - b2) the step of AdamW is
//!   `M' = b1 M + g`, `V' = b2 V + g^2`, `w' = c w - a M' / (sqrt V' + e)`,
//!   `a = lr r1 / sqrt r2`, `e = eps / sqrt r2`, `c = 1 - lr wd`, `ri = (1 - bi) / (1 - bi^step)`,
//! where a, c, e are scalars, computed once per step. Moments start as zeros; `step` counts from 1.
//! Vectors (biases, scales, gates) are joined before and split after: two thirds of the tensors, and of the nodes, hold a
//! hundredth of the numbers.
//! Invariant: every new value waits for all reads of the old ones, so it may be written in the same memory: a, or with clipping
//! each gradient, is multiplied by a factor that depends on the global gradient norm, on the loss, and on every other reader of a
//! trained value; moments have no other reader. Without this a runtime may write `next.w` before `dX = dY * W^T` has read `w`.
//! Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, algorithm 2.

use super::AutodiffError;
use super::interface::{self, Role};
use crate::graph::build::{Builder, attr};
use crate::graph::{AttrValue, DType, DeclaredDim, Graph, Id, NodeId, ValueId};

/// Constants of AdamW.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay of what is trained with [`Trained::decay`].
    pub weight_decay: f32,
    /// Gradients are scaled so that their global norm is at most this; `None` for no clipping.
    pub clip_norm: Option<f32>,
}

impl Default for AdamW {
    /// ViT-Slim's search: betas (0.9, 0.999), eps 1e-8, weight decay 1e-3, no clipping.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 1e-3, clip_norm: None }
    }
}

/// One tensor to be updated.
#[derive(Clone, Debug)]
pub struct Trained {
    /// A graph input; float32.
    pub value: ValueId,
    /// Its gradient, of the same shape.
    pub grad: ValueId,
    /// Its shape.
    pub dims: Vec<usize>,
    /// Whether weight decay applies.
    pub decay: bool,
    /// Whether the new value is at least 0.
    pub at_least_zero: bool,
}

/// What an optimizer adds to the graph's interface.
#[derive(Clone, Debug, Default)]
pub struct Update {
    /// `lr`, `step`, `adam.m.<x>`, `adam.v.<x>`.
    pub inputs: Vec<(ValueId, Role)>,
    /// `grad.norm` (before clipping), `next.<x>`, `next.adam.m.<x>`, `next.adam.v.<x>`.
    pub outputs: Vec<ValueId>,
}

/// Keeps `clip / norm` finite at norm 0.
const NORM_EPSILON: f32 = 1e-6;

/// Scalars that all updates share.
struct Step {
    beta1: ValueId,
    beta2: ValueId,
    /// a, c and e of the module's formula.
    a: ValueId,
    c: ValueId,
    e: ValueId,
    zero: ValueId,
    /// What gradients are multiplied by, where they are clipped; else it is in a.
    clip: Option<ValueId>,
}

/// Tensors that are updated as one: a tensor alone, or vectors joined.
struct Bundle<'a> {
    members: Vec<&'a Trained>,
    /// The gradient of all.
    grad: ValueId,
}

impl Bundle<'_> {
    /// `joined` in parts of the members' sizes.
    fn split(&self, graph: &mut Graph, joined: ValueId) -> Vec<ValueId> {
        if self.members.len() == 1 {
            return vec![joined];
        }
        let mut b = Builder::new(graph, "adam.");
        let sizes: Vec<i64> = self.members.iter().map(|t| t.dims.iter().product::<usize>() as i64).collect();
        let axis = attr("axis", AttrValue::Int(0));
        if b.opset() >= 13 {
            let count = sizes.len();
            let sizes = b.ints(&sizes);
            return b.ops("Split", &[joined, sizes], vec![axis], count);
        }
        b.ops("Split", &[joined], vec![axis, attr("split", AttrValue::Ints(sizes.clone()))], sizes.len())
    }
}

fn join(graph: &mut Graph, values: &[ValueId]) -> ValueId {
    match values {
        [one] => *one,
        _ => Builder::new(graph, "adam.").concat(values, 0),
    }
}

/// Vectors together, by what applies to them; everything else alone.
fn bundles<'a>(graph: &mut Graph, trained: &'a [Trained]) -> Vec<Bundle<'a>> {
    let mut joined: Vec<Vec<&Trained>> = Vec::new();
    for t in trained {
        let like = |o: &Trained| (o.dims.len(), o.decay, o.at_least_zero) == (1, t.decay, t.at_least_zero);
        match joined.iter_mut().find(|members| t.dims.len() == 1 && members.iter().all(|o| like(o))) {
            Some(members) => members.push(t),
            None => joined.push(vec![t]),
        }
    }
    let bundle = |members: Vec<&'a Trained>| {
        let grads: Vec<ValueId> = members.iter().map(|t| t.grad).collect();
        Bundle { grad: join(graph, &grads), members }
    };
    joined.into_iter().map(bundle).collect()
}

/// Appends one step of AdamW for all of `trained`. Nodes that no output needs must be gone before.
///
/// Inputs `lr` and `step` are float32 scalars. Errors: a name is taken.
pub fn add(graph: &mut Graph, adam: &AdamW, loss: ValueId, trained: &[Trained]) -> Result<Update, AutodiffError> {
    let mut update = Update::default();
    let lr = interface::add_input(graph, "lr", DType::F32, vec![])?;
    let step = interface::add_input(graph, "step", DType::F32, vec![])?;
    update.inputs.extend([(lr, Role::Scalar), (step, Role::Scalar)]);
    let bundles = bundles(graph, trained);
    let norm = global_norm(graph, &bundles);
    let factor = factor(graph, adam, norm, loss, trained);
    update.outputs.push(interface::add_output(graph, norm, "grad.norm", vec![])?);
    let step = step_scalars(graph, adam, lr, step, factor);
    for bundle in &bundles {
        add_one(graph, &step, bundle, adam.weight_decay > 0.0, &mut update)?;
    }
    Ok(update)
}

/// `sqrt(sum of squares of all gradients)`. Shape: [].
fn global_norm(graph: &mut Graph, bundles: &[Bundle<'_>]) -> ValueId {
    let mut b = Builder::new(graph, "adam.");
    let no_keep = || vec![attr("keepdims", AttrValue::Int(0))];
    let squares: Vec<ValueId> = bundles.iter().map(|t| b.op("ReduceSumSquare", &[t.grad], no_keep())).collect();
    let total = match squares[..] {
        [] => b.scalar(DType::F32, 0.0),
        [one] => one,
        _ => b.op("Sum", &squares, vec![]),
    };
    b.op("Sqrt", &[total], vec![])
}

/// `min(1, clip / (norm + 1e-6)) + 0 * loss + 0 * (every reader of a trained value that neither waits for)`.
fn factor(graph: &mut Graph, adam: &AdamW, norm: ValueId, loss: ValueId, trained: &[Trained]) -> ValueId {
    let readers = late_readers(graph, &[norm, loss], trained);
    let mut b = Builder::new(graph, "adam.");
    let (one, clip) = (b.scalar(DType::F32, 1.0), b.scalar(DType::F32, adam.clip_norm.unwrap_or(f32::MAX)));
    let (epsilon, zero) = (b.scalar(DType::F32, NORM_EPSILON), b.scalar(DType::F32, 0.0));
    let positive = b.add(norm, epsilon);
    let ratio = b.div(clip, positive);
    let mut factor = b.op("Min", &[one, ratio], vec![]);
    let mut waits = vec![loss];
    for reader in readers {
        let out = b.graph.node(reader).outputs().iter().flatten().next().copied();
        waits.extend(out.map(|v| {
            let float = b.cast(v, DType::F32);
            b.op("ReduceSum", &[float], vec![attr("keepdims", AttrValue::Int(0))])
        }));
    }
    for wait in waits {
        let nothing = b.mul(wait, zero);
        factor = b.add(factor, nothing);
    }
    factor
}

/// Nodes that read a trained value and that none of `known` waits for.
fn late_readers(graph: &Graph, known: &[ValueId], trained: &[Trained]) -> Vec<NodeId> {
    let mut waited = vec![false; graph.node_capacity()];
    let mut stack: Vec<ValueId> = known.to_vec();
    while let Some(v) = stack.pop() {
        if let Some((id, _)) = graph.value(v).producer()
            && !std::mem::replace(&mut waited[id.index()], true)
        {
            stack.extend(graph.node(id).inputs().iter().flatten().chain(graph.node(id).captures()));
        }
    }
    let readers = trained.iter().flat_map(|t| graph.value(t.value).users()).map(|u| u.node);
    let late: std::collections::BTreeSet<NodeId> = readers.filter(|id| !waited[id.index()]).collect();
    late.into_iter().collect()
}

/// The scalars of a step. `1 - b^t = 2 h / (1 + h)` with `h = tanh(-t ln(b) / 2)`, which loses nothing where b^t is near 1.
fn step_scalars(graph: &mut Graph, adam: &AdamW, lr: ValueId, step: ValueId, factor: ValueId) -> Step {
    let mut b = Builder::new(graph, "adam.");
    let (one, two) = (b.scalar(DType::F32, 1.0), b.scalar(DType::F32, 2.0));
    let mut correction = |beta: f32| {
        let half_rate = b.scalar(DType::F32, (-f64::from(beta).ln() / 2.0) as f32);
        let t = b.mul(step, half_rate);
        let h = b.op("Tanh", &[t], vec![]);
        let (above, below) = (b.mul(h, two), b.add(h, one));
        let bias = b.div(above, below);
        let rest = b.scalar(DType::F32, (1.0 - f64::from(beta)) as f32);
        b.div(rest, bias)
    };
    let (r1, r2) = (correction(adam.beta1), correction(adam.beta2));
    let root = b.op("Sqrt", &[r2], vec![]);
    let rate = b.mul(lr, r1);
    let epsilon = b.scalar(DType::F32, adam.epsilon);
    let decay = b.scalar(DType::F32, adam.weight_decay);
    let shrink = b.mul(lr, decay);
    let a = b.div(rate, root);
    let clips = adam.clip_norm.is_some();
    Step {
        a: if clips { a } else { b.mul(a, factor) },
        e: b.div(epsilon, root),
        c: b.sub(one, shrink),
        beta1: b.scalar(DType::F32, adam.beta1),
        beta2: b.scalar(DType::F32, adam.beta2),
        zero: b.scalar(DType::F32, 0.0),
        clip: clips.then_some(factor),
    }
}

fn add_one(graph: &mut Graph, s: &Step, bundle: &Bundle<'_>, decays: bool, update: &mut Update) -> Result<(), AutodiffError> {
    let mut moments = |graph: &mut Graph, what: &str| -> Result<ValueId, AutodiffError> {
        let mut inputs = Vec::with_capacity(bundle.members.len());
        for t in &bundle.members {
            let name = format!("adam.{what}.{}", graph.value(t.value).name());
            inputs.push(interface::add_input(graph, &name, DType::F32, dims(t))?);
        }
        update.inputs.extend(inputs.iter().map(|v| (*v, Role::Moment)));
        Ok(join(graph, &inputs))
    };
    let (m, v) = (moments(graph, "m")?, moments(graph, "v")?);
    let values: Vec<ValueId> = bundle.members.iter().map(|t| t.value).collect();
    let value = join(graph, &values);
    let mut b = Builder::new(graph, "adam.");
    let g = s.clip.map_or(bundle.grad, |factor| b.mul(bundle.grad, factor));
    let old_m = b.mul(m, s.beta1);
    let next_m = b.add(old_m, g);
    let old_v = b.mul(v, s.beta2);
    let square = b.mul(g, g);
    let next_v = b.add(old_v, square);
    let root = b.op("Sqrt", &[next_v], vec![]);
    let divisor = b.add(root, s.e);
    let direction = b.div(next_m, divisor);
    let move_by = b.mul(direction, s.a);
    let kept = if decays && bundle.members[0].decay { b.mul(value, s.c) } else { value };
    let mut next = b.sub(kept, move_by);
    if bundle.members[0].at_least_zero {
        next = b.op("Max", &[next, s.zero], vec![]);
    }
    for (joined, what) in [(next, ""), (next_m, "adam.m."), (next_v, "adam.v.")] {
        for (part, t) in bundle.split(graph, joined).into_iter().zip(&bundle.members) {
            let name = format!("next.{what}{}", graph.value(t.value).name());
            update.outputs.push(interface::add_output(graph, part, &name, dims(t))?);
        }
    }
    Ok(())
}

fn dims(t: &Trained) -> Vec<DeclaredDim> {
    t.dims.iter().map(|d| DeclaredDim::Size(*d as i64)).collect()
}
