//! Comparisons, logic, selection, casts, and what passes its input on.

use super::{contents, first_axes, infer_as, logical, pointwise, select};
use crate::autodiff::GradCx;
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::DType;
use crate::infer::{Fact, InferCx, InferError};
use crate::ops::{Axes, Grad, OpRule};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    logical("Equal", 11),
    logical("Less", 11),
    logical("LessOrEqual", 12),
    logical("Greater", 11),
    logical("GreaterOrEqual", 12),
    logical("Not", 11),
    logical("And", 11),
    logical("Or", 11),
    logical("Xor", 11),
    logical("IsNaN", 11),
    logical("IsInf", 11),
    pointwise("Where", 11, infer_where, Grad::Rule(where_grad)),
    pointwise("Cast", 11, infer_cast, Grad::Rule(cast_grad)),
    OpRule { axes: Axes::Rule(cast_like_axes), ..pointwise("CastLike", 15, infer_cast_like, Grad::Rule(cast_like_grad)) },
    pointwise("Identity", 11, infer_identity, Grad::Rule(identity_grad)),
    OpRule { axes: Axes::Rule(dropout_axes), ..pointwise("Dropout", 11, infer_dropout, Grad::Rule(dropout_grad)) },
];

/// Input 1 lends its type alone.
fn cast_like_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = first_axes(cx);
    for axis in 0..cx.shape(Slot::In(1)).len() {
        relations.unread((Slot::In(1), axis));
    }
    relations
}

fn infer_where(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    infer_as(cx, cx.dtype(1).or(cx.dtype(2)))
}

/// `da = cond ? dy : 0`, `db = cond ? 0 : dy`
fn where_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, cond) = (cx.dy()?, cx.input(0));
    let zero = cx.scalar(0.0, cx.output(0));
    for (slot, then, otherwise) in [(1, dy, zero), (2, zero, dy)] {
        if cx.wants(slot) {
            let part = select(cx, cond, then, otherwise);
            let part = cx.sum_to(part, slot);
            cx.give(slot, part);
        }
    }
    Ok(())
}

fn infer_cast(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    infer_as(cx, contents::cast_target(cx.node))
}

fn infer_cast_like(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let (input, dtype) = (cx.input(0), cx.dtype(1));
    let known = input.known.as_ref().and_then(|known| contents::cast_known(known, dtype?));
    Ok(vec![Fact::new(dtype, input.shape.clone()).with_known(known)])
}

/// `dx = dy` in the type of `x`; none where either type is an integer.
fn cast_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, from, to) = (cx.dy()?, cx.dtype(cx.input(0)), cx.dtype(cx.output(0)));
    if from.is_float() && to.is_float() {
        let dx = if from == to { dy } else { cx.b.cast(dy, from) };
        cx.give(0, dx);
        return Ok(());
    }
    let smaller_float = |d: DType| d.name().starts_with("float8") || d.name().starts_with("float4");
    if smaller_float(from) || smaller_float(to) {
        return Err(format!("a cast from {} to {} rounds too coarsely for a gradient", from.name(), to.name()));
    }
    Ok(())
}

/// As Cast; of the second input only the type matters.
fn cast_like_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    cx.give_zero(1);
    if cx.wants(0) { cast_grad(cx) } else { Ok(()) }
}

fn infer_identity(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    Ok(vec![cx.input(0).clone()])
}

/// `dx = dy`
fn identity_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let dy = cx.dy()?;
    cx.give(0, dy);
    Ok(())
}

/// The input, and where asked for the mask of what was kept. Only in training mode does the output differ from the input.
fn infer_dropout(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let input = cx.input(0);
    let trains = cx.has_input(2) && cx.numbers(2).is_none_or(|v| v != [0]);
    let known = if trains { None } else { input.known.clone() };
    let mask = Fact::new(Some(DType::Bool), input.shape.clone());
    Ok(vec![Fact::new(input.dtype, input.shape.clone()).with_known(known), mask])
}

fn dropout_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    cx.parallel(&mut relations, 0, 0, &[]);
    if cx.has(Slot::Out(1)) {
        cx.parallel(&mut relations, 0, 1, &[]);
    }
    relations
}

/// `dx = dy`, as long as nothing is dropped.
fn dropout_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    if let Some(mode) = cx.node().input(2)
        && cx.numbers(mode).is_none_or(|v| v != [0])
    {
        return Err("Dropout in training mode".to_string());
    }
    identity_grad(cx)
}
