//! Normalizations with what is added before: SkipLayerNormalization, SkipSimplifiedLayerNormalization, SkipGroupNorm, and GroupNorm;
//! SimplifiedLayerNormalization, which ONNX Runtime registers in the default domain.
//!
//! Shape: `x [B, N, D]`, `skip` broadcast to it, scale and biases `[D]` -> normalized `[B, N, D]`, mean and deviation `[B, N, 1]`, and
//! `x + skip + bias` as output 3. Statistics are taken over the last axis, which is a barrier.

use super::{fused, untrained};
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::DType;
use crate::infer::{Dim, Fact, InferCx, InferError};
use crate::ops::OpRule;
use crate::ops::norm::{NORMALIZED, infer_layer, infer_same, layer_axes};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    fused("SkipLayerNormalization", skip_infer, skip_axes),
    fused("SkipSimplifiedLayerNormalization", skip_infer, skip_axes),
    OpRule { domain: "", opsets: (1, 24), ..fused("SimplifiedLayerNormalization", infer_layer, layer_axes) },
    untrained("GroupNorm", infer_same, group_axes),
    untrained("SkipGroupNorm", skip_group_infer, group_axes),
];

/// Output with the sum that is normalized.
const SUM: usize = 3;

fn skip_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let shape = cx.shape(0).map(<[_]>::to_vec);
    let statistic = shape.clone().map(|mut s| {
        if let Some(last) = s.last_mut() {
            *last = Dim::from(1i64);
        }
        s
    });
    let statistic = Fact::new(Some(DType::F32), statistic);
    let like_x = Fact::new(cx.dtype(0), shape);
    Ok(vec![like_x.clone(), statistic.clone(), statistic, like_x])
}

/// `b n, b n, n, n, n -> b n`, the last axis being normalized; the sum is parallel.
fn skip_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let Some(last) = cx.shape(Slot::In(0)).len().checked_sub(1) else { return relations };
    (0..cx.node.inputs().len()).for_each(|slot| cx.broadcast(&mut relations, slot));
    relations.barrier((Slot::In(0), last), NORMALIZED);
    for statistic in (1..SUM).filter(|slot| cx.has(Slot::Out(*slot))) {
        cx.parallel(&mut relations, 0, statistic, &[last]);
    }
    if cx.has(Slot::Out(SUM)) {
        cx.parallel(&mut relations, 0, SUM, &[]);
    }
    relations
}

fn skip_group_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let facts = infer_same(cx)?;
    Ok([facts.clone(), facts].concat())
}

/// Samples are parallel; a group of channels is normalized together with all positions.
fn group_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    for out in (0..2).filter(|out| cx.has(Slot::Out(*out))) {
        relations.same((Slot::In(0), 0), (Slot::Out(out), 0));
        (1..cx.shape(Slot::Out(out)).len()).for_each(|axis| relations.barrier((Slot::Out(out), axis), NORMALIZED));
    }
    for slot in 0..cx.node.inputs().len() {
        let first = usize::from(slot == 0);
        (first..cx.shape(Slot::In(slot)).len()).for_each(|axis| relations.barrier((Slot::In(slot), axis), NORMALIZED));
    }
    relations
}
