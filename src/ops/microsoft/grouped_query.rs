//! GroupQueryAttention: causal attention in which several query heads share a key head.
//!
//! Shape: `q [B, N, H*E]`, `k` and `v [B, M, K*E]`, or all in one, `[B, N, (H + 2K)*E]` -> `[B, N, H*E]` and the keys and values of this and
//! earlier runs, `[B, K, T, E]`. Its kernels take one width for q, k and v, a multiple of 8 (16 with rotation), so widths stay and
//! whole key heads are cut, with the query heads that share them.

use super::{fused, refuse_all};
use crate::axes::relation::{At, AxesCx, FusedAttention, Relations, Slot};
use crate::graph::{AttrValue, Node};
use crate::infer::{Dim, Fact, InferCx, InferError};
use crate::ops::attention::{HeadAxes, KEYS, Remains, head_axes, relate};
use crate::ops::{Cost, CostCx, OpRule, Refit};
use crate::slice::refit::{RefitCx, RefitError};

/// The records of this family.
pub static RULES: &[OpRule] = &[OpRule {
    cost: Cost::Rule(grouped_cost),
    refit: Refit::Rule(grouped_refit),
    ..fused("GroupQueryAttention", grouped_infer, grouped_axes)
}];

const QUERY: Slot = Slot::In(0);
const KEY: Slot = Slot::In(1);
const VALUE: Slot = Slot::In(2);
const PAST: [usize; 2] = [3, 4];
const LENGTHS: Slot = Slot::In(5);
const LOGIT_BIAS: Slot = Slot::In(10);
const SINKS: Slot = Slot::In(11);
const OUTPUT: Slot = Slot::Out(0);
const LOGITS: Slot = Slot::Out(3);
const ONE_WIDTH: &str = "the operator takes one width for q, k and v, a multiple of 8";

struct Sizes {
    heads: usize,
    key_heads: usize,
    width: usize,
    /// Whether q, k and v are one value.
    packed: bool,
}

impl Sizes {
    fn of(node: &Node, q: &[Dim], has_keys: bool) -> Result<Self, String> {
        let count = |name: &str| node.attr_int(name).and_then(|h| usize::try_from(h).ok()).filter(|h| *h > 0);
        let heads = count("num_heads").ok_or("num_heads is missing")?;
        let key_heads = count("kv_num_heads").ok_or("kv_num_heads is missing")?;
        let [_, _, all] = q else { return Err(format!("an input of rank {}, expected 3", q.len())) };
        let all = all.size().ok_or("heads of a size that is not known")?;
        let count = if has_keys { heads } else { heads + 2 * key_heads };
        if heads % key_heads != 0 || all % count != 0 {
            return Err(format!("{heads} query heads and {key_heads} key heads in {all}"));
        }
        Ok(Self { heads, key_heads, width: all / count, packed: !has_keys })
    }

    fn sharing(&self) -> Dim {
        Dim::from(self.heads / self.key_heads)
    }
}

fn grouped_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let fact = |shape: Option<Vec<Dim>>| Fact::new(cx.dtype(0), shape);
    let unknown = || Ok(vec![fact(None), fact(None), fact(None), fact(None)]);
    let Some(q) = cx.shape(0) else { return unknown() };
    if q.last().is_none_or(|d| d.size().is_none()) {
        return unknown();
    }
    let s = Sizes::of(cx.node, q, cx.has_input(1)).map_err(|e| cx.error(e))?;
    let keys = match cx.shape(1) {
        Some([_, keys, _]) => Some(keys),
        _ if s.packed => Some(&q[1]),
        _ => None,
    };
    let past = if cx.has_input(PAST[0]) { cx.shape(PAST[0]).and_then(|p| p.get(2)).cloned() } else { Some(Dim::from(0i64)) };
    // Where past and present are one buffer, its length is that of the past: only the run tells.
    let all = match (past, keys) {
        (Some(past), Some(keys)) if past.is(0) => keys.clone(),
        _ => cx.fresh("keys"),
    };
    let y = vec![q[0].clone(), q[1].clone(), Dim::from(s.heads * s.width)];
    let present = vec![q[0].clone(), Dim::from(s.key_heads), all.clone(), Dim::from(s.width)];
    let logits = vec![q[0].clone(), Dim::from(s.heads), q[1].clone(), all];
    Ok(vec![fact(Some(y)), fact(Some(present.clone())), fact(Some(present)), fact(Some(logits))])
}

