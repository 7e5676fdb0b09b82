//! Normalizations: LayerNormalization, RMSNormalization, GroupNormalization, InstanceNormalization, BatchNormalization,
//! LpNormalization.
//!
//! LayerNormalization exists from opset 17 on; ONNX Runtime has it before that too, and writes it into graphs of any opset.
//!
//! Shape: the first output is as the first input. Axes over which statistics are taken are barriers: they change with the
//! number of units. The others are parallel; scale and bias go with the axes that they lie along. BatchNormalization uses
//! constant statistics and is pointwise.

use crate::autodiff::GradCx;
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::{DType, Node, ValueId};
use crate::infer::{Dim, Fact, InferCx, InferError, normalize_axis};
use crate::ops::reduce::over_count;
use crate::ops::{Axes, Cost, Grad, OpRule, Refit};

type AxesRule = fn(&AxesCx<'_>) -> Relations;
type GradRule = fn(&mut GradCx<'_>) -> Result<(), String>;

/// The records of this family.
pub static RULES: &[OpRule] = &[
    OpRule { infer: infer_layer, ..normalization("LayerNormalization", 1, layer_axes, layer_grad) },
    normalization("RMSNormalization", 23, layer_axes, rms_grad),
    normalization("GroupNormalization", 18, group_axes, group_grad),
    normalization("InstanceNormalization", 11, instance_axes, instance_grad),
    normalization("LpNormalization", 11, lp_axes, lp_grad),
    OpRule { infer: infer_batch, ..normalization("BatchNormalization", 11, batch_axes, batch_grad) },
];

const fn normalization(name: &'static str, since: i64, axes: AxesRule, grad: GradRule) -> OpRule {
    OpRule {
        name,
        domain: "",
        opsets: (since, 24),
        infer: infer_same,
        axes: Axes::Rule(axes),
        grad: Grad::Rule(grad),
        cost: Cost::Free,
        refit: Refit::Nothing,
    }
}

pub(super) const NORMALIZED: &str = "normalized over this axis";

pub(super) fn infer_same(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    Ok(vec![Fact::new(cx.dtype(0), cx.shape(0).map(<[_]>::to_vec))])
}

/// The first axis that a node normalizes, by its `axis` attribute.
fn first_axis(node: &Node, rank: usize) -> Option<usize> {
    normalize_axis(node.attr_int("axis").unwrap_or(-1), rank)
}

/// Outputs: the normalized value; mean and 1/deviation, of size 1 along the normalized axes, in the type of computation.
pub(super) fn infer_layer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let mut facts = infer_same(cx)?;
    let statistic = match cx.shape(0) {
        Some(shape) => {
            let axis = first_axis(cx.node, shape.len());
            let axis = axis.ok_or_else(|| cx.error(format!("axis lies outside of rank {}", shape.len())))?;
            Some(shape.iter().enumerate().map(|(i, size)| if i < axis { size.clone() } else { Dim::from(1i64) }).collect())
        }
        None => None,
    };
    let dtype = cx.node.attr_int("stash_type").map_or(Some(DType::F32), |t| DType::from_onnx(i32::try_from(t).ok()?));
    facts.extend([Fact::new(dtype, statistic.clone()), Fact::new(dtype, statistic)]);
    Ok(facts)
}

fn barrier_all(cx: &AxesCx<'_>, relations: &mut Relations, reason: &str) {
    for slot in [Slot::In(0), Slot::Out(0)] {
        (0..cx.shape(slot).len()).for_each(|axis| relations.barrier((slot, axis), reason));
    }
}

/// `b n, n -> b n`, everything from `axis` on being normalized; mean and deviation keep the axes before.
pub(super) fn layer_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let rank = cx.shape(Slot::In(0)).len();
    let Some(first) = first_axis(cx.node, rank) else {
        barrier_all(cx, &mut relations, NORMALIZED);
        return relations;
    };
    for slot in 0..cx.node.inputs().len() {
        cx.broadcast(&mut relations, slot);
    }
    (first..rank).for_each(|axis| relations.barrier((Slot::In(0), axis), NORMALIZED));
    for out in (1..3).map(Slot::Out).filter(|out| cx.has(*out)) {
        (0..first).for_each(|axis| relations.same((Slot::In(0), axis), (out, axis)));
    }
    relations
}

/// Output `slot` of the forward node, which is added to it where the model left it out.
pub(crate) fn added_output(cx: &mut GradCx<'_>, slot: usize) -> Result<ValueId, String> {
    if let Some(value) = cx.node().output(slot) {
        return Ok(value);
    }
    let first = cx.b.graph.value(cx.output(0));
    let (id, _) = first.producer().ok_or("the node's output has no producer")?;
    let name = format!("grad.{}.{slot}", first.name());
    let value = cx.b.graph.add_value(&name);
    cx.b.graph.set_output(id, slot, value);
    Ok(value)
}

