//! Products with more in them: FusedMatMul (and its old name TransposeMatMul), FusedMatMulActivation, GemmFastGelu, FusedGemm, FusedConv.
//!
//! Shape, FusedMatMul: `alpha * A' B'` as MatMul multiplies. `transBatchA` moves the first axis of A behind its batch axes, then
//! `transA` swaps the last two; the same for B. Example: `A [197, B, 3, 64]` with `transBatchA` is `[B, 3, 197, 64]`.
//! An activation works element by element. FusedConv adds its fourth input before the activation.

use super::{fused, untrained};
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::Node;
use crate::infer::{Dim, Fact, InferCx, InferError};
use crate::ops::conv::{conv_axes, conv_cost, conv_infer, conv_refit};
use crate::ops::matmul::{
    gemm_axes, gemm_cost, gemm_infer, matmul_axes, matmul_cost, matmul_infer, relate_ordered_product, shape_of_product,
};
use crate::ops::{Cost, CostCx, OpRule, Refit};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    OpRule { cost: Cost::Rule(product_cost), ..fused("FusedMatMul", product_infer, stored_axes) },
    OpRule { cost: Cost::Rule(product_cost), ..fused("TransposeMatMul", product_infer, stored_axes) },
    OpRule { cost: Cost::Rule(product_cost), ..untrained("FusedMatMulActivation", product_infer, stored_axes) },
    OpRule { cost: Cost::Rule(matmul_cost), ..untrained("GemmFastGelu", matmul_infer, gelu_axes) },
    OpRule { cost: Cost::Rule(gemm_cost), ..fused("FusedGemm", gemm_infer, gemm_axes) },
    OpRule { cost: Cost::Rule(conv_cost), refit: Refit::Rule(conv_refit), ..fused("FusedConv", conv_infer, conv_sum_axes) },
];

/// The stored axis of each axis of an operand of the product.
pub(crate) fn order(node: &Node, rank: usize, side: char) -> Vec<usize> {
    let is_set = |name: &str| node.attr_int(&format!("{name}{side}")).unwrap_or(0) != 0;
    let mut order: Vec<usize> = (0..rank).collect();
    if rank < 2 {
        return order;
    }
    if is_set("transBatch") {
        order[..rank - 1].rotate_left(1);
    }
    if is_set("trans") {
        order.swap(rank - 2, rank - 1);
    }
    order
}

fn arranged(node: &Node, shape: &[Dim], side: char) -> Vec<Dim> {
    order(node, shape.len(), side).into_iter().map(|axis| shape[axis].clone()).collect()
}

fn product_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let (Some(a), Some(b)) = (cx.shape(0), cx.shape(1)) else { return Ok(vec![Fact::new(cx.dtype(0), None)]) };
    let out = shape_of_product(&arranged(cx.node, a, 'A'), &arranged(cx.node, b, 'B')).map_err(|e| cx.error(e))?;
    Ok(vec![Fact::new(cx.dtype(0), Some(out))])
}

fn stored_axes(cx: &AxesCx<'_>) -> Relations {
    let order = |slot: usize, side| order(cx.node, cx.shape(Slot::In(slot)).len(), side);
    let mut relations = Relations::default();
    relate_ordered_product(cx, &mut relations, [(0, &order(0, 'A')), (1, &order(1, 'B'))]);
    relations
}

/// `elements of the output * K`
fn product_cost(cx: &CostCx<'_>) -> Option<Dim> {
    let (a, out) = (cx.inputs.first().copied().flatten()?, cx.outputs.first().copied().flatten()?);
    Some(&out.iter().product::<Dim>() * arranged(cx.node, a, 'A').last()?)
}

/// A product whose bias lies along the columns.
fn gelu_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = matmul_axes(cx);
    if cx.has(Slot::In(2)) {
        cx.broadcast(&mut relations, 2);
    }
    relations
}

fn conv_sum_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = conv_axes(cx);
    if cx.has(Slot::In(3)) {
        cx.broadcast(&mut relations, 3);
    }
    relations
}
