//! Attention (opset 23 and 24) of the default domain; RotaryEmbedding is beside it.
//!
//! Shape: `q [B, H, Nq, E]`, `k [B, K, Nk, E]`, `v [B, K, Nk, Ev]` -> `[B, H, Nq, Ev]`, or 3-D with heads and width in one last
//! axis, `[B, Nq, H*E]`. Query head h reads key/value head `h / (H/K)`. `P = softmax(softcap(scale * q k^T + mask))`, `y = P v`.
//! Example: `[B, 197, 192]` with 3 heads: a virtual `[3, 64]` stands for the last axis of each of q, k, v and the output; the
//! width of q is contracted with that of k, the width of v is parallel to the output's, heads are parallel in all four.
//! A record of a fused operator says in [`FusedAttention`] which axes are heads and widths, so that anatomy sees its layer.

pub mod rotary;

use super::matmul::{contradict, scaled, swap_last};
use super::{Axes, Cost, CostCx, Grad, OpRule, Refit};
use crate::autodiff::GradCx;
use crate::axes::relation::{At, AxesCx, FusedAttention, KeyMask, Relations, Slot};
use crate::graph::build::attr;
use crate::graph::{AttrValue, DType, Node, Tensor, ValueId};
use crate::infer::{Dim, Fact, InferCx, InferError};
use crate::slice::refit::{RefitCx, RefitError};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    OpRule {
        name: "Attention",
        domain: "",
        opsets: (23, 24),
        infer: attention_infer,
        axes: Axes::Rule(attention_axes),
        grad: Grad::Rule(attention_grad),
        cost: Cost::Rule(attention_cost),
        refit: Refit::Rule(attention_refit),
    },
    rotary::RULE,
];

/// Whether an operator computes the whole of attention, so that its softmax is not a node of the graph.
pub fn is_fused_attention(domain: &str, op: &str) -> bool {
    match domain {
        "" | "ai.onnx" => op == "Attention",
        "com.microsoft" => super::microsoft::FUSED_ATTENTION.contains(&op),
        _ => false,
    }
}

pub(super) const KEYS: &str = "softmax is normalized over this axis";

/// Input slots.
const MASK: usize = 3;
const PAST_KEY: usize = 4;
const PAST_VALUE: usize = 5;
const KEY_LENGTHS: usize = 6;

/// Sizes of an attention node.
#[derive(Clone, Debug)]
struct Sizes {
    batch: Dim,
    /// Heads of the query, and of key and value.
    heads: Dim,
    key_heads: Dim,
    /// Query heads that share a key head.
    sharing: Dim,
    queries: Dim,
    /// Keys given to this run, and together with those of the past.
    keys: Dim,
    all_keys: Dim,
    /// Width of a head of q and k, and of v.
    width: Dim,
    value_width: Dim,
}

/// Axis of the tokens.
pub(super) fn token_axis(shape: &[Dim]) -> usize {
    if shape.len() == 4 { 2 } else { 1 }
}

/// Heads of an input: its own axis, or the attribute.
fn heads(node: &Node, shape: &[Dim], name: &str) -> Result<Dim, String> {
    if shape.len() == 4 {
        return Ok(shape[1].clone());
    }
    node.attr_int(name).filter(|n| *n > 0).map(Dim::from).ok_or_else(|| format!("{name} is missing"))
}

/// Width of a head.
fn width(shape: &[Dim], heads: &Dim) -> Result<Dim, String> {
    if shape.len() == 4 {
        return Ok(shape[3].clone());
    }
    share(&shape[2], heads).ok_or_else(|| format!("an axis of {} for {heads} heads", shape[2]))
}

/// `whole / count`; `None` where both are numbers and it leaves a rest.
fn share(whole: &Dim, count: &Dim) -> Option<Dim> {
    match (whole.known(), count.known()) {
        (Some(_), Some(_)) => whole.exact_div(count),
        _ => Some(whole.floor_div(count)),
    }
}