fn sum_over(cx: &mut GradCx<'_>, v: ValueId, axes: &[usize]) -> ValueId {
    let axes: Vec<i64> = axes.iter().map(|axis| *axis as i64).collect();
    cx.b.reduce_sum(v, &axes, true)
}

/// Values along the axes that are normalized together, and how many they are.
struct Over<'a> {
    /// A forward value of the element type in which the gradient is computed.
    x: ValueId,
    /// Axes of the value that is normalized (a reshaped one for groups).
    axes: &'a [usize],
    /// Axes of `x` that hold the same elements.
    counted: &'a [usize],
    /// `counted` holds this many separate sets.
    groups: i64,
}

impl<'a> Over<'a> {
    fn axes(x: ValueId, axes: &'a [usize]) -> Self {
        Self { x, axes, counted: axes, groups: 1 }
    }

    fn mean(&self, cx: &mut GradCx<'_>, v: ValueId) -> ValueId {
        let sum = sum_over(cx, v, self.axes);
        over_count(cx, sum, self.x, self.counted, self.groups)
    }

    /// `1 / sqrt(v + epsilon)` with the node's epsilon.
    fn inverse_root(&self, cx: &mut GradCx<'_>, v: ValueId) -> ValueId {
        let epsilon = cx.scalar(cx.node().attr_float("epsilon").unwrap_or(1e-5), self.x);
        let shifted = cx.b.add(v, epsilon);
        let root = cx.b.op("Sqrt", &[shifted], vec![]);
        let one = cx.scalar(1.0, self.x);
        cx.b.div(one, root)
    }

    /// `(x - mean) * inv` and `inv` of `v`, computed again.
    fn standardize(&self, cx: &mut GradCx<'_>, v: ValueId) -> (ValueId, ValueId) {
        let mean = self.mean(cx, v);
        let centred = cx.b.sub(v, mean);
        let square = cx.b.mul(centred, centred);
        let variance = self.mean(cx, square);
        let inv = self.inverse_root(cx, variance);
        (cx.b.mul(centred, inv), inv)
    }

    /// `inv * (dh - mean(dh) - h * mean(dh * h))` for `h = (x - mean) * inv`
    fn standardized_grad(&self, cx: &mut GradCx<'_>, dh: ValueId, h: ValueId, inv: ValueId) -> ValueId {
        let mean = self.mean(cx, dh);
        let centred = cx.b.sub(dh, mean);
        let product = cx.b.mul(dh, h);
        let along = self.mean(cx, product);
        let share = cx.b.mul(h, along);
        let rest = cx.b.sub(centred, share);
        cx.b.mul(rest, inv)
    }
}

/// `dscale = sum(dy * h)`, `dbias = sum(dy)`: scale is input 1 and bias input 2, broadcast like pointwise operands.
fn give_scale_and_bias(cx: &mut GradCx<'_>, dy: ValueId, h: ValueId) {
    if cx.wants(1) {
        let product = cx.b.mul(dy, h);
        let dscale = cx.sum_to(product, 1);
        cx.give(1, dscale);
    }
    if cx.wants(2) {
        let dbias = cx.sum_to(dy, 2);
        cx.give(2, dbias);
    }
}

/// `h = (x - mean) * inv`, `dh = dy * scale`, `dx = inv * (dh - mean(dh) - h * mean(dh * h))`.
///
/// Mean and inv are outputs of the forward node; where the model leaves them out, they are added to it.
fn layer_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    if cx.grad(1).is_some() || cx.grad(2).is_some() {
        return Err("a gradient through the mean or deviation that LayerNormalization outputs".to_string());
    }
    let (dy, x) = (cx.dy()?, cx.input(0));
    let rank = cx.shape(x).len();
    let first = first_axis(cx.node(), rank).ok_or("the rank of the input is not known")?;
    if cx.wants(0) || cx.wants(1) {
        let (mean, inv) = (added_output(cx, 1)?, added_output(cx, 2)?);
        let dtype = cx.dtype(x);
        let stash = cx.node().attr_int("stash_type").unwrap_or(1);
        let same = i64::from(dtype.to_onnx()) == stash;
        let (mean, inv) = if same { (mean, inv) } else { (cx.b.cast(mean, dtype), cx.b.cast(inv, dtype)) };
        let centred = cx.b.sub(x, mean);
        let h = cx.b.mul(centred, inv);
        if cx.wants(0) {
            let dh = cx.b.mul(dy, cx.input(1));
            let axes: Vec<usize> = (first..rank).collect();
            let dx = Over::axes(x, &axes).standardized_grad(cx, dh, h, inv);
            cx.give(0, dx);
        }
        give_scale_and_bias(cx, dy, h);
    } else if cx.wants(2) {
        let dbias = cx.sum_to(dy, 2);
        cx.give(2, dbias);
    }
    Ok(())
}

