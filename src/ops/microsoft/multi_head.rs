//! MultiHeadAttention and PackedMultiHeadAttention: attention over q, k and v that were projected before.
//!
//! Shape: `q [B, N, H*E]`, `k [B, M, H*E]`, `v [B, M, H*Ev]`, biases of all three in one vector -> `[B, N, H*Ev]`. Other forms: `k` and
//! `v` by head, `[B, H, M, E]`; `k` and `v` in one, `[B, M, H, 2, E]`; all in one, `[B, N, H, 3, E]`; in these, widths of values and
//! keys are equal and stay. Packed: all without the batch axis, `[T, ..]`.
//! Example: 3 heads, `[B, 197, 48]` three times, bias `[144]`: entries 0 to 47 of the bias belong to q, and 16 of each head of q are
//! contracted with those of k.

use super::{bias_axes, fused, refit_heads, refuse_all, untrained};
use crate::axes::relation::{At, AxesCx, FusedAttention, KeyMask, Relations, Slot};
use crate::graph::Node;
use crate::infer::{Dim, Fact, InferCx, InferError};
use crate::ops::attention::{KEYS, relate, remains};
use crate::ops::{Cost, CostCx, OpRule, Refit};
use crate::slice::refit::{RefitCx, RefitError};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    OpRule {
        cost: Cost::Rule(multi_head_cost),
        refit: Refit::Rule(multi_head_refit),
        ..fused("MultiHeadAttention", multi_head_infer, multi_head_axes)
    },
    OpRule {
        cost: Cost::Rule(multi_head_cost),
        refit: Refit::Rule(multi_head_refit),
        ..untrained("PackedMultiHeadAttention", multi_head_infer, multi_head_axes)
    },
];

const QUERY: Slot = Slot::In(0);
const KEY: Slot = Slot::In(1);
const VALUE: Slot = Slot::In(2);
const BIAS: Slot = Slot::In(3);
const OUTPUT: Slot = Slot::Out(0);
/// Of MultiHeadAttention; offsets of tokens where packed.
const MASK: usize = 4;
const PAST: [usize; 2] = [6, 7];
const PRESENT: [usize; 2] = [1, 2];
const LOGITS: usize = 3;
const ONE_WIDTH: &str = "keys and values have one width in this form";

/// How q, k and v are given.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Three values, heads and width in one axis.
    Apart,
    /// Keys and values by head.
    ByHead,
    /// Keys and values in one.
    Pairs,
    /// All in one.
    Triples,
}

struct Sizes {
    form: Form,
    packed: bool,
    heads: Dim,
    width: Dim,
    value_width: Dim,
    /// Batch and number of queries and keys; no batch where packed.
    batch: Option<Dim>,
    queries: Dim,
    keys: Dim,
}

impl Sizes {
    fn of(node: &Node, q: &[Dim], k: Option<&[Dim]>, v: Option<&[Dim]>) -> Result<Self, String> {
        let packed = node.op() == "PackedMultiHeadAttention";
        let front = if packed { 1 } else { 2 };
        let heads = node.attr_int("num_heads").filter(|h| *h > 0).map(Dim::from).ok_or("num_heads is missing")?;
        let (form, k, v) = match (q.len() - front.min(q.len()), k, v) {
            (3, None, None) => (Form::Triples, q, q),
            (1, Some(k), None) if k.len() == front + 3 => (Form::Pairs, k, k),
            (1, Some(k), Some(v)) if k.len() == front + 1 && v.len() == front + 1 => (Form::Apart, k, v),
            (1, Some(k), Some(v)) if k.len() == 4 && v.len() == 4 && !packed => (Form::ByHead, k, v),
            _ => return Err(format!("inputs of ranks {}, {} and {}", q.len(), rank(k), rank(v))),
        };
        let share = |x: &[Dim]| x.last().and_then(|all| all.exact_div(&heads)).ok_or("heads of a size that is not known");
        let last = |x: &[Dim]| x[x.len() - 1].clone();
        let (width, value_width) = match form {
            Form::Apart => (share(q)?, share(v)?),
            Form::ByHead | Form::Pairs => (share(q)?, last(v)),
            Form::Triples => (last(q), last(q)),
        };
        let tokens = |x: &[Dim]| if form == Form::ByHead { x[2].clone() } else { x[front - 1].clone() };
        let batch = (!packed).then(|| q[0].clone());
        Ok(Self { form, packed, heads, width, value_width, batch, queries: q[front - 1].clone(), keys: tokens(k) })
    }