/// `b n k r |e|, b m k |e|, b |m| k e -> b n k r e`
fn grouped_axes(cx: &AxesCx<'_>) -> Relations {
    let s = match Sizes::of(cx.node, cx.shape(QUERY), cx.has(KEY)) {
        Ok(s) => s,
        Err(reason) => return refuse_all(cx, &reason),
    };
    let mut relations = Relations::default();
    let r = &mut relations;
    let [q, k, v] = operands(r, &s);
    let y = heads_of(r, (OUTPUT, 2), &s, &s.sharing());
    [k.head, v.head, y.head].into_iter().for_each(|head| r.same(q.head, head));
    if let (Some(a), Some(b)) = (q.sharer, y.sharer) {
        r.same(a, b);
    }
    r.contract(q.width, k.width);
    r.same(v.width, y.width);
    [k.width, v.width].into_iter().for_each(|width| r.barrier(width, ONE_WIDTH));
    let batch = &cx.shape(QUERY)[0];
    for slot in [QUERY, KEY, VALUE].into_iter().filter(|slot| cx.has(*slot)) {
        relate(r, ((slot, 0), &cx.shape(slot)[0]), &[(OUTPUT, 0)], batch);
        r.barrier((slot, 1), KEYS);
    }
    r.same((QUERY, 1), (OUTPUT, 1));
    if cx.shape(LENGTHS).first() == Some(batch) {
        r.same((LENGTHS, 0), (OUTPUT, 0));
    }
    for slot in PAST.map(Slot::In).into_iter().chain([Slot::Out(1), Slot::Out(2)]).filter(|slot| cx.shape(*slot).len() == 4) {
        r.same((slot, 0), (OUTPUT, 0));
        r.same((slot, 1), q.head);
        r.barrier((slot, 2), "keys and values of earlier runs");
    }
    side_axes(cx, r, &s, &q);
    r.attention = Some(FusedAttention { head: q.head, sharers: q.sharer, qk: q.width, vo: v.width, mask: None });
    relations
}

fn heads_of(r: &mut Relations, (slot, axis): At, s: &Sizes, sharing: &Dim) -> HeadAxes {
    // As of a value `[B, N, heads]`, whose last axis is asked for; a flat virtual value has but one.
    if axis == 2 {
        return head_axes(r, slot, 3, &Dim::from(s.key_heads), sharing, &Dim::from(s.width));
    }
    let mut factors = vec![Dim::from(s.key_heads)];
    factors.extend((!sharing.is(1)).then(|| sharing.clone()));
    factors.push(Dim::from(s.width));
    let count = factors.len();
    let v = r.virtual_value(factors);
    r.regroup((slot, vec![axis]), (v, (0..count).collect()));
    HeadAxes { head: (v, 0), sharer: (count == 3).then_some((v, 1)), tokens: (slot, axis), width: (v, count - 1) }
}

/// q, k and v, each from its own input or from its part of the one.
fn operands(r: &mut Relations, s: &Sizes) -> [HeadAxes; 3] {
    let one = Dim::from(1i64);
    if !s.packed {
        return [heads_of(r, (QUERY, 2), s, &s.sharing()), heads_of(r, (KEY, 2), s, &one), heads_of(r, (VALUE, 2), s, &one)];
    }
    let mut start = 0;
    [s.heads, s.key_heads, s.key_heads].map(|heads| {
        let size = heads * s.width;
        let flat = r.virtual_value(vec![Dim::from(size)]);
        r.select((QUERY, 2), (flat, 0), (start..start + size).collect(), 0);
        start += size;
        heads_of(r, (flat, 0), s, &if heads == s.heads { s.sharing() } else { one.clone() })
    })
}

/// What has an axis of query heads: what is added to logits, logits, and what joins each softmax.
fn side_axes(cx: &AxesCx<'_>, r: &mut Relations, s: &Sizes, q: &HeadAxes) {
    for (slot, axis) in [(LOGIT_BIAS, 1), (LOGITS, 1), (SINKS, 0)] {
        let Some(size) = cx.shape(slot).get(axis) else { continue };
        if *size != Dim::from(s.heads) {
            continue;
        }
        match q.sharer {
            None => r.same((slot, axis), q.head),
            Some(sharer) => {
                let apart = r.virtual_value(vec![Dim::from(s.key_heads), s.sharing()]);
                r.regroup((slot, vec![axis]), (apart, vec![0, 1]));
                r.same((apart, 0), q.head);
                r.same((apart, 1), sharer);
            }
        }
    }
    let batch = &cx.shape(QUERY)[0];
    for slot in [LOGIT_BIAS, LOGITS] {
        if let [first, ..] = cx.shape(slot) {
            relate(r, ((slot, 0), first), &[(OUTPUT, 0)], batch);
            (2..cx.shape(slot).len()).for_each(|axis| r.barrier((slot, axis), KEYS));
        }
    }
}

