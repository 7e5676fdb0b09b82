//! QuantizeLinear and DequantizeLinear (opset 10 to 24, and com.microsoft), DynamicQuantizeLinear (opset 11).
//!
//! Shape: output as input. Scale and zero point are one number, one per position of `axis`, or one per block of `block_size` positions
//! along `axis` (opset 21), then of the input's rank. Example: an int8 weight `[48, 192]` with a scale `[192]` on axis 1 loses columns
//! of all three together. DynamicQuantizeLinear finds one scale for the whole value from its least and greatest element, 0 included.

use super::{MICROSOFT, NO_GRAD};
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::{AttrValue, DType, Node};
use crate::infer::{Fact, InferCx, InferError, normalize_axis};
use crate::ops::{Axes, Cost, OpRule, Refit};
use crate::slice::refit::{Edit, RefitCx, RefitError};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    quantize("QuantizeLinear", "", (10, 24), quantize_infer),
    quantize("DequantizeLinear", "", (10, 24), dequantize_infer),
    quantize("QuantizeLinear", MICROSOFT, (1, 1), quantize_infer),
    quantize("DequantizeLinear", MICROSOFT, (1, 1), dequantize_infer),
    OpRule {
        name: "DynamicQuantizeLinear",
        domain: "",
        opsets: (11, 24),
        infer: dynamic_infer,
        axes: Axes::Rule(dynamic_axes),
        grad: NO_GRAD,
        cost: Cost::Free,
        refit: Refit::Nothing,
    },
];

type Infer = fn(&InferCx<'_>) -> Result<Vec<Fact>, InferError>;

const fn quantize(name: &'static str, domain: &'static str, opsets: (i64, i64), infer: Infer) -> OpRule {
    OpRule {
        name,
        domain,
        opsets,
        infer,
        axes: Axes::Rule(linear_axes),
        grad: NO_GRAD,
        cost: Cost::Free,
        refit: Refit::Rule(linear_refit),
    }
}

fn typed(cx: &InferCx<'_>, dtype: Option<DType>) -> Vec<Fact> {
    vec![Fact::new(dtype, cx.shape(0).map(<[_]>::to_vec))]
}

fn output_dtype(cx: &InferCx<'_>) -> Option<DType> {
    let number = cx.node.attr_int("output_dtype").filter(|n| *n != 0)?;
    DType::from_onnx(i32::try_from(number).ok()?)
}

fn quantize_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    Ok(typed(cx, cx.dtype(2).or_else(|| output_dtype(cx)).or(Some(DType::U8))))
}

fn dequantize_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    Ok(typed(cx, output_dtype(cx).or_else(|| cx.dtype(1))))
}

/// y, and its scale and zero point.
fn dynamic_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let y = typed(cx, Some(DType::U8));
    Ok(y.into_iter().chain([DType::F32, DType::U8].map(|d| Fact::new(Some(d), Some(Vec::new())))).collect())
}

/// Positions of a block; `None` where scales are not blocked.
fn block_size(node: &Node) -> Option<usize> {
    node.attr_int("block_size").and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0)
}

/// `n.. -> n..`; a scale per position goes with its axis, one per block asks for whole blocks.
fn linear_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let x = cx.shape(Slot::In(0));
    cx.parallel(&mut relations, 0, 0, &[]);
    let axis = normalize_axis(cx.node.attr_int("axis").unwrap_or(1), x.len());
    let parameters = [1, 2].into_iter().filter(|slot| cx.has(Slot::In(*slot)));
    match (axis, block_size(cx.node)) {
        (Some(axis), Some(size)) => {
            for slot in parameters {
                let scale = Slot::In(slot);
                if cx.shape(scale).len() != x.len() || !cx.value(scale).is_some_and(|v| cx.graph.is_constant(v)) {
                    relations.barrier((Slot::In(0), axis), "has scales of blocks that are no constants");
                    continue;
                }
                cx.parallel(&mut relations, slot, 0, &[axis]);
                relations.unread((scale, axis));
            }
            relations.blocks((Slot::In(0), axis), smallest_block(size), Some(format!("is quantized in blocks of {size}")));
        }
        (Some(axis), None) => {
            for slot in parameters.filter(|slot| cx.shape(Slot::In(*slot)) == std::slice::from_ref(&x[axis])) {
                relations.same((Slot::In(slot), 0), (Slot::In(0), axis));
            }
        }
        (None, _) => {}
    }
    relations
}

/// The smallest block that products of such weights have kernels for.
pub(super) const BLOCK_MIN: usize = 16;

/// Blocks are halved where that lets more be cut, but not below the smallest.
fn smallest_block(size: usize) -> usize {
    if size.is_power_of_two() { size.min(BLOCK_MIN) } else { size }
}

/// Blocks that remain keep their scale and zero point; where parts of blocks remain, each has those of the whole.
fn linear_refit(cx: &mut RefitCx<'_>) -> Result<(), RefitError> {
    let rank = cx.old_input(0).len();
    let Some((axis, size)) = normalize_axis(cx.node().attr_int("axis").unwrap_or(1), rank).zip(block_size(cx.node())) else {
        return Ok(());
    };
    let Some(kept) = cx.kept_input(0, axis) else { return Ok(()) };
    let count = cx.old_input(0)[axis].size().unwrap_or(0);
    let found = largest_blocks(kept, (size, smallest_block(size)), count);
    let (left, blocks) = found.ok_or_else(|| cx.error(format!("parts of blocks of {size} remain")))?;
    let parts = size / left;
    let owners: Vec<usize> = blocks.iter().map(|b| b / parts).collect();
    let node = cx.node();
    for slot in [1, 2].into_iter().filter(|slot| node.input(*slot).is_some()) {
        let kept = owners.clone();
        cx.edit_constant(
            slot,
            if parts == 1 { Edit::Take { axis, kept } } else { Edit::Repack(Box::new(move |t| t.take(axis, &kept))) },
        );
    }
    if parts > 1 {
        cx.set_attr("block_size", AttrValue::Int(i64::try_from(left).unwrap_or(i64::MAX)));
    }
    Ok(())
}

/// The largest blocks, from `largest` halved down to `smallest`, of which whole ones remain, and their numbers.
pub(super) fn largest_blocks(kept: &[usize], (largest, smallest): (usize, usize), count: usize) -> Option<(usize, Vec<usize>)> {
    let sizes = std::iter::successors(Some(largest), |size| Some(size / 2)).take_while(|size| *size >= smallest.max(1));
    sizes.into_iter().find_map(|size| Some((size, whole_blocks(kept, size, count)?)))
}

/// Numbers of the blocks that remain, where each is whole; the last block of `count` positions may be short, and then stays last.
fn whole_blocks(kept: &[usize], size: usize, count: usize) -> Option<Vec<usize>> {
    let mut blocks: Vec<usize> = kept.iter().map(|p| p / size).collect();
    blocks.dedup();
    let expected = blocks.iter().flat_map(|b| b * size..((b + 1) * size).min(count));
    kept.iter().copied().eq(expected).then_some(blocks)
}

/// `n.. -> n.., , `: what is removed must be zero, so that the range stays.
fn dynamic_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    cx.parallel(&mut relations, 0, 0, &[]);
    for axis in 0..cx.shape(Slot::In(0)).len() {
        relations.vanish(
            (Slot::In(0), axis),
            "the scale follows from the range of the whole value, in which a removed unit is not zero",
        );
    }
    relations
}
