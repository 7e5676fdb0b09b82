//! Products of integers: MatMulInteger (opset 10), QLinearMatMul (opset 10 to 21), and of com.microsoft MatMulIntegerToFloat,
//! DynamicQuantizeMatMul and QGemm.
//!
//! Shapes as MatMul and Gemm have them. The zero point is taken off both operands before they are multiplied; scales and zero points of
//! a weight are one number or one per column. Example: uint8 `[B, N, 48]` x int8 `[48, 192]` with `[192]` scales -> int32 `[B, N, 192]`.

use super::{MICROSOFT, NO_GRAD, quantized};
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::DType;
use crate::infer::{Fact, InferCx, InferError};
use crate::ops::matmul::{gemm_cost, gemm_layout, gemm_shape, matmul_cost, product_shape, relate_gemm, relate_product};
use crate::ops::{Axes, Cost, OpRule, Refit};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    product("MatMulInteger", "", (10, 24), integer_infer, integer_axes, Cost::Rule(matmul_cost)),
    product("QLinearMatMul", "", (10, 24), linear_infer, linear_axes, Cost::Rule(matmul_cost)),
    product("MatMulIntegerToFloat", MICROSOFT, (1, 1), to_float_infer, to_float_axes, Cost::Rule(matmul_cost)),
    product("DynamicQuantizeMatMul", MICROSOFT, (1, 1), dynamic_infer, dynamic_axes, Cost::Rule(matmul_cost)),
    product("QGemm", MICROSOFT, (1, 1), gemm_infer, gemm_axes, Cost::Rule(gemm_cost)),
];

type Infer = fn(&InferCx<'_>) -> Result<Vec<Fact>, InferError>;
type Relate = fn(&AxesCx<'_>) -> Relations;

const fn product(name: &'static str, domain: &'static str, opsets: (i64, i64), infer: Infer, axes: Relate, cost: Cost) -> OpRule {
    OpRule { name, domain, opsets, infer, axes: Axes::Rule(axes), grad: NO_GRAD, cost, refit: Refit::Nothing }
}

/// A scale or zero point with one entry per column of the right operand goes with the columns. One with more axes has one for each
/// matrix of a batch, and rows of its own size 1.
fn per_column(cx: &AxesCx<'_>, relations: &mut Relations, slots: &[usize], right: (Slot, usize)) {
    let size = &cx.shape(right.0)[right.1];
    for slot in slots.iter().map(|s| Slot::In(*s)).filter(|s| cx.has(*s)) {
        let shape = cx.shape(slot);
        if shape.len() == 1 && shape[0] == *size {
            relations.same((slot, 0), right);
        }
    }
}

/// A zero point with one entry per row of the left operand goes with the rows.
fn per_row(cx: &AxesCx<'_>, relations: &mut Relations, slots: &[usize]) {
    let a = cx.shape(Slot::In(0));
    let Some(row) = a.len().checked_sub(2) else { return };
    for slot in slots.iter().map(|s| Slot::In(*s)).filter(|s| cx.has(*s)) {
        let shape = cx.shape(slot);
        if shape.len() == 1 && shape[0] == a[row] {
            relations.same((slot, 0), (Slot::In(0), row));
        }
    }
}

/// Relations of a product with the weight at `right`, whose scales and zero points are at `parameters`.
fn relate(cx: &AxesCx<'_>, right: usize, parameters: &[usize]) -> Relations {
    let mut relations = Relations::default();
    relate_product(cx, &mut relations, 0, right);
    if let Some(column) = cx.shape(Slot::In(right)).len().checked_sub(1).filter(|c| *c > 0) {
        per_column(cx, &mut relations, parameters, (Slot::In(right), column));
    }
    relations
}

fn integer_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    Ok(vec![Fact::new(Some(DType::I32), product_shape(cx, 0, 1)?)])
}

fn integer_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = relate(cx, 1, &[3]);
    per_row(cx, &mut relations, &[2]);
    relations
}

/// Inputs: a, scale, zero point, b, scale, zero point, scale and zero point of the output.
fn linear_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let shape = product_shape(cx, 0, 3)?;
    Ok(quantized(cx, 7, Fact::new(cx.dtype(0), shape)))
}

fn linear_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = relate(cx, 3, &[4, 5]);
    per_row(cx, &mut relations, &[1, 2]);
    relations
}

/// Inputs: a, b, scales of both, zero points of both, bias.
fn to_float_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    Ok(vec![Fact::new(cx.dtype(2), product_shape(cx, 0, 1)?)])
}

fn to_float_axes(cx: &AxesCx<'_>) -> Relations {
    relate(cx, 1, &[3, 5, 6])
}

/// Inputs: float a, b, its scale and zero point, bias. The scale of `a` follows from its range.
fn dynamic_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    Ok(vec![Fact::new(cx.dtype(0), product_shape(cx, 0, 1)?)])
}

fn dynamic_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = relate(cx, 1, &[2, 3, 4]);
    for axis in 0..cx.shape(Slot::In(0)).len() {
        relations.vanish(
            (Slot::In(0), axis),
            "the scale follows from the range of the whole value, in which a removed unit is not zero",
        );
    }
    relations
}

/// Inputs: a, scale, zero point, b, scale, zero point, bias, scale and zero point of the output; a float where the last are left out.
fn gemm_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let shape = gemm_shape(cx, 0, 3, 6)?;
    let dtype = if cx.has_input(8) { cx.dtype(8) } else { cx.dtype(1) };
    Ok(vec![Fact::new(dtype, shape)])
}

fn gemm_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    relate_gemm(cx, &mut relations, 0, 3, 6);
    let (_, (_, n)) = gemm_layout(cx.node);
    per_column(cx, &mut relations, &[4, 5], (Slot::In(3), n));
    relations
}