    fn in_node(cx: &AxesCx<'_>) -> Result<Self, String> {
        let given = |slot: Slot| cx.has(slot).then(|| cx.shape(slot));
        Self::of(cx.node, cx.shape(QUERY), given(KEY), given(VALUE))
    }

    fn logit_bias(&self) -> usize {
        if self.packed { 6 } else { 5 }
    }
}

fn rank(shape: Option<&[Dim]>) -> usize {
    shape.map_or(0, <[Dim]>::len)
}

fn multi_head_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let none = || Fact::new(cx.dtype(0), None);
    let unknown = |slot: usize| cx.has_input(slot) && cx.shape(slot).is_none();
    let (Some(q), false) = (cx.shape(0), unknown(1) || unknown(2)) else { return Ok(vec![none(), none(), none(), none()]) };
    let s = match Sizes::of(cx.node, q, cx.shape(1), cx.shape(2)) {
        Ok(s) => s,
        // Heads of an axis whose size is a symbol.
        Err(_) if q.last().is_some_and(|d| d.size().is_none()) => return Ok(vec![none(), none(), none(), none()]),
        Err(e) => return Err(cx.error(e)),
    };
    let mut y: Vec<Dim> = s.batch.iter().cloned().collect();
    y.extend([s.queries.clone(), &s.heads * &s.value_width]);
    let past = if cx.has_input(PAST[0]) { cx.shape(PAST[0]).and_then(|p| p.get(2)).cloned() } else { Some(Dim::from(0i64)) };
    let all = past.map(|p| &p + &s.keys);
    let by_head =
        |tokens: Option<&Dim>, last: Option<&Dim>| Some(vec![s.batch.clone()?, s.heads.clone(), tokens?.clone(), last?.clone()]);
    Ok(vec![
        Fact::new(cx.dtype(0), Some(y)),
        Fact::new(cx.dtype(0), by_head(all.as_ref(), Some(&s.width))),
        Fact::new(cx.dtype(0), by_head(all.as_ref(), Some(&s.value_width))),
        Fact::new(cx.dtype(0), by_head(Some(&s.queries), all.as_ref())),
    ])
}

/// `b n h|e|, b m h|e|, b |m| h f -> b n (h f)`; keys are barriers, as the softmax is normalized over them.
fn multi_head_axes(cx: &AxesCx<'_>) -> Relations {
    let s = match Sizes::in_node(cx) {
        Ok(s) => s,
        Err(reason) => return refuse_all(cx, &reason),
    };
    let mut relations = Relations::default();
    let r = &mut relations;
    let last = |slot: Slot| (slot, cx.shape(slot).len().saturating_sub(1));
    let [q, k, v] = operands(cx, r, &s);
    let y = heads_of(r, last(OUTPUT), &s, &s.value_width);
    [k.0, v.0, y.0].into_iter().for_each(|head| r.same(q.0, head));
    r.contract(q.1, k.1);
    r.same(v.1, y.1);
    if s.form != Form::Apart {
        [k.1, v.1].into_iter().for_each(|width| r.barrier(width, ONE_WIDTH));
    }
    bias_of_projections(cx, r, &s, [q, k, v]);
    let mask = token_axes(cx, r, &s, q.0);
    past_axes(cx, r, q.0, [k.1, v.1]);
    r.attention = Some(FusedAttention { head: q.0, sharers: None, qk: q.1, vo: v.1, mask });
    relations
}

/// Head and width.
type Head = (At, At);

/// `[H, width]` in the place of an axis.
fn heads_of(r: &mut Relations, (slot, axis): At, s: &Sizes, width: &Dim) -> Head {
    let v = r.virtual_value(vec![s.heads.clone(), width.clone()]);
    r.regroup((slot, vec![axis]), (v, vec![0, 1]));
    ((v, 0), (v, 1))
}

