//! com.microsoft Attention and MultiHeadAttention, written out.
//!
//! Example: 3 heads, x [B, N, 48], weight [48, 144]: x W + b [B, N, 144], split in q, k, v [B, N, 48], each [B, 3, N, 16];
//! softmax(q k^T / 4 + mask) v, back to [B, N, 48]. Widths of q and v may differ.

use super::decompose::Fused;
use crate::graph::build::attr;
use crate::graph::{AttrValue, DType, Tensor, ValueId};
use crate::infer::Dim;

/// What a masked key gets, unless the node says otherwise.
const MASK_FILTER: f32 = -10_000.0;

/// Inputs: x, weight, bias, mask, past, attention bias.
pub(super) fn attention(f: &mut Fused<'_>) -> Option<ValueId> {
    if f.input(4).is_some()
        || f.input(6).is_some()
        || f.is_read(1)
        || f.int("unidirectional", 0) != 0
        || f.int("do_rotary", 0) != 0
    {
        return None;
    }
    let (x, weight) = (f.input(0)?, f.input(1)?);
    let total = f.facts.shape(weight)?.get(1).and_then(Dim::known)?;
    let sizes = match f.node.attr_ints("qkv_hidden_sizes") {
        Some(sizes) if sizes.len() == 3 => sizes.to_vec(),
        Some(_) => return None,
        None => vec![total / 3; 3],
    };
    let mut product = f.b.matmul(x, weight);
    if let Some(bias) = f.input(2) {
        product = f.b.add(product, bias);
    }
    let parts = split(f, product, 2, &sizes);
    heads(f, [parts[0], parts[1], parts[2]], [sizes[0], sizes[2]], f.input(3), f.input(5))
}

/// Inputs: query, key, value, bias, key mask, attention bias, past key, past value.
pub(super) fn multi_head(f: &mut Fused<'_>) -> Option<ValueId> {
    let has_past = (6..10).any(|slot| f.input(slot).is_some()) || (1..4).any(|slot| f.is_read(slot));
    if has_past || f.int("unidirectional", 0) != 0 {
        return None;
    }
    let mut qkv = [f.input(0)?, f.input(1)?, f.input(2)?];
    let width = |f: &Fused<'_>, v: ValueId| match f.facts.shape(v)? {
        [_, _, width] => width.known(),
        _ => None,
    };
    let sizes = [width(f, qkv[0])?, width(f, qkv[1])?, width(f, qkv[2])?];
    if let Some(bias) = f.input(3) {
        let bias = f.own(bias);
        let parts = split(f, bias, 0, &sizes);
        for (side, part) in qkv.iter_mut().zip(parts) {
            *side = f.b.add(*side, part);
        }
    }
    heads(f, qkv, [sizes[0], sizes[2]], f.input(4), f.input(5))
}

/// Parts along an axis.
fn split(f: &mut Fused<'_>, x: ValueId, axis: i64, sizes: &[i64]) -> Vec<ValueId> {
    let axis = attr("axis", AttrValue::Int(axis));
    if f.b.opset() >= 13 {
        let sizes_input = f.b.ints(sizes);
        return f.b.ops("Split", &[x, sizes_input], vec![axis], sizes.len());
    }
    f.b.ops("Split", &[x], vec![axis, attr("split", AttrValue::Ints(sizes.to_vec()))], sizes.len())
}

/// `softmax(q k^T * scale + mask + bias) v` in every head. q, k, v: [B, N, width].
fn heads(
    f: &mut Fused<'_>,
    [q, k, v]: [ValueId; 3],
    [qk_width, v_width]: [i64; 2],
    mask: Option<ValueId>,
    bias: Option<ValueId>,
) -> Option<ValueId> {
    let count = f.int("num_heads", 0);
    if count <= 0 || qk_width % count != 0 || v_width % count != 0 {
        return None;
    }
    let head = qk_width / count;
    let terms = match mask {
        Some(mask) => Some(mask_terms(f, mask, k)?),
        None => None,
    };
    let given = f.float("scale", 0.0);
    let scale = if given == 0.0 { 1.0 / (head as f32).sqrt() } else { given };
    let apart = |f: &mut Fused<'_>, x: ValueId, width: i64, perm: &[usize]| {
        let parts = f.b.reshape(x, &[0, 0, count, width]);
        f.b.transpose(parts, perm)
    };
    let q = apart(f, q, head, &[0, 2, 1, 3]);
    let k = apart(f, k, head, &[0, 2, 3, 1]);
    let v = apart(f, v, v_width / count, &[0, 2, 1, 3]);
    let q = f.scaled(q, scale);
    let mut logits = f.b.matmul(q, k);
    for term in [terms, bias].into_iter().flatten() {
        logits = f.b.add(logits, term);
    }
    let p = f.b.op("Softmax", &[logits], vec![attr("axis", AttrValue::Int(3))]);
    let out = f.b.matmul(p, v);
    let out = f.b.transpose(out, &[0, 2, 1, 3]);
    Some(f.b.reshape(out, &[0, 0, v_width]))
}

/// What a key mask adds to the logits [B, H, N, T]. Masks hold 1 for keys that stay ([B, T], [B, N, T]), or the number of
/// leading keys that stay ([B]).
fn mask_terms(f: &mut Fused<'_>, mask: ValueId, keys: ValueId) -> Option<ValueId> {
    let (filter, dtype) = (f.float("mask_filter_value", MASK_FILTER), f.dtype());
    let kept = match f.rank(mask)? {
        1 => {
            let shape = f.b.shape_of(keys);
            let (one, zero, step) = (scalar(f, 1), scalar(f, 0), scalar(f, 1));
            let length = f.b.gather(shape, one, 0);
            let places = f.b.op("Range", &[zero, length, step], vec![]);
            let counts = f.b.cast(mask, DType::I64);
            let counts = f.b.unsqueeze(counts, &[1]);
            let before = f.b.op("Less", &[places, counts], vec![]);
            let kept = f.b.cast(before, dtype);
            f.b.unsqueeze(kept, &[1, 2])
        }
        2 => {
            let kept = f.b.cast(mask, dtype);
            f.b.unsqueeze(kept, &[1, 2])
        }
        3 => {
            let kept = f.b.cast(mask, dtype);
            f.b.unsqueeze(kept, &[1])
        }
        _ => return None,
    };
    // (1 - kept) * filter
    let scaled = f.scaled(kept, -filter);
    Some(f.shifted(scaled, filter))
}

fn scalar(f: &mut Fused<'_>, value: i64) -> ValueId {
    f.b.constant(Tensor::i64_scalar(value))
}