fn sizes(node: &Node, q: &[Dim], k: &[Dim], v: &[Dim], past: Option<&[Dim]>) -> Result<Sizes, String> {
    if [q, k, v].iter().any(|s| s.len() != 3 && s.len() != 4) {
        return Err(format!("inputs of rank {}, {} and {}, expected 3 or 4", q.len(), k.len(), v.len()));
    }
    let (heads, key_heads) = (heads(node, q, "q_num_heads")?, heads(node, k, "kv_num_heads")?);
    let sharing = share(&heads, &key_heads).ok_or_else(|| format!("{heads} query heads for {key_heads} key heads"))?;
    let (width, key_width, value_width) = (width(q, &heads)?, width(k, &key_heads)?, width(v, &key_heads)?);
    if contradict(&width, &key_width) {
        return Err(format!("heads of width {width} in the query, {key_width} in the key"));
    }
    let keys = k[token_axis(k)].clone();
    if contradict(&keys, &v[token_axis(v)]) {
        return Err(format!("{keys} keys and {} values", v[token_axis(v)]));
    }
    let all_keys = past.and_then(|p| p.get(2)).map_or_else(|| keys.clone(), |p| p + &keys);
    let queries = q[token_axis(q)].clone();
    Ok(Sizes { batch: q[0].clone(), heads, key_heads, sharing, queries, keys, all_keys, width, value_width })
}

fn attention_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let none = |slot: usize| Fact::new(cx.dtype(slot), None);
    let (Some(q), Some(k), Some(v)) = (cx.shape(0), cx.shape(1), cx.shape(2)) else {
        return Ok(vec![none(0), none(1), none(2), none(0)]);
    };
    let past = if cx.has_input(PAST_KEY) { Some(cx.shape(PAST_KEY)) } else { None };
    if past == Some(None) {
        return Ok(vec![none(0), none(1), none(2), none(0)]);
    }
    let s = sizes(cx.node, q, k, v, past.flatten()).map_err(|e| cx.error(e))?;
    let y = if q.len() == 4 {
        vec![s.batch.clone(), s.heads.clone(), s.queries.clone(), s.value_width.clone()]
    } else {
        vec![s.batch.clone(), s.queries.clone(), &s.heads * &s.value_width]
    };
    let present = |width: &Dim| vec![s.batch.clone(), s.key_heads.clone(), s.all_keys.clone(), width.clone()];
    let logits = vec![s.batch.clone(), s.heads.clone(), s.queries.clone(), s.all_keys.clone()];
    Ok(vec![
        Fact::new(cx.dtype(0), Some(y)),
        Fact::new(cx.dtype(1), Some(present(&s.width))),
        Fact::new(cx.dtype(2), Some(present(&s.value_width))),
        Fact::new(cx.dtype(0), Some(logits)),
    ])
}

/// The axes of a value with heads: key heads, query heads that share one (where more than one), tokens, width.
pub(super) struct HeadAxes {
    pub(super) head: At,
    pub(super) sharer: Option<At>,
    pub(super) tokens: At,
    pub(super) width: At,
}

/// Finds the axes of a value, through a virtual value where heads are part of a larger axis.
pub(super) fn head_axes(
    relations: &mut Relations,
    slot: Slot,
    rank: usize,
    key_heads: &Dim,
    sharing: &Dim,
    width: &Dim,
) -> HeadAxes {
    let mut factors = vec![key_heads.clone()];
    if !sharing.is(1) {
        factors.push(sharing.clone());
    }
    if rank == 4 && sharing.is(1) {
        return HeadAxes { head: (slot, 1), sharer: None, tokens: (slot, 2), width: (slot, 3) };
    }
    let axis = if rank == 4 { 1 } else { 2 };
    if rank != 4 {
        factors.push(width.clone());
    }
    let count = factors.len();
    let v = relations.virtual_value(factors);
    relations.regroup((slot, vec![axis]), (v, (0..count).collect()));
    let sharer = (!sharing.is(1)).then_some((v, 1));
    let (tokens, width) = if rank == 4 { ((slot, 2), (slot, 3)) } else { ((slot, 1), (v, count - 1)) };
    HeadAxes { head: (v, 0), sharer, tokens, width }
}

