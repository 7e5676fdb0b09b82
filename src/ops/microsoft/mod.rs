//! Operators of ONNX Runtime's own domain, com.microsoft: what it fuses when it saves an optimized graph, and what its optimizer for
//! transformers writes. Graphs are cut through them as they are; nothing is taken apart.
//!
//! None has a gradient: `augment` and `search` train a copy of the graph in which they are written out in standard operators
//! (`supernet/decompose.rs`). Operators without a kernel for processors are marked so in their fixtures, where the shapes come from
//! the operator's own shape inference. Source: docs/ContribOperators.md of microsoft/onnxruntime 1.24.

pub mod activation;
pub mod attention;
pub mod bias;
pub mod embed;
pub mod grouped_query;
pub mod matmul;
pub mod multi_head;
pub mod norm;
pub mod padding;
pub mod position;
pub mod rotary;

use super::attention::{implied_scale, relate};
use super::{Axes, Cost, Grad, OpRule, Refit};
use crate::axes::relation::{At, AxesCx, Relations, Slot};
use crate::graph::{AttrValue, Node};
use crate::infer::{Dim, Fact, InferCx, InferError};
use crate::slice::refit::RefitCx;

type Infer = fn(&InferCx<'_>) -> Result<Vec<Fact>, InferError>;
type AxesRule = fn(&AxesCx<'_>) -> Relations;

/// The record of an operator that is written out before it is differentiated; it has no products and no sizes of its own.
const fn fused(name: &'static str, infer: Infer, axes: AxesRule) -> OpRule {
    OpRule {
        name,
        domain: "com.microsoft",
        opsets: (1, 1),
        infer,
        axes: Axes::Rule(axes),
        grad: Grad::No("augment writes it out in standard operators"),
        cost: Cost::Free,
        refit: Refit::Nothing,
    }
}

/// The same for an operator that is not written out.
const fn untrained(name: &'static str, infer: Infer, axes: AxesRule) -> OpRule {
    OpRule {
        grad: Grad::No("not written out in standard operators: there is no kernel for processors to hold it against"),
        ..fused(name, infer, axes)
    }
}

/// Operators that compute the whole of attention.
pub(super) const FUSED_ATTENTION: &[&str] =
    &["Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention", "PackedMultiHeadAttention"];

/// A barrier on every axis of every input and output.
fn refuse_all(cx: &AxesCx<'_>, reason: &str) -> Relations {
    let mut relations = Relations::default();
    let inputs = (0..cx.node.inputs().len()).map(Slot::In);
    for slot in inputs.chain((0..cx.node.outputs().len()).map(Slot::Out)) {
        (0..cx.shape(slot).len()).for_each(|axis| relations.barrier((slot, axis), reason));
    }
    relations
}

/// What is added to logits `[B, H, N, T]`, with 1 where it is broadcast; `heads`, `queries`, `keys` are the axes that it follows, where they
/// are known.
fn bias_axes(cx: &AxesCx<'_>, relations: &mut Relations, slot: Slot, follows: [Option<(At, &Dim)>; 4]) {
    for (axis, (size, follows)) in cx.shape(slot).iter().zip(follows).enumerate() {
        match follows {
            Some((to, expected)) => relate(relations, ((slot, axis), size), &[to], expected),
            None if size.is(1) => {}
            None => relations.barrier((slot, axis), "positions of a packed sequence"),
        }
    }
}

/// Whether the node names a scale: 0 stands for none.
fn has_scale(node: &Node) -> bool {
    node.attr_float("scale").is_some_and(|s| s != 0.0)
}

/// Writes what changed of the number of heads, and the scale that the old width implied where the width changed.
fn refit_heads(cx: &mut RefitCx<'_>, heads: usize, (old, new): (usize, usize)) {
    let heads = i64::try_from(heads).unwrap_or(i64::MAX);
    if cx.node().attr_int("num_heads") != Some(heads) {
        cx.set_attr("num_heads", AttrValue::Int(heads));
    }
    if old != new && !has_scale(cx.node()) {
        cx.set_attr("scale", AttrValue::Float(implied_scale(old)));
    }
}