/// Head and width of q, k and v.
fn operands(cx: &AxesCx<'_>, r: &mut Relations, s: &Sizes) -> [Head; 3] {
    let last = |slot: Slot| (slot, cx.shape(slot).len() - 1);
    let inside = |slot: Slot| ((slot, last(slot).1 - 2), last(slot));
    if s.form == Form::Triples {
        r.barrier((QUERY, last(QUERY).1 - 1), "queries, keys and values");
        return [inside(QUERY); 3];
    }
    let q = heads_of(r, last(QUERY), s, &s.width);
    match s.form {
        Form::Apart => [q, heads_of(r, last(KEY), s, &s.width), heads_of(r, last(VALUE), s, &s.value_width)],
        Form::ByHead => [q, ((KEY, 1), (KEY, 3)), ((VALUE, 1), (VALUE, 3))],
        Form::Pairs | Form::Triples => {
            r.barrier((KEY, last(KEY).1 - 1), "keys and values");
            [q, inside(KEY), inside(KEY)]
        }
    }
}

/// Biases of q, k and v, one after the other.
fn bias_of_projections(cx: &AxesCx<'_>, r: &mut Relations, s: &Sizes, operands: [Head; 3]) {
    if !cx.has(BIAS) {
        return;
    }
    let sizes: Option<Vec<usize>> = [&s.width, &s.width, &s.value_width].into_iter().map(|w| (&s.heads * w).size()).collect();
    let total = cx.shape(BIAS).first().and_then(Dim::size);
    let Some(sizes) = sizes.filter(|sizes| s.form != Form::ByHead && Some(sizes.iter().sum()) == total) else {
        r.barrier((BIAS, 0), "biases of parts whose sizes are not known");
        operands.into_iter().flat_map(|(head, width)| [head, width]).for_each(|at| r.barrier(at, "biases are not understood"));
        return;
    };
    let all = r.virtual_value(vec![Dim::from(sizes.iter().sum::<usize>())]);
    r.same((BIAS, 0), (all, 0));
    let mut start = 0;
    for (size, (operand, width)) in sizes.into_iter().zip(operands.into_iter().zip([&s.width, &s.width, &s.value_width])) {
        let flat = r.virtual_value(vec![Dim::from(size)]);
        r.select((all, 0), (flat, 0), (start..start + size).collect(), 0);
        let part = heads_of(r, (flat, 0), s, width);
        r.same(part.0, operand.0);
        r.same(part.1, operand.1);
        start += size;
    }
}

/// Samples and tokens of all inputs, and what is added to logits. Returns where keys can be masked.
fn token_axes(cx: &AxesCx<'_>, r: &mut Relations, s: &Sizes, head: At) -> Option<KeyMask> {
    let front = usize::from(!s.packed);
    let queries = (QUERY, front);
    let of = |slot: Slot| if s.form == Form::ByHead { (slot, 2) } else { (slot, front) };
    let (keys, values) = match s.form {
        Form::Triples => (queries, queries),
        Form::Pairs => (of(KEY), of(KEY)),
        Form::Apart | Form::ByHead => (of(KEY), of(VALUE)),
    };
    r.same(queries, (OUTPUT, front));
    if values != keys {
        r.contract(keys, values);
    }
    r.barrier(keys, KEYS);
    let heads = Some((head, &s.heads));
    let bias = Slot::In(s.logit_bias());
    let Some(batch) = &s.batch else {
        bias_axes(cx, r, bias, [None, heads, None, None]);
        return None;
    };
    for slot in [QUERY, KEY, VALUE].into_iter().filter(|slot| cx.has(*slot)) {
        relate(r, ((slot, 0), &cx.shape(slot)[0]), &[(OUTPUT, 0)], batch);
    }
    if cx.shape(Slot::In(MASK)).first() == Some(batch) {
        r.same((Slot::In(MASK), 0), (OUTPUT, 0));
    }
    let alone = !cx.has(Slot::In(PAST[0]));
    let samples = Some(((OUTPUT, 0), batch));
    bias_axes(cx, r, bias, [samples, heads, Some((queries, &s.queries)), alone.then_some((keys, &s.keys))]);
    if cx.has(Slot::Out(LOGITS)) {
        bias_axes(cx, r, Slot::Out(LOGITS), [samples, heads, Some((queries, &s.queries)), alone.then_some((keys, &s.keys))]);
    }
    let mask = KeyMask { keys, queries, bias: s.logit_bias() };
    (alone && !cx.has(Slot::In(MASK))).then_some(mask)
}

