//! Attention and PackedAttention: projections to q, k and v, and attention over them.
//!
//! Shape: `x [B, N, D]`, weight `[D, H*E + H*E + H*Ev]`, bias as wide -> `[B, N, H*Ev]`; packed, `[T, D]` -> `[T, H*Ev]`. `qkv_hidden_sizes`
//! has the three widths, which are equal without it. `P = softmax(scale * q k^T + mask + bias)`, `y = P v`; a scale of 0 is `1/sqrt(E)`.
//! Example: weight `[48, 144]` with 3 heads: columns 0 to 47 are q, `3 x 16`, whose 16 are contracted with those of columns 48 to 95;
//! the 16 of columns 96 to 143 are carried to the output.
//! Keys of earlier runs share one tensor with their values, so widths stay where there are any.

use super::{bias_axes, fused, refit_heads, refuse_all, untrained};
use crate::axes::relation::{At, AxesCx, FusedAttention, KeyMask, Relations, Slot};
use crate::graph::{AttrValue, Node};
use crate::infer::{Dim, Fact, InferCx, InferError};
use crate::ops::attention::{KEYS, Remains, relate};
use crate::ops::{Cost, CostCx, OpRule, Refit};
use crate::slice::refit::{RefitCx, RefitError};
use std::ops::Range;

/// The records of this family.
pub static RULES: &[OpRule] = &[
    OpRule {
        cost: Cost::Rule(attention_cost),
        refit: Refit::Rule(attention_refit),
        ..fused("Attention", attention_infer, attention_axes)
    },
    OpRule {
        cost: Cost::Rule(attention_cost),
        refit: Refit::Rule(attention_refit),
        ..untrained("PackedAttention", attention_infer, attention_axes)
    },
];

const INPUT: Slot = Slot::In(0);
const WEIGHT: usize = 1;
const BIAS: usize = 2;
/// Of Attention; offsets of tokens where packed.
const MASK: usize = 3;
/// Of Attention; lengths of sequences where packed.
const PAST: usize = 4;
const LOGIT_BIAS: usize = 5;
const OUTPUT: Slot = Slot::Out(0);
const PRESENT: usize = 1;

/// The three projections.
struct Projection {
    heads: usize,
    /// Columns of q, k, v.
    columns: [Range<usize>; 3],
}

impl Projection {
    fn of(node: &Node, weight: &[Dim]) -> Result<Self, String> {
        let heads = node.attr_int("num_heads").and_then(|h| usize::try_from(h).ok()).filter(|h| *h > 0);
        let heads = heads.ok_or("num_heads is missing")?;
        let total = weight.get(1).and_then(Dim::size).ok_or("a weight of unknown width")?;
        let sizes: Vec<usize> = match node.attr_ints("qkv_hidden_sizes") {
            Some(sizes) => sizes.iter().filter_map(|s| usize::try_from(*s).ok()).collect(),
            None => vec![total / 3; 3],
        };
        let [q, k, v] = sizes[..] else { return Err(format!("qkv_hidden_sizes of {} entries", sizes.len())) };
        if q != k || q + k + v != total || q % heads != 0 || v % heads != 0 {
            return Err(format!("projections of {q}, {k} and {v} in {total} columns for {heads} heads"));
        }
        Ok(Self { heads, columns: [0..q, q..q + k, q + k..total] })
    }

    /// Width of a head of part 0, 1 or 2.
    fn width(&self, part: usize) -> usize {
        self.columns[part].len() / self.heads
    }
}

fn is_packed(node: &Node) -> bool {
    node.op() == "PackedAttention"
}