/// `b k r n |e|, b k m |e|, b k |m| f -> b k r n f`; keys are barriers, as the softmax is normalized over them.
fn attention_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let [q, k, v, y] = [Slot::In(0), Slot::In(1), Slot::In(2), Slot::Out(0)];
    let past = cx.has(Slot::In(PAST_KEY)).then(|| cx.shape(Slot::In(PAST_KEY)));
    let found = sizes(cx.node, cx.shape(q), cx.shape(k), cx.shape(v), past).ok();
    let splits = |s: &Sizes, slot: Slot, heads: &Dim, width: &Dim| {
        let shape = cx.shape(slot);
        &s.key_heads * &s.sharing == s.heads && (shape.len() == 4 || heads * width == shape[2])
    };
    let Some(s) = found.filter(|s| {
        splits(s, q, &s.heads, &s.width) && splits(s, k, &s.key_heads, &s.width) && splits(s, v, &s.key_heads, &s.value_width)
    }) else {
        for slot in [q, k, v, y] {
            (0..cx.shape(slot).len()).for_each(|a| relations.barrier((slot, a), "heads of a size that is not known"));
        }
        return relations;
    };
    let one = Dim::from(1i64);
    let rank = |slot: Slot| cx.shape(slot).len();
    let r = &mut relations;
    let q_axes = head_axes(r, q, rank(q), &s.key_heads, &s.sharing, &s.width);
    let k_axes = head_axes(r, k, rank(k), &s.key_heads, &one, &s.width);
    let v_axes = head_axes(r, v, rank(v), &s.key_heads, &one, &s.value_width);
    let y_axes = head_axes(r, y, rank(y), &s.key_heads, &s.sharing, &s.value_width);
    for other in [&k_axes, &v_axes, &y_axes] {
        r.same(q_axes.head, other.head);
    }
    if let (Some(a), Some(b)) = (q_axes.sharer, y_axes.sharer) {
        r.same(a, b);
    }
    r.contract(q_axes.width, k_axes.width);
    r.same(v_axes.width, y_axes.width);
    r.same(q_axes.tokens, y_axes.tokens);
    r.contract(k_axes.tokens, v_axes.tokens);
    r.barrier(k_axes.tokens, KEYS);
    for slot in [q, k, v] {
        relate(r, ((slot, 0), &cx.shape(slot)[0]), &[(y, 0)], &s.batch);
    }
    cache_axes(cx, r, &[(Slot::In(PAST_KEY), &k_axes), (Slot::Out(1), &k_axes)]);
    cache_axes(cx, r, &[(Slot::In(PAST_VALUE), &v_axes), (Slot::Out(2), &v_axes)]);
    let alone = !cx.has(Slot::In(PAST_KEY));
    for slot in [Slot::In(MASK), Slot::Out(3)] {
        logit_axes(cx, r, slot, &s, &q_axes);
        let last = cx.shape(slot).len().wrapping_sub(1);
        match cx.shape(slot).last() {
            Some(size) if alone && *size == s.keys => r.same((slot, last), k_axes.tokens),
            Some(size) if !size.is(1) => r.barrier((slot, last), KEYS),
            _ => {}
        }
    }
    let mask = KeyMask { keys: k_axes.tokens, queries: q_axes.tokens, bias: MASK };
    let whole = alone && !cx.has(Slot::In(KEY_LENGTHS)) && cx.shape(Slot::In(MASK)).last().is_none_or(|m| *m == s.keys);
    r.attention = Some(FusedAttention {
        head: q_axes.head,
        sharers: q_axes.sharer,
        qk: q_axes.width,
        vo: v_axes.width,
        mask: whole.then_some(mask),
    });
    if let [length] = cx.shape(Slot::In(KEY_LENGTHS)) {
        relate(r, ((Slot::In(KEY_LENGTHS), 0), length), &[(y, 0)], &s.batch);
    }
    relations
}

/// Relates an axis to another of size `expected`; size 1 is stretched, any other size is a barrier on both.
pub(super) fn relate(relations: &mut Relations, (at, size): (At, &Dim), to: &[At], expected: &Dim) {
    if size == expected {
        to.iter().for_each(|b| relations.same(at, *b));
    } else if !size.is(1) {
        relations.barrier(at, "sizes that are not known to be equal");
        to.iter().for_each(|b| relations.barrier(*b, "sizes that are not known to be equal"));
    }
}

/// Past and present keys or values, `[B, K, N, E]`: as the input, with tokens of earlier runs before it.
fn cache_axes(cx: &AxesCx<'_>, relations: &mut Relations, caches: &[(Slot, &HeadAxes)]) {
    for (slot, axes) in caches.iter().filter(|(slot, _)| cx.shape(*slot).len() == 4) {
        relations.same((*slot, 0), (Slot::Out(0), 0));
        relations.same((*slot, 1), axes.head);
        relations.barrier((*slot, 2), "keys and values of earlier runs");
        relations.same((*slot, 3), axes.width);
    }
}