/// Past and present keys and values, `[B, H, N, E]`. A past has one width.
fn past_axes(cx: &AxesCx<'_>, r: &mut Relations, head: At, widths: [At; 2]) {
    let caches = [PAST.map(Slot::In), PRESENT.map(Slot::Out)];
    for (slot, width) in caches.into_iter().flat_map(|pair| pair.into_iter().zip(widths)) {
        if cx.shape(slot).len() != 4 {
            continue;
        }
        r.same((slot, 0), (OUTPUT, 0));
        r.same((slot, 1), head);
        r.barrier((slot, 2), "keys and values of earlier runs");
        r.same((slot, 3), width);
    }
    if cx.has(Slot::In(PAST[0])) {
        widths.into_iter().for_each(|width| r.barrier(width, "keys and values of earlier runs have one width"));
    }
}

/// `B * N * T * (H*E + H*Ev)`; what a packed batch costs depends on its sequences.
fn multi_head_cost(cx: &CostCx<'_>) -> Option<Dim> {
    let shape = |slot: usize| cx.inputs.get(slot).copied().flatten();
    let (q, y) = (shape(0)?, cx.outputs.first().copied().flatten()?);
    let [batch, queries, values] = y else { return None };
    let keys = match cx.node.input(1) {
        Some(_) => shape(1)?,
        None => q,
    };
    let past = match cx.node.input(PAST[0]) {
        Some(_) => shape(PAST[0])?.get(2)?.clone(),
        None => Dim::from(0i64),
    };
    let keys = &past + keys.get(if keys.len() == 4 { 2 } else { 1 })?;
    let width = match q {
        [_, _, heads, _, width] => heads * width,
        _ => q.last()?.clone(),
    };
    Some([batch, queries, &keys, &(&width + values)].into_iter().product())
}

/// Number of heads, and the scale that the old width implied.
fn multi_head_refit(cx: &mut RefitCx<'_>) -> Result<(), RefitError> {
    let heads = cx.node().attr_int("num_heads");
    let q = cx.old_input(0).len();
    // Heads of a packed value have an axis of their own.
    if let Some(axis) = q.checked_sub(3).filter(|_| q > 3 || (cx.node().op() == "PackedMultiHeadAttention" && q == 4)) {
        if let Some(left) = cx.kept_input(0, axis).map(<[usize]>::len) {
            refit_heads(cx, left, (0, 0));
        }
        return Ok(());
    }
    let (Some(q), Some(k)) = (remains(cx, 0, heads)?, remains_of_keys(cx, heads)?) else { return Ok(()) };
    if q.heads != k.0 || k.1.is_some_and(|width| width != q.first.len()) || q.heads == 0 {
        return Err(cx.error(format!("{} heads of {} in the query, {} key heads", q.heads, q.first.len(), k.0)));
    }
    refit_heads(cx, q.heads, (q.width, q.first.len()));
    Ok(())
}

/// Heads of the keys that stay, and their width where it is cut with that of queries.
fn remains_of_keys(cx: &RefitCx<'_>, heads: Option<i64>) -> Result<Option<(usize, Option<usize>)>, RefitError> {
    let rank = cx.old_input(1).len();
    if rank == 5 || (rank == 4 && cx.node().op() == "PackedMultiHeadAttention") {
        let left = cx.kept_input(1, rank - 3).map(<[usize]>::len).or_else(|| cx.old_input(1)[rank - 3].size());
        return Ok(left.map(|n| (n, None)));
    }
    Ok(remains(cx, 1, heads)?.map(|k| (k.heads, Some(k.first.len()))))
}

#[cfg(test)]
mod tests {
    use crate::ops::matmul::one_node::{ints, links, macs, microsoft, refit, shapes};

