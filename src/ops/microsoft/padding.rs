//! RemovePadding and RestorePadding: sequences of a batch written one after the other, without what pads them, and back.
//!
//! Shape: `x [B, N, D]`, lengths `[B]` -> `[T, D]`, offsets `[B, N]`, sums of lengths `[B+1]`, the longest `[1]`; and `[T, D]`,
//! `[B, N]` -> `[B, N, D]`. The width is parallel; which tokens are kept depends on data. No kernel for processors.

use super::untrained;
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::DType;
use crate::infer::{Dim, Fact, InferCx, InferError};
use crate::ops::OpRule;

/// The records of this family.
pub static RULES: &[OpRule] =
    &[untrained("RemovePadding", remove_infer, width_axes), untrained("RestorePadding", restore_infer, width_axes)];

fn remove_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let int = |shape: Option<Vec<Dim>>| Fact::new(Some(DType::I32), shape);
    let Some([batch, tokens, width]) = cx.shape(0) else {
        return Ok(vec![Fact::new(cx.dtype(0), None), int(None), int(None), int(None)]);
    };
    let one = Dim::from(1i64);
    Ok(vec![
        Fact::new(cx.dtype(0), Some(vec![cx.fresh("tokens"), width.clone()])),
        int(Some(vec![batch.clone(), tokens.clone()])),
        int(Some(vec![batch + &one])),
        int(Some(vec![one])),
    ])
}

fn restore_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let shape = match (cx.shape(0), cx.shape(1)) {
        (Some([_, width]), Some([batch, tokens])) => Some(vec![batch.clone(), tokens.clone(), width.clone()]),
        _ => None,
    };
    Ok(vec![Fact::new(cx.dtype(0), shape)])
}

/// Only the last axis goes through.
fn width_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let last = |slot: Slot| (slot, cx.shape(slot).len().saturating_sub(1));
    relations.same(last(Slot::In(0)), last(Slot::Out(0)));
    relations
}