/// `inv = 1 / sqrt(mean(x^2) + epsilon)`, `h = x * inv`, `dh = dy * scale`, `dx = inv * (dh - h * mean(dh * h))`
fn rms_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x) = (cx.dy()?, cx.input(0));
    let rank = cx.shape(x).len();
    let first = first_axis(cx.node(), rank).ok_or("the rank of the input is not known")?;
    let axes: Vec<usize> = (first..rank).collect();
    let over = Over::axes(x, &axes);
    let square = cx.b.mul(x, x);
    let mean = over.mean(cx, square);
    let inv = over.inverse_root(cx, mean);
    let h = cx.b.mul(x, inv);
    if cx.wants(0) {
        let dh = cx.b.mul(dy, cx.input(1));
        let product = cx.b.mul(dh, h);
        let along = over.mean(cx, product);
        let share = cx.b.mul(h, along);
        let rest = cx.b.sub(dh, share);
        let dx = cx.b.mul(rest, inv);
        cx.give(0, dx);
    }
    give_scale_and_bias(cx, dy, h);
    Ok(())
}

/// Relates axis 0 of a per-channel constant to axis 1 of the input.
fn channel_constants(cx: &AxesCx<'_>, relations: &mut Relations, slots: std::ops::Range<usize>) {
    if cx.shape(Slot::In(0)).len() < 2 {
        return;
    }
    for slot in slots.map(Slot::In).filter(|slot| cx.shape(*slot).len() == 1) {
        relations.same((slot, 0), (Slot::In(0), 1));
    }
}

/// `b c n, c, c -> b c n`, everything behind the channels being normalized.
fn instance_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    cx.parallel(&mut relations, 0, 0, &[]);
    channel_constants(cx, &mut relations, 1..3);
    (2..cx.shape(Slot::In(0)).len()).for_each(|axis| relations.barrier((Slot::In(0), axis), NORMALIZED));
    relations
}

/// As for instances, but the channels of a group are normalized together. Scale and bias are per channel from opset 21 on.
fn group_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    cx.parallel(&mut relations, 0, 0, &[]);
    if cx.opset >= 21 {
        channel_constants(cx, &mut relations, 1..3);
    } else {
        (1..3).for_each(|slot| relations.barrier((Slot::In(slot), 0), "one entry for each group of channels"));
    }
    (1..cx.shape(Slot::In(0)).len()).for_each(|axis| relations.barrier((Slot::In(0), axis), NORMALIZED));
    relations
}

/// A per-channel vector with axes of size 1 behind it, so that it broadcasts against `[b, c, ..]` of rank `rank`.
fn along_channels(cx: &mut GradCx<'_>, v: ValueId, rank: usize) -> ValueId {
    let behind: Vec<i64> = (1..rank as i64 - 1).collect();
    if behind.is_empty() { v } else { cx.b.unsqueeze(v, &behind) }
}

/// Sums over every axis but the channels, to a vector.
fn sum_to_channels(cx: &mut GradCx<'_>, v: ValueId, rank: usize) -> ValueId {
    let others: Vec<i64> = (0..rank as i64).filter(|axis| *axis != 1).collect();
    cx.b.reduce_sum(v, &others, false)
}

fn give_channel_scale_and_bias(cx: &mut GradCx<'_>, dy: ValueId, h: ValueId, rank: usize) {
    if cx.wants(1) {
        let product = cx.b.mul(dy, h);
        let dscale = sum_to_channels(cx, product, rank);
        cx.give(1, dscale);
    }
    if cx.wants(2) {
        let dbias = sum_to_channels(cx, dy, rank);
        cx.give(2, dbias);
    }
}

/// As for layers, over the axes behind the channels, with statistics computed again.
fn instance_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x) = (cx.dy()?, cx.input(0));
    let rank = cx.shape(x).len();
    if rank < 3 {
        return Err("the input has no axes behind the channels".to_string());
    }
    let axes: Vec<usize> = (2..rank).collect();
    let over = Over::axes(x, &axes);
    let (h, inv) = over.standardize(cx, x);
    if cx.wants(0) {
        let scale = along_channels(cx, cx.input(1), rank);
        let dh = cx.b.mul(dy, scale);
        let dx = over.standardized_grad(cx, dh, h, inv);
        cx.give(0, dx);
    }
    give_channel_scale_and_bias(cx, dy, h, rank);
    Ok(())
}