fn attention_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let unknown = || vec![Fact::new(cx.dtype(0), None), Fact::new(cx.dtype(0), None)];
    let (Some(x), Some(weight)) = (cx.shape(0), cx.shape(WEIGHT)) else { return Ok(unknown()) };
    if weight.get(1).is_none_or(|w| w.size().is_none()) {
        return Ok(unknown());
    }
    let p = Projection::of(cx.node, weight).map_err(|e| cx.error(e))?;
    let Some((_, front)) = x.split_last().filter(|(_, front)| front.len() == if is_packed(cx.node) { 1 } else { 2 }) else {
        return Err(cx.error(format!("an input of rank {}", x.len())));
    };
    let mut y = front.to_vec();
    y.push(Dim::from(p.columns[2].len()));
    let present = match front {
        [batch, tokens] => {
            let past =
                if cx.has_input(PAST) { cx.shape(PAST).and_then(|p| p.get(3)).map(|p| p + tokens) } else { Some(tokens.clone()) };
            past.map(|all| vec![Dim::from(2i64), batch.clone(), Dim::from(p.heads), all, Dim::from(p.width(1))])
        }
        _ => None,
    };
    Ok(vec![Fact::new(cx.dtype(0), Some(y)), Fact::new(cx.dtype(0), present)])
}

/// `b n |d|, |d| (h e|h e|h f), (h e|h e|h f) -> b n (h f)`, e of q being contracted with e of k.
fn attention_axes(cx: &AxesCx<'_>) -> Relations {
    let p = match Projection::of(cx.node, cx.shape(Slot::In(WEIGHT))) {
        Ok(p) => p,
        Err(reason) => return refuse_all(cx, &reason),
    };
    let mut relations = Relations::default();
    let r = &mut relations;
    let width = cx.shape(INPUT).len().saturating_sub(1);
    let tokens = (INPUT, width.saturating_sub(1));
    r.contract((INPUT, width), (Slot::In(WEIGHT), 0));
    let all = r.virtual_value(vec![Dim::from(p.columns[2].end)]);
    r.same((Slot::In(WEIGHT), 1), (all, 0));
    if cx.has(Slot::In(BIAS)) {
        r.same((Slot::In(BIAS), 0), (all, 0));
    }
    let [q, k, v] = [0, 1, 2].map(|part| {
        let columns = p.columns[part].clone();
        let flat = r.virtual_value(vec![Dim::from(columns.len())]);
        r.select((all, 0), (flat, 0), columns.collect(), 0);
        apart(r, (flat, 0), &p, part)
    });
    let y = apart(r, (OUTPUT, width), &p, 2);
    [k, v, y].into_iter().for_each(|x| r.same((q, 0), (x, 0)));
    r.contract((q, 1), (k, 1));
    r.same((v, 1), (y, 1));
    r.same(tokens, (OUTPUT, tokens.1));
    r.barrier(tokens, KEYS);
    if !is_packed(cx.node) {
        r.same((INPUT, 0), (OUTPUT, 0));
    }
    let mask = side_axes(cx, r, &p, tokens, [q, v]);
    r.attention = Some(FusedAttention { head: (q, 0), sharers: None, qk: (q, 1), vo: (v, 1), mask });
    relations
}

/// `[H, width]` in the place of an axis.
fn apart(r: &mut Relations, (slot, axis): At, p: &Projection, part: usize) -> Slot {
    let v = r.virtual_value(vec![Dim::from(p.heads), Dim::from(p.width(part))]);
    r.regroup((slot, vec![axis]), (v, vec![0, 1]));
    v
}

/// Mask, past and present, and what is added to logits. Returns where keys can be masked.
fn side_axes(cx: &AxesCx<'_>, r: &mut Relations, p: &Projection, tokens: At, [q, v]: [Slot; 2]) -> Option<KeyMask> {
    let bias = Slot::In(LOGIT_BIAS);
    let heads = Dim::from(p.heads);
    let head = Some(((q, 0), &heads));
    if is_packed(cx.node) {
        bias_axes(cx, r, bias, [None, head, None, None]);
        return None;
    }
    let (batch, length) = (&cx.shape(INPUT)[0], &cx.shape(INPUT)[1]);
    if let Some(size) = cx.shape(Slot::In(MASK)).first().filter(|size| *size == batch) {
        relate(r, ((Slot::In(MASK), 0), size), &[(OUTPUT, 0)], batch);
    }
    let samples = Some(((OUTPUT, 0), batch));
    let has_past = cx.has(Slot::In(PAST)) || cx.has(Slot::Out(PRESENT));
    if has_past {
        for slot in [Slot::In(PAST), Slot::Out(PRESENT)].into_iter().filter(|s| cx.shape(*s).len() == 5) {
            r.same((slot, 1), (OUTPUT, 0));
            r.same((slot, 2), (q, 0));
            r.barrier((slot, 3), "keys and values of earlier runs");
        }
        [q, v].into_iter().for_each(|x| r.barrier((x, 1), "keys and values of earlier runs have one width"));
        bias_axes(cx, r, bias, [samples, head, Some((tokens, length)), None]);
        return None;
    }
    bias_axes(cx, r, bias, [samples, head, Some((tokens, length)), Some((tokens, length))]);
    let mask = KeyMask { keys: tokens, queries: tokens, bias: LOGIT_BIAS };
    (!cx.has(Slot::In(MASK))).then_some(mask)
}