    #[test]
    fn biases_belong_to_their_projections() {
        let g = microsoft("MultiHeadAttention", &["b n 4", "b m 4", "b m 6", "14"], ints(&[("num_heads", 2)]), 1);
        assert_eq!(shapes(&g), Ok(vec!["b n 6".to_string()]));
        assert_eq!(macs(&g), "10*b*m*n");
        let expected = [
            "in0.2~v0.0,v0.1",
            "in1.2~v1.0,v1.1",
            "in2.2~v2.0,v2.1",
            "out0.2~v3.0,v3.1",
            "v0.0=v1.0",
            "v0.0=v2.0",
            "v0.0=v3.0",
            "v0.1*v1.1",
            "v2.1=v3.1",
            "in3.0=v4.0",
            "v4.0[0..=3]>v5.0@0",
            "v5.0~v6.0,v6.1",
            "v6.0=v0.0",
            "v6.1=v0.1",
            "v4.0[4..=7]>v7.0@0",
            "v7.0~v8.0,v8.1",
            "v8.0=v1.0",
            "v8.1=v1.1",
            "v4.0[8..=13]>v9.0@0",
            "v9.0~v10.0,v10.1",
            "v10.0=v2.0",
            "v10.1=v2.1",
            "in0.1=out0.1",
            "in1.1*in2.1",
            "!in1.1",
            "in0.0=out0.0",
            "in1.0=out0.0",
            "in2.0=out0.0",
        ];
        assert_eq!(links(&g), expected);
    }

    #[test]
    fn values_and_keys_of_one_width_keep_it() {
        let forms: [(&[&str], usize); 3] =
            [(&["b n 4", "b 2 m 2", "b 2 m 2"], 2), (&["b n 8", "b m 2 2 4"], 1), (&["b n 2 3 4"], 0)];
        for (inputs, slot) in forms {
            let g = microsoft("MultiHeadAttention", inputs, ints(&[("num_heads", 2)]), 1);
            let links = links(&g);
            let barrier = format!("!in{slot}.{}", inputs[slot].split(' ').count() - 1);
            assert!(links.contains(&barrier), "{inputs:?}: {links:?}");
            assert!(!links.iter().any(|l| l == "!in0.2" && inputs.len() > 1), "{inputs:?}: {links:?}");
        }
    }

    #[test]
    fn a_bias_with_heads_goes_with_them() {
        let inputs = ["b n 4", "b m 4", "b m 4", "-", "-", "1 2 n m"];
        let links = links(&microsoft("MultiHeadAttention", &inputs, ints(&[("num_heads", 2)]), 1));
        for link in ["in5.1=v0.0", "in5.2=in0.1", "in5.3=in1.1"] {
            assert!(links.iter().any(|l| l == link), "{link} in {links:?}");
        }
    }

    #[test]
    fn heads_and_the_implied_scale_follow_the_cut() {
        let new = || microsoft("MultiHeadAttention", &["b n 8", "b m 8", "b m 6"], ints(&[("num_heads", 2)]), 1);
        let mut g = new();
        assert_eq!(refit(&mut g, &[(0, 2, vec![0, 6]), (1, 2, vec![0, 6])]), Ok(vec![]));
        let node = g.node(g.order()[0]);
        assert_eq!((node.attr_int("num_heads"), node.attr_float("scale")), (Some(2), Some(0.5)));
        let mut g = new();
        let head = [(0, 2, vec![4, 5, 6, 7]), (1, 2, vec![4, 5, 6, 7]), (2, 2, vec![3, 4, 5])];
        assert_eq!(refit(&mut g, &head), Ok(vec![]));
        let node = g.node(g.order()[0]);
        assert_eq!((node.attr_int("num_heads"), node.attr_float("scale")), (Some(1), None));
        assert!(refit(&mut new(), &[(0, 2, vec![0, 6])]).is_err());
        let mut g = microsoft("MultiHeadAttention", &["b n 2 3 4"], ints(&[("num_heads", 2)]), 1);
        assert_eq!(refit(&mut g, &[(0, 2, vec![1])]), Ok(vec![]));
        assert_eq!(g.node(g.order()[0]).attr_int("num_heads"), Some(1));
    }
}
