//! Operators that compute each element of the output from the elements at its place: arithmetic, activations, logic, casts.
//!
//! Shape: numpy broadcasting of all inputs. Axes: every axis of every input is the axis of the output that it is broadcast to.
//! A zeroed unit need not stay zero (`Exp`), because a gate sits before the sink, not before these operators.
//! Small contents are followed (`contents`), so that arithmetic on shapes resolves. Nothing is counted as cost.

pub mod activation;
pub mod arithmetic;
pub(crate) mod contents;
pub mod logic;

use crate::autodiff::GradCx;
use crate::axes::relation::{AxesCx, Relations};
use crate::graph::{DType, ValueId};
use crate::infer::{Dim, Fact, InferCx, InferError};
use crate::ops::{Axes, Cost, Grad, OpRule, Refit};

type Infer = fn(&InferCx<'_>) -> Result<Vec<Fact>, InferError>;

/// The record of a pointwise operator that exists since opset `since` (at the earliest 11).
const fn pointwise(name: &'static str, since: i64, infer: Infer, grad: Grad) -> OpRule {
    OpRule {
        name,
        domain: "",
        opsets: (since, 24),
        infer,
        axes: Axes::Rule(broadcast_axes),
        grad,
        cost: Cost::Free,
        refit: Refit::Nothing,
    }
}

/// The same for an operator whose output has the element type of its first input.
const fn numeric(name: &'static str, since: i64, grad: Grad) -> OpRule {
    pointwise(name, since, infer_like_first, grad)
}

/// The same for an operator that answers true or false.
const fn logical(name: &'static str, since: i64) -> OpRule {
    pointwise(name, since, infer_bool, Grad::Zero)
}

/// Every axis of every input goes with the axis of the output that it is broadcast to.
pub(super) fn broadcast_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    for slot in 0..cx.node.inputs().len() {
        cx.broadcast(&mut relations, slot);
    }
    relations
}

/// Only the first input is more than a parameter.
fn first_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    cx.broadcast(&mut relations, 0);
    relations
}

/// The shape to which all inputs are broadcast; `None` where a rank is unknown.
fn broadcast_all(cx: &InferCx<'_>) -> Result<Option<Vec<Dim>>, InferError> {
    let mut joined: Vec<Dim> = Vec::new();
    for slot in (0..cx.input_count()).filter(|slot| cx.has_input(*slot)) {
        let Some(shape) = cx.shape(slot) else { return Ok(None) };
        joined = contents::broadcast(&joined, shape)
            .map_err(|(a, b)| cx.error(format!("sizes {a} and {b} cannot be broadcast together")))?;
    }
    Ok(Some(joined))
}

fn infer_as(cx: &InferCx<'_>, dtype: Option<DType>) -> Result<Vec<Fact>, InferError> {
    let shape = broadcast_all(cx)?;
    let known = contents::pointwise(cx, shape.as_deref(), dtype);
    Ok(vec![Fact::new(dtype, shape).with_known(known)])
}

pub(super) fn infer_like_first(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    infer_as(cx, cx.dtype(0))
}

fn infer_bool(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    infer_as(cx, Some(DType::Bool))
}

/// Ends a rule of an operator with one input: `dx = dy * slope`.
fn give_slope(cx: &mut GradCx<'_>, slope: ValueId) -> Result<(), String> {
    let dy = cx.dy()?;
    let dx = cx.b.mul(dy, slope);
    cx.give(0, dx);
    Ok(())
}

/// `a * factor`; `like` is the forward value whose element type `a` has.
fn scaled(cx: &mut GradCx<'_>, a: ValueId, factor: f32, like: ValueId) -> ValueId {
    let factor = cx.scalar(factor, like);
    cx.b.mul(a, factor)
}

/// `a + term`; `like` as in [`scaled`].
fn shifted(cx: &mut GradCx<'_>, a: ValueId, term: f32, like: ValueId) -> ValueId {
    let term = cx.scalar(term, like);
    cx.b.add(a, term)
}

/// `1 - a`; `like` as in [`scaled`].
fn one_minus(cx: &mut GradCx<'_>, a: ValueId, like: ValueId) -> ValueId {
    let one = cx.scalar(1.0, like);
    cx.b.sub(one, a)
}

/// `cond ? then : otherwise`.
fn select(cx: &mut GradCx<'_>, cond: ValueId, then: ValueId, otherwise: ValueId) -> ValueId {
    cx.b.op("Where", &[cond, then, otherwise], vec![])
}

/// `x > 0`.
fn is_positive(cx: &mut GradCx<'_>, x: ValueId) -> ValueId {
    let zero = cx.scalar(0.0, x);
    cx.b.op("Greater", &[x, zero], vec![])
}

#[cfg(test)]
pub(crate) mod tests;