/// As for layers, on the input reshaped to `[b, groups, channels of a group and all behind]`.
fn group_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x) = (cx.dy()?, cx.input(0));
    let rank = cx.shape(x).len();
    let groups = cx.node().attr_int("num_groups").ok_or("num_groups is missing")?;
    if rank < 2 {
        return Err("the input has no channels".to_string());
    }
    let counted: Vec<usize> = (1..rank).collect();
    let over = Over { x, axes: &[2], counted: &counted, groups };
    let grouped = cx.b.reshape(x, &[0, groups, -1]);
    let (h, inv) = over.standardize(cx, grouped);
    let shape = cx.b.shape_of(x);
    let per_group = cx.opset() < 21;
    if cx.wants(0) {
        let dh = if per_group {
            let (dy, scale) = (cx.b.reshape(dy, &[0, groups, -1]), cx.b.unsqueeze(cx.input(1), &[1]));
            cx.b.mul(dy, scale)
        } else {
            let scale = along_channels(cx, cx.input(1), rank);
            let dh = cx.b.mul(dy, scale);
            cx.b.reshape(dh, &[0, groups, -1])
        };
        let dx = over.standardized_grad(cx, dh, h, inv);
        let dx = cx.b.reshape_to(dx, shape);
        cx.give(0, dx);
    }
    if per_group {
        let dy = cx.b.reshape(dy, &[0, groups, -1]);
        give_channel_scale_and_bias(cx, dy, h, 3);
    } else {
        let h = cx.b.reshape_to(h, shape);
        give_channel_scale_and_bias(cx, dy, h, rank);
    }
    Ok(())
}

/// `b n -> b n`, one axis being normalized.
fn lp_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let Some(axis) = first_axis(cx.node, cx.shape(Slot::In(0)).len()) else {
        barrier_all(cx, &mut relations, NORMALIZED);
        return relations;
    };
    cx.parallel(&mut relations, 0, 0, &[]);
    relations.barrier((Slot::In(0), axis), NORMALIZED);
    relations
}

/// `y = x / r`: `dx = (dy - u * sum(dy * y)) / r` with `r` the norm and `u` its slope: `y` for p = 2, `sign(x)` for p = 1.
fn lp_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x, y) = (cx.dy()?, cx.input(0), cx.output(0));
    let axis = first_axis(cx.node(), cx.shape(x).len()).ok_or("the rank of the input is not known")?;
    let (slope, norm) = match cx.node().attr_int("p").unwrap_or(2) {
        1 => {
            let size = cx.b.op("Abs", &[x], vec![]);
            (cx.b.op("Sign", &[x], vec![]), sum_over(cx, size, &[axis]))
        }
        _ => {
            let square = cx.b.mul(x, x);
            let sum = sum_over(cx, square, &[axis]);
            (y, cx.b.op("Sqrt", &[sum], vec![]))
        }
    };
    let product = cx.b.mul(dy, y);
    let along = sum_over(cx, product, &[axis]);
    let share = cx.b.mul(slope, along);
    let rest = cx.b.sub(dy, share);
    let dx = cx.b.div(rest, norm);
    cx.give(0, dx);
    Ok(())
}

fn trains(node: &Node) -> bool {
    node.attr_int("training_mode").unwrap_or(0) != 0
}

/// Outputs behind the first are the running statistics, of the shape of the constants (training mode only).
fn infer_batch(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let mut facts = infer_same(cx)?;
    facts.extend([cx.input(3), cx.input(4)].map(|f| Fact::new(f.dtype, f.shape.clone())));
    Ok(facts)
}

/// `b c n, c, c, c, c -> b c n`, all parallel.
fn batch_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    if trains(cx.node) || cx.shape(Slot::In(0)).len() < 2 {
        barrier_all(cx, &mut relations, "batch normalization in training mode, or without channels");
        return relations;
    }
    cx.parallel(&mut relations, 0, 0, &[]);
    channel_constants(cx, &mut relations, 1..5);
    relations
}