/// `B * N * T * 2 * H*E`
fn grouped_cost(cx: &CostCx<'_>) -> Option<Dim> {
    let [batch, queries, width] = cx.outputs.first().copied().flatten()? else { return None };
    let keys = cx.outputs.get(1).copied().flatten()?.get(2)?;
    Some([batch, queries, keys, width, &Dim::from(2i64)].into_iter().product())
}

/// Heads of queries and of keys.
fn grouped_refit(cx: &mut RefitCx<'_>) -> Result<(), RefitError> {
    let Some(kept) = cx.kept_input(0, 2) else { return Ok(()) };
    let s = Sizes::of(cx.node(), cx.old_input(0), cx.node().input(1).is_some()).map_err(|e| cx.error(e))?;
    let own = s.heads * s.width;
    let q = Remains::of(kept.iter().copied().filter(|p| *p < own), s.heads, s.width).map_err(|e| cx.error(e))?;
    let keys: Vec<usize> = if s.packed {
        kept.iter().filter(|p| (own..own + s.key_heads * s.width).contains(p)).map(|p| p - own).collect()
    } else {
        cx.kept_input(1, 2).map_or_else(|| (0..s.key_heads * s.width).collect(), <[usize]>::to_vec)
    };
    let k = Remains::of(keys.into_iter(), s.key_heads, s.width).map_err(|e| cx.error(e))?;
    if k.heads == 0 || q.heads % k.heads != 0 {
        return Err(cx.error(format!("{} query heads for {} key heads", q.heads, k.heads)));
    }
    for (name, heads) in [("num_heads", q.heads), ("kv_num_heads", k.heads)] {
        let heads = i64::try_from(heads).unwrap_or(i64::MAX);
        if cx.node().attr_int(name) != Some(heads) {
            cx.set_attr(name, AttrValue::Int(heads));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::ops::matmul::one_node::{ints, links, microsoft, refit, shapes};

    const HEADS: &[(&str, i64)] = &[("num_heads", 4), ("kv_num_heads", 2)];

    #[test]
    fn whole_key_heads_are_cut_and_widths_stay() {
        let g = microsoft("GroupQueryAttention", &["b n 32", "b n 16", "b n 16", "-", "-", "b", "1"], ints(HEADS), 3);
        assert_eq!(shapes(&g), Ok(["b n 32", "b 2 n 8", "b 2 n 8"].map(String::from).to_vec()));
        let links = links(&g);
        for link in ["in0.2~v0.0,v0.1,v0.2", "in1.2~v1.0,v1.1", "v0.0=v1.0", "v0.2*v1.1", "!v1.1", "!v2.1", "out1.1=v0.0"] {
            assert!(links.iter().any(|l| l == link), "{link} in {links:?}");
        }
    }

    #[test]
    fn heads_follow_the_cut_in_both_forms() {
        let apart = &["b n 32", "b n 16", "b n 16", "-", "-", "b", "1"][..];
        let one = &["b n 64", "-", "-", "-", "-", "b", "1"][..];
        let second = |from: usize, to: usize| (from..to).collect::<Vec<_>>();
        let packed = [second(16, 32), second(40, 48), second(56, 64)].concat();
        let cuts = [vec![(0, 2, second(16, 32)), (1, 2, second(8, 16)), (2, 2, second(8, 16))], vec![(0, 2, packed)]];
        for (inputs, cut) in [apart, one].into_iter().zip(cuts) {
            let mut g = microsoft("GroupQueryAttention", inputs, ints(HEADS), 3);
            assert_eq!(refit(&mut g, &cut), Ok(vec![]));
            let node = g.node(g.order()[0]);
            assert_eq!((node.attr_int("num_heads"), node.attr_int("kv_num_heads")), (Some(2), Some(1)), "{inputs:?}");
        }
    }
}
