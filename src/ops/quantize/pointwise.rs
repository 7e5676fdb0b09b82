//! Operators of com.microsoft that compute a float operator on quantized numbers: arithmetic, activations, softmax, joins, pooling.
//!
//! Shapes and axes are those of the float operator; every operand is followed by its scale and zero point, which are single numbers.
//! The output has the type of its zero point.

use super::{MICROSOFT, NO_GRAD, quantized};
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::infer::{Fact, InferCx, InferError};
use crate::ops::elementwise::contents;
use crate::ops::select::join::{axis_of, joined_shape, segments};
use crate::ops::{Axes, Cost, OpRule, Refit, pool, softmax};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    rule("QLinearAdd", binary_infer, binary_axes),
    rule("QLinearMul", binary_infer, binary_axes),
    rule("QLinearSigmoid", unary_infer, unary_axes),
    rule("QLinearLeakyRelu", unary_infer, unary_axes),
    rule("QLinearSoftmax", unary_infer, softmax_axes),
    rule("QLinearWhere", where_infer, where_axes),
    rule("QLinearConcat", concat_infer, concat_axes),
    rule("QLinearAveragePool", average_infer, average_axes),
    rule("QLinearGlobalAveragePool", global_infer, global_axes),
];

type Infer = fn(&InferCx<'_>) -> Result<Vec<Fact>, InferError>;
type Relate = fn(&AxesCx<'_>) -> Relations;

const fn rule(name: &'static str, infer: Infer, axes: Relate) -> OpRule {
    OpRule {
        name,
        domain: MICROSOFT,
        opsets: (1, 1),
        infer,
        axes: Axes::Rule(axes),
        grad: NO_GRAD,
        cost: Cost::Free,
        refit: Refit::Nothing,
    }
}

/// The inputs at `slots`, broadcast together.
fn broadcast_infer(cx: &InferCx<'_>, slots: &[usize], zero_point: usize) -> Result<Vec<Fact>, InferError> {
    let mut joined = Vec::new();
    for slot in slots {
        let Some(shape) = cx.shape(*slot) else { return Ok(quantized(cx, zero_point, Fact::new(cx.dtype(*slot), None))) };
        joined = contents::broadcast(&joined, shape)
            .map_err(|(a, b)| cx.error(format!("sizes {a} and {b} cannot be broadcast together")))?;
    }
    Ok(quantized(cx, zero_point, Fact::new(cx.dtype(slots[0]), Some(joined))))
}

fn broadcast_axes(cx: &AxesCx<'_>, slots: &[usize]) -> Relations {
    let mut relations = Relations::default();
    slots.iter().for_each(|slot| cx.broadcast(&mut relations, *slot));
    relations
}

/// Inputs: a, scale, zero point, b, scale, zero point, scale and zero point of the output.
fn binary_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    broadcast_infer(cx, &[0, 3], 7)
}

fn binary_axes(cx: &AxesCx<'_>) -> Relations {
    broadcast_axes(cx, &[0, 3])
}

/// Inputs: x, scale, zero point, scale and zero point of the output.
fn unary_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    broadcast_infer(cx, &[0], 4)
}

fn unary_axes(cx: &AxesCx<'_>) -> Relations {
    broadcast_axes(cx, &[0])
}

/// As for Softmax of the default domain in the version that the attribute `opset` names.
fn softmax_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    cx.parallel(&mut relations, 0, 0, &[]);
    let opset = cx.node.attr_int("opset").unwrap_or(1);
    for axis in softmax::normalized(cx.node, opset, cx.shape(Slot::In(0)).len()) {
        relations.barrier((Slot::In(0), axis), "softmax is normalized over this axis");
    }
    relations
}

/// Inputs: condition, x, scale, zero point, y, scale, zero point, scale and zero point of the output.
fn where_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let fact = broadcast_infer(cx, &[0, 1, 4], 8)?;
    Ok(fact.into_iter().map(|f| Fact { dtype: cx.dtype(8).or(cx.dtype(1)), ..f }).collect())
}

fn where_axes(cx: &AxesCx<'_>) -> Relations {
    broadcast_axes(cx, &[0, 1, 4])
}

/// Inputs: scale and zero point of the output, then x, scale, zero point of each part.
fn concat_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let parts: Vec<usize> = (2..cx.input_count()).step_by(3).collect();
    let shape = joined_shape(cx, &parts)?.map(|(shape, _)| shape);
    Ok(quantized(cx, 1, Fact::new(None, shape)))
}

fn concat_axes(cx: &AxesCx<'_>) -> Relations {
    let whole = Slot::Out(0);
    let Some(axis) = axis_of(cx.node, 1, cx.shape(whole).len()) else { return Relations::default() };
    let parts: Vec<Slot> = (2..cx.node.inputs().len()).step_by(3).map(Slot::In).collect();
    segments(cx, whole, &parts, axis, "joined where sizes are only known at run time")
}

/// Whether channels are the last axis, which the rules of pooling do not speak of.
fn channels_last(attr: Option<i64>) -> bool {
    attr.unwrap_or(0) != 0
}

/// Inputs: x, scale, zero point, scale and zero point of the output.
fn average_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    pooled_infer(cx, pool::pool_infer)
}

fn average_axes(cx: &AxesCx<'_>) -> Relations {
    pooled_axes(cx, pool::pool_axes)
}

fn global_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    pooled_infer(cx, pool::global_infer)
}

fn global_axes(cx: &AxesCx<'_>) -> Relations {
    pooled_axes(cx, pool::global_axes)
}

fn pooled_infer(cx: &InferCx<'_>, infer: Infer) -> Result<Vec<Fact>, InferError> {
    if channels_last(cx.node.attr_int("channels_last")) {
        return Ok(quantized(cx, 4, Fact::new(cx.dtype(0), None)));
    }
    let fact = infer(cx)?.into_iter().next().unwrap_or_default();
    Ok(quantized(cx, 4, fact))
}

fn pooled_axes(cx: &AxesCx<'_>, relate: Relate) -> Relations {
    if channels_last(cx.node.attr_int("channels_last")) { Relations::default() } else { relate(cx) }
}
