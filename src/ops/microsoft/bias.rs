//! Operators that add a bias first: BiasAdd, BiasDropout, BiasSoftmax, BiasSplitGelu. None has a kernel for processors.
//!
//! Shape: the first input's, but for BiasSplitGelu: `x [B, N, 2M]`, `b [2M]` -> `[B, N, M]`, the first half of `x + b` times GELU of
//! the second. Its kernel exists for a few widths only, so these stay.

use super::untrained;
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::DType;
use crate::infer::{Dim, Fact, InferCx, InferError, normalize_axis};
use crate::ops::OpRule;
use crate::ops::elementwise::{broadcast_axes, infer_like_first};
use crate::ops::norm::NORMALIZED;

/// The records of this family.
pub static RULES: &[OpRule] = &[
    untrained("BiasAdd", infer_like_first, broadcast_axes),
    untrained("BiasDropout", dropout_infer, dropout_axes),
    untrained("BiasSoftmax", softmax_infer, softmax_axes),
    untrained("BiasSplitGelu", split_infer, split_axes),
];

/// Input slots of BiasDropout: data, bias and residual are added; ratio and mode are single values.
const SUMMED: usize = 3;

fn dropout_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let shape = cx.shape(0).map(<[_]>::to_vec);
    Ok(vec![Fact::new(cx.dtype(0), shape.clone()), Fact::new(Some(DType::Bool), shape)])
}

fn dropout_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    (0..SUMMED).for_each(|slot| cx.broadcast(&mut relations, slot));
    if cx.has(Slot::Out(1)) {
        cx.parallel(&mut relations, 0, 1, &[]);
    }
    relations
}

fn softmax_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    Ok(vec![Fact::new(cx.dtype(0), cx.shape(0).map(<[_]>::to_vec))])
}

/// `b n -> b n`, everything from `axis` on being normalized together.
fn softmax_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let rank = cx.shape(Slot::In(0)).len();
    (0..2).for_each(|slot| cx.broadcast(&mut relations, slot));
    let first = normalize_axis(cx.node.attr_int("axis").unwrap_or(1), rank).unwrap_or(0);
    (first..rank).for_each(|axis| relations.barrier((Slot::In(0), axis), NORMALIZED));
    relations
}

fn split_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let shape = cx.shape(0).map(|s| {
        let mut out = s.to_vec();
        if let Some(last) = out.last_mut() {
            *last = last.floor_div(&Dim::from(2i64));
        }
        out
    });
    Ok(vec![Fact::new(cx.dtype(0), shape)])
}

fn split_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let Some(last) = cx.shape(Slot::In(0)).len().checked_sub(1) else { return relations };
    cx.parallel(&mut relations, 0, 0, &[last]);
    for at in [(Slot::In(0), last), (Slot::In(1), 0), (Slot::Out(0), last)] {
        relations.barrier(at, "the operator's kernel exists for a few widths only");
    }
    relations
}