/// `B * N * D * columns + B * N * T * (H*E + H*Ev)`; what a packed batch costs depends on its sequences.
fn attention_cost(cx: &CostCx<'_>) -> Option<Dim> {
    let shape = |slot: usize| cx.inputs.get(slot).copied().flatten();
    let [batch, tokens, width] = shape(0)? else { return None };
    let (columns, y) = (shape(WEIGHT)?.get(1)?, cx.outputs.first().copied().flatten()?.last()?);
    let past = match cx.node.input(PAST) {
        Some(_) => shape(PAST)?.get(3)?.clone(),
        None => Dim::from(0i64),
    };
    // q and k are as wide as each other.
    let both = &(columns - y).exact_div(&Dim::from(2i64))? + y;
    let projections: Dim = [batch, tokens, width, columns].into_iter().product();
    let products: Dim = [batch, tokens, &(&past + tokens), &both].into_iter().product();
    Some(&projections + &products)
}

/// Number of heads, widths of the projections, and the scale that the old width implied.
fn attention_refit(cx: &mut RefitCx<'_>) -> Result<(), RefitError> {
    let Some(kept) = cx.kept_input(WEIGHT, 1) else { return Ok(()) };
    let p = Projection::of(cx.node(), cx.old_input(WEIGHT)).map_err(|e| cx.error(e))?;
    let mut left = Vec::new();
    for (part, columns) in p.columns.iter().enumerate() {
        let own = kept.iter().filter(|c| columns.contains(c)).map(|c| c - columns.start);
        left.push(Remains::of(own, p.heads, p.width(part)).map_err(|e| cx.error(e))?);
    }
    let (heads, width) = (left[0].heads, left[0].first.len());
    if left.iter().any(|l| l.heads != heads) || left[1].first.len() != width {
        return Err(cx.error("q, k and v keep different heads or widths"));
    }
    let sizes: Vec<usize> = left.iter().map(|l| l.heads * l.first.len()).collect();
    let named = cx.node().attr_ints("qkv_hidden_sizes").is_some();
    if named || sizes[2] != sizes[0] {
        let sizes = sizes.iter().map(|s| i64::try_from(*s).unwrap_or(i64::MAX)).collect();
        cx.set_attr("qkv_hidden_sizes", AttrValue::Ints(sizes));
    }
    refit_heads(cx, heads, (p.width(0), width));
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::graph::AttrValue;
    use crate::graph::build::attr;
    use crate::ops::matmul::one_node::{ints, links, macs, microsoft, refit, shapes};

    #[test]
    fn projections_are_parts_of_the_columns() {
        let g = microsoft("Attention", &["b n 6", "6 12", "12"], ints(&[("num_heads", 2)]), 1);
        assert_eq!(shapes(&g), Ok(vec!["b n 4".to_string()]));
        assert_eq!(macs(&g), "8*b*n^2+72*b*n");
        let expected = [
            "in0.2*in1.0",
            "in1.1=v0.0",
            "in2.0=v0.0",
            "v0.0[0..=3]>v1.0@0",
            "v1.0~v2.0,v2.1",
            "v0.0[4..=7]>v3.0@0",
            "v3.0~v4.0,v4.1",
            "v0.0[8..=11]>v5.0@0",
            "v5.0~v6.0,v6.1",
            "out0.2~v7.0,v7.1",
            "v2.0=v4.0",
            "v2.0=v6.0",
            "v2.0=v7.0",
            "v2.1*v4.1",
            "v6.1=v7.1",
            "in0.1=out0.1",
            "!in0.1",
            "in0.0=out0.0",
        ];
        assert_eq!(links(&g), expected);
    }

    #[test]
    fn a_past_keeps_the_widths() {
        let g = microsoft("Attention", &["b n 6", "6 12", "12", "-", "2 b 2 5 2"], ints(&[("num_heads", 2)]), 2);
        assert_eq!(shapes(&g), Ok(vec!["b n 4".to_string(), "2 b 2 n+5 2".to_string()]));
        let links = links(&g);
        assert!(["!v2.1", "!v6.1", "in4.2=v2.0"].iter().all(|l| links.iter().any(|x| x == l)), "{links:?}");
    }

    #[test]
    fn sizes_that_do_not_fit_are_errors_and_unknown_ones_barriers() {
        assert!(shapes(&microsoft("Attention", &["b n 6", "6 13", "13"], ints(&[("num_heads", 2)]), 1)).is_err());
        assert!(shapes(&microsoft("Attention", &["b n 6", "6 12", "12"], ints(&[("num_heads", 3)]), 1)).is_err());
        let g = microsoft("Attention", &["b n 6", "6 m", "m"], ints(&[("num_heads", 2)]), 1);
        assert_eq!(shapes(&g), Ok(vec!["?".to_string()]));
        assert!(links(&g).iter().all(|l| l.starts_with('!')));
    }

    #[test]
    fn widths_heads_and_the_implied_scale_follow_the_cut() {
        let columns = |part: usize, kept: &[usize]| kept.iter().map(|c| part * 8 + c).collect::<Vec<_>>();
        let kept = |qk: &[usize], v: &[usize]| [columns(0, qk), columns(1, qk), columns(2, v)].concat();
        let new = || microsoft("Attention", &["b n 6", "6 24", "24"], ints(&[("num_heads", 2)]), 1);
        let sizes = |g: &crate::graph::Graph| g.node(g.order()[0]).attr_ints("qkv_hidden_sizes").map(<[i64]>::to_vec);
        let mut g = new();
        assert_eq!(refit(&mut g, &[(1, 1, kept(&[0, 2, 5, 7], &[1, 2, 3, 4, 5, 6]))]), Ok(vec![]));
        let node = g.node(g.order()[0]);
        assert_eq!((node.attr_int("num_heads"), node.attr_float("scale")), (Some(2), Some(0.5)));
        assert_eq!(sizes(&g), Some(vec![4, 4, 6]));
        // A whole head: widths stay, and nothing but the number of heads is written.
        let mut g = new();
        assert_eq!(refit(&mut g, &[(1, 1, kept(&[4, 5, 6, 7], &[4, 5, 6, 7]))]), Ok(vec![]));
        let node = g.node(g.order()[0]);
        assert_eq!((node.attr_int("num_heads"), node.attr_float("scale")), (Some(1), None));
        assert_eq!(sizes(&g), None);
        // Widths that were unlike and are equal now stay written; a scale of 0 is none.
        let attrs = vec![
            attr("num_heads", AttrValue::Int(2)),
            attr("qkv_hidden_sizes", AttrValue::Ints(vec![8, 8, 8])),
            attr("scale", AttrValue::Float(0.0)),
        ];
        let mut g = microsoft("Attention", &["b n 6", "6 24", "24"], attrs, 1);
        assert_eq!(refit(&mut g, &[(1, 1, kept(&[0, 4], &[0, 4]))]), Ok(vec![]));
        assert_eq!(sizes(&g), Some(vec![2, 2, 2]));
        assert_eq!(g.node(g.order()[0]).attr_float("scale"), Some(0.5));
        assert!(refit(&mut new(), &[(1, 1, kept(&[0, 1, 4], &[0, 4]))]).is_err());
        assert!(refit(&mut new(), &[(1, 1, kept(&[0, 4], &[0, 1]))]).is_err());
    }
}