/// The mask, aligned at the end of `[B, H, Nq, Nk]`, and the logits as an output; the caller relates the last axis.
fn logit_axes(cx: &AxesCx<'_>, relations: &mut Relations, slot: Slot, s: &Sizes, q: &HeadAxes) {
    let shape = cx.shape(slot);
    for (axis, size) in shape.iter().enumerate() {
        let at = (slot, axis);
        match shape.len() - axis {
            1 => {}
            2 => relate(relations, (at, size), &[q.tokens], &s.queries),
            3 if *size == s.heads => {
                if let Some(sharer) = q.sharer {
                    let v = relations.virtual_value(vec![s.key_heads.clone(), s.sharing.clone()]);
                    relations.regroup((slot, vec![axis]), (v, vec![0, 1]));
                    relations.same((v, 0), q.head);
                    relations.same((v, 1), sharer);
                } else {
                    relations.same(at, q.head);
                }
            }
            3 => relate(relations, (at, size), &[q.head], &s.heads),
            _ => relate(relations, (at, size), &[(Slot::Out(0), 0)], &s.batch),
        }
    }
}

/// `B * Nq * Nk * (H*E + H*Ev)`: widths of all heads together, so that it holds of any cut.
fn attention_cost(cx: &CostCx<'_>) -> Option<Dim> {
    let shape = |slot: usize| cx.inputs.get(slot).copied().flatten();
    let (q, k, y) = (shape(0)?, shape(1)?, cx.outputs.first().copied().flatten()?);
    let past = match cx.node.input(PAST_KEY) {
        Some(_) => shape(PAST_KEY)?.get(2)?.clone(),
        None => Dim::from(0i64),
    };
    let keys = k.get(token_axis(k))? + &past;
    Some([q.first()?, q.get(token_axis(q))?, &keys, &(&all_heads(q)? + &all_heads(y)?)].into_iter().product())
}

/// Width of all heads of a value.
pub(super) fn all_heads(shape: &[Dim]) -> Option<Dim> {
    match shape {
        [_, heads, _, width] => Some(heads * width),
        _ => shape.last().cloned(),
    }
}

/// What remains of an input's heads.
pub(super) struct Remains {
    /// Heads with any position left.
    pub(super) heads: usize,
    /// Positions that stay of the first of them, from 0 to the width.
    pub(super) first: Vec<usize>,
    /// Positions of a head before the cut.
    pub(super) width: usize,
}

/// What remains of input `slot`, which has `heads` heads in its last axis, or in axis 1 where it is of rank 4.
///
/// Errors: heads keep different numbers of positions.
pub(super) fn remains(cx: &RefitCx<'_>, slot: usize, heads: Option<i64>) -> Result<Option<Remains>, RefitError> {
    let shape = cx.old_input(slot);
    let size = |axis: usize| shape.get(axis).and_then(Dim::size);
    if shape.len() == 4 {
        let Some(width) = size(3) else { return Ok(None) };
        let first = cx.kept_input(slot, 3).map_or_else(|| (0..width).collect(), <[usize]>::to_vec);
        let heads = cx.kept_input(slot, 1).map(<[usize]>::len).or(size(1)).unwrap_or(0);
        return Ok(Some(Remains { heads, first, width }));
    }
    let last = shape.len().saturating_sub(1);
    let (Some(all), Some(heads)) = (size(last), heads.and_then(|h| usize::try_from(h).ok()).filter(|h| *h > 0)) else {
        return Ok(None);
    };
    let width = all / heads;
    let Some(kept) = cx.kept_input(slot, last) else { return Ok(Some(Remains { heads, first: (0..width).collect(), width })) };
    Remains::of(kept.iter().copied(), heads, width).map(Some).map_err(|what| cx.error(what))
}

impl Remains {
    /// Of `heads` heads of `width` positions each, by the positions that stay of all.
    pub(super) fn of(kept: impl Iterator<Item = usize>, heads: usize, width: usize) -> Result<Self, &'static str> {
        let mut per_head = vec![Vec::new(); heads];
        for position in kept {
            per_head.get_mut(position / width.max(1)).ok_or("a position outside the heads")?.push(position % width);
        }
        per_head.retain(|p| !p.is_empty());
        let first = per_head.first().cloned().unwrap_or_default();
        if per_head.iter().any(|p| p.len() != first.len()) {
            return Err("heads keep different numbers of positions");
        }
        Ok(Self { heads: per_head.len(), first, width })
    }
}

