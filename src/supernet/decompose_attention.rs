//! com.microsoft Attention, MultiHeadAttention, GroupQueryAttention and RotaryEmbedding, written out.
//!
//! Example: 3 heads, x [B, N, 48], weight [48, 144]: x W + b [B, N, 144], split in q, k, v [B, N, 48], each [B, 3, N, 16];
//! softmax(q k^T / 4 + mask) v, back to [B, N, 48]. Widths of q and v may differ.
//! What is not written here: keys of earlier runs, packed values and sequences.

use super::decompose::Fused;
use crate::graph::build::attr;
use crate::graph::{AttrValue, DType, Tensor, ValueId};
use crate::infer::Dim;
use crate::ops::microsoft::rotary;

/// What a masked key gets, unless the node says otherwise.
const MASK_FILTER: f32 = -10_000.0;

/// q, k and v by head, [B, H, N, width].
struct Operands {
    q: ValueId,
    k: ValueId,
    v: ValueId,
    /// Width of a head of q and k.
    width: i64,
    /// Width of all heads of v.
    all_values: i64,
}

/// Inputs: x, weight, bias, mask, past, attention bias.
pub(super) fn attention(f: &mut Fused<'_>) -> Option<ValueId> {
    if f.input(4).is_some() || f.input(6).is_some() || f.is_read(1) || f.int("do_rotary", 0) != 0 {
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
    let operands = operands(f, [parts[0], parts[1], parts[2]], [sizes[0], sizes[2]])?;
    let terms = bidirectional_terms(f, &operands, f.input(3), f.input(5))?;
    Some(attend(f, &operands, &terms))
}

/// Inputs: query, key, value, bias, key mask, attention bias, past key, past value.
pub(super) fn multi_head(f: &mut Fused<'_>) -> Option<ValueId> {
    let has_past = (6..10).any(|slot| f.input(slot).is_some()) || (1..4).any(|slot| f.is_read(slot));
    if has_past {
        return None;
    }
    let mut qkv = [f.input(0)?, f.input(1)?, f.input(2)?];
    if f.rank(qkv[1]) == Some(4) {
        let operands = operands_by_head(f, qkv)?;
        let terms = bidirectional_terms(f, &operands, f.input(4), f.input(5))?;
        return Some(attend(f, &operands, &terms));
    }
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
    let operands = operands(f, qkv, [sizes[0], sizes[2]])?;
    let terms = bidirectional_terms(f, &operands, f.input(4), f.input(5))?;
    Some(attend(f, &operands, &terms))
}

/// Keys and values are given by head, [B, H, M, E].
fn operands_by_head(f: &mut Fused<'_>, [q, k, v]: [ValueId; 3]) -> Option<Operands> {
    let (count, width) = (f.int("num_heads", 0), f.facts.shape(k)?.get(3)?.known()?);
    if count <= 0 || f.input(3).is_some() {
        return None;
    }
    let q = by_head(f, q, count, width);
    Some(Operands { q, k, v, width, all_values: count * width })
}

/// Inputs: query (or all in one), key, value, past key, past value, lengths, total, cos, sin, positions, attention bias, sinks.
pub(super) fn grouped_query(f: &mut Fused<'_>) -> Option<ValueId> {
    let empty = |slot: usize| f.input(slot).is_none_or(|v| f.facts.shape(v).and_then(|s| s.get(2)).is_some_and(|n| n.is(0)));
    let is_prompt = empty(3) && empty(4) && !(1..4).any(|slot| f.is_read(slot));
    let is_plain = f.int("local_window_size", -1) == -1 && f.int("smooth_softmax", 0) == 0 && f.float("softcap", 0.0) == 0.0;
    if !is_prompt || !is_plain || f.input(9).is_some() || f.input(11).is_some() {
        return None;
    }
    let (count, key_count) = (f.int("num_heads", 0), f.int("kv_num_heads", 0));
    let all = f.facts.shape(f.input(0)?)?.get(2)?.known()?;
    let heads = if f.input(1).is_some() { count } else { count + 2 * key_count };
    if count <= 0 || key_count <= 0 || count % key_count != 0 || all % heads != 0 {
        return None;
    }
    let width = all / heads;
    let qkv = match (f.input(1), f.input(2)) {
        (Some(k), Some(v)) => [f.input(0)?, k, v],
        _ => {
            let parts = split(f, f.input(0)?, 2, &[count * width, key_count * width, key_count * width]);
            [parts[0], parts[1], parts[2]]
        }
    };
    let [mut q, mut k, v] = [(qkv[0], count), (qkv[1], key_count), (qkv[2], key_count)].map(|(x, n)| by_head(f, x, n, width));
    if f.int("do_rotary", 0) != 0 {
        let (cos, sin) = (f.input(7)?, f.input(8)?);
        let rotated = f.facts.shape(cos)?.get(1)?.known()? * 2;
        let places = places(f, q, 2);
        let tables = [cos, sin].map(|table| f.b.gather(table, places, 0));
        let interleaved = f.int("rotary_interleaved", 0) != 0;
        [q, k] = [q, k].map(|x| rotate(f, x, tables, Rotation { rotated, width, interleaved }));
    }
    let [k, v] = [k, v].map(|x| repeat(f, x, (key_count, count), width));
    let operands = Operands { q, k, v, width, all_values: count * width };
    let mut terms = vec![later(f, &operands), padding(f, &operands)?];
    terms.extend(f.input(10));
    Some(attend(f, &operands, &terms))
}

/// `[B, K, N, E] -> [B, H, N, E]`, each head as often as query heads share it.
fn repeat(f: &mut Fused<'_>, x: ValueId, (from, to): (i64, i64), width: i64) -> ValueId {
    if from == to {
        return x;
    }
    let apart = f.b.unsqueeze(x, &[2]);
    let repeats = f.b.ints(&[1, 1, to / from, 1, 1]);
    let wide = f.b.op("Expand", &[apart, repeats], vec![]);
    f.b.reshape(wide, &[0, to, -1, width])
}

/// What hides the keys behind the number that `lengths` has, `[B, 1, 1, T]`.
fn padding(f: &mut Fused<'_>, operands: &Operands) -> Option<ValueId> {
    let places = places(f, operands.k, 2);
    let last = f.b.cast(f.input(5)?, DType::I64);
    let last = f.b.unsqueeze(last, &[1, 2, 3]);
    let hidden = f.b.op("Greater", &[places, last], vec![]);
    Some(hide(f, hidden))
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

/// `[B, N, H*E] -> [B, H, N, E]`
fn by_head(f: &mut Fused<'_>, x: ValueId, count: i64, width: i64) -> ValueId {
    let parts = f.b.reshape(x, &[0, 0, count, width]);
    f.b.transpose(parts, &[0, 2, 1, 3])
}

/// q, k and v of [B, N, width] by head.
fn operands(f: &mut Fused<'_>, [q, k, v]: [ValueId; 3], [qk_width, v_width]: [i64; 2]) -> Option<Operands> {
    let count = f.int("num_heads", 0);
    if count <= 0 || qk_width % count != 0 || v_width % count != 0 {
        return None;
    }
    let width = qk_width / count;
    let [q, k, v] = [(q, width), (k, width), (v, v_width / count)].map(|(x, width)| by_head(f, x, count, width));
    Some(Operands { q, k, v, width, all_values: v_width })
}

/// What is added to the logits, where `unidirectional` says whether keys behind the query are hidden.
fn bidirectional_terms(
    f: &mut Fused<'_>,
    operands: &Operands,
    mask: Option<ValueId>,
    bias: Option<ValueId>,
) -> Option<Vec<ValueId>> {
    let mut terms = Vec::new();
    if let Some(mask) = mask {
        terms.push(mask_terms(f, mask, operands)?);
    }
    if f.int("unidirectional", 0) != 0 {
        terms.push(later(f, operands));
    }
    terms.extend(bias);
    Some(terms)
}

/// `softmax(q k^T * scale + terms) v` in every head, back in [B, N, width].
fn attend(f: &mut Fused<'_>, operands: &Operands, terms: &[ValueId]) -> ValueId {
    let given = f.float("scale", 0.0);
    let scale = if given == 0.0 { 1.0 / (operands.width as f32).sqrt() } else { given };
    let q = f.scaled(operands.q, scale);
    let k = f.b.transpose(operands.k, &[0, 1, 3, 2]);
    let mut logits = f.b.matmul(q, k);
    for term in terms {
        logits = f.b.add(logits, *term);
    }
    let p = f.b.op("Softmax", &[logits], vec![attr("axis", AttrValue::Int(3))]);
    let out = f.b.matmul(p, operands.v);
    let out = f.b.transpose(out, &[0, 2, 1, 3]);
    f.b.reshape(out, &[0, 0, operands.all_values])
}

/// 0, 1, .. along an axis of a value, as int64.
fn places(f: &mut Fused<'_>, value: ValueId, axis: i64) -> ValueId {
    let shape = f.b.shape_of(value);
    let (at, zero, step) = (scalar(f, axis), scalar(f, 0), scalar(f, 1));
    let length = f.b.gather(shape, at, 0);
    f.b.op("Range", &[zero, length, step], vec![])
}

/// A logit that hides where `hidden`, else 0.
fn hide(f: &mut Fused<'_>, hidden: ValueId) -> ValueId {
    let lowest = if f.dtype() == DType::F16 { -6e4 } else { -1e30 };
    let (lowest, zero) = (f.scalar(lowest), f.scalar(0.0));
    f.b.op("Where", &[hidden, lowest, zero], vec![])
}

/// What hides the keys behind each query, `[N, T]`.
fn later(f: &mut Fused<'_>, operands: &Operands) -> ValueId {
    let (queries, keys) = (places(f, operands.q, 2), places(f, operands.k, 2));
    let queries = f.b.unsqueeze(queries, &[1]);
    let hidden = f.b.op("Greater", &[keys, queries], vec![]);
    hide(f, hidden)
}

/// What a key mask adds to the logits [B, H, N, T]. Masks hold 1 for keys that stay ([B, T], [B, N, T]), or the number of
/// leading keys that stay ([B]), or for each sample the end and, behind the ends of all, the start of those that stay ([2 B]).
fn mask_terms(f: &mut Fused<'_>, mask: ValueId, operands: &Operands) -> Option<ValueId> {
    let (filter, dtype) = (f.float("mask_filter_value", MASK_FILTER), f.dtype());
    let kept = match f.rank(mask)? {
        1 => {
            let (count, batch) = (&f.facts.shape(mask)?[0], &f.facts.shape(f.input(0)?)?[0]);
            let two = *count == batch * &Dim::from(2i64);
            if !two && count != batch {
                return None;
            }
            let places = places(f, operands.k, 2);
            let bounds = f.b.cast(mask, DType::I64);
            let bounds = f.b.reshape(bounds, &[if two { 2 } else { 1 }, -1, 1]);
            let at = scalar(f, 0);
            let ends = f.b.gather(bounds, at, 0);
            let before = f.b.op("Less", &[places, ends], vec![]);
            let mut kept = f.b.cast(before, dtype);
            if two {
                let at = scalar(f, 1);
                let starts = f.b.gather(bounds, at, 0);
                let early = f.b.op("Less", &[places, starts], vec![]);
                let early = f.b.cast(early, dtype);
                let (late, one) = (f.b.neg(early), f.scalar(1.0));
                let late = f.b.add(late, one);
                kept = f.b.mul(kept, late);
            }
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

/// Of the last axis of `width` positions the first `rotated` are rotated.
#[derive(Clone, Copy)]
struct Rotation {
    rotated: i64,
    width: i64,
    interleaved: bool,
}

/// Inputs: x, positions, cos, sin.
pub(super) fn rotary_embedding(f: &mut Fused<'_>) -> Option<ValueId> {
    let (x, ids, cos, sin) = (f.input(0)?, f.input(1)?, f.input(2)?, f.input(3)?);
    let shape = f.facts.shape(x)?;
    let layout = rotary::layout(&f.node, shape, f.facts.shape(cos)?).ok()?;
    let (heads, is_flat) = (layout.heads.known()?, shape.len() == 3);
    let (width, rotated) = (i64::try_from(layout.width).ok()?, i64::try_from(layout.rotated).ok()?);
    let (token_axis, head_axis) = if is_flat { (1, 2) } else { (2, 1) };
    let parts = if is_flat { f.b.reshape(x, &[0, 0, heads, width]) } else { x };
    let tables = match f.rank(ids)? {
        2 => [cos, sin].map(|table| {
            let rows = f.b.gather(table, ids, 0);
            f.b.unsqueeze(rows, &[head_axis])
        }),
        // The position of the first token.
        _ => {
            let places = places(f, x, token_axis);
            let places = f.b.add(places, ids);
            [cos, sin].map(|table| {
                let rows = f.b.gather(table, places, 0);
                if is_flat { f.b.unsqueeze(rows, &[1]) } else { rows }
            })
        }
    };
    let y = rotate(f, parts, tables, Rotation { rotated, width, interleaved: layout.interleaved });
    Some(if is_flat { f.b.reshape(y, &[0, 0, heads * width]) } else { y })
}

/// `real = a cos - b sin`, `imag = a sin + b cos` of the pairs (a, b) of the last axis of a value of rank 4.
fn rotate(f: &mut Fused<'_>, x: ValueId, [cos, sin]: [ValueId; 2], r: Rotation) -> ValueId {
    let half = r.rotated / 2;
    let [a, b] = if r.interleaved {
        let front = f.b.slice(x, &[0], &[r.rotated], &[3]);
        let pairs = f.b.reshape(front, &[0, 0, 0, half, 2]);
        [0, 1].map(|i| {
            let at = scalar(f, i);
            f.b.gather(pairs, at, 4)
        })
    } else {
        [0, half].map(|start| f.b.slice(x, &[start], &[start + half], &[3]))
    };
    let (p, q) = (f.b.mul(a, cos), f.b.mul(b, sin));
    let real = f.b.sub(p, q);
    let (p, q) = (f.b.mul(a, sin), f.b.mul(b, cos));
    let imag = f.b.add(p, q);
    let mut pieces = if r.interleaved {
        let pairs = [real, imag].map(|part| f.b.unsqueeze(part, &[4]));
        let joined = f.b.concat(&pairs, 4);
        vec![f.b.reshape(joined, &[0, 0, 0, r.rotated])]
    } else {
        vec![real, imag]
    };
    if r.rotated < r.width {
        pieces.push(f.b.slice(x, &[r.rotated], &[r.width], &[3]));
    }
    if pieces.len() == 1 { pieces[0] } else { f.b.concat(&pieces, 3) }
}