/// `h = x - mean`, `inv = 1 / sqrt(var + epsilon)`, `y = scale * inv * h + bias`:
/// `dx = dy * scale * inv`, `dscale = sum(dy * h) * inv`, `dmean = -sum(dy) * scale * inv`, `dvar = -dscale * scale * inv^2 / 2`
fn batch_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x, scale) = (cx.dy()?, cx.input(0), cx.input(1));
    let rank = cx.shape(x).len();
    if trains(cx.node()) || rank < 2 {
        return Err("batch normalization in training mode, or without channels".to_string());
    }
    let inv = Over::axes(x, &[]).inverse_root(cx, cx.input(4));
    let factor = cx.b.mul(scale, inv);
    if cx.wants(0) {
        let factor = along_channels(cx, factor, rank);
        let dx = cx.b.mul(dy, factor);
        cx.give(0, dx);
    }
    if cx.wants(1) || cx.wants(4) {
        let mean = along_channels(cx, cx.input(3), rank);
        let centred = cx.b.sub(x, mean);
        let product = cx.b.mul(dy, centred);
        let sum = sum_to_channels(cx, product, rank);
        let dscale = cx.b.mul(sum, inv);
        if cx.wants(1) {
            cx.give(1, dscale);
        }
        if cx.wants(4) {
            let minus_half = cx.scalar(-0.5, x);
            let slope = cx.b.mul(factor, inv);
            let slope = cx.b.mul(slope, minus_half);
            let dvar = cx.b.mul(dscale, slope);
            cx.give(4, dvar);
        }
    }
    if cx.wants(2) || cx.wants(3) {
        let dbias = sum_to_channels(cx, dy, rank);
        if cx.wants(2) {
            cx.give(2, dbias);
        }
        if cx.wants(3) {
            let product = cx.b.mul(dbias, factor);
            let dmean = cx.b.neg(product);
            cx.give(3, dmean);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::graph::{AttrValue, DType};
    use crate::ops::elementwise::tests::OneNode;

    #[test]
    fn layers_are_normalized_from_axis_on() {
        let node = OneNode::new(17).input(DType::F16, "b 197 n").input(DType::F16, "n").input(DType::F16, "n");
        let done = node.run("LayerNormalization", &[], 3).expect("the shapes fit");
        assert_eq!((done.shape(0).as_str(), done.fact(0).dtype), ("b 197 n", Some(DType::F16)));
        assert_eq!((done.shape(1).as_str(), done.fact(2).dtype), ("b 197 1", Some(DType::F32)));
        let same = "in0.0=out0.0 in0.1=out0.1 in0.2=out0.2 in1.0=out0.2 in2.0=out0.2";
        let statistics = "in0.0=out1.0 in0.1=out1.1 in0.0=out2.0 in0.1=out2.1";
        assert_eq!(done.links(), format!("{same} in0.2! {statistics}"));
        let rms = OneNode::new(23).floats("b m n").floats("m n");
        let rms = rms.run("RMSNormalization", &[("axis", AttrValue::Int(1))], 1).expect("the shapes fit");
        assert_eq!(rms.links(), "in0.0=out0.0 in0.1=out0.1 in0.2=out0.2 in1.0=out0.1 in1.1=out0.2 in0.1! in0.2!");
    }

    #[test]
    fn channels_stay_parallel_where_statistics_are_constant_or_per_channel() {
        let batch = OneNode::new(17).floats("b c h").floats("c").floats("c").floats("c").floats("c");
        let batch = batch.run("BatchNormalization", &[], 1).expect("the shapes fit");
        let same = "in0.0=out0.0 in0.1=out0.1 in0.2=out0.2 in1.0=in0.1 in2.0=in0.1";
        assert_eq!(batch.links(), format!("{same} in3.0=in0.1 in4.0=in0.1"));
        let node = |opset| OneNode::new(opset).floats("b c h").floats("c").floats("c");
        let instance = node(17).run("InstanceNormalization", &[], 1).expect("the shapes fit");
        assert_eq!(instance.links(), format!("{same} in0.2!"));
        let group = node(21).run("GroupNormalization", &[("num_groups", AttrValue::Int(2))], 1).expect("the shapes fit");
        assert_eq!(group.links(), format!("{same} in0.1! in0.2!"));
    }

    #[test]
    fn training_mode_is_a_barrier() {
        let node = OneNode::new(17).floats("b c").floats("c").floats("c").floats("c").floats("c");
        let done = node.run("BatchNormalization", &[("training_mode", AttrValue::Int(1))], 3).expect("the shapes fit");
        assert_eq!((done.shape(1).as_str(), done.links().as_str()), ("c", "in0.0! in0.1! out0.0! out0.1!"));
    }

    #[test]
    fn one_axis_has_a_norm() {
        let done = OneNode::new(17).floats("b m n").run("LpNormalization", &[("axis", AttrValue::Int(1))], 1);
        assert_eq!(done.expect("the axis fits").links(), "in0.0=out0.0 in0.1=out0.1 in0.2=out0.2 in0.1!");
    }
}