/// Head counts follow the cut; a scale that was implied by the old width is written out.
fn attention_refit(cx: &mut RefitCx<'_>) -> Result<(), RefitError> {
    let (q_heads, kv_heads) = (cx.node().attr_int("q_num_heads"), cx.node().attr_int("kv_num_heads"));
    let (q, k, v) = (remains(cx, 0, q_heads)?, remains(cx, 1, kv_heads)?, remains(cx, 2, kv_heads)?);
    if let (Some(q), Some(k), Some(v)) = (&q, &k, &v)
        && (k.heads != v.heads || k.heads == 0 || q.heads % k.heads != 0 || q.first.len() != k.first.len())
    {
        let what = format!(
            "{} query heads of {}, {} key heads of {}, {} value heads",
            q.heads,
            q.first.len(),
            k.heads,
            k.first.len(),
            v.heads
        );
        return Err(cx.error(what));
    }
    for (name, before, after) in [("q_num_heads", q_heads, &q), ("kv_num_heads", kv_heads, &k)] {
        let after = after.as_ref().and_then(|r| i64::try_from(r.heads).ok());
        if let (Some(before), Some(after)) = (before, after)
            && before != after
        {
            cx.set_attr(name, AttrValue::Int(after));
        }
    }
    if let Some(q) = q
        && q.first.len() != q.width
        && cx.node().attr_float("scale").is_none()
    {
        cx.set_attr("scale", AttrValue::Float(implied_scale(q.width)));
    }
    Ok(())
}

/// The scale where the node names none.
pub(super) fn implied_scale(width: usize) -> f32 {
    (1.0 / (width as f64).sqrt()) as f32
}

/// A logit of a key that must not be seen. Finite, so that a row of nothing else is uniform instead of not a number.
fn hidden_logit(dtype: DType) -> f32 {
    if dtype == DType::F16 { -3e4 } else { -1e30 }
}

/// With `L = scale * q k^T + mask`, `P = softmax(softcap(L))`, `y = P v`:
/// `dv = P^T dy`, `dP = dy v^T`, `dS = P * (dP - sum(dP * P))`, `dL = dS * softcap'(L)`, `dq = scale * dL k`, `dk = scale * dL^T q`.
fn attention_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let dy = cx.dy()?;
    if (1..4).any(|slot| cx.grad(slot).is_some()) {
        return Err("keys, values or logits of the operator have a gradient of their own".to_string());
    }
    if [PAST_KEY, PAST_VALUE, KEY_LENGTHS].iter().any(|s| cx.node().input(*s).is_some()) {
        return Err("attention over keys of earlier runs".to_string());
    }
    let (q, k, v) = (cx.input(0), cx.input(1), cx.input(2));
    let s = sizes(cx.node(), cx.shape(q), cx.shape(k), cx.shape(v), None)?;
    let numbers = (s.width.size(), s.heads.known(), s.key_heads.known(), s.value_width.known());
    let (Some(width), Some(heads), Some(key_heads), Some(value_width)) = numbers else {
        return Err("the number or width of heads is not known".to_string());
    };
    let shared = Shared { heads, key_heads, sharing: heads / key_heads.max(1) };
    let ranks = [q, k, v].map(|x| cx.shape(x).len());
    let scale = cx.node().attr_float("scale").unwrap_or(implied_scale(width));
    let q4 = split_heads(cx, q, ranks[0], heads);
    let q4 = scaled(cx, q4, scale, q);
    let k4 = split_heads(cx, k, ranks[1], key_heads);
    let k4 = shared.repeat(cx, k4, width as i64);
    let (probabilities, slope) = forward(cx, (q4, k4), &s)?;
    let dy = split_heads(cx, dy, ranks[0], heads);
    if cx.wants(2) {
        let p_t = swap_last(cx, probabilities, 4);
        let dv = cx.b.matmul(p_t, dy);
        let dv = shared.sum(cx, dv, value_width);
        let dv = merge_heads(cx, dv, ranks[2]);
        cx.give(2, dv);
    }
    if !(cx.wants(0) || cx.wants(1) || cx.wants(MASK)) {
        return Ok(());
    }
    let v4 = split_heads(cx, v, ranks[2], key_heads);
    let v4 = shared.repeat(cx, v4, value_width);
    let v_t = swap_last(cx, v4, 4);
    let dp = cx.b.matmul(dy, v_t);
    let weighted = cx.b.mul(dp, probabilities);
    let sum = cx.b.reduce_sum(weighted, &[3], true);
    let centred = cx.b.sub(dp, sum);
    let mut dl = cx.b.mul(centred, probabilities);
    if let Some(slope) = slope {
        dl = cx.b.mul(dl, slope);
    }
    if cx.wants(MASK) {
        mask_grad(cx, dl, &s)?;
    }
    if cx.wants(0) {
        let dq = cx.b.matmul(dl, k4);
        let dq = scaled(cx, dq, scale, q);
        let dq = merge_heads(cx, dq, ranks[0]);
        cx.give(0, dq);
    }
    if cx.wants(1) {
        let dl_t = swap_last(cx, dl, 4);
        // q4 holds the scale already.
        let dk = cx.b.matmul(dl_t, q4);
        let dk = shared.sum(cx, dk, width as i64);
        let dk = merge_heads(cx, dk, ranks[1]);
        cx.give(1, dk);
    }
    Ok(())
}

