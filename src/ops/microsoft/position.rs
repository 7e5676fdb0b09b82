//! Biases of logits made from positions: RelativePositionBias (T5) and GatedRelativePositionBias (WavLM).
//!
//! Shape: table `[buckets, H]`, two lengths -> `[1, H, N, M]`. Gated: `q [B, N, H*E]` and its bias, `[1, H, N, N]`, weight `[E, G]`, bias
//! `[G]`, `[1, H, 1, 1]` -> `[B, H, N, N]`: a gate from each query's head multiplies the bias; the widths of heads are contracted with
//! the weight. Heads are parallel; buckets are looked up.

use super::{fused, untrained};
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::AttrValue;
use crate::infer::{Dim, Fact, InferCx, InferError};
use crate::ops::attention::remains;
use crate::ops::{Grad, OpRule, Refit};
use crate::slice::refit::{RefitCx, RefitError};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    OpRule {
        grad: Grad::No("the buckets of relative positions are not written out in standard operators"),
        ..fused("RelativePositionBias", relative_infer, relative_axes)
    },
    OpRule { refit: Refit::Rule(gated_refit), ..untrained("GatedRelativePositionBias", gated_infer, gated_axes) },
];

fn relative_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let Some([_, heads]) = cx.shape(0) else { return Ok(vec![Fact::new(cx.dtype(0), None)]) };
    let length = |slot: usize| match cx.ints(slot) {
        Some([n]) => n.clone(),
        _ => cx.fresh(if slot == 1 { "queries" } else { "keys" }),
    };
    Ok(vec![Fact::new(cx.dtype(0), Some(vec![Dim::from(1i64), heads.clone(), length(1), length(2)]))])
}

fn relative_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    relations.barrier((Slot::In(0), 0), "positions are looked up in this axis");
    relations.same((Slot::In(0), 1), (Slot::Out(0), 1));
    for slot in [Slot::In(1), Slot::In(2)] {
        (0..cx.shape(slot).len()).for_each(|axis| relations.unread((slot, axis)));
    }
    (2..4).for_each(|axis| relations.barrier((Slot::Out(0), axis), "computed from positions"));
    relations
}

const QUERY: Slot = Slot::In(0);
const QUERY_BIAS: Slot = Slot::In(1);
const POSITIONS: Slot = Slot::In(2);
const WEIGHT: Slot = Slot::In(3);
const WEIGHT_BIAS: Slot = Slot::In(4);
const FACTOR: Slot = Slot::In(5);

fn gated_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let shape = match (cx.shape(0), cx.shape(2)) {
        (Some([batch, _, _]), Some([_, heads, n, m])) => Some(vec![batch.clone(), heads.clone(), n.clone(), m.clone()]),
        _ => None,
    };
    Ok(vec![Fact::new(cx.dtype(0), shape)])
}

fn gated_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let (heads, width) = (cx.node.attr_int("num_heads").filter(|n| *n > 0), cx.shape(WEIGHT).first());
    let (Some(heads), Some(width), [_, _, _]) = (heads, width, cx.shape(QUERY)) else { return relations };
    let r = &mut relations;
    let apart = r.virtual_value(vec![Dim::from(heads), width.clone()]);
    r.regroup((QUERY, vec![2]), (apart, vec![0, 1]));
    r.same((QUERY_BIAS, 0), (QUERY, 2));
    r.contract((apart, 1), (WEIGHT, 0));
    r.same((apart, 0), (Slot::Out(0), 1));
    r.same((POSITIONS, 1), (Slot::Out(0), 1));
    r.same((FACTOR, 1), (Slot::Out(0), 1));
    r.same((QUERY, 0), (Slot::Out(0), 0));
    r.same((QUERY, 1), (Slot::Out(0), 2));
    r.same((POSITIONS, 2), (Slot::Out(0), 2));
    r.same((POSITIONS, 3), (Slot::Out(0), 3));
    r.barrier((WEIGHT, 1), "summed in two halves");
    r.barrier((WEIGHT_BIAS, 0), "summed in two halves");
    relations
}

fn gated_refit(cx: &mut RefitCx<'_>) -> Result<(), RefitError> {
    let before = cx.node().attr_int("num_heads");
    let after = remains(cx, 0, before)?.and_then(|r| i64::try_from(r.heads).ok());
    if let (Some(after), true) = (after, after != before) {
        cx.set_attr("num_heads", AttrValue::Int(after));
    }
    Ok(())
}