/// The probabilities again, and where logits are capped the cap's slope.
fn forward(cx: &mut GradCx<'_>, (q, k): (ValueId, ValueId), s: &Sizes) -> Result<(ValueId, Option<ValueId>), String> {
    let like = cx.input(0);
    let k_t = swap_last(cx, k, 4);
    let mut logits = cx.b.matmul(q, k_t);
    if let Some(mask) = cx.node().input(MASK) {
        let last = cx.shape(mask).last().ok_or("a mask of unknown rank")?;
        // From opset 24 on a mask may be shorter than the keys; before, it is broadcast to them.
        if *last != s.keys && !last.is(1) && (cx.opset() >= 24 || contradict(last, &s.keys)) {
            return Err("a mask that is shorter than the keys".to_string());
        }
        let mut bias = mask;
        if cx.dtype(mask) == DType::Bool {
            let hidden = hidden_logit(cx.dtype(like));
            let (seen, hidden) = (cx.scalar(0.0, like), cx.scalar(hidden, like));
            bias = cx.b.op("Where", &[mask, seen, hidden], vec![]);
        }
        logits = cx.b.add(logits, bias);
    }
    if cx.node().attr_int("is_causal").unwrap_or(0) != 0 {
        let bias = causal_bias(cx, (q, k), s);
        logits = cx.b.add(logits, bias);
    }
    let mut slope = None;
    let cap = cx.node().attr_float("softcap").unwrap_or(0.0);
    if cap > 0.0 {
        // Attention-23 was published with the mask before the cap and corrected to the mask behind it; ONNX Runtime 1.24 does the
        // former, 1.32 the latter.
        if cx.node().input(MASK).is_some() || cx.node().attr_int("is_causal").unwrap_or(0) != 0 {
            return Err("a mask beside softcap: runtimes differ in which comes first".to_string());
        }
        let small = scaled(cx, logits, 1.0 / cap, like);
        let tanh = cx.b.op("Tanh", &[small], vec![]);
        let square = cx.b.mul(tanh, tanh);
        let one = cx.scalar(1.0, like);
        slope = Some(cx.b.sub(one, square));
        logits = scaled(cx, tanh, cap, like);
    }
    Ok((cx.b.op("Softmax", &[logits], vec![attr("axis", AttrValue::Int(-1))]), slope))
}

/// `[Nq, Nk]`: 0 where the key is not behind the query, else a logit that hides it.
fn causal_bias(cx: &mut GradCx<'_>, (q, k): (ValueId, ValueId), s: &Sizes) -> ValueId {
    let like = cx.input(0);
    let dtype = cx.dtype(like);
    let hidden = hidden_logit(dtype);
    if let (Some(n), Some(m)) = (s.queries.size(), s.keys.size())
        && n.saturating_mul(m) <= crate::infer::KNOWN_MAX * 16
    {
        let bias: Vec<f32> = (0..n).flat_map(|i| (0..m).map(move |j| if j > i { hidden } else { 0.0 })).collect();
        return cx.b.constant(Tensor::new(dtype, vec![n, m], bytes::Bytes::new()).with_f32s(&bias));
    }
    let at = cx.b.ints(&[2]);
    let pieces = [q, k].map(|x| {
        let shape = cx.b.shape_of(x);
        cx.b.gather(shape, at, 0)
    });
    let shape = cx.b.concat(&pieces, 0);
    let one = cx.scalar(1.0, like);
    let ones = cx.b.op("Expand", &[one, shape], vec![]);
    let seen = cx.b.op("Trilu", &[ones], vec![attr("upper", AttrValue::Int(0))]);
    let unseen = cx.b.sub(one, seen);
    scaled(cx, unseen, hidden, like)
}

/// The mask's gradient: that of the logits, summed over the axes along which the mask is broadcast.
fn mask_grad(cx: &mut GradCx<'_>, dl: ValueId, s: &Sizes) -> Result<(), String> {
    let from = [&s.batch, &s.heads, &s.queries, &s.keys].map(Clone::clone);
    let mask = cx.shape(cx.input(MASK));
    if mask.iter().rev().zip(from.iter().rev()).any(|(m, l)| m != l && !m.is(1)) {
        return Err("a mask of sizes that are not known to fit".to_string());
    }
    let grad = cx.sum_from(dl, &from, MASK);
    cx.give(MASK, grad);
    Ok(())
}

/// `[B, N, H*E] -> [B, H, N, E]`; rank 4 stays.
fn split_heads(cx: &mut GradCx<'_>, value: ValueId, rank: usize, heads: i64) -> ValueId {
    if rank == 4 {
        return value;
    }
    let split = cx.b.reshape(value, &[0, 0, heads, -1]);
    cx.b.transpose(split, &[0, 2, 1, 3])
}

/// `[B, H, N, E] -> [B, N, H*E]`; rank 4 stays.
fn merge_heads(cx: &mut GradCx<'_>, value: ValueId, rank: usize) -> ValueId {
    if rank == 4 {
        return value;
    }
    let turned = cx.b.transpose(value, &[0, 2, 1, 3]);
    cx.b.reshape(turned, &[0, 0, -1])
}

/// Key heads that several query heads share.
struct Shared {
    heads: i64,
    key_heads: i64,
    sharing: i64,
}

impl Shared {
    /// `[B, K, N, E] -> [B, H, N, E]`, each head repeated.
    fn repeat(&self, cx: &mut GradCx<'_>, value: ValueId, width: i64) -> ValueId {
        if self.sharing == 1 {
            return value;
        }
        let wide = cx.b.unsqueeze(value, &[2]);
        let repeats = cx.b.ints(&[1, 1, self.sharing, 1, 1]);
        let wide = cx.b.op("Expand", &[wide, repeats], vec![]);
        cx.b.reshape(wide, &[0, self.heads, -1, width])
    }

    /// `[B, H, N, E] -> [B, K, N, E]`, summed over the heads that share one.
    fn sum(&self, cx: &mut GradCx<'_>, value: ValueId, width: i64) -> ValueId {
        if self.sharing == 1 {
            return value;
        }
        let split = cx.b.reshape(value, &[0, self.key_heads, self.sharing, -1, width]);
        cx.b.reduce_sum(split, &[2], false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::matmul::one_node::{graph, ints, links, macs, refit, shapes};

    const GROUPED: &[(&str, i64)] = &[("q_num_heads", 4), ("kv_num_heads", 2)];

    #[test]
    fn shapes_of_both_forms() {
        let g = graph("Attention", 23, &["b n 32", "b m 16", "b m 20"], ints(GROUPED), 1);
        assert_eq!(shapes(&g), Ok(vec!["b n 40".to_string()]));
        assert_eq!(macs(&g), "72*b*m*n");
        let g = graph("Attention", 23, &["b 4 n 8", "b 2 5 8", "b 2 5 10", "-", "b 2 p 8", "b 2 p 10"], vec![], 4);
        let expected = ["b 4 n 10", "b 2 p+5 8", "b 2 p+5 10", "b 4 n p+5"];
        assert_eq!(shapes(&g), Ok(expected.map(String::from).to_vec()));
        assert_eq!(macs(&g), "72*b*n*p+360*b*n");
        let g = graph("Attention", 23, &["b n d", "b m 16", "b m 20"], ints(GROUPED), 1);
        assert_eq!(shapes(&g), Ok(vec!["b n 40".to_string()]));
        assert!(links(&g).iter().all(|l| l.starts_with('!')));
        assert!(shapes(&graph("Attention", 23, &["1 3 32", "1 3 32", "1 3 32"], vec![], 1)).is_err());
        assert!(shapes(&graph("Attention", 23, &["1 4 3 8", "1 4 5 9", "1 4 5 8"], vec![], 1)).is_err());
        assert!(shapes(&graph("Attention", 23, &["1 4 3 8", "1 3 5 8", "1 3 5 8"], vec![], 1)).is_err());
    }

    #[test]
    fn query_width_is_contracted_with_key_width() {
        let g = graph("Attention", 23, &["b 3 n 8", "b 3 m 8", "b 3 m 6"], vec![], 1);
        let expected = [
            "in0.1=in1.1",
            "in0.1=in2.1",
            "in0.1=out0.1",
            "in0.3*in1.3",
            "in2.3=out0.3",
            "in0.2=out0.2",
            "in1.2*in2.2",
            "!in1.2",
            "in0.0=out0.0",
            "in1.0=out0.0",
            "in2.0=out0.0",
        ];
        assert_eq!(links(&g), expected);
    }

    #[test]
    fn grouped_queries_have_a_factor_of_their_own() {
        let g = graph("Attention", 23, &["b n 32", "b m 16", "b m 20", "4 n m"], ints(GROUPED), 1);
        let expected = [
            "in0.2~v0.0,v0.1,v0.2",
            "in1.2~v1.0,v1.1",
            "in2.2~v2.0,v2.1",
            "out0.2~v3.0,v3.1,v3.2",
            "v0.0=v1.0",
            "v0.0=v2.0",
            "v0.0=v3.0",
            "v0.1=v3.1",
            "v0.2*v1.1",
            "v2.1=v3.2",
            "in0.1=out0.1",
            "in1.1*in2.1",
            "!in1.1",
            "in0.0=out0.0",
            "in1.0=out0.0",
            "in2.0=out0.0",
            "in3.0~v4.0,v4.1",
            "v4.0=v0.0",
            "v4.1=v0.1",
            "in3.1=in0.1",
            "in3.2=in1.1",
        ];
        assert_eq!(links(&g), expected);
    }

    #[test]
    fn an_implied_scale_is_written_out_when_the_width_is_cut() {
        let mut g = graph("Attention", 23, &["b n 32", "b m 16", "b m 20"], ints(GROUPED), 1);
        let q: Vec<usize> = (0..32).filter(|p| p % 8 < 4).collect();
        let k: Vec<usize> = (0..16).filter(|p| p % 8 < 4).collect();
        assert_eq!(refit(&mut g, &[(0, 2, q), (1, 2, k)]), Ok(vec![]));
        let node = g.node(g.order()[0]);
        assert_eq!((node.attr_int("q_num_heads"), node.attr_float("scale")), (Some(4), Some(1.0 / 8f32.sqrt())));
        // A whole key head goes: no scale is written.
        let mut g = graph("Attention", 23, &["b n 32", "b m 16", "b m 20"], ints(GROUPED), 1);
        let kept = [(0, 2, (0..16).collect()), (1, 2, (0..8).collect()), (2, 2, (0..10).collect())];
        assert_eq!(refit(&mut g, &kept), Ok(vec![]));
        let node = g.node(g.order()[0]);
        assert_eq!((node.attr_int("q_num_heads"), node.attr_int("kv_num_heads")), (Some(2), Some(1)));
        assert_eq!(node.attr_float("scale"), None);
        let mut g = graph("Attention", 23, &["b n 32", "b m 16", "b m 20"], ints(GROUPED), 1);
        assert!(refit(&mut g, &[(0, 2, vec![0, 1, 8])]).is_err());
    }

    #[test]
    fn only_whole_attention_is_fused() {
        assert!(is_fused_attention("", "Attention") && is_fused_attention("ai.onnx", "Attention"));
        assert!(!is_fused_attention("", "RotaryEmbedding") && !is_fused_attention("com.example", "Attention"));
    }
}
